//! Listing directories, and directories that change or go away meanwhile.

use std::collections::HashMap;
use std::mem::MaybeUninit;

use rustix::fs::{
    AtFlags, CWD, FileType, OFlags, RawDir, SeekFrom, fstat, lstat, mkdir, openat, rename, rmdir,
    seek, stat, statat, symlink, unlink,
};
use rustix::io::Errno;
use rustix::process::{chdir, getcwd};

use super::checks;
use crate::act::*;
use crate::peer::start;
use crate::verdict::*;

checks![
    a_listing_has_every_name_once,
    a_listing_tells_types_and_inodes,
    a_listing_begins_with_dot_and_dot_dot,
    a_listing_may_be_resumed_at_any_entry,
    a_listing_can_be_rewound,
    two_descriptors_list_on_their_own,
    everything_can_be_unlinked_while_listing,
    entries_that_stay_are_listed_while_others_come_and_go,
    a_buffer_too_small_for_an_entry_is_einval,
    a_file_cannot_be_listed,
    a_removed_directory_lists_nothing,
    a_new_entry_is_seen_at_once_by_another_process,
    a_removed_current_directory_still_works,
    creation_in_a_removed_directory_is_enoent,
    a_current_directory_follows_a_rename,
    entries_move_the_times_of_their_directory,
    a_directory_descriptor_reaches_its_entries,
];

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

/// An entry with the position after it.
struct Seen {
    name: String,
    kind: FileType,
    ino: u64,
    next: u64,
}

/// What is left to read, `buffer` bytes at a time.
fn seen(directory: impl std::os::fd::AsFd, buffer: usize) -> Result<Vec<Seen>, Errno> {
    let mut buffer = vec![MaybeUninit::uninit(); buffer];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut seen = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let (kind, ino, next) = (entry.file_type(), entry.ino(), entry.next_entry_cookie());
        seen.push(Seen {
            name: entry.file_name().to_string_lossy().into_owned(),
            kind,
            ino,
            next,
        });
    }
    Ok(seen)
}

fn crowd(count: usize) -> Result<Vec<String>, Errno> {
    let mut names: Vec<String> = (0..count).map(|number| format!("entry-{number}")).collect();
    names.iter().try_for_each(|name| touch(name))?;
    names.sort();
    Ok(names)
}

fn a_listing_has_every_name_once() -> Verdict {
    let expected = crowd(400)?;
    equal("all are there", names(".")? == expected, true)
}

fn a_listing_tells_types_and_inodes() -> Verdict {
    touch("file")?;
    open_directory("directory")?;
    symlink("x", "symlink")?;
    node("fifo", FileType::Fifo, 0o644, 0)?;
    node("socket", FileType::Socket, 0o644, 0)?;
    node("char", FileType::CharacterDevice, 0o644, 0)?;
    for entry in seen(open_as(".", DIRECTORY)?, 32 << 10)? {
        if entry.name.starts_with('.') {
            continue;
        }
        equal(
            format!("inode of {}", entry.name),
            entry.ino,
            inode(&entry.name)?,
        )?;
        if entry.kind != FileType::Unknown {
            equal(
                format!("type of {}", entry.name),
                entry.kind,
                kind(&entry.name)?,
            )?;
        }
    }
    Ok(())
}

fn a_listing_begins_with_dot_and_dot_dot() -> Verdict {
    let entries = seen(open_as(".", DIRECTORY)?, 32 << 10)?;
    let mut names: Vec<&str> = entries.iter().map(|entry| &*entry.name).collect();
    names.sort_unstable();
    equal("names of an empty directory", names, vec![".", ".."])?;
    let own = entries
        .iter()
        .find(|entry| entry.name == ".")
        .map(|entry| entry.ino);
    equal("inode of .", own, Some(stat(".")?.st_ino))
}

