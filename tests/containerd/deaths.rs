//! Restarts and kills: what runs goes on, what is dead is gone.

use caisson_tests::case::{processes_named, runtime};
use caisson_tests::host::Process;
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::{Daemon, begin, shims};

/// How long a death may take to be noticed.
const SOON: std::time::Duration = std::time::Duration::from_secs(20);

fn kill(process: &Process) {
    let pid = Pid::from_raw(process.pid).expect("pid");
    kill_process(pid, Signal::KILL).expect("kill");
    assert!(caisson_tests::call::wait_for_exit(pid, SOON));
}

#[test]
fn a_container_survives_containerds_restart() {
    let case = begin();
    let mut containerd = Daemon::start(&case);
    containerd
        .run(["--detach"], "one", "exec sleep 1000")
        .succeed();
    for _ in 0..2 {
        containerd.kill();
        containerd.restart();
        assert_eq!(containerd.status("one"), "RUNNING");
        assert_eq!(
            containerd.exec("one", "e1", "echo there").succeed().text(),
            "there\n"
        );
    }
    containerd.kill();
    let shim = shims();
    assert_eq!(shim.len(), 1, "{shim:?}");
    containerd.restart();
    containerd.remove("one");
}

#[test]
fn a_killed_shim_leaves_nothing() {
    if runtime() == "runc" {
        println!("skipped on runc: its shim leaves its socket");
        return;
    }
    let case = begin();
    let containerd = Daemon::start(&case);
    containerd
        .run(["--detach"], "one", "exec sleep 1000")
        .succeed();
    for shim in shims() {
        kill(&shim);
    }
    // containerd notices, and has `delete` clean up.
    let end = std::time::Instant::now() + SOON;
    while containerd.status("one") != "none" && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert_eq!(containerd.status("one"), "none");
    containerd.ctr(["container", "rm", "one"]).succeed();
    drop(containerd);
    case.nothing_is_left();
}

#[test]
fn a_killed_vmm_is_an_exit_with_137() {
    if runtime() == "runc" {
        println!("skipped on runc: it has no VMM");
        return;
    }
    let case = begin();
    let containerd = Daemon::start(&case);
    let one = containerd.run(["--rm"], "one", "echo up; exec sleep 1000");
    let mut one = one.stdout(std::process::Stdio::piped()).start();
    assert_eq!(one.line(), "up");
    for vmm in processes_named("caisson-vmm") {
        kill(&vmm);
    }
    assert_eq!(one.finish().status, 137);
}
