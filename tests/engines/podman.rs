//! What only podman has.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use caisson_tests::{Call, case};

use crate::engine::{Engine, IMAGE, LIMIT};

#[test]
fn secrets_are_files_and_variables() {
    let engine = Engine::podman();
    let create = engine.call(["secret", "create", "key", "-"]);
    let mut create = create.stdin(Stdio::piped()).start();
    create.take_stdin().write_all(b"geheim").expect("write");
    assert_eq!(create.finish().status, 0);
    let output = engine.output(
        ["--secret=key", "--secret=key,type=env,target=KEY"],
        "cat /run/secrets/key; echo -$KEY",
    );
    assert_eq!(output, "geheim-geheim");
    engine.ok(["secret", "rm", "key"]);
}

#[test]
fn a_health_check_runs_in_the_container() {
    let engine = Engine::podman();
    engine.start(
        "sick",
        ["--health-cmd=test -e /ok", "--health-interval=disable"],
        "echo ready; exec sleep 1000",
    );
    let check = |engine: &Engine| engine.call(["healthcheck", "run", "sick"]).finish().status;
    assert_eq!(check(&engine), 1);
    assert_eq!(engine.exec("sick", "touch /ok").status, 0);
    assert_eq!(check(&engine), 0);
    engine.remove("sick");
}

#[test]
fn top_shows_the_containers_processes() {
    let engine = Engine::podman();
    let script = "sleep 1001 & su user -c 'exec sleep 1002' & until ps | grep -q '[s]leep 1002'; do :; done; \
                  echo ready; exec sleep 1000";
    engine.start("top", [], script);
    // As podman reads /proc itself, in the order of the numbers.
    let seen = rows(&engine.ok(["top", "top", "pid", "ppid", "user", "args"]));
    let own = |row: &Vec<String>| row[1..3].join(" ") + " " + &row[3..].join(" ");
    assert_eq!(seen[0].join(" "), "PID PPID USER COMMAND");
    assert_eq!(
        (seen[1][0].as_str(), own(&seen[1]).as_str()),
        ("1", "0 root sleep 1000")
    );
    assert_eq!(own(&seen[2]), "1 root sleep 1001");
    assert_eq!(own(&seen[3]), "1 user sleep 1002");
    assert_eq!(seen.len(), 4, "{seen:?}");
    let table = rows(&engine.ok(["top", "top"]));
    let title = "USER PID PPID %CPU ELAPSED TTY TIME COMMAND";
    assert_eq!(table[0].join(" "), title);
    assert_eq!(table[1][..3].join(" "), "root 1 0");
    assert!(
        table[1].ends_with(&["sleep".to_owned(), "1000".to_owned()]),
        "{table:?}"
    );
    // What comes is seen at once.
    engine.ok(["exec", "-d", "top", "sleep", "1003"]);
    let seen = engine.ok(["top", "top", "args"]);
    assert!(seen.contains("sleep 1003"), "{seen}");
    // And as `ps` in the container sees it.
    let table = engine.ok(["top", "top", "-o", "pid,comm"]);
    assert!(
        table.lines().any(|line| line.trim() == "1 sleep"),
        "{table}"
    );
    engine.remove("top");
}

/// The words of a table's lines.
fn rows(table: &str) -> Vec<Vec<String>> {
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
    table.lines().map(words).collect()
}

#[test]
fn identities_are_mapped_and_limits_are_raised_before() {
    let engine = Engine::podman();
    let output = engine.output(
        ["--uidmap=0:100000:1000", "--ulimit=nproc=70000:80000"],
        "id -u; cat /proc/self/uid_map | tr -s ' '; ulimit -u",
    );
    assert_eq!(output, "0\n 0 100000 1000\n70000");
}

#[test]
fn a_copy_to_what_only_the_guest_has_is_refused() {
    if case::runtime() != "caisson" {
        println!("skipped: a tmpfs of a container is within podman's reach there");
        return;
    }
    let engine = Engine::podman();
    engine.start("own", ["--tmpfs=/t"], "echo ready; exec sleep 1000");
    let file = engine.dir().join("in");
    std::fs::write(&file, "x").expect("write");
    let file = file.display().to_string();
    for place in ["own:/t/in", "own:/proc/in"] {
        assert_ne!(
            engine.call(["cp", &file, place]).finish().status,
            0,
            "{place}"
        );
    }
    // Neither in the guest nor below its mount in the root file system.
    assert_eq!(
        engine
            .exec("own", "ls /t; umount /t 2>/dev/null; ls /t")
            .text(),
        ""
    );
    engine.remove("own");
}

