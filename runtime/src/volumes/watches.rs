//! Directories that are watched: one inotify(7) instance for all of a process's.
//!
//! Contract: there is a small number of instances for each user of a host (128 by default), so a process has one. The
//! kernel counts a directory once, however often it is watched: the last [`Watch`] on it ends that.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

/// What changes the names in a directory.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::ONLYDIR);

/// The instance.
#[derive(Debug)]
pub(super) struct Watches {
    notices: OwnedFd,
    /// How many watches stand for each descriptor. Locked over the system calls that change it.
    counts: Mutex<HashMap<i32, usize>>,
}

/// One watched directory, until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    all: Arc<Watches>,
    descriptor: i32,
}

impl Watches {
    /// Nothing is watched yet.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let notices = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            notices,
            counts: Mutex::default(),
        }))
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<i32, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a directory. What changes in it from now on makes [`Watches::notices`] readable.
    pub(super) fn add(self: &Arc<Self>, dir: &Path) -> io::Result<Watch> {
        let mut counts = self.counts();
        let descriptor = inotify::add_watch(&self.notices, dir, CHANGES)?;
        *counts.entry(descriptor).or_default() += 1;
        Ok(Watch {
            all: Arc::clone(self),
            descriptor,
        })
    }

    /// Readable when something has changed.
    pub(super) fn notices(&self) -> io::Result<OwnedFd> {
        self.notices.try_clone()
    }

    /// Takes what has been noticed so far; what it was is seen in the directories.
    pub(super) fn drain(&self) {
        let mut events = [0; 4096];
        while rustix::io::read(&self.notices, &mut events).is_ok_and(|length| length > 0) {}
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut counts = self.all.counts();
        let left = counts
            .get(&self.descriptor)
            .map_or(0, |count| count.saturating_sub(1));
        if left > 0 {
            counts.insert(self.descriptor, left);
            return;
        }
        counts.remove(&self.descriptor);
        // A directory that is gone is not watched any more.
        let _ = inotify::remove_watch(&self.all.notices, self.descriptor);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn is_noticed(watches: &Watches, dir: &Path, name: &str) -> bool {
        File::create(dir.join(name)).unwrap();
        let noticed = rustix::io::read(&watches.notices, &mut [0; 4096]).is_ok();
        watches.drain();
        noticed
    }

    #[test]
    fn a_directory_is_watched_until_its_last_watch_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let watches = Watches::new().unwrap();
        let one = watches.add(dir.path()).unwrap();
        let other = watches.add(dir.path()).unwrap();
        assert!(is_noticed(&watches, dir.path(), "a"));
        drop(one);
        assert!(is_noticed(&watches, dir.path(), "b"));
        drop(other);
        watches.drain();
        assert!(!is_noticed(&watches, dir.path(), "c"));
        assert!(watches.counts().is_empty());
    }

    #[test]
    fn a_directory_that_was_removed_may_still_be_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let watches = Watches::new().unwrap();
        let watch = watches.add(dir.path()).unwrap();
        drop(dir);
        drop(watch);
        assert!(watches.counts().is_empty());
    }
}
