//! mkdir, rmdir, unlink, symlink, mknod, and what may be a name.

use rustix::fs::{
    AtFlags, CWD, FileType, OFlags, Stat, lstat, makedev, mkdir, mkdirat, openat, readlink,
    readlinkat_raw, rmdir, stat, symlink, unlink, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{chdir, fchdir, getcwd, umask};

use super::checks;
use crate::act::*;
use crate::peer::ALICE;
use crate::verdict::*;

checks![
    a_new_directory_gets_the_mode_less_the_umask,
    making_an_existing_name_is_eexist,
    making_below_nothing_or_a_file_fails,
    a_subdirectory_is_a_link_to_its_parent,
    removing_a_directory_wants_it_empty,
    removing_a_directory_wants_a_directory,
    removing_dot_is_refused,
    unlinking_a_directory_is_eisdir,
    unlinking_nothing_is_enoent,
    unlinking_a_link_keeps_its_target,
    unlinking_takes_one_of_the_links,
    a_link_gives_back_its_target,
    a_target_has_at_most_4095_bytes,
    reading_a_link_fills_what_there_is_room_for,
    reading_what_is_no_link_is_einval,
    a_new_link_belongs_to_its_maker,
    nodes_have_type_mode_and_device,
    large_device_numbers_survive,
    device_nodes_are_for_the_privileged,
    names_have_at_most_255_bytes,
    paths_have_at_most_4095_bytes,
    every_byte_but_two_may_be_in_a_name,
    case_matters,
    a_chain_of_directories_may_be_longer_than_a_path,
    a_trailing_slash_is_only_for_directories,
    sockets_and_fifos_can_be_unlinked,
];

fn a_new_directory_gets_the_mode_less_the_umask() -> Verdict {
    for (mask, asked, expected) in [
        (0o022, 0o777, 0o755),
        (0o077, 0o1777, 0o1700),
        (0, 0o123, 0o123),
    ] {
        umask(mode(mask));
        let name = format!("{mask:o}");
        mkdir(&*name, mode(asked))?;
        equal_bits(&format!("umask {mask:o}"), bits(&name)?, expected)?;
    }
    Ok(())
}

fn making_an_existing_name_is_eexist() -> Verdict {
    touch("file")?;
    open_directory("directory")?;
    symlink("missing", "dangling")?;
    for name in ["file", "directory", "dangling", "."] {
        fails(
            &format!("mkdir {name}"),
            mkdir(name, mode(0o755)),
            Errno::EXIST,
        )?;
        fails(&format!("symlink {name}"), symlink("x", name), Errno::EXIST)?;
        fails(
            &format!("mknod {name}"),
            node(name, FileType::Fifo, 0o644, 0),
            Errno::EXIST,
        )?;
    }
    Ok(())
}

fn making_below_nothing_or_a_file_fails() -> Verdict {
    touch("file")?;
    for (parent, expected) in [("missing", Errno::NOENT), ("file", Errno::NOTDIR)] {
        let path = format!("{parent}/x");
        fails(
            &format!("mkdir {path}"),
            mkdir(&*path, mode(0o755)),
            expected,
        )?;
        fails(&format!("symlink {path}"), symlink("x", &*path), expected)?;
        fails(
            &format!("mknod {path}"),
            node(&path, FileType::Fifo, 0o644, 0),
            expected,
        )?;
        fails(&format!("rmdir {path}"), rmdir(&*path), expected)?;
        fails(&format!("unlink {path}"), unlink(&*path), expected)?;
        fails(
            &format!("readlink {path}"),
            readlink(&*path, Vec::new()),
            expected,
        )?;
    }
    Ok(())
}

fn a_subdirectory_is_a_link_to_its_parent() -> Verdict {
    open_directory("d")?;
    equal("links of an empty directory", links("d")?, 2)?;
    open_directory("d/a")?;
    open_directory("d/b")?;
    touch("d/f")?;
    equal("links with two directories in it", links("d")?, 4)?;
    rmdir("d/a")?;
    equal("links with one", links("d")?, 3)?;
    equal("inode of d/b/..", stat("d/b/..")?.st_ino, inode("d")?)
}

fn removing_a_directory_wants_it_empty() -> Verdict {
    open_directory("d")?;
    touch("d/f")?;
    fails_with_one_of("rmdir", rmdir("d"), &[Errno::NOTEMPTY, Errno::EXIST])?;
    unlink("d/f")?;
    rmdir("d")?;
    fails("lstat", lstat("d"), Errno::NOENT)?;
    fails("again", rmdir("d"), Errno::NOENT)
}

fn removing_a_directory_wants_a_directory() -> Verdict {
    open_directory("d")?;
    touch("file")?;
    symlink("d", "link")?;
    for name in ["file", "link"] {
        fails(name, rmdir(name), Errno::NOTDIR)?;
    }
    Ok(())
}

fn removing_dot_is_refused() -> Verdict {
    open_directory("d")?;
    fails("rmdir d/.", rmdir("d/."), Errno::INVAL)?;
    fails_with_one_of(
        "rmdir d/..",
        rmdir("d/.."),
        &[Errno::NOTEMPTY, Errno::EXIST],
    )
}

fn unlinking_a_directory_is_eisdir() -> Verdict {
    open_directory("d")?;
    fails("unlink", unlink("d"), Errno::ISDIR)?;
    lstat("d").map(drop).map_err(Fail::from)
}

fn unlinking_nothing_is_enoent() -> Verdict {
    fails("unlink", unlink("missing"), Errno::NOENT)?;
    touch("f")?;
    unlink("f")?;
    fails("again", unlink("f"), Errno::NOENT)
}

fn unlinking_a_link_keeps_its_target() -> Verdict {
    put("f", b"x")?;
    symlink("f", "link")?;
    unlink("link")?;
    equal("contents", contents("f")?, b"x".to_vec())?;
    fails("link", lstat("link"), Errno::NOENT)
}

fn unlinking_takes_one_of_the_links() -> Verdict {
    touch("a")?;
    rustix::fs::link("a", "b")?;
    tick()?;
    let before = changed(&lstat("b")?);
    unlink("a")?;
    equal("links", links("b")?, 1)?;
    holds("the change time moved", changed(&lstat("b")?) > before)
}

fn a_link_gives_back_its_target() -> Verdict {
    for (name, target) in [
        ("a", "x"),
        ("b", "/a//b/../c/"),
        ("c", " \n\u{ff}"),
        ("d", "."),
    ] {
        symlink(target, name)?;
        equal(
            name,
            readlink(name, Vec::new())?.into_bytes(),
            target.as_bytes().to_vec(),
        )?;
        equal(
            format!("size of {name}"),
            lstat(name)?.st_size,
            i64::try_from(target.len()).unwrap_or(-1),
        )?;
    }
    Ok(())
}

fn a_target_has_at_most_4095_bytes() -> Verdict {
    let target = "x".repeat(4095);
    symlink(&*target, "long")?;
    equal(
        "target",
        readlink("long", Vec::new())?.into_bytes(),
        target.into_bytes(),
    )?;
    fails(
        "4096",
        symlink("x".repeat(4096), "longer"),
        Errno::NAMETOOLONG,
    )?;
    fails("empty", symlink("", "empty"), Errno::NOENT)
}

fn reading_a_link_fills_what_there_is_room_for() -> Verdict {
    symlink("target", "link")?;
    let mut buffer = [0; 3];
    equal("length", readlinkat_raw(CWD, "link", &mut buffer)?, 3)?;
    equal("bytes", &buffer, b"tar")
}

fn reading_what_is_no_link_is_einval() -> Verdict {
    touch("file")?;
    for name in ["file", "."] {
        fails(name, readlink(name, Vec::new()), Errno::INVAL)?;
    }
    Ok(())
}

fn a_new_link_belongs_to_its_maker() -> Verdict {
    ALICE.run(|| Ok(symlink("x", "link")?))?;
    equal("owner", owner("link")?, (ALICE.uid, ALICE.gid))?;
    equal_bits("mode", lstat("link")?.st_mode & 0o7777, 0o777)
}

fn device(stat: &Stat) -> u64 {
    stat.st_rdev
}

fn nodes_have_type_mode_and_device() -> Verdict {
    umask(mode(0o027));
    let table = [
        ("fifo", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("char", FileType::CharacterDevice, makedev(1, 3)),
        ("block", FileType::BlockDevice, makedev(7, 200)),
        ("file", FileType::RegularFile, 0),
    ];
    for (name, wanted, number) in table {
        node(name, wanted, 0o666, number)?;
        equal(format!("type of {name}"), kind(name)?, wanted)?;
        equal(format!("device of {name}"), device(&lstat(name)?), number)?;
        equal_bits(name, bits(name)?, 0o640)?;
    }
    Ok(())
}

fn large_device_numbers_survive() -> Verdict {
    for (major, minor) in [(255, 256), (256, 255), (4095, 0xf_ffff)] {
        let name = format!("{major}-{minor}");
        node(
            &name,
            FileType::CharacterDevice,
            0o600,
            makedev(major, minor),
        )?;
        equal(&name, device(&lstat(&*name)?), makedev(major, minor))?;
    }
    Ok(())
}

fn device_nodes_are_for_the_privileged() -> Verdict {
    ALICE.run(|| {
        fails(
            "char",
            node("c", FileType::CharacterDevice, 0o600, makedev(1, 3)),
            Errno::PERM,
        )?;
        fails(
            "block",
            node("b", FileType::BlockDevice, 0o600, makedev(7, 0)),
            Errno::PERM,
        )?;
        node("fifo", FileType::Fifo, 0o600, 0)?;
        Ok(node("socket", FileType::Socket, 0o600, 0)?)
    })
}

fn names_have_at_most_255_bytes() -> Verdict {
    let (longest, longer) = ("n".repeat(255), "n".repeat(256));
    touch(&longest)?;
    equal("names", names(".")?, vec![longest.clone()])?;
    fails("open", touch(&longer), Errno::NAMETOOLONG)?;
    fails("mkdir", mkdir(&*longer, mode(0o755)), Errno::NAMETOOLONG)?;
    fails("symlink", symlink("x", &*longer), Errno::NAMETOOLONG)?;
    fails(
        "link",
        rustix::fs::link(&*longest, &*longer),
        Errno::NAMETOOLONG,
    )?;
    fails(
        "rename",
        rustix::fs::rename(&*longest, &*longer),
        Errno::NAMETOOLONG,
    )?;
    fails("lstat", lstat(&*longer), Errno::NAMETOOLONG)?;
    fails("unlink", unlink(&*longer), Errno::NAMETOOLONG)?;
    fails("rmdir", rmdir(&*longer), Errno::NAMETOOLONG)
}

fn paths_have_at_most_4095_bytes() -> Verdict {
    touch("f")?;
    let path = format!("{}f", "./".repeat(2047));
    lstat(&*path)?;
    fails("4096", lstat(format!("/{path}")), Errno::NAMETOOLONG)
}

fn every_byte_but_two_may_be_in_a_name() -> Verdict {
    let bytes = || {
        (1..=255_u8)
            .filter(|byte| *byte != b'/')
            .map(|byte| [b'n', byte])
    };
    for name in bytes() {
        rustix::fs::open(
            &name[..],
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY,
            mode(0o644),
        )?;
    }
    for name in bytes() {
        unlink(&name[..])?;
    }
    equal("names", names(".")?.len(), 0)
}

fn case_matters() -> Verdict {
    touch("name")?;
    touch("NAME")?;
    equal(
        "names",
        names(".")?,
        vec!["NAME".to_owned(), "name".to_owned()],
    )
}

fn a_chain_of_directories_may_be_longer_than_a_path() -> Verdict {
    let start = open_as(".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    let name = "d".repeat(200);
    for _ in 0..30 {
        mkdirat(CWD, &*name, mode(0o755))?;
        chdir(&*name)?;
    }
    fails_with_one_of(
        "getcwd",
        getcwd(Vec::new()),
        &[Errno::RANGE, Errno::NAMETOOLONG],
    )?;
    touch("end")?;
    equal("names at the end", names(".")?, vec!["end".to_owned()])?;
    unlink("end")?;
    for _ in 0..30 {
        chdir("..")?;
        unlinkat(CWD, &*name, AtFlags::REMOVEDIR)?;
    }
    equal("names at the start", names(".")?.len(), 0)?;
    fchdir(&start)?;
    openat(&start, "f", OFlags::CREATE | OFlags::WRONLY, mode(0o600))?;
    Ok(())
}

fn a_trailing_slash_is_only_for_directories() -> Verdict {
    touch("file")?;
    mkdir("d/", mode(0o755))?;
    fails("unlink file/", unlink("file/"), Errno::NOTDIR)?;
    fails("rmdir file/", rmdir("file/"), Errno::NOTDIR)?;
    fails("symlink x/", symlink("d", "x/"), Errno::NOENT)?;
    symlink("d", "link")?;
    equal(
        "type of link/",
        FileType::from_raw_mode(lstat("link/")?.st_mode),
        FileType::Directory,
    )?;
    fails("rmdir link/", rmdir("link/"), Errno::NOTDIR)?;
    Ok(rmdir("d/")?)
}

fn sockets_and_fifos_can_be_unlinked() -> Verdict {
    node("fifo", FileType::Fifo, 0o644, 0)?;
    node("socket", FileType::Socket, 0o644, 0)?;
    unlink("fifo")?;
    unlink("socket")?;
    equal("names", names(".")?.len(), 0)
}
