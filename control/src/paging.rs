//! Lists over all shards: every owner is asked at once, what they answer becomes one page, and a token says where each
//! shard goes on.
//!
//! A shard that does not answer is named and left out of the page; it never holds up the others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use domain::{ErrorKind, ShardId};
use prost::Message;
use proto::link::WorkInfo;
use proto::status::Failure;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::network::Views;
use crate::refusal;
use crate::router::{At, Call, Router, shutting_down};

/// How long one shard may hold up a list.
const SHARD_TIMEOUT: Duration = Duration::from_secs(2);
const ASKED_AT_ONCE_MAX: usize = 64;
/// What one page may weigh: well below the message limit.
const PAGE_BYTES_MAX: usize = 4 << 20;

/// Where a list goes on.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Token {
    /// What was asked for; another list has no use for this token.
    #[prost(string, tag = "1")]
    query: String,
    #[prost(message, repeated, tag = "2")]
    spots: Vec<Spot>,
}

/// Where a list goes on in one shard.
#[derive(Clone, PartialEq, Message)]
struct Spot {
    #[prost(uint32, tag = "1")]
    shard: u32,
    #[prost(uint64, tag = "2")]
    at: u64,
    #[prost(bool, tag = "3")]
    is_done: bool,
}

/// How far a list is in each shard. A shard that is not named begins at 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    spots: BTreeMap<ShardId, (u64, bool)>,
}

impl Progress {
    /// Reads a page token; an empty one is the beginning.
    pub(crate) fn parse(token: &str, query: &str) -> Result<Self, Failure> {
        if token.is_empty() {
            return Ok(Self::default());
        }
        let wrong = || Failure::invalid("page_token", "page token is not one that this list gave");
        let token = Token::decode(&from_hex(token).ok_or_else(wrong)?[..]).map_err(|_| wrong())?;
        if token.query != query {
            return Err(wrong());
        }
        let spots = token.spots.into_iter();
        Ok(Self {
            spots: spots.map(|spot| (ShardId(spot.shard), (spot.at, spot.is_done))).collect(),
        })
    }

    pub(crate) fn at(&self, shard: ShardId) -> u64 {
        self.spots.get(&shard).map_or(0, |(at, _)| *at)
    }

    fn is_done(&self, shard: ShardId) -> bool {
        self.spots.get(&shard).is_some_and(|(_, is_done)| *is_done)
    }

    fn set(&mut self, shard: ShardId, at: u64, is_done: bool) {
        self.spots.insert(shard, (at, is_done));
    }

    /// The token of the next page; empty if every one of `shards` is done.
    fn token(&self, query: &str, shards: &[ShardId]) -> String {
        if shards.iter().all(|shard| self.is_done(*shard)) {
            return String::new();
        }
        let spots = self.spots.iter();
        let spots =
            spots.map(|(shard, (at, is_done))| Spot { shard: shard.0, at: *at, is_done: *is_done });
        to_hex(&Token { query: query.to_owned(), spots: spots.collect() }.encode_to_vec())
    }
}

fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| char::from(DIGITS[usize::from(half)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let pair = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).ok();
    (0..text.len()).step_by(2).map(pair).collect()
}

/// One page of a list.
#[derive(Debug)]
pub(crate) struct Page<T> {
    pub(crate) items: Vec<T>,
    pub(crate) next: String,
    pub(crate) unreachable: Vec<i32>,
}

/// What one shard has, in its own order.
#[derive(Debug)]
pub(crate) struct Part<T> {
    shard: ShardId,
    items: Vec<T>,
    /// There is nothing after these.
    is_last: bool,
}

/// What the shards answered.
#[derive(Debug)]
pub(crate) struct Answers<T> {
    parts: Vec<Part<T>>,
    unreachable: Vec<ShardId>,
}

/// How one list is asked for and read.
pub(crate) struct List<Q, A, T> {
    pub(crate) call: Call,
    /// How many items make a page.
    pub(crate) size: u32,
    /// The request for what comes after an item of this number; 0: from the beginning.
    pub(crate) request: fn(&List<Q, A, T>, u64) -> Q,
    pub(crate) items: fn(A) -> Vec<T>,
    pub(crate) number: fn(&T) -> u64,
    pub(crate) tenant: String,
    /// Empty: all of the tenant.
    pub(crate) agent: String,
    /// Of works: 0 for every state.
    pub(crate) state: u32,
}

