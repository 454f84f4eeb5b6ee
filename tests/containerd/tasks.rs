//! What `ctr` does with one container.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;

use caisson_tests::call::Running;
use caisson_tests::case::{processes_named, runtime};
use caisson_tests::host::Process;
use caisson_tests::supervisor::{Answer, Supervisor};
use serde_json::json;

use crate::daemon::{Daemon, begin, shims};

#[test]
fn run_works_with_every_snapshotter() {
    let case = begin();
    let containerd = Daemon::start(&case);
    for snapshotter in ["overlayfs", "native"] {
        let script = "echo out; echo err >&2; echo kept > /file && cat /file; exit 7";
        let flags = ["--rm", "--snapshotter", snapshotter];
        let outcome = containerd.run(flags, "one", script).finish();
        assert_eq!(
            outcome.text(),
            "out\nkept\n",
            "{snapshotter}: {}",
            outcome.stderr
        );
        assert!(outcome.stderr.contains("err"), "{snapshotter}");
        assert_eq!(outcome.status, 7, "{snapshotter}");
    }
    assert!(
        containerd
            .ctr(["task", "ls"])
            .succeed()
            .text()
            .lines()
            .count()
            == 1
    );
}

#[test]
fn exec_has_streams_of_its_own_and_its_input_ends() {
    let case = begin();
    let containerd = Daemon::start(&case);
    containerd
        .run(["--detach"], "one", "exec sleep 1000")
        .succeed();
    let outcome = containerd
        .exec("one", "e1", "echo out; echo err >&2; exit 3")
        .finish();
    assert_eq!((outcome.text(), outcome.status), ("out\n", 3));
    assert!(outcome.stderr.starts_with("err\n"), "{}", outcome.stderr);
    let mut cat = containerd
        .exec("one", "e2", "cat; echo end")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .start();
    let text = "x".repeat(300_000);
    let mut stdin = cat.take_stdin();
    let mut stdout = cat.take_stdout();
    let reading = std::thread::spawn(move || {
        let mut read = String::new();
        stdout.read_to_string(&mut read).expect("output");
        read
    });
    stdin.write_all(text.as_bytes()).expect("input");
    drop(stdin);
    assert!(reading.join().expect("reader") == format!("{text}end\n"));
    assert_eq!(cat.finish().status, 0);
    let missing = containerd
        .ctr(["task", "exec", "--exec-id", "e3", "one", "/no/such"])
        .finish();
    assert_eq!(missing.status, 1);
    assert!(
        missing.stderr.contains("no such file or directory"),
        "{}",
        missing.stderr
    );
    containerd.remove("one");
}

#[test]
fn a_task_is_paused_resumed_and_killed() {
    let case = begin();
    let containerd = Daemon::start(&case);
    let mut one = containerd
        .run(
            ["--rm"],
            "one",
            "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done",
        )
        .stdout(Stdio::piped())
        .start();
    assert_eq!(one.line(), "up");
    assert_eq!(containerd.status("one"), "RUNNING");
    let listing = containerd.ctr(["task", "ps", "one"]).succeed();
    let pids = listing.text().lines().skip(1);
    let pids = pids.map(|line| line.split_whitespace().next().expect("a pid").parse());
    let pids: Vec<i32> = pids.map(|pid| pid.expect("a number")).collect();
    assert!(!pids.is_empty(), "{}", listing.text());
    let is_the_hosts = |process: &Process| pids.contains(&process.pid);
    assert!(!shims().iter().any(is_the_hosts), "{pids:?}");
    assert!(!processes_named("caisson-vmm").iter().any(is_the_hosts));
    containerd.ctr(["task", "pause", "one"]).succeed();
    assert_eq!(containerd.status("one"), "PAUSED");
    let refused = containerd.exec("one", "e1", "true").finish();
    assert_ne!(refused.status, 0);
    containerd.ctr(["task", "resume", "one"]).succeed();
    assert_eq!(containerd.status("one"), "RUNNING");
    let checkpoint = containerd.ctr(["task", "checkpoint", "one"]).finish();
    assert_ne!(checkpoint.status, 0);
    // runc has it, but needs criu for it.
    let is_refused = checkpoint.stderr.contains("not supported");
    assert!(is_refused || runtime() == "runc", "{checkpoint:?}");
    containerd
        .ctr(["task", "kill", "--signal", "TERM", "one"])
        .succeed();
    assert_eq!(one.finish().status, 9);
}

