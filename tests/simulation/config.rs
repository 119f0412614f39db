//! What one schedule is made of, which rules can be broken, and which faults are counted.

use domain::DefinitionHash;
use domain::definition::{Behaviour, Policy};
use domain::turn::Limits;

use crate::model::Promise;
use crate::world::{Address, Chance, Event, Plan, World};

/// The size of a schedule and its chances of faults.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) nodes: usize,
    pub(crate) controls: usize,
    pub(crate) shards: u16,
    pub(crate) agents: usize,
    pub(crate) submits: Vec<Submit>,
    /// Faults happen until then; after it, everything must come to rest.
    pub(crate) faults_until: u64,
    /// Messages lost, late and doubled, in a thousand.
    pub(crate) network: (u64, u64, u64),
    pub(crate) attempts_max: u32,
    pub(crate) in_doubt: Policy,
    pub(crate) waiting_rows_max: usize,
    pub(crate) mark_rows: u64,
    pub(crate) stale_agents_max: usize,
    pub(crate) job_ms_max: u64,
}

/// One submit of a client.
#[derive(Clone, Debug)]
pub(crate) struct Submit {
    pub(crate) agent: usize,
    pub(crate) key: String,
    pub(crate) input: String,
    pub(crate) at: u64,
    pub(crate) is_cancelled: bool,
}

impl Config {
    pub(crate) fn sample(chance: &mut Chance) -> Self {
        let agents = chance.between(1, 4) as usize;
        let faults_until = chance.between(2_500, 6_000);
        let works = chance.between(3, 8);
        let mut submits: Vec<Submit> = (0..works)
            .map(|number| Submit {
                agent: chance.index(agents),
                key: format!("k{number}"),
                // A chain that goes back to Action once, a loop, or a plain chain.
                input: format!("i{number}{}", ["+", "*", "*", "", ""][chance.index(5)]),
                at: chance.between(200, faults_until),
                is_cancelled: chance.permille(80),
            })
            .collect();
        if chance.permille(400) {
            // Two clients with the same key, or one that lost its memory.
            let twin = submits[chance.index(submits.len())].clone();
            submits.push(Submit { at: chance.between(200, faults_until), ..twin });
        }
        let mut rate = |of: u64, max: u64| match chance.permille(of) {
            true => chance.between(1, max),
            false => 0,
        };
        let network = (rate(600, 60), rate(600, 60), rate(600, 60));
        Self {
            nodes: chance.between(2, 3) as usize,
            controls: 2,
            shards: chance.between(1, 3) as u16,
            agents,
            submits,
            faults_until,
            network,
            attempts_max: if chance.permille(200) { 2 } else { 20 },
            in_doubt: [Policy::Fail, Policy::Retry, Policy::Ask][chance.index(3)],
            waiting_rows_max: if chance.permille(300) { 2 } else { 8_192 },
            mark_rows: chance.between(2, 12),
            stale_agents_max: chance.between(1, 8) as usize,
            job_ms_max: if chance.permille(200) { 700 } else { 60 },
        }
    }

    /// What a definition allows a turn.
    pub(crate) fn limits(&self, definition: &DefinitionHash) -> Limits {
        let limits = Limits { in_doubt: self.in_doubt, ..Limits::chain(1, self.attempts_max) };
        match *definition == crate::phases::definition("*") {
            true => Limits { behaviour: Behaviour::Loop, rounds_max: 3, ..limits },
            false => limits,
        }
    }

