//! Executing programs from the directory.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{OFlags, XattrFlags, rename, setxattr, unlink};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::{ALICE, CREW};
use crate::sys;
use crate::verdict::*;

checks![
    a_program_runs,
    a_program_needs_an_execution_bit,
    a_script_runs_by_its_interpreter,
    a_file_of_no_known_format_is_enoexec,
    a_directory_cannot_be_executed,
    a_running_program_cannot_be_written,
    a_program_open_for_writing_cannot_run,
    a_running_program_can_be_replaced_and_unlinked,
    set_user_id_takes_effect,
    set_group_id_takes_effect,
    file_capabilities_take_effect,
    a_fresh_copy_runs_at_once,
];

fn spawn_error(command: &mut Command) -> Result<(), Errno> {
    match command.stdin(Stdio::null()).stdout(Stdio::null()).spawn() {
        Ok(mut child) => {
            // It ran; how it ended is not asked.
            let _ = child.wait();
            Ok(())
        }
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

/// What the program prints about whom it runs as, started by Alice.
fn identity(path: &str) -> Result<String, Fail> {
    let mut command = Command::new(path);
    let output = command
        .args(["actor", "identity"])
        .uid(ALICE.uid)
        .gid(ALICE.gid)
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn a_program_runs() -> Verdict {
    copy_program("prog", 0o755)?;
    equal(
        "identity",
        identity("./prog")?,
        format!("{} {} 0", ALICE.uid, ALICE.gid),
    )
}

fn a_program_needs_an_execution_bit() -> Verdict {
    copy_program("prog", 0o644)?;
    fails(
        "root",
        spawn_error(&mut Command::new("./prog")),
        Errno::ACCESS,
    )?;
    set_bits("prog", 0o744)?;
    fails(
        "a user",
        spawn_error(Command::new("./prog").uid(ALICE.uid).gid(ALICE.gid)),
        Errno::ACCESS,
    )
}

fn a_script_runs_by_its_interpreter() -> Verdict {
    copy_program("prog", 0o755)?;
    // The kernel gives the whole rest of the line as one argument, then the script's own path.
    put("script", b"#!./prog --help\n")?;
    set_bits("script", 0o755)?;
    let output = Command::new("./script").output()?;
    holds(
        "the interpreter printed its help",
        String::from_utf8_lossy(&output.stdout).contains("POSIX behaviour"),
    )
}

fn a_file_of_no_known_format_is_enoexec() -> Verdict {
    put("f", b"\x01\x02\x03\x04")?;
    set_bits("f", 0o755)?;
    fails(
        "spawn",
        spawn_error(&mut Command::new("./f")),
        Errno::NOEXEC,
    )
}

fn a_directory_cannot_be_executed() -> Verdict {
    open_directory("d")?;
    fails(
        "spawn",
        spawn_error(&mut Command::new("./d")),
        Errno::ACCESS,
    )
}

/// Starts the program, runs `part` once it is up, and ends it.
fn while_running(part: impl FnOnce() -> Verdict) -> Verdict {
    let mut child = Command::new("./prog")
        .args(["actor", "stay"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    let verdict = part();
    drop(child.stdin.take());
    holds("the program ended well", child.wait()?.success())?;
    equal("its line", line, "here\n".to_owned())?;
    verdict
}

fn a_running_program_cannot_be_written() -> Verdict {
    copy_program("prog", 0o755)?;
    while_running(|| {
        fails("open for writing", writer("prog"), Errno::TXTBSY)?;
        fails(
            "O_TRUNC",
            open_as("prog", OFlags::WRONLY | OFlags::TRUNC),
            Errno::TXTBSY,
        )?;
        fails("truncate", sys::truncate("prog", 0), Errno::TXTBSY)
    })?;
    writer("prog")?;
    Ok(())
}

fn a_program_open_for_writing_cannot_run() -> Verdict {
    copy_program("prog", 0o755)?;
    let open = writer("prog")?;
    fails(
        "spawn",
        spawn_error(&mut Command::new("./prog")),
        Errno::TXTBSY,
    )?;
    drop(open);
    while_running(|| Ok(()))
}

fn a_running_program_can_be_replaced_and_unlinked() -> Verdict {
    copy_program("prog", 0o755)?;
    put("new", b"not a program")?;
    while_running(|| {
        rename("new", "prog")?;
        Ok(unlink("prog")?)
    })
}

fn set_user_id_takes_effect() -> Verdict {
    copy_program("prog", 0o755)?;
    give("prog", 1234, 0)?;
    set_bits("prog", 0o4755)?;
    equal(
        "identity",
        identity("./prog")?,
        format!("1234 {} 0", ALICE.gid),
    )
}

fn set_group_id_takes_effect() -> Verdict {
    copy_program("prog", 0o755)?;
    give("prog", 0, CREW)?;
    set_bits("prog", 0o2755)?;
    equal(
        "identity",
        identity("./prog")?,
        format!("{} {CREW} 0", ALICE.uid),
    )
}

fn file_capabilities_take_effect() -> Verdict {
    copy_program("prog", 0o755)?;
    // CAP_CHOWN, effective and permitted.
    let value = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    setxattr("prog", "security.capability", &value, XattrFlags::empty())?;
    equal(
        "identity",
        identity("./prog")?,
        format!("{} {} 1", ALICE.uid, ALICE.gid),
    )
}

fn a_fresh_copy_runs_at_once() -> Verdict {
    for number in 0..3 {
        let name = format!("prog-{number}");
        copy_program(&name, 0o755)?;
        equal(
            &name,
            identity(&format!("./{name}"))?,
            format!("{} {} 0", ALICE.uid, ALICE.gid),
        )?;
    }
    Ok(())
}