/// Every shard of the cluster, as soon as there is a view.
pub(crate) async fn all_shards(
    views: &mut Views,
    deadline: Instant,
) -> Result<Vec<ShardId>, Failure> {
    let view = timeout_at(deadline, views.wait_for(Option::is_some)).await;
    let text = "no answer in time: nobody leads the cluster yet";
    let late = || Failure::new(domain::ErrorKind::Deadline, domain::Reason::LeaderFree, text);
    let view = view.map_err(|_| late())?.map_err(|_| shutting_down())?;
    Ok(view.as_ref().map(|view| view.table.shards().collect()).unwrap_or_default())
}

impl<Q, A, T> List<Q, A, T>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
    T: Message + 'static,
{
    /// Asks the owners of `shards`, all at once, for what comes next.
    ///
    /// # Errors
    /// None of them answers: an empty page would say that there is nothing.
    pub(crate) async fn ask(
        self,
        router: &Router,
        shards: &[ShardId],
        progress: &Progress,
    ) -> Result<Answers<T>, Failure> {
        let deadline = self.call.deadline.min(Instant::now() + SHARD_TIMEOUT);
        let list = Arc::new(Self { call: Call { deadline, ..self.call.clone() }, ..self });
        let mut asked = JoinSet::new();
        let mut answers: BTreeMap<ShardId, Result<Part<T>, Failure>> = BTreeMap::new();
        for shard in shards.iter().copied().filter(|shard| !progress.is_done(*shard)) {
            if ASKED_AT_ONCE_MAX <= asked.len() {
                answers.extend(asked.join_next().await.and_then(Result::ok));
            }
            let (list, router, at) = (list.clone(), router.clone(), progress.at(shard));
            asked.spawn(async move { (shard, list.part(&router, shard, at).await) });
        }
        while let Some(answer) = asked.join_next().await {
            answers.extend(answer.ok());
        }
        let (mut parts, mut unreachable, mut why) = (Vec::new(), Vec::new(), None);
        for (shard, answer) in answers {
            match answer {
                Ok(part) => parts.push(part),
                Err(failure) => {
                    unreachable.push(shard);
                    // One that may pass says more about trying again than one that does not.
                    if why.as_ref().is_none_or(|why: &Failure| !why.kind.is_retryable()) {
                        why = Some(failure);
                    }
                }
            }
        }
        match why.filter(|_| parts.is_empty()) {
            Some(failure) => Err(none_answers(unreachable.len(), failure)),
            None => Ok(Answers { parts, unreachable }),
        }
    }

    /// Asks the owner of one shard, and fails if it does.
    pub(crate) async fn ask_one(
        self,
        router: &Router,
        shard: ShardId,
        progress: &Progress,
    ) -> Result<Answers<T>, Failure> {
        let part = self.part(router, shard, progress.at(shard)).await?;
        Ok(Answers { parts: vec![part], unreachable: Vec::new() })
    }

    /// A store cuts its pages by bytes, so only an empty answer says that there is no more.
    async fn part(&self, router: &Router, shard: ShardId, mut at: u64) -> Result<Part<T>, Failure> {
        let call = Call { at: At::Shard(shard), ..self.call.clone() };
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        let mut part = Part { shard, items: Vec::new(), is_last: false };
        let mut bytes = 0;
        while part.items.len() < size && bytes < PAGE_BYTES_MAX && !part.is_last {
            let answer = router.call(&call, &(self.request)(self, at)).await?;
            let items = (self.items)(answer);
            at = items.last().map_or(at, self.number);
            bytes += items.iter().map(Message::encoded_len).sum::<usize>();
            part.is_last = items.is_empty();
            part.items.extend(items);
        }
        Ok(part)
    }
}

/// Every shard that was asked failed; `why` is of one of them. What asking again does not mend stays so.
fn none_answers(count: usize, why: Failure) -> Failure {
    if !why.kind.is_retryable() && why.kind != ErrorKind::Deadline {
        return why;
    }
    let text = format!("none of the {count} shards that were asked answers: {}", why.message);
    let delay = why.retry_after.unwrap_or(refusal::RETRY_AFTER);
    Failure::new(ErrorKind::Unavailable, why.reason, text).retry_after(delay)
}

