//! POSIX ACLs: storing them, what they grant, and what new entries inherit.

use rustix::fs::{FileType, XattrFlags, getxattr, mkdir, removexattr, setxattr, symlink};
use rustix::io::Errno;
use rustix::process::umask;

use super::checks;
use crate::acl::Entry::{Group, Mask, Others, Owner, OwningGroup, User};
use crate::acl::{ACCESS, DEFAULT, Entry, encode};
use crate::act::*;
use crate::peer::{ALICE, ALICE_IN_CREW, BOB, CREW};
use crate::verdict::*;

checks![
    an_acl_is_read_back,
    the_mask_shows_as_group_bits,
    chmod_changes_the_mask,
    an_acl_without_names_is_just_the_mode,
    a_named_user_is_granted,
    the_mask_limits_a_named_user,
    a_named_user_without_permission_is_refused_though_others_are_not,
    a_named_group_is_granted,
    the_owner_is_not_masked,
    a_broken_acl_is_einval,
    only_the_owner_sets_an_acl,
    symbolic_links_have_no_acl,
    a_file_has_no_default_acl,
    removing_an_acl_keeps_the_mode,
    a_new_file_inherits_and_ignores_the_umask,
    a_new_directory_inherits_both_ways,
    creation_mode_limits_what_is_inherited,
    nodes_inherit_too,
    without_a_default_acl_the_umask_counts,
];

fn set(path: &str, name: &str, entries: &[Entry]) -> Result<(), Errno> {
    setxattr(path, name, &encode(entries), XattrFlags::empty())
}

