//! What the guest may keep in its caches, and for how long, so that it sees what others do to the share.
//!
//! Contract: whoever else changes the share (the host, another sandbox) is seen by the guest as under runc, by asking
//! the host again, except where that is too dear. A question is a round trip of some 50,000 instructions, and the
//! guest's kernel asks for each component of a path, for each `fstat` and for each `read`. So:
//! - names of files and symbolic links are not trusted from a cache, and neither is their absence: a path leads to what
//!   is there now, with its size and times as they are now;
//! - what has been quiet for [`SETTLED`] may be believed for one tick of the guest's clock (10 to 20 ms at 100 Hz): the
//!   attributes of a file, the attributes and the name of a directory, and the names that a listing just gave. Within
//!   that time a descriptor that is open already may read the old length of a file that starts to change, and a path
//!   may lead through a directory that is being moved away; a listed file that is gone is noticed when it is opened.
//!   What did change in the last seconds is asked for again each time;
//! - cached pages survive an `open` (`KEEP_CACHE`) only if the file's status change time is the one that the guest's
//!   pages were known to match, and is settled: it cannot be set back, and a change within the clock's granularity of
//!   the last one would not show in it. Pages are also dropped whenever the guest learns of another size or time of
//!   modification. Without this the kernel would throw the pages of libc away, also those mapped by running programs,
//!   each time some process opens it;
//! - the guest never delays writes (no writeback cache): `write` returns when the host's file has the data. Pages
//!   written through a shared mapping reach the host at `msync`, at `close` and by the guest's own flusher.
//!
//! What remains: a mapping that is already there does not notice a change by others until the file is opened or read.
//! Bounded: [`SLOTS`] files are remembered; a guest with more open files only loses caching.
//! Threads: one lock, held for a few instructions.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The shortest time that the guest kernel rounds up to a tick instead of down to nothing.
const ONE_TICK: Duration = Duration::from_nanos(1);

/// How old a change must be before a further change is sure to carry another time: more than the granularity of any
/// common file system's times.
const SETTLED: Duration = Duration::from_secs(2);

/// Number of remembered files. Node ids are handed out one after the other, so neighbours never share a slot.
const SLOTS: usize = 4096;

/// A status change time in nanoseconds since 1970; 0 is "unknown".
pub(super) type ChangeTime = u64;

/// Node id, the change time that the guest was told last, the change time that its pages match.
type Slot = [u64; 3];

/// See the file header.
#[derive(Debug)]
pub(super) struct Coherence(Mutex<Vec<Slot>>);

impl Coherence {
    /// Nothing is known. The table is not touched, so not resident, until it is used.
    pub(super) fn new() -> Self {
        Self(Mutex::new(vec![[0; 3]; SLOTS]))
    }

    fn with<T>(&self, node: u64, act: impl FnOnce(&mut Slot) -> T) -> T {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The remainder is below SLOTS.
        let index = usize::try_from(node % SLOTS as u64).unwrap_or(0);
        let slot = &mut slots[index];
        if slot[0] != node {
            *slot = [node, 0, 0];
        }
        act(slot)
    }

    /// The guest is being told that `node` changed at `changed`.
    pub(super) fn told(&self, node: u64, changed: ChangeTime) {
        self.with(node, |slot| slot[1] = changed);
    }

    /// The guest opens `node` at `now`. `Some`: its pages may be kept if the file's change time is still this one.
    /// `None`: they are dropped, and what it reads from now on matches what it was told.
    pub(super) fn open(&self, node: u64, now: ChangeTime) -> Option<ChangeTime> {
        self.with(node, |slot| {
            let [_, told, matched] = *slot;
            if matched != 0 && told == matched {
                return Some(matched);
            }
            let settled = now
                .checked_sub(told)
                .is_some_and(|age| age >= nanos(SETTLED));
            slot[2] = if settled { told } else { 0 };
            None
        })
    }

    /// What [`Coherence::open`] gave turned out to be old.
    pub(super) fn moved(&self, node: u64) {
        self.with(node, |slot| slot[2] = 0);
    }
}

/// How long the guest may believe what it is told about something that changed at `changed`.
pub(super) fn lifetime(changed: ChangeTime, now: ChangeTime) -> Duration {
    if is_settled(changed, now) {
        ONE_TICK
    } else {
        Duration::ZERO
    }
}

fn is_settled(changed: ChangeTime, now: ChangeTime) -> bool {
    now.checked_sub(changed)
        .is_some_and(|age| age >= nanos(SETTLED))
}

fn nanos(duration: Duration) -> ChangeTime {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The host's clock now, in the unit of change times.
pub(super) fn now() -> ChangeTime {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, nanos)
}

/// The change time of file attributes. Times before 1970 or after 2554 wrap: still equal only if equal.
pub(super) const fn change_time(seconds: u64, nanoseconds: u32) -> ChangeTime {
    seconds
        .wrapping_mul(1_000_000_000)
        .wrapping_add(nanoseconds as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn pages_are_kept_from_the_second_open_of_an_unchanged_old_file() {
        let coherence = Coherence::new();
        coherence.told(7, 100 * SECOND);
        assert_eq!(coherence.open(7, 200 * SECOND), None);
        coherence.told(7, 100 * SECOND);
        assert_eq!(coherence.open(7, 201 * SECOND), Some(100 * SECOND));
    }

    #[test]
    fn a_change_in_between_drops_the_pages() {
        let coherence = Coherence::new();
        coherence.told(7, 100 * SECOND);
        coherence.open(7, 200 * SECOND);
        coherence.told(7, 150 * SECOND);
        assert_eq!(coherence.open(7, 201 * SECOND), None);
        coherence.moved(7);
        coherence.told(7, 150 * SECOND);
        assert_eq!(coherence.open(7, 202 * SECOND), None);
        assert_eq!(coherence.open(7, 203 * SECOND), Some(150 * SECOND));
    }

    #[test]
    fn a_file_that_just_changed_is_never_kept() {
        let coherence = Coherence::new();
        for now in [100 * SECOND, 101 * SECOND, 101 * SECOND + 1] {
            coherence.told(7, 100 * SECOND);
            assert_eq!(coherence.open(7, now), None, "at {now}");
        }
        // a clock that was set back, too
        coherence.told(7, 100 * SECOND);
        assert_eq!(coherence.open(7, 50 * SECOND), None);
        assert_eq!(coherence.open(7, 50 * SECOND), None);
    }

    #[test]
    fn files_that_share_a_slot_only_lose_caching() {
        let coherence = Coherence::new();
        let other = 7 + SLOTS as u64;
        coherence.told(7, 100 * SECOND);
        coherence.open(7, 200 * SECOND);
        coherence.told(other, 100 * SECOND);
        assert_eq!(coherence.open(other, 200 * SECOND), None);
        coherence.told(7, 100 * SECOND);
        assert_eq!(coherence.open(7, 200 * SECOND), None);
    }

    #[test]
    fn only_what_is_quiet_is_believed_for_a_tick() {
        assert_eq!(lifetime(100 * SECOND, 102 * SECOND), ONE_TICK);
        assert_eq!(lifetime(100 * SECOND, 102 * SECOND - 1), Duration::ZERO);
        assert_eq!(lifetime(100 * SECOND, 50 * SECOND), Duration::ZERO);
    }

    #[test]
    fn an_unknown_file_is_not_kept() {
        let coherence = Coherence::new();
        assert_eq!(coherence.open(9, 200 * SECOND), None);
        assert_eq!(coherence.open(9, 200 * SECOND), None);
    }
}
