//! Places at which a test lets a process die, stop or block. Without the feature `fault-points`, which only the tests
//! switch on, a place is nothing at all.

/// The places that every work passes, in their order. What begins with `call` is of a tool's call, what begins with `step`
/// of a model's.
pub const POINTS: [&str; 18] = [
    "accept-before-append",
    "accept-committed",
    "step-before",
    "step-taken",
    "step-answered",
    "step-journaled",
    "intent-journaled",
    "call-before",
    "call-taken",
    "tool-returned",
    "call-answered",
    "call-journaled",
    "turn-ended",
    "writer-idle",
    "writer-cut",
    "writer-before-commit",
    "writer-committed",
    "writer-acknowledged",
];

/// Places of a writer that gets no answer to a commit, or cannot send it.
pub const LOST_POINTS: [&str; 4] =
    ["writer-answer-lost", "writer-before-position", "writer-position-read", "writer-backing-off"];

/// A place at which a commit's answer is lost, or it is refused as by a store that is away.
pub const COMMIT: &str = "writer-commit";

/// Places of an agent whose step is in doubt.
pub const DOUBT_POINTS: [&str; 4] =
    ["doubt-journaled", "doubt-before-probe", "doubt-probed", "doubt-resolved"];

/// Places of an agent that looks up who owns its shard, after its process stood still.
pub const PROOF_POINTS: [&str; 2] = ["proof-before-read", "proof-read"];

/// The same of the next owner of a shard.
pub const OWNER_POINTS: [&str; 3] = ["open-read", "open-committed", "agent-recovered"];

/// The same of a leader, when it moves a shard.
pub const LEADER_POINTS: [&str; 2] = ["leader-before-fence", "leader-fenced"];

/// The variable that says who does what where: `node-1:call-answered:3:kill`, with `stop` or `block-20000` (milliseconds)
/// for `kill`, and at [`COMMIT`] `lose` or `refuse`. The number says at which pass. A name that ends in `*` stands for every
/// process whose name begins so. Several are separated by commas.
pub const VARIABLE: &str = "STAGEDOOR_FAULT_POINT";

/// What goes wrong with a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// It is done, and its answer is lost.
    Lose,
    /// It is not done: the store is not available.
    Refuse,
}

#[cfg(not(feature = "fault-points"))]
mod points {
    /// Nothing.
    #[inline(always)]
    pub fn point(_: &str) {}

    /// Nothing.
    #[inline(always)]
    pub fn injected(_: &str) -> Option<super::Injected> {
        None
    }

    pub(crate) fn named(_: &str) {}
}

#[cfg(feature = "fault-points")]
mod points {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use rustix::process::{Signal, getpid, kill_process};

    use super::Injected;

    static PLANS: OnceLock<Vec<Plan>> = OnceLock::new();

    struct Plan {
        point: String,
        pass: u32,
        passed: AtomicU32,
        action: Action,
    }

    enum Action {
        Kill,
        Stop,
        Block(Duration),
        Inject(Injected),
    }

    /// This process is called so: from now on its plans hold.
    pub(crate) fn named(process: &str) {
        let plans = std::env::var(super::VARIABLE).unwrap_or_default();
        _ = PLANS.set(plans.split(',').filter_map(|text| parse(text, process)).collect());
    }

    fn parse(text: &str, process: &str) -> Option<Plan> {
        let mut parts = text.split(':');
        let (who, point) = (parts.next()?, parts.next()?);
        let pass = parts.next()?.parse().ok()?;
        let action = match parts.next()? {
            "kill" => Action::Kill,
            "stop" => Action::Stop,
            "lose" => Action::Inject(Injected::Lose),
            "refuse" => Action::Inject(Injected::Refuse),
            other => {
                Action::Block(Duration::from_millis(other.strip_prefix("block-")?.parse().ok()?))
            }
        };
        let is_meant = match who.strip_suffix('*') {
            Some(beginning) => process.starts_with(beginning),
            None => process == who,
        };
        is_meant.then(|| Plan { point: point.to_owned(), pass, passed: AtomicU32::new(0), action })
    }

    /// Does what is planned here, if this is the pass.
    pub fn point(name: &str) {
        match due(name) {
            Some(Action::Kill) => _ = kill_process(getpid(), Signal::KILL),
            Some(Action::Stop) => _ = kill_process(getpid(), Signal::STOP),
            Some(Action::Block(time)) => block_all(*time),
            Some(Action::Inject(_)) | None => {}
        }
    }

    /// What is to go wrong with what is done here, if this is the pass.
    pub fn injected(name: &str) -> Option<Injected> {
        match due(name)? {
            Action::Inject(injected) => Some(*injected),
            Action::Kill | Action::Stop | Action::Block(_) => None,
        }
    }

    fn due(name: &str) -> Option<&'static Action> {
        let mut due = None;
        for plan in PLANS.get()?.iter().filter(|plan| plan.point == name) {
            if plan.passed.fetch_add(1, Ordering::Relaxed) + 1 == plan.pass {
                tracing::warn!(point = name, pass = plan.pass, "a planned fault");
                due = Some(&plan.action);
            }
        }
        due
    }

    /// Every worker of the runtime gets some of these, and stands still.
    fn block_all(time: Duration) {
        const TASKS: usize = 64;
        let until = Instant::now() + time;
        let stand_still =
            move || std::thread::sleep(until.saturating_duration_since(Instant::now()));
        for _ in 0..TASKS {
            tokio::spawn(async move { stand_still() });
        }
        stand_still();
    }
}

pub(crate) use points::named;
pub use points::{injected, point};
