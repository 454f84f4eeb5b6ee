//! Mounts in a container: targets are found and made below its root, never outside, whatever its links say.
//!
//! Contract: every target is resolved by the kernel with `RESOLVE_IN_ROOT` and then used by descriptor, so a link in the
//! image (or one swapped in by another container of a shared volume) cannot lead a mount elsewhere (runc: CVE-2021-30465).
//! Not here: the order of mounts (`rootfs.rs`), what the options mean (`plan/mounts.rs`).

use crate::plan::mounts::{AttributePlan, MountPlan, may_cover_proc};
use crate::sys::{MountAttributes, set_mount_attributes};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstatfs, mkdirat, openat,
    openat2, readlinkat, statx,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_bind,
    move_mount, open_tree,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// A mount that could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    #[error("error mounting {mount_source:?} to rootfs at {destination:?}: {step}")]
    Mount {
        mount_source: PathBuf,
        destination: PathBuf,
        step: &'static str,
        source: io::Error,
    },
    #[error("filesystem {kind:?} must be mounted on ordinary directory")]
    NotOrdinary { kind: String },
    #[error("{destination:?} cannot be mounted because it is {reason}")]
    Proc {
        destination: PathBuf,
        reason: &'static str,
    },
    #[error("make {path} in the root file system")]
    Target { path: PathBuf, source: io::Error },
    #[error("{step} {path}")]
    Path {
        step: &'static str,
        path: String,
        source: io::Error,
    },
}

/// Symbolic links followed while a target is made: the kernel's own limit.
const MAX_LINKS: usize = 40;

const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// Whether the entry changes a mount that is there already.
pub(super) fn is_remount(plan: &MountPlan) -> bool {
    const MS_REMOUNT: u32 = 32;
    plan.flags & MS_REMOUNT != 0
}

/// The container's root while it is built.
pub(super) struct Root<'a>(pub(super) BorrowedFd<'a>);

impl Root<'_> {
    /// Opens what is at `path`, links resolved as the container would see them.
    pub(super) fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(
            self.0,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
    }

    fn place(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.open(path, OFlags::PATH)
    }

    /// The directory at `path`, made with all its parents (mode 755) if it is not there.
    pub(super) fn directory(&self, path: &Path) -> Result<OwnedFd, MountError> {
        self.make(path, FileType::Directory)
    }

    /// The file at `path`, made empty if it is not there.
    pub(super) fn file(&self, path: &Path) -> Result<OwnedFd, MountError> {
        self.make(path, FileType::RegularFile)
    }

    fn make(&self, path: &Path, kind: FileType) -> Result<OwnedFd, MountError> {
        let failed = |e: Errno| MountError::Target {
            path: path.to_owned(),
            source: e.into(),
        };
        match self.place(path) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(failed),
        }
        let mut rest: Vec<_> = parts(path);
        rest.reverse();
        let mut done = PathBuf::from("/");
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name.as_os_str() == ".." {
                done.pop();
                continue;
            }
            let next = done.join(&name);
            match self.place(&next) {
                Ok(_) => done = next,
                Err(Errno::NOENT) => {
                    let parent = self
                        .open(&done, OFlags::PATH | OFlags::DIRECTORY)
                        .map_err(failed)?;
                    let last = rest.is_empty();
                    match make_entry(parent.as_fd(), &name, last && kind == FileType::RegularFile) {
                        Ok(()) => done = next,
                        // A link to something that does not exist: go on where it points.
                        Err(Errno::EXIST) if links < MAX_LINKS => {
                            links += 1;
                            let target = readlinkat(&parent, &name, Vec::new()).map_err(failed)?;
                            let target =
                                PathBuf::from(std::ffi::OsStr::from_bytes(target.as_bytes()));
                            if target.is_absolute() {
                                done = PathBuf::from("/");
                            }
                            rest.extend(parts(&target).into_iter().rev());
                        }
                        Err(e) => return Err(failed(e)),
                    }
                }
                Err(e) => return Err(failed(e)),
            }
        }
        self.place(&done).map_err(failed)
    }
}

fn parts(path: &Path) -> Vec<PathBuf> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(PathBuf::from(name)),
            Component::ParentDir => Some(PathBuf::from("..")),
            _ => None,
        })
        .collect()
}

fn make_entry(parent: BorrowedFd<'_>, name: &Path, file: bool) -> Result<(), Errno> {
    if file {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        openat(parent, name, flags, Mode::from_raw_mode(0o755)).map(drop)
    } else {
        mkdirat(parent, name, Mode::from_raw_mode(0o755))
    }
}

/// Puts a detached mount at a place.
pub(super) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Changes attributes of a mount, or of it and all below.
pub(super) fn set_attributes(
    tree: BorrowedFd<'_>,
    plan: AttributePlan,
    recursive: bool,
) -> io::Result<()> {
    if plan.is_empty() {
        return Ok(());
    }
    let attributes = MountAttributes {
        set: plan.set,
        clear: plan.clear,
        ..Default::default()
    };
    set_mount_attributes(tree, recursive, attributes)
}

