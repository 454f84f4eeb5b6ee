//! Mounts of a test on the host, which end with it.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// An empty tmpfs. Declared after the [`Case`](crate::Case) that it is for, so that it is unmounted before that looks
/// at what is left.
pub struct Tmpfs {
    dir: PathBuf,
}

impl Tmpfs {
    /// Mounts one at `dir`, which is created.
    pub fn mount(dir: &Path) -> Self {
        fs::create_dir(dir).expect("mkdir");
        mount("tmpfs", dir, "tmpfs", MountFlags::empty(), None).expect("mount a tmpfs");
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Detached if a failed test still uses it: what remains goes with its last user.
        let _ = unmount(&self.dir, UnmountFlags::empty())
            .or_else(|_| unmount(&self.dir, UnmountFlags::DETACH));
    }
}