#[test]
fn kill_with_all_reaches_every_process() {
    let case = begin();
    let containerd = Daemon::start(&case);
    let kill = |signal| {
        let kill = ["task", "kill", "--all", "--signal", signal, "one"];
        containerd.ctr(kill).succeed();
    };
    let script = "trap 'echo heard' USR1; echo up; while :; do sleep 1000 & wait; done";
    let one = containerd.run(["--rm"], "one", script);
    let mut one = one.stdout(Stdio::piped()).start();
    assert_eq!(one.line(), "up");
    let exec = |id, script| {
        let exec = containerd.exec("one", id, script).stdout(Stdio::piped());
        let mut exec = exec.start();
        assert_eq!(exec.line(), "up");
        exec
    };
    let second = exec("e1", "trap 'exit 6' USR1; echo up; sleep 1000 & wait");
    kill("USR1");
    assert_eq!(second.finish().status, 6);
    assert_eq!(one.line(), "heard");
    let second = exec("e2", "echo up; exec sleep 1000");
    kill("KILL");
    assert_eq!(second.finish().status, 137);
    assert_eq!(one.finish().status, 137);
}

#[test]
fn metrics_count_what_the_task_uses() {
    let case = begin();
    let containerd = Daemon::start(&case);
    let mut one = containerd.run(
        ["--rm"],
        "one",
        "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo worked; exec sleep 1000",
    );
    one = one.stdout(Stdio::piped());
    let mut one = one.start();
    assert_eq!(one.line(), "worked");
    let metrics = containerd
        .ctr(["task", "metrics", "--format", "json", "one"])
        .succeed();
    let text = metrics.text();
    let metrics: serde_json::Value = serde_json::from_str(text).expect("JSON");
    assert_eq!(metrics["pids"]["current"], 1, "{text}");
    for (controller, counter) in [("cpu", "usage_usec"), ("memory", "usage")] {
        let count = metrics[controller][counter].as_u64();
        assert!(count.is_some_and(|count| count > 10_000), "{text}");
    }
    containerd
        .ctr(["task", "kill", "--signal", "KILL", "one"])
        .succeed();
    assert_eq!(one.finish().status, 137);
}

#[test]
fn events_come_in_containerds_order() {
    let case = begin();
    let containerd = Daemon::start(&case);
    let mut events = containerd.ctr(["events"]).stdout(Stdio::piped()).start();
    containerd
        .run(["--detach"], "one", "exec sleep 1000")
        .succeed();
    containerd.exec("one", "e1", "true").succeed();
    containerd.ctr(["task", "pause", "one"]).succeed();
    containerd.ctr(["task", "resume", "one"]).succeed();
    containerd
        .ctr(["task", "kill", "--signal", "KILL", "one"])
        .succeed();
    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit of init",
    ];
    assert_eq!(topics(&mut events, "one", "/tasks/exit of init"), wanted);
    containerd.remove("one");
    assert_eq!(
        topics(&mut events, "one", "/tasks/delete"),
        ["/tasks/delete"]
    );

    let limit = ["--detach", "--memory-limit", "33554432"];
    let run = containerd.run(limit, "two", "exec tail /dev/zero");
    run.succeed();
    let mut seen = topics(&mut events, "two", "/tasks/oom");
    if !seen.iter().any(|topic| topic.ends_with(" of init")) {
        seen.extend(topics(&mut events, "two", "/tasks/exit of init"));
    }
    // The kernel's word of the kill and that of the end come by two ways.
    let (oom, rest): (Vec<_>, Vec<_>) = seen.iter().partition(|topic| *topic == "/tasks/oom");
    assert_eq!(oom.len(), 1, "{seen:?}");
    assert_eq!(
        rest,
        ["/tasks/create", "/tasks/start", "/tasks/exit of init"]
    );
    containerd.remove("two");
    assert_eq!(
        topics(&mut events, "two", "/tasks/delete"),
        ["/tasks/delete"]
    );
    events.signal(rustix::process::Signal::KILL);
    events.finish();
}

