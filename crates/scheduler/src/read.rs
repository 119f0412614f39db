//! What other processes send, read.

use domain::membership::{Beat, Load};
use domain::{Incarnation, Member, ProcessName, Reason};

use crate::leader::read_held;
use crate::links::malformed;

pub(crate) fn read_message<T: prost::Message + Default>(
    payload: bytes::Bytes,
) -> Result<T, proto::link::Refusal> {
    T::decode(payload).map_err(|error| malformed(format!("the message is damaged: {error}")))
}

/// A node names its reason in the field `step`, which means nothing else here. None is the usual one: the shard was
/// fenced. It matters where the store lost commits: then an operator has to look, and nobody else may have the shard.
pub(crate) fn why_dropped(envelope: &proto::link::Envelope) -> Reason {
    u16::try_from(envelope.step).ok().and_then(Reason::from_code).unwrap_or(Reason::OwnerDropped)
}

pub(crate) fn read_beat(from: ProcessName, beat: proto::link::Beat) -> Beat {
    let load = |load: proto::link::Load| Load {
        capability: load.capability,
        running: load.running,
        queued: load.queued,
    };
    Beat {
        member: Member { name: from, incarnation: Incarnation(beat.incarnation) },
        number: beat.number,
        held: beat.held.into_iter().map(read_held).collect(),
        rolled_back: beat.rolled_back.into_iter().map(read_held).collect(),
        loads: beat.loads.into_iter().map(load).collect(),
        hot_agents: beat.hot_agents,
        runtime_silent_ms: beat.runtime_silent_ms,
        stores: beat.stores.into_iter().map(|known| (known.store, known.silent_ms)).collect(),
    }
}
