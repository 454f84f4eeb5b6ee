//! fallocate(2), and finding data and holes.

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, fallocate, fsync, ftruncate, lstat, seek,
};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::verdict::*;

checks![
    allocation_extends_the_file,
    allocation_keeps_contents,
    allocation_may_keep_the_size,
    a_punched_hole_reads_as_zeros,
    punching_needs_the_size_kept,
    a_zeroed_range_reads_as_zeros,
    a_zeroed_range_may_extend_the_file,
    allocation_refuses_what_it_must,
    unsupported_modes_say_so,
    data_and_holes_are_found,
    a_file_without_holes_ends_in_one,
    seeking_beyond_the_end_is_enxio,
    an_empty_file_has_no_data,
];

const MIB: u64 = 1 << 20;

fn filled(len: usize) -> Result<std::os::fd::OwnedFd, Errno> {
    let file = create("f", 0o644)?;
    write_at(&file, 0, &vec![b'x'; len])?;
    Ok(file)
}

fn zeros(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn allocation_extends_the_file() -> Verdict {
    let file = create("f", 0o644)?;
    fallocate(&file, FallocateFlags::empty(), 1000, 100_000)?;
    equal("size", lstat("f")?.st_size, 101_000)?;
    holds("contents are zeros", zeros(&contents("f")?))?;
    holds(
        "blocks are allocated",
        lstat("f")?.st_blocks >= 100_000 / 512,
    )
}

fn allocation_keeps_contents() -> Verdict {
    let file = filled(10)?;
    fallocate(&file, FallocateFlags::empty(), 0, 5000)?;
    let read = contents("f")?;
    equal("kept", &read[..10], b"xxxxxxxxxx")?;
    equal("size", read.len(), 5000)?;
    fallocate(&file, FallocateFlags::empty(), 0, 100)?;
    equal("size after a shorter one", lstat("f")?.st_size, 5000)
}

fn allocation_may_keep_the_size() -> Verdict {
    let file = filled(10)?;
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, MIB)?;
    equal("size", lstat("f")?.st_size, 10)?;
    holds("blocks are allocated", lstat("f")?.st_blocks >= 2048)
}

fn a_punched_hole_reads_as_zeros() -> Verdict {
    let file = filled(300_000)?;
    fsync(&file)?;
    let before = lstat("f")?.st_blocks;
    fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        65_536,
        131_072,
    )?;
    let read = contents("f")?;
    equal("size", read.len(), 300_000)?;
    holds("the hole is zeros", zeros(&read[65_536..196_608]))?;
    equal("around it", (read[65_535], read[196_608]), (b'x', b'x'))?;
    holds("blocks are free again", lstat("f")?.st_blocks < before)?;
    // A hole that is not aligned zeroes exactly its bytes.
    fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        10,
        20,
    )?;
    let read = contents("f")?;
    equal(
        "before, in and after",
        (read[9], zeros(&read[10..30]), read[30]),
        (b'x', true, b'x'),
    )
}

fn punching_needs_the_size_kept() -> Verdict {
    let file = filled(10)?;
    fails_with_one_of(
        "alone",
        fallocate(&file, FallocateFlags::PUNCH_HOLE, 0, 5),
        &[Errno::NOTSUP, Errno::INVAL],
    )
}

fn a_zeroed_range_reads_as_zeros() -> Verdict {
    let file = filled(100_000)?;
    fallocate(
        &file,
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        100,
        50_000,
    )?;
    let read = contents("f")?;
    equal("size", read.len(), 100_000)?;
    equal(
        "before, in and after",
        (read[99], zeros(&read[100..50_100]), read[50_100]),
        (b'x', true, b'x'),
    )
}

fn a_zeroed_range_may_extend_the_file() -> Verdict {
    let file = filled(10)?;
    fallocate(&file, FallocateFlags::ZERO_RANGE, 5, 10_000)?;
    let read = contents("f")?;
    equal("size", read.len(), 10_005)?;
    equal(
        "kept and zeroed",
        (&read[..5], zeros(&read[5..])),
        (&b"xxxxx"[..], true),
    )
}

fn allocation_refuses_what_it_must() -> Verdict {
    let file = filled(10)?;
    let allocate =
        |file: &std::os::fd::OwnedFd, len| fallocate(file, FallocateFlags::empty(), 0, len);
    fails("length 0", allocate(&file, 0), Errno::INVAL)?;
    fails("reader", allocate(&reader("f")?, 10), Errno::BADF)?;
    node("fifo", FileType::Fifo, 0o644, 0)?;
    fails(
        "fifo",
        allocate(&open_as("fifo", OFlags::RDWR)?, 10),
        Errno::SPIPE,
    )
}

fn unsupported_modes_say_so() -> Verdict {
    let file = filled(1 << 16)?;
    for flag in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        match fallocate(&file, flag, 4096, 4096) {
            Ok(()) => {}
            refused => fails(&format!("{flag:?}"), refused, Errno::NOTSUP)?,
        }
    }
    equal("size", lstat("f")?.st_size, 1 << 16)
}

fn data_and_holes_are_found() -> Verdict {
    let file = create("f", 0o644)?;
    ftruncate(&file, 8 * MIB)?;
    write_at(&file, 2 * MIB, &vec![b'x'; 65_536])?;
    write_at(&file, 5 * MIB, &vec![b'x'; 65_536])?;
    equal("first data", seek(&file, SeekFrom::Data(0))?, 2 * MIB)?;
    equal("first hole", seek(&file, SeekFrom::Hole(0))?, 0)?;
    equal(
        "hole after data",
        seek(&file, SeekFrom::Hole(2 * MIB))?,
        2 * MIB + 65_536,
    )?;
    equal(
        "second data",
        seek(&file, SeekFrom::Data(3 * MIB))?,
        5 * MIB,
    )?;
    equal(
        "data in data",
        seek(&file, SeekFrom::Data(5 * MIB + 7))?,
        5 * MIB + 7,
    )?;
    fails(
        "no more data",
        seek(&file, SeekFrom::Data(6 * MIB)),
        Errno::NXIO,
    )
}

fn a_file_without_holes_ends_in_one() -> Verdict {
    let file = filled(10_000)?;
    equal("hole", seek(&file, SeekFrom::Hole(5))?, 10_000)?;
    equal("data", seek(&file, SeekFrom::Data(5))?, 5)
}

fn seeking_beyond_the_end_is_enxio() -> Verdict {
    let file = filled(10)?;
    for offset in [10, 11, MIB] {
        fails("data", seek(&file, SeekFrom::Data(offset)), Errno::NXIO)?;
        fails("hole", seek(&file, SeekFrom::Hole(offset)), Errno::NXIO)?;
    }
    Ok(())
}

fn an_empty_file_has_no_data() -> Verdict {
    let file = create("f", 0o644)?;
    fails("data", seek(&file, SeekFrom::Data(0)), Errno::NXIO)
}
