//! rename(2): what it replaces, what it refuses, what stays.

use rustix::fs::{
    FileType, OFlags, fstat, link, lstat, mkdir, openat, rename, rmdir, stat, symlink, unlink,
};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::{ALICE, Gate, start};
use crate::verdict::*;

checks![
    a_file_moves_with_its_inode,
    a_file_replaces_a_file,
    a_directory_replaces_an_empty_directory,
    a_directory_over_a_full_one_is_enotempty,
    a_file_over_a_directory_is_eisdir,
    a_directory_over_a_file_is_enotdir,
    a_directory_cannot_move_into_itself,
    two_names_of_one_inode_both_stay,
    a_name_onto_itself_changes_nothing,
    a_missing_end_is_enoent,
    a_file_as_parent_is_enotdir,
    dot_and_dot_dot_are_refused,
    a_trailing_slash_wants_a_directory,
    a_symbolic_link_moves_itself,
    a_symbolic_link_is_replaced_not_followed,
    another_file_system_is_exdev,
    every_kind_of_file_moves,
    a_moved_directory_has_a_new_parent,
    both_directories_get_new_times,
    both_directories_must_be_writable,
    a_directory_that_changes_parents_must_be_writable,
    an_open_file_moves_along,
    an_open_directory_moves_along,
    a_replaced_open_file_lives_on,
    a_name_that_is_replaced_is_never_missing,
    a_case_change_is_a_new_name,
];

fn a_file_moves_with_its_inode() -> Verdict {
    put("a", b"x")?;
    open_directory("d")?;
    let before = inode("a")?;
    rename("a", "d/b")?;
    equal("inode", inode("d/b")?, before)?;
    equal("contents", contents("d/b")?, b"x".to_vec())?;
    fails("old name", lstat("a"), Errno::NOENT)?;
    equal("names", names("d")?, vec!["b".to_owned()])
}

fn a_file_replaces_a_file() -> Verdict {
    put("a", b"new")?;
    put("b", b"old")?;
    link("b", "other")?;
    rename("a", "b")?;
    equal("contents", contents("b")?, b"new".to_vec())?;
    equal("links of the replaced inode", links("other")?, 1)?;
    equal(
        "names",
        names(".")?,
        vec!["b".to_owned(), "other".to_owned()],
    )
}

fn a_directory_replaces_an_empty_directory() -> Verdict {
    open_directory("a")?;
    touch("a/f")?;
    open_directory("b")?;
    rename("a", "b")?;
    equal("names", names("b")?, vec!["f".to_owned()])?;
    fails("old name", lstat("a"), Errno::NOENT)
}

fn a_directory_over_a_full_one_is_enotempty() -> Verdict {
    open_directory("a")?;
    open_directory("b")?;
    touch("b/f")?;
    fails_with_one_of("rename", rename("a", "b"), &[Errno::NOTEMPTY, Errno::EXIST])?;
    equal("names", names("b")?, vec!["f".to_owned()])
}

fn a_file_over_a_directory_is_eisdir() -> Verdict {
    touch("f")?;
    symlink("x", "s")?;
    open_directory("d")?;
    fails("file", rename("f", "d"), Errno::ISDIR)?;
    fails("symlink", rename("s", "d"), Errno::ISDIR)
}

fn a_directory_over_a_file_is_enotdir() -> Verdict {
    open_directory("d")?;
    touch("f")?;
    symlink("d", "s")?;
    fails("file", rename("d", "f"), Errno::NOTDIR)?;
    fails("symlink", rename("d", "s"), Errno::NOTDIR)
}

fn a_directory_cannot_move_into_itself() -> Verdict {
    mkdir("d", mode(0o755))?;
    mkdir("d/e", mode(0o755))?;
    fails("child", rename("d", "d/x"), Errno::INVAL)?;
    fails("grandchild", rename("d", "d/e/x"), Errno::INVAL)?;
    fails_with_one_of(
        "parent",
        rename("d/e", "d"),
        &[Errno::NOTEMPTY, Errno::EXIST],
    )
}

