//! `pause` and `resume`: what runs stands still and goes on, and what is asked meanwhile is answered as runc does.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use caisson_tests::{Bundle, Case, case};

/// A container that counts in a file of its root file system.
fn counting(case: &Case) -> Bundle {
    case.bundle()
        .script("trap 'exit 3' TERM; while :; do echo x >> /count; sleep 0.05 & wait; done")
}

fn count(bundle: &Bundle) -> usize {
    fs::read(bundle.rootfs("count")).map_or(0, |text| text.len())
}

/// Waits until the container counts on.
#[track_caller]
fn counts_on(bundle: &Bundle) {
    let before = count(bundle);
    let began = Instant::now();
    while count(bundle) == before {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "it does not go on"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
fn stands_still(bundle: &Bundle) {
    let before = count(bundle);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(count(bundle), before, "it goes on");
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let case = Case::begin();
    let bundle = counting(&case);
    case.start(&bundle, "one");
    counts_on(&bundle);
    for _ in 0..2 {
        case.call(["pause", "one"]).succeed();
        assert_eq!(case.status("one"), "paused");
        stands_still(&bundle);
        case.call(["resume", "one"]).succeed();
        assert_eq!(case.status("one"), "running");
        counts_on(&bundle);
    }
    case.delete("one");
}

#[test]
fn pausing_twice_and_resuming_what_runs_are_refused() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.start(&bundle, "one");
    let resume = || case.call(["resume", "one"]).finish();
    resume().is_refusal("container not paused");
    case.call(["pause", "one"]).succeed();
    case.call(["pause", "one"])
        .finish()
        .is_refusal("container not running");
    case.call(["resume", "one"]).succeed();
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    case.call(["pause", "one"])
        .finish()
        .is_refusal("container not running");
    resume().is_refusal("container not paused");
    case.call(["delete", "one"]).succeed();
    case.call(["pause", "one"])
        .finish()
        .is_refusal("container does not exist");
}

#[test]
fn exec_in_a_paused_container_is_refused_unless_it_may_wait() {
    let case = Case::begin();
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    case.call(["pause", "one"]).succeed();
    let refused = case.exec("one", "echo no");
    assert_eq!(refused.status, 255);
    assert!(
        refused
            .stderr
            .contains("cannot exec in a paused container (use --ignore-paused to override)"),
        "{}",
        refused.stderr
    );
    let waiting = case
        .call(["exec", "--ignore-paused", "one", "echo", "late"])
        .start();
    assert!(
        !waiting.ends_within(Duration::from_millis(500)),
        "it did not wait"
    );
    case.call(["resume", "one"]).succeed();
    let outcome = waiting.finish();
    assert_eq!((outcome.status, outcome.text()), (0, "late\n"));
    case.delete("one");
}

#[test]
fn a_paused_container_can_be_killed_and_deleted() {
    let case = Case::begin();
    let bundle = counting(&case);
    case.start(&bundle, "one");
    counts_on(&bundle);
    case.call(["pause", "one"]).succeed();
    case.call(["delete", "one"])
        .finish()
        .is_refusal("that is not stopped: paused");
    let killed = Instant::now();
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(5), "it took {took:?} to die");
    assert_eq!(case.status("one"), "stopped");
    case.call(["delete", "one"]).succeed();
    case.start(&bundle, "two");
    case.call(["pause", "two"]).succeed();
    case.delete("two");
    case.nothing_is_left();
}

#[test]
fn other_signals_wait_until_the_container_is_resumed() {
    let case = Case::begin();
    let bundle = counting(&case);
    case.start(&bundle, "one");
    counts_on(&bundle);
    case.call(["pause", "one"]).succeed();
    case.call(["kill", "one", "TERM"]).succeed();
    stands_still(&bundle);
    assert_eq!(case.status("one"), "paused");
    case.call(["resume", "one"]).succeed();
    case.wait("one");
    assert_eq!(case.status("one"), "stopped");
    case.call(["delete", "one"]).succeed();
}

#[test]
fn a_container_that_is_paused_before_its_start_is_created_afterwards() {
    let case = Case::begin();
    let bundle = counting(&case);
    case.create(&bundle, "one");
    case.call(["pause", "one"]).succeed();
    assert_eq!(case.status("one"), "paused");
    case.call(["start", "one"])
        .finish()
        .is_refusal("cannot start a container in the paused state");
    case.call(["resume", "one"]).succeed();
    assert_eq!(case.status("one"), "created");
    case.call(["start", "one"]).succeed();
    counts_on(&bundle);
    case.delete("one");
}

/// The system call in which each vCPU thread of the machine is; `running` if it is in none.
fn vcpus() -> Vec<String> {
    let mut found = Vec::new();
    for machine in case::processes_named("caisson-vmm") {
        let tasks = format!("/proc/{}/task", machine.pid);
        for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
            let read = |name: &str| fs::read_to_string(Path::new(&task.path()).join(name));
            if read("comm").is_ok_and(|name| name.starts_with("vcpu")) {
                let call = read("syscall").unwrap_or_default();
                found.push(call.split(' ').next().unwrap_or_default().to_owned());
            }
        }
    }
    found
}

#[test]
fn the_vcpus_stand_still_too_and_work_when_they_are_asked() {
    let Some(case) = Case::begin_with_vm("runc has no vCPUs") else {
        return;
    };
    const FUTEX: &str = "202";
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    assert_ne!(vcpus(), [FUTEX]);
    case.call(["pause", "one"]).succeed();
    let halted = || {
        let began = Instant::now();
        while vcpus() != [FUTEX] {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "vCPUs: {:?}",
                vcpus()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    halted();
    let listed = case.call(["ps", "one"]).succeed();
    assert!(listed.text().contains("sleep 1000"), "{}", listed.text());
    halted();
    case.call(["resume", "one"]).succeed();
    assert_eq!(case.exec("one", "echo alive").text(), "alive\n");
    assert_ne!(vcpus(), [FUTEX]);
    case.delete("one");
}
