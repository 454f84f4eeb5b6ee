//! Memory maps of files.

use rustix::fs::{OFlags, fstat, fsync, ftruncate, lstat, unlink};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::{Gate, start};
use crate::sys::{Access, Map};
use crate::verdict::*;

checks![
    a_map_shows_what_the_file_holds,
    a_write_through_a_shared_map_is_read,
    a_write_to_the_file_is_seen_in_the_map,
    two_maps_of_a_file_agree,
    processes_share_a_map,
    a_private_map_keeps_its_changes,
    a_map_outlives_its_descriptor_and_name,
    the_rest_of_the_last_page_is_zero_and_stays_out_of_the_file,
    touching_beyond_the_end_is_sigbus,
    truncation_takes_pages_away,
    an_extended_file_is_seen_in_its_map,
    a_shared_writable_map_needs_a_writer,
    a_directory_cannot_be_mapped,
    an_empty_map_is_einval,
    a_write_through_a_map_moves_the_modification_time,
    a_large_map_is_whole,
    sparse_pages_are_filled_through_a_map,
];

const PAGE: usize = 4096;

fn a_map_shows_what_the_file_holds() -> Verdict {
    put("f", &[[b'a'; PAGE], [b'b'; PAGE]].concat())?;
    let map = Map::new(reader("f")?, 2 * PAGE, Access::SharedRead)?;
    equal(
        "bytes",
        (map.load(0), map.load(PAGE - 1), map.load(PAGE)),
        (b'a', b'a', b'b'),
    )
}

fn a_write_through_a_shared_map_is_read() -> Verdict {
    put("f", &[b'a'; 2 * PAGE])?;
    let map = Map::new(writer("f")?, 2 * PAGE, Access::SharedWrite)?;
    map.write(PAGE - 2, b"wxyz");
    equal(
        "read",
        read_at(reader("f")?, PAGE as u64 - 2, 4)?,
        b"wxyz".to_vec(),
    )?;
    map.sync()?;
    equal(
        "read after msync",
        read_at(reader("f")?, PAGE as u64 - 2, 4)?,
        b"wxyz".to_vec(),
    )?;
    drop(map);
    equal("read after munmap", contents("f")?.len(), 2 * PAGE)
}

fn a_write_to_the_file_is_seen_in_the_map() -> Verdict {
    put("f", &[b'a'; PAGE])?;
    let file = writer("f")?;
    let map = Map::new(&file, PAGE, Access::SharedRead)?;
    equal("before", map.load(10), b'a')?;
    write_at(&file, 10, b"new")?;
    equal("after", map.read(10, 3), b"new".to_vec())
}

fn two_maps_of_a_file_agree() -> Verdict {
    put("f", &[b'a'; PAGE])?;
    let one = Map::new(writer("f")?, PAGE, Access::SharedWrite)?;
    let two = Map::new(writer("f")?, PAGE, Access::SharedWrite)?;
    one.store(5, b'1');
    equal("two", two.load(5), b'1')?;
    two.store(6, b'2');
    equal("one", one.load(6), b'2')
}

fn processes_share_a_map() -> Verdict {
    put("f", &[0; PAGE])?;
    let (written, answered) = (Gate::new()?, Gate::new()?);
    let other = start(|| {
        let map = Map::new(writer("f")?, PAGE, Access::SharedWrite)?;
        written.wait()?;
        equal("what was written here", map.load(0), 7)?;
        map.store(1, 8);
        Ok(answered.open()?)
    })?;
    let map = Map::new(writer("f")?, PAGE, Access::SharedWrite)?;
    map.store(0, 7);
    written.open()?;
    answered.wait()?;
    equal("what was written there", map.load(1), 8)?;
    other.join()
}

fn a_private_map_keeps_its_changes() -> Verdict {
    put("f", &[b'a'; PAGE])?;
    let map = Map::new(reader("f")?, PAGE, Access::PrivateWrite)?;
    map.store(0, b'z');
    equal("map", map.load(0), b'z')?;
    equal("file", contents("f")?[0], b'a')
}

fn a_map_outlives_its_descriptor_and_name() -> Verdict {
    put("f", &[b'a'; PAGE])?;
    let file = writer("f")?;
    let map = Map::new(&file, PAGE, Access::SharedWrite)?;
    drop(file);
    unlink("f")?;
    equal("load", map.load(PAGE - 1), b'a')?;
    map.store(0, b'b');
    map.sync()?;
    equal("stored", map.load(0), b'b')
}

