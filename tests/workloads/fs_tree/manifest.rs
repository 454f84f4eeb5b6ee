//! The manifest: one canonical line per entry, in byte order of the paths; the root itself has none.
//!
//! A line is `PATH TYPE MODE UID:GID links=N@GROUP size=.. hash=.. data=.. rdev=.. target=.. mtime=S.NNNNNNNNN NAME=LEN:HASH..`
//! with only the fields that the type has. GROUP is the first path of the inode. The hash skips blocks of zeros, so it
//! does not depend on holes; `data` is where data lies, in units of 64 KiB. Where a listing disagrees with `lstat` about
//! type or inode number the line says so, which no other line does. Left out on purpose: access and change time,
//! allocated blocks, device and inode numbers.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{
    FileType, Mode, OFlags, RawDir, SeekFrom, Stat, lgetxattr, llistxattr, lstat, major, minor,
    open, readlink, seek,
};
use rustix::io::{Errno, pread};
use rustix::process::{chdir, fchdir};

use crate::{Omit, Part, escaped, plan};

/// Zeros are skipped in blocks of this size, whatever the file system's own is.
const BLOCK: usize = 4096;
/// Bytes read by one system call; a multiple of `BLOCK`.
const CHUNK: usize = 1 << 20;
/// More than the list of names of an entry, and than any value: the plan's fit into one block of ext4.
const ATTRIBUTE_BYTES: usize = 4096;
/// The unit in which holes are told.
const UNIT: u64 = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("{step} {path}: {source}")]
    Read {
        step: &'static str,
        path: String,
        source: Errno,
    },
    #[error("write the manifest: {0}")]
    Write(std::io::Error),
}

fn at(step: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> ManifestError {
    move |source| ManifestError::Read {
        step,
        path: escaped(path),
        source,
    }
}

/// What `getdents` said about an entry.
struct Listed {
    name: Vec<u8>,
    kind: FileType,
    ino: u64,
}

/// An entry with all of its line but the path and the links.
struct Found {
    path: Vec<u8>,
    stat: Stat,
    rest: String,
}

/// Prints the manifest of `dir`.
pub(crate) fn print(dir: &Path, omit: &Omit, out: &mut impl Write) -> Result<(), ManifestError> {
    let name = dir.as_os_str().as_encoded_bytes();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(dir, flags, Mode::empty()).map_err(at("open", name))?;
    let mut found: Vec<Found> = Vec::new();
    let mut unread = vec![Vec::new()];
    while let Some(directory) = unread.pop() {
        // Each directory becomes the current one, so that no call walks more than one name.
        fchdir(&root).map_err(at("change to the root above", &directory))?;
        if !directory.is_empty() {
            chdir(&directory[..]).map_err(at("change to", &directory))?;
        }
        for listed in list(&directory)? {
            let name = &listed.name[..];
            let path = if directory.is_empty() {
                listed.name.clone()
            } else {
                [&directory[..], b"/", name].concat()
            };
            let stat = lstat(name).map_err(at("lstat", &path))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                unread.push(path.clone());
            }
            let rest = rest(&listed, &path, &stat, omit)?;
            found.push(Found { path, stat, rest });
        }
    }
    found.sort_by(|left, right| left.path.cmp(&right.path));
    let mut groups: HashMap<(u64, u64), String> = HashMap::new();
    for entry in found.iter().filter(|entry| is_listed(&entry.stat, omit)) {
        let (path, stat) = (escaped(&entry.path), &entry.stat);
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut start = format!("{path} {} {:04o}", letter(kind), stat.st_mode & 0o7777);
        if !omit.has(Part::Owners) {
            append(&mut start, &format!("{}:{}", stat.st_uid, stat.st_gid));
        }
        if kind != FileType::Directory || !omit.has(Part::DirectoryLinks) {
            append(&mut start, &format!("links={}", stat.st_nlink));
        }
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let first = groups.entry((stat.st_dev, stat.st_ino)).or_insert(path);
            start.push('@');
            start.push_str(first);
        }
        writeln!(out, "{start}{}", entry.rest).map_err(ManifestError::Write)?;
    }
    out.flush().map_err(ManifestError::Write)
}

fn is_listed(stat: &Stat, omit: &Omit) -> bool {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice | FileType::BlockDevice => !omit.has(Part::Devices),
        FileType::Socket => !omit.has(Part::Sockets),
        _ => true,
    }
}

/// The names in the current directory.
fn list(directory: &[u8]) -> Result<Vec<Listed>, ManifestError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = open(".", flags, Mode::empty()).map_err(at("open", directory))?;
    let mut buffer = vec![MaybeUninit::uninit(); 32 << 10];
    let mut entries = RawDir::new(&opened, &mut buffer);
    let mut listed = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(at("list", directory))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            let (kind, ino) = (entry.file_type(), entry.ino());
            listed.push(Listed {
                name: name.to_vec(),
                kind,
                ino,
            });
        }
    }
    Ok(listed)
}

/// Adds a field to a line.
fn append(text: &mut String, field: &str) {
    text.push(' ');
    text.push_str(field);
}

