//! Carries a plan out: creates every entry in order, then gives directories what creating in them would have changed.
//!
//! Attributes are set in the order in which none undoes another: contents, owner (which clears set-id bits and
//! capabilities), mode, attributes (an ACL changes the mode's group bits), time. The process changes into the tree, so
//! that long paths stay below PATH_MAX. The umask is cleared: modes are as planned.

use std::fmt::Display;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
    chmod, chownat, ftruncate, linkat, lsetxattr, makedev, mkdir, mknodat, open, symlink,
    utimensat,
};
use rustix::io::{Errno, pwrite};
use rustix::process::{chdir, umask};

use crate::plan::{Entry, Extent, Kind};
use crate::random::Random;

/// Bytes written by one system call.
const CHUNK: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {source}")]
pub(crate) struct MakeError {
    step: String,
    path: String,
    source: Errno,
}

/// Names the step and the path of a failed call.
fn at(step: impl Display, path: &[u8]) -> impl FnOnce(Errno) -> MakeError {
    move |source| MakeError {
        step: step.to_string(),
        path: crate::escaped(path),
        source,
    }
}

/// Builds the tree in `dir`, which must be empty or missing.
pub(crate) fn make(dir: &Path, plan: &[Entry]) -> Result<(), MakeError> {
    let root = dir.as_os_str().as_bytes();
    umask(Mode::empty());
    match mkdir(dir, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => {}
        result => result.map_err(at("create the directory", root))?,
    }
    chdir(dir).map_err(at("change to the directory", root))?;
    for entry in plan {
        create(entry)?;
        match entry.kind {
            Kind::Link(_) => {}
            // What a directory gives to its entries must be there before them; the rest comes last.
            Kind::Directory if entry.path.starts_with(b"inherited") => attributes(entry)?,
            Kind::Directory => {}
            _ => finish(entry)?,
        }
    }
    for entry in plan
        .iter()
        .rev()
        .filter(|entry| entry.kind == Kind::Directory)
    {
        finish(entry)?;
    }
    Ok(())
}

fn create(entry: &Entry) -> Result<(), MakeError> {
    let path = &entry.path[..];
    // A directory is usable until it gets its own mode at the end, except where the mode goes through a default ACL.
    let inherits = path.starts_with(b"inherited/");
    let mode = Mode::from_raw_mode(if inherits { entry.mode } else { 0o700 });
    let node = |kind, device| mknodat(CWD, path, kind, mode, device);
    match &entry.kind {
        Kind::Directory => mkdir(path, mode).map_err(at("mkdir", path)),
        Kind::Regular { size, data } => regular(path, mode, *size, data),
        Kind::Symlink(target) => symlink(&target[..], path).map_err(at("symlink", path)),
        Kind::Link(first) => {
            linkat(CWD, &first[..], CWD, path, AtFlags::empty()).map_err(at("link", path))
        }
        Kind::Fifo => node(FileType::Fifo, 0).map_err(at("mknod fifo", path)),
        Kind::Socket => node(FileType::Socket, 0).map_err(at("mknod socket", path)),
        Kind::Char(major, minor) => node(FileType::CharacterDevice, makedev(*major, *minor))
            .map_err(at(format!("mknod char {major}:{minor}"), path)),
        Kind::Block(major, minor) => node(FileType::BlockDevice, makedev(*major, *minor))
            .map_err(at(format!("mknod block {major}:{minor}"), path)),
    }
}

fn regular(path: &[u8], mode: Mode, size: u64, data: &[Extent]) -> Result<(), MakeError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = open(path, flags, mode).map_err(at("create", path))?;
    let mut chunk = Vec::new();
    for extent in data {
        let mut random = Random::new(extent.seed);
        let (mut offset, mut left) = (extent.offset, extent.len);
        while left > 0 {
            chunk.resize(usize::try_from(left).unwrap_or(CHUNK).min(CHUNK), 0);
            random.fill(&mut chunk);
            let mut written = 0;
            while written < chunk.len() {
                let count = pwrite(&file, &chunk[written..], offset).map_err(at("write", path))?;
                written += count;
                offset += count as u64;
            }
            left -= chunk.len() as u64;
        }
    }
    if data.last().is_none_or(|last| last.offset + last.len < size) && size > 0 {
        ftruncate(&file, size).map_err(at("ftruncate", path))?;
    }
    Ok(())
}

/// Owner, mode, attributes and time of a new entry.
fn finish(entry: &Entry) -> Result<(), MakeError> {
    let path = &entry.path[..];
    if !path.starts_with(b"inherited") {
        if let Some((uid, gid)) = entry.owner {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(at("chown", path))?;
        }
        if !matches!(entry.kind, Kind::Symlink(_)) {
            chmod(path, Mode::from_raw_mode(entry.mode)).map_err(at("chmod", path))?;
        }
        attributes(entry)?;
    }
    let (seconds, nanoseconds) = entry.mtime;
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds.into(),
        },
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(at("utimensat", path))
}

fn attributes(entry: &Entry) -> Result<(), MakeError> {
    for (name, value) in &entry.xattrs {
        lsetxattr(&entry.path[..], name, value, XattrFlags::empty())
            .map_err(at(format!("set {name} of"), &entry.path))?;
    }
    Ok(())
}
