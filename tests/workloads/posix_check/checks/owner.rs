//! chmod, chown, whom new files belong to, and when set-id bits and file capabilities are lost.

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Gid, OFlags, Uid, XattrFlags, chown, chownat, fallocate, fchmod,
    fchown, fstat, ftruncate, getxattr, lstat, mkdir, setxattr, symlink,
};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::checks;
use crate::act::*;
use crate::peer::{ALICE, ALICE_IN_CREW, CREW, root_without};
use crate::sys;
use crate::verdict::*;

checks![
    every_mode_bit_can_be_set,
    modes_of_open_files_can_be_set,
    only_the_owner_may_change_the_mode,
    a_stranger_to_the_group_cannot_set_its_id_bit,
    chmod_follows_links_and_moves_the_change_time,
    owners_can_be_set_together_and_alone,
    the_largest_ids_survive,
    a_links_owner_is_its_own,
    only_root_gives_files_away,
    the_owner_may_choose_among_own_groups,
    chown_clears_set_id_bits,
    chown_keeps_the_bits_of_directories,
    a_users_write_clears_set_id_bits,
    roots_write_keeps_set_id_bits,
    a_users_truncation_clears_set_id_bits,
    a_users_allocation_clears_set_id_bits,
    a_write_without_fsetid_clears_set_id_bits,
    a_group_bit_without_execution_is_kept,
    writing_removes_file_capabilities,
    truncation_removes_file_capabilities,
    chown_removes_file_capabilities,
    new_files_belong_to_their_maker,
    a_set_group_id_directory_hands_its_group_down,
    a_stranger_gets_no_set_group_id_file,
];

fn every_mode_bit_can_be_set() -> Verdict {
    touch("f")?;
    open_directory("d")?;
    for bit in 0..12 {
        set_bits("f", 1 << bit)?;
        equal_bits("file", bits("f")?, 1 << bit)?;
        set_bits("d", 1 << bit)?;
        equal_bits("directory", bits("d")?, 1 << bit)?;
    }
    set_bits("f", 0o7777)?;
    equal_bits("all", bits("f")?, 0o7777)
}

fn modes_of_open_files_can_be_set() -> Verdict {
    let file = create("f", 0o644)?;
    fchmod(&file, mode(0o4701))?;
    equal_bits("by name", bits("f")?, 0o4701)?;
    equal_bits("by descriptor", fstat(&file)?.st_mode & 0o7777, 0o4701)?;
    // Even one that is open for reading.
    fchmod(reader("f")?, mode(0o600))?;
    equal_bits("read-only", bits("f")?, 0o600)
}

fn only_the_owner_may_change_the_mode() -> Verdict {
    touch("f")?;
    set_bits("f", 0o666)?;
    ALICE.run(|| {
        fails("chmod", set_bits("f", 0o600), Errno::PERM)?;
        fails("fchmod", fchmod(writer("f")?, mode(0o600)), Errno::PERM)
    })?;
    ALICE.own("f")?;
    ALICE.run(|| Ok(set_bits("f", 0o600)?))?;
    equal_bits("mode", bits("f")?, 0o600)
}

fn a_stranger_to_the_group_cannot_set_its_id_bit() -> Verdict {
    touch("f")?;
    give("f", ALICE.uid, CREW)?;
    ALICE.run(|| Ok(set_bits("f", 0o2755)?))?;
    equal_bits("outside the group", bits("f")?, 0o755)?;
    ALICE_IN_CREW.run(|| Ok(set_bits("f", 0o2755)?))?;
    equal_bits("inside the group", bits("f")?, 0o2755)
}

fn chmod_follows_links_and_moves_the_change_time() -> Verdict {
    touch("f")?;
    symlink("f", "s")?;
    let before = lstat("f")?;
    tick()?;
    set_bits("s", 0o600)?;
    let after = lstat("f")?;
    equal_bits("mode", bits("f")?, 0o600)?;
    holds("the change time moved", changed(&after) > changed(&before))?;
    equal("modification time", modified(&after), modified(&before))
}