#[test]
fn host_networking_is_refused_in_one_line() {
    if case::runtime() != "caisson" {
        println!("skipped: other runtimes share the host's kernel and its network");
        return;
    }
    let engine = Engine::podman();
    let run = engine.call(["run", "--rm", "--network=host", IMAGE, "true"]);
    let outcome = run.finish();
    assert_eq!(outcome.status, 126, "{outcome:?}");
    assert!(outcome.stderr.contains("host networking"), "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
}

#[test]
fn build_runs_its_steps_with_the_runtime() {
    let engine = Engine::podman();
    let steps = format!("FROM {IMAGE}\nRUN uname -r > /kernel\nCMD cat /kernel\n");
    std::fs::write(engine.dir().join("Dockerfile"), steps).expect("write");
    let dir = engine.dir().display().to_string();
    engine.ok(["build", "--no-cache", "-t", "built", &dir]);
    let run = engine.run_call(["--rm"]).args(["built"]).succeed();
    // The kernel that the step saw: the guest's own, or the one that this test sees too.
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("read");
    let is_own = run.text() == own;
    assert_eq!(is_own, case::runtime() != "caisson", "{}", run.text());
    engine.ok(["rmi", "built"]);
}

/// podman's own image of a pod's first container, made with the first pod.
const PAUSE: &str = "localhost/podman-pause:4.3.1-0";

#[test]
fn a_pods_containers_share_network_names_and_memory() {
    let engine = Engine::podman();
    engine.ok(["pod", "create", "--name", "pod", "-p", "8081:80"]);
    let web = "mkdir -p /w; echo a page > /w/index.html; echo left > /dev/shm/note; httpd -p 80 -h /w; \
               echo ready; exec sleep 1000";
    let in_pod = |name: &str, script: &str| {
        let run = engine.call(["run", "-d", "--pod", "pod", "--name", name]);
        run.args([IMAGE, "sh", "-c", script]).succeed();
    };
    in_pod("web", web);
    engine.wait_for("web", "ready");
    in_pod("other", "echo ready; exec sleep 1000");
    let seen = engine.exec(
        "other",
        "wget -qO- http://localhost/; cat /dev/shm/note; hostname; ps | grep -c http[d]; cat /w/index.html",
    );
    // Not shared: processes and files.
    assert!(seen.stderr.contains("No such file"), "{seen:?}");
    assert_eq!(seen.text(), "a page\nleft\npod\n0\n");
    assert_eq!(crate::http::Server::at(8081).get("/"), "a page\n");
    let (web, other) = (engine.exec("web", BOOT_ID), engine.exec("other", BOOT_ID));
    assert_eq!(web.text(), other.text());
    // One goes and comes back; the others stay.
    engine.ok(["kill", "web"]);
    assert_eq!(engine.ok(["wait", "web"]), "137");
    assert_eq!(engine.exec("other", "echo here").text(), "here\n");
    engine.ok(["start", "web"]);
    engine.wait_for_times("web", "ready", 2);
    assert_eq!(crate::http::Server::at(8081).get("/"), "a page\n");
    engine.ok(["pod", "stop", "-t", "1", "pod"]);
    engine.ok(["pod", "start", "pod"]);
    assert_eq!(engine.exec("other", "hostname").text(), "pod\n");
    engine.ok(["pod", "rm", "-f", "-t", "0", "pod"]);
    engine.ok(["rmi", "-f", PAUSE]);
}

/// What tells one running kernel from another.
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

#[test]
fn a_container_without_a_pod_joins_anothers_network() {
    let engine = Engine::podman();
    engine.start("first", [], "httpd -p 80; echo ready; exec sleep 1000");
    let joined = engine
        .call(["run", "--rm", "--network=container:first", IMAGE])
        .args(["sh", "-c", "wget -qO- http://localhost/etc/group | head -1"])
        .succeed();
    assert_eq!(joined.text(), "root:x:0:\n");
    engine.remove("first");
}

#[test]
fn a_generated_unit_starts_and_stops_its_container() {
    let engine = Engine::podman();
    engine.start("unit", [], "echo ready; exec sleep 1000");
    engine.ok(["stop", "-t", "0", "unit"]);
    let unit = engine.ok(["generate", "systemd", "--name", "unit"]);
    let file = Path::new("/run/systemd/system/container-unit.service");
    // The lab's system is up without what units of a whole system wait for.
    let unit = unit.replace("[Unit]\n", "[Unit]\nDefaultDependencies=no\n");
    std::fs::write(file, unit).expect("write");
    let systemctl = |args: &[&str]| {
        let call = Call::new("systemctl", &engine.dir().join("systemctl"));
        call.args(args).limit(LIMIT).succeed();
    };
    systemctl(&["daemon-reload"]);
    systemctl(&["start", "container-unit"]);
    assert_eq!(engine.exec("unit", "cat /proc/1/comm").text(), "sleep\n");
    systemctl(&["is-active", "container-unit"]);
    systemctl(&["stop", "container-unit"]);
    std::fs::remove_file(file).expect("remove");
    systemctl(&["daemon-reload"]);
    let status = engine.ok(["inspect", "--format", "{{.State.Status}}", "unit"]);
    assert_eq!(status, "exited");
    engine.remove("unit");
}

#[test]
fn kube_play_runs_a_pod_and_kube_down_ends_it() {
    let engine = Engine::podman();
    let pod = format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: played}}
spec:
  containers:
  - name: web
    image: {IMAGE}
    command: [sh, -c, "mkdir /w; cat /etc/note/text > /w/index.html; exec httpd -f -p 80 -h /w"]
    ports: [{{containerPort: 80, hostPort: 8082}}]
    volumeMounts: [{{name: note, mountPath: /etc/note}}]
    resources: {{limits: {{memory: 64Mi}}}}
  - name: side
    image: {IMAGE}
    command: [sh, -c, "until wget -qO- http://localhost/; do sleep 1; done; {BOOT_ID}; echo ready; exec sleep 1000"]
  volumes: [{{name: note, hostPath: {{path: {dir}/note}}}}]
"#,
        dir = engine.dir().display(),
    );
    let file = engine.dir().join("pod.yaml");
    let note = engine.dir().join("note");
    std::fs::create_dir(&note).expect("directory");
    std::fs::write(note.join("text"), "a page\n").expect("write");
    std::fs::write(&file, pod).expect("write");
    engine.call(["kube", "play"]).args([&file]).succeed();
    engine.wait_for("played-side", "ready");
    let logs = engine.ok(["logs", "played-side"]);
    let web = engine.exec("played-web", BOOT_ID);
    assert_eq!(logs, format!("a page\n{}ready", web.text()));
    assert_eq!(crate::http::Server::at(8082).get("/"), "a page\n");
    engine.call(["kube", "down"]).args([&file]).succeed();
    assert_eq!(engine.ok(["ps", "-aq"]), "");
    engine.ok(["rmi", "-f", PAUSE]);
}
