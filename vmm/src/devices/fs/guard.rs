//! The guard between virtiofsd's protocol server and its file system: every operation passes here.
//!
//! Contract, on the server's private copy of the request (the guest cannot change it any more):
//! - a name is one path component: not empty, not `.`, not `..`, without `/`. virtiofsd relies on its own pivot_root
//!   for that; inside another process `..` in MKDIR, RENAME or UNLINK would leave the share;
//! - offsets of READ and WRITE fit into a file offset together with their size (virtiofsd unwraps a conversion);
//! - a client that lacks SUBMOUNTS is refused (virtiofsd would print a line for each INIT);
//! - cache times and cache options are those of `coherence.rs`;
//! - the guest kernel has checked permissions already (it mounts with default_permissions), so the server's thread
//!   keeps its capabilities while it creates files under the caller's ids; see `thread.rs`.
//!
//! Delegation is written out for every method of the trait, so that no default of the trait is taken by accident.
//! Threads: any number at once.

use std::cell::Cell;
use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::credentials::{ScopedCaps, drop_effective_cap};
use virtiofsd::soft_idmap::Id;

use super::coherence::{Coherence, change_time, lifetime, now};
use super::pins::Pins;

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

thread_local! {
    /// Whether the request at hand has read a directory: what is looked up then are its entries (READDIRPLUS).
    static LISTING: Cell<bool> = const { Cell::new(false) };
}

/// virtiofsd's file system behind the checks of this file. Clones share it.
#[derive(Clone)]
pub(super) struct Guard(Arc<Guarded>);

struct Guarded {
    fs: PassthroughFs,
    coherence: Coherence,
    pins: Pins,
}

impl Guard {
    /// Puts the guard in front of `fs`.
    pub(super) fn new(fs: PassthroughFs) -> Self {
        Self(Arc::new(Guarded {
            fs,
            coherence: Coherence::new(),
            pins: Pins::default(),
        }))
    }

    /// The calling thread takes up another request.
    pub(super) fn begin(&self) {
        LISTING.set(false);
    }

    /// Remembers what the guest learns from an entry, and sets how long it may believe it.
    fn entry(&self, mut entry: Entry) -> Entry {
        (entry.attr, entry.attr_timeout) = self.attributes(entry.inode, entry.attr);
        let directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        entry.entry_timeout = if directory || LISTING.get() {
            entry.attr_timeout
        } else {
            Duration::ZERO
        };
        entry
    }

    fn attributes(&self, inode: Inode, attr: Attr) -> (Attr, Duration) {
        let changed = changed(&attr);
        self.0.coherence.told(inode, changed);
        (attr, lifetime(changed, now()))
    }

    /// Does what may remove `name`.
    fn removing(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        act: impl FnOnce(&PassthroughFs) -> io::Result<()>,
    ) -> io::Result<()> {
        let Guarded { fs, pins, .. } = &*self.0;
        let victim = pins.hold(fs, ctx, parent, name);
        let done = act(fs);
        pins.settle(fs, ctx, victim, done.is_ok());
        done
    }