fn two_names_of_one_inode_both_stay() -> Verdict {
    touch("a")?;
    link("a", "b")?;
    rename("a", "b")?;
    equal("names", names(".")?, vec!["a".to_owned(), "b".to_owned()])?;
    equal("links", links("a")?, 2)
}

fn a_name_onto_itself_changes_nothing() -> Verdict {
    put("f", b"x")?;
    open_directory("d")?;
    rename("f", "f")?;
    rename("d", "d")?;
    equal("contents", contents("f")?, b"x".to_vec())?;
    equal("links of d", links("d")?, 2)
}

fn a_missing_end_is_enoent() -> Verdict {
    touch("f")?;
    fails("from", rename("missing", "x"), Errno::NOENT)?;
    fails("to", rename("f", "missing/x"), Errno::NOENT)?;
    fails("from nothing", rename("", "x"), Errno::NOENT)?;
    fails("to nothing", rename("f", ""), Errno::NOENT)
}

fn a_file_as_parent_is_enotdir() -> Verdict {
    touch("f")?;
    touch("g")?;
    fails("from", rename("f/x", "y"), Errno::NOTDIR)?;
    fails("to", rename("f", "g/x"), Errno::NOTDIR)
}

fn dot_and_dot_dot_are_refused() -> Verdict {
    open_directory("d")?;
    open_directory("d/e")?;
    for (from, to) in [
        ("d/.", "x"),
        ("d/e/..", "x"),
        ("d/e", "d/."),
        ("d/e", "d/e/.."),
    ] {
        fails_with_one_of(
            &format!("{from} to {to}"),
            rename(from, to),
            &[Errno::BUSY, Errno::INVAL],
        )?;
    }
    Ok(())
}

fn a_trailing_slash_wants_a_directory() -> Verdict {
    touch("f")?;
    open_directory("d")?;
    fails("from f/", rename("f/", "x"), Errno::NOTDIR)?;
    fails("to x/", rename("f", "x/"), Errno::NOTDIR)?;
    rename("d", "e/")?;
    equal("type", kind("e")?, FileType::Directory)
}

fn a_symbolic_link_moves_itself() -> Verdict {
    touch("f")?;
    symlink("f", "s")?;
    rename("s", "t")?;
    equal("type", kind("t")?, FileType::Symlink)?;
    equal("type of the target", kind("f")?, FileType::RegularFile)
}

fn a_symbolic_link_is_replaced_not_followed() -> Verdict {
    put("f", b"target")?;
    symlink("f", "s")?;
    put("g", b"new")?;
    rename("g", "s")?;
    equal("type", kind("s")?, FileType::RegularFile)?;
    equal("contents of the target", contents("f")?, b"target".to_vec())
}

fn another_file_system_is_exdev() -> Verdict {
    touch("f")?;
    fails(
        "rename",
        rename("f", "/dev/shm/posix-check-rename"),
        Errno::XDEV,
    )?;
    equal("names", names(".")?, vec!["f".to_owned()])
}

fn every_kind_of_file_moves() -> Verdict {
    for (name, wanted) in [
        ("fifo", FileType::Fifo),
        ("socket", FileType::Socket),
        ("char", FileType::CharacterDevice),
    ] {
        node(name, wanted, 0o640, 0)?;
        let to = format!("{name}-moved");
        rename(name, &*to)?;
        equal(name, kind(&to)?, wanted)?;
    }
    Ok(())
}

fn a_moved_directory_has_a_new_parent() -> Verdict {
    open_directory("a")?;
    open_directory("b")?;
    open_directory("a/d")?;
    touch("a/d/f")?;
    rename("a/d", "b/d")?;
    equal("links of the old parent", links("a")?, 2)?;
    equal("links of the new parent", links("b")?, 3)?;
    equal("inode of ..", stat("b/d/..")?.st_ino, inode("b")?)?;
    equal("names", names("b/d")?, vec!["f".to_owned()])
}

