//! The guard between virtiofsd's protocol server and its file system: every operation passes here.
//!
//! Contract, on the server's private copy of the request (the guest cannot change it any more):
//! - a name is one path component: not empty, not `.`, not `..`, without `/`. virtiofsd relies on its own pivot_root
//!   for that; inside another process `..` in MKDIR, RENAME or UNLINK would leave the share;
//! - offsets of READ and WRITE fit into a file offset together with their size (virtiofsd unwraps a conversion);
//! - a client that lacks SUBMOUNTS is refused (virtiofsd would print a line for each INIT);
//! - cache times and cache options are those of `coherence.rs`, and of `own.rs`;
//! - the guest kernel has checked permissions already (it mounts with default_permissions), so the server's thread
//!   keeps its capabilities while it creates files under the caller's ids; see `thread.rs`.
//!
//! Threads: any number at once.
//! Here: what every operation needs. Not here: the operations (`operations.rs`), the checks (`checks.rs`).

use std::cell::Cell;
use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use caisson_vmm_spec::OwnTrees;
use virtiofsd::filesystem::{Context, Entry, FileSystem, OpenOptions};
use virtiofsd::fuse::Attr;
use virtiofsd::passthrough::PassthroughFs;

use super::coherence::{ChangeTime, Coherence, change_time, last_tick, now};
use super::own::Own;
use super::pins::Pins;

pub(super) type Inode = <PassthroughFs as FileSystem>::Inode;
pub(super) type Handle = <PassthroughFs as FileSystem>::Handle;

thread_local! {
    /// Whether the request at hand has read a directory: what is looked up then are its entries (READDIRPLUS).
    static LISTING: Cell<bool> = const { Cell::new(false) };
}

/// virtiofsd's file system behind the checks. Clones share it.
#[derive(Clone)]
pub(super) struct Guard(Arc<Guarded>);

struct Guarded {
    fs: PassthroughFs,
    coherence: Coherence,
    own: Own,
    pins: Pins,
}

impl Guard {
    /// Puts the guard in front of `fs`, of which the guest may believe the trees `own`.
    pub(super) fn new(fs: PassthroughFs, own: Option<OwnTrees>) -> Self {
        Self(Arc::new(Guarded {
            fs,
            coherence: Coherence::new(),
            own: Own::new(own),
            pins: Pins::default(),
        }))
    }

    /// The calling thread takes up another request.
    pub(super) fn begin(&self) {
        LISTING.set(false);
    }

    /// The request at hand reads a directory.
    pub(super) fn begin_listing(&self) {
        LISTING.set(true);
    }

    /// The file system behind the guard.
    pub(super) fn fs(&self) -> &PassthroughFs {
        &self.0.fs
    }

    /// Trees that the guest may believe.
    pub(super) fn own(&self) -> &Own {
        &self.0.own
    }

    /// Removed files that are still in use.
    pub(super) fn pins(&self) -> &Pins {
        &self.0.pins
    }

    /// Does what changes `nodes` on behalf of the guest, and remembers that it was the guest.
    pub(super) fn changing<T>(
        &self,
        nodes: &[Inode],
        act: impl FnOnce(&PassthroughFs) -> io::Result<T>,
    ) -> io::Result<T> {
        let since = last_tick();
        let done = act(&self.0.fs);
        let until = now();
        for node in nodes {
            self.0.coherence.changed_by_guest(*node, since, until);
        }
        done
    }

    /// Does what makes an entry in `parent`, or gives a node (`linked`) another name there.
    pub(super) fn making(
        &self,
        parent: Inode,
        linked: Option<Inode>,
        act: impl FnOnce(&PassthroughFs) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let since = last_tick();
        self.0.pins.unsee();
        let made = act(&self.0.fs)?;
        self.made(parent, linked, since, &made);
        Ok(self.entry(made))
    }

    /// Remembers that the guest made `made` in `parent` since then.
    pub(super) fn made(
        &self,
        parent: Inode,
        linked: Option<Inode>,
        since: ChangeTime,
        made: &Entry,
    ) {
        let until = now();
        self.0.own.see(parent, None, made);
        let coherence = &self.0.coherence;
        coherence.changed_by_guest(parent, since, until);
        coherence.changed_by_guest(linked.unwrap_or(made.inode), since, until);
    }

    /// Remembers what the guest learns from an entry, and sets how long it may believe it.
    pub(super) fn entry(&self, mut entry: Entry) -> Entry {
        (entry.attr, entry.attr_timeout) = self.attributes(entry.inode, entry.attr);
        let directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        entry.entry_timeout = if directory || LISTING.get() {
            entry.attr_timeout
        } else {
            self.0.own.believed(entry.inode)
        };
        entry
    }

    /// Remembers what the guest learns of a node, and for how long it may believe it.
    pub(super) fn attributes(&self, inode: Inode, attr: Attr) -> (Attr, Duration) {
        let lifetime = self.0.coherence.told(inode, changed(&attr), now());
        (attr, lifetime.max(self.0.own.believed(inode)))
    }

    /// Does what may remove `name` from `parent`.
    pub(super) fn removing(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        act: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let Guarded { fs, pins, .. } = &*self.0;
        let victim = pins.hold(fs, ctx, parent, name);
        let done = act();
        pins.settle(fs, ctx, victim, done.is_ok());
        done
    }

    /// What the guest may do with the cached pages of a file that it opens.
    pub(super) fn open_options(&self, ctx: Context, inode: Inode, flags: u32) -> OpenOptions {
        let mut options = OpenOptions::empty();
        if let Some(matched) = self.0.coherence.open(inode, now()) {
            match self.0.fs.getattr(ctx, inode, None) {
                Ok((attr, _)) if changed(&attr) == matched => options |= OpenOptions::KEEP_CACHE,
                _ => self.0.coherence.moved(inode),
            }
        }
        // Nothing can be waiting to be written through a descriptor that only reads: no FLUSH at its close.
        if flags & FLAG_ACCESS_MODE == FLAG_READ_ONLY {
            options |= OpenOptions::NOFLUSH;
        }
        options
    }
}

const FLAG_ACCESS_MODE: u32 = libc::O_ACCMODE.cast_unsigned();
const FLAG_READ_ONLY: u32 = libc::O_RDONLY.cast_unsigned();
/// `open` with this empties the file.
pub(super) const FLAG_TRUNCATE: u32 = libc::O_TRUNC.cast_unsigned();
/// The host's page cache backs every file: direct I/O would pass the guest's alignment on to the host's file system.
/// `open` drops the flag inside virtiofsd; `create` does not.
pub(super) const FLAG_DIRECT: u32 = libc::O_DIRECT.cast_unsigned();

fn changed(attr: &Attr) -> u64 {
    change_time(attr.ctime, attr.ctimensec)
}
