//! `kill -9` of the agent, which is PID 1 of the guest, at each step of a container's life.
//!
//! The kernel shields PID 1 from signals that others send. What kills it for certain is a fault of its own: a process
//! that may trace it writes an illegal instruction where it will go on. Armed so it dies of the next thing that it has
//! to do, which is the next request; struck, at once. The guest's kernel panics without its PID 1, and that is what
//! people are told.

use std::process::Stdio;

use caisson_tests::{Bundle, Case, Outcome};
use serde_json::{Value, json};

use crate::kills::truth_then_nothing;

const NO_AGENT: &str = "runc has no agent";

/// Writes an illegal instruction where PID 1 will go on: the last field of `/proc/1/syscall` is that place.
const ARM: &str = "set -- $(cat /proc/1/syscall); shift $(($# - 1)); \
                   printf '\\017\\013' | dd of=/proc/1/mem bs=1 seek=$(($1)) conv=notrunc 2>/dev/null";

/// Arms, wakes PID 1, and waits for the end.
fn strike() -> String {
    format!("{ARM}; kill -CHLD 1; sleep 1000")
}

/// A container that sees the guest's processes and may trace them.
pub(crate) fn among_the_guests_processes(bundle: Bundle) -> Bundle {
    bundle.edit(|spec| {
        let namespaces = spec["linux"]["namespaces"]
            .as_array_mut()
            .expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "pid");
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] =
                json!(["CAP_KILL", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]);
        }
    })
}

fn dangerous(case: &Case) -> Bundle {
    among_the_guests_processes(case.bundle())
}

/// A running container after which the agent is armed and does not know it.
fn armed(case: &Case) {
    // Nothing of this reaches the agent: no byte of output, no end of a process of its own.
    let bundle = dangerous(case).script(&format!("{ARM}; touch /armed; sleep 1000"));
    case.start(&bundle, "one");
    case.wait_for_file(&bundle.rootfs("armed"));
}

#[track_caller]
fn names_the_cause(outcome: &Outcome) {
    outcome.is_refusal("the guest kernel panicked: Attempted to kill init!");
    outcome.is_refusal("last console lines: ");
}

/// Where the guest has the root file system of the container `one` before that is the container's root.
const GUESTS_VIEW: &str = "/run/caisson/share/one/rootfs";

/// A hook in the guest, whose program is the container's busybox; `root` is where that is at the time.
fn hook(root: &str, script: &str) -> Value {
    json!([{"path": format!("{root}/bin/busybox"), "args": ["sh", "-c", script], "env": [format!("PATH={root}/bin")]}])
}

#[test]
fn during_create() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    // The agent wakes when the hook has ended.
    let hook = hook(GUESTS_VIEW, ARM);
    let bundle = case
        .bundle()
        .edit(|spec| spec["hooks"] = json!({"createContainer": hook}));
    names_the_cause(&case.create_call(&bundle, "one").finish());
    assert_eq!(case.status("one"), "none");
    truth_then_nothing(&case, "one", "create");
}

#[test]
fn when_start_is_asked_for() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    // What the hook leaves behind does its work when the container has been created: then nothing is left to be done
    // but to start it. By that time the container's root is the hook's too.
    let script = format!(
        "(until [ -e /go ]; do sleep 0.1; done; {ARM}; touch /armed; sleep 1000) >/dev/null 2>&1 &"
    );
    let bundle = dangerous(&case).args(["sleep", "1000"]);
    let mut hook = hook(GUESTS_VIEW, &script);
    hook[0]["env"] = json!([format!("PATH={GUESTS_VIEW}/bin:/bin")]);
    let bundle = bundle.edit(|spec| spec["hooks"] = json!({"createContainer": hook}));
    case.create(&bundle, "one");
    std::fs::write(bundle.rootfs("go"), "").expect("write");
    case.wait_for_file(&bundle.rootfs("armed"));
    names_the_cause(&case.call(["start", "one"]).finish());
    assert_eq!(case.status("one"), "stopped");
    truth_then_nothing(&case, "one", "start");
}

#[test]
fn during_start() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    let bundle = dangerous(&case).args(["sleep", "1000"]);
    let bundle = bundle.edit(|spec| spec["hooks"] = json!({"startContainer": hook("", &strike())}));
    case.create(&bundle, "one");
    names_the_cause(&case.call(["start", "one"]).finish());
    assert_eq!(case.status("one"), "stopped");
    truth_then_nothing(&case, "one", "start");
}

#[test]
fn while_run_follows_the_program() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    let outcome = case.run(&dangerous(&case).script(&strike()));
    names_the_cause(&outcome);
    assert_eq!(outcome.status, 137, "{outcome:?}");
    case.nothing_is_left();
}

#[test]
fn when_exec_is_asked_for() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    armed(&case);
    let outcome = case.exec("one", "true");
    names_the_cause(&outcome);
    assert_eq!(outcome.status, 255, "{outcome:?}");
    case.wait("one");
    assert_eq!(case.status("one"), "stopped");
    truth_then_nothing(&case, "one", "exec");
}

#[test]
fn while_exec_follows_its_process() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    case.start(&dangerous(&case).args(["sleep", "1000"]), "one");
    let outcome = case.exec("one", &strike());
    names_the_cause(&outcome);
    assert_eq!(outcome.status, 137, "{outcome:?}");
    case.wait("one");
    assert_eq!(case.status("one"), "stopped");
    truth_then_nothing(&case, "one", "exec");
}

#[test]
fn when_kill_is_asked_for() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    armed(&case);
    names_the_cause(&case.call(["kill", "one", "TERM"]).finish());
    case.wait("one");
    truth_then_nothing(&case, "one", "kill");
}

#[test]
fn when_delete_is_asked_for() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    armed(&case);
    case.delete("one");
    case.nothing_is_left();
}

#[test]
fn while_nobody_looks() {
    let Some(case) = Case::begin_with_vm(NO_AGENT) else {
        return;
    };
    let log = case.dir().join("log.json");
    let bundle = dangerous(&case).script(&strike());
    let root = case.root();
    let call = case
        .program(&caisson_tests::case::runtime())
        .stdin(Stdio::null());
    let call = call.args([
        "--root".as_ref(),
        root.as_os_str(),
        "--log".as_ref(),
        log.as_os_str(),
    ]);
    let call = call
        .args(["--log-format", "json", "create", "--pid-file"])
        .args([case.pid_file("one")]);
    call.args(["-b".as_ref(), bundle.dir().as_os_str(), "one".as_ref()])
        .succeed();
    case.call(["start", "one"]).succeed();
    case.wait("one");
    assert_eq!(case.status("one"), "stopped");
    let said = std::fs::read_to_string(log).expect("log");
    assert!(
        said.contains("Attempted to kill init!") && said.contains("last console lines"),
        "{said}"
    );
    truth_then_nothing(&case, "one", "unseen");
}
