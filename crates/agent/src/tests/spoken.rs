//! What models say while their steps run, as those who watch are sent it.

use std::collections::VecDeque;

use domain::definition::Behaviour;
use domain::entry::Entry;
use domain::round::Said;
use domain::{Attempt, StepKey};
use proto::link::{StepText, StepTextAnswer};

use super::*;
use crate::actor::text::{AGAIN, TEXT_BYTES_MAX};
use crate::shard::TEXTS_BYTES_MAX;
use crate::speech::Taken;

/// Says what it is given, a piece at a time; one attempt after the other.
struct Speaker {
    attempts: Mutex<VecDeque<Vec<Piece>>>,
}

#[derive(Clone)]
enum Piece {
    Text(&'static str),
    /// Until the gate opens.
    Wait(Arc<Semaphore>),
    Broken,
}

impl Speaker {
    fn new(attempts: impl IntoIterator<Item = Vec<Piece>>) -> Arc<Self> {
        Arc::new(Self { attempts: Mutex::new(attempts.into_iter().collect()) })
    }
}

impl Model for Speaker {
    fn name(&self) -> &str {
        "speaker"
    }

    fn call<'a>(&'a self, _: &'a Request) -> BoxStream<'a, Result<Chunk, model::Error>> {
        let pieces = lock(&self.attempts).pop_front().expect("an attempt more than was thought of");
        let chunks = stream::iter(pieces).filter_map(|piece| async move {
            match piece {
                Piece::Text(text) => Some(Ok(Chunk::Text(text.to_owned()))),
                Piece::Wait(gate) => {
                    gate.acquire().await.unwrap().forget();
                    None
                }
                Piece::Broken => {
                    let (model, received_bytes) = ("speaker".to_owned(), 0);
                    Some(Err(model::Error::Incomplete { model, received_bytes }))
                }
            }
        });
        let usage = Usage { calls: 1, ..Usage::default() };
        chunks.chain(stream::iter([Ok(Chunk::Finished(usage))])).boxed()
    }
}

async fn bench(model: Arc<Speaker>) -> Bench {
    let bench = bench_of(model, Config::default(), PhasesConfig::default()).await;
    *lock(&bench.wire.definition) = definition().1;
    let control = Peer::new(Role::Control, "control-2".parse().unwrap());
    bench.node.set_controls(vec![control]);
    tell_view(&bench);
    bench
}

fn definition() -> (Bytes, Bytes) {
    let speaker = Definition {
        name: "speaker".parse().unwrap(),
        behaviour: Behaviour::Loop,
        model: "speaker".to_owned(),
        rounds_max: 4,
        cycles_max: 0,
        ..Definition::postchain()
    };
    let (hash, body) = proto::convert::canonical(&speaker);
    (Bytes::copy_from_slice(hash.as_bytes()), body)
}

/// Workers find the owner of a shard in the view.
fn tell_view(bench: &Bench) {
    use domain::view::{Place, Version, View};
    use domain::{Epoch, ShardId, Term};
    let version = Version { term: Term(1), number: bench.epoch };
    let mut view = View::new(version, domain::slot::ShardTable::single(1).unwrap());
    let (owner, epoch) = (Some(node_name()), Epoch(bench.epoch));
    view.shards.insert(ShardId(0), Place { owner, epoch, open: true, ..Place::default() });
    let payload = Bytes::from(proto::view::to_message(&view.whole()).encode_to_vec());
    bench.node.view_message(Peer::new(Role::Control, "control-1".parse().unwrap()), payload);
}

async fn submit(bench: &Bench) -> u64 {
    let submit = SubmitCall {
        definition: definition().0,
        subscription: 1,
        mode: WatchMode::All.into(),
        ..call("acme/speaker/a", "text", "k")
    };
    bench.submit_with(submit).await.unwrap().lsn
}

async fn subscribe(bench: &Bench, work: u64, subscription: u64, mode: WatchMode) {
    let call = SubscribeCall { subscription, work, mode: mode.into(), ..SubscribeCall::default() };
    bench.call(kind::SUBSCRIBE, &call).await.unwrap();
}

/// What a subscription was sent: pieces as `attempt offset text`, entries by their name, a model's with what it said.
fn sent(bench: &Bench, subscription: u64) -> Vec<String> {
    let mut lines = Vec::new();
    let events = lock(&bench.wire.events);
    for events in events.iter().filter(|events| events.subscription == subscription) {
        for entry in &events.entries {
            let entry = proto::journal::decode(entry.entry.clone()).unwrap();
            let mut line = entry.name().to_owned();
            if let Entry::StepDone(done) = &entry {
                line = format!("done {}", Said::parse(&done.output).unwrap().text);
            }
            lines.push(line);
        }
        if let Some(StepText { attempt, offset, text, at_ms }) = &events.text {
            assert!(0 < *at_ms);
            lines.push(format!("{} {offset} {text}", attempt.as_ref().unwrap().attempt));
        }
    }
    lines
}

async fn has_sent(bench: &Bench, subscription: u64, line: &str) {
    let what = format!("{line:?} is sent");
    bench
        .eventually(&what, async || sent(bench, subscription).iter().any(|sent| sent == line))
        .await;
}

/// What a work came to, once those who watched it were sent that.
async fn result_for(bench: &Bench, work: u64, subscriptions: &[u64]) -> String {
    let ended = bench.ended(work).await;
    // Its row may say so a moment before.
    bench
        .eventually("its end is sent", async || {
            let events = lock(&bench.wire.events);
            let ends = events.iter().filter(|events| events.ended.is_some());
            let ends: Vec<_> = ends.map(|events| events.subscription).collect();
            subscriptions.iter().all(|subscription| ends.contains(subscription))
        })
        .await;
    String::from_utf8(ended.result.to_vec()).unwrap()
}

async fn result(bench: &Bench, work: u64) -> String {
    result_for(bench, work, &[1]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_watches_is_sent_what_a_model_says_while_it_says_it() {
    let gate = Arc::new(Semaphore::new(0));
    let wait = || Piece::Wait(gate.clone());
    let pieces = vec![Piece::Text("one "), wait(), Piece::Text("two "), wait(), Piece::Text("3")];
    let bench = bench(Speaker::new([pieces])).await;
    let work = submit(&bench).await;
    has_sent(&bench, 1, "1 0 one ").await;
    subscribe(&bench, work, 2, WatchMode::All).await;
    subscribe(&bench, work, 3, WatchMode::End).await;
    has_sent(&bench, 2, "1 0 one ").await;
    gate.add_permits(1);
    has_sent(&bench, 1, "1 4 two ").await;
    subscribe(&bench, work, 4, WatchMode::All).await;
    has_sent(&bench, 4, "1 0 one two ").await;
    gate.add_permits(1);
    assert_eq!(result_for(&bench, work, &[1, 2, 3, 4]).await, "one two 3");
    let rest = ["done one two 3", "ended"];
    assert_eq!(sent(&bench, 1), [&["accepted", "1 0 one ", "1 4 two "][..], &rest].concat());
    assert_eq!(sent(&bench, 2), sent(&bench, 1));
    assert_eq!(sent(&bench, 3), ["ended"]);
    assert_eq!(sent(&bench, 4), [&["accepted", "1 0 one two "][..], &rest].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_at_once_is_sent_with_its_entry_only() {
    let bench = bench(Speaker::new([vec![Piece::Text("one "), Piece::Text("two")]])).await;
    let work = submit(&bench).await;
    assert_eq!(result(&bench, work).await, "one two");
    assert_eq!(sent(&bench, 1), ["accepted", "done one two", "ended"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_breaks_off_is_told_by_the_journal_and_the_next_says_it_anew() {
    let (first, second) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let wait = |gate: &Arc<Semaphore>| Piece::Wait(gate.clone());
    let broken = vec![Piece::Text("half"), wait(&first), Piece::Broken];
    let whole = vec![Piece::Text("who"), wait(&second), Piece::Text("le")];
    let bench = bench(Speaker::new([broken, whole])).await;
    let work = submit(&bench).await;
    has_sent(&bench, 1, "1 0 half").await;
    first.add_permits(1);
    has_sent(&bench, 1, "2 0 who").await;
    subscribe(&bench, work, 2, WatchMode::All).await;
    second.add_permits(1);
    assert_eq!(result_for(&bench, work, &[1, 2]).await, "whole");
    let rest = ["step_began", "2 0 who", "done whole", "ended"];
    assert_eq!(sent(&bench, 1), [&["accepted", "1 0 half"][..], &rest].concat());
    assert_eq!(sent(&bench, 2), [&["accepted"][..], &rest].concat(), "no text of the first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_owner_whose_worker_lives_goes_on_with_the_same_text() {
    let gate = Arc::new(Semaphore::new(0));
    let wait = || Piece::Wait(gate.clone());
    let pieces = vec![Piece::Text("one "), wait(), Piece::Text("two"), wait()];
    let mut bench = bench(Speaker::new([pieces])).await;
    let work = submit(&bench).await;
    has_sent(&bench, 1, "1 0 one ").await;
    bench.own().await;
    tell_view(&bench);
    subscribe(&bench, work, 2, WatchMode::All).await;
    gate.add_permits(1);
    bench
        .eventually("the rest is sent", async || {
            let pieces = sent(&bench, 2).join("");
            pieces.contains("two")
        })
        .await;
    gate.add_permits(1);
    assert_eq!(result_for(&bench, work, &[2]).await, "one two");
    let told = sent(&bench, 2);
    assert!(told.iter().all(|line| line != "step_began"), "it is the same attempt: {told:?}");
    let said = told.iter().filter_map(|line| line.strip_prefix("1 "));
    let said: String = said.map(|piece| piece.split_once(' ').unwrap().1).collect();
    assert_eq!(said, "one two");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_room_for_text_shows_it_with_its_entry() {
    let gate = Arc::new(Semaphore::new(0));
    let bench = bench(Speaker::new([vec![Piece::Text("one"), Piece::Wait(gate.clone())]])).await;
    let texts = &bench.node.context().texts;
    let all = texts.clone().try_acquire_many_owned(TEXTS_BYTES_MAX as u32).unwrap();
    let before = crate::metrics::TEXTS_CUT.get();
    let work = submit(&bench).await;
    bench.eventually("a piece is cut", async || before < crate::metrics::TEXTS_CUT.get()).await;
    gate.add_permits(1);
    assert_eq!(result(&bench, work).await, "one");
    assert_eq!(sent(&bench, 1), ["accepted", "done one", "ended"]);
    drop(all);
    assert_eq!(texts.available_permits(), TEXTS_BYTES_MAX);
}

#[tokio::test(flavor = "multi_thread")]
async fn text_of_what_nobody_waits_for_is_refused_and_room_is_given_back() {
    let gate = Arc::new(Semaphore::new(0));
    let bench = bench(Speaker::new([vec![Piece::Text("abc"), Piece::Wait(gate.clone())]])).await;
    let work = submit(&bench).await;
    has_sent(&bench, 1, "1 0 abc").await;
    let held = TEXTS_BYTES_MAX - 3;
    assert_eq!(bench.node.context().texts.available_permits(), held);
    let id = bench.get(work).await;
    let id = proto::convert::work_id(id.class, id.slot, id.lsn).unwrap();
    let piece = |number, offset, text: &str| {
        let attempt =
            Attempt { work: id, step: StepKey::model(0), epoch: domain::Epoch(1), number };
        let attempt = Some(crate::wire::attempt(&attempt));
        StepText { attempt, offset, text: text.to_owned(), at_ms: 0 }
    };
    let tell = async |piece: StepText| {
        let (sender, receiver) = oneshot::channel();
        let payload = piece.encode_to_vec().into();
        let envelope = Envelope { kind: kind::STEP_TEXT, payload, ..Envelope::default() };
        let reply = Some(Reply::from_fn(move |answer| _ = sender.send(answer)));
        let from = Peer::new(Role::Node, "node-2".parse().unwrap());
        bench.node.incoming(Incoming { from, envelope, deadline: None, reply });
        let answer = receiver.await.unwrap();
        answer
            .map(|bytes| StepTextAnswer::decode(bytes).unwrap().bytes)
            .map_err(|refusal| reason(refusal.reason))
    };
    assert_eq!(tell(piece(1, 0, "ab")).await, Ok(3), "known");
    assert_eq!(tell(piece(1, 5, "f")).await, Ok(3), "a gap");
    assert_eq!(tell(piece(2, 0, "x")).await, Err(Reason::Superseded), "another attempt");
    gate.add_permits(1);
    result(&bench, work).await;
    assert_eq!(tell(piece(1, 3, "d")).await, Err(Reason::Superseded), "it is over");
    assert_eq!(bench.node.context().texts.available_permits(), TEXTS_BYTES_MAX);
    assert_eq!(sent(&bench, 1), ["accepted", "1 0 abc", "done abc", "ended"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_without_room_loses_no_watcher_and_the_next_piece_has_what_it_missed() {
    let gate = Arc::new(Semaphore::new(0));
    let wait = || Piece::Wait(gate.clone());
    let pieces = ["one ", "two ", "3"].map(|word| [Piece::Text(word), wait()]).concat();
    let bench = bench(Speaker::new([pieces])).await;
    let work = submit(&bench).await;
    has_sent(&bench, 1, "1 0 one ").await;
    bench.wire.is_full.store(true, Ordering::Relaxed);
    gate.add_permits(1);
    let refused = || bench.wire.refused.load(Ordering::Relaxed);
    bench.eventually("the link refused it", async || 0 < refused()).await;
    bench.wire.is_full.store(false, Ordering::Relaxed);
    tokio::time::sleep(AGAIN).await;
    gate.add_permits(1);
    has_sent(&bench, 1, "1 4 two 3").await;
    gate.add_permits(1);
    assert_eq!(result(&bench, work).await, "one two 3");
    assert_eq!(
        sent(&bench, 1),
        ["accepted", "1 0 one ", "1 4 two 3", "done one two 3", "ended"],
        "and nobody was told to subscribe anew"
    );
    assert!(lock(&bench.wire.events).iter().all(|events| events.closed.is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_another_work_takes_nothing_of_what_is_said() {
    let gate = Arc::new(Semaphore::new(0));
    let bench = bench(Speaker::new([vec![Piece::Text("one"), Piece::Wait(gate.clone())]])).await;
    let work = submit(&bench).await;
    has_sent(&bench, 1, "1 0 one").await;
    let (definition, input) = (definition().0, Bytes::from_static(b"other"));
    let other = SubmitCall { definition, input, ..call("acme/speaker/a", "other", "other") };
    let other = bench.submit_with(other).await.unwrap().lsn;
    let cancel = CancelCall { work: other, ..CancelCall::default() };
    bench.call(kind::CANCEL, &cancel).await.unwrap();
    assert_eq!(state(&bench.ended(other).await), WorkState::Cancelled);
    subscribe(&bench, work, 2, WatchMode::All).await;
    has_sent(&bench, 2, "1 0 one").await;
    gate.add_permits(1);
    assert_eq!(result(&bench, work).await, "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_says_very_much_shows_the_rest_with_its_entry() {
    static MUCH: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| "x".repeat(TEXT_BYTES_MAX - 1));
    let gate = Arc::new(Semaphore::new(0));
    let wait = || Piece::Wait(gate.clone());
    let pieces = vec![Piece::Text(&MUCH), wait(), Piece::Text("yz"), wait()];
    let bench = bench(Speaker::new([pieces])).await;
    let before = crate::metrics::TEXTS_CUT.get();
    let work = submit(&bench).await;
    let sent_bytes = || sent(&bench, 1).iter().map(String::len).sum::<usize>();
    bench.eventually("much is sent", async || TEXT_BYTES_MAX <= sent_bytes()).await;
    gate.add_permits(1);
    bench.eventually("it is cut", async || before < crate::metrics::TEXTS_CUT.get()).await;
    gate.add_permits(1);
    assert_eq!(result(&bench, work).await.len(), TEXT_BYTES_MAX + 1);
    let told = sent(&bench, 1);
    assert!(told.iter().all(|line| !line.ends_with('z') || line.starts_with("done")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_before_the_one_that_asked_is_told_nothing() {
    let bench = bench(Speaker::new([])).await;
    let work = proto::convert::work_id(0, 1, 1).unwrap();
    let attempt = |epoch| {
        let epoch = domain::Epoch(epoch);
        let attempt = Attempt { work, step: StepKey::model(0), epoch, number: 1 };
        let attempt = Some(crate::wire::attempt(&attempt));
        StepText { attempt, offset: 0, text: "x".to_owned(), at_ms: 0 }
    };
    let shard = domain::ShardId(0);
    assert_eq!(bench.node.tell_text(shard, attempt(bench.epoch + 1)).await, Taken::Again);
    // The owner itself knows of no such work.
    assert_eq!(bench.node.tell_text(shard, attempt(bench.epoch)).await, Taken::Enough);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_gone_is_sent_no_more_text() {
    let gate = Arc::new(Semaphore::new(0));
    let wait = || Piece::Wait(gate.clone());
    let pieces = ["one ", "two ", "3"].map(|word| [Piece::Text(word), wait()]).concat();
    let bench = bench(Speaker::new([pieces])).await;
    let work = submit(&bench).await;
    has_sent(&bench, 1, "1 0 one ").await;
    bench.wire.is_gone.store(true, Ordering::Relaxed);
    gate.add_permits(1);
    let refused = || bench.wire.refused.load(Ordering::Relaxed);
    bench.eventually("it was tried once", async || refused() == 1).await;
    bench.wire.is_gone.store(false, Ordering::Relaxed);
    gate.add_permits(2);
    assert_eq!(&bench.ended(work).await.result[..], b"one two 3");
    subscribe(&bench, work, 2, WatchMode::All).await;
    assert_eq!(result_for(&bench, work, &[2]).await, "one two 3");
    assert_eq!(sent(&bench, 1), ["accepted", "1 0 one "], "it asks anew, or nobody listens");
}
