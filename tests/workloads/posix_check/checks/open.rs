//! open(2): its flags, and what they may not do.

use rustix::fs::{
    AtFlags, CWD, FileType, OFlags, ResolveFlags, fchmod, fstat, linkat, lstat, open, openat2,
    readlinkat, symlink,
};
use rustix::io::{Errno, read, write};
use rustix::process::umask;

use super::checks;
use crate::act::*;
use crate::peer::{ALICE, start};
use crate::verdict::*;

checks![
    a_new_file_gets_the_mode_less_the_umask,
    a_new_file_may_have_set_id_and_sticky_bits,
    exclusive_creation_refuses_every_existing_name,
    creation_through_a_dangling_link_makes_the_target,
    creation_opens_an_existing_file_and_keeps_its_mode,
    truncation_empties_the_file_and_keeps_the_inode,
    appending_writes_go_to_the_end_wherever_the_position_is,
    no_follow_refuses_a_link,
    the_directory_flag_refuses_a_file,
    a_directory_cannot_be_opened_for_writing,
    a_missing_parent_or_empty_path_is_enoent,
    a_file_as_parent_is_enotdir,
    a_trailing_slash_wants_a_directory,
    a_circle_of_links_is_eloop,
    forty_links_are_followed_and_no_more,
    a_descriptor_does_only_what_it_was_opened_for,
    the_creator_may_use_a_file_of_mode_0,
    a_path_descriptor_names_and_does_not_read,
    a_path_descriptor_of_a_link_is_the_link,
    a_path_descriptor_can_be_reopened,
    an_anonymous_file_has_no_name,
    an_anonymous_file_can_be_given_a_name,
    an_anonymous_file_may_be_kept_nameless,
    anonymous_files_exist_or_are_refused_as_documented,
    one_of_many_exclusive_creators_wins,
    direct_reads_and_writes_agree_with_cached_ones,
    synchronous_writes_are_read_back,
    only_the_owner_may_ask_for_no_access_time,
    resolution_beneath_a_directory_stays_there,
    an_open_socket_or_readerless_fifo_is_enxio,
    a_refused_creation_leaves_nothing,
];

const CREATE: OFlags = OFlags::CREATE.union(OFlags::WRONLY);

fn a_new_file_gets_the_mode_less_the_umask() -> Verdict {
    for (mask, asked, expected) in [
        (0o022, 0o666, 0o644),
        (0o027, 0o777, 0o750),
        (0o777, 0o777, 0),
        (0, 0o604, 0o604),
    ] {
        umask(mode(mask));
        let name = format!("{mask:o}");
        create(&name, asked)?;
        equal_bits(&format!("umask {mask:o}"), bits(&name)?, expected)?;
    }
    Ok(())
}

fn a_new_file_may_have_set_id_and_sticky_bits() -> Verdict {
    umask(mode(0));
    create("f", 0o7755)?;
    equal_bits("mode", bits("f")?, 0o7755)
}

fn exclusive_creation_refuses_every_existing_name() -> Verdict {
    touch("file")?;
    open_directory("directory")?;
    symlink("missing", "dangling")?;
    symlink("file", "link")?;
    for name in ["file", "directory", "dangling", "link"] {
        fails(name, create(name, 0o644), Errno::EXIST)?;
    }
    fails("the link's target", lstat("missing"), Errno::NOENT)
}

fn creation_through_a_dangling_link_makes_the_target() -> Verdict {
    symlink("target", "link")?;
    open("link", CREATE, mode(0o600))?;
    equal_bits("mode of the target", bits("target")?, 0o600)?;
    equal("type of the link", kind("link")?, FileType::Symlink)
}

fn creation_opens_an_existing_file_and_keeps_its_mode() -> Verdict {
    put("f", b"old")?;
    open("f", CREATE, mode(0o777))?;
    equal_bits("mode", bits("f")?, 0o644)?;
    equal("contents", contents("f")?, b"old".to_vec())
}

fn truncation_empties_the_file_and_keeps_the_inode() -> Verdict {
    put("f", b"old")?;
    let before = inode("f")?;
    open_as("f", OFlags::WRONLY | OFlags::TRUNC)?;
    equal("size", lstat("f")?.st_size, 0)?;
    equal("inode", inode("f")?, before)
}

fn appending_writes_go_to_the_end_wherever_the_position_is() -> Verdict {
    put("f", b"one")?;
    let file = open_as("f", OFlags::RDWR | OFlags::APPEND)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    write_all(&file, b"two")?;
    write_at(writer("f")?, 6, b"three")?;
    write_all(&file, b"four")?;
    // Linux: pwrite on a descriptor with O_APPEND appends, whatever offset it is given.
    write_at(&file, 0, b"five")?;
    equal("contents", contents("f")?, b"onetwothreefourfive".to_vec())
}

fn no_follow_refuses_a_link() -> Verdict {
    touch("f")?;
    symlink("f", "link")?;
    fails(
        "O_NOFOLLOW",
        open_as("link", OFlags::RDONLY | OFlags::NOFOLLOW),
        Errno::LOOP,
    )?;
    fails(
        "O_NOFOLLOW|O_CREAT",
        open_as("link", CREATE | OFlags::NOFOLLOW),
        Errno::LOOP,
    )?;
    open_as("f", OFlags::RDONLY | OFlags::NOFOLLOW)?;
    Ok(())
}