/// The mount type bits of `MS_*` propagation words; the kernel's mount_setattr takes the same.
pub(super) fn set_propagation(tree: BorrowedFd<'_>, word: u32) -> io::Result<()> {
    let recursive = word & MountFlags::REC.bits() != 0;
    let propagation = u64::from(word & !MountFlags::REC.bits());
    set_mount_attributes(
        tree,
        recursive,
        MountAttributes {
            propagation,
            ..Default::default()
        },
    )
}

/// Makes one mount of the plan. Returns the mount if it is to become read-only only when all is in place.
pub(super) fn make(
    root: &Root<'_>,
    plan: &MountPlan,
    bind: Option<OwnedFd>,
) -> Result<Option<OwnedFd>, MountError> {
    let failed = |step| {
        move |source: io::Error| MountError::Mount {
            mount_source: plan.source.clone(),
            destination: plan.destination.clone(),
            step,
            source,
        }
    };
    let mounted = match (plan.kind.as_str(), bind) {
        ("bind", Some(tree)) => {
            bind_to(root, plan, tree.as_fd(), &failed)?;
            tree
        }
        ("bind", None) => return remount(root, plan).map(|()| None),
        ("tmpfs", _) if plan.copy_up => tmpfs_with_copy(root, plan, &failed)?,
        _ => fresh(root, plan, &failed)?,
    };
    for word in &plan.propagation {
        set_propagation(mounted.as_fd(), *word).map_err(failed("set propagation"))?;
    }
    set_attributes(mounted.as_fd(), plan.recursive, true)
        .map_err(failed("set recursive attributes"))?;
    Ok(is_read_only_late(plan).then_some(mounted))
}

/// Where files are still to be made, read-only comes last (runc: finalizeRootfs).
fn is_read_only_late(plan: &MountPlan) -> bool {
    plan.flags & MountFlags::RDONLY.bits() != 0
        && (plan.kind == "tmpfs" || (plan.destination.as_os_str() == "/dev" && !plan.is_bind()))
}

type Failed<'a, F> = &'a dyn Fn(&'static str) -> F;

fn bind_to<F: FnOnce(io::Error) -> MountError>(
    root: &Root<'_>,
    plan: &MountPlan,
    tree: BorrowedFd<'_>,
    failed: Failed<'_, F>,
) -> Result<(), MountError> {
    let stat = statx(tree, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)
        .map_err(|e| failed("stat the source")(e.into()))?;
    let is_directory = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
    let target = if is_directory {
        root.directory(&plan.destination)?
    } else {
        root.file(&plan.destination)?
    };
    check_proc(plan, target.as_fd(), Some(tree))?;
    set_attributes(tree, plan.attributes, false).map_err(failed("set attributes"))?;
    attach(tree, target.as_fd()).map_err(|e| failed("attach")(e.into()))
}

/// Nothing but known files may be mounted over procfs, and nothing but procfs at /proc (CVE-2019-16884).
fn check_proc(
    plan: &MountPlan,
    target: BorrowedFd<'_>,
    tree: Option<BorrowedFd<'_>>,
) -> Result<(), MountError> {
    let is_proc = |fd: BorrowedFd<'_>| {
        fstatfs(fd).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == PROC_SUPER_MAGIC))
    };
    let refuse = |reason| {
        Err(MountError::Proc {
            destination: plan.destination.clone(),
            reason,
        })
    };
    if plan.destination.as_os_str() == "/proc" {
        return match tree {
            Some(tree) if !is_proc(tree) => refuse("not of type proc"),
            _ => Ok(()),
        };
    }
    if is_proc(target) && !may_cover_proc(&plan.destination) {
        return refuse("inside /proc");
    }
    Ok(())
}

/// A new instance of a file system, by mount(2), so that its data means what it always meant.
fn fresh<F: FnOnce(io::Error) -> MountError>(
    root: &Root<'_>,
    plan: &MountPlan,
    failed: Failed<'_, F>,
) -> Result<OwnedFd, MountError> {
    let ordinary = matches!(plan.kind.as_str(), "proc" | "sysfs");
    if ordinary {
        // Following a link here would hide the real /proc from later steps that rely on it (CVE-2019-19921).
        let found = root.open(&plan.destination, OFlags::PATH | OFlags::NOFOLLOW);
        let is_directory = |fd: OwnedFd| {
            statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)
                .is_ok_and(|s| FileType::from_raw_mode(s.stx_mode.into()) == FileType::Directory)
        };
        if found.is_ok_and(|fd| !is_directory(fd)) {
            return Err(MountError::NotOrdinary {
                kind: plan.kind.clone(),
            });
        }
    }
    let known = root.place(&plan.destination).is_ok();
    let target = root.directory(&plan.destination)?;
    check_proc(plan, target.as_fd(), None)?;
    let mut flags = MountFlags::from_bits_retain(plan.flags);
    if is_read_only_late(plan) {
        flags.remove(MountFlags::RDONLY);
    }
    let (kind, data) = match plan.kind.as_str() {
        "cgroup" | "cgroup2" => ("cgroup2", String::new()),
        "tmpfs" if known => ("tmpfs", tmpfs_data(plan, target.as_fd())),
        other => (other, plan.data.clone()),
    };
    let place = format!("/proc/self/fd/{}", target.as_raw_fd());
    let data = std::ffi::CString::new(data).unwrap_or_default();
    match mount(&plan.source, place.as_str(), kind, flags, data.as_c_str()) {
        // In a user namespace without a cgroup namespace: the guest's own, which its modes protect (as in runc).
        Err(Errno::PERM | Errno::BUSY) if kind == "cgroup2" => {
            return bind_hierarchy(plan, target.as_fd(), failed);
        }
        other => other.map_err(|e| failed("mount")(e.into()))?,
    }
    root.place(&plan.destination)
        .map_err(|e| failed("open the mount")(e.into()))
}

