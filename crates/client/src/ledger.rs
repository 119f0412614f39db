//! What an open stream owes its caller: every request that is not done, and what to send for it on the next connection.
//!
//! Of one agent one submit is on its way at a time. Otherwise one that is refused for now would be overtaken by those
//! sent after it, and works of one stream would not be accepted in their order.
//!
//! Pure: requests and responses go in, what to send and what to pass on comes out.

use std::collections::{BTreeMap, VecDeque};

use domain::Reason;
use proto::v1::{
    CancelRequest, OpenRequest, OpenResponse, OpenSubmit, OpenWatch, Refused, SubmitRequest,
    WatchRequest, Work, WorkEvent, open_request, open_response, work_event,
};

use tonic::Code;

use crate::Error;

/// Requests by tag. `P` is held by a submit until it is answered.
pub(crate) struct Ledger<P> {
    entries: BTreeMap<i64, Entry<P>>,
    /// Submits that are not answered, by agent, in their order: the first of each is on its way.
    lanes: BTreeMap<String, VecDeque<i64>>,
    /// Those that have become the first of their agents.
    freed: Vec<i64>,
    begun: u64,
}

struct Entry<P> {
    /// Requests are repeated in the order in which they were made.
    order: u64,
    stands: Stands<P>,
}

enum Stands<P> {
    /// Not answered yet.
    Submitted {
        request: SubmitRequest,
        watch: OpenWatch,
        _permit: P,
    },
    /// Its events are wanted.
    Followed {
        work: String,
        cursor: String,
        wanted: Wanted,
    },
    Cancelling {
        id: String,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    All,
    End,
}

/// What a response means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It is for the caller.
    Pass,
    /// Known already, or not wanted.
    Nothing,
    /// The cluster cannot take it just now: ask again in a while.
    Later,
    /// The server is about to go: connect elsewhere and ask again there.
    Leave,
    /// The server does not reach the owner: another may.
    Elsewhere,
}

