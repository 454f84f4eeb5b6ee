//! What a volume's directory on the host lists.
//!
//! Contract: a directory is read as a whole and without following anything. What is taken of it is bounded: names and
//! targets beyond the room that there is are left out, which is said; those that begin with two dots, by which all the
//! others are reached, come first.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use caisson_agent_api::{Link, Volume};
use rustix::{
    fs::{AtFlags, Dir, DirEntry, FileType, readlinkat, statat},
    io::Errno,
};

/// What a name takes in a message beside its bytes, at most.
const EACH: usize = 16;

/// The link to the directory with the files.
const DATA: &CStr = c"..data";

/// How often a directory that is being changed is read again.
const ATTEMPTS: usize = 3;

/// The most names that begin with two dots. The kubelet's writer has three.
const HIDDEN: usize = 1024;

/// A directory as it was read.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub(super) listing: Volume,
    /// There is more in it than directories and links.
    pub(super) has_others: bool,
    /// There was no room for all of it.
    pub(super) is_cut: bool,
    /// How much of the room it takes.
    pub(super) bytes: usize,
    hidden: usize,
}

impl Listed {
    /// Whether there is room for an entry, which is taken then.
    fn takes(&mut self, name: &[u8], target: &[u8], room: usize) -> bool {
        let bytes = name.len() + target.len() + EACH;
        let is_hidden = name.starts_with(b"..");
        let fits = if is_hidden {
            self.hidden < HIDDEN
        } else {
            self.bytes + bytes <= room
        };
        if fits {
            self.bytes += bytes;
            self.hidden += usize::from(is_hidden);
        }
        self.is_cut |= !fits;
        fits
    }

    fn take_link(&mut self, dir: BorrowedFd<'_>, name: &CStr, room: usize) -> io::Result<()> {
        match readlinkat(dir, name, Vec::new()) {
            Ok(target) if self.takes(name.to_bytes(), target.as_bytes(), room) => {
                self.listing.links.push(Link {
                    name: name.to_bytes().to_vec(),
                    target: target.into_bytes(),
                    ..Default::default()
                });
                Ok(())
            }
            // It has gone, or has become something else: more is to be told soon.
            Ok(_) | Err(Errno::NOENT | Errno::INVAL) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether `..data` leads to a directory that was not there yet.
    fn is_torn(&self) -> bool {
        let is_data = |link: &&Link| link.name == DATA.to_bytes();
        let data = self.listing.links.iter().find(is_data);
        data.is_some_and(|data| !self.listing.directories.contains(&data.target))
    }
}

/// Reads a directory, for which there is so much room, in bytes. While it is being changed that may take several times:
/// what was changed before its `..data` is not missing when that is new.
pub(super) fn list(dir: impl AsFd, number: u32, room: usize) -> io::Result<Listed> {
    let dir = dir.as_fd();
    let mut listed = list_once(dir, number, room)?;
    for _ in 0..ATTEMPTS {
        if !listed.is_torn() {
            break;
        }
        listed = list_once(dir, number, room)?;
    }
    // Whatever is missing even now makes for another notice.
    Ok(listed)
}

fn list_once(dir: BorrowedFd<'_>, number: u32, room: usize) -> io::Result<Listed> {
    let mut listed = Listed::default();
    listed.listing.number = number;
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") || name == DATA || name == c"..data_tmp" {
            continue;
        }
        match kind(dir, &entry)? {
            Some(FileType::Directory) if listed.takes(name.to_bytes(), b"", room) => {
                listed.listing.directories.push(name.to_bytes().to_vec());
            }
            Some(FileType::Symlink) => listed.take_link(dir, name, room)?,
            None | Some(FileType::Directory) => {}
            Some(_) => listed.has_others = true,
        }
    }
    // Last: it changes before the keys do.
    listed.take_link(dir, DATA, room)?;
    let Volume {
        directories, links, ..
    } = &mut listed.listing;
    directories.sort_unstable();
    links.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(listed)
}

/// What an entry is; `None` if it is gone.
fn kind(dir: BorrowedFd<'_>, entry: &DirEntry) -> io::Result<Option<FileType>> {
    match entry.file_type() {
        // Not every file system says.
        FileType::Unknown => match statat(dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        },
        known => Ok(Some(known)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::symlink,
        path::Path,
    };

    use super::*;

    fn listed(dir: &Path, room: usize) -> Listed {
        list(File::open(dir).unwrap(), 3, room).unwrap()
    }

    fn names(listing: &Volume) -> Vec<String> {
        let links = listing.links.iter().map(|link| &link.name);
        let all = listing.directories.iter().chain(links);
        all.map(|name| String::from_utf8(name.clone()).unwrap())
            .collect()
    }

    #[test]
    fn directories_and_links_are_listed_by_name_with_their_targets() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..2")).unwrap();
        for (target, name) in [
            ("..2", "..data"),
            ("..3", "..data_tmp"),
            ("..data/b", "b"),
            ("..data/a", "a"),
        ] {
            symlink(target, dir.path().join(name)).unwrap();
        }
        let whole = listed(dir.path(), 1000);
        assert!(!whole.has_others && !whole.is_cut);
        assert_eq!(whole.listing.number, 3);
        assert_eq!(names(&whole.listing), ["..2", "..data", "a", "b"]);
        assert_eq!(whole.listing.links[0].target, b"..2");
        File::create(dir.path().join("plain")).unwrap();
        assert!(listed(dir.path(), 1000).has_others);
    }

    #[test]
    fn what_there_is_no_room_for_is_left_out_but_for_the_way_to_the_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..2")).unwrap();
        symlink("..2", dir.path().join("..data")).unwrap();
        for key in 0..100 {
            symlink("..data/k", dir.path().join(format!("key{key:03}"))).unwrap();
        }
        let cut = listed(dir.path(), 400);
        assert!(cut.is_cut && cut.bytes <= 400 + 100);
        let kept = names(&cut.listing);
        assert!(kept.len() < 20, "{kept:?}");
        assert_eq!(kept[..2], ["..2", "..data"]);
        assert!(!listed(dir.path(), 10_000).is_cut);
    }

    #[test]
    fn five_thousand_keys_fit() {
        let dir = tempfile::tempdir().unwrap();
        for key in 0..5_000 {
            let name = format!("a-key-with-a-name-of-usual-length-{key}");
            symlink(format!("..data/{name}"), dir.path().join(name)).unwrap();
        }
        let whole = listed(dir.path(), super::super::ROOM);
        assert!(!whole.is_cut);
        assert_eq!(whole.listing.links.len(), 5_000);
    }
}
