//! `ps`: the processes of a container.
//!
//! As table: the guest's processes, shown by the host's own `ps` with whatever options it is given. That program reads
//! /proc; it is started in a mount namespace of its own, in which /proc is a directory that describes the container's
//! processes and nothing else (`process_table.rs` writes it).
//! As JSON: what runc's callers use it for is pids of the host, so these are the pids of the host's processes that stand
//! for the container: its monitor, and those of running `exec`s.

use std::{
    fs, io,
    path::Path,
    process::{Command, ExitCode, Output, Stdio},
    time::Duration,
};

use super::{Context, ask, print};
use crate::{
    cli::Ps,
    control::{Answer, Control, ControlError, Request, read_attached},
    error::CommandError,
    identities::{self, IdentityError},
    process_table::Table,
    share::{self, ShareError},
    state::{ContainerId, StateDir, Status},
};

/// How long the monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Room for the description: some 12 KiB for each process.
const MOST_TEXT: &str = "256m";

/// Why processes cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum PsError {
    /// The namespace for `ps`.
    #[error(transparent)]
    Namespace(#[from] ShareError),
    /// The user namespace that an ordinary user needs for that.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The description for `ps`.
    #[error("lay the processes out for ps")]
    LayOut(#[source] io::Error),
    /// There is no such program.
    #[error("exec: \"ps\"")]
    Start(#[source] io::Error),
    /// It failed; runc's words.
    #[error("{status}: {output}")]
    Failed {
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        output: String,
    },
    /// Its output cannot be told apart by process; runc's words.
    #[error("couldn't find PID field in ps output")]
    NoPid,
    /// runc's words.
    #[error("unable to parse pid")]
    NotAPid,
}

/// Shows processes.
pub(super) fn run(args: &Ps, context: &Context) -> Result<ExitCode, CommandError> {
    let dir = StateDir::open(&context.root, &ContainerId::parse(args.id())?)?;
    let is_over = dir.state()?.status == Status::Stopped;
    match args.format.as_str() {
        // runc prints a nil slice.
        "json" if is_over => print("null\n"),
        "json" => {
            let pids = ask(&dir, "container not running", PATIENCE, host_pids)?;
            let json = serde_json::to_string(&pids).map_err(CommandError::Json)?;
            print(&(json + "\n"))
        }
        "table" => {
            let table = match is_over {
                true => Table::default(),
                false => ask(&dir, "container not running", PATIENCE, table)?,
            };
            print(&shown(&table, args.options())?)
        }
        _ => Err(CommandError::Refused("invalid format option".into())),
    }
}

fn host_pids(control: Control) -> Result<Vec<u32>, ControlError> {
    match control.ask(&Request::Processes, &[])? {
        (Answer::Processes(pids), _) => Ok(pids),
        _ => Err(ControlError::Unexpected),
    }
}

fn table(control: Control) -> Result<Table, ControlError> {
    match control.ask(&Request::Table, &[])? {
        (Answer::Table, fds) => {
            let json = read_attached(fds)?;
            serde_json::from_slice(&json).map_err(|_| ControlError::Unexpected)
        }
        _ => Err(ControlError::Unexpected),
    }
}

/// What `ps` prints with these options, `-ef` if there are none.
fn shown(table: &Table, options: &[String]) -> Result<String, PsError> {
    let own = |name: &str| fs::read_to_string(Path::new("/proc/self").join(name));
    let (stat, status) = (own("stat"), own("status"));
    identities::enter_alone()?;
    share::enter_private_namespace()?;
    share::begin_pid_namespace()?;
    let proc = Path::new("/proc");
    share::mount_tmpfs(proc, MOST_TEXT)
        .and_then(|()| table.lay_out(proc, (&stat?, &status?)))
        .map_err(PsError::LayOut)?;
    let mut ps = Command::new("ps");
    match options {
        [] => ps.arg("-ef"),
        options => ps.args(options),
    };
    let output = ps.stdin(Stdio::null()).output().map_err(PsError::Start)?;
    let pids: Vec<u32> = table.pids().collect();
    rows(&output, &pids)
}

/// The lines of `ps` about these processes, under its title; as runc picks them.
fn rows(output: &Output, pids: &[u32]) -> Result<String, PsError> {
    let text = String::from_utf8_lossy(&output.stdout);
    // It also fails when it has nothing to show.
    let shows_nothing = output.stderr.is_empty() && text.lines().count() == 1;
    let is_fine = output.status.success() || shows_nothing;
    if !is_fine {
        let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
        return Err(PsError::Failed {
            status: output.status,
            output: said.trim_end().to_owned(),
        });
    }
    let mut lines = text.lines().filter(|line| !line.is_empty());
    let title = lines.next().unwrap_or_default();
    let column = title
        .split_whitespace()
        .position(|word| word == "PID")
        .ok_or(PsError::NoPid)?;
    let mut shown = format!("{title}\n");
    for line in lines {
        let pid = line.split_whitespace().nth(column);
        let pid = pid
            .and_then(|word| word.parse().ok())
            .ok_or(PsError::NotAPid)?;
        if pids.contains(&pid) {
            shown.push_str(line);
            shown.push('\n');
        }
    }
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn output(status: i32, stdout: &str, stderr: &str) -> Output {
        Output {
            status: std::process::ExitStatus::from_raw(status << 8),
            stdout: stdout.into(),
            stderr: stderr.into(),
        }
    }

    #[test]
    fn the_rows_of_the_containers_processes_are_picked() {
        let text = "UID  PID CMD\nroot 1 ps\nroot 12 sh\nroot 123 x 12\n";
        assert_eq!(
            rows(&output(0, text, ""), &[12]).unwrap(),
            "UID  PID CMD\nroot 12 sh\n"
        );
        let error = rows(&output(0, "COMMAND\nsh\n", ""), &[]).unwrap_err();
        assert_eq!(error.to_string(), "couldn't find PID field in ps output");
        assert!(rows(&output(0, "PID\nx\n", ""), &[]).is_err());
    }

    #[test]
    fn a_failure_of_ps_is_told_unless_there_was_nothing_to_show() {
        let error = rows(&output(1, "", "error: unknown option\n"), &[]).unwrap_err();
        assert_eq!(error.to_string(), "exit status: 1: error: unknown option");
        assert_eq!(rows(&output(1, "PID\n", ""), &[]).unwrap(), "PID\n");
    }
}