fn a_listing_may_be_resumed_at_any_entry() -> Verdict {
    crowd(300)?;
    let directory = open_as(".", DIRECTORY)?;
    let all = seen(&directory, 1 << 10)?;
    equal("entries", all.len(), 302)?;
    for index in (0..all.len() - 1).step_by(7) {
        seek(&directory, SeekFrom::Start(all[index].next))?;
        let rest = seen(&directory, 32 << 10)?;
        let expected: Vec<&str> = all[index + 1..].iter().map(|entry| &*entry.name).collect();
        let got: Vec<&str> = rest.iter().map(|entry| &*entry.name).collect();
        equal(format!("the rest after entry {index}"), got, expected)?;
    }
    Ok(())
}

fn a_listing_can_be_rewound() -> Verdict {
    touch("a")?;
    let directory = open_as(".", DIRECTORY)?;
    equal("first", names_of(&directory)?.len(), 1)?;
    touch("b")?;
    unlink("a")?;
    seek(&directory, SeekFrom::Start(0))?;
    equal("second", names_of(&directory)?, vec!["b".to_owned()])
}

fn two_descriptors_list_on_their_own() -> Verdict {
    let expected = crowd(50)?;
    let (one, two) = (open_as(".", DIRECTORY)?, open_as(".", DIRECTORY)?);
    equal("one", names_of(&one)?, expected.clone())?;
    equal("two", names_of(&two)?, expected)?;
    equal("one again, at its end", names_of(&one)?.len(), 0)
}

fn everything_can_be_unlinked_while_listing() -> Verdict {
    crowd(300)?;
    let directory = open_as(".", DIRECTORY)?;
    let mut buffer = vec![MaybeUninit::uninit(); 512];
    let mut entries = RawDir::new(&directory, &mut buffer);
    let mut removed = 0;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !entry.file_name().to_bytes().starts_with(b".") {
            unlink(entry.file_name())?;
            removed += 1;
        }
    }
    equal("removed", removed, 300)?;
    equal("names left", names(".")?.len(), 0)
}

fn entries_that_stay_are_listed_while_others_come_and_go() -> Verdict {
    let staying = crowd(200)?;
    let directory = open_as(".", DIRECTORY)?;
    let mut buffer = vec![MaybeUninit::uninit(); 512];
    let mut entries = RawDir::new(&directory, &mut buffer);
    let (mut counts, mut turn) = (HashMap::<String, usize>::new(), 0);
    while let Some(entry) = entries.next() {
        *counts
            .entry(entry?.file_name().to_string_lossy().into_owned())
            .or_default() += 1;
        turn += 1;
        if turn <= 300 {
            touch(&format!("guest-{turn}"))?;
        }
        if turn > 10 && turn % 3 == 0 {
            // A guest that was made before; it may or may not have been listed.
            let _ = unlink(format!("guest-{}", turn - 5));
        }
    }
    for name in staying {
        equal(
            format!("times that {name} was listed"),
            counts.get(&name).copied(),
            Some(1),
        )?;
    }
    Ok(())
}

fn a_buffer_too_small_for_an_entry_is_einval() -> Verdict {
    touch("a-name-that-does-not-fit-in-forty-bytes")?;
    fails("40 bytes", seen(open_as(".", DIRECTORY)?, 40), Errno::INVAL)
}

fn a_file_cannot_be_listed() -> Verdict {
    touch("f")?;
    fails("getdents", names_of(reader("f")?), Errno::NOTDIR)
}

fn a_removed_directory_lists_nothing() -> Verdict {
    open_directory("d")?;
    let directory = open_as("d", DIRECTORY)?;
    rmdir("d")?;
    match seen(&directory, 4096) {
        // Linux says ENOENT; a directory that was read before may also be at its end.
        Ok(entries) => equal("entries", entries.len(), 0),
        refused => fails("getdents", refused, Errno::NOENT),
    }?;
    // Some file systems keep the count of the last link until the inode goes away, Linux's own do not.
    equal("links", fstat(&directory)?.st_nlink, 0)
}

