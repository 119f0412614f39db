//! Who may do what at a store, by the role in its certificate.

use domain::Role;
use proto::link::read_request::Read;
use proto::link::write_request::Write;
use proto::status::Failure;

use crate::{Error, metrics};

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// Owners: commit and prune shards.
    WriteShard,
    /// Owners and control: read shards.
    ReadShard,
    /// Control: provision and fence shards, back up, check, and the control database.
    Administer,
}

pub(super) fn of_write(write: &Write) -> Right {
    match write {
        Write::Group(_) | Write::Prune(_) => Right::WriteShard,
        Write::Fence(_) | Write::Provision(_) | Write::Control(_) => Right::Administer,
    }
}

pub(super) fn of_read(read: &Read) -> Right {
    match read {
        Read::Owner(_)
        | Read::Agent(_)
        | Read::History(_)
        | Read::Histories(_)
        | Read::Recovery(_)
        | Read::Work(_)
        | Read::Works(_)
        | Read::Agents(_)
        | Read::Definition(_) => Right::ReadShard,
        Read::Control(_) | Read::Check(_) | Read::Backup(_) => Right::Administer,
    }
}

fn has(role: Role, right: Right) -> bool {
    match (role, right) {
        (Role::Node, Right::WriteShard | Right::ReadShard)
        | (Role::Control, Right::ReadShard | Right::Administer) => true,
        (Role::Node, Right::Administer)
        | (Role::Control, Right::WriteShard)
        | (Role::Store | Role::Client, _) => false,
    }
}

pub(super) fn check(peer: &net::grpc::PeerInfo, right: Right) -> Result<(), Error> {
    if has(peer.id.role, right) {
        return Ok(());
    }
    metrics::DENIED.inc();
    let need = match right {
        Right::WriteShard => "only a node may commit to a shard or prune it",
        Right::ReadShard => "only control and nodes may read a shard",
        Right::Administer => "only control may do this",
    };
    tracing::warn!(peer = %peer.id, addr = %peer.addr, need, "refused a request");
    Err(Error::Denied { what: format!("{} may not do this: {need}", peer.id) })
}

/// Who sent a request.
pub(super) fn peer<T>(request: &tonic::Request<T>) -> Result<net::grpc::PeerInfo, tonic::Status> {
    let peer = request.extensions().get::<net::grpc::PeerInfo>().cloned();
    let unknown = || Error::Denied { what: "the sender is not known".to_owned() };
    peer.ok_or_else(|| Failure::from(unknown()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_may_do_what_it_needs_and_no_more() {
        let check = |role, allowed: [bool; 3]| {
            let rights = [Right::WriteShard, Right::ReadShard, Right::Administer];
            assert_eq!(rights.map(|right| has(role, right)), allowed, "{role}");
        };
        check(Role::Node, [true, true, false]);
        check(Role::Control, [false, true, true]);
        check(Role::Store, [false, false, false]);
        check(Role::Client, [false, false, false]);
    }
}
