//! Signals sent to the runtime's foreground process reach the program.

use std::io::Write;
use std::process::Stdio;

use caisson_tests::Case;
use rustix::process::Signal;

/// Says each signal's name as it arrives; TERM is the last.
const SCRIPT: &str = "for s in INT HUP USR1 USR2 WINCH; do trap \"echo $s\" $s; done; trap 'echo TERM; exit 21' TERM; \
                      echo ready; while :; do read line; done";

const SIGNALS: &[(Signal, &str)] = &[
    (Signal::INT, "INT"),
    (Signal::HUP, "HUP"),
    (Signal::USR1, "USR1"),
    (Signal::WINCH, "WINCH"),
    (Signal::TERM, "TERM"),
];

#[test]
fn run_forwards_signals_to_the_program() {
    let case = Case::begin();
    let bundle = case.bundle().script(SCRIPT);
    let call = case
        .run_call(&bundle, "one")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut running = call.start();
    let mut stdin = running.take_stdin();
    assert_eq!(running.line(), "ready");
    for (signal, name) in SIGNALS {
        running.signal(*signal);
        // A shell runs its traps when a read returns.
        let _ = stdin.write_all(b"\n");
        assert_eq!(running.line(), *name);
    }
    assert_eq!(running.finish().status, 21);
}

#[test]
fn exec_forwards_signals_to_its_process_only() {
    let case = Case::begin();
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    let call = case.call(["exec", "one", "/bin/sh", "-c", SCRIPT]);
    let mut running = call.stdin(Stdio::piped()).stdout(Stdio::piped()).start();
    let mut stdin = running.take_stdin();
    assert_eq!(running.line(), "ready");
    for (signal, name) in SIGNALS {
        running.signal(*signal);
        let _ = stdin.write_all(b"\n");
        assert_eq!(running.line(), *name);
    }
    assert_eq!(running.finish().status, 21);
    assert_eq!(case.status("one"), "running");
    case.delete("one");
}

#[test]
fn kill_all_reaches_every_process() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("trap '' TERM; sleep 777 & sleep 777 & echo ready; wait; wait; exit 5");
    let bundle =
        bundle.edit(|spec| {
            // Without a PID namespace of its own: what `--all` is for.
            let namespaces = spec["linux"]["namespaces"]
                .as_array_mut()
                .expect("namespaces");
            namespaces.retain(|namespace| namespace["type"] != "pid");
            let mounts = spec["mounts"].as_array_mut().expect("mounts");
            mounts.iter_mut().filter(|mount| mount["destination"] == "/proc").for_each(|mount| {
            *mount = serde_json::json!({"destination": "/proc", "type": "proc", "source": "proc"});
        });
        });
    let mut running = case.run_call(&bundle, "one").stdout(Stdio::piped()).start();
    assert_eq!(running.line(), "ready");
    case.call(["kill", "--all", "one", "KILL"]).succeed();
    assert_eq!(running.finish().status, 137);
}
