//! flock(2) and byte-range locks, between processes of one kernel.

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, dup};

use super::checks;
use crate::act::*;
use crate::peer::{Gate, start};
use crate::sys::Kind::{Read, Unlock, Write};
use crate::sys::{Conflict, Owner, conflict, lock};
use crate::verdict::*;

checks![
    an_exclusive_flock_excludes_every_other,
    shared_flocks_go_together,
    a_flock_can_change_its_kind,
    duplicates_share_a_flock,
    a_flock_ends_with_its_last_descriptor,
    a_flock_ends_with_its_process,
    a_flock_waits_for_another,
    a_flock_needs_no_writer,
    a_record_lock_excludes_an_overlapping_one,
    a_record_lock_does_not_exclude_its_own_process,
    read_locks_go_together,
    a_conflict_is_described,
    unlocking_the_middle_leaves_the_ends,
    any_close_ends_a_processs_record_locks,
    a_child_does_not_inherit_record_locks,
    a_record_lock_waits_for_another,
    a_circle_of_waiting_is_edeadlk,
    a_write_lock_needs_a_writer,
    a_record_lock_ends_with_its_process,
    a_lock_to_the_end_covers_what_comes_later,
    open_file_locks_conflict_within_a_process,
    open_file_locks_survive_another_close,
    open_file_locks_are_inherited,
    an_open_file_lock_waits_for_another,
    the_kinds_of_locks_see_each_other_as_documented,
    processes_count_under_a_lock,
];

/// How long somebody who must be blocked is watched, in milliseconds.
const WATCH: i64 = 50;

const TRY_EXCLUSIVE: FlockOperation = FlockOperation::NonBlockingLockExclusive;
const TRY_SHARED: FlockOperation = FlockOperation::NonBlockingLockShared;

fn an_exclusive_flock_excludes_every_other() -> Verdict {
    touch("f")?;
    let (one, two) = (reader("f")?, reader("f")?);
    flock(&one, TRY_EXCLUSIVE)?;
    fails("exclusive", flock(&two, TRY_EXCLUSIVE), Errno::AGAIN)?;
    fails("shared", flock(&two, TRY_SHARED), Errno::AGAIN)?;
    start(|| {
        fails(
            "another process",
            flock(reader("f")?, TRY_SHARED),
            Errno::AGAIN,
        )
    })?
    .join()?;
    flock(&one, FlockOperation::Unlock)?;
    Ok(flock(&two, TRY_EXCLUSIVE)?)
}

fn shared_flocks_go_together() -> Verdict {
    touch("f")?;
    let (one, two, three) = (reader("f")?, reader("f")?, reader("f")?);
    flock(&one, TRY_SHARED)?;
    flock(&two, TRY_SHARED)?;
    fails("exclusive", flock(&three, TRY_EXCLUSIVE), Errno::AGAIN)
}

fn a_flock_can_change_its_kind() -> Verdict {
    touch("f")?;
    let (one, two) = (reader("f")?, reader("f")?);
    flock(&one, TRY_SHARED)?;
    flock(&one, TRY_EXCLUSIVE)?;
    fails("while exclusive", flock(&two, TRY_SHARED), Errno::AGAIN)?;
    flock(&one, TRY_SHARED)?;
    Ok(flock(&two, TRY_SHARED)?)
}

fn duplicates_share_a_flock() -> Verdict {
    touch("f")?;
    let one = reader("f")?;
    let duplicate = dup(&one)?;
    flock(&one, TRY_EXCLUSIVE)?;
    flock(&duplicate, TRY_EXCLUSIVE)?;
    flock(&duplicate, FlockOperation::Unlock)?;
    Ok(flock(reader("f")?, TRY_EXCLUSIVE)?)
}

fn a_flock_ends_with_its_last_descriptor() -> Verdict {
    touch("f")?;
    let (one, two) = (reader("f")?, reader("f")?);
    let duplicate = dup(&one)?;
    flock(&one, TRY_EXCLUSIVE)?;
    drop(one);
    fails(
        "one of two closed",
        flock(&two, TRY_EXCLUSIVE),
        Errno::AGAIN,
    )?;
    drop(duplicate);
    Ok(flock(&two, TRY_EXCLUSIVE)?)
}

fn a_flock_ends_with_its_process() -> Verdict {
    touch("f")?;
    let (locked, finish) = (Gate::new()?, Gate::new()?);
    let other = start(|| {
        let file = reader("f")?;
        flock(&file, TRY_EXCLUSIVE)?;
        locked.open()?;
        finish.wait()?;
        std::process::exit(0)
    })?;
    locked.wait()?;
    let file = reader("f")?;
    fails("while it lives", flock(&file, TRY_EXCLUSIVE), Errno::AGAIN)?;
    finish.open()?;
    other.join()?;
    Ok(flock(&file, TRY_EXCLUSIVE)?)
}

