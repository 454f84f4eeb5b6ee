//! Access, modification and change times: who moves them, and setting them.

use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, OFlags, UTIME_NOW, futimens, lstat, symlink, utimensat};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::ALICE;
use crate::sys;
use crate::verdict::*;

checks![
    nanoseconds_are_kept,
    times_before_1970_and_after_2038_are_kept,
    now_is_now,
    what_is_omitted_stays,
    a_links_times_are_its_own,
    times_of_open_files_can_be_set,
    nanoseconds_out_of_range_are_einval,
    setting_times_moves_the_change_time,
    explicit_times_are_for_the_owner,
    a_writer_may_set_times_to_now,
    a_new_file_has_the_time_of_the_clock,
    writing_moves_modification_and_change_time,
    writing_nothing_moves_no_time,
    reading_moves_the_access_time_of_an_old_one,
    listing_moves_the_access_time_of_an_old_one,
    truncation_moves_modification_and_change_time,
    opening_moves_no_time,
    modes_and_owners_move_the_change_time_only,
    creation_truncating_moves_the_times,
];

const NOW: Time = (0, UTIME_NOW);

fn nanoseconds_are_kept() -> Verdict {
    touch("f")?;
    set_times(
        "f",
        (1_000_000_000, 123_456_789),
        (1_500_000_000, 999_999_999),
    )?;
    let stat = lstat("f")?;
    equal("access", accessed(&stat), (1_000_000_000, 123_456_789))?;
    equal(
        "modification",
        modified(&stat),
        (1_500_000_000, 999_999_999),
    )
}

fn times_before_1970_and_after_2038_are_kept() -> Verdict {
    touch("f")?;
    for seconds in [
        -0x7fff_ffff,
        -1,
        0,
        0x7fff_ffff,
        0x8000_0000,
        0x1_0000_0000,
        0x3_7fff_fffe,
    ] {
        set_times("f", (seconds, 1), (seconds, 2))?;
        let stat = lstat("f")?;
        equal("access", accessed(&stat), (seconds, 1))?;
        equal("modification", modified(&stat), (seconds, 2))?;
    }
    Ok(())
}

/// Seconds between a time and the clock, either way.
fn distance(time: Time) -> Result<i64, Fail> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.map_err(|error| Fail(error.to_string()))?.as_secs();
    Ok((i64::try_from(now).unwrap_or(i64::MAX) - time.0).abs())
}

fn now_is_now() -> Verdict {
    touch("f")?;
    set_times("f", (1, 0), (1, 0))?;
    set_times("f", NOW, OMIT)?;
    let stat = lstat("f")?;
    holds(
        "the access time is within 2 s of the clock",
        distance(accessed(&stat))? <= 2,
    )?;
    equal("modification", modified(&stat), (1, 0))?;
    set_times("f", NOW, NOW)?;
    holds(
        "the modification time is within 2 s of the clock",
        distance(modified(&lstat("f")?))? <= 2,
    )
}

fn what_is_omitted_stays() -> Verdict {
    touch("f")?;
    set_times("f", (10, 1), (20, 2))?;
    set_times("f", OMIT, (30, 3))?;
    equal("access", accessed(&lstat("f")?), (10, 1))?;
    set_times("f", (40, 4), OMIT)?;
    equal("modification", modified(&lstat("f")?), (30, 3))?;
    let before = changed(&lstat("f")?);
    tick()?;
    set_times("f", OMIT, OMIT)?;
    let after = lstat("f")?;
    equal(
        "both omitted",
        (accessed(&after), modified(&after)),
        ((40, 4), (30, 3)),
    )?;
    equal("change time", changed(&after), before)
}

fn a_links_times_are_its_own() -> Verdict {
    touch("f")?;
    set_times("f", (1, 0), (1, 0))?;
    symlink("f", "s")?;
    utimensat(CWD, "s", &times((7, 8), (9, 10)), AtFlags::SYMLINK_NOFOLLOW)?;
    let link = lstat("s")?;
    equal(
        "link",
        (accessed(&link), modified(&link)),
        ((7, 8), (9, 10)),
    )?;
    equal("target", modified(&lstat("f")?), (1, 0))?;
    set_times("s", OMIT, (2, 0))?;
    equal("target through the link", modified(&lstat("f")?), (2, 0))
}

fn times_of_open_files_can_be_set() -> Verdict {
    touch("f")?;
    open_directory("d")?;
    for name in ["f", "d"] {
        futimens(reader(name)?, &times((5, 6), (7, 8)))?;
        equal(name, modified(&lstat(name)?), (7, 8))?;
    }
    Ok(())
}

fn nanoseconds_out_of_range_are_einval() -> Verdict {
    touch("f")?;
    for nanoseconds in [1_000_000_000, -1] {
        fails(
            "access",
            set_times("f", (0, nanoseconds), (0, 0)),
            Errno::INVAL,
        )?;
        fails(
            "modification",
            set_times("f", (0, 0), (0, nanoseconds)),
            Errno::INVAL,
        )?;
    }
    Ok(())
}

fn setting_times_moves_the_change_time() -> Verdict {
    touch("f")?;
    let before = changed(&lstat("f")?);
    tick()?;
    set_times("f", (1, 1), (1, 1))?;
    holds("the change time moved", changed(&lstat("f")?) > before)
}

