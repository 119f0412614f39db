//! What a host keeps of each agent.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use domain::agent::QUEUE_MAX;
use domain::restart::Intensity;
use domain::{AgentId, Epoch, Reason};
use proto::link::{AgentInfo, AgentPassage};
use ractor::ActorRef;
use tokio::sync::Semaphore;

use crate::actor::{AgentMessage, Glance};

/// One agent in memory, one that is going to be, or one that failed and is remembered.
pub(super) struct Slot {
    pub actor: Option<ActorRef<AgentMessage>>,
    pub room: Arc<Semaphore>,
    pub glance: Arc<Glance>,
    pub stage: Stage,
    rare: Option<Box<Rare>>,
}

/// What most agents never have.
#[derive(Default)]
pub(super) struct Rare {
    /// What came while it was on its way out, or waited to be started again or recovered.
    pub parked: Vec<AgentMessage>,
    pub intensity: Intensity,
    /// What it last failed of.
    pub failure: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Running,
    /// It has unfinished work, and is started when the node has room to recover it.
    Due,
    /// It was asked to go: nothing is sent to it until it says.
    Leaving,
    /// It failed and is started again after a while.
    Resting,
    Quarantined,
}

impl Slot {
    pub(super) fn new(stage: Stage) -> Self {
        Self {
            actor: None,
            room: Arc::new(Semaphore::new(QUEUE_MAX)),
            glance: Arc::default(),
            stage,
            rare: None,
        }
    }

    pub(super) fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    /// What came while nothing could be sent to it.
    pub(super) fn take_parked(&mut self) -> Vec<AgentMessage> {
        self.rare.as_deref_mut().map(|rare| std::mem::take(&mut rare.parked)).unwrap_or_default()
    }

    /// How often it failed.
    pub(super) fn failures(&self) -> u32 {
        self.rare.as_deref().map_or(0, |rare| rare.intensity.total())
    }

    /// The agent as its host sees it, by its row.
    pub(super) fn info(&self, id: &AgentId, epoch: Epoch) -> (u64, AgentInfo) {
        let glance = &self.glance;
        // Before the rest, which may be newer.
        let lsn = glance.lsn.load(Ordering::Acquire);
        let row = glance.row.load(Ordering::Relaxed);
        let quarantined = self.stage == Stage::Quarantined;
        let reason = if quarantined { Reason::Quarantined } else { Reason::Activated };
        let activated = AgentPassage {
            at_ms: glance.since_ms.load(Ordering::Relaxed),
            epoch: epoch.0,
            reason: Reason::Activated.code().into(),
        };
        let info = AgentInfo {
            passages: (activated.at_ms != 0).then_some(activated).into_iter().collect(),
            id: id.to_string(),
            row,
            hot: self.actor.is_some(),
            quarantined,
            reason: reason.code().into(),
            head: glance.head.load(Ordering::Relaxed),
            open_works: glance.open_works.load(Ordering::Relaxed),
            last_work: glance.last_work.load(Ordering::Relaxed),
            restarts: self.failures(),
            lsn,
        };
        (row, info)
    }
}
