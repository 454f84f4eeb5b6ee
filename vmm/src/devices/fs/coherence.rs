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
//!   What others changed in the last seconds is asked for again each time;
//! - what the guest itself changed last is as quiet as what nobody changed: the guest's kernel knows of that change, and
//!   a file that others change too is known by a change that was not the guest's. So a build that reads what it has just
//!   written does not ask twice for each file;
//! - cached pages survive an `open` (`KEEP_CACHE`) only if the file's status change time is the one that the guest's
//!   pages were known to match, and is settled: it cannot be set back, and a change within the clock's granularity of
//!   the last one would not show in it. Pages are also dropped whenever the guest learns of another size or time of
//!   modification. Without this the kernel would throw the pages of libc away, also those mapped by running programs,
//!   each time some process opens it;
//! - the guest never delays writes (no writeback cache): `write` returns when the host's file has the data. Pages
//!   written through a shared mapping reach the host at `msync`, at `close` and by the guest's own flusher.
//!
//! The price: a name that is not believed is dropped by the guest's kernel at its last use (`fuse_dentry_delete`), and
//! the inode and its pages with it. So pages live from one open to the next only while something holds the file, such
//! as a running program or a name that is believed, and every last close costs a FORGET.
//!
//! What remains: a mapping that is already there does not notice a change by others until the file is opened or read.
//! Bounded: [`SLOTS`] files are remembered; a guest with more open files only loses caching.
//! Threads: one lock, held for a few instructions.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The shortest time that the guest kernel rounds up to a tick instead of down to nothing.
const ONE_TICK: Duration = Duration::from_nanos(1);

/// How old a change must be before a further change is sure to carry another time: more than the granularity of any
/// common file system's times.
const SETTLED: Duration = Duration::from_secs(2);

/// Number of remembered files. Node ids are handed out one after the other, so neighbours never share a slot.
const SLOTS: usize = 4096;

/// A status change time in nanoseconds since 1970; 0 is "unknown".
pub(super) type ChangeTime = u64;

/// What is remembered of a node.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    node: u64,
    /// The change time that the guest was told last.
    told: ChangeTime,
    /// The change time that the guest's pages match.
    matched: ChangeTime,
    /// When the guest's own last change began and ended.
    own: (ChangeTime, ChangeTime),
    /// The last change time that cannot have been the guest's own.
    foreign: ChangeTime,
}

/// See the file header.
#[derive(Debug)]
pub(super) struct Coherence(Mutex<Vec<Slot>>);

impl Coherence {
    /// Nothing is known. The table is not touched, so not resident, until it is used.
    pub(super) fn new() -> Self {
        Self(Mutex::new(vec![Slot::default(); SLOTS]))
    }

    fn with<T>(&self, node: u64, act: impl FnOnce(&mut Slot) -> T) -> T {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The remainder is below SLOTS.
        let index = usize::try_from(node % SLOTS as u64).unwrap_or(0);
        let slot = &mut slots[index];
        if slot.node != node {
            *slot = Slot {
                node,
                ..Slot::default()
            };
        }
        act(slot)
    }

    /// The guest is being told at `now` that `node` changed at `changed`: how long it may believe what it is told.
    pub(super) fn told(&self, node: u64, changed: ChangeTime, now: ChangeTime) -> Duration {
        self.with(node, |slot| {
            slot.told = changed;
            let quiet = is_settled(changed, now) || {
                if !slot.is_own(changed) {
                    slot.foreign = changed;
                }
                is_settled(slot.foreign, now)
            };
            if quiet { ONE_TICK } else { Duration::ZERO }
        })
    }

    /// The guest itself changed `node` between these times.
    pub(super) fn changed_by_guest(&self, node: u64, since: ChangeTime, until: ChangeTime) {
        self.with(node, |slot| slot.own = (since, until));
    }

    /// The guest opens `node` at `now`. `Some`: its pages may be kept if the file's change time is still this one.
    /// `None`: they are dropped, and what it reads from now on matches what it was told.
    pub(super) fn open(&self, node: u64, now: ChangeTime) -> Option<ChangeTime> {
        self.with(node, |slot| {
            if slot.matched != 0 && slot.told == slot.matched {
                return Some(slot.matched);
            }
            slot.matched = if is_settled(slot.told, now) {
                slot.told
            } else {
                0
            };
            None
        })
    }

    /// What [`Coherence::open`] gave turned out to be old.
    pub(super) fn moved(&self, node: u64) {
        self.with(node, |slot| slot.matched = 0);
    }
}

