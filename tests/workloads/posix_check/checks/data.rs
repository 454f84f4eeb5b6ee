//! Reading, writing, lengths, and copying between files.

use std::io::{IoSlice, IoSliceMut};

use rustix::fs::{
    FileType, OFlags, SeekFrom, copy_file_range, fdatasync, fstat, fstatfs, fsync, ftruncate,
    lstat, seek, sendfile, statfs, statvfs, symlink, sync, syncfs,
};
use rustix::io::{Errno, pread, read, readv, write, writev};
use rustix::pipe::{SpliceFlags, pipe, splice, tee};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::checks;
use crate::act::*;
use crate::peer::{ALICE, start};
use crate::sys;
use crate::verdict::*;

checks![
    what_is_written_is_read,
    reading_at_the_end_gives_nothing,
    the_position_moves_with_reads_and_writes,
    positions_may_be_beyond_the_end_and_not_before_the_start,
    duplicates_share_a_position,
    a_gap_reads_as_zeros,
    vectors_are_read_and_written_in_order,
    large_transfers_are_whole,
    offsets_beyond_4_gib_work,
    truncation_cuts_and_extends_with_zeros,
    truncation_forgets_what_it_cut,
    truncation_refuses_what_is_no_file,
    truncation_by_name_follows_links,
    an_open_file_sees_its_truncation,
    the_file_size_limit_is_efbig,
    a_range_is_copied_between_files,
    a_range_is_copied_inside_a_file,
    copying_refuses_what_it_must,
    a_file_is_sent_to_a_file_and_to_a_pipe,
    a_file_is_spliced_through_pipes,
    every_kind_of_sync_works,
    the_file_system_tells_its_size,
    sparse_files_occupy_little,
    another_process_reads_what_was_written,
    many_small_appends_are_one_file,
];

/// Bytes in which no block is like another.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| {
            u8::try_from((index ^ (index >> 8) ^ (index >> 16)) & 0xff).unwrap_or_default()
        })
        .collect()
}

fn what_is_written_is_read() -> Verdict {
    for len in [0, 1, 4095, 4096, 4097, 65_537, 1_000_003] {
        let name = len.to_string();
        put(&name, &pattern(len))?;
        equal(
            format!("{len} bytes"),
            contents(&name)? == pattern(len),
            true,
        )?;
        equal(
            format!("size of {len} bytes"),
            lstat(&*name)?.st_size,
            i64::try_from(len).unwrap_or(-1),
        )?;
    }
    Ok(())
}

fn reading_at_the_end_gives_nothing() -> Verdict {
    put("f", b"abc")?;
    let file = reader("f")?;
    let mut buffer = [0; 10];
    equal("at the end", pread(&file, &mut buffer[..], 3)?, 0)?;
    equal("beyond it", pread(&file, &mut buffer[..], 1 << 40)?, 0)?;
    equal("across it", pread(&file, &mut buffer[..], 1)?, 2)
}

fn the_position_moves_with_reads_and_writes() -> Verdict {
    put("f", b"abcdef")?;
    let file = writer("f")?;
    read(&file, &mut [0; 2][..])?;
    write(&file, b"XX")?;
    equal("position", seek(&file, SeekFrom::Current(0))?, 4)?;
    pread(&file, &mut [0; 1][..], 0)?;
    equal(
        "position after pread",
        seek(&file, SeekFrom::Current(0))?,
        4,
    )?;
    equal("contents", contents("f")?, b"abXXef".to_vec())
}

fn positions_may_be_beyond_the_end_and_not_before_the_start() -> Verdict {
    put("f", b"abc")?;
    let file = reader("f")?;
    equal("beyond", seek(&file, SeekFrom::End(100))?, 103)?;
    fails("before", seek(&file, SeekFrom::End(-4)), Errno::INVAL)?;
    equal("unmoved", seek(&file, SeekFrom::Current(0))?, 103)?;
    equal("size", lstat("f")?.st_size, 3)
}

fn duplicates_share_a_position() -> Verdict {
    put("f", b"abcdef")?;
    let file = reader("f")?;
    let duplicate = rustix::io::dup(&file)?;
    start(|| {
        read(&duplicate, &mut [0; 2][..])?;
        Ok(())
    })?
    .join()?;
    equal("position", seek(&file, SeekFrom::Current(0))?, 2)
}

fn a_gap_reads_as_zeros() -> Verdict {
    let file = create("f", 0o644)?;
    write_at(&file, 100_000, b"end")?;
    let read = contents("f")?;
    equal("size", read.len(), 100_003)?;
    equal("gap", read[..100_000].iter().all(|byte| *byte == 0), true)
}

fn vectors_are_read_and_written_in_order() -> Verdict {
    let file = create("f", 0o644)?;
    let parts = [&b"one"[..], b"", b"twotwo", b"x"].map(IoSlice::new);
    equal("written", writev(&file, &parts)?, 10)?;
    seek(&file, SeekFrom::Start(0))?;
    let (mut first, mut second) = ([0; 4], [0; 20]);
    equal(
        "read",
        readv(
            &file,
            &mut [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)],
        )?,
        10,
    )?;
    equal("parts", (&first, &second[..6]), (b"onet", &b"wotwox"[..]))
}

