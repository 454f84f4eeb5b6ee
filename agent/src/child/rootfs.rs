//! The container's file system tree: built below a private mount, entered with pivot_root, then sealed.
//!
//! Contract: steps in runc's order (rootfs_linux.go): propagation, root, mounts as listed, device nodes and links,
//! [`pivot`], and only then what is read-only becomes so ([`seal`]).

use super::enter::Sources;
use super::mount::{MountError, Root, attach, make, set_attributes, set_propagation};
use super::{ChildError, Context};
use crate::plan::mounts::{AttributePlan, attribute};
use crate::plan::{ContainerPlan, DevicePlan};
use crate::sys;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, StatxFlags, Uid, chownat, fstat, makedev, mknodat,
    open, openat, stat, statx, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{fchdir, pivot_root};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// An empty directory of the guest's own root, on which each container attaches its root in its own mount namespace.
const ATTACH_POINT: &str = "/run/caisson/root";

/// A built tree, not yet entered.
pub(super) struct Built {
    /// The root mount.
    pub(super) root: OwnedFd,
    /// Mounts that become read-only last.
    read_only: Vec<OwnedFd>,
}

/// Builds the tree below the attach point.
pub(super) fn build(
    plan: &ContainerPlan,
    sources: Sources,
    in_user: bool,
) -> Result<Built, ChildError> {
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    let word = plan
        .propagation
        .map_or(slave, MountPropagationFlags::from_bits_retain);
    mount_change("/", word).step(|| "set the propagation of /".to_owned())?;
    // pivot_root wants the parent of the new root private (runc: rootfsParentMountPrivate).
    mount_change("/", MountPropagationFlags::PRIVATE).step(|| "make / private".to_owned())?;
    let root = sources.root.ok_or(ChildError::AgentGone)?;
    let point = open(
        ATTACH_POINT,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(|| format!("open {ATTACH_POINT}"))?;
    attach(root.as_fd(), point.as_fd()).step(|| "attach the rootfs".to_owned())?;
    let tree = Root(root.as_fd());
    let mut read_only = Vec::new();
    for (mount, bind) in plan.mounts.iter().zip(sources.binds) {
        read_only.extend(make(&tree, mount, bind)?);
    }
    if plan.own_dev {
        make_devices(&tree, plan, sources.devices, in_user)?;
        make_links(&tree)?;
    }
    Ok(Built { root, read_only })
}

fn make_devices(
    tree: &Root<'_>,
    plan: &ContainerPlan,
    nodes: Vec<OwnedFd>,
    in_user: bool,
) -> Result<(), ChildError> {
    let old = rustix::process::umask(Mode::empty());
    let mut nodes = nodes.into_iter();
    for device in &plan.devices {
        let step = || format!("error creating device node {:?}", device.path);
        if in_user {
            let node = nodes.next().ok_or(ChildError::AgentGone)?;
            let target = tree.file(&device.path)?;
            attach(node.as_fd(), target.as_fd()).step(step)?;
            continue;
        }
        let parent = device.path.parent().unwrap_or(Path::new("/"));
        let name = device.path.file_name().unwrap_or_default();
        let parent = tree.directory(parent)?;
        let kind = FileType::from_raw_mode(device.mode);
        let mode = Mode::from_raw_mode(device.mode & 0o7777);
        match mknodat(
            &parent,
            name,
            kind,
            mode,
            makedev(device.major, device.minor),
        ) {
            // What the image brings stays as it is, unless it is something else altogether.
            Err(Errno::EXIST) => check_node(parent.as_fd(), Path::new(name), device).step(step)?,
            other => {
                other.step(step)?;
                let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
                chownat(
                    &parent,
                    name,
                    Some(uid),
                    Some(gid),
                    AtFlags::SYMLINK_NOFOLLOW,
                )
                .step(step)?;
            }
        }
    }
    rustix::process::umask(old);
    Ok(())
}

fn check_node(parent: BorrowedFd<'_>, name: &Path, device: &DevicePlan) -> Result<(), Errno> {
    let found = statx(parent, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE)?;
    let same_kind =
        FileType::from_raw_mode(found.stx_mode.into()) == FileType::from_raw_mode(device.mode);
    let same_number = (found.stx_rdev_major, found.stx_rdev_minor) == (device.major, device.minor);
    if same_kind && (same_number || FileType::from_raw_mode(device.mode) == FileType::Fifo) {
        Ok(())
    } else {
        Err(Errno::EXIST)
    }
}

/// A node of the guest that is this device: for user namespaces, where nodes are bound instead of made.
pub(super) fn guest_node(device: &DevicePlan) -> Result<PathBuf, ChildError> {
    let number = makedev(device.major, device.minor);
    if stat(&device.path).is_ok_and(|s| {
        s.st_rdev == number
            && FileType::from_raw_mode(s.st_mode) == FileType::from_raw_mode(device.mode)
    }) {
        return Ok(device.path.clone());
    }
    let kind = FileType::from_raw_mode(device.mode);
    let path = PathBuf::from(format!(
        "/dev/.caisson-{:o}-{}-{}-{}-{}",
        device.mode, device.major, device.minor, device.uid, device.gid
    ));
    let old = rustix::process::umask(Mode::empty());
    let made = mknodat(
        CWD,
        &path,
        kind,
        Mode::from_raw_mode(device.mode & 0o7777),
        number,
    );
    rustix::process::umask(old);
    match made {
        Ok(()) | Err(Errno::EXIST) => Ok(path),
        Err(e) => Err(e).step(|| format!("make {}", path.display())),
    }
}

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
];