impl<T> Answers<T> {
    fn page(&self, items: Vec<T>, query: &str, progress: &Progress) -> Page<T> {
        let reachable: Vec<_> = self.parts.iter().map(|part| part.shard).collect();
        let unreachable = self.unreachable.iter().map(|shard| shard.0.cast_signed()).collect();
        Page { items, next: progress.token(query, &reachable), unreachable }
    }
}

/// The newest works of all shards. Each shard's list is newest first.
pub(crate) fn newest(
    mut answers: Answers<WorkInfo>,
    mut progress: Progress,
    query: &str,
    size: u32,
) -> Page<WorkInfo> {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let mut parts: Vec<_> = answers
        .parts
        .iter_mut()
        .map(|part| {
            (part.shard, std::mem::take(&mut part.items).into_iter().peekable(), part.is_last)
        })
        .collect();
    let (mut page, mut bytes) = (Vec::new(), 0);
    while page.len() < size && (bytes < PAGE_BYTES_MAX || page.is_empty()) {
        let order = |work: &WorkInfo| (work.create_ms, work.slot, work.lsn);
        let heads = parts
            .iter_mut()
            .filter_map(|(shard, list, _)| Some((order(list.peek()?), *shard, list)));
        let Some((_, shard, list)) = heads.max_by_key(|(order, shard, _)| (*order, *shard)) else {
            break;
        };
        let Some(work) = list.next() else { break };
        bytes += work.encoded_len();
        progress.set(shard, work.lsn, false);
        page.push(work);
    }
    for (shard, list, is_last) in &mut parts {
        if *is_last && list.peek().is_none() {
            let at = progress.at(*shard);
            progress.set(*shard, at, true);
        }
    }
    answers.page(page, query, &progress)
}