    /// Puts the planned faults into the queue.
    pub(crate) fn plan(world: &mut World) {
        let until = world.config.faults_until;
        let (nodes, controls) = (world.config.nodes, world.config.controls);
        for index in 0..nodes {
            for _ in 0..world.chance.between(0, 2) {
                let who = Address::Node(index);
                if world.chance.permille(500) {
                    crash(world, who, until);
                } else {
                    pause(world, who, until);
                }
            }
        }
        if world.chance.permille(250) {
            let index = world.chance.index(nodes);
            let from = world.chance.between(1_500, until);
            let to = from + world.chance.between(200, 1_500);
            world.at(from, Event::Plan(Plan::Drain(index)));
            world.at(to, Event::Plan(Plan::Crash(Address::Node(index))));
            world.at(to + 100, Event::Plan(Plan::Start(Address::Node(index))));
        }
        for index in 0..controls {
            if world.chance.permille(350) {
                crash(world, Address::Control(index), until);
            }
            if world.chance.permille(350) {
                pause(world, Address::Control(index), until);
            }
        }
        if world.chance.permille(250) {
            let from = world.chance.between(500, until);
            let to = from + world.chance.between(100, 1_500);
            world.at(from, Event::Plan(Plan::StoreDown));
            world.at(to, Event::Plan(Plan::StoreUp));
        }
        for _ in 0..world.chance.between(0, 2) {
            let (time, node) = (world.chance.between(500, until), world.chance.index(nodes));
            let plan = match world.chance.between(0, 2) {
                0 => Plan::SessionReset(node),
                1 => Plan::ShardCrash(node),
                _ => Plan::AgentCrash(node),
            };
            world.at(time, Event::Plan(plan));
        }
    }
}

fn crash(world: &mut World, who: Address, until: u64) {
    let from = world.chance.between(300, until);
    let to = from + world.chance.between(20, 3_500);
    world.at(from, Event::Plan(Plan::Crash(who)));
    world.at(to, Event::Plan(Plan::Start(who)));
}

fn pause(world: &mut World, who: Address, until: u64) {
    let from = world.chance.between(300, until);
    let ms = world.chance.between(50, 4_500);
    world.at(from, Event::Plan(Plan::Pause(who, ms)));
}

/// Rules that the shells of the simulation can break, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    /// The store takes groups of any epoch.
    SkipFencedGuard,
    /// An owner acts on what it reads, whoever owns the shard by then.
    SkipReadGuard,
    /// The store takes groups wherever its head is.
    SkipHeadGuard,
    /// Clients are answered when their work is put into the writer.
    AcknowledgeBeforeCommit,
    /// A group whose outcome is unknown is sent again together with what came since.
    RecutUnknownGroup,
    /// A grant is sent once.
    GrantOnce,
    /// A new owner runs the last committed step again.
    RunCommittedStepAgain,
    /// The mark leaves out agents without open work.
    ForgetIdleAgents,
    /// Writing an agent's row beside new entries of it takes it out of the heads, while more of it waits.
    ForgetHeadTooEarly,
    /// A leader that was replaced goes on, and the store lets it.
    OldLeaderFences,
    /// A shard that was dropped is opened again in the same epoch: a late twin of its first opening is taken for ours.
    OpenEpochAgain,
    /// An answer counts for the step that is due, whichever attempt it is of.
    JournalOldAnswer,
    /// A new owner makes a call again that must not be made twice, without a word.
    RepeatSilently,
}

impl Break {
    pub(crate) const ALL: [Self; 13] = [
        Self::SkipFencedGuard,
        Self::SkipReadGuard,
        Self::SkipHeadGuard,
        Self::AcknowledgeBeforeCommit,
        Self::RecutUnknownGroup,
        Self::GrantOnce,
        Self::RunCommittedStepAgain,
        Self::ForgetIdleAgents,
        Self::ForgetHeadTooEarly,
        Self::OldLeaderFences,
        Self::OpenEpochAgain,
        Self::JournalOldAnswer,
        Self::RepeatSilently,
    ];