fn owners_can_be_set_together_and_alone() -> Verdict {
    touch("f")?;
    give("f", 10, 20)?;
    equal("both", owner("f")?, (10, 20))?;
    chown("f", Some(Uid::from_raw(11)), None)?;
    equal("user alone", owner("f")?, (11, 20))?;
    chown("f", None, Some(Gid::from_raw(21)))?;
    equal("group alone", owner("f")?, (11, 21))?;
    fchown(reader("f")?, Some(Uid::from_raw(0)), Some(Gid::from_raw(0)))?;
    equal("by descriptor", owner("f")?, (0, 0))
}

fn the_largest_ids_survive() -> Verdict {
    touch("f")?;
    for id in [65_535, 65_536, 1 << 31, u32::MAX - 1] {
        give("f", id, id - 1)?;
        equal("owner", owner("f")?, (id, id - 1))?;
    }
    Ok(())
}

fn a_links_owner_is_its_own() -> Verdict {
    touch("f")?;
    symlink("f", "s")?;
    chownat(
        CWD,
        "s",
        Some(Uid::from_raw(5)),
        Some(Gid::from_raw(6)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    equal("link", owner("s")?, (5, 6))?;
    equal("target", owner("f")?, (0, 0))?;
    give("s", 7, 8)?;
    equal("link after chown", owner("s")?, (5, 6))?;
    equal("target after chown", owner("f")?, (7, 8))
}

fn only_root_gives_files_away() -> Verdict {
    touch("f")?;
    ALICE.run(|| fails("another's", give("f", ALICE.uid, ALICE.gid), Errno::PERM))?;
    ALICE.own("f")?;
    ALICE.run(|| fails("own", give("f", 0, ALICE.gid), Errno::PERM))
}

fn the_owner_may_choose_among_own_groups() -> Verdict {
    touch("f")?;
    ALICE.own("f")?;
    ALICE_IN_CREW.run(|| {
        chown("f", None, Some(Gid::from_raw(CREW)))?;
        fails(
            "a foreign group",
            chown("f", None, Some(Gid::from_raw(0))),
            Errno::PERM,
        )
    })?;
    equal("owner", owner("f")?, (ALICE.uid, CREW))
}

fn chown_clears_set_id_bits() -> Verdict {
    for (name, user, group) in [
        ("both", Some(1), Some(1)),
        ("user", Some(1), None),
        ("group", None, Some(1)),
    ] {
        touch(name)?;
        set_bits(name, 0o6755)?;
        chown(name, user.map(Uid::from_raw), group.map(Gid::from_raw))?;
        equal_bits(name, bits(name)?, 0o755)?;
    }
    touch("own")?;
    give("own", ALICE.uid, ALICE.gid)?;
    set_bits("own", 0o6755)?;
    ALICE_IN_CREW.run(|| Ok(chown("own", None, Some(Gid::from_raw(CREW)))?))?;
    equal_bits("by the owner", bits("own")?, 0o755)
}

fn chown_keeps_the_bits_of_directories() -> Verdict {
    directory("d", 0o7755)?;
    give("d", 1, 1)?;
    equal_bits("mode", bits("d")?, 0o7755)
}

/// A file of Alice's with both set-id bits, after she did `part` to it.
fn bits_after(part: impl FnOnce() -> Verdict) -> Result<u32, Fail> {
    put("f", b"contents")?;
    ALICE.own("f")?;
    set_bits("f", 0o6777)?;
    ALICE.run(part)?;
    Ok(bits("f")?)
}

fn a_users_write_clears_set_id_bits() -> Verdict {
    equal_bits(
        "mode",
        bits_after(|| Ok(write_all(writer("f")?, b"x")?))?,
        0o777,
    )
}

fn a_users_truncation_clears_set_id_bits() -> Verdict {
    equal_bits(
        "truncate",
        bits_after(|| Ok(sys::truncate("f", 3)?))?,
        0o777,
    )?;
    set_bits("f", 0o6777)?;
    ALICE.run(|| Ok(ftruncate(writer("f")?, 1)?))?;
    equal_bits("ftruncate", bits("f")?, 0o777)?;
    set_bits("f", 0o6777)?;
    ALICE.run(|| succeeds(open_as("f", OFlags::WRONLY | OFlags::TRUNC)))?;
    equal_bits("O_TRUNC", bits("f")?, 0o777)
}

fn a_users_allocation_clears_set_id_bits() -> Verdict {
    equal_bits(
        "mode",
        bits_after(|| Ok(fallocate(writer("f")?, FallocateFlags::empty(), 0, 100)?))?,
        0o777,
    )
}

fn roots_write_keeps_set_id_bits() -> Verdict {
    put("f", b"contents")?;
    set_bits("f", 0o6777)?;
    write_all(writer("f")?, b"x")?;
    equal_bits("mode", bits("f")?, 0o6777)
}

fn a_write_without_fsetid_clears_set_id_bits() -> Verdict {
    put("f", b"contents")?;
    set_bits("f", 0o6777)?;
    root_without(CapabilitySet::FSETID, || Ok(write_all(writer("f")?, b"x")?))?;
    equal_bits("mode", bits("f")?, 0o777)
}

fn a_group_bit_without_execution_is_kept() -> Verdict {
    put("f", b"contents")?;
    ALICE.own("f")?;
    set_bits("f", 0o2666)?;
    ALICE.run(|| Ok(write_all(writer("f")?, b"x")?))?;
    equal_bits("mode", bits("f")?, 0o2666)
}

/// CAP_NET_RAW, effective and permitted, as `setcap` writes it.
const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];
const CAPABILITIES: &str = "security.capability";

fn give_capability() -> Result<(), Errno> {
    setxattr("f", CAPABILITIES, &CAPABILITY, XattrFlags::empty())
}

fn no_capability(after: &str) -> Verdict {
    fails(
        &format!("capabilities after {after}"),
        getxattr("f", CAPABILITIES, &mut [0; 64][..]),
        Errno::NODATA,
    )
}

fn writing_removes_file_capabilities() -> Verdict {
    put("f", b"contents")?;
    set_bits("f", 0o777)?;
    give_capability()?;
    let mut value = [0; 64];
    equal(
        "size of the attribute",
        getxattr("f", CAPABILITIES, &mut value[..])?,
        CAPABILITY.len(),
    )?;
    write_all(writer("f")?, b"x")?;
    no_capability("root's write")?;
    give_capability()?;
    ALICE.run(|| Ok(write_all(writer("f")?, b"x")?))?;
    no_capability("a user's write")
}

fn truncation_removes_file_capabilities() -> Verdict {
    put("f", b"contents")?;
    give_capability()?;
    sys::truncate("f", 2)?;
    no_capability("truncate")
}

fn chown_removes_file_capabilities() -> Verdict {
    touch("f")?;
    give_capability()?;
    give("f", 1, 1)?;
    no_capability("chown")
}

fn new_files_belong_to_their_maker() -> Verdict {
    ALICE.run(|| {
        touch("file")?;
        mkdir("directory", mode(0o755))?;
        symlink("x", "symlink")?;
        node("fifo", rustix::fs::FileType::Fifo, 0o644, 0)?;
        Ok(())
    })?;
    for name in ["file", "directory", "symlink", "fifo"] {
        equal(name, owner(name)?, (ALICE.uid, ALICE.gid))?;
    }
    Ok(())
}

fn a_set_group_id_directory_hands_its_group_down() -> Verdict {
    directory("d", 0o777)?;
    give("d", 0, CREW)?;
    set_bits("d", 0o2777)?;
    ALICE.run(|| {
        touch("d/file")?;
        mkdir("d/directory", mode(0o755))?;
        Ok(symlink("x", "d/symlink")?)
    })?;
    for name in ["d/file", "d/directory", "d/symlink"] {
        equal(name, owner(name)?, (ALICE.uid, CREW))?;
    }
    equal_bits("directory", bits("d/directory")?, 0o2755)?;
    equal_bits("file", bits("d/file")?, 0o644)
}

fn a_stranger_gets_no_set_group_id_file() -> Verdict {
    directory("d", 0o777)?;
    give("d", 0, CREW)?;
    set_bits("d", 0o2777)?;
    ALICE.run(|| succeeds(create("d/f", 0o2755)))?;
    equal_bits("outside the group", bits("d/f")?, 0o755)?;
    ALICE_IN_CREW.run(|| succeeds(create("d/g", 0o2755)))?;
    equal_bits("inside the group", bits("d/g")?, 0o2755)
}
