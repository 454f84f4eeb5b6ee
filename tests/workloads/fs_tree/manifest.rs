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
use rustix::process::chdir;

use crate::{Omit, Part, escaped, plan};

/// Zeros are skipped in blocks of this size, whatever the file system's own is.
const BLOCK: usize = 4096;
/// Bytes read by one system call; a multiple of `BLOCK`.
const CHUNK: usize = 1 << 20;
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
    path: Vec<u8>,
    kind: FileType,
    ino: u64,
}

/// Prints the manifest of `dir`, which becomes the current directory.
pub(crate) fn print(dir: &Path, omit: &Omit, out: &mut impl Write) -> Result<(), ManifestError> {
    chdir(dir).map_err(at("change to", dir.as_os_str().as_encoded_bytes()))?;
    let mut found: Vec<(Listed, Stat)> = Vec::new();
    let mut unread = vec![Vec::new()];
    while let Some(directory) = unread.pop() {
        for listed in list(&directory)? {
            let stat = lstat(&listed.path[..]).map_err(at("lstat", &listed.path))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                unread.push(listed.path.clone());
            }
            found.push((listed, stat));
        }
    }
    found.sort_by(|left, right| left.0.path.cmp(&right.0.path));
    let mut groups: HashMap<(u64, u64), String> = HashMap::new();
    for (listed, stat) in &found {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let hidden = match kind {
            FileType::CharacterDevice | FileType::BlockDevice => omit.has(Part::Devices),
            FileType::Socket => omit.has(Part::Sockets),
            _ => false,
        };
        if hidden {
            continue;
        }
        let first = groups
            .entry((stat.st_dev, stat.st_ino))
            .or_insert_with(|| escaped(&listed.path));
        let text = line(listed, stat, first, omit)?;
        writeln!(out, "{text}").map_err(ManifestError::Write)?;
    }
    out.flush().map_err(ManifestError::Write)
}

/// The entries of a directory, by paths relative to the root of the tree.
fn list(directory: &[u8]) -> Result<Vec<Listed>, ManifestError> {
    let name = if directory.is_empty() {
        b"."
    } else {
        directory
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = open(name, flags, Mode::empty()).map_err(at("open", name))?;
    let mut buffer = vec![MaybeUninit::uninit(); 32 << 10];
    let mut entries = RawDir::new(&opened, &mut buffer);
    let mut listed = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(at("list", name))?;
        let bytes = entry.file_name().to_bytes();
        if bytes == b"." || bytes == b".." {
            continue;
        }
        let path = if directory.is_empty() {
            bytes.to_vec()
        } else {
            [directory, b"/", bytes].concat()
        };
        listed.push(Listed {
            path,
            kind: entry.file_type(),
            ino: entry.ino(),
        });
    }
    Ok(listed)
}

fn line(listed: &Listed, stat: &Stat, first: &str, omit: &Omit) -> Result<String, ManifestError> {
    let path = &listed.path[..];
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut text = format!(
        "{} {} {:04o}",
        escaped(path),
        letter(kind),
        stat.st_mode & 0o7777
    );
    let mut field = |field: String| {
        text.push(' ');
        text.push_str(&field);
    };
    if !omit.has(Part::Owners) {
        field(format!("{}:{}", stat.st_uid, stat.st_gid));
    }
    match kind {
        FileType::Directory if omit.has(Part::DirectoryLinks) => {}
        FileType::Directory => field(format!("links={}", stat.st_nlink)),
        _ if stat.st_nlink == 1 => field("links=1".to_owned()),
        _ => field(format!("links={}@{first}", stat.st_nlink)),
    }
    match kind {
        FileType::RegularFile => {
            let (hash, data) = contents(path, stat)?;
            field(format!("size={} hash={hash:016x}", stat.st_size));
            if !omit.has(Part::Holes) {
                field(format!("data={data}"));
            }
        }
        FileType::Symlink => {
            let target = readlink(path, Vec::new()).map_err(at("readlink", path))?;
            field(format!(
                "size={} target={}",
                stat.st_size,
                escaped(target.to_bytes())
            ));
        }
        FileType::CharacterDevice | FileType::BlockDevice => {
            field(format!(
                "rdev={}:{}",
                major(stat.st_rdev),
                minor(stat.st_rdev)
            ));
        }
        _ => {}
    }
    field(format!("mtime={}.{:09}", stat.st_mtime, stat.st_mtime_nsec));
    for (name, value) in xattrs(path)? {
        if !plan::omitted(omit, &name) {
            let mut hasher = DefaultHasher::new();
            hasher.write(&value);
            field(format!(
                "{}={}:{:016x}",
                escaped(name.as_bytes()),
                value.len(),
                hasher.finish()
            ));
        }
    }
    if listed.kind != FileType::Unknown && listed.kind != kind {
        field(format!("LISTED-AS={}", letter(listed.kind)));
    }
    if listed.ino != stat.st_ino {
        field("LISTED-WITH-ANOTHER-INODE".to_owned());
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
fn contents(path: &[u8], stat: &Stat) -> Result<(u64, String), ManifestError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(at("open", path))?;
    let mut hasher = DefaultHasher::new();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut end = 0;
    if stat.st_size > 0 {
        while let Some(start) = data_from(&file, end).map_err(at("seek data in", path))? {
            end = seek(&file, SeekFrom::Hole(start)).map_err(at("seek a hole in", path))?;
            digest(&file, start, end, &mut hasher).map_err(at("read", path))?;
            let units = (start / UNIT, end.div_ceil(UNIT));
            match ranges.last_mut() {
                Some(last) if last.1 >= units.0 => last.1 = units.1,
                _ => ranges.push(units),
            }
        }
    }
    let mut text = String::new();
    for (start, end) in &ranges {
        let comma = if text.is_empty() { "" } else { "," };
        // Writing to a string cannot fail.
        let _ = write!(text, "{comma}{start}-{end}");
    }
    Ok((
        hasher.finish(),
        if text.is_empty() {
            "none".to_owned()
        } else {
            text
        },
    ))
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
fn xattrs(path: &[u8]) -> Result<Vec<(String, Vec<u8>)>, ManifestError> {
    let mut buffer = vec![0; 64 << 10];
    let len = match llistxattr(path, &mut buffer[..]) {
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
    for name in names {
        let len =
            lgetxattr(path, &name, &mut buffer[..]).map_err(at("read an attribute of", path))?;
        found.push((name, buffer[..len].to_vec()));
    }
    Ok(found)
}