fn bind_hierarchy<F: FnOnce(io::Error) -> MountError>(
    plan: &MountPlan,
    target: BorrowedFd<'_>,
    failed: Failed<'_, F>,
) -> Result<OwnedFd, MountError> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, crate::cgroup::HIERARCHY, clone)
        .map_err(|e| failed("open the hierarchy")(e.into()))?;
    set_attributes(tree.as_fd(), plan.attributes, false).map_err(failed("set attributes"))?;
    attach(tree.as_fd(), target).map_err(|e| failed("attach")(e.into()))?;
    Ok(tree)
}

/// A tmpfs over an existing directory keeps its mode, unless the options name one.
fn tmpfs_data(plan: &MountPlan, covered: BorrowedFd<'_>) -> String {
    let mode = statx(covered, "", AtFlags::EMPTY_PATH, StatxFlags::MODE)
        .map_or(0o755, |s| s.stx_mode & 0o7777);
    let comma = if plan.data.is_empty() { "" } else { "," };
    format!("mode={mode:04o}{comma}{}", plan.data)
}

fn tmpfs_with_copy<F: FnOnce(io::Error) -> MountError>(
    root: &Root<'_>,
    plan: &MountPlan,
    failed: Failed<'_, F>,
) -> Result<OwnedFd, MountError> {
    let known = root.place(&plan.destination).is_ok();
    let target = root.directory(&plan.destination)?;
    check_proc(plan, target.as_fd(), None)?;
    let data = if known {
        tmpfs_data(plan, target.as_fd())
    } else {
        plan.data.clone()
    };
    let make = || -> io::Result<OwnedFd> {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(fs.as_fd(), "source", &plan.source)?;
        for option in data.split(',').filter(|o| !o.is_empty()) {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(fs.as_fd(), key, value)?,
                None => fsconfig_set_flag(fs.as_fd(), option)?,
            }
        }
        fsconfig_create(fs.as_fd())?;
        Ok(fsmount(
            fs.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?)
    };
    let tmpfs = make().map_err(failed("create"))?;
    let covered = root
        .open(&plan.destination, OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(|e| failed("open")(e.into()))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = openat(&tmpfs, ".", flags, Mode::empty()).map_err(|e| failed("open")(e.into()))?;
    super::copy_up::copy(covered.as_fd(), inside.as_fd()).map_err(failed("copy up"))?;
    let mut attributes = plan.attributes;
    attributes.set &= !crate::plan::mounts::attribute::RDONLY;
    set_attributes(tmpfs.as_fd(), attributes, false).map_err(failed("set attributes"))?;
    attach(tmpfs.as_fd(), target.as_fd()).map_err(|e| failed("attach")(e.into()))?;
    Ok(tmpfs)
}

fn remount(root: &Root<'_>, plan: &MountPlan) -> Result<(), MountError> {
    let failed = |source| MountError::Mount {
        mount_source: plan.source.clone(),
        destination: plan.destination.clone(),
        step: "remount",
        source,
    };
    let place = root
        .place(&plan.destination)
        .map_err(|e| failed(e.into()))?;
    set_attributes(place.as_fd(), plan.attributes, false).map_err(failed)
}

/// Makes what is at a path of the container, with all below it, read-only. What does not exist needs no protection.
pub(super) fn make_read_only(path: &str) -> Result<(), MountError> {
    let failed = |step| {
        move |source: io::Error| MountError::Path {
            step,
            path: path.to_owned(),
            source,
        }
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = match open_tree(CWD, path, flags) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(|e| failed("open")(e.into()))?,
    };
    let read_only = AttributePlan {
        set: crate::plan::mounts::attribute::RDONLY,
        clear: 0,
    };
    set_attributes(tree.as_fd(), read_only, true).map_err(failed("make read-only"))?;
    move_mount(
        tree.as_fd(),
        "",
        CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
    )
    .map_err(|e| failed("make read-only")(e.into()))
}

/// Covers a path of the container: a file by /dev/null, a directory by an empty read-only tmpfs.
pub(super) fn mask(path: &str) -> Result<(), MountError> {
    let failed = |e: Errno| MountError::Path {
        step: "mask",
        path: path.to_owned(),
        source: e.into(),
    };
    match mount_bind("/dev/null", path) {
        Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTDIR) => {
            mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, None).map_err(failed)
        }
        other => other.map_err(failed),
    }
}
