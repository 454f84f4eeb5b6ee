//! Makes the guest ready: a root that containers can leave, the kernel's file systems, the share, limits, loopback.
//!
//! Contract: [`prepare`] runs once, first, in PID 1, and in as few system calls as it can: it is on the path that a user
//! waits for. Whatever fails here ends the guest.
//! The kernel has mounted nothing but the initial root, which holds this binary and empty directories
//! (`rootfs-builder`).

use crate::plan::mounts::{AttributePlan, attribute};
use crate::socket::Dial;
use crate::{cgroup, error_line, sys};
use caisson_agent_api::{HOST_CID, SHARE_MOUNT, SHARE_TAG, SHM_MOUNT, VOLUMES_MOUNT};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change,
    move_mount, open_tree,
};
use rustix::process::{Resource, Rlimit, chroot, fchdir, setrlimit};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::{fs, io};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct GuestError {
    step: String,
    source: io::Error,
}

/// The error as one line.
pub fn line(error: &GuestError) -> String {
    error_line(error)
}

fn step<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> GuestError {
    move |e| GuestError {
        step: step.to_owned(),
        source: e.into(),
    }
}

/// Source, target, file system and flags, in this order.
const MOUNTS: [(&str, &str, &str, MountFlags); 5] = [
    ("dev", "/dev", "devtmpfs", MountFlags::NOSUID),
    ("proc", "/proc", "proc", SAFE),
    ("sys", "/sys", "sysfs", SAFE),
    ("cgroup", cgroup::HIERARCHY, "cgroup2", SAFE),
    // Device nodes of images are the guest's own devices, and the cgroup's rules decide about them.
    (SHARE_TAG, SHARE_MOUNT, "virtiofs", MountFlags::empty()),
];
const SAFE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// What a process may raise its number of open files to; a container's own limit is in its specification.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(1 << 20),
};

/// Prepares the guest.
pub fn prepare() -> Result<(), GuestError> {
    leave_initial_root()?;
    for (source, target, kind, flags) in MOUNTS {
        mount(source, target, kind, flags, None).map_err(step(&format!("mount {target}")))?;
    }
    // By default a tenth of the memory may be open files, which a small guest with a large share exhausts at once.
    fs::write("/proc/sys/fs/file-max", i64::MAX.to_string()).map_err(step("raise fs.file-max"))?;
    setrlimit(Resource::Nofile, OPEN_FILES).map_err(step("raise the limit of open files"))?;
    cgroup::delegate_all(Path::new(cgroup::HIERARCHY)).map_err(step("enable the controllers"))?;
    sys::loopback_up().map_err(step("set the loopback interface up"))
}

/// Mounts the memory that the containers of this sandbox share.
pub(crate) fn share_memory(bytes: u64) -> Result<(), GuestError> {
    let options = CString::new(format!("mode=1777,size={bytes}"))
        .map_err(step("size the sandbox's shared memory"))?;
    mount("shm", SHM_MOUNT, "tmpfs", SAFE, Some(options.as_c_str()))
        .map_err(step("mount the sandbox's shared memory"))
}

/// Mounts what the directories of volumes are in. It is shared: what is mounted in one of them later reaches the
/// container, which is a slave. Only the agent writes to it, at most a few megabytes for each volume.
pub(crate) fn hold_volumes() -> Result<(), GuestError> {
    let options = c"mode=0700,nr_inodes=0";
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("volumes", VOLUMES_MOUNT, "tmpfs", flags, Some(options))
        .map_err(step("mount the directory of volumes"))?;
    mount_change(VOLUMES_MOUNT, MountPropagationFlags::SHARED)
        .map_err(step("share the directory of volumes"))
}

/// pivot_root refuses the initial root as the old one: a bind of it is put on top, and becomes this process's root. It is
/// read-only, so that no container that gets hold of the agent's binary can write to it (CVE-2019-5736).
fn leave_initial_root() -> Result<(), GuestError> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(CWD, "/", clone).map_err(step("open the initial root"))?;
    let read_only = AttributePlan {
        set: attribute::RDONLY,
        clear: 0,
    };
    let attributes = sys::MountAttributes {
        set: read_only.set,
        ..Default::default()
    };
    sys::set_mount_attributes(root.as_fd(), false, attributes)
        .map_err(step("make the root read-only"))?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(step("move the root"))?;
    fchdir(&root).map_err(step("chdir to the root"))?;
    chroot(".").map_err(step("chroot"))
}

/// Connections to the host over virtio-vsock.
#[derive(Debug, Clone, Copy)]
pub struct Vsock;

impl Dial for Vsock {
    fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        sys::connect_vsock(HOST_CID, port)
    }
}
