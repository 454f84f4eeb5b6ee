//! `events` and `update`: what a container uses, and may use.

use std::fs;
use std::process::Stdio;

use caisson_tests::{Case, Outcome, cgroup as host};
use serde_json::{Value, json};

/// The `data` of `events --stats`.
fn stats(case: &Case) -> Value {
    let outcome = case.call(["events", "--stats", "one"]).succeed();
    let event: Value = serde_json::from_slice(&outcome.stdout).expect("JSON");
    assert_eq!(
        (&event["type"], &event["id"]),
        (&json!("stats"), &json!("one"))
    );
    event["data"].clone()
}

/// A container that sleeps and sees its cgroup.
fn start(case: &Case, resources: Value) {
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["linux"]["resources"] = resources;
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        let namespaces = namespaces.expect("namespaces");
        // runc's default has one where the host has cgroup v2.
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
        namespaces.push(json!({"type": "cgroup"}));
    });
    case.start(&bundle, "one");
}

/// A file of the container's cgroup, as the container sees it.
fn cgroup(case: &Case, file: &str) -> String {
    let outcome = case.exec("one", &format!("cat /sys/fs/cgroup/{file}"));
    outcome.text().trim_end().to_owned()
}

fn update(case: &Case, options: &[&str]) -> Outcome {
    case.call(["update"]).args(options).args(["one"]).finish()
}

#[track_caller]
fn updated(case: &Case, options: &[&str]) {
    let outcome = update(case, options);
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
}

#[test]
fn stats_are_those_of_the_containers_cgroup() {
    let case = Case::begin();
    start(
        &case,
        json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 30}, "cpu": {"quota": 90_000, "period": 100_000}}),
    );
    let before = stats(&case);
    assert_eq!(before["memory"]["usage"]["limit"], 64 << 20);
    assert_eq!(before["pids"], json!({"current": 1, "limit": 30}));
    for member in [
        "cpuset",
        "blkio",
        "hugetlb",
        "intel_rdt",
        "network_interfaces",
    ] {
        assert!(before.get(member).is_some(), "{member} is missing");
    }
    let usage = before["memory"]["usage"]["usage"].as_u64().expect("usage");
    assert!((1..(32 << 20)).contains(&usage), "{usage}");
    // A process that has worked, and 16 MiB of a file in memory.
    let work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; dd if=/dev/zero of=/dev/shm/x bs=1M count=16";
    assert_eq!(case.exec("one", work).status, 0);
    let after = stats(&case);
    let number =
        |stats: &Value, path: &str| stats.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let grown = |path: &str| number(&after, path) - number(&before, path);
    assert!(
        grown("/cpu/usage/total") > 1_000_000,
        "{} ns",
        grown("/cpu/usage/total")
    );
    assert!(grown("/memory/usage/usage") > 15 << 20);
    assert!(grown("/memory/raw/shmem") >= 16 << 20);
    case.delete("one");
}

#[test]
fn the_hosts_part_of_the_stats_is_the_whole_sandbox() {
    let Some(case) = Case::begin_with_vm("runc has no other part") else {
        return;
    };
    start(&case, json!({}));
    let host = stats(&case)["host"].clone();
    let number = |path: &str| host.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    assert!(number("/cpu/usage/total") > 1_000_000, "{host}");
    assert!(number("/memory/usage/usage") > 8 << 20, "{host}");
    // Threads of the VMM and of the monitor.
    assert!(number("/pids/current") >= 3, "{host}");
    case.delete("one");
}

#[test]
fn kills_for_want_of_memory_are_told_as_they_happen() {
    let case = Case::begin();
    start(
        &case,
        json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}}),
    );
    let events = case
        .call(["events", "--interval", "1h", "one"])
        .stdout(Stdio::piped());
    let mut events = events.start();
    // Until the events are there, more kills are made: on runc nothing says when it has begun to watch.
    let glutton = "dd if=/dev/zero of=/dev/null bs=64M count=1";
    let watching = std::thread::scope(|scope| {
        let line = scope.spawn(|| events.line());
        while !line.is_finished() {
            assert_ne!(case.exec("one", glutton).status, 0, "64 MiB fit into 32");
        }
        line.join().expect("line")
    });
    let event: Value = serde_json::from_str(&watching).expect("JSON");
    assert_eq!(event, json!({"type": "oom", "id": "one"}));
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    assert_eq!(events.finish().status, 0);
    case.call(["delete", "one"]).succeed();
}

