//! The network namespace that stands for the container on the host: made, or joined by its path.
//!
//! The monitor itself lives in it, so that `/proc/<pid in the pid file>/ns/net` is the container's, for hooks and engines
//! that look there, as with runc.

#![allow(
    unsafe_code,
    reason = "unshare(2) is unsafe in rustix because it can unshare descriptors"
)]

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use serde::{Deserialize, Serialize};

/// A namespace that somebody else made, so that it can be found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    path: PathBuf,
    /// Its inode: a path in `/proc` may be another's by now.
    inode: u64,
}

/// Moves this process, which has one thread, into a new namespace.
pub(super) fn make() -> io::Result<()> {
    // SAFETY: NEWNET does not unshare the table of descriptors, which is the danger of this call.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Moves this process, which has one thread, into the namespace at `path`.
pub(super) fn join(path: &Path) -> io::Result<Place> {
    let (place, file) = Place::open(path)?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(place)
}

impl Place {
    /// The namespace at `path`.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::open(path)?.0)
    }

    /// Where it was found.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn open(path: &Path) -> io::Result<(Self, File)> {
        let file = File::open(path)?;
        let place = Self {
            path: path.to_owned(),
            inode: file.metadata()?.ino(),
        };
        Ok((place, file))
    }

    /// Does something in the namespace, on a thread of its own; nothing if it no longer exists.
    pub(super) fn visit<T: Send>(
        &self,
        act: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<Option<T>> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if file.metadata()?.ino() != self.inode {
            return Ok(None);
        }
        let visit = move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            act()
        };
        let done = thread::scope(|scope| scope.spawn(visit).join());
        // A panic ends the process.
        done.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
            .map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_gone_or_another_is_not_visited() {
        let visit = |path: &str, inode| {
            let path = path.into();
            Place { path, inode }.visit(|| Ok(())).unwrap()
        };
        assert_eq!(visit("/nonexistent/netns", 1), None);
        assert_eq!(visit("/proc/self/ns/net", 1), None);
    }
}