/// The topics of a container's next events, up to the first with this one. `of init`: not of a further process.
fn topics(events: &mut Running, container: &str, last: &str) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    while seen.last().is_none_or(|seen| seen != last) {
        let line = events.line();
        assert!(!line.is_empty(), "events ended after {seen:?}");
        let topic = line.split_whitespace().find(|word| word.starts_with('/'));
        let Some(topic) = topic.filter(|topic| topic.starts_with("/tasks/")) else {
            continue;
        };
        assert!(
            line.contains(&format!("\"container_id\":\"{container}\"")),
            "{line}"
        );
        let ended = topic == "/tasks/exit" && line.contains(&format!("\"id\":\"{container}\""));
        seen.push(format!("{topic}{}", if ended { " of init" } else { "" }));
    }
    seen
}

#[test]
fn the_container_has_a_kernel_of_its_own() {
    if runtime() == "runc" {
        println!("skipped on runc: it has the host's kernel");
        return;
    }
    let case = begin();
    let containerd = Daemon::start(&case);
    let outcome = containerd.run(["--rm"], "one", "uname -r").succeed();
    assert!(outcome.text().contains("caisson"), "{}", outcome.text());
}

#[test]
fn a_log_file_takes_the_output() {
    let case = begin();
    let containerd = Daemon::start(&case);
    let log = case.dir().join("logs/one.log");
    let uri = format!("file://{}", log.display());
    let mut one = containerd.run(
        ["--detach", "--log-uri", &uri],
        "one",
        "echo out; echo err >&2",
    );
    one = one.limit(std::time::Duration::from_secs(120));
    one.succeed();
    containerd.ctr(["task", "delete", "one"]).finish();
    // A task that has not ended yet cannot be deleted; its end is waited for by attaching to nothing but its exit.
    while containerd.status("one") == "RUNNING" {
        std::thread::yield_now();
    }
    containerd.remove("one");
    let mut text: Vec<_> = std::fs::read_to_string(log)
        .expect("log")
        .lines()
        .map(str::to_owned)
        .collect();
    text.sort();
    assert_eq!(text, ["err", "out"]);
}

#[test]
fn a_supervisor_decides_on_system_calls() {
    const LINK_SEVERED: i32 = 67;
    let case = begin();
    let path = case.dir().join("supervisor");
    let profile = case.dir().join("profile.json");
    let notify = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path,
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]});
    fs::write(&profile, notify.to_string()).expect("write");
    let supervisor = Supervisor::bind(&path);
    let supervising = thread::spawn(move || {
        let next = || {
            let listener = supervisor.accept();
            thread::spawn(move || {
                let answer = |call| listener.answer(&call, Answer::Error(LINK_SEVERED));
                let answered = std::iter::from_fn(|| listener.next()).map(answer);
                (
                    listener.message["state"]["status"].to_string(),
                    answered.count(),
                )
            })
        };
        [next(), next()].map(|one| one.join().expect("supervise"))
    });
    let containerd = Daemon::start(&case);
    let profile = profile.to_str().expect("text");
    let flags = ["--detach", "--seccomp", "--seccomp-profile", profile];
    let script = "mkdir /denied; touch /done; exec sleep 1000";
    containerd.run(flags, "one", script).succeed();
    let script = "until test -f /done; do sleep 1; done; mkdir /denied";
    let outcome = containerd.exec("one", "e1", script).finish();
    assert!(
        outcome.stderr.contains("Link has been severed"),
        "{outcome:?}"
    );
    containerd.ctr(["task", "rm", "--force", "one"]).succeed();
    let seen = supervising.join().expect("the supervisor");
    let seen = seen
        .each_ref()
        .map(|(status, calls)| (status.as_str(), *calls));
    assert_eq!(seen, [("\"creating\"", 1), ("\"running\"", 1)]);
}
