//! `metrics`: what all containers of a root directory use, or all of this host (`census.rs`), as Prometheus' text.
//!
//! Contract: each series is there once for what the guest counts (`side="guest"`) and once for what the whole sandbox
//! costs the host (`side="host"`); those of interfaces once, by the host's count, with the first of the containers that
//! share them. A container that does not run has its status alone; one whose monitor does not answer
//! in time is a line in the log, and the others are still told.
//! Spec: Prometheus, exposition formats, text version 0.0.4.

mod labelled;

use std::{collections::BTreeSet, fmt::Write, path::Path, process::ExitCode, time::Duration};

use super::{Context, ask, print, scrape};
use crate::{
    census::{self, Household, Resident},
    cli::Metrics,
    control::{Answer, Control, ControlError, Request},
    error::{self, CommandError},
    network::{Namespace, Traffic},
    state::{StateDir, StateError, Status},
    stats::Stats,
};

/// How long a monitor may take to answer: whoever collects numbers waits for all of them.
const PATIENCE: Duration = Duration::from_secs(5);

const NANOSECONDS: f64 = 1e9;

/// A container and, if it runs, what it uses.
struct Counted {
    /// Prometheus' labels, without braces.
    labels: String,
    status: Status,
    guest: Option<Box<Stats>>,
    host: Option<Box<Stats>>,
    traffic: Vec<Traffic>,
}

/// What has passed in a sandbox's network namespace, unless it was counted before. Nothing, for a caller who may not look.
fn traffic(namespace: std::io::Result<Namespace>, seen: &mut BTreeSet<u64>) -> Vec<Traffic> {
    namespace
        .ok()
        .filter(|namespace| seen.insert(namespace.inode()))
        .and_then(|namespace| namespace.traffic().ok())
        .unwrap_or_default()
}

/// A series: name, kind, meaning, value; without a value there is no line.
type Series = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Stats) -> Option<f64>,
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

/// Prints the numbers once, or serves them.
pub(super) fn metrics(args: &Metrics, context: &Context) -> Result<ExitCode, CommandError> {
    let count = || match args.all {
        true => Ok(of_host(context)),
        false => of_root(context),
    };
    match &args.listen {
        Some(socket) => scrape::serve(socket, || Ok(text(&count()?))),
        None => print(&text(&count()?)),
    }
}

/// All sandboxes that live on this host. One whose holder does not answer is a line in the log.
fn of_host(context: &Context) -> Vec<Counted> {
    let (mut counted, mut seen) = (Vec::new(), BTreeSet::new());
    for holder in census::holders() {
        match holder.ask(true) {
            Ok(household) => {
                let mut all = of_household(&holder.root, household);
                if let Some(first) = all.iter_mut().find(|counted| counted.host.is_some()) {
                    first.traffic = traffic(holder.network(), &mut seen);
                }
                counted.extend(all);
            }
            Err(error) => {
                let words = error::message(&error);
                context.log.warning(&format!(
                    "count the sandbox of process {}: {words}",
                    holder.pid
                ));
            }
        }
    }
    counted
}

/// What the host pays is told once, with the container that brought the virtual machine.
fn of_household(root: &Path, household: Household) -> Vec<Counted> {
    let Household {
        residents,
        mut host,
    } = household;
    let root = escaped(&root.to_string_lossy());
    let of = |resident: Resident| {
        let Resident { state, pod, guest } = resident;
        let is_first = state.id.as_str() == pod;
        Counted {
            labels: format!(
                "container=\"{}\",sandbox=\"{}\",root=\"{root}\"",
                state.id,
                escaped(&pod)
            ),
            status: state.status,
            guest,
            host: is_first.then(|| host.take()).flatten(),
            traffic: Vec::new(),
        }
    };
    residents.into_iter().map(of).collect()
}

