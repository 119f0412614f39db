use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use domain::Role;
use proto::link::{Beat, BeatAnswer};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_rustls::TlsStream;

use super::SenderConfig;
use super::probe::Probe;
use super::thread::BeatThread;
use super::wire;
use crate::Error;

/// What a node has to say; asked on the beat thread, and so must not block. Its number and the silence of the runtime
/// are filled in.
pub type BeatSource = Arc<dyn Fn() -> Beat + Send + Sync>;

/// Beats to every target until it is dropped.
pub struct BeatSender {
    thread: BeatThread,
    targets: watch::Sender<Vec<String>>,
    last: Arc<Mutex<Option<(Instant, BeatAnswer)>>>,
}

impl BeatSender {
    /// `targets`: `host:port` of the beat listeners. The calling runtime is the one that is probed.
    pub fn spawn(
        config: SenderConfig,
        identity: &net::Identity,
        targets: Vec<String>,
        source: BeatSource,
    ) -> Result<Self, Error> {
        let dialer = net::Dialer::new(identity, net::Protocol::Beat).with_timeout(config.timeout());
        let (targets, watched) = watch::channel(targets);
        let (last, runtime) = (Arc::default(), Handle::current());
        let beating = Beating { config, dialer, source, last: Arc::clone(&last) };
        let thread =
            BeatThread::spawn("beat-sender", move || run(beating, watched, Probe::new(runtime)))?;
        Ok(Self { thread, targets, last })
    }

    /// From now on these. A connection to one that stays goes on.
    pub fn set_targets(&self, targets: Vec<String>) {
        self.targets.send_replace(targets);
    }

    /// The newest answer, and when it came.
    pub fn last_answer(&self) -> Option<(Instant, BeatAnswer)> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub async fn shutdown(self) {
        self.thread.shutdown().await;
    }
}

impl fmt::Debug for BeatSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BeatSender({:?})", *self.targets.borrow())
    }
}

struct Beating {
    config: SenderConfig,
    dialer: net::Dialer,
    source: BeatSource,
    last: Arc<Mutex<Option<(Instant, BeatAnswer)>>>,
}

/// Makes one beat a period, which every target sends: so all of them hear the same.
async fn run(beating: Beating, mut targets: watch::Receiver<Vec<String>>, mut probe: Probe) {
    let beating = Arc::new(beating);
    let (sender, beats) = watch::channel(Beat::default());
    let mut tasks = JoinSet::new();
    let mut running = HashMap::new();
    let mut ticks = interval(beating.config.period());
    // A thread that was stopped beats once when it wakes, and not for all that it missed.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    loop {
        let wanted = targets.borrow_and_update().clone();
        running.retain(|target, task: &mut tokio::task::AbortHandle| {
            let stays = wanted.contains(target);
            if !stays {
                task.abort();
            }
            stays
        });
        for target in wanted {
            let make = || tasks.spawn(beat(beating.clone(), target.clone(), beats.clone()));
            running.entry(target.clone()).or_insert_with(make);
        }
        tokio::select! {
            _ = ticks.tick() => {
                number += 1;
                let runtime_silent_ms = probe.silent_ms();
                sender.send_replace(Beat { number, runtime_silent_ms, ..(beating.source)() });
            }
            changed = targets.changed() => if changed.is_err() { return },
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Beats to one target, for ever.
async fn beat(beating: Arc<Beating>, target: String, mut beats: watch::Receiver<Beat>) {
    let expected = net::Expected::any(Role::Control);
    let mut lost = false;
    loop {
        match beating.dialer.dial(&target, &expected).await {
            Ok(dialed) => {
                lost = false;
                let Err(error) = converse(&beating, dialed.stream, &mut beats).await;
                tracing::info!(%target, %error, "lost a beat connection");
            }
            Err(error) if !lost => {
                lost = true;
                let error: &dyn std::error::Error = &error;
                tracing::warn!(%target, error, "cannot beat");
            }
            Err(_) => {}
        }
        sleep(beating.config.redial()).await;
    }
}

async fn converse(
    beating: &Beating,
    mut stream: TlsStream<TcpStream>,
    beats: &mut watch::Receiver<Beat>,
) -> io::Result<std::convert::Infallible> {
    loop {
        let beat = beats.borrow_and_update().clone();
        if 0 < beat.number {
            let round = async {
                wire::write(&mut stream, &beat).await?;
                wire::read::<BeatAnswer>(&mut stream).await
            };
            let answer = timeout(beating.config.timeout(), round).await;
            let answer = answer.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            let mut last = beating.last.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some((Instant::now(), answer));
        }
        beats.changed().await.map_err(io::Error::other)?;
    }
}