/// `hold` takes a lock, `wait` must block until `release` gives it back.
fn blocks(wait: impl FnOnce() -> Verdict, release: impl FnOnce() -> Verdict) -> Verdict {
    let (ready, through) = (Gate::new()?, Gate::new()?);
    let waiter = start(|| {
        ready.open()?;
        wait()?;
        Ok(through.open()?)
    })?;
    ready.wait()?;
    holds("the second one is blocked", through.stays_shut(WATCH)?)?;
    release()?;
    waiter.join()
}

fn a_flock_waits_for_another() -> Verdict {
    touch("f")?;
    let holder = reader("f")?;
    flock(&holder, TRY_EXCLUSIVE)?;
    blocks(
        || Ok(flock(reader("f")?, FlockOperation::LockExclusive)?),
        || Ok(flock(&holder, FlockOperation::Unlock)?),
    )
}

fn a_flock_needs_no_writer() -> Verdict {
    touch("f")?;
    open_directory("d")?;
    flock(reader("f")?, TRY_EXCLUSIVE)?;
    Ok(flock(reader("d")?, TRY_EXCLUSIVE)?)
}

fn a_record_lock_excludes_an_overlapping_one() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Write, (10, 10), false)?;
    start(|| {
        let other = writer("f")?;
        for range in [(0, 11), (19, 1), (12, 3), (0, 0)] {
            fails(
                &format!("{range:?}"),
                lock(&other, Owner::Process, Read, range, false),
                Errno::AGAIN,
            )?;
        }
        lock(&other, Owner::Process, Write, (0, 10), false)?;
        Ok(lock(&other, Owner::Process, Write, (20, 0), false)?)
    })?
    .join()
}

fn a_record_lock_does_not_exclude_its_own_process() -> Verdict {
    touch("f")?;
    let (one, two) = (writer("f")?, writer("f")?);
    lock(&one, Owner::Process, Write, (0, 0), false)?;
    Ok(lock(&two, Owner::Process, Write, (0, 0), false)?)
}

fn read_locks_go_together() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Read, (0, 0), false)?;
    start(|| {
        let other = writer("f")?;
        lock(&other, Owner::Process, Read, (0, 0), false)?;
        fails(
            "write",
            lock(&other, Owner::Process, Write, (0, 0), false),
            Errno::AGAIN,
        )
    })?
    .join()
}

fn a_conflict_is_described() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Write, (100, 50), false)?;
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    start(|| {
        let other = writer("f")?;
        let expected = Conflict {
            kind: Write,
            range: (100, 50),
            pid,
        };
        equal(
            "in the way",
            conflict(&other, Owner::Process, Read, (0, 0))?,
            Some(expected),
        )?;
        equal(
            "beside",
            conflict(&other, Owner::Process, Read, (0, 100))?,
            None,
        )
    })?
    .join()
}

fn unlocking_the_middle_leaves_the_ends() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Write, (0, 30), false)?;
    lock(&file, Owner::Process, Unlock, (10, 10), false)?;
    start(|| {
        let other = writer("f")?;
        lock(&other, Owner::Process, Write, (10, 10), false)?;
        fails(
            "before",
            lock(&other, Owner::Process, Write, (9, 1), false),
            Errno::AGAIN,
        )?;
        fails(
            "after",
            lock(&other, Owner::Process, Write, (20, 1), false),
            Errno::AGAIN,
        )
    })?
    .join()
}

fn any_close_ends_a_processs_record_locks() -> Verdict {
    touch("f")?;
    let (one, two) = (writer("f")?, writer("f")?);
    lock(&one, Owner::Process, Write, (0, 0), false)?;
    drop(two);
    start(|| Ok(lock(writer("f")?, Owner::Process, Write, (0, 0), false)?))?.join()
}

fn a_child_does_not_inherit_record_locks() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Write, (0, 0), false)?;
    start(|| {
        fails(
            "child",
            lock(&file, Owner::Process, Write, (0, 0), false),
            Errno::AGAIN,
        )
    })?
    .join()
}

fn a_record_lock_waits_for_another() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Write, (0, 10), false)?;
    blocks(
        || Ok(lock(writer("f")?, Owner::Process, Write, (5, 1), true)?),
        || Ok(lock(&file, Owner::Process, Unlock, (0, 10), false)?),
    )
}

fn a_circle_of_waiting_is_edeadlk() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Write, (0, 1), false)?;
    let (ready, waits) = (Gate::new()?, Gate::new()?);
    let other = start(|| {
        let file = writer("f")?;
        lock(&file, Owner::Process, Write, (1, 1), false)?;
        ready.open()?;
        lock(&file, Owner::Process, Write, (0, 1), true)?;
        Ok(waits.open()?)
    })?;
    ready.wait()?;
    holds("the other one is blocked", waits.stays_shut(WATCH)?)?;
    fails(
        "the second wait",
        lock(&file, Owner::Process, Write, (1, 1), true),
        Errno::DEADLK,
    )?;
    lock(&file, Owner::Process, Unlock, (0, 1), false)?;
    other.join()
}

