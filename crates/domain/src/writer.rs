//! Group commit of one shard in one epoch: what goes into the next commit, and what an answer to it means.
//!
//! Pure: the shell sends groups and reads positions. Never has two groups in flight, never cuts a group anew while its
//! outcome is unknown, never acknowledges what is not known to be committed.
//!
//! There is one writer for an epoch of a shard, ever. A second one in the same epoch could take rows that a late commit
//! of the first one wrote for its own; a shard that was dropped is opened again only under a new epoch.

use std::collections::VecDeque;

use crate::{Epoch, Lsn, Reason};

const IN_FLIGHT: &str = "an outcome belongs to a group in flight";

/// How much may wait, and how much one commit takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows that may wait; an item without rows counts as one.
    pub waiting_rows_max: usize,
    /// Rows of one commit, unless a single item has more.
    pub group_rows_max: usize,
    /// Bytes of one commit, unless a single item has more.
    pub group_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { waiting_rows_max: 8_192, group_rows_max: 1_000, group_bytes_max: 4 << 20 }
    }
}

/// An item of a group and where its rows stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed<T> {
    /// Of its first row. An item without rows has the number that the next row gets.
    pub first: Lsn,
    pub rows: usize,
    pub item: T,
}

impl<T> Placed<T> {
    /// Of its last row; the row before `first` if it has none.
    pub fn last(&self) -> Lsn {
        Lsn(self.first.0 + self.rows as u64 - 1)
    }
}

/// What is committed together, all or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group<T> {
    /// The last row before this group: the store must find it so.
    pub before: Lsn,
    pub items: Vec<Placed<T>>,
}

impl<T> Group<T> {
    /// The last row once this group is committed; `before` if it has no rows.
    pub fn last(&self) -> Lsn {
        self.items.last().map_or(self.before, Placed::last)
    }
}

/// What the store answered, or did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Committed,
    /// The owner row has this other epoch.
    Fenced {
        epoch: Epoch,
    },
    /// The last row is not the one that the group named.
    HeadMismatch,
    /// No answer came: it may be committed, it may be on its way, it may be lost.
    Unknown,
    /// The answer to [`Next::ReadPosition`].
    Position {
        epoch: Epoch,
        head: Lsn,
    },
}

/// What to do after an outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// It is committed: answer those who wait for it, then cut the next one.
    Acknowledge(Group<T>),
    /// Read (epoch, last row) on a new connection.
    ReadPosition,
    /// Send [`Writer::in_flight`] again, unchanged.
    SendAgain,
    /// Write nothing more, drop the shard, refuse what [`Writer::drain`] gives. That is not known to be committed, and
    /// not known to be lost: a new owner may find it in the log.
    Stop(Reason),
}

#[derive(Debug)]
struct Waiting<T> {
    rows: usize,
    bytes: usize,
    item: T,
}

/// The writer of one shard in one epoch.
#[derive(Debug)]
pub struct Writer<T> {
    epoch: Epoch,
    head: Lsn,
    limits: Limits,
    waiting: VecDeque<Waiting<T>>,
    waiting_rows: usize,
    in_flight: Option<Group<T>>,
    is_stopped: bool,
}

impl<T> Writer<T> {
    /// `head` is the last row of the shard, read after `epoch` was fenced in.
    pub fn new(epoch: Epoch, head: Lsn, limits: Limits) -> Self {
        Self {
            epoch,
            head,
            limits,
            waiting: VecDeque::new(),
            waiting_rows: 0,
            in_flight: None,
            is_stopped: false,
        }
    }

    /// Lets `item` wait for the next commit.
    ///
    /// # Errors
    /// Too much waits already, or the writer stopped: the item comes back.
    pub fn push(&mut self, rows: usize, bytes: usize, item: T) -> Result<(), T> {
        if self.limits.waiting_rows_max < self.waiting_rows + rows.max(1) {
            return Err(item);
        }
        self.begin(rows, bytes, item)
    }

    /// The same for the item with which an owner begins: it has room whatever the limits are, since without it there is no
    /// owner.
    ///
    /// # Errors
    /// The writer stopped: the item comes back.
    pub fn begin(&mut self, rows: usize, bytes: usize, item: T) -> Result<(), T> {
        if self.is_stopped {
            return Err(item);
        }
        self.waiting_rows += rows.max(1);
        self.waiting.push_back(Waiting { rows, bytes, item });
        Ok(())
    }

    /// The next group, if none is in flight and something waits: everything that waits, up to the limits, in order. A
    /// single item over the limits goes alone.
    pub fn cut(&mut self) -> Option<&Group<T>> {
        if self.is_stopped || self.in_flight.is_some() || self.waiting.is_empty() {
            return None;
        }
        let mut group = Group { before: self.head, items: Vec::new() };
        let (mut rows, mut bytes) = (0, 0);
        while let Some(next) = self.waiting.front() {
            let fits = rows + next.rows <= self.limits.group_rows_max
                && bytes + next.bytes <= self.limits.group_bytes_max;
            if !fits && !group.items.is_empty() {
                break;
            }
            let Some(next) = self.waiting.pop_front() else { break };
            self.waiting_rows -= next.rows.max(1);
            rows += next.rows;
            bytes += next.bytes;
            let first = group.last().next();
            group.items.push(Placed { first, rows: next.rows, item: next.item });
        }
        self.in_flight = Some(group);
        self.in_flight.as_ref()
    }