impl Slot {
    /// Whether a change at that time was the guest's own last one.
    fn is_own(&self, changed: ChangeTime) -> bool {
        let (since, until) = self.own;
        until != 0 && (since..=until).contains(&changed)
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
    nanos_of(ClockId::Realtime)
}

/// The host's clock at its last tick: what changes from now on has no earlier change time.
pub(super) fn last_tick() -> ChangeTime {
    nanos_of(ClockId::RealtimeCoarse)
}

fn nanos_of(clock: ClockId) -> ChangeTime {
    let time = clock_gettime(clock);
    match (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec)) {
        (Ok(seconds), Ok(nanoseconds)) => change_time(seconds, nanoseconds),
        _ => 0,
    }
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

    /// Tells the guest of a change some seconds ago.
    fn told(coherence: &Coherence, node: u64, seconds: u64) {
        coherence.told(node, seconds * SECOND, (seconds + 10) * SECOND);
    }

    #[test]
    fn pages_are_kept_from_the_second_open_of_an_unchanged_old_file() {
        let coherence = Coherence::new();
        told(&coherence, 7, 100);
        assert_eq!(coherence.open(7, 200 * SECOND), None);
        told(&coherence, 7, 100);
        assert_eq!(coherence.open(7, 201 * SECOND), Some(100 * SECOND));
    }

    #[test]
    fn a_change_in_between_drops_the_pages() {
        let coherence = Coherence::new();
        told(&coherence, 7, 100);
        coherence.open(7, 200 * SECOND);
        told(&coherence, 7, 150);
        assert_eq!(coherence.open(7, 201 * SECOND), None);
        coherence.moved(7);
        told(&coherence, 7, 150);
        assert_eq!(coherence.open(7, 202 * SECOND), None);
        assert_eq!(coherence.open(7, 203 * SECOND), Some(150 * SECOND));
    }

    #[test]
    fn a_file_that_just_changed_is_never_kept() {
        let coherence = Coherence::new();
        for now in [100 * SECOND, 101 * SECOND, 101 * SECOND + 1] {
            told(&coherence, 7, 100);
            assert_eq!(coherence.open(7, now), None, "at {now}");
        }
        // a clock that was set back, too
        told(&coherence, 7, 100);
        assert_eq!(coherence.open(7, 50 * SECOND), None);
        assert_eq!(coherence.open(7, 50 * SECOND), None);
    }

    #[test]
    fn files_that_share_a_slot_only_lose_caching() {
        let coherence = Coherence::new();
        let other = 7 + SLOTS as u64;
        told(&coherence, 7, 100);
        coherence.open(7, 200 * SECOND);
        told(&coherence, other, 100);
        assert_eq!(coherence.open(other, 200 * SECOND), None);
        told(&coherence, 7, 100);
        assert_eq!(coherence.open(7, 200 * SECOND), None);
    }

    #[test]
    fn only_what_is_quiet_is_believed_for_a_tick() {
        let coherence = Coherence::new();
        let lifetime = |changed, now| coherence.told(7, changed, now);
        assert_eq!(lifetime(100 * SECOND, 102 * SECOND), ONE_TICK);
        assert_eq!(lifetime(100 * SECOND, 102 * SECOND - 1), Duration::ZERO);
        assert_eq!(lifetime(100 * SECOND, 50 * SECOND), Duration::ZERO);
    }

    #[test]
    fn what_the_guest_changed_last_is_believed_for_a_tick() {
        let coherence = Coherence::new();
        let own = (100 * SECOND, 100 * SECOND + 1000);
        coherence.changed_by_guest(7, own.0, own.1);
        let now = 101 * SECOND;
        for changed in [own.0, own.1] {
            assert_eq!(coherence.told(7, changed, now), ONE_TICK, "{changed}");
        }
        assert_eq!(coherence.told(7, own.1 + 1, now), Duration::ZERO);
        assert_eq!(coherence.told(7, own.0 - 1, now), Duration::ZERO);
        assert_eq!(coherence.told(8, own.0, now), Duration::ZERO);
    }

    #[test]
    fn a_file_that_others_change_too_is_asked_for_each_time() {
        let coherence = Coherence::new();
        coherence.changed_by_guest(7, 100 * SECOND, 100 * SECOND);
        let others = 100 * SECOND + 500_000_000;
        assert_eq!(coherence.told(7, others, others), Duration::ZERO);
        coherence.changed_by_guest(7, 101 * SECOND, 101 * SECOND);
        let told = |now| coherence.told(7, 101 * SECOND, now);
        assert_eq!(told(101 * SECOND), Duration::ZERO);
        assert_eq!(told(others + 2 * SECOND), ONE_TICK);
    }

    #[test]
    fn an_unknown_file_is_not_kept() {
        let coherence = Coherence::new();
        assert_eq!(coherence.open(9, 200 * SECOND), None);
        assert_eq!(coherence.open(9, 200 * SECOND), None);
    }
}