#[test]
fn events_come_at_the_interval_and_end_with_the_container() {
    let case = Case::begin();
    start(&case, json!({}));
    let events = case
        .call(["events", "--interval", "200ms", "one"])
        .stdout(Stdio::piped());
    let mut events = events.start();
    for _ in 0..3 {
        let event: Value = serde_json::from_str(&events.line()).expect("JSON");
        assert_eq!(event["type"], "stats");
    }
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    assert_eq!(events.finish().status, 0);
    case.call(["events", "one"])
        .finish()
        .is_refusal("container with id one is not running");
    case.call(["delete", "one"]).succeed();
    case.call(["events", "one"])
        .finish()
        .is_refusal("container does not exist");
}

#[test]
fn an_interval_must_be_more_than_nothing() {
    let case = Case::begin();
    start(&case, json!({}));
    let refused = case.call(["events", "--interval", "0s", "one"]).finish();
    refused.is_refusal("duration interval must be greater than 0");
    case.delete("one");
}

#[test]
fn limits_change_as_they_are_told() {
    let case = Case::begin();
    start(&case, json!({"memory": {"limit": 64 << 20}}));
    updated(
        &case,
        &[
            "--memory",
            "48m",
            "--memory-swap",
            "50m",
            "--memory-reservation",
            "8m",
        ],
    );
    assert_eq!(cgroup(&case, "memory.max"), (48 << 20).to_string());
    assert_eq!(cgroup(&case, "memory.swap.max"), (2 << 20).to_string());
    assert_eq!(cgroup(&case, "memory.low"), (8 << 20).to_string());
    updated(&case, &["--cpu-share", "512", "--pids-limit", "77"]);
    assert_eq!(cgroup(&case, "cpu.weight"), "20");
    assert_eq!(cgroup(&case, "pids.max"), "77");
    updated(&case, &["--cpu-quota", "40000", "--cpu-period", "80000"]);
    assert_eq!(cgroup(&case, "cpu.max"), "40000 80000");
    updated(&case, &["--cpu-quota", "20000"]);
    assert_eq!(cgroup(&case, "cpu.max"), "20000 80000");
    updated(&case, &["--cpu-quota", "-1", "--cpu-period", "80000"]);
    assert_eq!(cgroup(&case, "cpu.max"), "max 80000");
    assert_eq!(
        cgroup(&case, "memory.max"),
        (48 << 20).to_string(),
        "it was not to change"
    );
    // Where there is no limit of memory, there is none of swap.
    updated(&case, &["--memory", "-1"]);
    assert_eq!(cgroup(&case, "memory.max"), "max");
    assert_eq!(cgroup(&case, "memory.swap.max"), "max");
    case.delete("one");
}

#[test]
fn idle_and_burst_of_the_cpu_hold_in_the_guest_and_change() {
    let Some(case) = Case::begin_with_vm("runc 1.1 does not know them") else {
        return;
    };
    start(
        &case,
        json!({"cpu": {"idle": 1, "quota": 50_000, "period": 100_000, "burst": 20_000}}),
    );
    assert_eq!(cgroup(&case, "cpu.idle"), "1");
    assert_eq!(cgroup(&case, "cpu.max.burst"), "20000");
    let changes = ["--cpu-idle", "0", "--cpu-share", "1024", "--cpu-burst", "0"];
    updated(&case, &changes);
    assert_eq!(cgroup(&case, "cpu.idle"), "0");
    assert_eq!(cgroup(&case, "cpu.weight"), "39");
    assert_eq!(cgroup(&case, "cpu.max.burst"), "0");
    case.delete("one");
}

#[test]
fn limits_come_from_a_file_and_from_standard_input() {
    let case = Case::begin();
    start(&case, json!({}));
    let file = case.dir().join("resources.json");
    fs::write(
        &file,
        json!({"memory": {"limit": 50 << 20}, "pids": {"limit": 50}}).to_string(),
    )
    .expect("file");
    case.call(["update", "--pids-limit", "90", "-r"])
        .args([&file])
        .args(["one"])
        .succeed();
    assert_eq!(cgroup(&case, "memory.max"), (50 << 20).to_string());
    assert_eq!(
        cgroup(&case, "pids.max"),
        "50",
        "the other options are ignored"
    );
    fs::write(&file, json!({"pids": {"limit": 60}}).to_string()).expect("file");
    let stdin = fs::File::open(&file).expect("file");
    case.call(["update", "-r", "-", "one"])
        .stdin(stdin)
        .succeed();
    assert_eq!(cgroup(&case, "pids.max"), "60");
    fs::write(&file, "{").expect("file");
    assert_ne!(
        case.call(["update", "-r"])
            .args([&file])
            .args(["one"])
            .finish()
            .status,
        0
    );
    let missing = case.call(["update", "-r", "/nonexistent", "one"]).finish();
    missing.is_refusal("open /nonexistent");
    case.delete("one");
}

