//! Removal of a directory with all that is in it, which follows no symbolic link and crosses no mount point.

use std::{os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, ResolveFlags, openat2, unlinkat},
    io::Errno,
};

use super::{DIR_FLAGS, StateError, io_error, open_dir};

pub(super) fn remove_tree(path: &Path) -> Result<(), StateError> {
    let dir = match open_dir(path) {
        Ok(dir) => dir,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(io_error("open", path, errno)),
    };
    empty(&dir, path)?;
    match unlinkat(CWD, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(removal_error(path, errno)),
    }
}

/// Removes what is in a directory, without ever following a symbolic link or a mount.
fn empty(dir: &OwnedFd, path: &Path) -> Result<(), StateError> {
    let listing = Dir::read_from(dir).map_err(|errno| io_error("list", path, errno))?;
    for entry in listing {
        let entry = entry.map_err(|errno| io_error("list", path, errno))?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let below = path.join(name.to_string_lossy().as_ref());
        let mut flags = AtFlags::empty();
        if entry.file_type() == FileType::Directory {
            let inside = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV;
            let child = openat2(dir, name, DIR_FLAGS, Mode::empty(), inside)
                .map_err(|errno| removal_error(&below, errno))?;
            empty(&child, &below)?;
            flags = AtFlags::REMOVEDIR;
        }
        match unlinkat(dir, name, flags) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(removal_error(&below, errno)),
        }
    }
    Ok(())
}

fn removal_error(path: &Path, errno: Errno) -> StateError {
    match errno {
        Errno::XDEV | Errno::BUSY => StateError::Mounted { path: path.into() },
        other => io_error("remove", path, other),
    }
}
