//! All sandboxes of a host, whichever door they came in by: `list --all`, `metrics --all`, `trace`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use caisson_tests::Case;
use caisson_tests::case::runtime;
use rustix::process::Signal;
use serde_json::Value;

use crate::daemon::{Daemon, begin};
use crate::pods::{FORMS, Pod};

fn listed(case: &Case) -> Vec<Value> {
    let listing = case.call(["list", "--all", "--format", "json"]).succeed();
    serde_json::from_slice(&listing.stdout).expect("JSON")
}

fn fetch(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).expect("connect");
    write!(stream, "{request} HTTP/1.1\r\nHost: x\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn every_sandbox_of_the_host_is_listed_and_counted() {
    if runtime() == "runc" {
        println!("skipped on runc: it does not know of other roots");
        return;
    }
    let case = begin();
    let containerd = Daemon::start(&case);
    let pod = Pod::new(&case, FORMS[0]);
    for (id, spec) in [
        ("sandbox", pod.sandbox()),
        ("a", pod.member("a", &["ipc"], "exec sleep 1000")),
    ] {
        let outcome = containerd.run_spec(id, &spec);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    }
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.start(&bundle, "cli");

    let all = listed(&case);
    let told = |id: &str| {
        let mut found = all.iter().filter(|it| it["id"] == id);
        let container = found.next().unwrap_or_else(|| panic!("no {id} in {all:?}"));
        assert!(found.next().is_none(), "{id} twice in {all:?}");
        assert_eq!(container["status"], "running");
        let text = |key: &str| container[key].as_str().expect("text").to_owned();
        (text("pod"), text("root"))
    };
    let tasks = case
        .dir()
        .join("state/io.containerd.runtime.v2.task/default");
    let tasks = tasks.to_string_lossy().into_owned();
    let root = case.root().to_string_lossy().into_owned();
    assert_eq!(told("sandbox"), ("sandbox".to_owned(), tasks.clone()));
    assert_eq!(told("a"), ("sandbox".to_owned(), tasks));
    assert_eq!(told("cli"), ("cli".to_owned(), root));

    let metrics = case.call(["metrics", "--all"]).succeed();
    for (id, pod, side, is_told) in [
        ("a", "sandbox", "guest", true),
        ("a", "sandbox", "host", false),
        ("sandbox", "sandbox", "host", true),
        ("cli", "cli", "guest", true),
        ("cli", "cli", "host", true),
    ] {
        let is_it = |line: &&str| {
            line.starts_with(&format!(
                "caisson_memory_bytes{{container=\"{id}\",sandbox=\"{pod}\","
            )) && line.contains(&format!("side=\"{side}\"}} "))
        };
        let lines = metrics.text().lines().filter(is_it).count();
        assert_eq!(
            lines,
            usize::from(is_told),
            "{id} {side}: {}",
            metrics.text()
        );
    }

    for (id, first) in [("cli", true), ("sandbox", true), ("a", false)] {
        let picture = case.call(["trace", id]).succeed();
        for step in [
            "set the container up",
            "wait for start",
            "start the program",
        ] {
            assert!(picture.text().contains(step), "{}", picture.text());
        }
        for step in [
            "load the VMM",
            "build the machine",
            "kernel, up to its drivers",
            "kernel, up to the agent's mounts",
            "agent, until it dials",
        ] {
            let boots = picture.text().contains(step);
            assert_eq!(boots, first, "{id}, {step}: {}", picture.text());
        }
        let events = case.call(["trace", "--format", "chrome", id]).succeed();
        let events: Value = serde_json::from_slice(&events.stdout).expect("JSON");
        let steps = events["traceEvents"].as_array().expect("events").iter();
        let steps = steps.filter(|event| event["ph"] == "X");
        assert!(steps.count() >= 4, "{events}");
    }

    let socket = case.dir().join("metrics.sock");
    let call = case.call(["metrics", "--all", "--listen"]).args([&socket]);
    let serving = call.start();
    case.wait_for_file(&socket);
    let answer = fetch(&socket, "GET /metrics");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.contains("caisson_container_info{container=\"cli\""),
        "{answer}"
    );
    assert!(fetch(&socket, "GET /other").starts_with("HTTP/1.1 404 "));
    serving.signal(Signal::TERM);
    assert_eq!(serving.finish().status, 0);
    assert!(!socket.exists());

    case.delete("cli");
    for id in ["a", "sandbox"] {
        containerd.remove(id);
    }
    assert_eq!(listed(&case), Vec::<Value>::new());
}
