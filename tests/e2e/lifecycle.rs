//! The life of a container as every tutorial of runc tells it.

use std::fs;

use caisson_tests::{Case, Terminal};

use crate::files::manifest;

/// Rows of `list`, each split into its columns.
fn list(case: &Case) -> Vec<Vec<String>> {
    let outcome = case.call(["list"]).succeed();
    let lines = outcome.text().lines();
    lines
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect()
}

#[test]
fn the_walk_through_of_runc_works_word_for_word() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]).terminal();
    let before = manifest(&case, bundle.dir());

    let refused = case.create_call(&bundle, "demo").finish();
    refused.is_refusal("cannot allocate tty if");
    refused.is_refusal("will detach without setting console socket");
    assert_eq!(case.status("demo"), "none");

    let socket = Terminal::console_socket(&case.dir().join("tty.sock"));
    let terminal = std::thread::spawn(move || Terminal::receive(&socket));
    case.create_with_console(&bundle, "demo", &case.dir().join("tty.sock"));
    let _terminal = terminal.join().expect("no terminal arrived");

    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];
    let rows = list(&case);
    assert_eq!(rows[0], header);
    let pid = case.pid("demo").as_raw_nonzero().to_string();
    let bundle_dir = bundle.dir().display().to_string();
    assert_eq!(rows[1][..4], ["demo", &pid, "created", &bundle_dir]);
    assert_eq!(rows[1][5], "root");

    case.call(["start", "demo"]).succeed();
    assert_eq!(list(&case)[1][2], "running");
    processes_in_a_terminal_are_the_containers(&case);

    case.call(["kill", "demo", "KILL"]).succeed();
    case.wait("demo");
    assert_eq!(list(&case)[1][..3], ["demo", "0", "stopped"]);
    case.call(["delete", "demo"]).succeed();
    assert_eq!(list(&case), [header]);
    assert_eq!(
        manifest(&case, bundle.dir()),
        before,
        "the bundle was changed"
    );
}

/// `exec -t ID /bin/sh`, then `ps` there.
fn processes_in_a_terminal_are_the_containers(case: &Case) {
    let (mut terminal, shell) = Terminal::start(case.call(["exec", "-t", "demo", "/bin/sh"]));
    terminal.expect("# ");
    terminal.write("ps -o pid,args\n");
    terminal.expect("COMMAND");
    let listing = terminal.expect("# ");
    terminal.write("exit 5\n");
    assert_eq!(shell.finish().status, 5);
    let rows: Vec<Vec<&str>> = listing
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let rows: Vec<&Vec<&str>> = rows.iter().filter(|row| row.len() > 1).collect();
    assert_eq!(rows[0][..], ["1", "sleep", "1000"], "{listing}");
    assert_eq!(rows.len(), 3, "{listing}");
    let commands = [0, 1, 2].map(|index| rows[index][1]);
    // busybox runs `ps` within a copy of the shell, and says so with braces.
    let expected = ["sleep", "/bin/sh", "ps"];
    assert_eq!(
        commands.map(|command| command.trim_matches(['{', '}'])),
        expected,
        "{listing}"
    );
}

#[test]
fn the_state_document_says_what_runc_says() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["annotations"] = serde_json::json!({"org.example.key": "value"});
    });
    case.create(&bundle, "one");
    let state = case.state("one").expect("state");
    assert_eq!(
        state["ociVersion"]
            .as_str()
            .map(|version| version.starts_with("1.")),
        Some(true)
    );
    assert_eq!(state["id"], "one");
    assert_eq!(state["pid"], case.pid("one").as_raw_nonzero().get());
    assert_eq!(state["status"], "created");
    assert_eq!(state["bundle"], bundle.dir().display().to_string());
    assert_eq!(
        state["rootfs"],
        bundle
            .rootfs("")
            .display()
            .to_string()
            .trim_end_matches('/')
    );
    assert_eq!(state["annotations"]["org.example.key"], "value");
    assert!(
        state["created"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z')),
        "{state}"
    );
    case.call(["start", "one"]).succeed();
    assert_eq!(case.status("one"), "running");
    case.call(["kill", "one", "9"]).succeed();
    case.wait("one");
    let state = case.state("one").expect("state");
    assert_eq!(
        (&state["status"], &state["pid"]),
        (&"stopped".into(), &0.into())
    );
    case.call(["delete", "one"]).succeed();
    case.call(["state", "one"])
        .finish()
        .is_refusal("does not exist");
}

#[test]
fn list_has_quiet_and_json_forms() {
    let case = Case::begin();
    let empty = case.call(["list", "-f", "json"]).succeed();
    assert_eq!(empty.text().trim(), "null");
    assert_eq!(case.call(["list", "-q"]).succeed().text(), "");
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.create(&bundle, "one");
    assert_eq!(case.call(["list", "-q"]).succeed().text(), "one\n");
    let listed = case.call(["list", "--format", "json"]).succeed();
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert_eq!(listed[0]["id"], "one");
    assert_eq!(listed[0]["status"], "created");
    assert_eq!(listed[0]["owner"], "root");
    assert_eq!(listed[0]["pid"], case.pid("one").as_raw_nonzero().get());
    case.delete("one");
}