impl<P> Ledger<P> {
    pub(crate) fn new() -> Self {
        Self { entries: BTreeMap::new(), lanes: BTreeMap::new(), freed: Vec::new(), begun: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What to send now: nothing, if another submit to the agent is not answered yet.
    pub(crate) fn submit(
        &mut self,
        tag: i64,
        request: SubmitRequest,
        watch: OpenWatch,
        permit: P,
    ) -> Result<Option<OpenRequest>, Error> {
        let agent = request.agent.clone();
        let sent = self.begin(tag, Stands::Submitted { request, watch, _permit: permit })?;
        let lane = self.lanes.entry(agent).or_default();
        lane.push_back(tag);
        Ok((lane.len() == 1).then_some(sent))
    }

    /// What may be sent since the last answers.
    pub(crate) fn freed(&mut self) -> Vec<OpenRequest> {
        let freed = std::mem::take(&mut self.freed);
        freed.into_iter().filter_map(|tag| self.repeat(tag)).collect()
    }

    /// The submit of this tag is answered, or will not be.
    fn leave_lane(&mut self, tag: i64) {
        let Some(Entry { stands: Stands::Submitted { request, .. }, .. }) = self.entries.get(&tag)
        else {
            return;
        };
        let agent = request.agent.clone();
        let Some(lane) = self.lanes.get_mut(&agent) else { return };
        let was_first = lane.front() == Some(&tag);
        lane.retain(|waiting| *waiting != tag);
        match lane.front() {
            Some(next) if was_first => self.freed.push(*next),
            Some(_) => {}
            None => _ = self.lanes.remove(&agent),
        }
    }

    /// Whether it waits behind another submit to its agent.
    fn is_behind(&self, tag: i64, stands: &Stands<P>) -> bool {
        let Stands::Submitted { request, .. } = stands else { return false };
        self.lanes.get(&request.agent).is_some_and(|lane| lane.front() != Some(&tag))
    }

    pub(crate) fn cancel(&mut self, tag: i64, id: String) -> Result<OpenRequest, Error> {
        self.begin(tag, Stands::Cancelling { id })
    }

    pub(crate) fn watch(
        &mut self,
        tag: i64,
        work: String,
        cursor: String,
    ) -> Result<OpenRequest, Error> {
        self.begin(tag, Stands::Followed { work, cursor, wanted: Wanted::All })
    }

    /// What to send on a new connection.
    pub(crate) fn again(&mut self) -> Vec<OpenRequest> {
        // It is all among the rest.
        self.freed.clear();
        let sent = self.entries.iter().filter(|(tag, entry)| !self.is_behind(**tag, &entry.stands));
        let mut entries: Vec<_> = sent.collect();
        entries.sort_by_key(|(_, entry)| entry.order);
        entries.into_iter().map(|(tag, entry)| request_for(*tag, &entry.stands)).collect()
    }

    /// What to send for one request that was refused for now.
    pub(crate) fn repeat(&self, tag: i64) -> Option<OpenRequest> {
        self.entries.get(&tag).map(|entry| request_for(tag, &entry.stands))
    }

    /// A request that will not be repeated.
    pub(crate) fn give_up(&mut self, tag: i64) {
        self.leave_lane(tag);
        self.entries.remove(&tag);
    }

    /// Whether its events are wanted, however long that takes.
    pub(crate) fn follows(&self, tag: i64) -> bool {
        self.entries.get(&tag).is_some_and(|entry| is_followed(&entry.stands))
    }

    pub(crate) fn hear(&mut self, response: &OpenResponse) -> Heard {
        let tag = response.tag;
        if is_answer(response) {
            self.leave_lane(tag);
        }
        let Some(entry) = self.entries.get_mut(&tag) else { return Heard::Nothing };
        match &response.response {
            None => Heard::Nothing,
            Some(open_response::Response::Refused(refused)) => {
                if refused.reason == Reason::ShuttingDown.as_str() {
                    return Heard::Leave;
                }
                if refused.reason == Reason::OwnerUnreached.as_str() {
                    return Heard::Elsewhere;
                }
                // What a call of its own would repeat; a queue that is full is the caller's to judge.
                if is_for_later(refused) {
                    return Heard::Later;
                }
                self.entries.remove(&tag);
                Heard::Pass
            }
            Some(open_response::Response::Accepted(work)) => {
                let next = after_acceptance(&entry.stands, work);
                match next {
                    Some(Stands::Followed { .. }) if is_followed(&entry.stands) => Heard::Nothing,
                    Some(next) => {
                        entry.stands = next;
                        Heard::Pass
                    }
                    None => {
                        self.entries.remove(&tag);
                        Heard::Pass
                    }
                }
            }
            Some(open_response::Response::Event(event)) => {
                let (passes, is_last) = follow(&mut entry.stands, event);
                if is_last {
                    self.entries.remove(&tag);
                }
                if passes { Heard::Pass } else { Heard::Nothing }
            }
        }
    }

    fn begin(&mut self, tag: i64, stands: Stands<P>) -> Result<OpenRequest, Error> {
        if self.entries.contains_key(&tag) {
            return Err(Error::TagInUse { tag });
        }
        let request = request_for(tag, &stands);
        self.begun += 1;
        self.entries.insert(tag, Entry { order: self.begun, stands });
        Ok(request)
    }
}

fn request_for<P>(tag: i64, stands: &Stands<P>) -> OpenRequest {
    let request = match stands {
        Stands::Submitted { request, watch, .. } => open_request::Request::Submit(OpenSubmit {
            submit: Some(request.clone()),
            watch: i32::from(*watch),
        }),
        Stands::Followed { work, cursor, .. } => {
            open_request::Request::Watch(WatchRequest { id: work.clone(), cursor: cursor.clone() })
        }
        Stands::Cancelling { id } => {
            open_request::Request::Cancel(CancelRequest { id: id.clone() })
        }
    };
    OpenRequest { tag, request: Some(request) }
}

/// Whether a submit of this tag is done with it.
fn is_answer(response: &OpenResponse) -> bool {
    match &response.response {
        Some(open_response::Response::Accepted(_)) => true,
        Some(open_response::Response::Refused(refused)) => {
            refused.reason != Reason::ShuttingDown.as_str() && !is_for_later(refused)
        }
        Some(open_response::Response::Event(_)) | None => false,
    }
}

/// Whether the cluster may take it soon, whoever asks: it is out of reach, or has too much on its way.
fn is_for_later(refused: &Refused) -> bool {
    Code::from(refused.code) == Code::Unavailable || refused.reason == Reason::Overloaded.as_str()
}

fn is_followed<P>(stands: &Stands<P>) -> bool {
    matches!(stands, Stands::Followed { .. })
}

/// What is still owed once a request was accepted; nothing, if there is nothing to follow.
fn after_acceptance<P>(stands: &Stands<P>, work: &Work) -> Option<Stands<P>> {
    let wanted = match stands {
        Stands::Submitted { watch: OpenWatch::All, .. } => Wanted::All,
        Stands::Submitted { watch: OpenWatch::End, .. } => Wanted::End,
        Stands::Submitted { watch: OpenWatch::None | OpenWatch::Unspecified, .. }
        | Stands::Cancelling { .. } => return None,
        Stands::Followed { wanted, .. } => *wanted,
    };
    Some(Stands::Followed { work: work.id.clone(), cursor: String::new(), wanted })
}

/// Whether the caller gets the event, and whether it is the last one.
fn follow<P>(stands: &mut Stands<P>, event: &WorkEvent) -> (bool, bool) {
    let Stands::Followed { cursor, wanted, .. } = stands else { return (false, false) };
    let is_last = matches!(event.event, Some(work_event::Event::Result(_)));
    let is_known = !event.cursor.is_empty() && *cursor == event.cursor;
    cursor.clone_from(&event.cursor);
    (!is_known && (is_last || *wanted == Wanted::All), is_last)
}

#[cfg(test)]
mod unit {
    use super::*;

    fn submit(ledger: &mut Ledger<()>, tag: i64, watch: OpenWatch) -> OpenRequest {
        let sent = submit_to(ledger, &format!("agent-{tag}"), tag, watch);
        sent.expect("nothing else is submitted to that agent")
    }

    fn submit_to(
        ledger: &mut Ledger<()>,
        agent: &str,
        tag: i64,
        watch: OpenWatch,
    ) -> Option<OpenRequest> {
        let request = SubmitRequest {
            agent: agent.to_owned(),
            idempotency_key: format!("key-{tag}"),
            ..SubmitRequest::default()
        };
        ledger.submit(tag, request, watch, ()).unwrap()
    }

    fn refused(tag: i64, code: Code, reason: Reason) -> OpenResponse {
        let reason = reason.to_string();
        let refused = Refused { code: code.into(), reason, ..Refused::default() };
        response(tag, open_response::Response::Refused(refused))
    }

    fn tags(requests: &[OpenRequest]) -> Vec<i64> {
        requests.iter().map(|request| request.tag).collect()
    }

    #[test]
    fn a_submit_waits_for_the_one_before_it_to_the_same_agent() {
        let mut ledger = Ledger::new();
        assert!(submit_to(&mut ledger, "ann", 1, OpenWatch::End).is_some());
        for tag in 2..=4 {
            assert!(submit_to(&mut ledger, "ann", tag, OpenWatch::End).is_none());
        }
        assert!(submit_to(&mut ledger, "bob", 5, OpenWatch::End).is_some());
        // Refused for now, the first is still the first, also on a new connection.
        let later = refused(1, Code::Unavailable, Reason::StoreUnavailable);
        assert_eq!(ledger.hear(&later), Heard::Later);
        let later = refused(1, Code::ResourceExhausted, Reason::Overloaded);
        assert_eq!(ledger.hear(&later), Heard::Later);
        assert_eq!((tags(&ledger.freed()), tags(&ledger.again())), (vec![], vec![1, 5]));
        passes(&mut ledger, accepted(1));
        assert_eq!(tags(&ledger.freed()), [2]);
        assert_eq!(ledger.hear(&accepted(1)), Heard::Nothing, "told twice, it frees nothing more");
        assert!(ledger.freed().is_empty());
        passes(&mut ledger, refused(2, Code::ResourceExhausted, Reason::QueueFull));
        assert_eq!(tags(&ledger.freed()), [3]);
        ledger.give_up(3);
        // What was freed and not sent when the connection broke is sent on the next one, once.
        assert_eq!(tags(&ledger.again()), [1, 4, 5]);
        assert!(ledger.freed().is_empty());
        passes(&mut ledger, accepted(4));
        assert!(ledger.freed().is_empty());
    }

    fn response(tag: i64, response: open_response::Response) -> OpenResponse {
        OpenResponse { tag, response: Some(response), ..OpenResponse::default() }
    }

    fn accepted(tag: i64) -> OpenResponse {
        let work = Work { id: format!("w-0-001-{tag}"), ..Work::default() };
        response(tag, open_response::Response::Accepted(work))
    }

    fn event(tag: i64, cursor: &str, event: work_event::Event) -> OpenResponse {
        let event =
            WorkEvent { cursor: cursor.to_owned(), event: Some(event), ..WorkEvent::default() };
        response(tag, open_response::Response::Event(event))
    }

    fn phase(tag: i64, cursor: &str) -> OpenResponse {
        event(tag, cursor, work_event::Event::Phase(proto::v1::Step::default()))
    }

    fn result(tag: i64, cursor: &str) -> OpenResponse {
        event(tag, cursor, work_event::Event::Result(Work::default()))
    }

    fn passes(ledger: &mut Ledger<()>, response: OpenResponse) {
        assert_eq!(ledger.hear(&response), Heard::Pass);
    }

    #[test]
    fn unanswered_submits_are_repeated_in_order_under_the_same_keys() {
        let mut ledger = Ledger::new();
        let sent: Vec<_> =
            [7, 3, 5].into_iter().map(|tag| submit(&mut ledger, tag, OpenWatch::None)).collect();
        assert_eq!(ledger.again(), sent);
        passes(&mut ledger, accepted(3));
        assert_eq!(ledger.again(), [sent[0].clone(), sent[2].clone()]);
    }

    #[test]
    fn an_accepted_submit_is_followed_from_its_last_cursor() {
        let mut ledger = Ledger::new();
        submit(&mut ledger, 1, OpenWatch::All);
        passes(&mut ledger, accepted(1));
        passes(&mut ledger, phase(1, "c1"));
        let expected = WatchRequest { id: "w-0-001-1".to_owned(), cursor: "c1".to_owned() };
        let expected =
            OpenRequest { tag: 1, request: Some(open_request::Request::Watch(expected)) };
        assert_eq!(ledger.again(), [expected]);
        assert_eq!(ledger.hear(&phase(1, "c1")), Heard::Nothing, "no event twice");
        passes(&mut ledger, result(1, "c2"));
        assert!(ledger.is_empty());
    }

    #[test]
    fn who_wants_the_end_gets_the_end_only() {
        let mut ledger = Ledger::new();
        submit(&mut ledger, 1, OpenWatch::End);
        passes(&mut ledger, accepted(1));
        // A watch taken up after a broken connection tells everything.
        assert_eq!(ledger.hear(&phase(1, "c1")), Heard::Nothing);
        passes(&mut ledger, result(1, "c2"));
        assert!(ledger.is_empty());
    }

    #[test]
    fn a_refusal_ends_its_request_but_a_server_that_goes_ends_none() {
        let mut ledger = Ledger::new();
        let sent = submit(&mut ledger, 1, OpenWatch::None);
        let refused = |reason: Reason| {
            let refused = Refused { reason: reason.to_string(), ..Refused::default() };
            response(1, open_response::Response::Refused(refused))
        };
        assert_eq!(ledger.hear(&refused(Reason::ShuttingDown)), Heard::Leave);
        assert_eq!(ledger.again(), [sent]);
        passes(&mut ledger, refused(Reason::QueueFull));
        assert!(ledger.is_empty());
    }

    #[test]
    fn who_does_not_reach_an_owner_is_left_and_everything_is_asked_for_elsewhere() {
        let mut ledger = Ledger::new();
        let sent = submit(&mut ledger, 1, OpenWatch::None);
        submit(&mut ledger, 2, OpenWatch::All);
        passes(&mut ledger, accepted(2));
        passes(&mut ledger, phase(2, "c1"));
        for tag in [1, 2] {
            let unreached = refused(tag, Code::Unavailable, Reason::OwnerUnreached);
            assert_eq!(ledger.hear(&unreached), Heard::Elsewhere);
        }
        assert_eq!((ledger.follows(1), ledger.follows(2)), (false, true));
        let watch = WatchRequest { id: "w-0-001-2".to_owned(), cursor: "c1".to_owned() };
        let watch = OpenRequest { tag: 2, request: Some(open_request::Request::Watch(watch)) };
        assert_eq!(ledger.again(), [sent, watch]);
    }

    #[test]
    fn what_the_cluster_cannot_take_now_is_repeated_until_it_is_given_up() {
        let mut ledger = Ledger::new();
        let sent = submit(&mut ledger, 1, OpenWatch::None);
        let reason = Reason::StoreUnavailable.to_string();
        let refused = Refused { code: Code::Unavailable.into(), reason, ..Refused::default() };
        let refused = response(1, open_response::Response::Refused(refused));
        assert_eq!(ledger.hear(&refused), Heard::Later);
        assert_eq!(ledger.repeat(1), Some(sent));
        ledger.give_up(1);
        assert!(ledger.is_empty());
    }

    #[test]
    fn a_tag_names_one_request_at_a_time() {
        let mut ledger = Ledger::new();
        submit(&mut ledger, 1, OpenWatch::None);
        assert!(ledger.cancel(1, "w-0-001-1".to_owned()).is_err());
        passes(&mut ledger, accepted(1));
        ledger.cancel(1, "w-0-001-1".to_owned()).unwrap();
        passes(&mut ledger, accepted(1));
        assert!(ledger.is_empty());
        assert_eq!(ledger.hear(&accepted(1)), Heard::Nothing);
    }
}
