//! Mounts of a test on the host, which end with it.

use std::ffi::CStr;
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
        Self::of(dir, "tmpfs", None)
    }

    fn of(dir: &Path, kind: &str, options: Option<&CStr>) -> Self {
        fs::create_dir(dir).expect("mkdir");
        mount("nodev", dir, kind, MountFlags::empty(), options).expect(kind);
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

/// Where the kernel is told how many huge pages it has.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// An empty hugetlbfs of pages of 2 MiB, which everybody may write to: a kubelet's volume in the medium `HugePages`.
pub struct HugePages {
    mount: Tmpfs,
    pool: String,
}

impl HugePages {
    /// Mounts one at `dir`, which is created. runc's containers have the host's pages: the host gets `pages` for them.
    pub fn mount(dir: &Path, pages: u32) -> Self {
        let pool = fs::read_to_string(POOL).expect("the pool");
        if crate::case::runtime() == "runc" {
            fs::write(POOL, pages.to_string()).expect("the pool");
        }
        let options = Some(c"pagesize=2M,mode=0777");
        Self {
            mount: Tmpfs::of(dir, "hugetlbfs", options),
            pool,
        }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        self.mount.dir()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Pages of files that are still there go later.
        let _ = fs::write(POOL, &self.pool);
    }
}
