//! The shared directory: what of the host's files the guest can reach, and nothing else.
//!
//! ```text
//!  <state dir>/share          tmpfs, the root of the guest's virtio-fs
//!    <container>/rootfs       the root file system, bind-mounted with all that is mounted below it
//!    <container>/mounts/<n>   the source of the specification's mount n, a file or a directory
//! ```
//!
//! Contract: the mounts exist only in a mount namespace of their own, in which the owner and its VMM live
//! ([`enter_private_namespace`]). When both are gone the kernel removes them: nothing is ever left on the host, whatever
//! is killed at whatever moment. What the host mounts later below a shared path appears in the guest only where the
//! specification asks for it (`rslave`, `rshared`); what a container mounts never appears on the host, so `rshared` is
//! one-way.
//! Read-only is enforced here, where the guest's kernel has no say.
//! Not here: which paths (`guest_spec.rs`), the server (the VMM).

#![allow(
    unsafe_code,
    reason = "unshare(2) is unsafe in rustix because it can unshare descriptors; mount_setattr(2) is not in rustix"
)]

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, StatVfsMountFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, OpenTreeFlags, UnmountFlags,
    },
    thread::{LinkNameSpaceType, UnshareFlags},
};

use crate::{
    guest_spec::{Bind, HostFiles},
    spawn,
};

/// What a container's root file system is called in its directory of the share.
pub const ROOTFS: &str = "rootfs";

/// Why something cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A step on a path failed.
    #[error("{step} {path}", path = path.display())]
    Path {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The namespace could not be made.
    #[error("make a mount namespace for the sandbox")]
    Namespace(#[source] io::Error),
    /// The mapping is none that the kernel takes.
    #[error("make the user namespace of an id-mapped mount")]
    UserNamespace(#[source] io::Error),
    /// The file system cannot do it.
    #[error("failed to set MOUNT_ATTR_IDMAP on {path}{}", hint(source), path = path.display())]
    Owners {
        /// The source of the mount.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The other kind of namespace.
    #[error("make a PID namespace")]
    Pids(#[source] io::Error),
}

/// What the kernel means by it, in runc's words.
fn hint(error: &io::Error) -> &'static str {
    if error.raw_os_error() == Some(libc::EINVAL) {
        " (maybe the filesystem used doesn't support idmap mounts on this kernel?)"
    } else {
        ""
    }
}

/// Moves this process into a mount namespace of its own, which still receives what the host mounts later.
pub fn enter_private_namespace() -> Result<(), ShareError> {
    // SAFETY: NEWNS does not unshare the table of descriptors, which is the danger of this call; it makes the calling
    // thread's root and working directory its own, and this process has one thread at this point.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(|errno| ShareError::Namespace(errno.into()))?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(|errno| ShareError::Namespace(errno.into()))
}

/// Makes the next child of this process the first process of a PID namespace of its own.
pub fn begin_pid_namespace() -> Result<(), ShareError> {
    // SAFETY: NEWPID concerns children only; it unshares no descriptors, which is the danger of this call.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }
        .map_err(|errno| ShareError::Pids(errno.into()))
}

/// Moves this process, which has one thread, into another sandbox's mount namespace.
pub fn enter_namespace(namespace: BorrowedFd<'_>) -> Result<(), ShareError> {
    rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))
        .map_err(|errno| ShareError::Namespace(errno.into()))
}

/// Takes a container's files out of the shared directory at `share` in the namespace `namespace`, where the calling
/// thread need not be.
pub fn remove_elsewhere(
    namespace: BorrowedFd<'_>,
    share: &Path,
    id: &str,
) -> Result<(), ShareError> {
    let visit = || {
        // SAFETY: FS does not unshare the table of descriptors, which is the danger of this call; only a thread with a
        // root and working directory of its own may change its mount namespace.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
            .map_err(|errno| ShareError::Namespace(errno.into()))?;
        enter_namespace(namespace)?;
        Share::existing(share.to_owned()).remove(id)
    };
    let done = std::thread::scope(|scope| scope.spawn(visit).join());
    // A panic ends the process.
    done.unwrap_or(Ok(()))
}

/// The size of the shared directory's own file system: it holds mount points only.
const MOUNT_POINTS: &str = "1m";

/// The shared directory of one sandbox.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
    /// It ends with this value; otherwise it is another process's.
    owned: bool,
}

