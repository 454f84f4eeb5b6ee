//! The container's files as the host sees them: what a program finds that joins the mount namespace of the process in
//! the pid file. podman's `cp` does that, and takes what it finds for the container's own root.
//!
//! ```text
//!  sandbox's mount namespace    the host's tree and the share; the VMM's, and where this process's own paths lead
//!  view's mount namespace       /            the container's root file system
//!                               /data        its bind mounts, where they are in the container
//!                               /proc, /tmp  an empty read-only directory for every mount that only the guest has
//! ```
//!
//! Contract: who joins the namespace of the thread that called [`View::enter`] (the monitor's first, which is what
//! `/proc/<pid>/ns/mnt` means) sees these files and no others; what cannot be reached from the host fails there and is
//! never taken for the root file system below it. That thread's root and working directory stay the host's, so every
//! path of its own means what it did before. Dropping the view goes back and takes the namespace away.
//! The guest may change its files meanwhile: a destination is resolved below the root, and one that is gone is left out.
//! Not here: the share itself (`share.rs`).

#![allow(
    unsafe_code,
    reason = "unshare(2) is unsafe in rustix because it can unshare descriptors"
)]

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    },
    thread::{LinkNameSpaceType, UnshareFlags},
};

use oci_spec::runtime::Spec;

use crate::{guest_spec::HostFiles, share::Share};

/// Why there is no view.
#[derive(Debug, thiserror::Error)]
#[error("show the container's files to the host: {step}")]
pub struct ViewError {
    step: &'static str,
    source: io::Error,
}

/// A mount of the container, in the specification's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Where it is in the container.
    pub destination: PathBuf,
    /// Its number below the share's `mounts`, if it is a bind mount; otherwise it exists in the guest alone.
    pub shared: Option<usize>,
}

impl Place {
    fn is_of_processes(&self) -> bool {
        self.shared.is_none() && self.destination == Path::new("/proc")
    }
}

/// The mounts of a specification whose host's part is `files`.
pub fn places(spec: &Spec, files: &HostFiles) -> Vec<Place> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let place = |(index, mount): (usize, &oci_spec::runtime::Mount)| Place {
        destination: mount.destination().clone(),
        shared: files
            .binds
            .iter()
            .any(|bind| bind.index == index)
            .then_some(index),
    };
    mounts.iter().enumerate().map(place).collect()
}

/// The calling thread in the view's namespace.
#[derive(Debug)]
pub struct View {
    /// The sandbox's namespace. Held open: the paths of this process lead through its mounts.
    sandbox: OwnedFd,
}

impl View {
    /// Makes the namespace for a container and puts the calling thread into it. `processes` is a mount for the place of
    /// its /proc.
    pub fn enter(
        share: &Share,
        id: &str,
        places: &[Place],
        processes: Option<OwnedFd>,
    ) -> Result<Self, ViewError> {
        let host = rustix::fs::open("/", DIRECTORY, Mode::empty()).step("open the root")?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let sandbox = rustix::fs::open("/proc/thread-self/ns/mnt", flags, Mode::empty())
            .step("open the sandbox's mount namespace")?;
        let root = clone(&share.rootfs(id)).step("open the root file system")?;
        let cover = cover().step("make an empty directory")?;
        let binds = places
            .iter()
            .map(|place| place.shared.map(|index| clone(&share.mount(id, index))))
            .map(Option::transpose);
        let binds: Vec<_> = binds.collect::<Result<_, _>>().step("open a bind mount")?;
        // SAFETY: NEWNS does not unshare the table of descriptors, which is the danger of this call; it makes the calling
        // thread's root and working directory its own, and leaves other threads where they are.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
            .step("make a mount namespace")?;
        // From here on dropping the view undoes everything.
        let view = Self { sandbox };
        // Only what is mounted somewhere can be copied; the share's place is as good as any until the host's tree goes.
        move_to(cover.as_fd(), CWD, share.path()).step("mount the empty directory")?;
        move_to(root.as_fd(), CWD, Path::new("/")).step("mount the root file system")?;
        for (place, bind) in places.iter().zip(binds) {
            let own = processes.as_ref().filter(|_| place.is_of_processes());
            let tree = match (bind, own) {
                (Some(bind), _) => Ok(bind),
                // It is mounted nowhere else.
                (None, Some(own)) => own.try_clone(),
                (None, None) => clone_of(cover.as_fd()).map_err(io::Error::from),
            };
            let tree = tree.step("copy the empty directory")?;
            attach(root.as_fd(), &place.destination, tree.as_fd())
                .step("mount at a destination")?;
        }
        rustix::process::fchdir(&root).step("enter the root file system")?;
        rustix::process::pivot_root(".", ".").step("change the namespace's root")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).step("leave the host's tree")?;
        rustix::process::fchdir(&host).step("return to the host's tree")?;
        rustix::process::chroot(".").step("return to the host's root")?;
        Ok(view)
    }
}

impl View {
    /// The sandbox's mount namespace, where the shared directory is.
    pub fn sandbox_namespace(&self) -> io::Result<Arc<OwnedFd>> {
        self.sandbox.try_clone().map(Arc::new)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // If this fails, the process's end has the same effect.
        let kind = Some(LinkNameSpaceType::Mount);
        let _ = rustix::thread::move_into_link_name_space(self.sandbox.as_fd(), kind);
    }
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Puts a tree where the container has it. What the guest has removed, or has inside a mount of its own, is left out.
fn attach(
    root: BorrowedFd<'_>,
    destination: &Path,
    tree: BorrowedFd<'_>,
) -> rustix::io::Result<()> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let target = match rustix::fs::openat2(root, destination, flags, Mode::empty(), resolve) {
        Ok(target) => target,
        Err(_) => return Ok(()),
    };
    match move_to(tree, target.as_fd(), Path::new("")) {
        // A file where a directory was, or the other way round.
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => {
            Ok(())
        }
        done => done,
    }
}

fn move_to(tree: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let is_empty = path.as_os_str().is_empty();
    flags.set(MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH, is_empty);
    rustix::mount::move_mount(tree, "", to, path, flags)
}

/// A copy of a mount and of all that is mounted below it.
fn clone(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    rustix::mount::open_tree(CWD, path, flags)
}

fn clone_of(tree: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(tree, "", flags)
}

/// An empty directory that nobody can write to.
fn cover() -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0555")?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, ViewError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, ViewError> {
        self.map_err(|error| ViewError {
            step,
            source: error.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::guest_spec;

    #[test]
    fn bind_mounts_are_shown_and_the_guests_own_mounts_are_covered() {
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            ],
        }))
        .unwrap();
        let (_, files) = guest_spec::split("c1", Path::new("/b"), spec.clone());
        let shown: Vec<_> = places(&spec, &files)
            .into_iter()
            .map(|place| (place.destination, place.shared))
            .collect();
        assert_eq!(
            shown,
            [
                ("/proc".into(), None),
                ("/data".into(), Some(1)),
                ("/tmp".into(), None)
            ]
        );
    }

    #[test]
    fn the_step_that_failed_is_named_with_its_cause() {
        let error = Err::<(), _>(rustix::io::Errno::PERM).step("make a mount namespace");
        assert_eq!(
            crate::error::message(&error.unwrap_err()),
            "show the container's files to the host: make a mount namespace: Operation not permitted (os error 1)"
        );
    }
}
