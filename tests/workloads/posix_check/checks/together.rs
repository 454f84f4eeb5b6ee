//! Several processes in one directory at the same time.

use std::collections::HashSet;

use rustix::fs::{OFlags, link, lstat, mkdir, rename, rmdir, unlink};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::{Peer, start};
use crate::verdict::*;

checks![
    appended_records_stay_whole,
    files_made_by_many_are_all_there,
    one_of_many_makers_of_a_directory_wins,
    one_of_many_linkers_wins,
    one_of_many_renamers_wins,
    creation_and_removal_of_one_name_end_in_order,
    writers_of_apart_ranges_do_not_disturb_each_other,
    a_tree_is_built_and_removed_by_many,
];

/// Processes at a time.
const MANY: usize = 4;

/// Runs `part` in several processes at once; all must succeed.
fn all(part: impl Fn(usize) -> Verdict) -> Verdict {
    let peers: Vec<Peer> = (0..MANY)
        .map(|number| start(|| part(number)))
        .collect::<Result<_, Errno>>()?;
    peers.into_iter().try_for_each(Peer::join)
}

/// Runs `part` in several processes at once; how many succeeded.
fn winners(part: impl Fn(usize) -> Result<(), Errno>) -> Result<usize, Fail> {
    let run = |number| start(|| part(number).map_err(Fail::from));
    let peers: Vec<Peer> = (0..MANY).map(run).collect::<Result<_, Errno>>()?;
    Ok(peers
        .into_iter()
        .filter_map(|peer| peer.join().ok())
        .count())
}

fn appended_records_stay_whole() -> Verdict {
    const RECORDS: usize = 100;
    touch("f")?;
    all(|number| {
        let file = open_as("f", OFlags::WRONLY | OFlags::APPEND)?;
        for index in 0..RECORDS {
            let record = format!("{number}:{index:04}:{}\n", "x".repeat(56));
            equal(
                "written",
                rustix::io::write(&file, record.as_bytes())?,
                record.len(),
            )?;
        }
        Ok(())
    })?;
    let text = contents("f")?;
    let mut seen = HashSet::new();
    for record in text.split_inclusive(|byte| *byte == b'\n') {
        equal("length of a record", record.len(), 64)?;
        holds("a record came once", seen.insert(record.to_vec()))?;
    }
    equal("records", seen.len(), MANY * RECORDS)
}

fn files_made_by_many_are_all_there() -> Verdict {
    all(|number| (0..50).try_for_each(|index| Ok(touch(&format!("{number}-{index}"))?)))?;
    equal("names", names(".")?.len(), MANY * 50)?;
    all(|number| (0..50).try_for_each(|index| Ok(unlink(format!("{number}-{index}"))?)))?;
    equal("names left", names(".")?.len(), 0)
}

fn one_of_many_makers_of_a_directory_wins() -> Verdict {
    for round in 0..10 {
        equal(
            "winners",
            winners(|_| mkdir(format!("{round}"), mode(0o755)))?,
            1,
        )?;
    }
    Ok(())
}

fn one_of_many_linkers_wins() -> Verdict {
    for number in 0..MANY {
        touch(&format!("from-{number}"))?;
    }
    for round in 0..10 {
        let to = format!("to-{round}");
        equal(
            "winners",
            winners(|number| link(format!("from-{number}"), &*to))?,
            1,
        )?;
        equal("links", links(&to)? >= 2, true)?;
    }
    Ok(())
}

fn one_of_many_renamers_wins() -> Verdict {
    for round in 0..10 {
        let from = format!("from-{round}");
        touch(&from)?;
        equal(
            "winners",
            winners(|number| rename(&*from, format!("to-{round}-{number}")))?,
            1,
        )?;
    }
    equal("names", names(".")?.len(), 10)
}

fn creation_and_removal_of_one_name_end_in_order() -> Verdict {
    all(|_| {
        for _ in 0..30 {
            match create("f", 0o644) {
                Ok(_) | Err(Errno::EXIST) => {}
                Err(errno) => {
                    return Err(Fail(format!(
                        "create: expected success or EEXIST got {}",
                        name(errno)
                    )));
                }
            }
            match unlink("f") {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    return Err(Fail(format!(
                        "unlink: expected success or ENOENT got {}",
                        name(errno)
                    )));
                }
            }
        }
        Ok(())
    })?;
    equal("names", names(".")?.len(), 0)?;
    touch("f")?;
    equal("links", links("f")?, 1)
}

fn writers_of_apart_ranges_do_not_disturb_each_other() -> Verdict {
    const STRIPE: usize = 1000;
    touch("f")?;
    all(|number| {
        let file = writer("f")?;
        let byte = b'a' + u8::try_from(number).unwrap_or_default();
        for round in 0..100 {
            // Stripes that share pages with their neighbours.
            write_at(
                &file,
                ((round * MANY + number) * STRIPE) as u64,
                &[byte; STRIPE],
            )?;
        }
        Ok(())
    })?;
    let bytes = contents("f")?;
    equal("size", bytes.len(), 100 * MANY * STRIPE)?;
    for (index, stripe) in bytes.chunks(STRIPE).enumerate() {
        let byte = b'a' + u8::try_from(index % MANY).unwrap_or_default();
        holds(
            &format!("stripe {index} is whole"),
            stripe.iter().all(|got| *got == byte),
        )?;
    }
    Ok(())
}

fn a_tree_is_built_and_removed_by_many() -> Verdict {
    all(|number| {
        let top = format!("{number}");
        mkdir(&*top, mode(0o755))?;
        for index in 0..20 {
            let below = format!("{top}/{index}");
            mkdir(&*below, mode(0o755))?;
            touch(&format!("{below}/f"))?;
            rename(&*below, format!("{top}/moved-{index}"))?;
        }
        Ok(())
    })?;
    equal("links", lstat("0")?.st_nlink, 22)?;
    all(|number| {
        for index in 0..20 {
            let below = format!("{number}/moved-{index}");
            unlink(format!("{below}/f"))?;
            rmdir(&*below)?;
        }
        Ok(rmdir(format!("{number}"))?)
    })?;
    equal("names", names(".")?.len(), 0)
}