fn the_directory_flag_refuses_a_file() -> Verdict {
    touch("f")?;
    symlink("f", "link")?;
    for name in ["f", "link"] {
        fails(
            name,
            open_as(name, OFlags::RDONLY | OFlags::DIRECTORY),
            Errno::NOTDIR,
        )?;
    }
    open_as(".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    Ok(())
}

fn a_directory_cannot_be_opened_for_writing() -> Verdict {
    open_directory("d")?;
    for flags in [
        OFlags::WRONLY,
        OFlags::RDWR,
        OFlags::RDONLY | OFlags::CREATE,
        OFlags::WRONLY | OFlags::TRUNC,
    ] {
        fails(&format!("{flags:?}"), open_as("d", flags), Errno::ISDIR)?;
    }
    fails("read", read(reader("d")?, &mut [0; 1][..]), Errno::ISDIR)
}

fn a_missing_parent_or_empty_path_is_enoent() -> Verdict {
    fails("missing", reader("missing"), Errno::NOENT)?;
    fails("missing/f", create("missing/f", 0o644), Errno::NOENT)?;
    fails("empty", reader(""), Errno::NOENT)
}

fn a_file_as_parent_is_enotdir() -> Verdict {
    touch("f")?;
    fails("f/g", reader("f/g"), Errno::NOTDIR)?;
    fails("create f/g", create("f/g", 0o644), Errno::NOTDIR)?;
    fails("f/..", reader("f/.."), Errno::NOTDIR)
}

fn a_trailing_slash_wants_a_directory() -> Verdict {
    touch("f")?;
    fails("f/", reader("f/"), Errno::NOTDIR)?;
    fails(
        "create new/",
        open("new/", CREATE, mode(0o644)),
        Errno::ISDIR,
    )?;
    fails("lstat f/", lstat("f/"), Errno::NOTDIR)?;
    fails("new", lstat("new"), Errno::NOENT)
}

fn a_circle_of_links_is_eloop() -> Verdict {
    symlink("b", "a")?;
    symlink("a", "b")?;
    symlink("self", "self")?;
    for name in ["a", "self", "a/x"] {
        fails(name, reader(name), Errno::LOOP)?;
        fails(name, bits(name), Errno::LOOP)?;
    }
    Ok(())
}

fn forty_links_are_followed_and_no_more() -> Verdict {
    put("0", b"end")?;
    for link in 1..=41 {
        symlink(format!("{}", link - 1), format!("{link}"))?;
    }
    equal("forty", contents("40")?, b"end".to_vec())?;
    fails("forty-one", reader("41"), Errno::LOOP)
}

fn a_descriptor_does_only_what_it_was_opened_for() -> Verdict {
    put("f", b"x")?;
    fails("write", write(reader("f")?, b"y"), Errno::BADF)?;
    fails(
        "read",
        read(open_as("f", OFlags::WRONLY)?, &mut [0; 1][..]),
        Errno::BADF,
    )?;
    fails(
        "ftruncate",
        rustix::fs::ftruncate(reader("f")?, 0),
        Errno::INVAL,
    )
}

fn the_creator_may_use_a_file_of_mode_0() -> Verdict {
    ALICE.run(|| {
        let file = create("f", 0)?;
        write_all(&file, b"mine")?;
        equal("contents", read_at(&file, 0, 9)?, b"mine".to_vec())?;
        fails("second open", reader("f"), Errno::ACCESS)?;
        let read_only = create("g", 0o444)?;
        write_all(&read_only, b"too")?;
        fails("open for writing", writer("g"), Errno::ACCESS)
    })
}

fn a_path_descriptor_names_and_does_not_read() -> Verdict {
    put("f", b"x")?;
    let path = open_as("f", OFlags::PATH)?;
    equal("size", fstat(&path)?.st_size, 1)?;
    fails("read", read(&path, &mut [0; 1][..]), Errno::BADF)?;
    fails("fchmod", fchmod(&path, mode(0o600)), Errno::BADF)?;
    fails("fsync", rustix::fs::fsync(&path), Errno::BADF)
}

fn a_path_descriptor_of_a_link_is_the_link() -> Verdict {
    symlink("nowhere", "link")?;
    let path = open_as("link", OFlags::PATH | OFlags::NOFOLLOW)?;
    equal(
        "type",
        FileType::from_raw_mode(fstat(&path)?.st_mode),
        FileType::Symlink,
    )?;
    equal(
        "target",
        readlinkat(&path, "", Vec::new())?.into_bytes(),
        b"nowhere".to_vec(),
    )
}

fn a_path_descriptor_can_be_reopened() -> Verdict {
    put("f", b"x")?;
    let path = open_as("f", OFlags::PATH)?;
    rustix::fs::rename("f", "g")?;
    let by_proc = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&path));
    equal("contents", contents(&by_proc)?, b"x".to_vec())
}