    fn open_options(&self, ctx: Context, inode: Inode, flags: u32) -> OpenOptions {
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
/// The host's page cache backs every file: direct I/O would pass the guest's alignment on to the host's file system.
/// `open` drops the flag inside virtiofsd; `create` does not.
const FLAG_DIRECT: u32 = libc::O_DIRECT.cast_unsigned();

fn changed(attr: &Attr) -> u64 {
    change_time(attr.ctime, attr.ctimensec)
}

/// Refuses everything that is not one plain path component.
pub(super) fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Refuses a range that leaves the file offsets there are.
fn file_range(offset: u64, size: u32) -> io::Result<()> {
    match i64::try_from(offset)
        .ok()
        .and_then(|start| start.checked_add(i64::from(size)))
    {
        Some(_) => Ok(()),
        None => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// The longest list of attribute names (`XATTR_LIST_MAX`).
const LIST_BYTES: u32 = 64 << 10;

/// A list of attribute names less those that only a privileged process may see; the server's thread is one.
fn without_trusted(names: &[u8]) -> Vec<u8> {
    let names = names.split_inclusive(|byte| *byte == 0);
    names
        .filter(|name| !name.starts_with(b"trusted."))
        .flatten()
        .copied()
        .collect()
}

/// Takes CAP_FSETID away while the guard lives, if the caller is not root: the host's kernel then clears set-id bits of
/// what is written. The guest's kernel says with each WRITE and truncation whether to do so, but not with FALLOCATE and
/// COPY_FILE_RANGE.
fn as_the_caller(ctx: Context) -> io::Result<Option<ScopedCaps>> {
    if ctx.uid.is_root() {
        Ok(None)
    } else {
        drop_effective_cap("FSETID")
    }
}

/// Supplementary groups matter only with another user or group id; virtiofsd would keep them past a request of root's.
fn without_stray_groups(ctx: Context, mut extensions: Extensions) -> Extensions {
    if ctx.uid.is_root() && ctx.gid.is_root() {
        extensions.sup_gids.clear();
    }
    extensions
}

#[allow(clippy::too_many_arguments, reason = "the trait's signatures")]
impl FileSystem for Guard {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        self.0.pins.clear(); // as `init` of virtiofsd forgets everything
        self.0.fs.init(capable)
    }

    fn destroy(&self) {
        self.0.fs.destroy();
        self.0.pins.clear();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        self.0
            .fs
            .lookup(ctx, parent, name)
            .map(|entry| self.entry(entry))
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        self.0.fs.forget(ctx, inode, count);
        self.0.pins.forgotten(&self.0.fs, ctx, inode);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Inode, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Option<Handle>,
    ) -> io::Result<(Attr, Duration)> {
        let (attr, _) = self.0.fs.getattr(ctx, inode, handle)?;
        Ok(self.attributes(inode, attr))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let (attr, _) = self.0.fs.setattr(ctx, inode, attr, handle, valid)?;
        Ok(self.attributes(inode, attr))
    }

    fn readlink(&self, ctx: Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.0.fs.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        component(name)?;
        let extensions = without_stray_groups(ctx, extensions);
        self.0
            .fs
            .symlink(ctx, target, parent, name, extensions)
            .map(|entry| self.entry(entry))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        component(name)?;
        let extensions = without_stray_groups(ctx, extensions);
        let made = self
            .0
            .fs
            .mknod(ctx, parent, name, mode, rdev, umask, extensions);
        made.map(|entry| self.entry(entry))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        component(name)?;
        let extensions = without_stray_groups(ctx, extensions);
        let made = self.0.fs.mkdir(ctx, parent, name, mode, umask, extensions);
        made.map(|entry| self.entry(entry))
    }

    fn unlink(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.removing(ctx, parent, name, |fs| fs.unlink(ctx, parent, name))
    }

    fn rmdir(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.removing(ctx, parent, name, |fs| fs.rmdir(ctx, parent, name))
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: Inode,
        old_name: &CStr,
        new_parent: Inode,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        component(old_name)?;
        component(new_name)?;
        let rename =
            |fs: &PassthroughFs| fs.rename(ctx, old_parent, old_name, new_parent, new_name, flags);
        if flags & (libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE) != 0 {
            return rename(&self.0.fs); // removes nothing
        }
        self.removing(ctx, new_parent, new_name, rename)
    }

    fn link(
        &self,
        ctx: Context,
        inode: Inode,
        new_parent: Inode,
        new_name: &CStr,
    ) -> io::Result<Entry> {
        component(new_name)?;
        self.0
            .fs
            .link(ctx, inode, new_parent, new_name)
            .map(|entry| self.entry(entry))
    }

    fn open(
        &self,
        ctx: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let (handle, options) = self.0.fs.open(ctx, inode, kill_priv, flags)?;
        Ok((handle, options | self.open_options(ctx, inode, flags)))
    }

    fn create(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        component(name)?;
        let extensions = without_stray_groups(ctx, extensions);
        let flags = flags & !FLAG_DIRECT;
        let made = self
            .0
            .fs
            .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions);
        made.map(|(entry, handle, options)| (self.entry(entry), handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        to: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        file_range(offset, size)?;
        self.0
            .fs
            .read(ctx, inode, handle, to, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        file_range(offset, size)?;
        self.0.fs.write(
            ctx,
            inode,
            handle,
            from,
            size,
            offset,
            lock_owner,
            delayed_write,
            kill_priv,
            flags,
        )
    }

    fn flush(&self, ctx: Context, inode: Inode, handle: Handle, owner: u64) -> io::Result<()> {
        self.0.fs.flush(ctx, inode, handle, owner)
    }

    fn fsync(&self, ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()> {
        self.0.fs.fsync(ctx, inode, data, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let _modest = as_the_caller(ctx)?;
        self.0
            .fs
            .fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.0
            .fs
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: Inode) -> io::Result<libc::statvfs64> {
        self.0.fs.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        self.0.fs.setxattr(ctx, inode, name, value, flags, extra)
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: Inode,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.0.fs.getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        if ctx.uid.is_root() {
            return self.0.fs.listxattr(ctx, inode, size);
        }
        let ListxattrReply::Names(all) = self.0.fs.listxattr(ctx, inode, LIST_BYTES)? else {
            return Ok(ListxattrReply::Count(0));
        };
        let names = without_trusted(&all);
        match u32::try_from(names.len()) {
            Ok(len) if size == 0 => Ok(ListxattrReply::Count(len)),
            Ok(len) if len <= size => Ok(ListxattrReply::Names(names)),
            _ => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        }
    }

    fn removexattr(&self, ctx: Context, inode: Inode, name: &CStr) -> io::Result<()> {
        self.0.fs.removexattr(ctx, inode, name)
    }

    fn opendir(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.0.fs.opendir(ctx, inode, flags)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        LISTING.set(true);
        self.0.fs.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()> {
        self.0.fs.fsyncdir(ctx, inode, data, handle)
    }

    fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.0.fs.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.0.fs.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.0.fs.lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Inode,
        handle_in: Handle,
        offset_in: u64,
        inode_out: Inode,
        handle_out: Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let _modest = as_the_caller(ctx)?;
        self.0.fs.copyfilerange(
            ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags,
        )
    }

    fn syncfs(&self, ctx: Context, inode: Inode) -> io::Result<()> {
        self.0.fs.syncfs(ctx, inode)
    }

    // What virtiofsd 1.14 does not have. The guest's kernel then keeps locks to itself, answers O_TMPFILE with
    // EOPNOTSUPP and ioctl with ENOTTY, and does not ask again.

    fn getlk(&self) -> io::Result<()> {
        self.0.fs.getlk()
    }

    fn setlk(&self) -> io::Result<()> {
        self.0.fs.setlk()
    }

    fn setlkw(&self) -> io::Result<()> {
        self.0.fs.setlkw()
    }

    fn ioctl(&self) -> io::Result<()> {
        self.0.fs.ioctl()
    }

    fn bmap(&self) -> io::Result<()> {
        self.0.fs.bmap()
    }

    fn poll(&self) -> io::Result<()> {
        self.0.fs.poll()
    }

    fn notify_reply(&self) -> io::Result<()> {
        self.0.fs.notify_reply()
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        self.0.fs.tmpfile()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_component_is_a_name() {
        for good in [c"a", c"...", c"..a", c".a", c"a b", c"\xff", c"-"] {
            assert!(component(good).is_ok(), "{good:?}");
        }
        for bad in [
            c"", c".", c"..", c"/", c"a/b", c"../a", c"/a", c"a/", c"./.",
        ] {
            assert!(component(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn trusted_attributes_are_hidden() {
        let all = b"user.a\0trusted.overlay.opaque\0security.x\0trusted.\0user.trusted.\0";
        assert_eq!(without_trusted(all), b"user.a\0security.x\0user.trusted.\0");
        assert_eq!(without_trusted(b""), b"");
    }

    #[test]
    fn a_range_past_the_largest_file_offset_is_refused() {
        let end = i64::MAX.cast_unsigned();
        assert!(file_range(0, u32::MAX).is_ok() && file_range(end, 0).is_ok());
        for (offset, size) in [(end, 1), (end + 1, 0), (u64::MAX, 1), (end - 10, 11)] {
            assert!(file_range(offset, size).is_err(), "{offset} {size}");
        }
    }
}
