//! Signals sent to the runtime's foreground process reach the program.

use std::io::Read;
use std::process::Stdio;

use caisson_tests::{Case, Running};
use rustix::process::Signal;

/// Says each signal's name as it arrives.
const PROGRAM: &str = env!("CARGO_BIN_EXE_signals");

const SIGNALS: &[(Signal, &str)] = &[
    (Signal::INT, "INT"),
    (Signal::HUP, "HUP"),
    (Signal::USR1, "USR1"),
    (Signal::WINCH, "WINCH"),
    (Signal::TERM, "TERM"),
];

/// Sends each signal to the runtime's own process and expects the program to name it.
#[track_caller]
fn each_signal_arrives(mut running: Running) {
    assert_eq!(running.line(), "ready");
    for (signal, name) in SIGNALS {
        // runc takes this one as a change of its terminal's size, and has no terminal here (its signals.go).
        if *signal == Signal::WINCH && caisson_tests::case::runtime() == "runc" {
            continue;
        }
        running.signal(*signal);
        assert_eq!(running.line(), *name);
    }
    assert_eq!(running.finish().status, 0);
}

#[test]
fn run_forwards_signals_to_the_program() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .program(PROGRAM)
        .args(["signals", "--until", "TERM"]);
    each_signal_arrives(case.run_call(&bundle, "one").stdout(Stdio::piped()).start());
}

#[test]
fn exec_forwards_signals_to_its_process_only() {
    let case = Case::begin();
    case.start(
        &case.bundle().program(PROGRAM).args(["sleep", "1000"]),
        "one",
    );
    let call = case.call(["exec", "one", "signals", "--until", "TERM"]);
    each_signal_arrives(call.stdout(Stdio::piped()).start());
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
    let mut running = case
        .create_call(&bundle, "one")
        .stdout(Stdio::piped())
        .start();
    let mut stdout = running.take_stdout();
    assert_eq!(running.finish().status, 0);
    case.call(["start", "one"]).succeed();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).expect("ready");
    case.call(["kill", "--all", "one", "KILL"]).succeed();
    case.wait("one");
    // The last process that held the stream is gone.
    assert_eq!(stdout.read(&mut ready).expect("the end"), 0);
    case.call(["delete", "one"]).succeed();
}