fn a_new_entry_is_seen_at_once_by_another_process() -> Verdict {
    for number in 0..15 {
        let name = number.to_string();
        // Looked up before, so that the kernel remembers that it is missing.
        fails("before", lstat(&*name), Errno::NOENT)?;
        start(|| Ok(touch(&name)?))?.join()?;
        lstat(&*name)?;
        start(|| Ok(unlink(&*name)?))?.join()?;
        fails("after", lstat(&*name), Errno::NOENT)?;
    }
    Ok(())
}

fn a_removed_current_directory_still_works() -> Verdict {
    open_directory("d")?;
    chdir("d")?;
    rmdir("../d")?;
    fails("getcwd", getcwd(Vec::new()), Errno::NOENT)?;
    equal("links of .", stat(".")?.st_nlink, 0)?;
    fails("creation", touch("f"), Errno::NOENT)?;
    fails("lookup", lstat("f"), Errno::NOENT)?;
    lstat("..")?;
    open_as(".", DIRECTORY)?;
    chdir("..")?;
    getcwd(Vec::new())?;
    Ok(())
}

fn creation_in_a_removed_directory_is_enoent() -> Verdict {
    open_directory("d")?;
    touch("f")?;
    let directory = open_as("d", DIRECTORY)?;
    rmdir("d")?;
    fails(
        "open",
        openat(
            &directory,
            "x",
            OFlags::CREATE | OFlags::WRONLY,
            mode(0o644),
        ),
        Errno::NOENT,
    )?;
    fails(
        "mkdir",
        rustix::fs::mkdirat(&directory, "x", mode(0o755)),
        Errno::NOENT,
    )?;
    fails(
        "symlink",
        rustix::fs::symlinkat("x", &directory, "x"),
        Errno::NOENT,
    )?;
    fails(
        "link",
        rustix::fs::linkat(CWD, "f", &directory, "x", AtFlags::empty()),
        Errno::NOENT,
    )?;
    fails(
        "rename",
        rustix::fs::renameat(CWD, "f", &directory, "x"),
        Errno::NOENT,
    )
}

fn a_current_directory_follows_a_rename() -> Verdict {
    open_directory("d")?;
    open_directory("e")?;
    chdir("d")?;
    rename("../d", "../e/moved")?;
    touch("f")?;
    let cwd = getcwd(Vec::new())?;
    holds(
        "getcwd ends in e/moved",
        cwd.to_bytes().ends_with(b"/e/moved"),
    )?;
    lstat("../../e/moved/f")?;
    Ok(())
}

fn entries_move_the_times_of_their_directory() -> Verdict {
    open_directory("d")?;
    let steps: &[Step] = &[
        ("open", || touch("d/f")),
        ("mkdir", || mkdir("d/d", mode(0o755))),
        ("symlink", || symlink("x", "d/s")),
        ("mknod", || node("d/p", FileType::Fifo, 0o644, 0)),
        ("link", || rustix::fs::link("d/f", "d/g")),
        ("rename", || rename("d/g", "d/h")),
        ("unlink", || unlink("d/h")),
        ("rmdir", || rmdir("d/d")),
    ];
    for (name, step) in steps {
        let before = lstat("d")?;
        tick()?;
        step()?;
        let after = lstat("d")?;
        holds(
            &format!("{name} moved the modification time"),
            modified(&after) > modified(&before),
        )?;
        holds(
            &format!("{name} moved the change time"),
            changed(&after) > changed(&before),
        )?;
    }
    Ok(())
}

fn a_directory_descriptor_reaches_its_entries() -> Verdict {
    open_directory("d")?;
    put("d/f", b"x")?;
    let directory = open_as("d", OFlags::PATH)?;
    equal(
        "size",
        statat(&directory, "f", AtFlags::empty())?.st_size,
        1,
    )?;
    equal(
        "inode",
        statat(&directory, "", AtFlags::EMPTY_PATH)?.st_ino,
        inode("d")?,
    )?;
    rustix::fs::unlinkat(&directory, "f", AtFlags::empty())?;
    fails("gone", lstat("d/f"), Errno::NOENT)
}