/// The containers of a state root.
fn of_root(context: &Context) -> Result<Vec<Counted>, CommandError> {
    let (mut counted, mut seen_networks) = (Vec::new(), BTreeSet::new());
    for id in StateDir::ids(&context.root)? {
        let seen = StateDir::open(&context.root, &id).and_then(|dir| {
            let state = dir.state()?;
            Ok((dir, state.status, state.pid))
        });
        let (dir, status, monitor) = match seen {
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
        let (guest, host) = match status {
            Status::Running | Status::Paused => {
                match ask(&dir, "it has ended", PATIENCE, numbers) {
                    Ok((guest, host)) => (Some(guest), host),
                    Err(CommandError::Refused(_)) => (None, None),
                    Err(error) => {
                        let words = error::message(&error);
                        context
                            .log
                            .warning(&format!("count container {id}: {words}"));
                        (None, None)
                    }
                }
            }
            _ => (None, None),
        };
        // One that is counted has a monitor.
        let traffic = match &guest {
            Some(_) => traffic(Namespace::of(monitor, dir.path()), &mut seen_networks),
            None => Vec::new(),
        };
        counted.push(Counted {
            labels: format!("container=\"{id}\""),
            status,
            guest,
            host,
            traffic,
        });
    }
    Ok(counted)
}

/// The question for a container's numbers: the guest's and the host's.
fn numbers(control: Control) -> Result<(Box<Stats>, Option<Box<Stats>>), ControlError> {
    match control.ask(&Request::Stats, &[])? {
        (Answer::Stats { guest, host }, _) => Ok((guest, host)),
        _ => Err(ControlError::Unexpected),
    }
}

/// A label's value: a path may have anything in it.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"");
    value.replace('\n', "\\n")
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
    for Counted { labels, status, .. } in counted {
        // A String takes everything.
        let _ = writeln!(
            out,
            "caisson_container_info{{{labels},status=\"{status}\"}} 1"
        );
    }
    for (name, kind, meaning, value) in SERIES {
        heading(&mut out, name, kind, meaning);
        for container in counted {
            for (side, numbers) in container.sides() {
                if let Some(value) = value(numbers) {
                    let labels = &container.labels;
                    let _ = writeln!(out, "{name}{{{labels},side=\"{side}\"}} {value}");
                }
            }
        }
    }
    labelled::write(&mut out, counted);
    out
}

fn heading(out: &mut String, name: &str, kind: &str, meaning: &str) {
    let _ = writeln!(out, "# HELP {name} {meaning}\n# TYPE {name} {kind}");
}

impl Counted {
    fn sides(&self) -> impl Iterator<Item = (&'static str, &Stats)> {
        let sides = [("guest", &self.guest), ("host", &self.host)];
        sides
            .into_iter()
            .filter_map(|(side, numbers)| Some((side, numbers.as_deref()?)))
    }
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
    use crate::state::{ContainerId, State};

    #[test]
    fn every_series_has_a_heading_and_a_line_for_each_container_that_runs() {
        let mut guest = Stats::default();
        guest.cpu.usage.total = 1_500_000_000;
        guest.memory.usage.usage = 4096;
        guest.memory.usage.limit = u64::MAX;
        let counted = [
            Counted {
                labels: "container=\"a\"".to_owned(),
                status: Status::Running,
                guest: Some(Box::new(guest)),
                host: None,
                traffic: Vec::new(),
            },
            Counted {
                labels: "container=\"b\"".to_owned(),
                status: Status::Stopped,
                guest: None,
                host: None,
                traffic: Vec::new(),
            },
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
        assert_eq!(headings.count(), SERIES.len() + 1 + labelled::SERIES);
    }

    #[test]
    fn a_pods_cost_is_told_once() {
        let resident = |id: &str| Resident {
            state: State {
                oci_version: "1.0.2".into(),
                id: ContainerId::parse(id).unwrap(),
                pid: 1,
                status: Status::Running,
                bundle: "/b".into(),
                rootfs: "/b/rootfs".into(),
                created: String::new(),
                annotations: None,
                cgroup: None,
                systemd_unit: None,
                cgroup_intended: false,
            },
            pod: "pod".into(),
            guest: Some(Box::default()),
        };
        let household = Household {
            residents: vec![resident("a"), resident("pod")],
            host: Some(Box::default()),
        };
        let text = text(&of_household(Path::new("/r\"x"), household));
        let hosts = text.matches("caisson_memory_bytes{container=\"pod\",sandbox=\"pod\",root=\"/r\\\"x\",side=\"host\"} 0");
        assert_eq!(hosts.count(), 1, "{text}");
        assert_eq!(
            text.matches("side=\"host\"").count() * 2,
            text.matches("side=\"guest\"").count()
        );
    }
}