fn explicit_times_are_for_the_owner() -> Verdict {
    touch("f")?;
    set_bits("f", 0o666)?;
    ALICE.run(|| {
        fails("both", set_times("f", (1, 0), (1, 0)), Errno::PERM)?;
        fails("one now", set_times("f", NOW, (1, 0)), Errno::PERM)?;
        fails("now and omitted", set_times("f", NOW, OMIT), Errno::PERM)
    })?;
    ALICE.own("f")?;
    set_bits("f", 0)?;
    ALICE.run(|| Ok(set_times("f", (1, 0), (1, 0))?))
}

fn a_writer_may_set_times_to_now() -> Verdict {
    touch("f")?;
    set_bits("f", 0o646)?;
    set_times("f", (1, 0), (1, 0))?;
    ALICE.run(|| Ok(set_times("f", NOW, NOW)?))?;
    holds("the time moved", modified(&lstat("f")?) > (1, 0))?;
    set_bits("f", 0o644)?;
    ALICE.run(|| {
        fails(
            "without write permission",
            set_times("f", NOW, NOW),
            Errno::ACCESS,
        )
    })
}

fn a_new_file_has_the_time_of_the_clock() -> Verdict {
    touch("f")?;
    let stat = lstat("f")?;
    for (name, time) in [
        ("access", accessed(&stat)),
        ("modification", modified(&stat)),
        ("change", changed(&stat)),
    ] {
        holds(
            &format!("the {name} time is within 2 s of the clock"),
            distance(time)? <= 2,
        )?;
    }
    Ok(())
}

fn writing_moves_modification_and_change_time() -> Verdict {
    put("f", b"x")?;
    let file = writer("f")?;
    let before = lstat("f")?;
    tick()?;
    write_all(&file, b"y")?;
    let after = lstat("f")?;
    holds(
        "the modification time moved",
        modified(&after) > modified(&before),
    )?;
    holds("the change time moved", changed(&after) > changed(&before))?;
    equal("access", accessed(&after), accessed(&before))?;
    set_times("f", OMIT, (1, 1))?;
    write_all(&file, b"z")?;
    holds(
        "a second write moved it from a set time",
        modified(&lstat("f")?) > (1, 1),
    )
}

fn writing_nothing_moves_no_time() -> Verdict {
    put("f", b"x")?;
    let before = lstat("f")?;
    tick()?;
    rustix::io::write(writer("f")?, b"")?;
    let after = lstat("f")?;
    equal(
        "times",
        (modified(&after), changed(&after)),
        (modified(&before), changed(&before)),
    )
}

fn reading_moves_the_access_time_of_an_old_one() -> Verdict {
    put("f", b"x")?;
    // Older than the modification time and than a day: relatime moves it too.
    set_times("f", (1_000_000, 0), (1_000_001, 0))?;
    let changed_before = changed(&lstat("f")?);
    tick()?;
    contents("f")?;
    let stat = lstat("f")?;
    holds("the access time moved", accessed(&stat) > (1_000_000, 0))?;
    equal("modification", modified(&stat), (1_000_001, 0))?;
    equal("change", changed(&stat), changed_before)
}

fn listing_moves_the_access_time_of_an_old_one() -> Verdict {
    open_directory("d")?;
    touch("d/f")?;
    set_times("d", (1_000_000, 0), (1_000_001, 0))?;
    names("d")?;
    holds(
        "the access time moved",
        accessed(&lstat("d")?) > (1_000_000, 0),
    )
}

fn truncation_moves_modification_and_change_time() -> Verdict {
    put("f", b"abc")?;
    for len in [1, 5] {
        let before = lstat("f")?;
        tick()?;
        sys::truncate("f", len)?;
        let after = lstat("f")?;
        holds(
            &format!("to {len} moved the modification time"),
            modified(&after) > modified(&before),
        )?;
        holds(
            &format!("to {len} moved the change time"),
            changed(&after) > changed(&before),
        )?;
    }
    Ok(())
}

fn opening_moves_no_time() -> Verdict {
    put("f", b"abc")?;
    let before = lstat("f")?;
    tick()?;
    reader("f")?;
    writer("f")?;
    open_as("f", OFlags::WRONLY | OFlags::CREATE)?;
    let after = lstat("f")?;
    let all = |stat| (accessed(stat), modified(stat), changed(stat));
    equal("times", all(&after), all(&before))
}

fn modes_and_owners_move_the_change_time_only() -> Verdict {
    touch("f")?;
    let steps: &[Step] = &[
        ("chmod", || set_bits("f", 0o600)),
        ("chown", || give("f", 1, 1)),
    ];
    for (name, step) in steps {
        let before = lstat("f")?;
        tick()?;
        step()?;
        let after = lstat("f")?;
        holds(
            &format!("{name} moved the change time"),
            changed(&after) > changed(&before),
        )?;
        equal(
            format!("modification after {name}"),
            modified(&after),
            modified(&before),
        )?;
    }
    Ok(())
}

fn creation_truncating_moves_the_times() -> Verdict {
    put("f", b"abc")?;
    let before = lstat("f")?;
    tick()?;
    open_as("f", OFlags::WRONLY | OFlags::TRUNC)?;
    let after = lstat("f")?;
    holds(
        "the modification time moved",
        modified(&after) > modified(&before),
    )?;
    holds("the change time moved", changed(&after) > changed(&before))
}
