//! What models say while their steps run: shown as it is said, and over every fault each byte once, or taken back.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use client::Client;
use proto::v1::open_response::Response;
use proto::v1::work_event::Event;
use proto::v1::{
    ApplyDefinitionRequest, Definition, DrainRequest, OpenWatch, SubmitRequest, WorkEvent,
};
use tests::harness::history::{End, History, Shown, Told};
use tests::harness::{Heard, Mesh, MeshOptions, PATIENCE, eventually};
use tokio::task::JoinHandle;

use crate::{PROGRAM, until_not_too_busy};

const SPEAKER: &str = "speaker";
/// So many that every node has some.
const WORKS: usize = 24;
const WORDS: usize = 100;
const PAUSE_MS: u64 = 50;

/// Works that are said word by word, each by an agent of its own. Every other one is watched by a call of its own, the rest
/// on open streams.
struct Talk {
    told: Vec<Arc<Mutex<Told>>>,
    listeners: Vec<JoinHandle<()>>,
}

fn mesh() -> Mesh {
    mesh_with(Vec::new())
}

fn mesh_with(mut env: Vec<(String, String)>) -> Mesh {
    // All of them speak at once.
    env.push(("STAGEDOOR_NODE__PHASES__WORKERS".to_owned(), WORKS.to_string()));
    let options = MeshOptions { controls: 3, env, ..MeshOptions::default() };
    let mesh = Mesh::start(PROGRAM, &options);
    let definition = Definition {
        name: SPEAKER.to_owned(),
        behaviour: "loop".to_owned(),
        model: "script".to_owned(),
        ..Definition::default()
    };
    let tenant = "default".to_owned();
    let apply = ApplyDefinitionRequest { tenant, definition: Some(definition) };
    mesh.block_on(mesh.client().apply(apply)).unwrap();
    mesh
}

fn answer(number: usize) -> String {
    let words = (0..WORDS).map(|word| format!("w{word}-of-{number}"));
    words.collect::<Vec<_>>().join(" ")
}

fn request(topic: &str, number: usize) -> SubmitRequest {
    let program = serde_json::json!({ "answer": answer(number), "pause_ms": PAUSE_MS });
    SubmitRequest {
        agent: format!("default/{SPEAKER}/k{number}"),
        input: program.to_string(),
        idempotency_key: format!("{topic}-{number}"),
        timeout: Some(Duration::from_secs(120).into()),
        ..SubmitRequest::default()
    }
}

/// Whether that was the last event.
fn hear(told: &Mutex<Told>, event: &WorkEvent) -> bool {
    let mut told = told.lock().unwrap();
    told.work.clone_from(&event.work);
    told.events.as_mut().unwrap().push(Shown::of(event));
    if let Some(Event::Result(work)) = &event.event {
        told.end = Some(End::of(work));
    }
    told.end.is_some()
}

async fn listen(client: Client, request: SubmitRequest, told: Arc<Mutex<Told>>, watches: bool) {
    if watches {
        let work = client.submit(request).await.unwrap();
        let mut watch = client.watch(&work.id, "");
        while !hear(&told, &watch.next().await.unwrap().unwrap()) {}
        return;
    }
    let mut open = client.open();
    open.sender().submit(1, request, OpenWatch::All).await.unwrap();
    loop {
        match open.next().await.unwrap().unwrap().response {
            Some(Response::Event(event)) if hear(&told, &event) => return,
            Some(Response::Event(_) | Response::Accepted(_)) | None => {}
            Some(Response::Refused(refused)) => panic!("{refused:?}"),
        }
    }
}

impl Talk {
    /// Returns when something of every work was shown. Every third client begins at `replica`.
    fn begin(mesh: &Mesh, topic: &str, replica: &str) -> Self {
        let begin = |number| {
            let request = request(topic, number);
            let told = Arc::new(Mutex::new(Told {
                work: String::new(),
                agent: request.agent.clone(),
                key: request.idempotency_key.clone(),
                place: None,
                end: None,
                events: Some(Vec::new()),
            }));
            let client = if number % 3 == 0 { mesh.client_at(replica) } else { mesh.new_client() };
            let listen = listen(client, request, told.clone(), number % 2 == 0);
            (told, mesh.runtime().spawn(listen))
        };
        let (told, listeners) = (0..WORKS).map(begin).unzip();
        let talk = Self { told, listeners };
        eventually(PATIENCE, "something of every work is shown", || {
            let silent: Vec<_> =
                talk.told().into_iter().filter(|told| said(told) == 0).map(|it| it.agent).collect();
            if silent.is_empty() { Ok(()) } else { Err(format!("{silent:?}")) }
        });
        talk
    }

    fn told(&self) -> Vec<Told> {
        self.told.iter().map(|told| told.lock().unwrap().clone()).collect()
    }

