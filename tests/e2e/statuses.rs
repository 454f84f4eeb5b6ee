//! Exit statuses: the container's own, signals as 128 + n, and what is reported when nothing could be executed.

use std::process::Stdio;
use std::time::Duration;

use caisson_tests::{Bundle, Case};
use serde_json::json;

/// A bundle whose program waits for `exec`s.
fn waiting(case: &Case) -> Bundle {
    case.bundle().args(["sleep", "1000"])
}

#[test]
fn run_returns_the_programs_status() {
    let case = Case::begin();
    for status in [0, 1, 42, 125, 126, 127, 255] {
        let bundle = case
            .bundle_in(&format!("exit-{status}"))
            .script(&format!("exit {status}"));
        assert_eq!(case.run(&bundle).status, status);
    }
}

#[test]
fn exec_returns_every_status_from_0_to_255() {
    // Under half a second each on an emulated processor that nobody else uses.
    let case = Case::begin_within(Duration::from_secs(900));
    case.start(&waiting(&case), "one");
    for status in 0..=255 {
        assert_eq!(case.exec("one", &format!("exit {status}")).status, status);
    }
    case.delete("one");
}

#[test]
fn a_signal_is_128_and_its_number_for_exec_and_run() {
    let case = Case::begin();
    case.start(&waiting(&case), "one");
    for (name, number) in [
        ("KILL", 9),
        ("TERM", 15),
        ("HUP", 1),
        ("SEGV", 11),
        ("ABRT", 6),
    ] {
        let outcome = case.exec("one", &format!("ulimit -c 0; kill -{name} $$; sleep 10"));
        assert_eq!(outcome.status, 128 + number, "{name}");
    }
    case.delete("one");
    let bundle = case.bundle_in("killed").script("echo up; exec sleep 1000");
    let mut running = case.run_call(&bundle, "two").stdout(Stdio::piped()).start();
    assert_eq!(running.line(), "up");
    case.call(["kill", "two", "KILL"]).succeed();
    assert_eq!(running.finish().status, 137);
}

#[test]
fn a_missing_program_fails_run_and_create_and_start_as_with_runc() {
    let case = Case::begin();
    let bundle = case.bundle().args(["nosuchprogram"]);
    let outcome = case.run(&bundle);
    outcome.is_refusal("nosuchprogram");
    outcome.is_refusal("executable file not found in $PATH");
    assert_eq!(outcome.status, 1);
    case.nothing_is_left();
    let bundle = bundle.args(["/no/such/program"]);
    let outcome = case.run(&bundle);
    outcome.is_refusal("no such file or directory");
    assert_eq!(outcome.status, 1);
    case.nothing_is_left();
}

#[test]
fn exec_of_a_missing_or_unexecutable_program_is_reported() {
    let case = Case::begin();
    let bundle = waiting(&case).file("etc/plain", "not a program");
    case.start(&bundle, "one");
    let missing = case.call(["exec", "one", "nosuchprogram"]).finish();
    assert_eq!(missing.status, EXEC_FAILED, "{missing:?}");
    missing.is_refusal("executable file not found in $PATH");
    let plain = case.call(["exec", "one", "/etc/plain"]).finish();
    assert_eq!(plain.status, EXEC_FAILED, "{plain:?}");
    plain.is_refusal("permission denied");
    // A shell's own 126 and 127 pass through.
    assert_eq!(case.exec("one", "/etc/plain").status, 126);
    assert_eq!(case.exec("one", "nosuchprogram").status, 127);
    case.delete("one");
}

/// What runc's `exec` exits with when the program cannot be executed.
const EXEC_FAILED: i32 = 255;

#[test]
fn the_program_gets_exactly_its_environment_directory_user_and_limits() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("env | sort; pwd; id -u; id -g; id -G; umask; ulimit -n; hostname");
    let bundle = bundle.edit(|spec| {
        let process = &mut spec["process"];
        process["env"] = json!(["PATH=/bin", "A=1", "B=two words"]);
        process["cwd"] = json!("/etc");
        process["user"] =
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o27});
        process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 77, "soft": 77}]);
        spec["hostname"] = json!("boxed");
    });
    let outcome = case.run(&bundle);
    let expected = "A=1\nB=two words\nHOME=/\nPATH=/bin\nPWD=/etc\nSHLVL=1\n/etc\n1000\n1001\n1001 5 6\n0027\n77\nboxed\n";
    assert_eq!(outcome.text(), expected, "{outcome:?}");
}

#[test]
fn exec_takes_environment_user_directory_and_a_process_document() {
    let case = Case::begin();
    case.start(&waiting(&case), "one");
    let outcome = case
        .call([
            "exec",
            "-e",
            "X=y",
            "-u",
            "1000:1001",
            "--cwd",
            "/etc",
            "one",
        ])
        .args(["sh", "-c", "echo $X $(id -u) $(id -g) $(pwd)"])
        .succeed();
    assert_eq!(outcome.text(), "y 1000 1001 /etc\n");
    let file = case.dir().join("process.json");
    let process = json!({
        "args": ["sh", "-c", "echo $Z; exit 4"], "cwd": "/", "env": ["PATH=/bin", "Z=z"],
        "user": {"uid": 0, "gid": 0},
    });
    std::fs::write(&file, process.to_string()).expect("process.json");
    let outcome = case
        .call(["exec", "-p"])
        .args([&file])
        .args(["one"])
        .finish();
    assert_eq!((outcome.status, outcome.text()), (4, "z\n"), "{outcome:?}");
    case.delete("one");
}

#[test]
fn exec_detached_returns_at_once_and_names_its_process() {
    let case = Case::begin();
    case.start(&waiting(&case), "one");
    let pid_file = case.pid_file("exec");
    let script = "echo $$ > /tmp/pid; exec sleep 999";
    let call = case.call(["exec", "-d", "--pid-file"]).args([&pid_file]);
    call.args(["one", "sh", "-c", script]).succeed();
    let pid = case.pid("exec");
    assert!(rustix::process::test_kill_process(pid).is_ok());
    let outcome = case.exec("one", "ps -o args");
    assert!(outcome.text().contains("sleep 999"), "{outcome:?}");
    assert_eq!(case.exec("one", "kill $(cat /tmp/pid)").status, 0);
    assert!(caisson_tests::call::wait_for_exit(
        pid,
        Duration::from_secs(20)
    ));
    case.delete("one");
}
