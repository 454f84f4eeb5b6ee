//! Who may do what: permission bits, sticky directories, groups, and root without its capabilities.

use rustix::fs::{
    Access, AtFlags, CWD, Gid, OFlags, Uid, access, accessat, lstat, mkdir, rename, rmdir, stat,
    symlink, unlink,
};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, set_thread_res_gid, set_thread_res_uid};

use super::checks;
use crate::act::*;
use crate::peer::{ALICE, ALICE_IN_CREW, BOB, CREW, root_without, start};
use crate::sys;
use crate::verdict::*;

checks![
    the_first_class_that_matches_decides,
    reading_and_writing_need_their_bits,
    every_directory_on_the_way_must_be_searchable,
    a_directory_without_read_permission_can_be_searched,
    a_directory_without_write_permission_keeps_its_entries,
    a_supplementary_group_counts,
    a_supplementary_group_may_create_in_its_directory,
    a_file_in_a_sticky_directory_is_its_owners,
    the_owner_of_a_sticky_directory_may_remove_others_files,
    a_sticky_directory_protects_what_a_rename_would_replace,
    truncation_needs_write_permission,
    access_asks_for_the_real_user,
    access_of_the_effective_user_can_be_asked,
    root_may_execute_only_what_somebody_may,
    root_without_dac_override_is_bound_by_bits,
    root_without_fowner_owns_only_its_files,
    root_without_chown_gives_nothing_away,
    root_without_mknod_makes_no_devices,
    a_link_in_a_sticky_directory_is_followed_by_its_owner,
    symbolic_links_have_no_permissions,
];

fn the_first_class_that_matches_decides() -> Verdict {
    for (name, bits, owned, readable) in [
        ("owner-only", 0o400, true, true),
        ("all-but-owner", 0o077, true, false),
        ("group-only", 0o040, false, true),
        ("all-but-group", 0o707, false, false),
    ] {
        put(name, b"x")?;
        let (uid, gid) = if owned {
            (ALICE.uid, ALICE.gid)
        } else {
            (0, ALICE.gid)
        };
        give(name, uid, gid)?;
        set_bits(name, bits)?;
        ALICE.run(|| match readable {
            true => succeeds(reader(name)),
            false => fails(name, reader(name), Errno::ACCESS),
        })?;
    }
    Ok(())
}

fn reading_and_writing_need_their_bits() -> Verdict {
    for bits in 0..8 {
        let name = format!("{bits:o}");
        touch(&name)?;
        set_bits(&name, bits)?;
    }
    ALICE.run(|| {
        for bits in 0..8 {
            let name = format!("{bits:o}");
            equal(
                format!("reading mode {bits:o}"),
                reader(&name).is_ok(),
                bits & 4 != 0,
            )?;
            equal(
                format!("writing mode {bits:o}"),
                open_as(&name, OFlags::WRONLY).is_ok(),
                bits & 2 != 0,
            )?;
            equal(
                format!("both with mode {bits:o}"),
                writer(&name).is_ok(),
                bits & 6 == 6,
            )?;
        }
        Ok(())
    })
}

fn every_directory_on_the_way_must_be_searchable() -> Verdict {
    directory("shut", 0o766)?;
    open_directory("shut/d")?;
    put("shut/d/f", b"x")?;
    ALICE.run(|| {
        fails("stat", stat("shut/d/f"), Errno::ACCESS)?;
        fails("open", reader("shut/d/f"), Errno::ACCESS)?;
        fails("create", touch("shut/g"), Errno::ACCESS)?;
        fails("unlink", unlink("shut/d/f"), Errno::ACCESS)?;
        // Reading the directory itself is another bit.
        equal("names", names("shut")?, vec!["d".to_owned()])
    })
}

fn a_directory_without_read_permission_can_be_searched() -> Verdict {
    directory("d", 0o711)?;
    put("d/f", b"x")?;
    ALICE.run(|| {
        fails("list", names("d"), Errno::ACCESS)?;
        equal("contents", contents("d/f")?, b"x".to_vec())
    })
}