    /// The group whose outcome is open, as it was first cut.
    pub fn in_flight(&self) -> Option<&Group<T>> {
        self.in_flight.as_ref()
    }

    /// What `outcome` of the group in flight means.
    ///
    /// # Panics
    /// Nothing is in flight: then there is nothing that could have an outcome.
    pub fn settle(&mut self, outcome: Outcome) -> Next<T> {
        match outcome {
            Outcome::Committed => self.acknowledge(),
            Outcome::Fenced { epoch } => self.stop(lost_to(self.epoch, epoch)),
            Outcome::HeadMismatch | Outcome::Unknown => Next::ReadPosition,
            Outcome::Position { epoch, head } => self.settle_position(epoch, head),
        }
    }

    fn settle_position(&mut self, epoch: Epoch, head: Lsn) -> Next<T> {
        if epoch != self.epoch {
            return self.stop(lost_to(self.epoch, epoch));
        }
        let group = self.in_flight.as_ref().expect(IN_FLIGHT);
        // A group without rows leaves no trace in the head; it only sets rows to what they are to be, so that
        // committing it twice is committing it once.
        if head == group.before {
            return Next::SendAgain;
        }
        if head == group.last() {
            return self.acknowledge();
        }
        // Below: commits that were acknowledged are gone. Above: somebody else wrote in our epoch, which only a store
        // that went back can let happen.
        self.stop(Reason::StoreRolledBack)
    }

    fn acknowledge(&mut self) -> Next<T> {
        let group = self.in_flight.take().expect(IN_FLIGHT);
        self.head = group.last();
        Next::Acknowledge(group)
    }

    fn stop(&mut self, reason: Reason) -> Next<T> {
        self.is_stopped = true;
        Next::Stop(reason)
    }

    /// Everything that was not acknowledged, in order. The writer takes nothing more.
    pub fn drain(&mut self) -> Vec<T> {
        self.is_stopped = true;
        self.waiting_rows = 0;
        let in_flight = self.in_flight.take().into_iter().flat_map(|group| group.items);
        let waiting = self.waiting.drain(..).map(|waiting| waiting.item);
        in_flight.map(|placed| placed.item).chain(waiting).collect()
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The last row that is known to be committed.
    pub fn head(&self) -> Lsn {
        self.head
    }

    /// Rows that wait for a commit, without those in flight.
    pub fn waiting_rows(&self) -> usize {
        self.waiting_rows
    }

    /// Whether nothing waits and nothing is in flight.
    pub fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.in_flight.is_none()
    }

    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }
}

