//! What waits for a thread of the engine: bounded, with a lane that overtakes.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Where a job stands in line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// In order.
    Normal,
    /// Before everything in the normal lane: a fence must not wait for the commits that it is to end, nor the first entry of
    /// a new owner for those of others.
    Urgent,
}

#[derive(Debug)]
pub(crate) struct Queue<T> {
    lanes: Mutex<Lanes<T>>,
    changed: Condvar,
    max: usize,
}

#[derive(Debug)]
struct Lanes<T> {
    urgent: VecDeque<T>,
    normal: VecDeque<T>,
    is_closed: bool,
}

/// Why a job was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Full,
    Closed,
}

impl<T> Queue<T> {
    /// Each lane holds at most `max` jobs.
    pub(crate) fn new(max: usize) -> Self {
        let lanes = Lanes { urgent: VecDeque::new(), normal: VecDeque::new(), is_closed: false };
        Self { lanes: Mutex::new(lanes), changed: Condvar::new(), max }
    }

    pub(crate) fn push(&self, job: T, lane: Lane) -> Result<(), Refused> {
        let mut lanes = self.lock();
        if lanes.is_closed {
            return Err(Refused::Closed);
        }
        let lane = match lane {
            Lane::Normal => &mut lanes.normal,
            Lane::Urgent => &mut lanes.urgent,
        };
        if self.max <= lane.len() {
            return Err(Refused::Full);
        }
        lane.push_back(job);
        drop(lanes);
        self.changed.notify_one();
        Ok(())
    }

    /// The next job; blocks until there is one. `None`: the queue is closed and empty.
    pub(crate) fn pop(&self) -> Option<T> {
        let mut lanes = self.lock();
        loop {
            if let Some(job) = lanes.urgent.pop_front() {
                return Some(job);
            }
            if let Some(job) = lanes.normal.pop_front() {
                return Some(job);
            }
            if lanes.is_closed {
                return None;
            }
            lanes = self.changed.wait(lanes).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes nothing more; what waits is still handed out.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Lanes<T>> {
        // The lanes are whole at every moment, also when a holder panicked.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urgent_jobs_overtake_and_what_waits_is_handed_out_after_the_end() {
        let queue = Queue::new(2);
        queue.push("a", Lane::Normal).unwrap();
        queue.push("b", Lane::Normal).unwrap();
        assert_eq!(queue.push("c", Lane::Normal), Err(Refused::Full));
        queue.push("fence", Lane::Urgent).unwrap();
        queue.close();
        assert_eq!(queue.push("late", Lane::Urgent), Err(Refused::Closed));
        assert_eq!(std::iter::from_fn(|| queue.pop()).collect::<Vec<_>>(), ["fence", "a", "b"]);
    }
}
