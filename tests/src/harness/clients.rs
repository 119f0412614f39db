//! Many clients that submit works and write down what they are told.
//!
//! Each has a connection and a stream of its own. A stream that breaks for good is replaced: what it was not told yet
//! is submitted again under the same keys, what was acknowledged is watched on from its last event. Of every other work all
//! events are wanted. Judges nothing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pbjson_types::Duration as ProtoDuration;
use proto::v1::open_response::Response;
use proto::v1::work_event::Event;
use proto::v1::{OpenResponse, OpenWatch, SubmitRequest, Work, WorkEvent};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::Mesh;
use super::history::{End, Shown, Told};

/// A program that calls the counting tool once, and says its answer word by word.
const ONE_CALL: &str = r#"{"calls":[{"tool":"count"}],"answer":"{lamp} {results}","pause_ms":25}"#;

/// What they do.
#[derive(Clone, Debug)]
pub struct Load {
    pub seed: u64,
    pub clients: usize,
    /// Of all clients together, chosen at random for each work.
    pub agents: usize,
    /// Of one client, not ended.
    pub works_max: usize,
    pub definition: String,
    /// Every fourth work is a call of the counting tool, by an agent of this definition.
    pub clerk: Option<String>,
    /// How long a work may take.
    pub limit: Duration,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            seed: 1,
            clients: 8,
            agents: 200,
            works_max: 16,
            definition: "postchain".to_owned(),
            clerk: None,
            limit: Duration::from_secs(600),
        }
    }
}

/// What was heard, of all of them.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    pub told: Vec<Told>,
    /// Refusals and ends of streams, by code and reason.
    pub errors: BTreeMap<String, u64>,
    /// From each submit to its acknowledgement, and to its end.
    pub accepted_after: Vec<Duration>,
    pub ended_after: Vec<Duration>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicU64,
    ended: AtomicU64,
    streams: AtomicU64,
    heard: Mutex<Heard>,
}

/// They run until they are told to finish.
#[derive(Debug)]
pub struct Clients {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

impl Clients {
    pub fn start(mesh: &Mesh, load: &Load) -> Self {
        let shared = Arc::<Shared>::default();
        let tasks = (0..load.clients).map(|number| {
            let client = One::new(mesh.new_client(), load.clone(), number, shared.clone());
            mesh.runtime().spawn(client.run())
        });
        let tasks = tasks.collect();
        Self { shared, tasks }
    }

    /// Works that were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// And those of them whose end was heard.
    pub fn ended(&self) -> u64 {
        self.shared.ended.load(Ordering::Relaxed)
    }

