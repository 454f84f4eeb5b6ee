//! Files that the guest removes while it may still use them.
//!
//! Contract: a file handle does not keep a file alive, as a descriptor would. So before the last name of a file or
//! directory goes (unlink, rmdir, rename over it), a descriptor is opened on it, and closed when the guest has
//! forgotten the node. The guest can then open what it looked up a moment ago, ask for attributes through an O_PATH
//! descriptor and stay in a removed directory, as on any local file system. What others remove is answered with
//! ESTALE; the guest's kernel looks the path up once more then.
//! Bounded: by the guest's memory of removed files, and by the descriptors it may have.
//! Only regular files and directories: virtiofsd opens no others.
//!
//! Whether a name is the last one, the guest's kernel has usually just asked: it looks each name up before it removes
//! it. The last answer is remembered ([`Pins::see`]) until the guest makes, links or moves anything, and saves asking
//! the host again. If the host changed the name in between, the wrong file is held, as it would be if the host did so
//! a moment later.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtiofsd::filesystem::{Context, Entry, FileSystem};
use virtiofsd::passthrough::PassthroughFs;

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

/// Keeps the node alive and costs nothing else.
const FLAGS: u32 = libc::O_PATH.cast_unsigned();

/// The descriptors, by node, and the last answer about a name. No method holds both locks.
#[derive(Debug, Default)]
pub(super) struct Pins {
    held: Mutex<BTreeMap<Inode, Handle>>,
    seen: Mutex<Option<Seen>>,
}

/// What a name led to when the guest asked.
#[derive(Debug)]
struct Seen {
    parent: Inode,
    name: CString,
    inode: Inode,
    last: bool,
}

/// A node that is about to lose a name.
pub(super) struct Victim {
    inode: Inode,
    pinned: bool,
    /// A lookup for this removal counts as one of the guest's.
    counted: bool,
}

impl Pins {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Inode, Handle>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, Option<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is told what `name` leads to.
    pub(super) fn see(&self, parent: Inode, name: &CStr, found: &Entry) {
        *self.seen() = Some(Seen {
            parent,
            name: name.to_owned(),
            inode: found.inode,
            last: is_last(found),
        });
    }

    /// The guest changes names: what it was told may be true no longer.
    pub(super) fn unsee(&self) {
        *self.seen() = None;
    }

    /// Holds on to what `name` leads to, if that may be its last name. To be followed by [`Pins::settle`].
    pub(super) fn hold(
        &self,
        fs: &PassthroughFs,
        ctx: Context,
        parent: Inode,
        name: &CStr,
    ) -> Option<Victim> {
        let known = self
            .seen()
            .take_if(|seen| seen.parent == parent && *seen.name == *name);
        let (inode, last, counted) = match known {
            Some(seen) => (seen.inode, seen.last, false),
            None => {
                let found = fs.lookup(ctx, parent, name).ok()?;
                (found.inode, is_last(&found), true)
            }
        };
        self.unsee();
        let pinned = last && !self.lock().contains_key(&inode) && self.pin(fs, ctx, inode);
        Some(Victim {
            inode,
            pinned,
            counted,
        })
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
        let Some(victim) = victim else {
            return;
        };
        if victim.pinned && !removed {
            self.release(fs, ctx, victim.inode);
        }
        if victim.counted {
            fs.forget(ctx, victim.inode, 1);
            self.forgotten(fs, ctx, victim.inode);
        }
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
        self.unsee();
    }
}

/// Whether the entry's name may be the last of its node.
fn is_last(entry: &Entry) -> bool {
    entry.attr.mode & libc::S_IFMT == libc::S_IFDIR || entry.attr.nlink == 1
}
