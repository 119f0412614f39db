//! The stream of one watch: the events of one work, until it ends.

use proto::status::Failure;
use proto::v1::{WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::desk::Desk;
use crate::follow::{Follow, Told};
use crate::hub::{Inbox, Item, Room};
use crate::pump::{Outlet, Pump};
use crate::{api, edge};

const ROOM: Room = Room { events: 1_024, bytes: 1 << 20 };
const RESPONSES_MAX: usize = 16;

pub(crate) type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

struct Watch;

impl Outlet for Watch {
    type Response = WatchResponse;

    fn event(_: i64, Told { event, position }: Told) -> WatchResponse {
        WatchResponse { event: Some(event), position: api::text(position) }
    }

    fn failed(_: i64, failure: Failure) -> Result<WatchResponse, Status> {
        Err(failure.into())
    }
}

/// Begins a watch; a work that does not exist is refused before the stream begins.
pub(crate) async fn watch(
    desk: &Desk,
    request: &WatchRequest,
    deadline: Instant,
) -> Result<WatchStream, Failure> {
    let follow = Follow::after(0, edge::watch(request)?);
    let inbox = Inbox::new(ROOM);
    let ticket = desk.subscribe(&inbox, &follow, deadline).await?;
    ticket.release(&inbox, follow);
    inbox.push(Item::NoMore);
    let (out, responses) = mpsc::channel(RESPONSES_MAX);
    tokio::spawn(Pump::<Watch>::new(desk.clone(), inbox, out).run());
    Ok(ReceiverStream::new(responses))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use domain::{Phase, ProcessName, Reason, Role};
    use prost::Message;
    use proto::link::{Events, LogEntry, SubscribeAnswer, SubscribeCall};
    use tokio_stream::StreamExt;

    use super::*;
    use crate::follow::tests::{accepted, ended, last, phase, short, work};
    use crate::hub::Hub;
    use crate::network::Missed;
    use crate::testing::{FakeCatalog, FakeNetwork, refuse, view};

    /// A cluster of one shard whose owners accept every subscription and note it.
    struct Fixture {
        network: Arc<FakeNetwork>,
        desk: Desk,
        asked: Arc<tokio::sync::Mutex<mpsc::Receiver<SubscribeCall>>>,
    }

    impl Fixture {
        fn new() -> Self {
            let (notes, asked) = mpsc::channel(64);
            let network = FakeNetwork::new(view(1, &[("node-1", 1)]), move |_, _, envelope| {
                if envelope.kind == proto::kind::SUBSCRIBE {
                    notes
                        .try_send(SubscribeCall::decode(envelope.payload.clone()).unwrap())
                        .unwrap();
                    return Ok(SubscribeAnswer {}.encode_to_vec().into());
                }
                refuse(Reason::NotFound)
            });
            let hub = Hub::spawn(network.clone());
            let desk = Desk::new(network.clone(), hub, Arc::new(FakeCatalog));
            Self { network, desk, asked: Arc::new(tokio::sync::Mutex::new(asked)) }
        }

        async fn watch(&self, cursor: &str) -> WatchStream {
            let request = WatchRequest { id: work().to_string(), cursor: cursor.to_owned() };
            watch(&self.desk, &request, crate::deadline::by_default()).await.unwrap()
        }

        async fn subscription(&self) -> SubscribeCall {
            self.asked.lock().await.recv().await.unwrap()
        }

        fn send(&self, from: &str, asked: &SubscribeCall, entries: Vec<LogEntry>) {
            self.send_whole(
                from,
                Events { entries, subscription: asked.subscription, ..Events::default() },
            );
        }

        fn send_last(&self, from: &str, asked: &SubscribeCall, entries: Vec<LogEntry>) {
            let subscription = asked.subscription;
            self.send_whole(
                from,
                Events { entries, subscription, ended: ended(), ..Events::default() },
            );
        }

        /// Every subscription begins with the acceptance.
        fn send_whole(&self, from: &str, mut events: Events) {
            events.entries.insert(0, accepted(1));
            self.desk.hub.events(&name(from), events);
        }
    }

    fn name(text: &str) -> ProcessName {
        text.parse().unwrap()
    }

    async fn next(stream: &mut WatchStream) -> (u64, i32) {
        loop {
            let response = stream.next().await.unwrap().unwrap();
            if let Some(short) = short(&response.event.unwrap()) {
                return short;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_tells_every_event_once_over_a_move_and_ends_with_the_result() {
        let fixture = Fixture::new();
        let mut stream = fixture.watch("").await;
        let first = fixture.subscription().await;
        fixture.send("node-1", &first, vec![phase(2, Phase::Action), phase(3, Phase::Experience)]);
        assert_eq!(next(&mut stream).await, (2, 1));
        assert_eq!(next(&mut stream).await, (3, 2));

        fixture.network.set_view(view(2, &[("node-2", 2)]));
        let second = fixture.subscription().await;
        assert_eq!(second.after_seq, 3);
        fixture.send("node-1", &first, vec![phase(4, Phase::Intention)]);
        fixture.send(
            "node-2",
            &second,
            vec![phase(3, Phase::Experience), phase(4, Phase::Intention)],
        );
        fixture.send_last("node-2", &second, vec![phase(5, Phase::Yield), last(6)]);
        assert_eq!(next(&mut stream).await, (4, 3));
        assert_eq!(next(&mut stream).await, (5, 4));
        assert_eq!(next(&mut stream).await, (6, 0));
        assert!(stream.next().await.is_none());
        assert_eq!(fixture.desk.hub.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_goes_on_after_its_link_went_down_or_its_owner_closed_it() {
        let fixture = Fixture::new();
        let mut stream = fixture.watch("").await;
        let first = fixture.subscription().await;
        fixture.send("node-1", &first, vec![phase(2, Phase::Action)]);
        fixture.desk.hub.link_down(Role::Node, &name("node-1"));
        let second = fixture.subscription().await;
        assert_eq!(second.after_seq, 2);
        let closed = Some(proto::link::Refusal::default());
        fixture.send_whole(
            "node-1",
            Events { subscription: second.subscription, closed, ..Events::default() },
        );
        let third = fixture.subscription().await;
        fixture.send_last("node-1", &third, vec![last(3)]);
        assert_eq!(next(&mut stream).await, (2, 1));
        assert_eq!(next(&mut stream).await, (3, 0));
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_whose_owner_this_server_does_not_reach_ends_so_that_another_takes_it_up() {
        let answers = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let reached = answers.clone();
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), move |_, _, _| {
            match reached.load(Ordering::Relaxed) {
                true => Ok(SubscribeAnswer {}.encode_to_vec().into()),
                false => Err(Missed::Gone("reset".to_owned())),
            }
        });
        let hub = Hub::spawn(network.clone());
        let desk = Desk::new(network.clone(), hub, Arc::new(FakeCatalog));
        let request = WatchRequest { id: work().to_string(), cursor: String::new() };
        let mut stream = watch(&desk, &request, crate::deadline::by_default()).await.unwrap();
        answers.store(false, Ordering::Relaxed);
        let lost = Instant::now();
        desk.hub.link_down(Role::Node, &name("node-1"));
        let status = stream.next().await.unwrap().unwrap_err();
        assert_eq!(proto::status::reason_of(&status), Some(Reason::OwnerUnreached));
        assert!(domain::reach::UNREACHED_MS <= lost.elapsed().as_millis() as u64, "too early");
        assert!(stream.next().await.is_none());
        // Asked for anew, it is refused before the stream begins.
        let refused = watch(&desk, &request, crate::deadline::by_default()).await;
        assert_eq!(refused.err().map(|failure| failure.reason), Some(Reason::OwnerUnreached));
        assert_eq!(desk.hub.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_misses_nothing() {
        const COUNT: u64 = 5_000;
        let fixture = Fixture::new();
        let mut stream = fixture.watch("").await;
        let rounds = Arc::new(AtomicU64::new(0));
        let owner = {
            let (hub, asked, rounds) =
                (fixture.desk.hub.clone(), fixture.asked.clone(), rounds.clone());
            tokio::spawn(async move {
                while let Some(call) = asked.lock().await.recv().await {
                    rounds.fetch_add(1, Ordering::Relaxed);
                    let subscription = call.subscription;
                    for seq in call.after_seq + 1..=COUNT {
                        let entries = vec![phase(seq, Phase::Action)];
                        hub.events(
                            &name("node-1"),
                            Events { subscription, entries, ..Events::default() },
                        );
                    }
                    let (entries, ended) = (vec![last(COUNT + 1)], ended());
                    hub.events(
                        &name("node-1"),
                        Events { subscription, entries, ended, ..Events::default() },
                    );
                }
            })
        };
        for seq in 1..=COUNT {
            assert_eq!(next(&mut stream).await.0, seq);
        }
        assert_eq!(next(&mut stream).await, (COUNT + 1, 0));
        assert!(stream.next().await.is_none());
        assert!(1 < rounds.load(Ordering::Relaxed), "the buffer was never full");
        owner.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_resumed_watch_begins_after_its_cursor() {
        let fixture = Fixture::new();
        let mut stream = fixture.watch("w-0-001-1.3").await;
        let asked = fixture.subscription().await;
        let entries =
            vec![phase(2, Phase::Action), phase(3, Phase::Experience), phase(4, Phase::Intention)];
        fixture.send("node-1", &asked, entries);
        assert_eq!(next(&mut stream).await, (4, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_goes_leaves_no_subscription() {
        let fixture = Fixture::new();
        let stream = fixture.watch("").await;
        let asked = fixture.subscription().await;
        drop(stream);
        while fixture.network.casts().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let (node, envelope) = fixture.network.casts().remove(0);
        let told = proto::link::UnsubscribeCall::decode(envelope.payload).unwrap();
        assert_eq!((node.as_str(), told.subscription), ("node-1", asked.subscription));
        assert_eq!(fixture.desk.hub.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_work_that_does_not_exist_is_refused_before_the_stream() {
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |_, _, _| -> Result<_, Missed> {
            refuse(Reason::NotFound)
        });
        let hub = Hub::spawn(network.clone());
        let desk = Desk::new(network.clone(), hub.clone(), Arc::new(FakeCatalog));
        let request = WatchRequest { id: work().to_string(), cursor: String::new() };
        let refused = watch(&desk, &request, crate::deadline::by_default()).await;
        assert_eq!(refused.err().map(|failure| failure.reason), Some(Reason::NotFound));
        assert_eq!(hub.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn streams_end_when_the_server_stops() {
        let fixture = Fixture::new();
        let mut stream = fixture.watch("").await;
        fixture.desk.stop.cancel();
        let status = stream.next().await.unwrap().unwrap_err();
        assert_eq!(proto::status::reason_of(&status), Some(Reason::ShuttingDown));
        assert!(stream.next().await.is_none());
    }
}
