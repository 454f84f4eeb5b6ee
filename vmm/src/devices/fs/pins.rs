//! Files that the guest removes while it may still use them.
//!
//! Contract: a file handle does not keep a file alive, as a descriptor would. So before the last name of a file or
//! directory goes (unlink, rmdir, rename over it), a descriptor is opened on it, and closed when the guest has
//! forgotten the node. The guest can then open what it looked up a moment ago, ask for attributes through an O_PATH
//! descriptor and stay in a removed directory, as on any local file system. What others remove is answered with
//! ESTALE; the guest's kernel looks the path up once more then.
//! Bounded: by the guest's memory of removed files, and by the descriptors it may have.
//! Only regular files and directories: virtiofsd opens no others.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtiofsd::filesystem::{Context, Entry, FileSystem};
use virtiofsd::passthrough::PassthroughFs;

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

/// Keeps the node alive and costs nothing else.
const FLAGS: u32 = libc::O_PATH.cast_unsigned();

/// The descriptors, by node.
#[derive(Debug, Default)]
pub(super) struct Pins(Mutex<BTreeMap<Inode, Handle>>);

/// A node that is about to lose a name.
pub(super) struct Victim {
    inode: Inode,
    pinned: bool,
}

impl Pins {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Inode, Handle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds on to what `name` leads to, if that may be its last name. To be followed by [`Pins::settle`].
    pub(super) fn hold(
        &self,
        fs: &PassthroughFs,
        ctx: Context,
        parent: Inode,
        name: &CStr,
    ) -> Option<Victim> {
        let Entry { inode, attr, .. } = fs.lookup(ctx, parent, name).ok()?;
        let directory = attr.mode & libc::S_IFMT == libc::S_IFDIR;
        let last = directory || attr.nlink == 1;
        let pinned = last && !self.lock().contains_key(&inode) && self.pin(fs, ctx, inode);
        Some(Victim { inode, pinned })
    }

    fn pin(&self, fs: &PassthroughFs, ctx: Context, inode: Inode) -> bool {
        match fs.open(ctx, inode, false, FLAGS) {
            Ok((Some(handle), _)) => self.lock().insert(inode, handle).is_none(),
            _ => false,
        }
    }

    /// The name is gone (`removed`) or stayed.
    pub(super) fn settle(
        &self,
        fs: &PassthroughFs,
        ctx: Context,
        victim: Option<Victim>,
        removed: bool,
    ) {
        let Some(Victim { inode, pinned }) = victim else {
            return;
        };
        if pinned && !removed {
            self.release(fs, ctx, inode);
        }
        // The lookup in `hold` counted as one of the guest's.
        fs.forget(ctx, inode, 1);
        self.forgotten(fs, ctx, inode);
    }

    /// The guest forgot something of the node: if it was the last, the descriptor is closed.
    pub(super) fn forgotten(&self, fs: &PassthroughFs, ctx: Context, inode: Inode) {
        if !self.lock().contains_key(&inode) {
            return;
        }
        let known = fs.getattr(ctx, inode, None);
        if known.is_err_and(|error| error.raw_os_error() == Some(libc::EBADF)) {
            self.release(fs, ctx, inode);
        }
    }

    fn release(&self, fs: &PassthroughFs, ctx: Context, inode: Inode) {
        let handle = self.lock().remove(&inode);
        if let Some(handle) = handle {
            // Fails only if the handle is gone: the same end.
            let _ = fs.release(ctx, inode, FLAGS, handle, false, false, None);
        }
    }

    /// Everything is forgotten; virtiofsd has closed the descriptors.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }
}