    /// The promises that can only be broken because this rule is.
    pub(crate) fn breaks(self) -> &'static [Promise] {
        match self {
            Self::SkipFencedGuard => &[Promise::OneOwnerWrites],
            Self::SkipReadGuard => &[Promise::JournalBeforeEffect],
            Self::SkipHeadGuard => &[Promise::RowsAreWrittenOnce],
            Self::AcknowledgeBeforeCommit => &[Promise::NothingAcknowledgedIsLost],
            Self::RecutUnknownGroup => &[
                Promise::NoFalseAlarm,
                Promise::NothingAcknowledgedIsLost,
                Promise::NothingFollowsTheEnd,
                // Rows that are written again hang on what was the head before the first time.
                Promise::NothingIsForgotten,
            ],
            Self::GrantOnce => &[Promise::EverythingEnds],
            Self::RunCommittedStepAgain => &[Promise::CommittedStepsRunOnce],
            // A work that ended is open again in what is remembered.
            Self::ForgetIdleAgents => {
                &[Promise::NothingIsForgotten, Promise::CommittedStepsRunOnce]
            }
            Self::ForgetHeadTooEarly => &[Promise::NothingIsForgotten],
            Self::OldLeaderFences => &[Promise::OnlyTheLeaderMoves],
            Self::OpenEpochAgain => &[Promise::OneOwnerWrites],
            Self::JournalOldAnswer => &[Promise::OldAnswersAreDropped],
            Self::RepeatSilently => &[Promise::NothingIsRepeatedSilently],
        }
    }
}

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What went wrong in a schedule, or how it was noticed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Fault { $($(#[$doc])* $name,)* }

        impl Fault {
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

faults! {
    MessageLost,
    MessageLate,
    MessageDoubled,
    MessageOvertaken,
    /// The group never reached the store.
    CommitLost,
    /// The group was committed, and its owner was not told.
    CommitAnswerLost,
    /// A group came twice, the second time late.
    CommitDoubled,
    /// The store refused a group for its epoch.
    StaleWriteRefused,
    /// An owner read that it was none any more.
    StaleReadRefused,
    /// The store refused a group for its head.
    WrongHeadRefused,
    UnknownWasCommitted,
    UnknownWasSentAgain,
    NodeCrashed,
    NodePaused,
    /// A node woke that had been declared dead, with messages waiting for it.
    ZombieWoke,
    NodeRejoined,
    SessionReset,
    SuspectCameBack,
    StoreRestarted,
    LeaderCrashed,
    LeaderPaused,
    LeaderChanged,
    TwoLeaders,
    FenceLost,
    FenceUnanswered,
    GrantLost,
    GrantRepeated,
    ShardMoved,
    /// A shard left a node that lived, because that was about to go.
    ShardDrained,
    /// A shard left a node that lived, for one that had too few.
    ShardRebalanced,
    ShardDropped,
    AgentCrashed,
    AgentEvicted,
    AgentWoken,
    /// A new owner knew an agent's head only by the mark.
    HeadKnownByMark,
    StaleRowWritten,
    WriterFull,
    StepBegunAgain,
    AnswerTooLate,
    /// A worker got a job after its deadline, or one that was sent to a run of it before.
    JobTooLate,
    /// A worker got a job twice.
    JobTwice,
    /// A new owner was told of steps that a worker had.
    StepNamed,
    /// An answer was journaled by a later owner than the one that had asked for it.
    AnswerTakenOver,
    /// An intent was too old to be acted on when it was committed.
    IntentRenewed,
    StepInDoubt,
    /// An answer came after all and ended a doubt.
    DoubtEndedByAnswer,
    DoubtEndedByTool,
    DoubtEndedByPolicy,
    DoubtEndedByPerson,
    NobodyOffered,
    DuplicateSubmit,
    Cancelled,
    /// A work was cancelled while it was not known whether a call had been made.
    StoppedInDoubt,
    DeadLettered,
}

/// Which faults happened in one schedule.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Happened(u64);

impl Happened {
    pub(crate) fn note(&mut self, fault: Fault) {
        self.0 |= 1 << fault as u32;
    }

    pub(crate) fn has(self, fault: Fault) -> bool {
        self.0 & (1 << fault as u32) != 0
    }
}
