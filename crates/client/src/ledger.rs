//! What an open stream owes its caller: every request that is not done, and what to send for it on the next connection.
//!
//! Pure: requests and responses go in, what to send and what to pass on comes out.

use std::collections::BTreeMap;

use domain::Reason;
use proto::v1::{
    CancelRequest, OpenRequest, OpenResponse, OpenSubmit, OpenWatch, SubmitRequest, WatchRequest,
    Work, WorkEvent, open_request, open_response, work_event,
};

use tonic::Code;

use crate::Error;

/// Requests by tag. `P` is held by a submit until it is answered.
pub(crate) struct Ledger<P> {
    entries: BTreeMap<i64, Entry<P>>,
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
}

impl<P> Ledger<P> {
    pub(crate) fn new() -> Self {
        Self { entries: BTreeMap::new(), begun: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn submit(
        &mut self,
        tag: i64,
        request: SubmitRequest,
        watch: OpenWatch,
        permit: P,
    ) -> Result<OpenRequest, Error> {
        self.begin(tag, Stands::Submitted { request, watch, _permit: permit })
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
    pub(crate) fn again(&self) -> Vec<OpenRequest> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(_, entry)| entry.order);
        entries.into_iter().map(|(tag, entry)| request_for(*tag, &entry.stands)).collect()
    }

    /// What to send for one request that was refused for now.
    pub(crate) fn repeat(&self, tag: i64) -> Option<OpenRequest> {
        self.entries.get(&tag).map(|entry| request_for(tag, &entry.stands))
    }

    /// A request that will not be repeated.
    pub(crate) fn give_up(&mut self, tag: i64) {
        self.entries.remove(&tag);
    }

    pub(crate) fn hear(&mut self, response: &OpenResponse) -> Heard {
        let tag = response.tag;
        let Some(entry) = self.entries.get_mut(&tag) else { return Heard::Nothing };
        match &response.response {
            None => Heard::Nothing,
            Some(open_response::Response::Refused(refused)) => {
                if refused.reason == Reason::ShuttingDown.as_str() {
                    return Heard::Leave;
                }
                // What a call of its own would repeat; a queue that is full is the caller's to judge.
                if Code::from(refused.code) == Code::Unavailable {
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
    use proto::v1::Refused;

    fn submit(ledger: &mut Ledger<()>, tag: i64, watch: OpenWatch) -> OpenRequest {
        let request =
            SubmitRequest { idempotency_key: format!("key-{tag}"), ..SubmitRequest::default() };
        ledger.submit(tag, request, watch, ()).unwrap()
    }

    fn response(tag: i64, response: open_response::Response) -> OpenResponse {
        OpenResponse { tag, response: Some(response) }
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
