//! What pods cost under containerd's CRI, counted: ready, first and second container, gone; one by one and many at once.
//!
//! A benchmark, not a test: `make bench` runs it (it is ignored otherwise) in a lab with `--icount`, on each runtime, with
//! everything on a local disk. Passes are lives of the same pods: warm-ups, the clock alone, and the parts (what guests
//! executed, VM exits, threads), whose rulers cost something themselves. With `CAISSON_BENCH_THREADS` the threads
//! that executed most are named, too.
//! A step's instructions are all that were executed from its call until the host had been quiet, divided by the number
//! of pods; those of the host are without what the guests executed. `CAISSON_TEST_PODS` says how many pods are at once.

use std::fs;
use std::io;
use std::time::Duration;

use caisson_tests::call::wait_for_exit;
use caisson_tests::host::{Process, processes};
use caisson_tests::ruler::{Shares, Trace, executed, millions, now};
use rustix::process::Pid;

use crate::cri::Cri;
use crate::cri_many::{be_patient, count};
use crate::daemon::shims;
use crate::kubelet::{Kubelet, Pod, begin_pods_within, end, run, run_in};

/// How long this may take: counting makes the lab slow.
const LIMIT: Duration = Duration::from_secs(7200);

/// Lives before the counted one.
const WARM_UPS: usize = 2;

/// What is left to do after an answer (the end of shims, containerd's own records) has been done after this time. Nothing
/// is executed by waiting.
const QUIET: Duration = Duration::from_millis(500);

/// How long the shims may take to end.
const LAST: Duration = Duration::from_secs(30);

/// The threads that are named, at most.
const NAMED: usize = 14;

/// What is counted.
const STEPS: [&str; 4] = [
    "pod ready",
    "first container started",
    "second container started",
    "pod removed",
];

/// What a step cost all pods together.
#[derive(Debug, Default)]
struct Cost {
    /// From the call to the last answer.
    answered_ns: u64,
    /// Of host and guests.
    executed_ns: u64,
    shares: Shares,
}

/// Pods that live together.
struct Batch<'k> {
    node: &'k Kubelet<'k>,
    size: usize,
    pods: Vec<Pod<'k>>,
}

impl<'k> Batch<'k> {
    /// Does one of [`STEPS`] to all pods, each from a connection of its own, and waits for the answers.
    fn act(&mut self, step: usize) {
        let (node, socket) = (self.node, self.node.socket());
        let connect = || Cri::connect(&socket, LIMIT);
        let container = |name: &'static str| {
            std::thread::scope(|scope| {
                for pod in &self.pods {
                    let cri = connect();
                    let config = pod.container(name, "exec sleep 1000000");
                    let (id, sandbox) = (&pod.id, &pod.config);
                    scope.spawn(move || {
                        run_in(&cri, id, sandbox, config).expect("StartContainer");
                    });
                }
            });
        };
        match step {
            0 => {
                let configs: Vec<_> = (0..self.size)
                    .map(|number| node.pod_config(&format!("pod{number}")))
                    .collect();
                let ids: Vec<_> = std::thread::scope(|scope| {
                    let begin = |config| {
                        let cri = connect();
                        scope.spawn(move || run(&cri, config).expect("RunPodSandbox"))
                    };
                    let runs: Vec<_> = configs.iter().cloned().map(begin).collect();
                    let ids = runs.into_iter().map(|run| run.join().expect("a pod"));
                    ids.collect()
                });
                let pods = ids.into_iter().zip(configs);
                self.pods = pods.map(|(id, config)| node.again(id, config)).collect();
            }
            1 => container("first"),
            2 => container("second"),
            _ => std::thread::scope(|scope| {
                for pod in self.pods.drain(..) {
                    let (cri, id) = (connect(), pod.id.clone());
                    scope.spawn(move || end(&cri, &id).expect("RemovePodSandbox"));
                }
            }),
        }
    }

    /// A life; `each` is given every step to be done.
    fn live(&mut self, mut each: impl FnMut(&mut Self, usize)) {
        for step in 0..STEPS.len() {
            each(self, step);
        }
    }

    /// Until nothing is left to do. The shims of pods that are gone end by themselves.
    fn be_quiet(&self) {
        if self.pods.is_empty() {
            for shim in shims() {
                let ended = Pid::from_raw(shim.pid).is_none_or(|pid| wait_for_exit(pid, LAST));
                assert!(ended, "a shim lives on");
            }
        }
        std::thread::sleep(QUIET);
    }
}