    /// Waits for all ends.
    fn end(self, mesh: &Mesh) -> Vec<Told> {
        let ended = mesh.block_on(async {
            tokio::time::timeout(2 * PATIENCE, futures::future::try_join_all(self.listeners)).await
        });
        ended.expect("all works end").expect("no listener panics");
        let told: Vec<_> = self.told.iter().map(|told| told.lock().unwrap().clone()).collect();
        for (number, told) in told.iter().enumerate() {
            assert_eq!(told.end.as_ref().unwrap().result, answer(number));
            assert!(2 < said(told), "it came in pieces: {told:?}");
        }
        told
    }
}

/// Every byte was told once, by what is in the journals.
fn assert_sound(mesh: &Mesh, told: &[Told]) -> History {
    mesh.assert_sound(&Heard { told: told.to_vec(), ..Heard::default() }, false)
}

/// How many pieces were told.
fn said(told: &Told) -> usize {
    let said = told.events.iter().flatten().filter_map(|event| event.said.as_ref());
    said.filter(|said| said.text.is_some()).count()
}

/// How often something was taken back.
fn superseded(told: &Told) -> u64 {
    let said = told.events.iter().flatten().filter_map(|event| event.said.as_ref());
    said.filter(|said| said.text.is_none()).count() as u64
}

/// How often the one step of a work was begun.
fn attempts(history: &History, told: &Told) -> u64 {
    let mut entries = history.journals[&told.agent].iter();
    let done = entries.find(|entry| entry.work == told.work && entry.kind == "model_done").unwrap();
    let content: serde_json::Value = serde_json::from_str(&done.content).unwrap();
    content["attempts"].as_u64().unwrap()
}

/// What was taken back was said again, and all that was said again had been taken back. Returns of how many works.
fn begun_again(told: &[Told], history: &History) -> usize {
    for told in told {
        let (superseded, attempts) = (superseded(told), attempts(history, told));
        assert!(superseded < attempts, "what is taken back is said again: {told:?}");
        assert_eq!(superseded == 0, attempts == 1, "all of it was shown before: {told:?}");
    }
    told.iter().filter(|told| 0 < superseded(told)).count()
}

#[test]
fn what_a_killed_owner_had_shown_is_superseded_and_said_again() {
    until_not_too_busy(killed_owner);
}

/// Returns whether all that the node had to say was over before it was killed.
fn killed_owner() -> bool {
    let mut mesh = mesh();
    let talk = Talk::begin(&mesh, "kill", "control-1");
    mesh.kill("node-1");
    let told = talk.end(&mesh);
    mesh.start_again("node-1");
    let again = begun_again(&told, &assert_sound(&mesh, &told));
    assert!(again < WORKS, "others had something to say, too");
    again == 0
}

#[test]
fn text_goes_on_where_it_was_when_a_replica_dies_or_an_owner_drains() {
    until_not_too_busy(replica_and_drain);
}

/// Returns whether steps were begun again, as a node was slower than others wait for it, or all was over too early.
fn replica_and_drain() -> bool {
    let mut mesh = mesh();
    let talk = Talk::begin(&mesh, "replica", "control-2");
    let followed = mesh.count("control-2", "stagedoor_control_subscriptions", &[]);
    mesh.kill("control-2");
    let told = talk.end(&mesh);
    mesh.start_again("control-2");
    if begun_again(&told, &assert_sound(&mesh, &told)) != 0 {
        let is_dead = |name: &&str| mesh.log(name).contains("node is dead");
        assert!(
            ["control-1", "control-3"].iter().any(is_dead),
            "no node died, and steps began again"
        );
        return true;
    }
    if followed < 1.0 {
        return true;
    }
    let talk = Talk::begin(&mesh, "drain", "control-1");
    mesh.block_on(mesh.client().drain(DrainRequest { name: "node-2".to_owned() })).unwrap();
    let told = talk.end(&mesh);
    assert_eq!(mesh.wait_until_over("node-2").code(), Some(0), "{}", mesh.log("node-2"));
    mesh.start_again("node-2");
    let history = assert_sound(&mesh, &told);
    // What its workers had begun they end, and say to the next owner.
    let taken_over = told.iter().filter(|told| {
        let entries = &history.journals[&told.agent];
        let of_work = || entries.iter().filter(|entry| entry.work == told.work);
        of_work().map(|entry| entry.epoch).min() != of_work().map(|entry| entry.epoch).max()
    });
    taken_over.count() == 0 || begun_again(&told, &history) != 0
}

#[test]
fn a_drain_that_may_not_wait_ends_well_and_what_was_said_is_superseded() {
    until_not_too_busy(|| {
        let limit = ("STAGEDOOR_NODE__DRAIN_TIMEOUT_MS".to_owned(), "1000".to_owned());
        let mut mesh = mesh_with(vec![limit]);
        let talk = Talk::begin(&mesh, "hasty", "control-1");
        mesh.block_on(mesh.client().drain(DrainRequest { name: "node-2".to_owned() })).unwrap();
        assert_eq!(mesh.wait_until_over("node-2").code(), Some(0), "{}", mesh.log("node-2"));
        let told = talk.end(&mesh);
        mesh.start_again("node-2");
        begun_again(&told, &assert_sound(&mesh, &told)) == 0
    });
}
