//! Many pods: at once, and one after another.

use std::fs;
use std::time::{Duration, Instant};

use caisson_tests::case::processes_named;

use crate::cri::Cri;
use crate::daemon::shims;
use crate::kubelet::{Kubelet, begin_pods_within, end, run};

/// How long these may take: the lab emulates one processor for all guests.
const LIMIT: Duration = Duration::from_secs(7200);

/// A number that the environment may lower.
pub(crate) fn count(variable: &str, default: usize) -> usize {
    let number = std::env::var(variable).ok();
    number.map_or(default, |number| number.parse().expect("a number"))
}

/// Guests that boot at once on one emulated processor take long.
pub(crate) fn be_patient(dir: &std::path::Path) {
    let file = dir.join("config.toml");
    let text = fs::read_to_string(&file).expect("config.toml");
    fs::write(
        file,
        format!("{text}boot_timeout_ms = 0\ndefault_memory_mib = 128\n"),
    )
    .expect("config.toml");
}

#[test]
fn many_pods_start_and_end_at_once() {
    let case = begin_pods_within(LIMIT);
    be_patient(case.dir());
    let node = Kubelet::start(&case);
    let count = count("CAISSON_TEST_PODS", 20);
    let socket = node.socket();
    let connect = &|| Cri::connect(&socket, LIMIT);
    let ids: Vec<String> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..count)
            .map(|number| {
                let config = node.pod_config(&format!("pod{number}"));
                scope.spawn(move || run(&connect(), config).expect("RunPodSandbox"))
            })
            .collect();
        runs.into_iter()
            .map(|run| run.join().expect("a pod"))
            .collect()
    });
    assert_eq!(shims().len(), count);
    std::thread::scope(|scope| {
        for id in &ids {
            scope.spawn(move || {
                let ended = end(&connect(), id);
                ended.expect("StopPodSandbox, RemovePodSandbox");
            });
        }
    });
    drop(node);
    case.nothing_is_left();
}

/// What the host's kernel holds: what grows with the number of the cycle is a leak, whatever else it looks like.
fn held() -> String {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let line = |text: &str, name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        found.unwrap_or("?").trim().to_owned()
    };
    let (memory, group) = (read("/proc/meminfo"), read("/sys/fs/cgroup/cgroup.stat"));
    format!(
        "slab that stays {}, dying cgroups {}, files {}, mounts {}",
        line(&memory, "SUnreclaim:"),
        line(&group, "nr_dying_descendants"),
        read("/proc/sys/fs/file-nr")
            .split('\t')
            .next()
            .unwrap_or("?"),
        read("/proc/self/mountinfo").lines().count(),
    )
}

#[test]
fn cycles_of_pods_leave_nothing() {
    let case = begin_pods_within(LIMIT);
    let node = Kubelet::start(&case);
    for number in 0..count("CAISSON_TEST_POD_CYCLES", 200) {
        let begun = Instant::now();
        let pod = node.pod("again");
        let id = pod.script("main", "echo hello");
        assert_eq!(node.wait(&id).exit_code, 0, "cycle {number}");
        pod.end();
        // A shim has answered `Shutdown` before it ends.
        for shim in shims() {
            let pid = rustix::process::Pid::from_raw(shim.pid).expect("a pid");
            assert!(caisson_tests::call::wait_for_exit(
                pid,
                Duration::from_secs(30)
            ));
        }
        assert!(processes_named("caisson-vmm").is_empty(), "cycle {number}");
        println!(
            "cycle {number}: {} ms, {}",
            begun.elapsed().as_millis(),
            held()
        );
    }
    drop(node);
    case.nothing_is_left();
}