#[test]
fn the_process_in_the_pid_file_lives_and_ends_with_the_container() {
    let case = Case::begin();
    let bundle = case.bundle().script("read line < /tmp/fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        bundle.rootfs("tmp/fifo"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .expect("mkfifo");
    case.start(&bundle, "one");
    assert_eq!(case.status("one"), "running");
    assert!(rustix::process::test_kill_process(case.pid("one")).is_ok());
    // The first process may end, and the other ones with it, before this one has.
    let status = case.exec("one", "echo > /tmp/fifo").status;
    assert!(matches!(status, 0 | 137), "{status}");
    case.wait("one");
    assert_eq!(case.status("one"), "stopped");
    case.call(["delete", "one"]).succeed();
}

#[test]
fn run_detached_returns_while_the_container_runs() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.call(["run", "--detach", "--pid-file"])
        .args([case.pid_file("one")])
        .args(["-b".as_ref(), bundle.dir().as_os_str()])
        .args(["one"])
        .succeed();
    assert_eq!(case.status("one"), "running");
    assert_eq!(case.exec("one", "echo here").text(), "here\n");
    case.call(["kill", "one", "SIGKILL"]).succeed();
    case.wait("one");
    case.call(["delete", "one"]).succeed();
}

#[test]
fn run_leaves_nothing_and_run_with_keep_leaves_a_stopped_container() {
    let case = Case::begin();
    let bundle = case.bundle().script("exit 3");
    assert_eq!(case.run(&bundle).status, 3);
    case.nothing_is_left();
    if caisson_tests::case::runtime() == "runc" {
        return; // 1.1.5 has --keep, but a kept container has no pid file to wait on
    }
    assert_eq!(
        case.call(["run", "--keep", "-b"])
            .args([bundle.dir()])
            .args(["kept"])
            .finish()
            .status,
        3
    );
    assert_eq!(case.status("kept"), "stopped");
    case.call(["delete", "kept"]).succeed();
}

#[test]
fn delete_with_force_ends_a_running_container_and_forgives_a_missing_one() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.start(&bundle, "one");
    case.delete("one");
    case.nothing_is_left();
    case.delete("one");
    case.call(["delete", "one"])
        .finish()
        .is_refusal("does not exist");
}

#[test]
fn a_bundle_is_found_in_the_current_directory() {
    let case = Case::begin();
    let bundle = case.bundle().args(["echo", "here"]);
    let outcome = case.call(["run", "one"]).dir(bundle.dir()).finish();
    assert_eq!(
        (outcome.status, outcome.text()),
        (0, "here\n"),
        "{outcome:?}"
    );
}

#[test]
fn spec_writes_a_bundle_that_runs_and_never_overwrites() {
    let case = Case::begin();
    let bundle = case.bundle();
    fs::remove_file(bundle.dir().join("config.json")).expect("remove");
    case.call(["spec"]).dir(bundle.dir()).succeed();
    case.call(["spec"])
        .dir(bundle.dir())
        .finish()
        .is_refusal("config.json");
    let text = fs::read_to_string(bundle.dir().join("config.json")).expect("config.json");
    let spec: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(spec["process"]["args"], serde_json::json!(["sh"]));
    assert_eq!(spec["process"]["terminal"], true);
    assert_eq!(spec["process"]["noNewPrivileges"], true);
    assert_eq!(
        spec["root"],
        serde_json::json!({"path": "rootfs", "readonly": true})
    );
    let bundle = bundle.edit(|spec| spec["process"]["terminal"] = false.into());
    let outcome = case.run_call(&bundle, "one").finish();
    assert_eq!(outcome.status, 0, "a shell without input ends: {outcome:?}");
}

#[test]
fn a_read_only_root_cannot_be_written_and_tmpfs_mounts_can() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("touch /x; echo $?; touch /dev/shm/x; echo $?");
    let bundle = bundle.edit(|spec| spec["root"]["readonly"] = true.into());
    let outcome = case.run(&bundle);
    assert_eq!(outcome.text(), "1\n0\n", "{outcome:?}");
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
    assert!(!bundle.rootfs("x").exists());
}

#[test]
fn errors_go_to_the_log_file_in_the_shape_that_podman_reads() {
    let case = Case::begin();
    let log = case.dir().join("log.json");
    let call = case.program(&caisson_tests::case::runtime());
    let outcome = call
        .args(["--log".as_ref(), log.as_os_str()])
        .args(["--log-format", "json"]);
    let outcome = outcome
        .args(["--root".as_ref(), case.root().as_os_str()])
        .args(["state", "none"])
        .finish();
    outcome.is_refusal("does not exist");
    let text = fs::read_to_string(&log).expect("log");
    let line = text.lines().last().expect("a line");
    let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
    assert_eq!(line["level"], "error");
    assert!(
        line["msg"]
            .as_str()
            .is_some_and(|msg| msg.contains("does not exist")),
        "{line}"
    );
    assert!(line["time"].is_string(), "{line}");
}

#[test]
fn features_is_a_json_document_with_the_oci_versions() {
    let case = Case::begin();
    let outcome = case.call(["features"]).succeed();
    let features: serde_json::Value = serde_json::from_slice(&outcome.stdout).expect("JSON");
    assert_eq!(
        features["ociVersionMin"]
            .as_str()
            .map(|v| v.starts_with("1.0")),
        Some(true)
    );
    let mounts = features["mountOptions"].as_array().expect("mountOptions");
    assert!(mounts.iter().any(|option| option == "rbind"), "{features}");
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
}

#[test]
fn kill_by_number_and_by_name_with_or_without_sig() {
    let case = Case::begin();
    let bundle = case.bundle().script(
        "trap 'echo one' USR1; trap 'echo two' USR2; trap 'exit 9' TERM; while :; do sleep 1000 & wait; done",
    );
    case.start(&bundle, "one");
    for signal in ["10", "USR1", "SIGUSR1", "sigusr2", "TERM"] {
        case.call(["kill", "one", signal]).succeed();
    }
    case.wait("one");
    case.call(["kill", "one", "NOSUCH"])
        .finish()
        .is_refusal("signal");
    case.call(["delete", "one"]).succeed();
}