/// A container's files, copied as mounts that are nowhere yet: they can be shared in another mount namespace than the one
/// in which their paths mean something.
#[derive(Debug)]
pub struct Trees {
    rootfs: OwnedFd,
    /// In the order of [`HostFiles::binds`], with whether it is a directory.
    binds: Vec<(OwnedFd, bool)>,
}

impl Trees {
    /// Opens them, in the namespace of their paths.
    pub fn open(files: &HostFiles) -> Result<Self, ShareError> {
        let bind = |bind: &Bind| {
            let source = &bind.source;
            let is_dir = at("find the mount source", source, fs::metadata(source))?.is_dir();
            Ok((tree(bind)?, is_dir))
        };
        Ok(Self {
            rootfs: clone(&files.rootfs, true)?,
            binds: files.binds.iter().map(bind).collect::<Result<_, _>>()?,
        })
    }
}

impl Share {
    /// Makes the shared directory at `path`, in the namespace that [`enter_private_namespace`] made.
    pub fn make(path: &Path) -> Result<Self, ShareError> {
        at("make the directory", path, fs::create_dir_all(path))?;
        at(
            "mount the shared directory at",
            path,
            mount_tmpfs(path, MOUNT_POINTS),
        )?;
        Ok(Self {
            path: path.to_owned(),
            owned: true,
        })
    }

    /// The shared directory that another process made at `path`, in the namespace that this thread has joined.
    pub fn existing(path: PathBuf) -> Self {
        Self { path, owned: false }
    }

    /// As [`Share::add`], with files from another mount namespace.
    pub fn add_trees(&self, id: &str, files: &HostFiles, trees: &Trees) -> Result<(), ShareError> {
        let container = self.path.join(id);
        let (rootfs, mounts) = (container.join(ROOTFS), container.join("mounts"));
        for dir in [&rootfs, &mounts] {
            at("make the directory", dir, fs::create_dir_all(dir))?;
        }
        attach(&trees.rootfs, &rootfs)?;
        detach_from_host(&rootfs)?;
        for (bind, (tree, is_dir)) in files.binds.iter().zip(&trees.binds) {
            let target = mounts.join(bind.index.to_string());
            make_mount_point(&target, *is_dir)?;
            attach(tree, &target)?;
            if bind.follows_host {
                follow_host(&target)?;
            } else {
                detach_from_host(&target)?;
            }
            if bind.read_only {
                make_read_only(&target)?;
            }
        }
        Ok(())
    }

    /// The directory itself, for the VMM.
    pub fn root(&self) -> Result<OwnedFd, ShareError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        at(
            "open",
            &self.path,
            rustix::fs::open(&self.path, flags, Mode::empty()).map_err(Into::into),
        )
    }

    /// Where the shared directory is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a container's root file system is.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        self.path.join(id).join(ROOTFS)
    }

    /// Where the source of a container's bind mount is.
    pub fn mount(&self, id: &str, index: usize) -> PathBuf {
        self.path.join(id).join("mounts").join(index.to_string())
    }

    /// Shares a container's files. Its root file system stays writable until [`Share::seal`], because the guest still
    /// has to make mount points in it, as runc does before it remounts.
    pub fn add(&self, id: &str, files: &HostFiles) -> Result<(), ShareError> {
        let container = self.path.join(id);
        let rootfs = container.join(ROOTFS);
        at("make the directory", &rootfs, fs::create_dir_all(&rootfs))?;
        bind(&files.rootfs, &rootfs, true)?;
        detach_from_host(&rootfs)?;
        let mounts = container.join("mounts");
        if !files.binds.is_empty() {
            at("make the directory", &mounts, fs::create_dir(&mounts))?;
        }
        files
            .binds
            .iter()
            .try_for_each(|bind| add_bind(&mounts, bind))
    }

    /// Ends a container's set-up: a read-only root file system becomes so.
    pub fn seal(&self, id: &str, files: &HostFiles) -> Result<(), ShareError> {
        if files.rootfs_read_only {
            make_read_only(&self.rootfs(id))?;
        }
        Ok(())
    }

    /// Stops sharing a container's files, while the sandbox lives on. What cannot be unmounted is an error, and nothing
    /// is ever removed recursively: below a mount point that is still mounted lie the user's own files.
    pub fn remove(&self, id: &str) -> Result<(), ShareError> {
        let container = self.path.join(id);
        let mounts = container.join("mounts");
        for entry in entries(&mounts)? {
            remove_mount_point(&entry)?;
        }
        remove_empty(&mounts)?;
        remove_mount_point(&container.join(ROOTFS))?;
        remove_empty(&container)
    }
}

