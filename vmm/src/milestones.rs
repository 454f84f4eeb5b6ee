//! When the boot passed what can be seen of it from outside of the guest: the owner shows where a start spent its time.
//!
//! Contract: each is noted once, the first time; a note is a reading of the clock and one store. The guest decides when it
//! passes its own ones, and never what the clock says. Any thread notes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use caisson_vmm_spec::BootTimes;
use rustix::time::{ClockId, clock_gettime};

/// Readings of `CLOCK_MONOTONIC` in nanoseconds; zero is not yet.
#[derive(Debug, Default)]
struct Readings {
    began: AtomicU64,
    entered: AtomicU64,
    drivers: AtomicU64,
    mounted: AtomicU64,
}

/// The milestones of one VM. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Milestones(Arc<Readings>);

impl Milestones {
    /// The VMM begins now.
    pub fn begin() -> Self {
        let milestones = Self::default();
        note(&milestones.0.began);
        milestones
    }

    /// The vCPUs begin now.
    pub fn entered(&self) {
        note(&self.0.entered);
    }

    /// The guest's kernel drives its share.
    pub fn drivers(&self) {
        note(&self.0.drivers);
    }

    /// The guest asks something of its share.
    pub fn mounted(&self) {
        note(&self.0.mounted);
    }

    /// What has been noted so far.
    pub fn times(&self) -> BootTimes {
        let reading = |at: &AtomicU64| Some(at.load(Ordering::Relaxed)).filter(|&at| at > 0);
        BootTimes {
            began_ns: reading(&self.0.began),
            entered_ns: reading(&self.0.entered),
            drivers_ns: reading(&self.0.drivers),
            mounted_ns: reading(&self.0.mounted),
        }
    }
}

/// Takes the time, the first time. One thread passes one milestone.
fn note(at: &AtomicU64) {
    if at.load(Ordering::Relaxed) == 0 {
        let now = clock_gettime(ClockId::Monotonic);
        // The clock counts from the boot of the host: neither part is ever negative.
        let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
        let now = seconds.unwrap_or(0) * 1_000_000_000 + nanoseconds.unwrap_or(0);
        at.store(now, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_milestone_is_passed_once_and_in_its_time() {
        let milestones = Milestones::begin();
        let unpassed = milestones.times();
        assert!(unpassed.began_ns.is_some() && unpassed.mounted_ns.is_none());
        milestones.clone().mounted();
        let first = milestones.times();
        milestones.mounted();
        assert_eq!(milestones.times(), first);
        assert!(first.mounted_ns >= first.began_ns);
    }
}