fn acl(path: &str, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 1024];
    let len = getxattr(path, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

/// Owner rw, Alice as given, group and others nothing but as given, and the mask.
const fn with_alice(alice: u16, others: u16, mask: u16) -> [Entry; 5] {
    [
        Owner(6),
        User(ALICE.uid, alice),
        OwningGroup(0),
        Mask(mask),
        Others(others),
    ]
}

fn an_acl_is_read_back() -> Verdict {
    let entries = [
        Owner(7),
        User(1, 4),
        User(ALICE.uid, 6),
        OwningGroup(5),
        Group(CREW, 1),
        Mask(7),
        Others(4),
    ];
    touch("f")?;
    open_directory("d")?;
    for (path, name) in [("f", ACCESS), ("d", ACCESS), ("d", DEFAULT)] {
        set(path, name, &entries)?;
        equal(
            format!("{name} of {path}"),
            acl(path, name)?,
            encode(&entries),
        )?;
    }
    Ok(())
}

fn the_mask_shows_as_group_bits() -> Verdict {
    touch("f")?;
    set(
        "f",
        ACCESS,
        &[Owner(7), User(1, 6), OwningGroup(4), Mask(3), Others(1)],
    )?;
    equal_bits("mode", bits("f")?, 0o731)
}

fn chmod_changes_the_mask() -> Verdict {
    touch("f")?;
    set("f", ACCESS, &with_alice(6, 0, 6))?;
    set_bits("f", 0o640)?;
    equal("ACL", acl("f", ACCESS)?, encode(&with_alice(6, 0, 4)))?;
    ALICE.run(|| {
        reader("f")?;
        fails("write", writer("f"), Errno::ACCESS)
    })
}

fn an_acl_without_names_is_just_the_mode() -> Verdict {
    touch("f")?;
    set("f", ACCESS, &[Owner(7), OwningGroup(5), Others(1)])?;
    equal_bits("mode", bits("f")?, 0o751)?;
    fails("ACL", acl("f", ACCESS), Errno::NODATA)
}

fn a_named_user_is_granted() -> Verdict {
    put("f", b"x")?;
    set_bits("f", 0o600)?;
    ALICE.run(|| fails("before", reader("f"), Errno::ACCESS))?;
    set("f", ACCESS, &with_alice(6, 0, 6))?;
    ALICE.run(|| Ok(write_all(writer("f")?, b"y")?))?;
    BOB.run(|| fails("another user", reader("f"), Errno::ACCESS))?;
    set("f", ACCESS, &[Owner(6), OwningGroup(0), Others(0)])?;
    ALICE.run(|| fails("after", reader("f"), Errno::ACCESS))
}

fn the_mask_limits_a_named_user() -> Verdict {
    put("f", b"x")?;
    set("f", ACCESS, &with_alice(7, 0, 4))?;
    ALICE.run(|| {
        reader("f")?;
        fails("write", writer("f"), Errno::ACCESS)
    })
}

fn a_named_user_without_permission_is_refused_though_others_are_not() -> Verdict {
    put("f", b"x")?;
    set("f", ACCESS, &with_alice(0, 6, 7))?;
    ALICE.run(|| fails("open", reader("f"), Errno::ACCESS))?;
    BOB.run(|| succeeds(writer("f")))
}

fn a_named_group_is_granted() -> Verdict {
    put("f", b"x")?;
    set(
        "f",
        ACCESS,
        &[Owner(6), OwningGroup(0), Group(CREW, 6), Mask(6), Others(0)],
    )?;
    ALICE.run(|| fails("outside the group", reader("f"), Errno::ACCESS))?;
    ALICE_IN_CREW.run(|| succeeds(writer("f")))?;
    directory("d", 0o700)?;
    set(
        "d",
        ACCESS,
        &[Owner(7), OwningGroup(0), Group(CREW, 7), Mask(7), Others(0)],
    )?;
    ALICE_IN_CREW.run(|| Ok(touch("d/f")?))
}

fn the_owner_is_not_masked() -> Verdict {
    put("f", b"x")?;
    ALICE.own("f")?;
    set(
        "f",
        ACCESS,
        &[
            Owner(6),
            User(BOB.uid, 6),
            OwningGroup(6),
            Mask(0),
            Others(0),
        ],
    )?;
    ALICE.run(|| succeeds(writer("f")))?;
    BOB.run(|| fails("the named user", reader("f"), Errno::ACCESS))
}

fn a_broken_acl_is_einval() -> Verdict {
    touch("f")?;
    fails(
        "named user without mask",
        set(
            "f",
            ACCESS,
            &[Owner(6), User(1, 4), OwningGroup(0), Others(0)],
        ),
        Errno::INVAL,
    )?;
    fails(
        "no others",
        set("f", ACCESS, &[Owner(6), OwningGroup(0)]),
        Errno::INVAL,
    )?;
    fails(
        "wrong order",
        set("f", ACCESS, &[OwningGroup(0), Owner(6), Others(0)]),
        Errno::INVAL,
    )?;
    fails(
        "not whole",
        setxattr("f", ACCESS, &[2, 0, 0, 0, 1], XattrFlags::empty()),
        Errno::INVAL,
    )
}

fn only_the_owner_sets_an_acl() -> Verdict {
    touch("f")?;
    set_bits("f", 0o666)?;
    ALICE.run(|| {
        fails(
            "another's",
            set("f", ACCESS, &with_alice(6, 0, 6)),
            Errno::PERM,
        )
    })?;
    ALICE.own("f")?;
    ALICE.run(|| Ok(set("f", ACCESS, &with_alice(6, 0, 6))?))
}

fn symbolic_links_have_no_acl() -> Verdict {
    symlink("nowhere", "s")?;
    let value = encode(&[Owner(6), OwningGroup(0), Others(0)]);
    fails(
        "lsetxattr",
        rustix::fs::lsetxattr("s", ACCESS, &value, XattrFlags::empty()),
        Errno::NOTSUP,
    )
}

fn a_file_has_no_default_acl() -> Verdict {
    touch("f")?;
    fails(
        "set",
        set("f", DEFAULT, &[Owner(6), OwningGroup(0), Others(0)]),
        Errno::ACCESS,
    )
}

fn removing_an_acl_keeps_the_mode() -> Verdict {
    touch("f")?;
    set("f", ACCESS, &with_alice(7, 1, 6))?;
    removexattr("f", ACCESS)?;
    fails("ACL", acl("f", ACCESS), Errno::NODATA)?;
    // The mask has become the group's permissions.
    equal_bits("mode", bits("f")?, 0o661)?;
    ALICE.run(|| fails("the named user", reader("f"), Errno::ACCESS))
}

const INHERITED: [Entry; 5] = [
    Owner(7),
    User(ALICE.uid, 7),
    OwningGroup(5),
    Mask(7),
    Others(5),
];

fn heritage() -> Result<(), Errno> {
    open_directory("d")?;
    set("d", DEFAULT, &INHERITED)
}

fn a_new_file_inherits_and_ignores_the_umask() -> Verdict {
    heritage()?;
    umask(mode(0o077));
    create("d/f", 0o666)?;
    equal_bits("mode", bits("d/f")?, 0o664)?;
    let expected = [
        Owner(6),
        User(ALICE.uid, 7),
        OwningGroup(5),
        Mask(6),
        Others(4),
    ];
    equal("ACL", acl("d/f", ACCESS)?, encode(&expected))?;
    fails("default ACL", acl("d/f", DEFAULT), Errno::NODATA)?;
    ALICE.run(|| succeeds(writer("d/f")))
}

fn a_new_directory_inherits_both_ways() -> Verdict {
    heritage()?;
    umask(mode(0o077));
    mkdir("d/e", mode(0o777))?;
    equal_bits("mode", bits("d/e")?, 0o775)?;
    equal("ACL", acl("d/e", ACCESS)?, encode(&INHERITED))?;
    equal("default ACL", acl("d/e", DEFAULT)?, encode(&INHERITED))
}

fn creation_mode_limits_what_is_inherited() -> Verdict {
    heritage()?;
    create("d/f", 0o600)?;
    equal_bits("mode", bits("d/f")?, 0o600)?;
    let expected = [
        Owner(6),
        User(ALICE.uid, 7),
        OwningGroup(5),
        Mask(0),
        Others(0),
    ];
    equal("ACL", acl("d/f", ACCESS)?, encode(&expected))?;
    ALICE.run(|| fails("the named user", reader("d/f"), Errno::ACCESS))
}

fn nodes_inherit_too() -> Verdict {
    heritage()?;
    umask(mode(0o077));
    node("d/fifo", FileType::Fifo, 0o666, 0)?;
    node("d/socket", FileType::Socket, 0o666, 0)?;
    equal_bits("fifo", bits("d/fifo")?, 0o664)?;
    equal_bits("socket", bits("d/socket")?, 0o664)?;
    symlink("x", "d/s")?;
    equal("type", kind("d/s")?, FileType::Symlink)
}

fn without_a_default_acl_the_umask_counts() -> Verdict {
    open_directory("d")?;
    set(
        "d",
        ACCESS,
        &[
            Owner(7),
            User(ALICE.uid, 7),
            OwningGroup(7),
            Mask(7),
            Others(7),
        ],
    )?;
    umask(mode(0o027));
    create("d/f", 0o666)?;
    equal_bits("mode", bits("d/f")?, 0o640)?;
    fails("ACL", acl("d/f", ACCESS), Errno::NODATA)
}
