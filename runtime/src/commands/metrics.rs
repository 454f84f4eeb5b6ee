//! `metrics`: what all containers of a root directory use, as Prometheus' text.
//!
//! Contract: each series is there once for what the guest counts (`side="guest"`) and once for what the whole sandbox
//! costs the host (`side="host"`). A container that does not run has its status alone; one whose monitor does not answer
//! in time is a line in the log, and the others are still told.
//! Spec: Prometheus, exposition formats, text version 0.0.4.

use std::{fmt::Write, process::ExitCode, time::Duration};

use super::{
    Context, ask,
    events::{Data, stats},
    print,
};
use crate::{
    error::{self, CommandError},
    state::{StateDir, StateError, Status},
    stats::{Cpu, Memory, Pids},
};

/// How long a monitor may take to answer: whoever collects numbers waits for all of them.
const PATIENCE: Duration = Duration::from_secs(5);

const NANOSECONDS: f64 = 1e9;

/// A container and, if it runs, what it uses.
type Counted = (String, Status, Option<Data>);

/// One side's numbers.
struct Side<'a> {
    cpu: &'a Cpu,
    memory: &'a Memory,
    pids: &'a Pids,
}

/// A series: name, kind, meaning, value; without a value there is no line.
type Series = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Side<'_>) -> Option<f64>,
);

const SERIES: &[Series] = &[
    (
        "caisson_cpu_seconds_total",
        "counter",
        "Time on CPUs",
        |side| Some(seconds(side.cpu.usage.total)),
    ),
    (
        "caisson_cpu_throttled_seconds_total",
        "counter",
        "Time for which a CPU quota held back",
        |side| Some(seconds(side.cpu.throttling.throttled_time)),
    ),
    (
        "caisson_memory_bytes",
        "gauge",
        "Memory in use, page cache included",
        |side| Some(number(side.memory.usage.usage)),
    ),
    (
        "caisson_memory_limit_bytes",
        "gauge",
        "Memory allowed, if it is limited",
        |side| {
            Some(side.memory.usage.limit)
                .filter(|&limit| limit != u64::MAX && limit != 0)
                .map(number)
        },
    ),
    (
        "caisson_oom_kills_total",
        "counter",
        "Processes killed for want of memory",
        |side| Some(number(side.memory.oom_kills)),
    ),
    (
        "caisson_processes",
        "gauge",
        "Processes and threads",
        |side| Some(number(side.pids.current)),
    ),
];

/// Prints the numbers of all containers once.
pub(super) fn metrics(context: &Context) -> Result<ExitCode, CommandError> {
    let mut counted = Vec::new();
    for id in StateDir::ids(&context.root)? {
        let seen = StateDir::open(&context.root, &id).and_then(|dir| {
            let status = dir.state()?.status;
            Ok((dir, status))
        });
        let (dir, status) = match seen {
            Ok(seen) => seen,
            // Deleted while we looked.
            Err(StateError::NotFound) => continue,
            Err(error) => {
                let words = error::message(&error);
                context
                    .log
                    .warning(&format!("load container {id}: {words}"));
                continue;
            }
        };
        let data = match status {
            Status::Running | Status::Paused => match ask(&dir, "it has ended", PATIENCE, stats) {
                Ok(data) => Some(data),
                Err(CommandError::Refused(_)) => None,
                Err(error) => {
                    let words = error::message(&error);
                    context
                        .log
                        .warning(&format!("count container {id}: {words}"));
                    None
                }
            },
            _ => None,
        };
        counted.push((id.to_string(), status, data));
    }
    print(&text(&counted))
}

/// Prometheus' text. The ids of containers need no escapes.
fn text(counted: &[Counted]) -> String {
    let mut out = String::new();
    heading(
        &mut out,
        "caisson_container_info",
        "gauge",
        "1 for each container, with its status",
    );
    for (id, status, _) in counted {
        // A String takes everything.
        let _ = writeln!(
            out,
            "caisson_container_info{{container=\"{id}\",status=\"{status}\"}} 1"
        );
    }
    for (name, kind, meaning, value) in SERIES {
        heading(&mut out, name, kind, meaning);
        for (id, _, data) in counted {
            for (side, numbers) in data.iter().flat_map(sides) {
                if let Some(value) = value(&numbers) {
                    let _ = writeln!(out, "{name}{{container=\"{id}\",side=\"{side}\"}} {value}");
                }
            }
        }
    }
    out
}

fn heading(out: &mut String, name: &str, kind: &str, meaning: &str) {
    let _ = writeln!(out, "# HELP {name} {meaning}\n# TYPE {name} {kind}");
}

fn sides(data: &Data) -> impl Iterator<Item = (&'static str, Side<'_>)> {
    let guest = Side {
        cpu: &data.guest.cpu,
        memory: &data.guest.memory,
        pids: &data.guest.pids,
    };
    let host = data.host.as_ref().map(|host| Side {
        cpu: &host.cpu,
        memory: &host.memory,
        pids: &host.pids,
    });
    std::iter::once(("guest", guest)).chain(host.map(|host| ("host", host)))
}

fn seconds(nanoseconds: u64) -> f64 {
    number(nanoseconds) / NANOSECONDS
}

#[allow(
    clippy::cast_precision_loss,
    reason = "Prometheus has no other numbers"
)]
fn number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Stats;

    #[test]
    fn every_series_has_a_heading_and_a_line_for_each_container_that_runs() {
        let mut guest = Stats::default();
        guest.cpu.usage.total = 1_500_000_000;
        guest.memory.usage.usage = 4096;
        guest.memory.usage.limit = u64::MAX;
        let data = Data {
            guest: Box::new(guest),
            host: None,
        };
        let counted = [
            ("a".to_owned(), Status::Running, Some(data)),
            ("b".to_owned(), Status::Stopped, None),
        ];
        let text = text(&counted);
        let lines: Vec<_> = text.lines().collect();
        for line in [
            "caisson_container_info{container=\"a\",status=\"running\"} 1",
            "caisson_container_info{container=\"b\",status=\"stopped\"} 1",
            "# TYPE caisson_cpu_seconds_total counter",
            "caisson_cpu_seconds_total{container=\"a\",side=\"guest\"} 1.5",
            "caisson_memory_bytes{container=\"a\",side=\"guest\"} 4096",
        ] {
            assert!(lines.contains(&line), "{line} is not in {text}");
        }
        assert!(!text.contains("limit_bytes{"), "{text}");
        let headings = lines.iter().filter(|line| line.starts_with("# TYPE "));
        assert_eq!(headings.count(), SERIES.len() + 1);
    }
}