fn both_directories_get_new_times() -> Verdict {
    open_directory("a")?;
    open_directory("b")?;
    touch("a/f")?;
    let before = (lstat("a")?, lstat("b")?, lstat("a/f")?);
    tick()?;
    rename("a/f", "b/f")?;
    holds(
        "the old directory's time moved",
        modified(&lstat("a")?) > modified(&before.0),
    )?;
    holds(
        "the new directory's time moved",
        modified(&lstat("b")?) > modified(&before.1),
    )?;
    holds(
        "the file's change time moved",
        changed(&lstat("b/f")?) > changed(&before.2),
    )?;
    equal(
        "the file's modification time",
        modified(&lstat("b/f")?),
        modified(&before.2),
    )
}

fn both_directories_must_be_writable() -> Verdict {
    open_directory("open")?;
    directory("shut", 0o755)?;
    touch("open/f")?;
    touch("shut/g")?;
    ALICE.run(|| {
        fails("to", rename("open/f", "shut/f"), Errno::ACCESS)?;
        fails("from", rename("shut/g", "open/g"), Errno::ACCESS)
    })
}

fn a_directory_that_changes_parents_must_be_writable() -> Verdict {
    open_directory("a")?;
    open_directory("b")?;
    directory("a/d", 0o755)?;
    ALICE.run(|| {
        fails("to another parent", rename("a/d", "b/d"), Errno::ACCESS)?;
        Ok(rename("a/d", "a/e")?)
    })
}

fn an_open_file_moves_along() -> Verdict {
    let file = create("a", 0o644)?;
    rename("a", "b")?;
    write_all(&file, b"after")?;
    equal("contents", contents("b")?, b"after".to_vec())?;
    equal("inode", fstat(&file)?.st_ino, inode("b")?)
}

fn an_open_directory_moves_along() -> Verdict {
    open_directory("d")?;
    open_directory("elsewhere")?;
    let d = open_as("d", OFlags::RDONLY | OFlags::DIRECTORY)?;
    rename("d", "elsewhere/e")?;
    openat(&d, "f", OFlags::CREATE | OFlags::WRONLY, mode(0o644))?;
    equal("names", names("elsewhere/e")?, vec!["f".to_owned()])?;
    rustix::fs::statat(&d, "../e/f", rustix::fs::AtFlags::empty())?;
    unlink("elsewhere/e/f")?;
    rmdir("elsewhere/e")?;
    let gone = openat(&d, "g", OFlags::CREATE | OFlags::WRONLY, mode(0o644));
    fails("creation in a removed directory", gone, Errno::NOENT)
}

fn a_replaced_open_file_lives_on() -> Verdict {
    put("old", b"old")?;
    put("new", b"new")?;
    let old = writer("old")?;
    rename("new", "old")?;
    equal("links", fstat(&old)?.st_nlink, 0)?;
    equal(
        "contents of the replaced file",
        read_at(&old, 0, 9)?,
        b"old".to_vec(),
    )?;
    equal("contents by name", contents("old")?, b"new".to_vec())
}

fn a_name_that_is_replaced_is_never_missing() -> Verdict {
    put("f", b"0")?;
    let done = Gate::new()?;
    let reader = start(|| {
        while done.stays_shut(0)? {
            holds("the file has one byte", contents("f")?.len() == 1)?;
        }
        Ok(())
    })?;
    for _ in 0..50 {
        put("next", b"1")?;
        rename("next", "f")?;
    }
    done.open()?;
    reader.join()
}

fn a_case_change_is_a_new_name() -> Verdict {
    touch("name")?;
    rename("name", "Name")?;
    equal("names", names(".")?, vec!["Name".to_owned()])?;
    fails("old name", lstat("name"), Errno::NOENT)
}