/// Why an owner in epoch `ours` has to stop when the owner row has another: epochs only grow, so an earlier one is of a
/// store that went back.
pub fn lost_to(ours: Epoch, stored: Epoch) -> Reason {
    if stored < ours { Reason::StoreRolledBack } else { Reason::Fenced }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch(3);

    fn writer() -> Writer<&'static str> {
        let limits = Limits { waiting_rows_max: 10, group_rows_max: 4, group_bytes_max: 100 };
        Writer::new(EPOCH, Lsn(7), limits)
    }

    fn in_flight() -> Writer<&'static str> {
        let mut writer = writer();
        writer.push(2, 10, "a").unwrap();
        writer.cut().unwrap();
        writer
    }

    fn items(group: &Group<&'static str>) -> Vec<(u64, usize, &'static str)> {
        group.items.iter().map(|placed| (placed.first.0, placed.rows, placed.item)).collect()
    }

    #[test]
    fn a_group_takes_everything_that_waits_up_to_the_limits() {
        let check = |pushed: &[(usize, usize, &'static str)],
                     cut: &[(u64, usize, &'static str)]| {
            let mut writer = writer();
            for (rows, bytes, item) in pushed {
                writer.push(*rows, *bytes, item).unwrap();
            }
            assert_eq!(items(writer.cut().unwrap()), cut, "{pushed:?}");
        };
        check(&[(1, 1, "a")], &[(8, 1, "a")]);
        check(&[(1, 1, "a"), (2, 1, "b"), (1, 1, "c")], &[(8, 1, "a"), (9, 2, "b"), (11, 1, "c")]);
        check(&[(1, 1, "a"), (4, 1, "b")], &[(8, 1, "a")]);
        check(&[(1, 60, "a"), (1, 60, "b")], &[(8, 1, "a")]);
        check(&[(5, 1, "big"), (1, 1, "b")], &[(8, 5, "big")]);
        check(&[(1, 500, "big"), (1, 1, "b")], &[(8, 1, "big")]);
        check(&[(0, 1, "a"), (1, 1, "b"), (0, 1, "c")], &[(8, 0, "a"), (8, 1, "b"), (9, 0, "c")]);
    }

    #[test]
    fn one_group_is_in_flight() {
        let mut writer = in_flight();
        writer.push(1, 1, "b").unwrap();
        assert_eq!(writer.cut(), None);
        assert!(matches!(writer.settle(Outcome::Committed), Next::Acknowledge(_)));
        assert_eq!(writer.head(), Lsn(9));
        assert_eq!(items(writer.cut().unwrap()), [(10, 1, "b")]);
    }

    #[test]
    fn a_full_writer_gives_the_item_back() {
        let mut writer = writer();
        writer.push(9, 1, "a").unwrap();
        assert_eq!(writer.push(2, 1, "b"), Err("b"));
        writer.push(0, 1, "c").unwrap();
        assert_eq!(writer.push(0, 1, "d"), Err("d"));
        assert_eq!(writer.waiting_rows(), 10);
        writer.cut();
        assert_eq!(writer.waiting_rows(), 1);
    }

    #[test]
    fn an_owner_begins_whatever_the_limits_are() {
        let limits = Limits { waiting_rows_max: 0, ..Limits::default() };
        let mut writer = Writer::new(EPOCH, Lsn(7), limits);
        assert_eq!(writer.push(1, 1, "a"), Err("a"));
        writer.begin(1, 1, "opened").unwrap();
        assert_eq!(writer.push(1, 1, "b"), Err("b"));
        assert_eq!(items(writer.cut().unwrap()), [(8, 1, "opened")]);
        assert_eq!(writer.settle(Outcome::Fenced { epoch: Epoch(4) }), Next::Stop(Reason::Fenced));
        assert_eq!(writer.begin(1, 1, "again"), Err("again"));
    }

    #[test]
    fn the_position_tells_what_became_of_an_unknown_group() {
        let check = |epoch: u64, head: u64, expected: &str| {
            let mut writer = in_flight();
            assert_eq!(writer.settle(Outcome::Unknown), Next::ReadPosition);
            let next = writer.settle(Outcome::Position { epoch: Epoch(epoch), head: Lsn(head) });
            let found = match next {
                Next::Acknowledge(_) => "acknowledge",
                Next::ReadPosition => "read",
                Next::SendAgain => "again",
                Next::Stop(reason) => reason.as_str(),
            };
            assert_eq!(found, expected, "epoch {epoch}, head {head}");
        };
        check(3, 9, "acknowledge");
        check(3, 7, "again");
        check(3, 6, "store_rolled_back");
        check(3, 8, "store_rolled_back");
        check(3, 10, "store_rolled_back");
        check(4, 9, "fenced");
        check(4, 7, "fenced");
        check(2, 7, "store_rolled_back");
    }

    #[test]
    fn an_owner_row_that_went_back_is_no_other_owner() {
        let next = in_flight().settle(Outcome::Fenced { epoch: Epoch(2) });
        assert_eq!(next, Next::Stop(Reason::StoreRolledBack));
    }

    #[test]
    fn an_unknown_group_goes_again_as_it_was_and_its_late_twin_does_no_harm() {
        let mut writer = in_flight();
        writer.push(1, 1, "b").unwrap();
        writer.settle(Outcome::Unknown);
        assert_eq!(
            writer.settle(Outcome::Position { epoch: EPOCH, head: Lsn(7) }),
            Next::SendAgain
        );
        assert_eq!(items(writer.in_flight().unwrap()), [(8, 2, "a")]);
        assert_eq!(writer.settle(Outcome::HeadMismatch), Next::ReadPosition);
        let next = writer.settle(Outcome::Position { epoch: EPOCH, head: Lsn(9) });
        assert!(matches!(next, Next::Acknowledge(_)));
    }

    #[test]
    fn a_group_without_rows_is_sent_until_it_is_answered() {
        let mut writer = writer();
        writer.push(0, 10, "row").unwrap();
        writer.cut().unwrap();
        writer.settle(Outcome::Unknown);
        let next = writer.settle(Outcome::Position { epoch: EPOCH, head: Lsn(7) });
        assert_eq!(next, Next::SendAgain);
        assert!(matches!(writer.settle(Outcome::Committed), Next::Acknowledge(_)));
        assert_eq!(writer.head(), Lsn(7));
    }

    #[test]
    fn a_stopped_writer_gives_everything_back_and_takes_nothing() {
        let mut writer = in_flight();
        writer.push(1, 1, "b").unwrap();
        assert_eq!(writer.settle(Outcome::Fenced { epoch: Epoch(4) }), Next::Stop(Reason::Fenced));
        assert_eq!(writer.push(1, 1, "c"), Err("c"));
        assert_eq!(writer.cut(), None);
        assert_eq!(writer.drain(), ["a", "b"]);
        assert!(writer.is_settled());
    }
}
