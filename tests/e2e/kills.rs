//! `kill -9` at any moment: afterwards `state` tells the truth and `delete --force` leaves nothing.
//!
//! How moments are picked: `caisson_tests::killing`.

use std::time::Duration;

use caisson_tests::killing::{Victim, kill_at_moments};
use caisson_tests::{Bundle, Call, Case, call};
use rustix::process::{Signal, kill_process};

/// Moments per step.
const MOMENTS: u32 = 5;

/// Whatever happened: the truth, then nothing.
#[track_caller]
pub(crate) fn truth_then_nothing(case: &Case, id: &str, context: &str) {
    truth(case, id, context);
    case.delete(id);
    let left = case.leftovers();
    assert!(
        left.is_empty(),
        "{context}: left behind:\n{}",
        left.join("\n")
    );
}

/// `state` agrees with what the container does.
#[track_caller]
pub(crate) fn truth(case: &Case, id: &str, context: &str) {
    let status = case.status(id);
    let alive = case.exec(id, "echo alive");
    match status.as_str() {
        // A program may have come to its own end between the two questions.
        "running" => assert!(
            alive.text() == "alive\n" || case.status(id) != "running",
            "{context}: running, but {alive:?}"
        ),
        "none" | "stopped" | "paused" => {
            assert_ne!(alive.status, 0, "{context}: {status}, but exec works")
        }
        "created" | "creating" => {}
        other => panic!("{context}: status {other}"),
    }
}

/// Kills `victim` at evenly spread moments of `step`, each time after `before` and followed by the checks.
fn kill_during(case: &Case, victim: Victim, before: impl Fn(), step: impl Fn() -> Call) {
    let after = |context: &str| truth_then_nothing(case, "one", context);
    kill_at_moments(victim, MOMENTS, before, step, after);
}

fn sleeping(case: &Case) -> Bundle {
    case.bundle().args(["sleep", "1000"])
}

macro_rules! kill_tests {
    ($($name:ident: $victim:expr, $reason:literal;)*) => {
        mod during_create {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                super::kill_during(&case, $victim, || {}, || case.create_call(&bundle, "one"));
            }
        )*}
        mod during_start {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                super::kill_during(&case, $victim, || drop(case.create(&bundle, "one")), || case.call(["start", "one"]));
            }
        )*}
        mod during_run {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = case.bundle().args(["true"]);
                super::kill_during(&case, $victim, || {}, || case.run_call(&bundle, "one"));
            }
        )*}
        mod during_exec {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                super::kill_during(&case, $victim, || case.start(&bundle, "one"), || case.call(["exec", "one", "true"]));
            }
        )*}
        mod during_pause {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                super::kill_during(&case, $victim, || case.start(&bundle, "one"), || case.call(["pause", "one"]));
            }
        )*}
        mod during_resume {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                let paused = || {
                    case.start(&bundle, "one");
                    case.call(["pause", "one"]).succeed();
                };
                super::kill_during(&case, $victim, paused, || case.call(["resume", "one"]));
            }
        )*}
        mod during_update {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                super::kill_during(&case, $victim, || case.start(&bundle, "one"), || case.call(["update", "--pids-limit", "50", "one"]));
            }
        )*}
        mod during_growth {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                super::kill_during(&case, $victim, || case.start(&bundle, "one"), || case.call(["update", "--memory", "700m", "one"]));
            }
        )*}
        mod during_delete {$(
            #[test]
            fn $name() {
                let Some(case) = super::case_for($reason) else { return };
                let bundle = super::sleeping(&case);
                super::kill_during(&case, $victim, || case.start(&bundle, "one"), || case.call(["delete", "--force", "one"]));
            }
        )*}
    };
}

/// A case, if the runtime under test has this victim; an empty reason means that every runtime has it.
fn case_for(reason: &str) -> Option<Case> {
    if reason.is_empty() {
        Some(Case::begin())
    } else {
        Case::begin_with_vm(reason)
    }
}

kill_tests! {
    the_monitor_is_killed: super::Victim::Monitor, "runc has no monitor";
    the_machine_is_killed: super::Victim::Vmm, "runc has no machine";
    the_caller_is_killed: super::Victim::Caller, "runc leaks a half-made container when create is killed";
}

#[test]
fn a_killed_monitor_or_machine_means_stopped() {
    let Some(case) = Case::begin_with_vm("runc has neither") else {
        return;
    };
    let bundle = sleeping(&case);
    for victim in [Victim::Monitor, Victim::Vmm] {
        case.start(&bundle, "one");
        let pid = if victim == Victim::Vmm {
            victim.find(case.pid("one"))
        } else {
            Some(case.pid("one"))
        };
        kill_process(pid.expect("a victim"), Signal::KILL).expect("kill");
        case.wait("one");
        assert_eq!(case.status("one"), "stopped", "{victim:?}");
        assert_eq!(case.state("one").expect("state")["pid"], 0);
        case.call(["delete", "one"]).succeed();
        case.nothing_is_left();
    }
}

#[test]
fn a_killed_init_means_stopped() {
    let case = Case::begin();
    case.start(&sleeping(&case), "one");
    kill_process(case.pid("one"), Signal::KILL).expect("kill");
    case.wait("one");
    assert_eq!(case.status("one"), "stopped");
    case.call(["delete", "one"]).succeed();
}

#[test]
fn a_machine_that_is_killed_ends_run_with_137() {
    let Some(case) = Case::begin_with_vm("runc has no machine") else {
        return;
    };
    let bundle = case.bundle().script("echo up; exec sleep 1000");
    let mut running = case
        .run_call(&bundle, "one")
        .stdout(std::process::Stdio::piped())
        .start();
    assert_eq!(running.line(), "up");
    let machine = Victim::Vmm.find(running.pid()).expect("a machine");
    kill_process(machine, Signal::KILL).expect("kill");
    let outcome = running.finish();
    assert_eq!(outcome.status, 137, "{outcome:?}");
}

#[test]
fn a_machine_that_hears_nothing_ends_with_its_monitor() {
    let Some(case) = case_for("runc has no machine") else {
        return;
    };
    case.start(&sleeping(&case), "one");
    let machine = Victim::Vmm
        .find(case.pid("one"))
        .expect("a virtual machine");
    // It cannot hear that its control socket closed.
    kill_process(machine, Signal::STOP).expect("stop the VMM");
    kill_process(case.pid("one"), Signal::KILL).expect("kill the monitor");
    let ended = call::wait_for_exit(machine, Duration::from_secs(30));
    assert!(ended, "the machine outlived its monitor");
    truth_then_nothing(&case, "one", "a stopped machine without a monitor");
}