fn large_transfers_are_whole() -> Verdict {
    let bytes = pattern(9 << 20);
    let file = create("f", 0o644)?;
    equal("one write", write(&file, &bytes)?, bytes.len())?;
    let mut back = vec![0; bytes.len()];
    equal("one read", pread(&file, &mut back[..], 0)?, bytes.len())?;
    equal("bytes", back == bytes, true)
}

fn offsets_beyond_4_gib_work() -> Verdict {
    let file = create("f", 0o644)?;
    for offset in [(1 << 31) - 1, (1 << 32) - 1, 1 << 40] {
        write_at(&file, offset, b"xyz")?;
        equal(
            format!("at {offset}"),
            read_at(&file, offset, 9)?.starts_with(b"xyz"),
            true,
        )?;
    }
    equal("size", lstat("f")?.st_size, (1 << 40) + 3)
}

fn truncation_cuts_and_extends_with_zeros() -> Verdict {
    put("f", b"abcdef")?;
    sys::truncate("f", 3)?;
    equal("cut", contents("f")?, b"abc".to_vec())?;
    ftruncate(writer("f")?, 5)?;
    equal("extended", contents("f")?, b"abc\0\0".to_vec())?;
    sys::truncate("f", 10_000_000)?;
    equal("size", lstat("f")?.st_size, 10_000_000)
}

fn truncation_forgets_what_it_cut() -> Verdict {
    put("f", &[b'x'; 10_000])?;
    // Read first, so that the pages are in the cache.
    contents("f")?;
    sys::truncate("f", 5)?;
    sys::truncate("f", 10_000)?;
    let read = contents("f")?;
    equal("kept", &read[..5], b"xxxxx")?;
    equal("zeros", read[5..].iter().all(|byte| *byte == 0), true)
}

fn truncation_refuses_what_is_no_file() -> Verdict {
    open_directory("d")?;
    node("fifo", FileType::Fifo, 0o644, 0)?;
    touch("f")?;
    fails("directory", sys::truncate("d", 0), Errno::ISDIR)?;
    fails("fifo", sys::truncate("fifo", 0), Errno::INVAL)?;
    fails("missing", sys::truncate("missing", 0), Errno::NOENT)?;
    fails("negative", sys::truncate("f", -1), Errno::INVAL)
}

fn truncation_by_name_follows_links() -> Verdict {
    put("f", b"abc")?;
    symlink("f", "s")?;
    sys::truncate("s", 1)?;
    equal("contents", contents("f")?, b"a".to_vec())
}

fn an_open_file_sees_its_truncation() -> Verdict {
    put("f", b"abcdef")?;
    let file = writer("f")?;
    start(|| Ok(sys::truncate("f", 2)?))?.join()?;
    equal("size", fstat(&file)?.st_size, 2)?;
    equal("contents", read_at(&file, 0, 10)?, b"ab".to_vec())
}

fn the_file_size_limit_is_efbig() -> Verdict {
    let file = create("f", 0o644)?;
    start(|| {
        sys::ignore(libc::SIGXFSZ);
        setrlimit(
            Resource::Fsize,
            Rlimit {
                current: Some(1000),
                maximum: Some(1000),
            },
        )?;
        equal(
            "written up to the limit",
            write(&file, &[b'x'; 1500])?,
            1000,
        )?;
        fails("beyond", write(&file, b"x"), Errno::FBIG)?;
        fails("ftruncate", ftruncate(&file, 1001), Errno::FBIG)
    })?
    .join()?;
    equal("size", lstat("f")?.st_size, 1000)
}

fn a_range_is_copied_between_files() -> Verdict {
    put("from", &pattern(300_000))?;
    let (from, to) = (reader("from")?, create("to", 0o644)?);
    let (mut at, mut into) = (1000, 50);
    let mut copied = 0;
    while copied < 200_000 {
        match copy_file_range(&from, Some(&mut at), &to, Some(&mut into), 200_000 - copied)? {
            0 => break,
            count => copied += count,
        }
    }
    equal("copied", copied, 200_000)?;
    equal(
        "bytes",
        contents("to")?[50..] == pattern(300_000)[1000..201_000],
        true,
    )?;
    let (mut near_end, mut zero) = (299_990, 0);
    equal(
        "at the end",
        copy_file_range(&from, Some(&mut near_end), &to, Some(&mut zero), 100)?,
        10,
    )
}

