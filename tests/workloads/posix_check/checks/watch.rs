//! inotify(7) events for changes made by processes of the same kernel.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use rustix::fs::{OFlags, mkdir, rename, rmdir, symlink, unlink};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::start;
use crate::sys;
use crate::verdict::*;

checks![
    creation_and_removal_are_told,
    writing_and_closing_are_told,
    a_rename_is_told_as_a_pair,
    attributes_are_told,
    a_watched_file_tells_its_own_end,
    another_processs_change_is_told,
    truncation_is_told,
    a_watch_follows_a_renamed_directory,
];

fn watch(path: &str) -> Result<OwnedFd, Errno> {
    let watcher = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    add_watch(&watcher, path, WatchFlags::ALL_EVENTS)?;
    Ok(watcher)
}

/// An event: what, its cookie, and the name in a watched directory.
type Event = (ReadFlags, u32, String);

/// The events so far but those for opening, reading and closing what was only read.
fn events(watcher: &OwnedFd) -> Result<Vec<Event>, Errno> {
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut reader = Reader::new(watcher, &mut buffer);
    let mut events = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => {
                let name = event
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default();
                let quiet = ReadFlags::OPEN | ReadFlags::ACCESS | ReadFlags::CLOSE_NOWRITE;
                if !event.events().intersects(quiet) {
                    events.push((event.events(), event.cookie(), name));
                }
            }
            Err(Errno::AGAIN) => return Ok(events),
            Err(errno) => return Err(errno),
        }
    }
}

/// The events without cookies.
fn told(watcher: &OwnedFd) -> Result<Vec<(ReadFlags, String)>, Errno> {
    Ok(events(watcher)?
        .into_iter()
        .map(|(flags, _, name)| (flags, name))
        .collect())
}

fn named(flags: ReadFlags, name: &str) -> (ReadFlags, String) {
    (flags, name.to_owned())
}

fn creation_and_removal_are_told() -> Verdict {
    open_directory("d")?;
    let watcher = watch("d")?;
    mkdir("d/e", mode(0o755))?;
    symlink("x", "d/s")?;
    unlink("d/s")?;
    rmdir("d/e")?;
    let expected = vec![
        named(ReadFlags::CREATE | ReadFlags::ISDIR, "e"),
        named(ReadFlags::CREATE, "s"),
        named(ReadFlags::DELETE, "s"),
        named(ReadFlags::DELETE | ReadFlags::ISDIR, "e"),
    ];
    equal("events", told(&watcher)?, expected)
}

fn writing_and_closing_are_told() -> Verdict {
    open_directory("d")?;
    let watcher = watch("d")?;
    put("d/f", b"x")?;
    let expected = vec![
        named(ReadFlags::CREATE, "f"),
        named(ReadFlags::MODIFY, "f"),
        named(ReadFlags::CLOSE_WRITE, "f"),
    ];
    equal("events", told(&watcher)?, expected)
}

fn a_rename_is_told_as_a_pair() -> Verdict {
    open_directory("d")?;
    touch("d/a")?;
    let watcher = watch("d")?;
    rename("d/a", "d/b")?;
    let events = events(&watcher)?;
    let flags: Vec<_> = events
        .iter()
        .map(|(flags, _, name)| (*flags, &**name))
        .collect();
    equal(
        "events",
        flags,
        vec![(ReadFlags::MOVED_FROM, "a"), (ReadFlags::MOVED_TO, "b")],
    )?;
    holds(
        "the cookies are one",
        events[0].1 == events[1].1 && events[0].1 != 0,
    )
}

fn attributes_are_told() -> Verdict {
    open_directory("d")?;
    touch("d/f")?;
    let watcher = watch("d")?;
    set_bits("d/f", 0o600)?;
    set_times("d/f", (1, 1), (1, 1))?;
    give("d/f", 1, 1)?;
    equal(
        "events",
        told(&watcher)?,
        vec![named(ReadFlags::ATTRIB, "f"); 1],
    )
}

fn a_watched_file_tells_its_own_end() -> Verdict {
    touch("f")?;
    let watcher = watch("f")?;
    unlink("f")?;
    let expected = vec![
        named(ReadFlags::ATTRIB, ""),
        named(ReadFlags::DELETE_SELF, ""),
        named(ReadFlags::IGNORED, ""),
    ];
    equal("events", told(&watcher)?, expected)
}

fn another_processs_change_is_told() -> Verdict {
    open_directory("d")?;
    let watcher = watch("d")?;
    start(|| Ok(touch("d/f")?))?.join()?;
    equal(
        "events",
        told(&watcher)?,
        vec![
            named(ReadFlags::CREATE, "f"),
            named(ReadFlags::CLOSE_WRITE, "f"),
        ],
    )
}

fn truncation_is_told() -> Verdict {
    put("f", b"abc")?;
    let watcher = watch("f")?;
    sys::truncate("f", 1)?;
    equal(
        "truncate",
        told(&watcher)?,
        vec![named(ReadFlags::MODIFY, "")],
    )?;
    open_as("f", OFlags::WRONLY | OFlags::TRUNC)?;
    equal(
        "O_TRUNC",
        told(&watcher)?,
        vec![
            named(ReadFlags::MODIFY, ""),
            named(ReadFlags::CLOSE_WRITE, ""),
        ],
    )
}

fn a_watch_follows_a_renamed_directory() -> Verdict {
    open_directory("d")?;
    let watcher = watch("d")?;
    rename("d", "e")?;
    mkdir("e/x", mode(0o755))?;
    let expected = vec![
        named(ReadFlags::MOVE_SELF, ""),
        named(ReadFlags::CREATE | ReadFlags::ISDIR, "x"),
    ];
    equal("events", told(&watcher)?, expected)
}
