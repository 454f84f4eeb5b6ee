//! Every operation of the file system, through the guard.
//!
//! Contract: see `guard.rs`. Delegation is written out for every method of the trait, so that no default of the trait is
//! taken by accident. What changes a file or a directory says so (`changing`, `making`, `removing`).

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::soft_idmap::Id;

use super::checks::{
    LIST_BYTES, as_the_caller, component, file_range, without_stray_groups, without_trusted,
};
use super::coherence::last_tick;
use super::guard::{FLAG_DIRECT, FLAG_TRUNCATE, Guard, Handle, Inode};

#[allow(clippy::too_many_arguments, reason = "the trait's signatures")]
impl FileSystem for Guard {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        self.own().clear();
        self.pins().clear(); // as `init` of virtiofsd forgets everything
        self.fs().init(capable)
    }

    fn destroy(&self) {
        self.fs().destroy();
        self.own().clear();
        self.pins().clear();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        let found = match self.fs().lookup(ctx, parent, name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                return self.own().absent(parent).ok_or(error);
            }
            found => found?,
        };
        self.pins().see(parent, name, &found);
        self.own().see(parent, Some(name), &found);
        Ok(self.entry(found))
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        self.fs().forget(ctx, inode, count);
        self.own().forget(inode);
        self.pins().forgotten(self.fs(), ctx, inode);
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
        let (attr, _) = self.fs().getattr(ctx, inode, handle)?;
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
        let (attr, _) =
            self.changing(&[inode], |fs| fs.setattr(ctx, inode, attr, handle, valid))?;
        Ok(self.attributes(inode, attr))
    }

    fn readlink(&self, ctx: Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.fs().readlink(ctx, inode)
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
        self.making(parent, None, |fs| {
            fs.symlink(ctx, target, parent, name, extensions)
        })
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
        self.making(parent, None, |fs| {
            fs.mknod(ctx, parent, name, mode, rdev, umask, extensions)
        })
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
        self.making(parent, None, |fs| {
            fs.mkdir(ctx, parent, name, mode, umask, extensions)
        })
    }

    fn unlink(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.removing(ctx, parent, name, || {
            self.changing(&[parent], |fs| fs.unlink(ctx, parent, name))
        })
    }

    fn rmdir(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.removing(ctx, parent, name, || {
            self.changing(&[parent], |fs| fs.rmdir(ctx, parent, name))
        })
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
        let parents = [old_parent, new_parent];
        if flags & (libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE) != 0 {
            self.pins().unsee();
            return self.changing(&parents, rename); // removes nothing
        }
        self.removing(ctx, new_parent, new_name, || {
            self.changing(&parents, rename)
        })
    }

    fn link(
        &self,
        ctx: Context,
        inode: Inode,
        new_parent: Inode,
        new_name: &CStr,
    ) -> io::Result<Entry> {
        component(new_name)?;
        self.making(new_parent, Some(inode), |fs| {
            fs.link(ctx, inode, new_parent, new_name)
        })
    }

    fn open(
        &self,
        ctx: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let changed = if flags & FLAG_TRUNCATE == 0 {
            &[][..]
        } else {
            &[inode]
        };
        let (handle, options) =
            self.changing(changed, |fs| fs.open(ctx, inode, kill_priv, flags))?;
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
        let since = last_tick();
        self.pins().unsee();
        let (entry, handle, options) = self
            .fs()
            .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        self.made(parent, None, since, &entry);
        Ok((self.entry(entry), handle, options))
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
        self.fs()
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
        self.changing(&[inode], |fs| {
            fs.write(
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
        })
    }

    fn flush(&self, ctx: Context, inode: Inode, handle: Handle, owner: u64) -> io::Result<()> {
        self.fs().flush(ctx, inode, handle, owner)
    }

    fn fsync(&self, ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()> {
        self.fs().fsync(ctx, inode, data, handle)
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
        self.changing(&[inode], |fs| {
            fs.fallocate(ctx, inode, handle, mode, offset, length)
        })
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
        self.fs()
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: Inode) -> io::Result<libc::statvfs64> {
        self.fs().statfs(ctx, inode)
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
        self.changing(&[inode], |fs| {
            fs.setxattr(ctx, inode, name, value, flags, extra)
        })
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: Inode,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.fs().getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        if ctx.uid.is_root() {
            return self.fs().listxattr(ctx, inode, size);
        }
        let ListxattrReply::Names(all) = self.fs().listxattr(ctx, inode, LIST_BYTES)? else {
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
        self.changing(&[inode], |fs| fs.removexattr(ctx, inode, name))
    }

    fn opendir(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.fs().opendir(ctx, inode, flags)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        self.begin_listing();
        self.fs().readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()> {
        self.fs().fsyncdir(ctx, inode, data, handle)
    }

    fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.fs().releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.fs().access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.fs().lseek(ctx, inode, handle, offset, whence)
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
        self.changing(&[inode_out], |fs| {
            fs.copyfilerange(
                ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags,
            )
        })
    }

    fn syncfs(&self, ctx: Context, inode: Inode) -> io::Result<()> {
        self.fs().syncfs(ctx, inode)
    }

    // What virtiofsd 1.14 does not have. The guest's kernel then keeps locks to itself, answers O_TMPFILE with
    // EOPNOTSUPP and ioctl with ENOTTY, and does not ask again.

    fn getlk(&self) -> io::Result<()> {
        self.fs().getlk()
    }

    fn setlk(&self) -> io::Result<()> {
        self.fs().setlk()
    }

    fn setlkw(&self) -> io::Result<()> {
        self.fs().setlkw()
    }

    fn ioctl(&self) -> io::Result<()> {
        self.fs().ioctl()
    }

    fn bmap(&self) -> io::Result<()> {
        self.fs().bmap()
    }

    fn poll(&self) -> io::Result<()> {
        self.fs().poll()
    }

    fn notify_reply(&self) -> io::Result<()> {
        self.fs().notify_reply()
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        self.fs().tmpfile()
    }
}
