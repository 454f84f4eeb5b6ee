//! Runs the checks one after the other and prints what became of each.
//!
//! A check runs in a forked child with the umask 022, in an empty directory of its own that anybody may write to, as
//! the leader of a process group; SIGALRM ends it when its time is up. Afterwards its group is killed and its directory
//! removed, so that no check can disturb the next. A failure that `skips.txt` expects is a skip; expecting one in vain is a failure.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

use rustix::fs::Mode;
use rustix::process::{Signal, chdir, kill_process_group, setpgid, umask};

use crate::checks::GROUPS;
use crate::verdict::{Fail, Verdict};
use crate::{Choice, FileSystem, act, peer, sys};

/// A check: says nothing, or what was expected and what came.
pub(crate) type Check = fn() -> Verdict;

/// The failures that are known on virtio-fs: a name and a reason a line.
const VIRTIO_FS: &str = include_str!("../skips.txt");

/// How often each outcome came.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Runs what was chosen in `dir`.
pub(crate) fn run(dir: &Path, choice: &Choice) -> ExitCode {
    let chosen: Vec<(String, Check)> = GROUPS
        .iter()
        .flat_map(|(group, checks)| {
            checks
                .iter()
                .map(move |(name, check)| (format!("{group}::{name}"), *check))
        })
        .filter(|(name, _)| {
            let starts =
                |prefixes: &[String]| prefixes.iter().any(|prefix| name.starts_with(prefix));
            (choice.only.is_empty() || starts(&choice.only)) && !starts(&choice.without)
        })
        .collect();
    if choice.list {
        chosen.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    match run_all(dir, choice, &chosen) {
        Ok(tally) => {
            println!(
                "# {} passed, {} failed, {} skipped",
                tally.passed, tally.failed, tally.skipped
            );
            if tally.failed > 0 || tally.passed == 0 {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            }
        }
        Err(error) => {
            eprintln!("posix-check: {}: {error}", dir.display());
            ExitCode::from(2)
        }
    }
}

fn run_all(dir: &Path, choice: &Choice, chosen: &[(String, Check)]) -> io::Result<Tally> {
    // Found now, because a check that executes this very program does so from another directory.
    act::remember_program(env::current_exe()?);
    env::set_current_dir(dir)?;
    let skips: HashMap<&str, &str> = choice
        .skip
        .iter()
        .map(|(name, reason)| (name.as_str(), reason.as_str()))
        .collect();
    let expected = expected(choice.on);
    for name in skips.keys().chain(expected.keys()) {
        if !GROUPS.iter().any(|(group, checks)| {
            checks
                .iter()
                .any(|(check, _)| format!("{group}::{check}") == **name)
        }) {
            return Err(io::Error::other(format!(
                "there is no check {name} to skip"
            )));
        }
    }
    fs::write(act::TICK, "")?;
    let mut tally = Tally::default();
    for (name, check) in chosen {
        if let Some(reason) = skips.get(name.as_str()) {
            println!("skip {name}: {reason}");
            tally.skipped += 1;
            continue;
        }
        let verdict = run_one(name, *check, choice)?;
        match (verdict, expected.get(name.as_str())) {
            (Ok(()), None) => {
                println!("ok {name}");
                tally.passed += 1;
            }
            (Err(Fail(got)), Some(reason)) => {
                println!("skip {name}: {reason} ({got})");
                tally.skipped += 1;
            }
            (Ok(()), Some(_)) => {
                println!("not ok {name}: expected the listed failure got a pass");
                tally.failed += 1;
            }
            (Err(Fail(message)), None) => {
                println!("not ok {name}: {message}");
                tally.failed += 1;
            }
        }
    }
    fs::remove_file(act::TICK)?;
    Ok(tally)
}

/// The failures that are listed for a file system, with their reasons.
fn expected(on: Option<FileSystem>) -> HashMap<&'static str, &'static str> {
    let text = match on {
        Some(FileSystem::VirtioFs) => VIRTIO_FS,
        None => "",
    };
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once(' '))
        .map(|(name, reason)| (name, reason.trim()))
        .collect()
}

fn run_one(name: &str, check: Check, choice: &Choice) -> io::Result<Verdict> {
    let dir = name.replace("::", ".");
    if fs::exists(&dir)? {
        clear(&dir)?;
    }
    fs::create_dir(&dir)?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
    io::stdout().flush()?;
    let seconds = u32::try_from(choice.timeout.as_secs()).unwrap_or(u32::MAX);
    let child = peer::start(|| {
        setpgid(None, None)?;
        sys::alarm(seconds);
        chdir(&*dir)?;
        umask(Mode::from_raw_mode(0o022));
        check()
    })?;
    let group = child.pid;
    let verdict = child.join();
    // Most checks leave no process, and then there is no such group.
    let _ = kill_process_group(group, Signal::KILL);
    clear(&dir)?;
    Ok(verdict)
}

/// Removes a check's directory, whatever modes are in it.
fn clear(dir: &str) -> io::Result<()> {
    fs::remove_dir_all(dir)
        .map_err(|error| io::Error::new(error.kind(), format!("remove {dir}: {error}")))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{GROUPS, expected};
    use crate::FileSystem;

    #[test]
    fn no_two_checks_have_one_name() {
        let mut seen = HashSet::new();
        for (group, checks) in GROUPS {
            assert!(
                checks
                    .iter()
                    .all(|(name, _)| seen.insert(format!("{group}::{name}")))
            );
        }
    }

    #[test]
    fn every_listed_failure_names_a_check_and_a_reason() {
        for (name, reason) in expected(Some(FileSystem::VirtioFs)) {
            let (group, check) = name.split_once("::").unwrap();
            let checks = GROUPS.iter().find(|(known, _)| *known == group).unwrap().1;
            assert!(checks.iter().any(|(known, _)| *known == check), "{name}");
            assert!(!reason.is_empty());
        }
    }
}