/// The paths in a directory; none if it does not exist.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, ShareError> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listing => {
            let all = at("list", dir, listing)?;
            at("list", dir, all.map(|entry| Ok(entry?.path())).collect())
        }
    }
}

/// Unmounts everything that is stacked on a mount point, then removes the point itself: an empty directory or file of
/// the shared directory's own file system.
fn remove_mount_point(point: &Path) -> Result<(), ShareError> {
    loop {
        match rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not mounted (any more), or not there.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
            Err(errno) => return at("unmount", point, Err(errno.into())),
        }
    }
    match fs::symlink_metadata(point) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(meta) if meta.is_dir() => remove_empty(point),
        // A mount point for a file is a file of no bytes; one with contents is not ours.
        Ok(meta) if meta.len() == 0 => at("remove", point, fs::remove_file(point)),
        Ok(_) => at(
            "remove",
            point,
            Err(io::ErrorKind::DirectoryNotEmpty.into()),
        ),
        Err(error) => at("remove", point, Err(error)),
    }
}

fn remove_empty(dir: &Path) -> Result<(), ShareError> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => at("remove", dir, done),
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        // Takes everything below along. The namespace would do the same when its last process ends.
        let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
    }
}

fn add_bind(mounts: &Path, bind_mount: &Bind) -> Result<(), ShareError> {
    let source = &bind_mount.source;
    let target = mounts.join(bind_mount.index.to_string());
    let is_dir = at("find the mount source", source, fs::metadata(source))?.is_dir();
    make_mount_point(&target, is_dir)?;
    if bind_mount.identities.is_some() {
        attach(&tree(bind_mount)?, &target)?;
    } else {
        bind(source, &target, bind_mount.recursive)?;
    }
    if bind_mount.follows_host {
        follow_host(&target)?;
    } else {
        detach_from_host(&target)?;
    }
    if bind_mount.read_only {
        make_read_only(&target)?;
    }
    Ok(())
}

fn bind(source: &Path, target: &Path, recursive: bool) -> Result<(), ShareError> {
    let done = if recursive {
        rustix::mount::mount_bind_recursive(source, target)
    } else {
        rustix::mount::mount_bind(source, target)
    };
    at("share the mount source", source, done.map_err(Into::into))
}

fn make_mount_point(target: &Path, is_dir: bool) -> Result<(), ShareError> {
    let made = if is_dir {
        fs::create_dir(target)
    } else {
        fs::write(target, b"")
    };
    at("make the mount point", target, made)
}

/// A bind mount that is nowhere yet, with the owners that it is to show.
fn tree(bind: &Bind) -> Result<OwnedFd, ShareError> {
    let tree = clone(&bind.source, bind.recursive)?;
    if let Some(mapping) = &bind.identities {
        let namespace = spawn::user_namespace(&mapping.users, &mapping.groups)
            .map_err(ShareError::UserNamespace)?;
        map_owners(&tree, &namespace, mapping.recursive).map_err(|source| ShareError::Owners {
            path: bind.source.clone(),
            source,
        })?;
    }
    Ok(tree)
}