fn make_links(tree: &Root<'_>) -> Result<(), ChildError> {
    let dev = tree.directory(Path::new("/dev"))?;
    // A node of the image's would be a terminal multiplexer of the guest, not of the container's own devpts.
    match unlinkat(&dev, "ptmx", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(e).step(|| "remove /dev/ptmx".to_owned()),
    }
    symlinkat("pts/ptmx", &dev, "ptmx").step(|| "link /dev/ptmx".to_owned())?;
    let core = stat("/proc/kcore")
        .is_ok()
        .then_some(("/proc/kcore", "core"));
    for (target, name) in LINKS.into_iter().chain(core) {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e).step(|| format!("link /dev/{name}")),
        }
    }
    Ok(())
}

/// Makes the tree the root of this process and forgets the guest's.
pub(super) fn pivot(root: BorrowedFd<'_>, propagation: Option<u32>) -> Result<(), ChildError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = open("/", flags, Mode::empty()).step(|| "open /".to_owned())?;
    fchdir(root).step(|| "chdir to the rootfs".to_owned())?;
    pivot_root(".", ".").step(|| "pivot_root".to_owned())?;
    fchdir(&old).step(|| "chdir to the old root".to_owned())?;
    // What is unmounted here must not be unmounted in the guest's own namespace.
    mount_change(
        ".",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .step(|| "make the old root a slave".to_owned())?;
    unmount(".", UnmountFlags::DETACH).step(|| "unmount the old root".to_owned())?;
    rustix::process::chdir("/").step(|| "chdir to /".to_owned())?;
    if let Some(word) = propagation {
        let root = open("/", flags, Mode::empty()).step(|| "open /".to_owned())?;
        set_propagation(root.as_fd(), word).step(|| "set the propagation of /".to_owned())?;
    }
    Ok(())
}

/// Standard streams that are the guest's /dev/null become the container's own (runc: reOpenDevNull).
pub(super) fn use_containers_null() -> Result<(), ChildError> {
    let Ok(null) = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) else {
        return Ok(());
    };
    let wanted = makedev(1, 3);
    if fstat(&null).map_or(0, |s| s.st_rdev) != wanted {
        return Ok(());
    }
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    for (number, stream) in (0..).zip(streams) {
        let is_null = fstat(stream).is_ok_and(|s| {
            s.st_rdev == wanted && FileType::from_raw_mode(s.st_mode) == FileType::CharacterDevice
        });
        if is_null {
            sys::place(null.as_fd(), number).step(|| "reopen /dev/null".to_owned())?;
        }
    }
    Ok(())
}

/// Makes the working directory, as runc does, so that a read-only root may name one that the image lacks.
pub(super) fn make_cwd(cwd: &str) -> Result<(), ChildError> {
    fs::create_dir_all(cwd).step(|| format!("mkdir {cwd}"))
}

/// Makes read-only what must be, now that nothing is to be added.
pub(super) fn seal(built: Built, root_read_only: bool) -> Result<(), ChildError> {
    let read_only = AttributePlan {
        set: attribute::RDONLY,
        clear: 0,
    };
    for mount in &built.read_only {
        set_attributes(mount.as_fd(), read_only, false).step(|| "remount read-only".to_owned())?;
    }
    if root_read_only {
        set_attributes(built.root.as_fd(), read_only, false)
            .step(|| "error setting rootfs as readonly".to_owned())?;
    }
    Ok(())
}

/// Makes an empty file for a mount to cover, if there is nothing.
pub(super) fn touch(path: &str) -> Result<(), MountError> {
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
    let mode = Mode::from_raw_mode(0o666);
    openat(CWD, path, flags, mode)
        .map(drop)
        .map_err(|e| MountError::Path {
            step: "make",
            path: path.to_owned(),
            source: e.into(),
        })
}