/// Proportional set sizes in KiB: all of a pod's processes, and of that the guest's memory.
fn sizes(before: &[i32]) -> (u64, u64) {
    let is_new = |process: &Process| !before.contains(&process.pid);
    let mut sizes = (0, 0);
    for process in processes().into_iter().filter(is_new) {
        let rolled = format!("/proc/{}/smaps_rollup", process.pid);
        // Kernel threads have no memory of their own, and what has ended has none any more.
        let text = fs::read_to_string(rolled).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        sizes.0 += kib.unwrap_or(0);
        if process.name == "caisson-vmm" {
            sizes.1 += kib.unwrap_or(0) - crate::cri_overhead::own_pss(process.pid);
        }
    }
    sizes
}

/// Counts the life of this many pods at once and prints its rows.
fn report(node: &Kubelet<'_>, trace: &Trace, size: usize, warm_ups: usize) -> io::Result<()> {
    let mut batch = Batch {
        node,
        size,
        pods: Vec::new(),
    };
    for _ in 0..warm_ups {
        batch.live(|batch, step| {
            batch.act(step);
            batch.be_quiet();
        });
    }
    let before: Vec<i32> = processes().iter().map(|process| process.pid).collect();
    let mut memory = (0, 0);
    let mut costs: [Cost; STEPS.len()] = Default::default();
    batch.live(|batch, step| {
        let (start, spent) = (now(), executed());
        batch.act(step);
        costs[step].answered_ns = now() - start;
        batch.be_quiet();
        costs[step].executed_ns = executed() - spent;
        if step == STEPS.len() - 2 {
            memory = sizes(&before);
        }
    });
    let mut failed = None;
    batch.live(|batch, step| {
        let work = || {
            batch.act(step);
            batch.be_quiet();
            Ok(())
        };
        match trace.shares(work) {
            Ok(shares) => costs[step].shares = shares,
            Err(error) => failed = Some(error),
        }
    });
    failed.map_or(Ok(()), Err)?;
    print(&costs, memory, u64::try_from(size).unwrap_or(u64::MAX));
    Ok(())
}

fn print(costs: &[Cost], memory: (u64, u64), size: u64) {
    let runtime = caisson_tests::case::runtime();
    let at_once = match size {
        1 => String::new(),
        size => format!(", {size} at once"),
    };
    for (step, cost) in STEPS.iter().zip(costs) {
        let Shares {
            exits, guest_ns, ..
        } = cost.shares;
        println!(
            "| {runtime}{at_once}: {step} | {} | {} | {} | {} |",
            millions(cost.answered_ns / size),
            millions(cost.executed_ns.saturating_sub(guest_ns) / size),
            millions(guest_ns / size),
            exits / size,
        );
    }
    let (all, guest) = (memory.0 / size, memory.1 / size);
    println!("| {runtime}{at_once}: PSS with two containers, KiB | {all} | | guest's {guest} | |");
    if std::env::var_os("CAISSON_BENCH_THREADS").is_some() {
        for (step, cost) in STEPS.iter().zip(costs) {
            let threads = cost.shares.threads.iter().take(NAMED);
            let threads = threads.map(|(name, ns)| format!("{name} {}", millions(ns / size)));
            eprintln!("{step}: {}", threads.collect::<Vec<_>>().join(", "));
        }
    }
}

#[test]
#[ignore = "a benchmark: `make bench`"]
fn report_of_pods() {
    let case = begin_pods_within(LIMIT);
    be_patient(case.dir());
    let node = Kubelet::start(&case);
    let trace = Trace::open().expect("the trace file system");
    report(&node, &trace, 1, WARM_UPS).expect("figures");
    report(&node, &trace, count("CAISSON_TEST_PODS", 20), 0).expect("figures");
    drop(node);
    case.nothing_is_left();
}
