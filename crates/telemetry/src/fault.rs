//! Places at which a test lets a process die, stop or block. Without the feature `fault-points`, which only the tests
//! switch on, a place is nothing at all.

/// Every place there is, in the order in which a work passes them.
pub const POINTS: [&str; 12] = [
    "accept-before-append",
    "accept-committed",
    "turn-before-step",
    "job-taken",
    "tool-returned",
    "turn-answered",
    "turn-journaled",
    "turn-ended",
    "writer-cut",
    "writer-before-commit",
    "writer-committed",
    "writer-acknowledged",
];

/// The same of the next owner of a shard.
pub const OWNER_POINTS: [&str; 3] = ["open-read", "open-committed", "agent-recovered"];

/// The same of a leader, when it moves a shard.
pub const LEADER_POINTS: [&str; 2] = ["leader-before-fence", "leader-fenced"];

/// The variable that says who does what where: `node-1:turn-answered:3:kill`, with `stop` or `block-20000` (milliseconds)
/// for `kill`. The number says at which pass. A name that ends in `*` stands for every process whose name begins so. Several are
/// separated by commas; of each process the first holds.
pub const VARIABLE: &str = "STAGEDOOR_FAULT_POINT";

#[cfg(not(feature = "fault-points"))]
mod points {
    /// Nothing.
    #[inline(always)]
    pub fn point(_: &str) {}

    pub(crate) fn named(_: &str) {}
}

#[cfg(feature = "fault-points")]
mod points {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use rustix::process::{Signal, getpid, kill_process};

    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();

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
    }

    /// This process is called so: from now on its plan holds.
    pub(crate) fn named(process: &str) {
        let plans = std::env::var(super::VARIABLE).unwrap_or_default();
        _ = PLAN.set(plans.split(',').find_map(|text| parse(text, process)));
    }

    fn parse(text: &str, process: &str) -> Option<Plan> {
        let mut parts = text.split(':');
        let (who, point) = (parts.next()?, parts.next()?);
        let pass = parts.next()?.parse().ok()?;
        let action = match parts.next()? {
            "kill" => Action::Kill,
            "stop" => Action::Stop,
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
        let Some(Some(plan)) = PLAN.get() else { return };
        if plan.point != name || plan.passed.fetch_add(1, Ordering::Relaxed) + 1 != plan.pass {
            return;
        }
        tracing::warn!(point = name, pass = plan.pass, "a planned fault");
        match plan.action {
            Action::Kill => _ = kill_process(getpid(), Signal::KILL),
            Action::Stop => _ = kill_process(getpid(), Signal::STOP),
            Action::Block(time) => block_all(time),
        }
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
pub use points::point;
