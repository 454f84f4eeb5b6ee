//! link(2) and what it does to an inode.

use rustix::fs::{AtFlags, CWD, FileType, OFlags, link, linkat, lstat, symlink, unlink};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::ALICE;
use crate::verdict::*;

checks![
    a_link_is_another_name_of_the_same_inode,
    every_kind_of_file_but_a_directory_can_be_linked,
    a_directory_cannot_be_linked,
    an_existing_name_is_eexist,
    a_missing_end_is_enoent,
    a_file_as_parent_is_enotdir,
    a_link_to_a_symbolic_link_is_the_symbolic_link,
    a_symbolic_link_is_followed_when_asked,
    another_file_system_is_exdev,
    a_descriptor_can_be_linked,
    a_new_name_moves_the_change_time_only,
    a_directory_without_write_permission_is_eacces,
    attributes_and_data_are_shared,
    many_links_are_counted,
];

fn a_link_is_another_name_of_the_same_inode() -> Verdict {
    put("a", b"x")?;
    open_directory("d")?;
    link("a", "d/b")?;
    equal("inode", inode("d/b")?, inode("a")?)?;
    equal("links of a", links("a")?, 2)?;
    equal("links of b", links("d/b")?, 2)?;
    unlink("a")?;
    equal("links", links("d/b")?, 1)?;
    equal("contents", contents("d/b")?, b"x".to_vec())
}

fn every_kind_of_file_but_a_directory_can_be_linked() -> Verdict {
    node("fifo", FileType::Fifo, 0o644, 0)?;
    node("socket", FileType::Socket, 0o644, 0)?;
    node(
        "char",
        FileType::CharacterDevice,
        0o644,
        rustix::fs::makedev(1, 3),
    )?;
    symlink("nowhere", "symlink")?;
    for name in ["fifo", "socket", "char", "symlink"] {
        let other = format!("{name}-2");
        link(name, &*other)?;
        equal(format!("inode of {name}"), inode(&other)?, inode(name)?)?;
        equal(format!("links of {name}"), links(name)?, 2)?;
    }
    Ok(())
}

fn a_directory_cannot_be_linked() -> Verdict {
    open_directory("d")?;
    fails("link", link("d", "e"), Errno::PERM)
}

fn an_existing_name_is_eexist() -> Verdict {
    touch("a")?;
    touch("file")?;
    open_directory("directory")?;
    symlink("missing", "dangling")?;
    for name in ["a", "file", "directory", "dangling"] {
        fails(name, link("a", name), Errno::EXIST)?;
    }
    equal("links", links("a")?, 1)
}

fn a_missing_end_is_enoent() -> Verdict {
    touch("a")?;
    fails("from", link("missing", "b"), Errno::NOENT)?;
    fails("to", link("a", "missing/b"), Errno::NOENT)?;
    fails("to nothing", link("a", ""), Errno::NOENT)
}

fn a_file_as_parent_is_enotdir() -> Verdict {
    touch("a")?;
    fails("from", link("a/x", "b"), Errno::NOTDIR)?;
    fails("to", link("a", "a/b"), Errno::NOTDIR)
}

fn a_link_to_a_symbolic_link_is_the_symbolic_link() -> Verdict {
    touch("f")?;
    symlink("f", "s")?;
    link("s", "t")?;
    equal("type", kind("t")?, FileType::Symlink)?;
    equal("links of f", links("f")?, 1)
}

fn a_symbolic_link_is_followed_when_asked() -> Verdict {
    touch("f")?;
    symlink("f", "s")?;
    linkat(CWD, "s", CWD, "t", AtFlags::SYMLINK_FOLLOW)?;
    equal("inode", inode("t")?, inode("f")?)
}

fn another_file_system_is_exdev() -> Verdict {
    touch("f")?;
    fails("link", link("f", "/dev/shm/posix-check-link"), Errno::XDEV)
}

fn a_descriptor_can_be_linked() -> Verdict {
    put("f", b"x")?;
    let file = open_as("f", OFlags::PATH)?;
    linkat(&file, "", CWD, "by-descriptor", AtFlags::EMPTY_PATH)?;
    let by_proc = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    linkat(CWD, &*by_proc, CWD, "by-proc", AtFlags::SYMLINK_FOLLOW)?;
    equal("links", links("f")?, 3)?;
    equal("contents", contents("by-descriptor")?, b"x".to_vec())
}

fn a_new_name_moves_the_change_time_only() -> Verdict {
    touch("f")?;
    let before = lstat("f")?;
    tick()?;
    link("f", "g")?;
    let after = lstat("f")?;
    equal("modification time", modified(&after), modified(&before))?;
    holds("the change time moved", changed(&after) > changed(&before))
}

fn a_directory_without_write_permission_is_eacces() -> Verdict {
    directory("d", 0o755)?;
    touch("f")?;
    ALICE.own("f")?;
    ALICE.run(|| fails("link", link("f", "d/g"), Errno::ACCESS))
}

fn attributes_and_data_are_shared() -> Verdict {
    put("a", b"old")?;
    link("a", "b")?;
    write_all(open_as("b", OFlags::WRONLY | OFlags::TRUNC)?, b"newer")?;
    equal("contents", contents("a")?, b"newer".to_vec())?;
    equal("size", lstat("a")?.st_size, 5)?;
    set_bits("a", 0o4711)?;
    equal_bits("mode", bits("b")?, 0o4711)?;
    give("b", 7, 8)?;
    equal("owner", owner("a")?, (7, 8))
}

fn many_links_are_counted() -> Verdict {
    touch("f")?;
    for number in 0..300 {
        link("f", format!("{number}"))?;
    }
    equal("links", links("299")?, 301)
}
