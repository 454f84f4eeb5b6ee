//! Pods whose cgroups systemd makes, as the kubelet has it by default (`SystemdCgroup`).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use caisson_tests::case::{processes_named, runtime};
use caisson_tests::host::Process;
use k8s_cri::v1::LinuxContainerResources;
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::shims;
use crate::kubelet::{Kubelet, begin_pods, by_systemd, group, until};

/// How long a death may take to be noticed.
const SOON: std::time::Duration = std::time::Duration::from_secs(30);

/// A property of a unit, as systemd prints it.
fn show(unit: &str, property: &str) -> String {
    let output = Command::new("systemctl")
        .args(["show", "--value", "--property", property, unit])
        .output();
    let text = output.expect("systemctl").stdout;
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn cgroup_of(process: &Process) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).expect("cgroup");
    let path = text.trim().strip_prefix("0::").expect("cgroup v2");
    group(path)
}

fn skipped() -> bool {
    if !by_systemd() {
        println!("skipped: the kubelet's cgroup driver is cgroupfs");
    }
    !by_systemd()
}

#[test]
fn a_pods_sandbox_is_a_scope_in_the_pods_slice() {
    if skipped() {
        return;
    }
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let parent = pod
        .config
        .linux
        .as_ref()
        .expect("linux")
        .cgroup_parent
        .clone();
    let unit = format!("cri-containerd-{}.scope", pod.id);
    assert_eq!(show(&unit, "ActiveState"), "active");
    assert_eq!(show(&unit, "Delegate"), "yes");
    assert_eq!(show(&unit, "ControlGroup"), format!("{parent}/{unit}"));
    let scope = group(&format!("{parent}/{unit}"));
    if runtime() == "caisson" {
        // The virtual machine is the pod's, the shim is containerd's: it ends a pod whose scope is killed.
        let vmms = processes_named("caisson-vmm");
        let groups: Vec<_> = vmms.iter().map(cgroup_of).collect();
        assert_eq!(groups, std::slice::from_ref(&scope));
        for shim in shims() {
            assert!(!cgroup_of(&shim).starts_with(group(&parent)), "{shim:?}");
        }
    }
    let mut config = pod.container("main", "echo up; exec sleep 1000");
    config.linux.as_mut().expect("linux").resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    });
    let id = pod.run(config);
    assert_eq!(
        node.said(&id, "cat /sys/fs/cgroup/memory.max"),
        (64 << 20).to_string()
    );
    pod.end();
    assert_eq!(show(&unit, "LoadState"), "not-found");
    assert!(!scope.exists());
}

#[test]
fn a_killed_shims_scope_is_gone() {
    if runtime() == "runc" {
        println!("skipped on runc: its shim leaves its socket");
        return;
    }
    if skipped() {
        return;
    }
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let unit = format!("cri-containerd-{}.scope", pod.id);
    for shim in shims() {
        let pid = Pid::from_raw(shim.pid).expect("pid");
        kill_process(pid, Signal::KILL).expect("kill");
    }
    until(SOON, "the scope is gone", || {
        (show(&unit, "LoadState") == "not-found").then_some(())
    });
    pod.end();
}