    /// What was heard so far.
    pub fn heard(&self) -> Heard {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets them submit no more, and waits until every acknowledged work has ended, or the time is over.
    pub fn finish(self, mesh: &Mesh, within: Duration) -> Heard {
        self.shared.stop.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + within;
        mesh.block_on(async {
            for task in self.tasks {
                let left = deadline.saturating_duration_since(Instant::now());
                let abort = task.abort_handle();
                match timeout(left, task).await {
                    Ok(ended) => ended.expect("a client does not panic"),
                    Err(_) => abort.abort(),
                }
            }
        });
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A work that has not ended.
struct Pending {
    request: SubmitRequest,
    place: Option<(u64, u64)>,
    since: Instant,
    /// Where it stands in what was heard, once it was acknowledged.
    told: Option<usize>,
    /// Of the last event.
    cursor: String,
}

/// Of every other work every event is wanted.
fn wanted(tag: i64) -> OpenWatch {
    if tag % 2 == 0 { OpenWatch::End } else { OpenWatch::All }
}

struct One {
    client: client::Client,
    load: Load,
    number: usize,
    shared: Arc<Shared>,
    random: StdRng,
    /// Works so far, which is the tag of the next one.
    count: i64,
    pending: BTreeMap<i64, Pending>,
}

impl One {
    fn new(client: client::Client, load: Load, number: usize, shared: Arc<Shared>) -> Self {
        let random = StdRng::seed_from_u64(load.seed.wrapping_add(number as u64));
        Self { client, load, number, shared, random, count: 0, pending: BTreeMap::new() }
    }

    async fn run(mut self) {
        while !self.is_over() {
            if let Err(error) = self.stream().await {
                self.note(&error);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    fn is_stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.is_stopped() && self.pending.is_empty()
    }

    /// One stream, from what is left of the last one to its end.
    async fn stream(&mut self) -> Result<(), client::Error> {
        let stream = self.shared.streams.fetch_add(1, Ordering::Relaxed);
        let mut open = self.client.open();
        let sender = open.sender();
        let mut again: VecDeque<i64> = self.pending.keys().copied().collect();
        while !self.is_over() {
            while let Some(tag) = again.pop_front() {
                self.take_up(&sender, tag).await?;
            }
            while !self.is_stopped() && self.pending.len() < self.load.works_max {
                let tag = self.begin(stream);
                let request = self.pending[&tag].request.clone();
                sender.submit(tag, request, wanted(tag)).await?;
            }
            // Looks up now and then, to see whether it is to stop.
            match timeout(Duration::from_millis(200), open.next()).await {
                Ok(Some(response)) => self.hear(response?),
                Ok(None) => return Err(client::Error::Ended),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Goes on with a work of the stream before this one.
    async fn take_up(
        &mut self,
        sender: &client::OpenSender,
        tag: i64,
    ) -> Result<(), client::Error> {
        let told = self.pending.get(&tag).and_then(|pending| pending.told);
        let work = told.map(|told| self.lock().told[told].work.clone());
        let Some(pending) = self.pending.get_mut(&tag) else { return Ok(()) };
        if let Some(work) = work {
            return sender.watch(tag, &work, &pending.cursor).await;
        }
        // What became of it on the other stream is not known, and so is its place among others.
        pending.place = None;
        sender.submit(tag, pending.request.clone(), wanted(tag)).await
    }

    fn begin(&mut self, stream: u64) -> i64 {
        let tag = self.count;
        self.count += 1;
        let agent = self.random.random_range(0..self.load.agents);
        let lamp = format!("Lamp {tag} of house {} is lit at night. Why?", self.number);
        let (definition, input) = match &self.load.clerk {
            Some(clerk) if tag % 4 == 3 => (clerk, ONE_CALL.replace("{lamp}", &lamp)),
            Some(_) | None => (&self.load.definition, lamp),
        };
        let limit = i64::try_from(self.load.limit.as_secs()).expect("a few minutes");
        let request = SubmitRequest {
            agent: format!("default/{definition}/agent-{agent}"),
            input,
            idempotency_key: format!("{}-{}-{tag}", self.load.seed, self.number),
            timeout: Some(ProtoDuration { seconds: limit, nanos: 0 }),
            ..SubmitRequest::default()
        };
        let place = Some((stream, tag.cast_unsigned()));
        let since = Instant::now();
        let (told, cursor) = (None, String::new());
        self.pending.insert(tag, Pending { request, place, since, told, cursor });
        tag
    }

    fn hear(&mut self, response: OpenResponse) {
        let tag = response.tag;
        match response.response {
            Some(Response::Accepted(work)) => self.acknowledge(tag, &work),
            Some(Response::Event(event)) => {
                self.show(tag, &event);
                if let Some(Event::Result(work)) = event.event {
                    self.end(tag, &work);
                }
            }
            Some(Response::Refused(refused)) => {
                // One that is watched cannot be refused for good; asked again, it shows in its journal.
                self.pending.remove(&tag);
                self.note(&client::Error::of_refused(refused));
            }
            None => {}
        }
    }

    fn acknowledge(&mut self, tag: i64, work: &Work) {
        let Some(pending) = self.pending.get_mut(&tag) else { return };
        let mut heard = self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.told.is_some_and(|told| heard.told[told].work == work.id) {
            return;
        }
        heard.told.push(Told {
            work: work.id.clone(),
            agent: pending.request.agent.clone(),
            key: pending.request.idempotency_key.clone(),
            place: pending.place,
            end: None,
            events: (wanted(tag) == OpenWatch::All).then(Vec::new),
        });
        // Acknowledged as another work, it is in the list a second time.
        if pending.told.replace(heard.told.len() - 1).is_none() {
            heard.accepted_after.push(pending.since.elapsed());
            self.shared.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn show(&mut self, tag: i64, event: &WorkEvent) {
        let Some(pending) = self.pending.get_mut(&tag) else { return };
        pending.cursor.clone_from(&event.cursor);
        let told = pending.told;
        let mut heard = self.lock();
        if let Some(events) = told.and_then(|told| heard.told[told].events.as_mut()) {
            events.push(Shown::of(event));
        }
    }

    fn end(&mut self, tag: i64, work: &Work) {
        let Some(pending) = self.pending.remove(&tag) else { return };
        let mut heard = self.lock();
        heard.ended_after.push(pending.since.elapsed());
        if let Some(told) = pending.told {
            heard.told[told].end = Some(End::of(work));
        }
        drop(heard);
        self.shared.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn note(&self, error: &client::Error) {
        let mut what = format!("{:?}", error.kind());
        if let client::Error::Refused { status, reason, .. } = error {
            let reason = reason.map(|reason| reason.to_string()).unwrap_or_default();
            what = format!("{:?} {reason}", status.code());
        }
        *self.lock().errors.entry(what).or_default() += 1;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