fn the_rest_of_the_last_page_is_zero_and_stays_out_of_the_file() -> Verdict {
    put("f", b"abc")?;
    let file = writer("f")?;
    let map = Map::new(&file, PAGE, Access::SharedWrite)?;
    equal(
        "rest",
        map.read(3, PAGE - 3).iter().all(|byte| *byte == 0),
        true,
    )?;
    map.store(3, b'X');
    map.sync()?;
    drop(map);
    equal("contents", contents("f")?, b"abc".to_vec())?;
    ftruncate(&file, 10)?;
    equal("extended", contents("f")?, b"abc\0\0\0\0\0\0\0".to_vec())
}

fn touching_beyond_the_end_is_sigbus() -> Verdict {
    put("f", b"abc")?;
    let toucher = start(|| {
        let map = Map::new(reader("f")?, 2 * PAGE, Access::SharedRead)?;
        map.load(PAGE);
        Ok(())
    })?;
    equal(
        "signal",
        toucher.wait()?.terminating_signal(),
        Some(libc::SIGBUS),
    )
}

fn truncation_takes_pages_away() -> Verdict {
    put("f", &[b'a'; 3 * PAGE])?;
    let toucher = start(|| {
        let file = writer("f")?;
        let map = Map::new(&file, 3 * PAGE, Access::SharedRead)?;
        equal("before", map.load(2 * PAGE), b'a')?;
        ftruncate(&file, 100)?;
        equal("kept", (map.load(99), map.load(100)), (b'a', 0))?;
        map.load(2 * PAGE);
        Ok(())
    })?;
    equal(
        "signal",
        toucher.wait()?.terminating_signal(),
        Some(libc::SIGBUS),
    )
}

fn an_extended_file_is_seen_in_its_map() -> Verdict {
    put("f", b"abc")?;
    let file = writer("f")?;
    let map = Map::new(&file, 4 * PAGE, Access::SharedWrite)?;
    ftruncate(&file, 4 * PAGE as u64)?;
    map.store(3 * PAGE, b'x');
    map.sync()?;
    equal("file", read_at(&file, 3 * PAGE as u64, 1)?, b"x".to_vec())
}

fn a_shared_writable_map_needs_a_writer() -> Verdict {
    put("f", b"abc")?;
    fails(
        "reader",
        Map::new(reader("f")?, PAGE, Access::SharedWrite).map(drop),
        Errno::ACCESS,
    )?;
    fails(
        "writer only",
        Map::new(open_as("f", OFlags::WRONLY)?, PAGE, Access::SharedRead).map(drop),
        Errno::ACCESS,
    )?;
    Map::new(reader("f")?, PAGE, Access::SharedExecute)?;
    Ok(())
}

fn a_directory_cannot_be_mapped() -> Verdict {
    fails(
        "directory",
        Map::new(reader(".")?, PAGE, Access::SharedRead).map(drop),
        Errno::NODEV,
    )
}

fn an_empty_map_is_einval() -> Verdict {
    put("f", b"abc")?;
    fails(
        "length 0",
        Map::new(reader("f")?, 0, Access::SharedRead).map(drop),
        Errno::INVAL,
    )
}

fn a_write_through_a_map_moves_the_modification_time() -> Verdict {
    put("f", &[b'a'; PAGE])?;
    let file = writer("f")?;
    set_times("f", OMIT, (1, 1))?;
    let map = Map::new(&file, PAGE, Access::SharedWrite)?;
    map.store(0, b'b');
    map.sync()?;
    fsync(&file)?;
    holds(
        "the modification time moved",
        modified(&fstat(&file)?) > (1, 1),
    )
}

fn a_large_map_is_whole() -> Verdict {
    let len = 16 << 20;
    let file = create("f", 0o644)?;
    ftruncate(&file, len as u64)?;
    let map = Map::new(&file, len, Access::SharedWrite)?;
    for page in 0..len / PAGE {
        map.write(page * PAGE, &(page as u64).to_le_bytes());
    }
    map.sync()?;
    let read = contents("f")?;
    for (page, bytes) in read.chunks(PAGE).enumerate() {
        equal(
            format!("page {page}"),
            &bytes[..8],
            &(page as u64).to_le_bytes()[..],
        )?;
    }
    equal("size", read.len(), len)
}

fn sparse_pages_are_filled_through_a_map() -> Verdict {
    let file = create("f", 0o644)?;
    ftruncate(&file, 64 << 20)?;
    let map = Map::new(&file, 64 << 20, Access::SharedWrite)?;
    map.store(40 << 20, b'x');
    equal("a hole", map.load(50 << 20), 0)?;
    map.sync()?;
    equal("file", read_at(&file, 40 << 20, 1)?, b"x".to_vec())?;
    holds("at most 1 MiB is allocated", lstat("f")?.st_blocks <= 2048)
}