fn a_range_is_copied_inside_a_file() -> Verdict {
    put("f", b"abcdefgh")?;
    let file = writer("f")?;
    let (mut at, mut into) = (0, 4);
    equal(
        "copied",
        copy_file_range(&file, Some(&mut at), &file, Some(&mut into), 4)?,
        4,
    )?;
    equal("contents", contents("f")?, b"abcdabcd".to_vec())?;
    let (mut at, mut into) = (0, 2);
    fails(
        "overlap",
        copy_file_range(&file, Some(&mut at), &file, Some(&mut into), 4),
        Errno::INVAL,
    )
}

fn copying_refuses_what_it_must() -> Verdict {
    put("f", b"abc")?;
    touch("g")?;
    open_directory("d")?;
    let copy = |from, to| copy_file_range(from, None, to, None, 3);
    fails("to a reader", copy(reader("f")?, reader("g")?), Errno::BADF)?;
    fails(
        "from a writer",
        copy(open_as("f", OFlags::WRONLY)?, writer("g")?),
        Errno::BADF,
    )?;
    fails(
        "to an appender",
        copy(reader("f")?, open_as("g", OFlags::WRONLY | OFlags::APPEND)?),
        Errno::BADF,
    )?;
    fails(
        "from a directory",
        copy(reader("d")?, writer("g")?),
        Errno::ISDIR,
    )
}

fn a_file_is_sent_to_a_file_and_to_a_pipe() -> Verdict {
    put("from", &pattern(10_000))?;
    let (from, to) = (reader("from")?, create("to", 0o644)?);
    let mut offset = 0;
    while offset < 10_000 {
        sendfile(&to, &from, Some(&mut offset), 10_000)?;
    }
    equal("file", contents("to")? == pattern(10_000), true)?;
    let (out, into) = pipe()?;
    equal("sent", sendfile(&into, &from, None, 5000)?, 5000)?;
    equal("position", seek(&from, SeekFrom::Current(0))?, 5000)?;
    drop(into);
    equal("pipe", read_rest(&out)? == pattern(10_000)[..5000], true)
}

fn a_file_is_spliced_through_pipes() -> Verdict {
    put("from", &pattern(8192))?;
    let (from, to) = (reader("from")?, create("to", 0o644)?);
    let ((out, into), (copy, copied)) = (pipe()?, pipe()?);
    equal(
        "into the pipe",
        splice(&from, None, &into, None, 8192, SpliceFlags::empty())?,
        8192,
    )?;
    equal(
        "doubled",
        tee(&out, &copied, 8192, SpliceFlags::empty())?,
        8192,
    )?;
    let mut left = 8192;
    while left > 0 {
        left -= splice(&out, None, &to, None, left, SpliceFlags::MOVE)?;
    }
    drop(copied);
    equal("file", contents("to")? == pattern(8192), true)?;
    equal("double", read_rest(&copy)? == pattern(8192), true)
}

fn every_kind_of_sync_works() -> Verdict {
    let file = create("f", 0o644)?;
    write_all(&file, b"x")?;
    fsync(&file)?;
    fdatasync(&file)?;
    fsync(reader("f")?)?;
    let directory = open_as(".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    fsync(&directory)?;
    syncfs(&directory)?;
    sync();
    let (out, _into) = pipe()?;
    fails("of a pipe", fsync(&out), Errno::INVAL)
}

fn the_file_system_tells_its_size() -> Verdict {
    touch("f")?;
    let (by_name, by_descriptor) = (statfs(".")?, fstatfs(reader("f")?)?);
    equal("blocks", by_name.f_blocks, by_descriptor.f_blocks)?;
    holds(
        "there are blocks",
        by_name.f_blocks > 0 && by_name.f_bsize > 0,
    )?;
    holds(
        "free blocks are no more than all",
        by_name.f_bfree <= by_name.f_blocks && by_name.f_bavail <= by_name.f_bfree,
    )?;
    equal("longest name", statvfs(".")?.f_namemax, 255)
}

fn sparse_files_occupy_little() -> Verdict {
    let file = create("f", 0o644)?;
    ftruncate(&file, 1 << 30)?;
    write_at(&file, 1 << 29, b"x")?;
    fsync(&file)?;
    let stat = lstat("f")?;
    equal("size", stat.st_size, 1 << 30)?;
    holds(
        "at most 1 MiB is allocated",
        stat.st_blocks > 0 && stat.st_blocks <= 2048,
    )
}

fn another_process_reads_what_was_written() -> Verdict {
    put("f", b"")?;
    let file = writer("f")?;
    for number in 0..10_u64 {
        let text = number.to_string().into_bytes();
        ftruncate(&file, 0)?;
        write_at(&file, 0, &text)?;
        ALICE.run(|| equal("contents", contents("f")?, text))?;
    }
    Ok(())
}

fn many_small_appends_are_one_file() -> Verdict {
    touch("f")?;
    let mut expected = Vec::new();
    for number in 0..100 {
        let line = format!("{number}\n");
        write_all(
            open_as("f", OFlags::WRONLY | OFlags::APPEND)?,
            line.as_bytes(),
        )?;
        expected.extend(line.into_bytes());
    }
    equal("contents", contents("f")? == expected, true)
}