fn a_directory_without_write_permission_keeps_its_entries() -> Verdict {
    open_directory("d")?;
    touch("d/f")?;
    open_directory("d/e")?;
    ALICE.own("d/f")?;
    set_bits("d", 0o755)?;
    ALICE.run(|| {
        fails("unlink", unlink("d/f"), Errno::ACCESS)?;
        fails("rmdir", rmdir("d/e"), Errno::ACCESS)?;
        fails("rename", rename("d/f", "d/g"), Errno::ACCESS)?;
        fails("mkdir", mkdir("d/x", mode(0o755)), Errno::ACCESS)?;
        fails("symlink", symlink("x", "d/x"), Errno::ACCESS)?;
        fails(
            "mknod",
            node("d/x", rustix::fs::FileType::Fifo, 0o644, 0),
            Errno::ACCESS,
        )?;
        // The file itself is Alice's to write.
        succeeds(writer("d/f"))
    })
}

fn a_supplementary_group_counts() -> Verdict {
    put("f", b"x")?;
    give("f", 0, CREW)?;
    set_bits("f", 0o060)?;
    ALICE.run(|| fails("outside the group", reader("f"), Errno::ACCESS))?;
    ALICE_IN_CREW.run(|| equal("contents", contents("f")?, b"x".to_vec()))
}

fn a_supplementary_group_may_create_in_its_directory() -> Verdict {
    directory("d", 0o770)?;
    give("d", 0, CREW)?;
    ALICE.run(|| fails("outside the group", touch("d/x"), Errno::ACCESS))?;
    ALICE_IN_CREW.run(|| {
        touch("d/f")?;
        mkdir("d/d", mode(0o755))?;
        symlink("x", "d/s")?;
        node("d/p", rustix::fs::FileType::Fifo, 0o644, 0)?;
        equal("owner", owner("d/f")?, (ALICE.uid, ALICE.gid))?;
        rename("d/f", "d/g")?;
        unlink("d/g")?;
        Ok(rmdir("d/d")?)
    })
}

fn a_file_in_a_sticky_directory_is_its_owners() -> Verdict {
    directory("d", 0o1777)?;
    BOB.run(|| {
        touch("d/f")?;
        Ok(mkdir("d/e", mode(0o777))?)
    })?;
    ALICE.run(|| {
        fails("unlink", unlink("d/f"), Errno::PERM)?;
        fails("rmdir", rmdir("d/e"), Errno::PERM)?;
        fails("rename", rename("d/f", "d/g"), Errno::PERM)?;
        fails("rename away", rename("d/f", "f"), Errno::PERM)
    })?;
    BOB.run(|| {
        rename("d/f", "d/g")?;
        unlink("d/g")?;
        Ok(rmdir("d/e")?)
    })
}

fn the_owner_of_a_sticky_directory_may_remove_others_files() -> Verdict {
    directory("d", 0o1777)?;
    ALICE.own("d")?;
    BOB.run(|| Ok(touch("d/f")?))?;
    ALICE.run(|| Ok(unlink("d/f")?))
}

fn a_sticky_directory_protects_what_a_rename_would_replace() -> Verdict {
    directory("d", 0o1777)?;
    BOB.run(|| Ok(touch("d/bobs")?))?;
    ALICE.run(|| {
        touch("d/mine")?;
        fails("rename", rename("d/mine", "d/bobs"), Errno::PERM)
    })
}

fn truncation_needs_write_permission() -> Verdict {
    put("f", b"x")?;
    set_bits("f", 0o444)?;
    ALICE.run(|| {
        fails("truncate", sys::truncate("f", 0), Errno::ACCESS)?;
        fails(
            "O_TRUNC",
            open_as("f", OFlags::RDONLY | OFlags::TRUNC),
            Errno::ACCESS,
        )
    })?;
    equal("contents", contents("f")?, b"x".to_vec())
}

