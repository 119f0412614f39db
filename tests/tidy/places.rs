//! The places at which tests let a process die: beside every await of who drives turns and who writes.

use telemetry::fault;

use crate::files;

/// So many lines lie between an await and its place at most.
const NEAR: usize = 5;

/// Where something durable is on its way, or begun: the files, and the awaits in them that need no place, each with its reason.
const DRIVERS: [(&str, &[&str]); 4] = [
    (
        "crates/store/src/writer/task.rs",
        &[
            // Functions that have the places in them.
            "self.gather().await",
            "self.settle(group).await",
            "self.send(&group).await",
            "self.read_position().await",
            "self.back_off(&mut backoff).await",
            // Nothing is in flight, and nothing was cut: the place before it and the one after it see the same.
            "self.unless_stopped(tokio::time::sleep(pause)).await\n    }\n\n    /// Builds",
            // The commit itself, as the test wants it to go.
            "store.commit(database, group).await",
        ],
    ),
    (
        "crates/agent/src/actor/drive.rs",
        &[
            // Reads for whoever asks; nothing of the turn is on its way in it.
            "self.wake_known().await",
            "writer.settled().await",
            "read::cancelled(&shard, work, reply).await",
        ],
    ),
    (
        "crates/agent/src/actor/step.rs",
        &[
            "self.wake_known().await",
            // A definition that was crowded out of memory.
            "shard.definition(hash).await",
            "tokio::time::sleep(Duration::from_secs(1)).await",
            "Err(_) => tokio::time::sleep(Duration::from_millis(200)).await",
            // Before the look again.
            "tokio::time::sleep(LOOK).await",
            // The call is over for us: what came of it elsewhere is asked for.
            "node.after_cut(&place, shard.id, attempt, failure).await",
        ],
    ),
    (
        "crates/agent/src/actor/doubt.rs",
        &[
            "self.wake_known().await",
            "writer.settled().await",
            "read::signalled(&shard, work, &signal, reply).await",
        ],
    ),
];

#[test]
fn every_await_of_who_drives_and_who_writes_has_a_place_to_die_at() {
    for (file, exceptions) in DRIVERS {
        let found = files::all().iter().find(|found| found.path == file).unwrap();
        let text = found.text.clone();
        for exception in exceptions {
            assert!(text.contains(exception), "{file} has no {exception:?} any more");
        }
        let spared = exceptions.iter().fold(text, |text, spared| {
            text.replace(spared, &"\n".repeat(spared.matches('\n').count()))
        });
        let lines: Vec<&str> = spared.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| awaits(line)) {
            // A future that is only made is awaited elsewhere.
            if line.contains("= async move {") {
                continue;
            }
            let near = &lines[at.saturating_sub(NEAR)..lines.len().min(at + NEAR + 1)];
            let has_place = near.iter().any(|line| line.contains("point("));
            assert!(has_place, "{file}:{} has no place near: {line}", at + 1);
        }
    }
}

fn awaits(line: &str) -> bool {
    let is_it = |rest: &str| !rest.starts_with(|next: char| next.is_alphanumeric() || next == '_');
    line.split(".await").skip(1).any(is_it)
}

#[test]
fn every_place_that_is_listed_is_in_the_code() {
    let listed = fault::POINTS
        .into_iter()
        .chain(fault::LOST_POINTS)
        .chain(fault::DOUBT_POINTS)
        .chain(fault::PROOF_POINTS)
        .chain(fault::OWNER_POINTS)
        .chain(fault::LEADER_POINTS);
    let is_ours = |file: &&files::File| {
        file.is_rust() && !file.path.ends_with("/fault.rs") && !file.path.starts_with("tests/")
    };
    let sources: Vec<_> = files::all().iter().filter(is_ours).collect();
    for point in listed {
        let quoted = format!("\"{point}\"");
        assert!(sources.iter().any(|file| file.text.contains(&quoted)), "{point} is nowhere");
    }
}
