//! Deaths under the CRI: the kubelet hears of them, and can clean up and begin anew.

use std::time::{Duration, Instant};

use caisson_tests::case::{processes_named, runtime};
use caisson_tests::host::Process;
use k8s_cri::v1::{PodSandboxState, PodSandboxStatusRequest};
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::shims;
use crate::kubelet::{Kubelet, Pod, begin_pods, until};

/// How long a death may take to be noticed.
const SOON: Duration = Duration::from_secs(60);

fn kill(processes: &[Process]) {
    assert!(!processes.is_empty());
    for process in processes {
        let pid = Pid::from_raw(process.pid).expect("pid");
        kill_process(pid, Signal::KILL).expect("kill");
        assert!(caisson_tests::call::wait_for_exit(pid, SOON));
    }
}

fn is_ready(pod: &Pod<'_>) -> bool {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let cri = &pod.kubelet.cri;
    let answer = cri.answer(cri.runtime().pod_sandbox_status(request));
    let status = answer.expect("PodSandboxStatus").status.expect("a status");
    status.state() == PodSandboxState::SandboxReady
}

/// A pod whose machine has died is noticed, removed, and its name used again.
fn dies_of(victims: impl Fn() -> Vec<Process>, status: i32) {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script("main", "exec sleep 1000");
    assert!(is_ready(&pod));
    kill(&victims());
    assert_eq!(node.wait(&id).exit_code, status);
    until(SOON, "the pod is not ready", || {
        (!is_ready(&pod)).then_some(())
    });
    pod.end();
    let pod = node.pod("one");
    let id = pod.script("main", "exec sleep 1000");
    assert_eq!(node.said(&id, "echo anew"), "anew");
    pod.end();
    drop(node);
    case.nothing_is_left();
}

#[test]
fn a_pod_whose_vmm_is_killed_is_made_anew() {
    if runtime() == "runc" {
        println!("skipped on runc: it has no VMM");
        return;
    }
    dies_of(|| processes_named("caisson-vmm"), 137);
}

#[test]
fn a_pod_whose_shim_is_killed_is_made_anew() {
    if runtime() == "runc" {
        println!("skipped on runc: its shim leaves its socket");
        return;
    }
    // Nobody is left to say how it ended: the CRI says so by this number.
    dies_of(shims, 255);
}

#[test]
fn a_pod_survives_containerds_death() {
    let case = begin_pods();
    let mut node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script("main", "exec sleep 1000");
    let (name, config) = (pod.id.clone(), pod.config.clone());
    node.restart_containerd();
    let pod = node.again(name, config);
    assert!(is_ready(&pod));
    assert_eq!(node.said(&id, "echo there"), "there");
    let more = pod.script("more", "echo more");
    assert_eq!(node.wait(&more).exit_code, 0);
    assert_eq!(pod.log("more"), ["stdout F more"]);
    node.stop(&id, 1);
    assert_eq!(node.status(&id).exit_code, 137);
    pod.end();
}

#[test]
fn a_pod_that_stands_still_is_stopped_all_the_same() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script("main", "exec sleep 4711");
    let mut victims = match runtime().as_str() {
        "runc" => processes_named("busybox"),
        _ => processes_named("caisson-vmm"),
    };
    if runtime() == "runc" {
        victims.retain(|process| process.command.contains("4711"));
    }
    assert!(!victims.is_empty());
    for process in &victims {
        let pid = Pid::from_raw(process.pid).expect("pid");
        kill_process(pid, Signal::STOP).expect("stop");
    }
    let began = Instant::now();
    pod.end();
    // The kubelet gives a request two minutes.
    assert!(
        began.elapsed() < Duration::from_secs(120),
        "{id} held the pod up"
    );
    drop(node);
    case.nothing_is_left();
}
