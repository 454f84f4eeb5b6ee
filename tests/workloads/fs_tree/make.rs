//! Carries a plan out: creates every entry in order, then gives directories what creating in them would have changed.
//!
//! Attributes are set in the order in which none undoes another: contents, owner (which clears set-id bits and
//! capabilities), mode, attributes (an ACL changes the mode's group bits), time. The process changes into the tree, so
//! that long paths stay below PATH_MAX, and into the directory of each entry, so that no call walks more than one name
//! (on virtio-fs each name costs a request). The umask is cleared: modes are as planned.

use std::fmt::Display;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
    chmod, chownat, fchmod, fchown, fsetxattr, ftruncate, futimens, linkat, lsetxattr, makedev,
    mkdir, mknodat, open, symlink, utimensat,
};
use rustix::io::{Errno, pwrite};
use rustix::process::{chdir, fchdir, umask};

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
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(dir, flags, Mode::empty()).map_err(at("open", root))?;
    let mut place = Place { root, parent: None };
    for entry in plan {
        let name = place.enter(&entry.path)?;
        let file = create(entry, name, &place.root)?;
        match entry.kind {
            Kind::Link(_) => {}
            // What a directory gives to its entries must be there before them; the rest comes last.
            Kind::Directory if inherited(entry) => attributes(entry, &Target::Name(name))?,
            Kind::Directory => {}
            _ => finish(entry, &file.map_or(Target::Name(name), Target::File))?,
        }
    }
    for entry in plan
        .iter()
        .rev()
        .filter(|entry| entry.kind == Kind::Directory)
    {
        let name = place.enter(&entry.path)?;
        finish(entry, &Target::Name(name))?;
    }
    Ok(())
}

/// Whether the file system itself decides on mode and ACL.
fn inherited(entry: &Entry) -> bool {
    entry.path.starts_with(b"inherited")
}

/// Where in the tree the process is.
struct Place {
    root: OwnedFd,
    /// The current directory, from the root; none before the first move.
    parent: Option<Vec<u8>>,
}

impl Place {
    /// Moves to the directory that holds `path`; returns the name there.
    fn enter<'a>(&mut self, path: &'a [u8]) -> Result<&'a [u8], MakeError> {
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = slash.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]));
        if self.parent.as_deref() != Some(parent) {
            fchdir(&self.root).map_err(at("change to the root above", parent))?;
            if !parent.is_empty() {
                chdir(parent).map_err(at("change to", parent))?;
            }
            self.parent = Some(parent.to_owned());
        }
        Ok(name)
    }
}

/// Creates an entry in the current directory; a regular file is returned open.
fn create(entry: &Entry, name: &[u8], root: impl AsFd) -> Result<Option<OwnedFd>, MakeError> {
    let path = &entry.path[..];
    // A directory is usable until it gets its own mode at the end, except where the mode goes through a default ACL.
    let inherits = path.starts_with(b"inherited/");
    let mode = Mode::from_raw_mode(if inherits { entry.mode } else { 0o700 });
    let node = |kind, device| mknodat(CWD, name, kind, mode, device);
    match &entry.kind {
        Kind::Regular { size, data } => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let file = open(name, flags, mode).map_err(at("create", path))?;
            fill(&file, *size, data).map_err(at("write", path))?;
            return Ok(Some(file));
        }
        Kind::Directory => mkdir(name, mode).map_err(at("mkdir", path)),
        Kind::Symlink(target) => symlink(&target[..], name).map_err(at("symlink", path)),
        Kind::Link(first) => {
            linkat(root, &first[..], CWD, name, AtFlags::empty()).map_err(at("link", path))
        }
        Kind::Fifo => node(FileType::Fifo, 0).map_err(at("mknod fifo", path)),
        Kind::Socket => node(FileType::Socket, 0).map_err(at("mknod socket", path)),
        Kind::Char(major, minor) => node(FileType::CharacterDevice, makedev(*major, *minor))
            .map_err(at(format!("mknod char {major}:{minor}"), path)),
        Kind::Block(major, minor) => node(FileType::BlockDevice, makedev(*major, *minor))
            .map_err(at(format!("mknod block {major}:{minor}"), path)),
    }?;
    Ok(None)
}

fn fill(file: impl AsFd, size: u64, data: &[Extent]) -> Result<(), Errno> {
    let mut chunk = Vec::new();
    for extent in data {
        let mut random = Random::new(extent.seed);
        let (mut offset, mut left) = (extent.offset, extent.len);
        while left > 0 {
            chunk.resize(usize::try_from(left).unwrap_or(CHUNK).min(CHUNK), 0);
            random.fill(&mut chunk);
            let mut written = 0;
            while written < chunk.len() {
                let count = pwrite(&file, &chunk[written..], offset)?;
                written += count;
                offset += count as u64;
            }
            left -= chunk.len() as u64;
        }
    }
    if data.last().is_none_or(|last| last.offset + last.len < size) && size > 0 {
        ftruncate(&file, size)?;
    }
    Ok(())
}

/// How an entry is reached: by its name in the current directory, or open.
enum Target<'a> {
    Name(&'a [u8]),
    File(OwnedFd),
}

/// Owner, mode, attributes and time of a new entry.
fn finish(entry: &Entry, target: &Target<'_>) -> Result<(), MakeError> {
    let path = &entry.path[..];
    if !inherited(entry) {
        if let Some((uid, gid)) = entry.owner {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            match target {
                Target::Name(name) => chownat(CWD, *name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
                Target::File(file) => fchown(file, uid, gid),
            }
            .map_err(at("chown", path))?;
        }
        if !matches!(entry.kind, Kind::Symlink(_)) {
            let mode = Mode::from_raw_mode(entry.mode);
            match target {
                Target::Name(name) => chmod(*name, mode),
                Target::File(file) => fchmod(file, mode),
            }
            .map_err(at("chmod", path))?;
        }
        attributes(entry, target)?;
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
    match target {
        Target::Name(name) => utimensat(CWD, *name, &times, AtFlags::SYMLINK_NOFOLLOW),
        Target::File(file) => futimens(file, &times),
    }
    .map_err(at("utimensat", path))
}

fn attributes(entry: &Entry, target: &Target<'_>) -> Result<(), MakeError> {
    for (name, value) in &entry.xattrs {
        match target {
            Target::Name(file) => lsetxattr(*file, name, value, XattrFlags::empty()),
            Target::File(file) => fsetxattr(file, name, value, XattrFlags::empty()),
        }
        .map_err(at(format!("set {name} of"), &entry.path))?;
    }
    Ok(())
}
