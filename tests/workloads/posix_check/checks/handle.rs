//! Files that are open and have no name any more.

use std::os::fd::AsRawFd;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, OFlags, XattrFlags, fallocate, fchmod, fchown,
    fgetxattr, fsetxattr, fstat, fsync, ftruncate, futimens, link, linkat, lstat, rename, unlink,
};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::{Gate, start};
use crate::verdict::*;

checks![
    an_unlinked_file_can_be_read_and_written,
    an_unlinked_file_has_no_links,
    an_unlinked_file_keeps_attributes,
    an_unlinked_file_can_be_resized,
    an_unlinked_file_can_be_reopened,
    an_unlinked_file_gets_no_new_name,
    a_new_file_of_the_old_name_is_another,
    a_file_with_another_name_stays,
    an_unlinked_file_is_shared_with_a_child,
    an_unlinked_fifo_still_carries,
    an_unlinked_file_frees_its_blocks_at_the_end,
    many_unlinked_files_stay_apart,
    a_renamed_over_file_stays_readable_in_another_process,
];

fn an_unlinked_file_can_be_read_and_written() -> Verdict {
    put("f", b"before")?;
    let file = writer("f")?;
    unlink("f")?;
    equal("read", read_at(&file, 0, 10)?, b"before".to_vec())?;
    write_at(&file, 6, b" and after")?;
    equal(
        "read again",
        read_at(&file, 0, 100)?,
        b"before and after".to_vec(),
    )?;
    fsync(&file)?;
    equal("names", names(".")?.len(), 0)
}

fn an_unlinked_file_has_no_links() -> Verdict {
    let file = create("f", 0o644)?;
    equal("before", fstat(&file)?.st_nlink, 1)?;
    unlink("f")?;
    equal("after", fstat(&file)?.st_nlink, 0)
}

fn an_unlinked_file_keeps_attributes() -> Verdict {
    let file = create("f", 0o644)?;
    unlink("f")?;
    fchmod(&file, mode(0o4711))?;
    equal_bits("mode", fstat(&file)?.st_mode & 0o7777, 0o4711)?;
    fchown(
        &file,
        Some(rustix::fs::Uid::from_raw(3)),
        Some(rustix::fs::Gid::from_raw(4)),
    )?;
    equal(
        "owner",
        (fstat(&file)?.st_uid, fstat(&file)?.st_gid),
        (3, 4),
    )?;
    futimens(&file, &times((5, 6), (7, 8)))?;
    equal("modification", modified(&fstat(&file)?), (7, 8))?;
    fsetxattr(&file, "user.a", b"x", XattrFlags::empty())?;
    equal("attribute", fgetxattr(&file, "user.a", &mut [0; 9][..])?, 1)
}

fn an_unlinked_file_can_be_resized() -> Verdict {
    let file = create("f", 0o644)?;
    unlink("f")?;
    ftruncate(&file, 10_000)?;
    equal("size", fstat(&file)?.st_size, 10_000)?;
    fallocate(&file, FallocateFlags::empty(), 0, 20_000)?;
    equal("allocated size", fstat(&file)?.st_size, 20_000)?;
    ftruncate(&file, 0)?;
    equal("empty", read_at(&file, 0, 10)?.len(), 0)
}

fn an_unlinked_file_can_be_reopened() -> Verdict {
    put("f", b"x")?;
    let file = reader("f")?;
    unlink("f")?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    write_all(open_as(&path, OFlags::WRONLY | OFlags::APPEND)?, b"y")?;
    equal("contents", read_at(&file, 0, 9)?, b"xy".to_vec())
}

fn an_unlinked_file_gets_no_new_name() -> Verdict {
    let file = create("f", 0o644)?;
    unlink("f")?;
    fails(
        "link",
        linkat(&file, "", CWD, "g", AtFlags::EMPTY_PATH),
        Errno::NOENT,
    )
}

fn a_new_file_of_the_old_name_is_another() -> Verdict {
    put("f", b"old")?;
    let old = writer("f")?;
    unlink("f")?;
    put("f", b"new")?;
    write_at(&old, 0, b"OLD")?;
    equal("by name", contents("f")?, b"new".to_vec())?;
    equal("by descriptor", read_at(&old, 0, 9)?, b"OLD".to_vec())?;
    holds("inodes differ", fstat(&old)?.st_ino != lstat("f")?.st_ino)
}

fn a_file_with_another_name_stays() -> Verdict {
    put("f", b"x")?;
    link("f", "g")?;
    let file = writer("f")?;
    unlink("f")?;
    equal("links", fstat(&file)?.st_nlink, 1)?;
    write_at(&file, 1, b"y")?;
    equal("contents", contents("g")?, b"xy".to_vec())
}

fn an_unlinked_file_is_shared_with_a_child() -> Verdict {
    let file = create("f", 0o644)?;
    unlink("f")?;
    start(|| Ok(write_all(&file, b"from the child")?))?.join()?;
    equal(
        "contents",
        read_at(&file, 0, 100)?,
        b"from the child".to_vec(),
    )
}

fn an_unlinked_fifo_still_carries() -> Verdict {
    node("p", FileType::Fifo, 0o644, 0)?;
    let both = open_as("p", OFlags::RDWR)?;
    unlink("p")?;
    write_all(&both, b"x")?;
    let mut byte = [0; 1];
    rustix::io::read(&both, &mut byte[..])?;
    equal("byte", byte, *b"x")
}

fn an_unlinked_file_frees_its_blocks_at_the_end() -> Verdict {
    let file = create("f", 0o644)?;
    write_at(&file, 0, &vec![b'x'; 4 << 20])?;
    fsync(&file)?;
    unlink("f")?;
    holds(
        "the file still has its blocks",
        fstat(&file)?.st_blocks >= 8192,
    )
}

fn many_unlinked_files_stay_apart() -> Verdict {
    let mut files = Vec::new();
    for number in 0..200_u32 {
        put("f", number.to_string().as_bytes())?;
        files.push(reader("f")?);
        unlink("f")?;
    }
    for (number, file) in files.iter().enumerate() {
        equal(
            "contents",
            read_at(file, 0, 9)?,
            number.to_string().into_bytes(),
        )?;
    }
    Ok(())
}

fn a_renamed_over_file_stays_readable_in_another_process() -> Verdict {
    put("f", b"old")?;
    put("g", b"new")?;
    let (opened, replaced) = (Gate::new()?, Gate::new()?);
    let reading = start(|| {
        let file = reader("f")?;
        opened.open()?;
        replaced.wait()?;
        equal("old contents", read_at(&file, 0, 9)?, b"old".to_vec())?;
        equal("new contents", contents("f")?, b"new".to_vec())
    })?;
    opened.wait()?;
    rename("g", "f")?;
    replaced.open()?;
    reading.join()
}