fn a_write_lock_needs_a_writer() -> Verdict {
    touch("f")?;
    fails(
        "write",
        lock(reader("f")?, Owner::Process, Write, (0, 0), false),
        Errno::BADF,
    )?;
    let only = open_as("f", rustix::fs::OFlags::WRONLY)?;
    fails(
        "read",
        lock(only, Owner::Process, Read, (0, 0), false),
        Errno::BADF,
    )
}

fn a_record_lock_ends_with_its_process() -> Verdict {
    touch("f")?;
    start(|| {
        let file = writer("f")?;
        lock(&file, Owner::Process, Write, (0, 0), false)?;
        std::process::exit(0)
    })?
    .join()?;
    Ok(lock(writer("f")?, Owner::Process, Write, (0, 0), false)?)
}

fn a_lock_to_the_end_covers_what_comes_later() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::Process, Write, (1000, 0), false)?;
    write_at(&file, 5000, b"later")?;
    start(|| {
        fails(
            "later",
            lock(writer("f")?, Owner::Process, Write, (5000, 1), false),
            Errno::AGAIN,
        )
    })?
    .join()
}

fn open_file_locks_conflict_within_a_process() -> Verdict {
    touch("f")?;
    let (one, two) = (writer("f")?, writer("f")?);
    lock(&one, Owner::OpenFile, Write, (0, 10), false)?;
    fails(
        "overlap",
        lock(&two, Owner::OpenFile, Write, (9, 1), false),
        Errno::AGAIN,
    )?;
    lock(&two, Owner::OpenFile, Write, (10, 1), false)?;
    let expected = Conflict {
        kind: Write,
        range: (0, 10),
        pid: -1,
    };
    equal(
        "in the way",
        conflict(&two, Owner::OpenFile, Write, (0, 5))?,
        Some(expected),
    )
}

fn open_file_locks_survive_another_close() -> Verdict {
    touch("f")?;
    let (one, two, three) = (writer("f")?, writer("f")?, writer("f")?);
    lock(&one, Owner::OpenFile, Write, (0, 0), false)?;
    drop(two);
    fails(
        "after another's close",
        lock(&three, Owner::OpenFile, Write, (0, 0), false),
        Errno::AGAIN,
    )?;
    drop(one);
    Ok(lock(&three, Owner::OpenFile, Write, (0, 0), false)?)
}

fn open_file_locks_are_inherited() -> Verdict {
    touch("f")?;
    let (one, two) = (writer("f")?, writer("f")?);
    lock(&one, Owner::OpenFile, Write, (0, 0), false)?;
    start(|| Ok(lock(&one, Owner::OpenFile, Unlock, (0, 0), false)?))?.join()?;
    Ok(lock(&two, Owner::OpenFile, Write, (0, 0), false)?)
}

fn an_open_file_lock_waits_for_another() -> Verdict {
    touch("f")?;
    let file = writer("f")?;
    lock(&file, Owner::OpenFile, Write, (0, 0), false)?;
    blocks(
        || Ok(lock(writer("f")?, Owner::OpenFile, Read, (0, 0), true)?),
        || Ok(lock(&file, Owner::OpenFile, Unlock, (0, 0), false)?),
    )
}

fn the_kinds_of_locks_see_each_other_as_documented() -> Verdict {
    touch("f")?;
    let (one, two) = (writer("f")?, writer("f")?);
    flock(&one, TRY_EXCLUSIVE)?;
    // flock and record locks do not see each other; record locks and those of open files do.
    lock(&two, Owner::Process, Write, (0, 0), false)?;
    fails(
        "open file",
        lock(&one, Owner::OpenFile, Write, (0, 0), false),
        Errno::AGAIN,
    )
}

fn processes_count_under_a_lock() -> Verdict {
    put("f", b"0")?;
    let mut counters = Vec::new();
    for _ in 0..4 {
        counters.push(start(|| {
            for _ in 0..10 {
                let file = writer("f")?;
                flock(&file, FlockOperation::LockExclusive)?;
                let number: u32 = String::from_utf8_lossy(&read_at(&file, 0, 20)?)
                    .parse()
                    .unwrap_or(0);
                write_at(&file, 0, (number + 1).to_string().as_bytes())?;
            }
            Ok(())
        })?);
    }
    counters.into_iter().try_for_each(crate::peer::Peer::join)?;
    equal("count", contents("f")?, b"40".to_vec())
}
