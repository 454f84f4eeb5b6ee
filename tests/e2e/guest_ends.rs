//! Guests that end on their own, each told with its cause and its last console lines: a panic, a triple fault, a boot
//! that never comes to its end.

use std::process::Stdio;
use std::time::{Duration, Instant};

use caisson_tests::kernel::{self, Ending};
use caisson_tests::{Case, Outcome};

const NO_MACHINE: &str = "runc has no machine";

/// The boot deadline of these tests.
const PATIENCE: Duration = Duration::from_secs(2);

/// `run` with a kernel that says a line and ends so.
fn run_kernel(case: &Case, line: &str, ending: Ending) -> Outcome {
    let path = case.dir().join("kernel");
    kernel::write(&path, line, ending);
    let patience = case.configured("boot_timeout_ms", &PATIENCE.as_millis().to_string());
    std::fs::rename(patience, case.dir().join("config.toml")).expect("rename");
    let config = case.configured("kernel", &format!("{path:?}"));
    case.run_call(&case.bundle(), "one")
        .env("CAISSON_CONFIG", config)
        .finish()
}

/// One line that names the cause and what the console said, and nothing left.
#[track_caller]
fn is_told(case: &Case, outcome: &Outcome, cause: &str, console: &str) {
    outcome.is_refusal(cause);
    outcome.is_refusal("last console lines: ");
    outcome.is_refusal(console);
    case.nothing_is_left();
}

#[test]
fn a_triple_fault_while_booting_is_told() {
    let Some(case) = Case::begin_with_vm(NO_MACHINE) else {
        return;
    };
    let outcome = run_kernel(&case, "my tables are gone", Ending::TripleFault);
    is_told(&case, &outcome, "triple fault", "my tables are gone");
}

#[test]
fn a_guest_that_never_boots_is_ended_after_the_configured_time() {
    let Some(case) = Case::begin_with_vm(NO_MACHINE) else {
        return;
    };
    let began = Instant::now();
    let outcome = run_kernel(&case, "I am thinking", Ending::Silence);
    assert!(began.elapsed() >= PATIENCE, "{:?}", began.elapsed());
    is_told(
        &case,
        &outcome,
        "the agent did not connect within 2s of boot",
        "I am thinking",
    );
}

#[test]
fn a_panic_while_booting_is_told() {
    let Some(case) = Case::begin_with_vm(NO_MACHINE) else {
        return;
    };
    let empty = case.dir().join("empty.cpio");
    std::fs::write(&empty, [0; 512]).expect("write");
    let config = case.configured("initramfs", &format!("{empty:?}"));
    let call = case.run_call(&case.bundle(), "one");
    let outcome = call.env("CAISSON_CONFIG", config).finish();
    is_told(
        &case,
        &outcome,
        "the guest kernel panicked: ",
        "Kernel panic - not syncing",
    );
}

#[test]
fn a_panic_while_the_program_runs_ends_run_with_137_and_its_cause() {
    let Some(case) = Case::begin_with_vm(NO_MACHINE) else {
        return;
    };
    // The container's out-of-memory killer is told to panic, and then there is too little memory.
    let bundle = crate::agent_deaths::among_the_guests_processes(case.bundle());
    let bundle =
        bundle.script("echo up; read line; echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero");
    let bundle = bundle.edit(|spec| spec["linux"]["readonlyPaths"] = serde_json::json!([]));
    let call = case.run_call(&bundle, "one").stdin(Stdio::piped());
    let mut running = call.stdout(Stdio::piped()).start();
    assert_eq!(running.line(), "up");
    drop(running.take_stdin());
    let outcome = running.finish();
    assert_eq!(outcome.status, 137, "{outcome:?}");
    is_told(
        &case,
        &outcome,
        "the guest kernel panicked: Out of memory",
        "panic_on_oom",
    );
}