fn an_anonymous_file_has_no_name() -> Verdict {
    let file = open_as(".", OFlags::TMPFILE | OFlags::RDWR)?;
    write_all(&file, b"x")?;
    equal("links", fstat(&file)?.st_nlink, 0)?;
    equal("contents", read_at(&file, 0, 9)?, b"x".to_vec())?;
    equal("names", names(".")?.len(), 0)
}

fn an_anonymous_file_can_be_given_a_name() -> Verdict {
    let file = open(".", OFlags::TMPFILE | OFlags::RDWR, mode(0o640))?;
    write_all(&file, b"x")?;
    let by_proc = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    linkat(CWD, &*by_proc, CWD, "f", AtFlags::SYMLINK_FOLLOW)?;
    equal("contents", contents("f")?, b"x".to_vec())?;
    equal_bits("mode", bits("f")?, 0o640)?;
    equal("links", links("f")?, 1)
}

fn an_anonymous_file_may_be_kept_nameless() -> Verdict {
    let file = open_as(".", OFlags::TMPFILE | OFlags::RDWR | OFlags::EXCL)?;
    let by_proc = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    fails(
        "link",
        linkat(CWD, &*by_proc, CWD, "f", AtFlags::SYMLINK_FOLLOW),
        Errno::NOENT,
    )
}

fn anonymous_files_exist_or_are_refused_as_documented() -> Verdict {
    match open_as(".", OFlags::TMPFILE | OFlags::RDWR) {
        Ok(_) => Ok(()),
        refused => fails("O_TMPFILE", refused, Errno::NOTSUP),
    }?;
    equal("names", names(".")?.len(), 0)
}

fn one_of_many_exclusive_creators_wins() -> Verdict {
    for round in 0..10 {
        let name = round.to_string();
        let mut racers = Vec::new();
        for _ in 0..4 {
            racers.push(start(|| {
                create(&name, 0o644).map(drop).map_err(Fail::from)
            })?);
        }
        let winners = racers
            .into_iter()
            .filter_map(|racer| racer.join().ok())
            .count();
        equal(format!("winners of round {round}"), winners, 1)?;
    }
    Ok(())
}

/// A page at an address that direct I/O accepts.
#[repr(align(4096))]
struct Page([u8; 4096]);

fn direct_reads_and_writes_agree_with_cached_ones() -> Verdict {
    put("f", &[b'a'; 8192])?;
    let direct = match open_as("f", OFlags::RDWR | OFlags::DIRECT) {
        // A file system may refuse direct I/O, but only so.
        Err(Errno::INVAL) => return Ok(()),
        opened => opened?,
    };
    write_at(&direct, 4096, &Page([b'b'; 4096]).0)?;
    equal(
        "cached read after direct write",
        contents("f")?,
        [[b'a'; 4096], [b'b'; 4096]].concat(),
    )?;
    write_at(writer("f")?, 0, &[b'c'; 4096])?;
    let mut page = Page([0; 4096]);
    equal(
        "length of a direct read",
        rustix::io::pread(&direct, &mut page.0[..], 0)?,
        4096,
    )?;
    equal(
        "direct read after cached write",
        page.0 == [b'c'; 4096],
        true,
    )
}

fn synchronous_writes_are_read_back() -> Verdict {
    touch("f")?;
    let file = open_as("f", OFlags::RDWR | OFlags::SYNC)?;
    write_all(&file, &[b'x'; 10_000])?;
    equal("contents", contents("f")? == [b'x'; 10_000], true)
}

fn only_the_owner_may_ask_for_no_access_time() -> Verdict {
    touch("f")?;
    ALICE.run(|| {
        fails(
            "another's file",
            open_as("f", OFlags::RDONLY | OFlags::NOATIME),
            Errno::PERM,
        )?;
        touch("mine")?;
        open_as("mine", OFlags::RDONLY | OFlags::NOATIME)?;
        Ok(())
    })
}

fn resolution_beneath_a_directory_stays_there() -> Verdict {
    open_directory("d")?;
    touch("outside")?;
    touch("d/inside")?;
    symlink("../outside", "d/out")?;
    symlink("inside", "d/in")?;
    let d = open_as("d", OFlags::PATH)?;
    let beneath = |path| openat2(&d, path, OFlags::RDONLY, mode(0), ResolveFlags::BENEATH);
    beneath("in")?;
    for path in ["out", "../outside", "/"] {
        fails(path, beneath(path), Errno::XDEV)?;
    }
    Ok(())
}

fn an_open_socket_or_readerless_fifo_is_enxio() -> Verdict {
    node("fifo", FileType::Fifo, 0o644, 0)?;
    node("socket", FileType::Socket, 0o644, 0)?;
    fails(
        "fifo",
        open_as("fifo", OFlags::WRONLY | OFlags::NONBLOCK),
        Errno::NXIO,
    )?;
    fails("socket", reader("socket"), Errno::NXIO)
}

fn a_refused_creation_leaves_nothing() -> Verdict {
    directory("d", 0o755)?;
    ALICE.run(|| fails("create", create("d/f", 0o644), Errno::ACCESS))?;
    equal("names", names("d")?.len(), 0)
}
