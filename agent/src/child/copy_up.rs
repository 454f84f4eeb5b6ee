//! Copies a directory's content into an empty tmpfs (`tmpcopyup`).
//!
//! Contract: types, modes, owners, times and extended attributes are kept; hard links become copies, sockets are left
//! out (as runc's fileutils copy does). Names are looked up one by one below open directories, so no link is followed.

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chmodat, chownat,
    fgetxattr, flistxattr, fsetxattr, mkdirat, mknodat, openat, readlinkat, statat, symlinkat,
    utimensat,
};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Copies everything in `from` to `to`, both open for reading.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    rustix::fs::fchown(
        to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from, to, name)?;
        }
    }
    Ok(())
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let open = |directory: BorrowedFd<'_>, flags: OFlags| -> Result<OwnedFd, Errno> {
        openat(
            directory,
            name,
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            mode,
        )
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            mkdirat(to, name, mode)?;
            let source = open(from, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let target = open(to, OFlags::RDONLY | OFlags::DIRECTORY)?;
            copy(source.as_fd(), target.as_fd())?;
            copy_attributes(source.as_fd(), target.as_fd())?;
        }
        FileType::RegularFile => {
            let mut source = File::from(open(from, OFlags::RDONLY)?);
            let mut target = File::from(open(to, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?);
            io::copy(&mut source, &mut target)?;
            copy_attributes(source.as_fd(), target.as_fd())?;
        }
        FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?.as_c_str(), to, name)?,
        FileType::Socket => return Ok(()),
        kind => mknodat(to, name, kind, mode, stat.st_rdev)?,
    }
    settle(to, name, &stat, mode)
}

fn settle(to: BorrowedFd<'_>, name: &CStr, stat: &Stat, mode: Mode) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        chmodat(to, name, mode, AtFlags::empty())?;
    }
    let time = |seconds, nanoseconds| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec.cast_signed()),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec.cast_signed()),
    };
    Ok(utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn copy_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0; 64 << 10];
    let n = match flistxattr(from, &mut names) {
        Err(Errno::OPNOTSUPP) => return Ok(()),
        other => other?,
    };
    for name in names[..n].split_inclusive(|b| *b == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        let mut value = vec![0; 64 << 10];
        let n = fgetxattr(from, name, &mut value)?;
        match fsetxattr(to, name, &value[..n], rustix::fs::XattrFlags::empty()) {
            // tmpfs has no such namespace (user attributes before 6.6): runc ignores it too.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