/// The fields that follow the number of links.
fn rest(listed: &Listed, path: &[u8], stat: &Stat, omit: &Omit) -> Result<String, ManifestError> {
    let name = &listed.name[..];
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut text = String::new();
    match kind {
        FileType::RegularFile => {
            let (hash, data) = contents(name, path, stat)?;
            append(
                &mut text,
                &format!("size={} hash={hash:016x}", stat.st_size),
            );
            if !omit.has(Part::Holes) {
                append(&mut text, &format!("data={data}"));
            }
        }
        FileType::Symlink => {
            let target = readlink(name, Vec::new()).map_err(at("readlink", path))?;
            let target = escaped(target.to_bytes());
            append(&mut text, &format!("size={} target={target}", stat.st_size));
        }
        FileType::CharacterDevice | FileType::BlockDevice => {
            let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
            append(&mut text, &format!("rdev={major}:{minor}"));
        }
        _ => {}
    }
    append(
        &mut text,
        &format!("mtime={}.{:09}", stat.st_mtime, stat.st_mtime_nsec),
    );
    for (attribute, value) in xattrs(name, path)? {
        if !plan::omitted(omit, &attribute) {
            let mut hasher = DefaultHasher::new();
            hasher.write(&value);
            let (attribute, hash) = (escaped(attribute.as_bytes()), hasher.finish());
            append(
                &mut text,
                &format!("{attribute}={}:{hash:016x}", value.len()),
            );
        }
    }
    if listed.kind != FileType::Unknown && listed.kind != kind {
        append(&mut text, &format!("LISTED-AS={}", letter(listed.kind)));
    }
    if listed.ino != stat.st_ino {
        append(&mut text, "LISTED-WITH-ANOTHER-INODE");
    }
    Ok(text)
}

const fn letter(kind: FileType) -> char {
    match kind {
        FileType::RegularFile => '-',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        FileType::CharacterDevice => 'c',
        FileType::BlockDevice => 'b',
        FileType::Unknown => '?',
    }
}

/// The hash of what a file holds, and the ranges of data in units of 64 KiB (`0-1,8-9`, or `none`).
fn contents(name: &[u8], path: &[u8], stat: &Stat) -> Result<(u64, String), ManifestError> {
    if stat.st_size == 0 {
        return Ok((DefaultHasher::new().finish(), "none".to_owned()));
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(name, flags, Mode::empty()).map_err(at("open", path))?;
    let mut hasher = DefaultHasher::new();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut end = 0;
    while let Some(start) = data_from(&file, end).map_err(at("seek data in", path))? {
        end = seek(&file, SeekFrom::Hole(start)).map_err(at("seek a hole in", path))?;
        digest(&file, start, end, &mut hasher).map_err(at("read", path))?;
        let units = (start / UNIT, end.div_ceil(UNIT));
        match ranges.last_mut() {
            Some(last) if last.1 >= units.0 => last.1 = units.1,
            _ => ranges.push(units),
        }
    }
    let mut text = String::new();
    for (start, end) in &ranges {
        let comma = if text.is_empty() { "" } else { "," };
        // Writing to a string cannot fail.
        let _ = write!(text, "{comma}{start}-{end}");
    }
    if text.is_empty() {
        text.push_str("none");
    }
    Ok((hasher.finish(), text))
}

/// Where data begins at or after `offset`.
fn data_from(file: impl AsFd, offset: u64) -> Result<Option<u64>, Errno> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => Ok(Some(start)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Hashes the blocks of `start..end` that are not zero, each with its offset.
fn digest(file: impl AsFd, start: u64, end: u64, hasher: &mut DefaultHasher) -> Result<(), Errno> {
    let mut chunk = vec![0; CHUNK];
    // Aligned, so that the blocks are the same however the file system tells where data begins.
    let mut offset = start - start % BLOCK as u64;
    while offset < end {
        let wanted = usize::try_from(end - offset).unwrap_or(CHUNK).min(CHUNK);
        let mut filled = 0;
        while filled < wanted {
            match pread(&file, &mut chunk[filled..wanted], offset + filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            break;
        }
        for block in chunk[..filled].chunks(BLOCK) {
            if block.iter().any(|byte| *byte != 0) {
                hasher.write_u64(offset);
                hasher.write(block);
            }
            offset += block.len() as u64;
        }
    }
    Ok(())
}

/// All extended attributes that the caller may see, sorted by name.
fn xattrs(name: &[u8], path: &[u8]) -> Result<Vec<(String, Vec<u8>)>, ManifestError> {
    let mut buffer = vec![0; ATTRIBUTE_BYTES];
    let len = match llistxattr(name, &mut buffer[..]) {
        Err(Errno::NOTSUP) => 0,
        result => result.map_err(at("list the attributes of", path))?,
    };
    let names = buffer[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let mut names: Vec<String> = names
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    let mut found = Vec::new();
    for attribute in names {
        let len = lgetxattr(name, &attribute, &mut buffer[..])
            .map_err(at("read an attribute of", path))?;
        found.push((attribute, buffer[..len].to_vec()));
    }
    Ok(found)
}