/// mount_setattr(2), which is for mounts that nobody has seen yet.
fn map_owners(tree: &OwnedFd, namespace: &OwnedFd, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).unwrap_or(u64::MAX),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a literal C string and `attributes` is a mount_attr of the size given; both outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn clone(path: &Path, recursive: bool) -> Result<OwnedFd, ShareError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let tree = rustix::mount::open_tree(rustix::fs::CWD, path, flags);
    at("share the mount source", path, tree.map_err(Into::into))
}

fn attach(tree: &OwnedFd, target: &Path) -> Result<(), ShareError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let moved = rustix::mount::move_mount(tree, "", rustix::fs::CWD, target, flags);
    at("mount at", target, moved.map_err(Into::into))
}

/// A tree that was copied from the host's own namespace is the host's equal there; here it only receives.
fn follow_host(target: &Path) -> Result<(), ShareError> {
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    at(
        "change the propagation of",
        target,
        rustix::mount::mount_change(target, flags).map_err(Into::into),
    )
}

fn detach_from_host(target: &Path) -> Result<(), ShareError> {
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    at(
        "change the propagation of",
        target,
        rustix::mount::mount_change(target, flags).map_err(Into::into),
    )
}

fn make_read_only(target: &Path) -> Result<(), ShareError> {
    // What the mount has been forbidden so far stays forbidden: in a user namespace nobody may take it back.
    let remounted = rustix::fs::statvfs(target).and_then(|now| {
        let kept = [
            (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
            (StatVfsMountFlags::NODEV, MountFlags::NODEV),
            (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        ];
        let kept = kept
            .into_iter()
            .filter(|(seen, _)| now.f_flag.contains(*seen));
        let flags = kept.fold(MountFlags::BIND | MountFlags::RDONLY, |all, (_, flag)| {
            all | flag
        });
        rustix::mount::mount_remount(target, flags, c"")
    });
    at("make read-only", target, remounted.map_err(Into::into))
}

/// Mounts an empty tmpfs of at most `size`, in tmpfs's notation.
pub fn mount_tmpfs(path: &Path, size: &str) -> io::Result<()> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    rustix::mount::fsconfig_set_string(&context, "size", size)?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    rustix::mount::move_mount(
        &mount,
        "",
        rustix::fs::CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    Ok(())
}

fn at<T>(step: &'static str, path: &Path, result: io::Result<T>) -> Result<T, ShareError> {
    result.map_err(|source| ShareError::Path {
        step,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_mount_source_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let bind = Bind {
            index: 0,
            source: "/nonexistent/volume".into(),
            recursive: true,
            read_only: false,
            follows_host: false,
            identities: None,
        };
        let error = add_bind(dir.path(), &bind).unwrap_err();
        assert_eq!(
            error.to_string(),
            "find the mount source /nonexistent/volume"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn removing_what_was_never_shared_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let share = std::mem::ManuallyDrop::new(Share {
            owned: true,
            path: dir.path().to_owned(),
        });
        share.remove("c1").unwrap();
    }

    #[test]
    fn nothing_below_a_mount_point_is_ever_removed() {
        let dir = tempfile::tempdir().unwrap();
        let share = std::mem::ManuallyDrop::new(Share {
            owned: true,
            path: dir.path().to_owned(),
        });
        // As after an unmount that did not happen: the user's files are still there.
        let rootfs = dir.path().join("c1/rootfs");
        fs::create_dir_all(rootfs.join("etc")).unwrap();
        fs::write(rootfs.join("etc/passwd"), "root").unwrap();
        fs::create_dir_all(dir.path().join("c1/mounts")).unwrap();
        assert!(share.remove("c1").is_err());
        assert_eq!(
            fs::read_to_string(rootfs.join("etc/passwd")).unwrap(),
            "root"
        );
        // And the mount points themselves, empty as they are made, go.
        fs::remove_dir_all(rootfs.join("etc")).unwrap();
        fs::create_dir_all(dir.path().join("c1/mounts/3")).unwrap();
        fs::write(dir.path().join("c1/mounts/4"), "").unwrap();
        share.remove("c1").unwrap();
        assert!(!dir.path().join("c1").exists());
    }
}