/// Runs `part` with Alice as the real user and root as the effective one.
fn really_alice(part: impl FnOnce() -> Verdict) -> Verdict {
    start(|| {
        let (uid, gid) = (Uid::from_raw(ALICE.uid), Gid::from_raw(ALICE.gid));
        set_thread_res_gid(gid, None, None)?;
        set_thread_res_uid(uid, None, None)?;
        part()
    })?
    .join()
}

fn access_asks_for_the_real_user() -> Verdict {
    touch("f")?;
    set_bits("f", 0o704)?;
    really_alice(|| {
        access("f", Access::READ_OK)?;
        fails("write", access("f", Access::WRITE_OK), Errno::ACCESS)?;
        fails("execute", access("f", Access::EXEC_OK), Errno::ACCESS)?;
        // The effective user, root, may.
        succeeds(writer("f"))
    })
}

fn access_of_the_effective_user_can_be_asked() -> Verdict {
    touch("f")?;
    set_bits("f", 0o700)?;
    really_alice(|| {
        accessat(CWD, "f", Access::WRITE_OK, AtFlags::EACCESS)?;
        fails(
            "real user",
            accessat(CWD, "f", Access::READ_OK, AtFlags::empty()),
            Errno::ACCESS,
        )
    })
}

fn root_may_execute_only_what_somebody_may() -> Verdict {
    touch("f")?;
    set_bits("f", 0)?;
    access("f", Access::READ_OK | Access::WRITE_OK)?;
    fails("nobody may", access("f", Access::EXEC_OK), Errno::ACCESS)?;
    set_bits("f", 0o001)?;
    Ok(access("f", Access::EXEC_OK)?)
}

fn root_without_dac_override_is_bound_by_bits() -> Verdict {
    put("f", b"x")?;
    ALICE.own("f")?;
    set_bits("f", 0o600)?;
    directory("d", 0o755)?;
    ALICE.own("d")?;
    root_without(
        CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH,
        || {
            fails("read", reader("f"), Errno::ACCESS)?;
            fails("write", open_as("f", OFlags::WRONLY), Errno::ACCESS)?;
            fails("create", touch("d/g"), Errno::ACCESS)
        },
    )
}

fn root_without_fowner_owns_only_its_files() -> Verdict {
    touch("f")?;
    ALICE.own("f")?;
    touch("mine")?;
    root_without(CapabilitySet::FOWNER, || {
        fails("chmod", set_bits("f", 0o600), Errno::PERM)?;
        fails("utimensat", set_times("f", (1, 0), (1, 0)), Errno::PERM)?;
        Ok(set_bits("mine", 0o600)?)
    })
}

fn root_without_chown_gives_nothing_away() -> Verdict {
    touch("f")?;
    root_without(CapabilitySet::CHOWN, || {
        fails("chown", give("f", 1, 1), Errno::PERM)
    })
}

fn root_without_mknod_makes_no_devices() -> Verdict {
    root_without(CapabilitySet::MKNOD, || {
        let device = rustix::fs::makedev(1, 3);
        fails(
            "mknod",
            node("c", rustix::fs::FileType::CharacterDevice, 0o600, device),
            Errno::PERM,
        )
    })
}

fn a_link_in_a_sticky_directory_is_followed_by_its_owner() -> Verdict {
    directory("d", 0o1777)?;
    put("f", b"x")?;
    ALICE.run(|| {
        symlink("../f", "d/s")?;
        equal("contents", contents("d/s")?, b"x".to_vec())
    })
}

fn symbolic_links_have_no_permissions() -> Verdict {
    put("f", b"x")?;
    set_bits("f", 0o600)?;
    symlink("f", "s")?;
    ALICE.run(|| {
        fails("open", reader("s"), Errno::ACCESS)?;
        lstat("s")?;
        equal(
            "target",
            rustix::fs::readlink("s", Vec::new())?.into_bytes(),
            b"f".to_vec(),
        )
    })
}
