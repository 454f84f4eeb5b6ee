//! File trees: a manifest that two sides can compare, and a tree with everything a file system can hold.
//!
//! The same code runs on the host and, as the program `probe`, in the container.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Timespec, Timestamps, chownat, lgetxattr, llistxattr, lsetxattr, utimensat,
};
use rustix::fs::{CWD, FileType, Gid, Uid, XattrFlags, makedev, mknodat};

/// Entries of a made tree that are in one directory.
const PER_DIRECTORY: usize = 500;

/// One line for each entry below `root`, sorted by path: type, mode, owner, size or device, link count, times of
/// modification, all extended attributes with their values (access-control lists are among them), and the content.
pub fn manifest(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    list(root, root, &mut lines);
    lines.sort();
    lines
}

fn list(root: &Path, path: &Path, lines: &mut Vec<String>) {
    let line = describe(root, path).unwrap_or_else(|e| format!("{}: {e}", path.display()));
    lines.push(line);
    if path
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.is_dir())
    {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            list(root, &entry.path(), lines);
        }
    }
}

fn describe(root: &Path, path: &Path) -> io::Result<String> {
    let metadata = fs::symlink_metadata(path)?;
    let kind = metadata.file_type();
    let name = path.strip_prefix(root).unwrap_or(path).as_os_str();
    let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
    let mut line = format!("{name:?} {mode:o} {uid}:{gid} x{}", metadata.nlink());
    if kind.is_char_device() || kind.is_block_device() {
        let _ = write!(line, " dev {:x}", metadata.rdev());
    }
    // Directory sizes belong to the file system, not to the tree.
    if !kind.is_dir() {
        let _ = write!(line, " {} bytes", metadata.size());
    }
    let _ = write!(line, " {}.{:09}", metadata.mtime(), metadata.mtime_nsec());
    if kind.is_symlink() {
        let _ = write!(line, " -> {:?}", fs::read_link(path)?);
    }
    if kind.is_file() {
        let _ = write!(line, " #{:016x}", digest(&fs::read(path)?));
    }
    for (name, value) in attributes(path)? {
        let _ = write!(line, " {name}={:016x}", digest(&value));
    }
    Ok(line)
}

/// Not a cryptographic digest: nobody here cheats.
fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

fn attributes(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; 64 << 10];
    let length = llistxattr(path, &mut names)?;
    let mut found = Vec::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 64 << 10];
        let length = lgetxattr(path, name, &mut value)?;
        value.truncate(length);
        found.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    found.sort();
    Ok(found)
}

/// Makes a tree of `count` entries below `root` (which exists): every type, mode, many owners, extended attributes,
/// access-control lists, hard links, symbolic links, sparse files, odd names.
pub fn make(root: &Path, count: usize) -> io::Result<()> {
    let mut dir = PathBuf::new();
    let mut dirs = Vec::new();
    for index in 0..count {
        if index % PER_DIRECTORY == 0 {
            dir = root.join(format!("d{}", index / PER_DIRECTORY));
            fs::create_dir(&dir)?;
            dirs.push(dir.clone());
            continue;
        }
        let path = dir.join(format!("{index}"));
        entry(&path, &dir, index)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    }
    // Last, because entries change them.
    dirs.iter()
        .enumerate()
        .try_for_each(|(index, dir)| dress(dir, index))
}

/// The `index`th entry; its kind repeats every 16.
fn entry(path: &Path, dir: &Path, index: usize) -> io::Result<()> {
    match index % 16 {
        1 => fs::create_dir(path)?,
        2 => symlink(format!("target of {index}"), path)?,
        3 => fs::hard_link(dir.join((index - 3).to_string()), path)
            .or_else(|_| fs::write(path, "nothing to link to"))?,
        4 => node(path, FileType::Fifo, 0)?,
        5 => node(path, FileType::Socket, 0)?,
        6 => node(path, FileType::CharacterDevice, makedev(1, 3))?,
        7 => node(path, FileType::BlockDevice, makedev(7, 200))?,
        8 => sparse(path, index)?,
        9 => return odd_name(dir, index),
        _ => fs::write(
            path,
            vec![b'a' + u8::try_from(index % 26).unwrap_or(0); index % 9000],
        )?,
    }
    if index % 16 == 3 {
        Ok(())
    } else {
        dress(path, index)
    }
}

fn node(path: &Path, kind: FileType, device: u64) -> io::Result<()> {
    Ok(mknodat(CWD, path, kind, 0o600.into(), device)?)
}

fn sparse(path: &Path, index: usize) -> io::Result<()> {
    let file = File::create(path)?;
    std::os::unix::fs::FileExt::write_at(&file, b"end", (index as u64 % 64) << 16)?;
    file.set_len(((index as u64 % 64) << 16) + 100_000)
}

fn odd_name(dir: &Path, index: usize) -> io::Result<()> {
    let mut name = format!("{index} \t\n*'\"\\").into_bytes();
    name.push(0xff);
    name.resize(60 + index % 195, b'x');
    fs::write(dir.join(std::ffi::OsStr::from_bytes(&name)), "odd")
}

/// Owner, attributes, access-control list, mode and time of one entry.
fn dress(path: &Path, index: usize) -> io::Result<()> {
    let number = u32::try_from(index).map_err(io::Error::other)?;
    let metadata = fs::symlink_metadata(path)?;
    let kind = metadata.file_type();
    let (uid, gid) = (
        Uid::from_raw(number % 7 * 1000),
        Gid::from_raw(number % 5 * 999),
    );
    chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !kind.is_symlink() {
        fs::set_permissions(path, fs::Permissions::from_mode(number % 0o10000))?;
    }
    if kind.is_file() || kind.is_dir() {
        if index.is_multiple_of(3) {
            lsetxattr(
                path,
                "user.number",
                index.to_string().as_bytes(),
                XattrFlags::empty(),
            )?;
            lsetxattr(
                path,
                "user.long",
                &vec![b'v'; index % 1500],
                XattrFlags::empty(),
            )?;
        }
        if index.is_multiple_of(4) {
            lsetxattr(
                path,
                "system.posix_acl_access",
                &access_list(number),
                XattrFlags::empty(),
            )?;
        }
        if kind.is_dir() && index.is_multiple_of(2) {
            lsetxattr(
                path,
                "system.posix_acl_default",
                &access_list(number),
                XattrFlags::empty(),
            )?;
        }
    }
    if kind.is_file() && index % 32 == 10 {
        lsetxattr(path, "security.capability", CAPABILITY, XattrFlags::empty())?;
    }
    let time = Timespec {
        tv_sec: 1_000_000_000 + i64::from(number),
        tv_nsec: i64::from(number),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// `cap_net_raw+ep`, revision 2 (linux/capability.h).
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An access-control list with one named user and one named group (linux/posix_acl_xattr.h).
pub fn access_list(number: u32) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries = [
        (0x01, 7, NOBODY),
        (0x02, 5, 1000 + number % 9),
        (0x04, 5, NOBODY),
        (0x08, 6, 2000 + number % 9),
        (0x10, 7, NOBODY),
        (0x20, 4, NOBODY),
    ];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&u16::to_le_bytes(tag));
        bytes.extend_from_slice(&u16::to_le_bytes(permissions));
        bytes.extend_from_slice(&u32::to_le_bytes(id));
    }
    bytes
}
