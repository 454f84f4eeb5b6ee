//! What checks do all the time, in one word each; paths are relative to the check's own directory.
//!
//! Everything returns the plain error of its system call, so that a check can say what it expects of it.

use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, RawDir, Stat, Timespec, Timestamps, UTIME_OMIT,
    Uid, chmod, chown, lstat, mkdir, mknodat, open, stat, utimensat,
};
use rustix::io::{Errno, pread, pwrite, read, write};
use std::os::fd::{AsFd, OwnedFd};

use crate::verdict::{Fail, Verdict};

/// The file whose change time tells the file system's clock; beside the directories of the checks.
pub(crate) const TICK: &str = ".tick";

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Says where this program is.
pub(crate) fn remember_program(path: PathBuf) {
    PROGRAM.get_or_init(|| path);
}

/// Copies this program to `path` with the given mode, to be executed there.
pub(crate) fn copy_program(path: &str, bits: u32) -> Verdict {
    let program = PROGRAM
        .get()
        .ok_or_else(|| Fail("this program's own path is unknown".to_owned()))?;
    std::fs::copy(program, path)?;
    chmod(path, mode(bits))?;
    Ok(())
}

/// The mode with these bits.
pub(crate) const fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits)
}

/// Opens an existing file.
pub(crate) fn open_as(path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Opens for reading.
pub(crate) fn reader(path: &str) -> Result<OwnedFd, Errno> {
    open_as(path, OFlags::RDONLY)
}

/// Opens for reading and writing.
pub(crate) fn writer(path: &str) -> Result<OwnedFd, Errno> {
    open_as(path, OFlags::RDWR)
}

/// Creates a file that must not exist, open for reading and writing.
pub(crate) fn create(path: &str, bits: u32) -> Result<OwnedFd, Errno> {
    open(
        path,
        OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC,
        mode(bits),
    )
}

/// Creates an empty file of mode 0644.
pub(crate) fn touch(path: &str) -> Result<(), Errno> {
    create(path, 0o644).map(drop)
}

/// Creates a file of mode 0644 with these contents.
pub(crate) fn put(path: &str, bytes: &[u8]) -> Result<(), Errno> {
    write_all(create(path, 0o644)?, bytes)
}

/// Writes everything at the file's position.
pub(crate) fn write_all(file: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        bytes = &bytes[write(&file, bytes)?..];
    }
    Ok(())
}

/// Writes everything at `offset`.
pub(crate) fn write_at(file: impl AsFd, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        done += pwrite(&file, &bytes[done..], offset + done as u64)?;
    }
    Ok(())
}

/// Reads `len` bytes at `offset`, or fewer at the end.
pub(crate) fn read_at(file: impl AsFd, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match pread(&file, &mut bytes[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Reads from the file's position to the end.
pub(crate) fn read_rest(file: impl AsFd) -> Result<Vec<u8>, Errno> {
    let (mut bytes, mut chunk) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match read(&file, &mut chunk[..])? {
            0 => return Ok(bytes),
            count => bytes.extend(&chunk[..count]),
        }
    }
}

/// What a file holds.
pub(crate) fn contents(path: &str) -> Result<Vec<u8>, Errno> {
    read_rest(reader(path)?)
}

/// Makes a directory that anybody may use.
pub(crate) fn open_directory(path: &str) -> Result<(), Errno> {
    directory(path, 0o777)
}

/// Makes a directory of exactly this mode.
pub(crate) fn directory(path: &str, bits: u32) -> Result<(), Errno> {
    mkdir(path, mode(0o700))?;
    chmod(path, mode(bits))
}

/// Makes a node in the current directory.
pub(crate) fn node(path: &str, kind: FileType, bits: u32, device: Dev) -> Result<(), Errno> {
    mknodat(CWD, path, kind, mode(bits), device)
}

/// Changes owner and group.
pub(crate) fn give(path: &str, uid: u32, gid: u32) -> Result<(), Errno> {
    chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

/// Changes mode bits.
pub(crate) fn set_bits(path: &str, bits: u32) -> Result<(), Errno> {
    chmod(path, mode(bits))
}

/// The twelve mode bits of what `path` leads to.
pub(crate) fn bits(path: &str) -> Result<u32, Errno> {
    Ok(stat(path)?.st_mode & 0o7777)
}

/// The type of `path` itself.
pub(crate) fn kind(path: &str) -> Result<FileType, Errno> {
    Ok(FileType::from_raw_mode(lstat(path)?.st_mode))
}

/// How many names the inode has.
pub(crate) fn links(path: &str) -> Result<u64, Errno> {
    Ok(lstat(path)?.st_nlink)
}

/// The inode number of `path` itself.
pub(crate) fn inode(path: &str) -> Result<u64, Errno> {
    Ok(lstat(path)?.st_ino)
}

/// Owner and group of `path` itself.
pub(crate) fn owner(path: &str) -> Result<(u32, u32), Errno> {
    let stat = lstat(path)?;
    Ok((stat.st_uid, stat.st_gid))
}

/// The names in a directory but `.` and `..`, sorted.
pub(crate) fn names(path: &str) -> Result<Vec<String>, Errno> {
    names_of(open_as(path, OFlags::RDONLY | OFlags::DIRECTORY)?)
}

/// The names that are left to read in an open directory but `.` and `..`, sorted.
pub(crate) fn names_of(directory: impl AsFd) -> Result<Vec<String>, Errno> {
    let mut buffer = vec![MaybeUninit::uninit(); 32 << 10];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// A named change, for checks that try several.
pub(crate) type Step = (&'static str, fn() -> Result<(), Errno>);

/// Seconds and nanoseconds since 1970.
pub(crate) type Time = (i64, i64);

pub(crate) fn modified(stat: &Stat) -> Time {
    (
        stat.st_mtime,
        i64::try_from(stat.st_mtime_nsec).unwrap_or(-1),
    )
}

pub(crate) fn changed(stat: &Stat) -> Time {
    (
        stat.st_ctime,
        i64::try_from(stat.st_ctime_nsec).unwrap_or(-1),
    )
}

pub(crate) fn accessed(stat: &Stat) -> Time {
    (
        stat.st_atime,
        i64::try_from(stat.st_atime_nsec).unwrap_or(-1),
    )
}

/// An access time and a modification time for `utimensat`.
pub(crate) const fn times(accessed: Time, modified: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: accessed.0,
            tv_nsec: accessed.1,
        },
        last_modification: Timespec {
            tv_sec: modified.0,
            tv_nsec: modified.1,
        },
    }
}

/// What leaves a time as it is.
pub(crate) const OMIT: Time = (0, UTIME_OMIT);

/// Sets both times of `path`, following a symbolic link.
pub(crate) fn set_times(path: &str, accessed: Time, modified: Time) -> Result<(), Errno> {
    utimensat(CWD, path, &times(accessed, modified), AtFlags::empty())
}

/// Returns when the file system's clock has moved: what changes next has a later time than all that changed before.
pub(crate) fn tick() -> Result<(), Errno> {
    let probe = format!("../{TICK}");
    chmod(&*probe, mode(0o600))?;
    let before = changed(&stat(&*probe)?);
    while changed(&stat(&*probe)?) <= before {
        chmod(&*probe, mode(0o600))?;
    }
    Ok(())
}