#[test]
fn what_is_no_limit_is_refused() {
    let case = Case::begin();
    start(&case, json!({}));
    update(&case, &["--cpu-quota", "abc"]).is_refusal(
        "invalid value for cpu-quota: strconv.ParseInt: parsing \\\"abc\\\": invalid syntax",
    );
    update(&case, &["--memory", "10zb"])
        .is_refusal("invalid value for memory: invalid size: '10zb'");
    update(&case, &["--memory-swap", "1g"])
        .is_refusal("unable to set swap limit without memory limit");
    update(&case, &["--l3-cache-schema", "x"]).is_refusal("l3 cache schema is not enabled");
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    update(&case, &["--memory", "64m"]).is_refusal("container not running");
    case.call(["delete", "one"]).succeed();
}

#[test]
fn what_the_machine_may_not_have_is_refused_and_changes_nothing() {
    let Some(case) = Case::begin_with_vm("the host is runc's machine") else {
        return;
    };
    start(
        &case,
        json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 50_000, "period": 100_000}}),
    );
    update(&case, &["--memory", "1000g", "--pids-limit", "3"])
        .is_refusal("memory limit of 1073741824000 bytes");
    update(&case, &["--memory", "1m"]).is_refusal("needs at least");
    update(&case, &["--cpu-quota", "200000"]).is_refusal("at most 1 vCPU");
    assert_eq!(cgroup(&case, "memory.max"), (64 << 20).to_string());
    assert_eq!(cgroup(&case, "pids.max"), "max");
    assert_eq!(cgroup(&case, "cpu.max"), "50000 100000");
    case.delete("one");
}

#[test]
fn the_hosts_cgroup_follows() {
    let Some(case) = Case::begin_with_vm("runc has one cgroup only") else {
        return;
    };
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["linux"]["cgroupsPath"] = "/caisson-test-one".into();
    });
    case.start(&bundle, "one");
    let path = "/caisson-test-one";
    updated(
        &case,
        &[
            "--cpu-quota",
            "50000",
            "--cpu-period",
            "100000",
            "--memory",
            "64m",
            "--cpuset-cpus",
            "0",
        ],
    );
    assert_eq!(host::bandwidth(path), (60_000, 100_000));
    assert_eq!(host::read(path, "cpuset.cpus"), "0");
    assert!(host::memory_limit(path) > 64 << 20, "the machine must fit");
    // The guest refuses the last of these, and everything is as before.
    update(&case, &["--cpu-quota", "30000", "--memory-swap", "1g"])
        .is_refusal("without memory limit");
    assert_eq!(host::bandwidth(path), (60_000, 100_000));
    update(&case, &["--cpuset-cpus", "77"]).is_refusal("cpuset.cpus");
    case.delete("one");
}

#[test]
fn saving_a_container_is_refused_in_one_line() {
    let Some(case) = Case::begin_with_vm("runc asks criu") else {
        return;
    };
    start(&case, json!({}));
    let checkpoint = case
        .call(["checkpoint", "--image-path", "/tmp/x", "one"])
        .finish();
    checkpoint.is_refusal("checkpoint is not supported");
    let restore = case
        .call(["restore", "-b", "/tmp/x", "--image-path", "/tmp/x", "two"])
        .finish();
    restore.is_refusal("restore is not supported");
    case.delete("one");
}

#[test]
fn metrics_tell_of_all_containers() {
    let Some(case) = Case::begin_with_vm("it has no such command") else {
        return;
    };
    start(&case, json!({"memory": {"limit": 64 << 20}}));
    case.create(&case.bundle_in("other"), "two");
    let text = case.call(["metrics"]).succeed().text().to_owned();
    let value = |series: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        let value = line.unwrap_or_else(|| panic!("no {series} in {text}"));
        value.trim().parse::<f64>().expect("a number")
    };
    assert_eq!(
        value("caisson_container_info{container=\"one\",status=\"running\"}"),
        1.0
    );
    assert_eq!(
        value("caisson_container_info{container=\"two\",status=\"created\"}"),
        1.0
    );
    let of_one =
        |name: &str, side: &str| value(&format!("{name}{{container=\"one\",side=\"{side}\"}}"));
    assert_eq!(of_one("caisson_memory_limit_bytes", "guest"), 67_108_864.0);
    assert_eq!(of_one("caisson_processes", "guest"), 1.0);
    assert!(of_one("caisson_cpu_seconds_total", "host") > 0.1);
    // The host's side has the guest's kernel and the VMM too.
    let memory = |side| of_one("caisson_memory_bytes", side);
    assert!(memory("host") > memory("guest"), "{text}");
    case.delete("two");
    case.delete("one");
}
