//! `events`: what a container uses, at intervals, and each kill for want of memory as it happens.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
};
use serde::Serialize;

use super::{Context, ask};
use crate::{
    cli::Events,
    control::{Answer, Control, ControlError, Request, Watch},
    error::{self, CommandError},
    state::{ContainerId, StateDir, Status},
    stats::{Cpu, Memory, Pids, Stats},
};

/// How long the monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A line of output; runc's `types.Event`.
#[derive(Debug, Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Data>,
}

/// runc's numbers, and beside them what the sandbox costs the host: the virtual machine and its monitor.
#[derive(Debug, Serialize)]
pub(super) struct Data {
    #[serde(flatten)]
    pub(super) guest: Box<Stats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) host: Option<Host>,
}

#[derive(Debug, Serialize)]
pub(super) struct Host {
    pub(super) cpu: Cpu,
    pub(super) memory: Memory,
    pub(super) pids: Pids,
}

/// Prints events until the container ends, or its numbers once.
pub(super) fn run(args: &Events, context: &Context) -> Result<ExitCode, CommandError> {
    let id = ContainerId::parse(&args.id)?;
    let dir = StateDir::open(&context.root, &id)?;
    if args.interval.is_zero() {
        let text = "duration interval must be greater than 0";
        return Err(CommandError::Refused(text.into()));
    }
    let ended = format!("container with id {id} is not running");
    if dir.state()?.status == Status::Stopped {
        return Err(CommandError::Refused(ended));
    }
    let id = id.as_str();
    if args.stats {
        let data = ask(&dir, &ended, PATIENCE, stats)?;
        print(&event("stats", id, Some(data)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let watch = ask(&dir, &ended, PATIENCE, Control::watch)?;
    let mut tick = Instant::now() + args.interval;
    loop {
        if readable_before(&watch, tick)? {
            if !watch.next()? {
                return Ok(ExitCode::SUCCESS);
            }
            print(&event("oom", id, None))?;
            continue;
        }
        tick += args.interval;
        match ask(&dir, &ended, PATIENCE, stats) {
            Ok(data) => print(&event("stats", id, Some(data)))?,
            // Its end, which comes next; anything else is told and tried again, as in runc.
            Err(CommandError::Refused(_)) => {}
            Err(error) => context.log.error(&error::message(&error)),
        }
    }
}

fn event<'a>(kind: &'static str, id: &'a str, data: Option<Data>) -> Event<'a> {
    Event { kind, id, data }
}

/// The question for a container's numbers.
pub(super) fn stats(control: Control) -> Result<Data, ControlError> {
    match control.ask(&Request::Stats, &[])? {
        (Answer::Stats { guest, host }, _) => Ok(Data {
            guest,
            host: host.map(|host| Host {
                cpu: host.cpu,
                memory: host.memory,
                pids: host.pids,
            }),
        }),
        _ => Err(ControlError::Unexpected),
    }
}

/// Waits for something to happen, at the longest until `moment`.
fn readable_before(watch: &Watch, moment: Instant) -> Result<bool, CommandError> {
    let failed = |source| CommandError::Write {
        what: "the list of events".into(),
        source,
    };
    let left = moment.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    let mut fds = [PollFd::new(watch, PollFlags::IN)];
    let ready = retry_on_intr(|| poll(&mut fds, Some(&left)));
    Ok(ready.map_err(|errno| failed(errno.into()))? > 0)
}

fn print(event: &Event<'_>) -> Result<(), CommandError> {
    let json = serde_json::to_string(event).map_err(CommandError::Json)?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{json}")
        .and_then(|()| stdout.flush())
        .map_err(|source| CommandError::Write {
            what: "standard output".into(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_in_runcs_shape() {
        let oom = serde_json::to_string(&event("oom", "c1", None)).unwrap();
        assert_eq!(oom, r#"{"type":"oom","id":"c1"}"#);
        let data = Data {
            guest: Box::default(),
            host: None,
        };
        let stats = serde_json::to_string(&event("stats", "c1", Some(data))).unwrap();
        assert!(
            stats.starts_with(r#"{"type":"stats","id":"c1","data":{"cpu":{"usage":{"kernel":0,"user":0},"throttling":{}},"cpuset":{"#),
            "{stats}"
        );
        assert!(
            stats
                .ends_with(r#""blkio":{},"hugetlb":{},"intel_rdt":{},"network_interfaces":null}}"#),
            "{stats}"
        );
    }
}
