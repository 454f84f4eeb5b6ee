//! `ps`: the container's processes, as the host's `ps` shows them.

use std::time::{Duration, Instant};

use caisson_tests::Case;
use serde_json::Value;

/// `ps` once it lists each of these programs, and nothing else.
fn listing(case: &Case, options: &[&str], programs: &[&str]) -> Vec<Vec<String>> {
    let began = Instant::now();
    loop {
        let outcome = case.call(["ps", "one"]).args(options).succeed();
        let lines = outcome.text().lines();
        let rows: Vec<Vec<String>> = lines
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect();
        // A process that has just been forked is still called as its parent.
        let all = programs
            .iter()
            .all(|program| outcome.text().lines().any(|line| line.ends_with(program)));
        if all && rows.len() == programs.len() + 1 {
            return rows;
        }
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{}",
            outcome.text()
        );
    }
}

#[test]
fn the_processes_of_a_container_and_no_others_are_listed() {
    let case = Case::begin();
    let bundle = case.bundle().script("sleep 1001 & sleep 1002 & wait");
    case.start(&bundle, "one");
    let rows = listing(&case, &[], &["& wait", "sleep 1001", "sleep 1002"]);
    assert_eq!(rows[0][..3], ["UID", "PID", "PPID"]);
    let shell = &rows[1];
    assert_eq!(shell[0], "root");
    assert!(
        rows[2..].iter().all(|row| row[2] == shell[1]),
        "not the shell's children: {rows:?}"
    );
    case.delete("one");
}

#[test]
fn options_are_passed_to_ps() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["process"]["user"]["uid"] = 1234.into();
    });
    case.start(&bundle, "one");
    let rows = listing(&case, &["-eo", "user,pid,ni,stat,args"], &["sleep 1000"]);
    assert_eq!(rows[0], ["USER", "PID", "NI", "STAT", "COMMAND"]);
    assert_eq!(rows[1][0], "1234");
    assert_eq!(rows[1][4..], ["sleep", "1000"]);
    let rows = listing(&case, &["aux"], &["sleep 1000"]);
    assert_eq!(rows[0][..3], ["USER", "PID", "%CPU"]);
    assert_eq!(rows[1][10..], ["sleep", "1000"]);
    let memory: u64 = rows[1][5].parse().expect("a number");
    assert!((1..100_000).contains(&memory), "resident: {memory} KiB");
    let no_pid = case.call(["ps", "one", "-eo", "args"]).finish();
    no_pid.is_refusal("couldn't find PID field in ps output");
    let unknown = case.call(["ps", "one", "--nonsense"]).finish();
    unknown.is_refusal("exit status");
    case.delete("one");
}

#[test]
fn as_json_the_hosts_pids_are_listed() {
    let case = Case::begin();
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    let pids = || {
        let outcome = case.call(["ps", "-f", "json", "one"]).succeed();
        serde_json::from_slice::<Value>(&outcome.stdout).expect("JSON")
    };
    let init = case.pid("one").as_raw_nonzero().get();
    assert_eq!(pids(), serde_json::json!([init]));
    let file = case.dir().join("exec.pid");
    let exec = case.call(["exec", "-d", "--pid-file"]).args([&file]);
    exec.args(["one", "sleep", "1000"]).succeed();
    let exec: i32 = std::fs::read_to_string(&file)
        .expect("pid file")
        .parse()
        .expect("a pid");
    let both = pids();
    let both: Vec<i64> = both
        .as_array()
        .expect("array")
        .iter()
        .filter_map(Value::as_i64)
        .collect();
    assert!(
        both.len() == 2 && both.contains(&init.into()) && both.contains(&exec.into()),
        "{both:?}"
    );
    case.call(["ps", "-f", "nope", "one"])
        .finish()
        .is_refusal("invalid format option");
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    assert_eq!(pids(), Value::Null);
    let outcome = case.call(["ps", "one"]).succeed();
    assert_eq!(outcome.text().lines().count(), 1);
    case.call(["delete", "one"]).succeed();
    case.call(["ps", "one"])
        .finish()
        .is_refusal("container does not exist");
}
