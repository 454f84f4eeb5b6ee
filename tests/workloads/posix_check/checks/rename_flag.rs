//! renameat2(2): RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT.

use rustix::fs::{CWD, FileType, RenameFlags, lstat, renameat_with, stat, symlink};
use rustix::io::{Errno, Result};

use super::checks;
use crate::act::*;
use crate::peer::ALICE;
use crate::verdict::*;

checks![
    no_replace_refuses_an_existing_name,
    no_replace_moves_to_a_free_name,
    exchange_swaps_two_files,
    exchange_swaps_a_file_and_a_full_directory,
    exchange_swaps_directories_of_different_parents,
    exchange_swaps_symbolic_links,
    exchange_wants_both_names,
    exchange_with_an_own_child_is_einval,
    exchange_and_no_replace_exclude_each_other,
    exchange_wants_both_directories_writable,
    whiteout_leaves_a_device_0_0,
    unknown_flags_are_einval,
];

fn with(flags: RenameFlags, from: &str, to: &str) -> Result<()> {
    renameat_with(CWD, from, CWD, to, flags)
}

fn no_replace_refuses_an_existing_name() -> Verdict {
    put("a", b"a")?;
    put("b", b"b")?;
    open_directory("d")?;
    symlink("missing", "s")?;
    for to in ["b", "d", "s"] {
        fails(to, with(RenameFlags::NOREPLACE, "a", to), Errno::EXIST)?;
    }
    equal("contents", contents("b")?, b"b".to_vec())
}

fn no_replace_moves_to_a_free_name() -> Verdict {
    put("a", b"a")?;
    with(RenameFlags::NOREPLACE, "a", "b")?;
    equal("contents", contents("b")?, b"a".to_vec())?;
    equal("names", names(".")?, vec!["b".to_owned()])
}

fn exchange_swaps_two_files() -> Verdict {
    put("a", b"a")?;
    put("b", b"b")?;
    let (a, b) = (inode("a")?, inode("b")?);
    with(RenameFlags::EXCHANGE, "a", "b")?;
    equal("inodes", (inode("a")?, inode("b")?), (b, a))?;
    equal(
        "contents",
        (contents("a")?, contents("b")?),
        (b"b".to_vec(), b"a".to_vec()),
    )
}

fn exchange_swaps_a_file_and_a_full_directory() -> Verdict {
    put("f", b"x")?;
    open_directory("d")?;
    touch("d/g")?;
    with(RenameFlags::EXCHANGE, "f", "d")?;
    equal("names", names("f")?, vec!["g".to_owned()])?;
    equal("contents", contents("d")?, b"x".to_vec())
}

fn exchange_swaps_directories_of_different_parents() -> Verdict {
    for name in ["a", "b", "a/d", "b/e"] {
        open_directory(name)?;
    }
    touch("a/d/in-d")?;
    with(RenameFlags::EXCHANGE, "a/d", "b/e")?;
    equal(
        "names",
        (names("a/d")?.len(), names("b/e")?),
        (0, vec!["in-d".to_owned()]),
    )?;
    equal("inode of b/e/..", stat("b/e/..")?.st_ino, inode("b")?)
}

fn exchange_swaps_symbolic_links() -> Verdict {
    symlink("1", "a")?;
    symlink("2", "b")?;
    with(RenameFlags::EXCHANGE, "a", "b")?;
    equal(
        "target",
        rustix::fs::readlink("a", Vec::new())?.into_bytes(),
        b"2".to_vec(),
    )
}

fn exchange_wants_both_names() -> Verdict {
    touch("a")?;
    fails(
        "to",
        with(RenameFlags::EXCHANGE, "a", "missing"),
        Errno::NOENT,
    )?;
    fails(
        "from",
        with(RenameFlags::EXCHANGE, "missing", "a"),
        Errno::NOENT,
    )
}

fn exchange_with_an_own_child_is_einval() -> Verdict {
    open_directory("d")?;
    open_directory("d/e")?;
    fails(
        "down",
        with(RenameFlags::EXCHANGE, "d", "d/e"),
        Errno::INVAL,
    )?;
    fails("up", with(RenameFlags::EXCHANGE, "d/e", "d"), Errno::INVAL)
}

fn exchange_and_no_replace_exclude_each_other() -> Verdict {
    touch("a")?;
    touch("b")?;
    fails(
        "both",
        with(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE, "a", "b"),
        Errno::INVAL,
    )?;
    fails(
        "whiteout",
        with(RenameFlags::EXCHANGE | RenameFlags::WHITEOUT, "a", "b"),
        Errno::INVAL,
    )
}

fn exchange_wants_both_directories_writable() -> Verdict {
    open_directory("open")?;
    directory("shut", 0o755)?;
    touch("open/f")?;
    touch("shut/g")?;
    ALICE.run(|| {
        fails(
            "exchange",
            with(RenameFlags::EXCHANGE, "open/f", "shut/g"),
            Errno::ACCESS,
        )
    })
}

fn whiteout_leaves_a_device_0_0() -> Verdict {
    put("a", b"x")?;
    with(RenameFlags::WHITEOUT, "a", "b")?;
    equal("contents", contents("b")?, b"x".to_vec())?;
    equal(
        "type of the old name",
        kind("a")?,
        FileType::CharacterDevice,
    )?;
    equal("device of the old name", lstat("a")?.st_rdev, 0)
}

fn unknown_flags_are_einval() -> Verdict {
    touch("a")?;
    fails(
        "flag 64",
        with(RenameFlags::from_bits_retain(64), "a", "b"),
        Errno::INVAL,
    )
}