/// What all shards have, shard by shard. `number` is where an item stands in its shard.
pub(crate) fn in_order<T>(
    mut answers: Answers<T>,
    mut progress: Progress,
    query: &str,
    size: u32,
    number: fn(&T) -> u64,
) -> Page<T> {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let mut page = Vec::new();
    for Part { shard, items, is_last } in &mut answers.parts {
        let taken = items.len().min(size - page.len());
        let is_done = *is_last && taken == items.len();
        let at = items.get(..taken).and_then(<[T]>::last).map_or(progress.at(*shard), number);
        progress.set(*shard, at, is_done);
        page.extend(items.drain(..taken));
    }
    answers.page(page, query, &progress)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeNetwork, refuse, view};
    use domain::Reason;
    use proto::link::{ListAnswer, ListCall};

    fn work(shard: u32, lsn: u64) -> WorkInfo {
        // Works are made in turn by all shards.
        let create_ms = i64::try_from(lsn * 10 + u64::from(shard)).unwrap();
        WorkInfo { lsn, slot: shard, create_ms, ..WorkInfo::default() }
    }

    /// Three shards with so many works each; shard 3 never answers.
    fn network(counts: [u64; 3]) -> Arc<FakeNetwork> {
        let owners = [("node-1", 1), ("node-2", 1), ("node-1", 2), ("node-9", 1)];
        FakeNetwork::new(view(1, &owners), move |_, _, envelope| {
            let Some(count) = counts.get(envelope.shard as usize) else {
                return refuse(Reason::Unowned);
            };
            let call = ListCall::decode(envelope.payload.clone()).unwrap();
            let newest =
                if call.below == 0 { *count } else { count.min(&(call.below - 1)).to_owned() };
            // Short pages, as a store cuts them.
            let works = (1..=newest).rev().take(call.limit.min(3) as usize);
            let works = works.map(|lsn| work(envelope.shard, lsn)).collect();
            Ok(ListAnswer { works }.encode_to_vec().into())
        })
    }

    fn list(size: u32, deadline: Instant) -> List<ListCall, ListAnswer, WorkInfo> {
        List {
            call: Call::new(proto::kind::LIST, At::Shard(ShardId(0)), deadline),
            size,
            request: |list, below| ListCall { below, limit: list.size, ..ListCall::default() },
            items: |answer| answer.works,
            number: |work| work.lsn,
            tenant: String::new(),
            agent: String::new(),
            state: 0,
        }
    }

    async fn page(network: &Arc<FakeNetwork>, size: u32, token: &str) -> Page<WorkInfo> {
        let router = Router::new(network.clone());
        let deadline = Instant::now() + Duration::from_secs(30);
        let shards = all_shards(&mut router.network().views(), deadline).await.unwrap();
        let progress = Progress::parse(token, "q").unwrap();
        let answers = list(size, deadline).ask(&router, &shards, &progress).await.unwrap();
        newest(answers, progress, "q", size)
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_no_shard_answers_is_unavailable_not_empty() {
        let owners = [("node-1", 1), ("node-2", 1)];
        let network = FakeNetwork::new(view(1, &owners), |_, _, _| refuse(Reason::Unowned));
        let router = Router::new(network);
        let deadline = Instant::now() + Duration::from_secs(30);
        let shards = [ShardId(0), ShardId(1)];
        let failed = list(4, deadline).ask(&router, &shards, &Progress::default()).await;
        let failure = failed.unwrap_err();
        assert_eq!((failure.kind, failure.reason), (ErrorKind::Unavailable, Reason::Unowned));
        assert!(failure.retry_after.is_some() && failure.message.contains("none of the 2"));
    }

    fn one<T>(shard: u32, items: Vec<T>, is_last: bool) -> Answers<T> {
        Answers {
            parts: vec![Part { shard: ShardId(shard), items, is_last }],
            unreachable: Vec::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pages_tell_all_works_newest_first_and_each_once() {
        let network = network([5, 0, 9]);
        let (mut token, mut seen) = (String::new(), Vec::new());
        loop {
            let page = page(&network, 4, &token).await;
            assert_eq!(page.unreachable, [3]);
            assert!(page.items.len() <= 4);
            seen.extend(page.items.iter().map(|work| work.create_ms));
            token = page.next;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(seen.len(), 14);
        assert!(seen.is_sorted_by(|newer, older| older < newer), "{seen:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_page_that_holds_all_is_the_last() {
        let page = page(&network([2, 0, 1]), 50, "").await;
        assert_eq!((page.items.len(), page.next.as_str()), (3, ""));
    }

    #[test]
    fn large_works_make_a_short_page() {
        let large = |lsn| WorkInfo { result: vec![b'x'; 1 << 20].into(), ..work(0, lsn) };
        let list = (1..=20).rev().map(large).collect();
        let page = newest(one(0, list, false), Progress::default(), "q", 50);
        assert_eq!(page.items.len(), 4);
        let next = Progress::parse(&page.next, "q").unwrap();
        assert_eq!((next.at(ShardId(0)), next.is_done(ShardId(0))), (17, false));
    }

    #[test]
    fn what_is_listed_by_shard_goes_on_where_the_page_ended() {
        let mut both = one(0, vec![1_u64, 2], true);
        both.parts.push(Part { shard: ShardId(1), items: vec![7, 8, 9], is_last: false });
        let page = in_order(both, Progress::default(), "q", 3, |row| *row);
        assert_eq!(page.items, [1, 2, 7]);
        let next = Progress::parse(&page.next, "q").unwrap();
        assert!(next.is_done(ShardId(0)));
        assert_eq!((next.at(ShardId(1)), next.is_done(ShardId(1))), (7, false));
        let rest = Answers { unreachable: vec![ShardId(4)], ..one(1, vec![8, 9], true) };
        let page = in_order(rest, next, "q", 3, |row| *row);
        assert_eq!((page.items, page.next.as_str()), (vec![8, 9], ""));
        assert_eq!(page.unreachable, [4]);
    }

    #[test]
    fn a_token_of_another_list_is_refused() {
        let page = in_order(one(0, vec![1_u64, 2], true), Progress::default(), "a", 1, |row| *row);
        assert!(Progress::parse(&page.next, "a").is_ok());
        for (token, query) in
            [(page.next.as_str(), "b"), ("xy", "a"), ("0", "a"), ("ffff", "a"), ("é", "a")]
        {
            let failure = Progress::parse(token, query).unwrap_err();
            assert_eq!(failure.field.as_deref(), Some("page_token"), "{token}");
        }
    }
}
