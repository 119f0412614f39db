//! Works on one `Open` stream of this process.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use client::OpenSender;
use proto::v1::open_response::Response;
use proto::v1::{OpenWatch, SubmitRequest, WorkState, work_event::Event};
use tokio::sync::Semaphore;

/// A response that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(60);

/// What counts as an answer, for as long as a work is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// The work is journaled; what comes after that is not waited for.
    Accepted,
    /// It has succeeded, and its result is here.
    Ended,
}

/// One work for each of `agents`, in this order: an agent that is named twice gets two.
pub(crate) struct Load {
    pub(crate) agents: Vec<String>,
    pub(crate) input: String,
    pub(crate) in_flight: usize,
    pub(crate) until: Until,
}

/// What came of it, in the order of the agents.
pub(crate) struct Done {
    pub(crate) ids: Vec<String>,
    pub(crate) seconds: f64,
    pub(crate) accepted_ms: Vec<f64>,
    /// Zeros if ends were not waited for.
    pub(crate) ended_ms: Vec<f64>,
}

/// Fails with the first work that is refused or does not succeed.
pub(crate) async fn run(client: &client::Client, load: Load) -> anyhow::Result<Done> {
    let (sender, mut responses) = client.open().split();
    let works = load.agents.len();
    let room = Arc::new(Semaphore::new(load.in_flight));
    let begin = Instant::now();
    let started = Arc::new(Mutex::new(vec![begin; works]));
    let until = load.until;
    let submitting = tokio::spawn(submit(load, sender, room.clone(), started.clone()));
    let (ids, zeros) = (vec![String::new(); works], vec![0.0; works]);
    let mut done = Done { ids, seconds: 0.0, accepted_ms: zeros.clone(), ended_ms: zeros };
    let mut answered = 0;
    while answered < works {
        let response = tokio::time::timeout(PATIENCE, responses.next()).await;
        let response =
            response.context("no response for a minute")?.context("the stream ended")??;
        let n = usize::try_from(response.tag)?;
        let since = started.lock().unwrap_or_else(PoisonError::into_inner)[n];
        let ms = since.elapsed().as_secs_f64() * 1_000.0;
        let is_answer = match response.response.context("an empty response")? {
            Response::Accepted(work) => {
                (done.accepted_ms[n], done.ids[n]) = (ms, work.id);
                until == Until::Accepted
            }
            Response::Event(event) => {
                let Some(Event::Result(work)) = event.event else { continue };
                let (id, state, reason) = (&work.id, work.state(), &work.reason);
                ensure!(state == WorkState::Succeeded, "{id} is {state:?}: {reason}");
                done.ended_ms[n] = ms;
                true
            }
            Response::Refused(refused) => bail!("refused: {} {}", refused.reason, refused.message),
        };
        if is_answer {
            answered += 1;
            room.add_permits(1);
        }
    }
    done.seconds = begin.elapsed().as_secs_f64();
    drop(submitting.await??);
    Ok(done)
}

/// The stream lives as long as its sender, which comes back.
async fn submit(
    load: Load,
    sender: OpenSender,
    room: Arc<Semaphore>,
    started: Arc<Mutex<Vec<Instant>>>,
) -> anyhow::Result<OpenSender> {
    let watch = match load.until {
        Until::Accepted => OpenWatch::None,
        Until::Ended => OpenWatch::End,
    };
    for (n, agent) in load.agents.into_iter().enumerate() {
        room.acquire().await?.forget();
        let request =
            SubmitRequest { agent, input: load.input.clone(), ..SubmitRequest::default() };
        started.lock().unwrap_or_else(PoisonError::into_inner)[n] = Instant::now();
        sender.submit(i64::try_from(n)?, request, watch).await?;
    }
    Ok(sender)
}
