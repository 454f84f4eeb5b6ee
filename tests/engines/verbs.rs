//! What people do with containers, in the words that podman and Docker share.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use caisson_tests::Terminal;

use crate::engine::{Engine, IMAGE};

/// Ends with 3 when it is asked to; says when it listens.
const OBEDIENT: &str =
    "trap 'echo stopping; exit 3' TERM; echo ready; while :; do sleep 1000 & wait $!; done";

/// Says that it is there and waits for ever.
const PATIENT: &str = "echo ready; exec sleep 1000";

pub(crate) fn output_and_exit_status_arrive(engine: &Engine) {
    let outcome = engine.run([], "echo out; echo err >&2; exit 7");
    assert_eq!(outcome.status, 7, "{outcome:?}");
    assert_eq!(
        (outcome.text(), outcome.stderr.as_str()),
        ("out\n", "err\n")
    );
}

pub(crate) fn standard_input_arrives(engine: &Engine) {
    let call = engine.run_call(["--rm", "-i"]).args([IMAGE, "cat"]);
    let mut running = call.stdin(Stdio::piped()).start();
    let mut stdin = running.take_stdin();
    stdin.write_all(b"one\ntwo\n").expect("write");
    drop(stdin);
    let outcome = running.finish();
    assert_eq!((outcome.status, outcome.text()), (0, "one\ntwo\n"));
}

pub(crate) fn a_program_that_is_not_there_is_named(engine: &Engine) {
    for (program, status) in [("/nonexistent", 127), ("/etc/passwd", 126)] {
        let outcome = engine.run_call(["--rm"]).args([IMAGE, program]).finish();
        assert_eq!(outcome.status, status, "{outcome:?}");
    }
}

pub(crate) fn volumes_are_shared_live(engine: &Engine) {
    let volume = engine.dir().join("volume");
    fs::create_dir(&volume).expect("directory");
    fs::write(volume.join("from-host"), "host").expect("write");
    let [both, one_way] = ["/rw", "/ro:ro"].map(|to| format!("{}:{to}", volume.display()));
    let output = engine.output(
        ["-v", &both, "-v", &one_way],
        "cat /rw/from-host; echo guest > /rw/from-guest; cat /ro/from-guest; touch /ro/x || echo refused",
    );
    assert_eq!(output, "hostguest\nrefused");
    let written = fs::read_to_string(volume.join("from-guest")).expect("read");
    assert_eq!(written, "guest\n");
}

pub(crate) fn a_named_volume_outlives_its_container(engine: &Engine) {
    engine.ok(["volume", "create", "data"]);
    engine.output(["-v", "data:/d"], "echo kept > /d/file");
    assert_eq!(engine.output(["-v", "data:/d"], "cat /d/file"), "kept");
    engine.ok(["volume", "rm", "data"]);
}

pub(crate) fn limits_hold(engine: &Engine) {
    let output = engine.output(
        [
            "--memory=64m",
            "--cpus=0.5",
            "--pids-limit=50",
            "--ulimit=nofile=100:200",
        ],
        "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; ulimit -n; ulimit -Hn",
    );
    assert_eq!(output, "67108864\n50000 100000\n50\n100\n200");
}

pub(crate) fn a_user_without_capabilities_has_none(engine: &Engine) {
    let output = engine.output(
        ["--user=1000:1000", "--cap-drop=all"],
        "id -u; id -g; grep -E 'Cap(Eff|Bnd)' /proc/self/status | cut -f2",
    );
    assert_eq!(output, "1000\n1000\n0000000000000000\n0000000000000000");
}

pub(crate) fn a_read_only_root_leaves_the_tmpfs_writable(engine: &Engine) {
    let output = engine.output(
        ["--read-only", "--tmpfs=/t:size=1m", "--user=1000"],
        "touch /x 2>&1 | grep -o 'Read-only.*'; echo y > /t/y && cat /t/y; df -k /t | tail -1 | awk '{print $2}'",
    );
    assert_eq!(output, "Read-only file system\ny\n1024");
}

pub(crate) fn names_and_environment_arrive(engine: &Engine) {
    let output = engine.output(
        [
            "--hostname=web",
            "--add-host=db:10.1.1.1",
            "-e",
            "A=b",
            "-w",
            "/tmp",
        ],
        "hostname; cat /etc/hostname; grep 10.1.1.1 /etc/hosts | awk '{print $2}'; echo $A; pwd",
    );
    let words: Vec<&str> = output.split_whitespace().collect();
    // podman writes /etc/hostname without a line's end.
    assert_eq!(words.concat(), "webwebdbb/tmp");
}

pub(crate) fn shared_memory_is_a_tmpfs_of_the_size_asked_for(engine: &Engine) {
    let output = engine.output(
        ["--shm-size=8m", "--user=1000"],
        "df -k /dev/shm | tail -1 | awk '{print $2}'; grep ' /dev/shm ' /proc/mounts | cut -d' ' -f3; \
         echo x > /dev/shm/x && cat /dev/shm/x",
    );
    assert_eq!(output, "8192\ntmpfs\nx");
}

pub(crate) fn the_engines_init_is_process_one(engine: &Engine) {
    let output = engine.output(["--init"], "cat /proc/1/comm");
    assert!(output.ends_with("-init"), "{output}");
}

/// A shell on a terminal: it echoes, has a size that follows, and ends with its exit status. Engines tell the size once
/// the program runs, which may be before or after it looks.
#[track_caller]
fn use_terminal(call: caisson_tests::Call) {
    let (mut terminal, slave) = Terminal::open();
    terminal.resize(33, 77);
    let twin = || slave.try_clone().expect("clone");
    let running = call.stdin(twin()).stdout(twin()).stderr(twin()).start();
    drop(slave);
    terminal
        .write("echo $((6*7)); until [ \"$(stty size 2>&1)\" = '33 77' ]; do :; done; stty size\n");
    terminal.expect("42\r\n");
    terminal.expect("33 77\r\n");
    terminal.write("exit 3\n");
    assert_eq!(running.finish().status, 3);
}

pub(crate) fn a_terminal_is_one(engine: &Engine) {
    use_terminal(engine.run_call(["--rm", "-it"]).args([IMAGE, "sh"]));
}

pub(crate) fn exec_has_a_terminal_too(engine: &Engine) {
    engine.start("shell", [], PATIENT);
    use_terminal(engine.call(["exec", "-it", "shell", "sh"]));
    engine.remove("shell");
}

pub(crate) fn exec_runs_beside_the_program(engine: &Engine) {
    engine.start("exec", [], PATIENT);
    let outcome = engine.exec("exec", "echo out; echo err >&2; exit 5");
    assert_eq!(outcome.status, 5, "{outcome:?}");
    assert_eq!(
        (outcome.text(), outcome.stderr.as_str()),
        ("out\n", "err\n")
    );
    let script = "id -u; pwd; echo $X; mkfifo /tmp/end";
    let other = engine.ok([
        "exec", "-u", "1000", "-w", "/tmp", "-e", "X=y", "exec", "sh", "-c", script,
    ]);
    assert_eq!(other, "1000\n/tmp\ny");
    // In the background: seen by who waits for it.
    engine.ok(["exec", "-d", "exec", "sh", "-c", "echo done > /tmp/end"]);
    assert_eq!(engine.exec("exec", "cat /tmp/end").text(), "done\n");
    engine.remove("exec");
}

pub(crate) fn a_stopped_container_starts_again(engine: &Engine) {
    engine.start("life", [], OBEDIENT);
    let status = |engine: &Engine| engine.ok(["inspect", "--format", "{{.State.Status}}", "life"]);
    assert_eq!(status(engine), "running");
    let listed = engine.ok(["ps", "--format", "{{.Names}}"]);
    assert_eq!(listed, "life");
    engine.ok(["stop", "-t", "120", "life"]);
    assert_eq!(status(engine), "exited");
    assert_eq!(engine.ok(["wait", "life"]), "3");
    assert_eq!(engine.ok(["logs", "life"]), "ready\nstopping");
    engine.ok(["start", "life"]);
    assert_eq!(engine.exec("life", "cat /proc/1/comm").text(), "sh\n");
    engine.ok(["kill", "-s", "KILL", "life"]);
    assert_eq!(engine.ok(["wait", "life"]), "137");
    engine.ok(["rm", "life"]);
}

pub(crate) fn attach_reaches_standard_input(engine: &Engine) {
    engine.start(
        "reader",
        ["-i"],
        "echo ready; read word; echo got $word; exit 4",
    );
    let mut attached = engine
        .call(["attach", "reader"])
        .stdin(Stdio::piped())
        .start();
    let mut stdin = attached.take_stdin();
    stdin.write_all(b"hello\n").expect("write");
    let outcome = attached.finish();
    // podman adds a line's end of its own and ends with 0.
    assert_eq!(outcome.text().trim_end(), "got hello");
    assert_eq!(engine.ok(["wait", "reader"]), "4");
    engine.ok(["rm", "reader"]);
}

pub(crate) fn files_are_copied_in_and_out(engine: &Engine) {
    let dir = engine.dir();
    fs::create_dir(dir.join("volume")).expect("directory");
    fs::write(dir.join("in"), "from the host").expect("write");
    fs::set_permissions(dir.join("in"), fs::Permissions::from_mode(0o640)).expect("mode");
    let volume = format!("{}:/v", dir.join("volume").display());
    engine.start("files", ["-v", &volume], PATIENT);
    let [source, target] = ["in", "out"].map(|name| dir.join(name).display().to_string());
    // Into the running container's own files, and into a volume.
    engine.ok(["cp", &source, "files:/root/copied"]);
    engine.ok(["cp", &source, "files:/v/copied"]);
    let seen = engine.exec(
        "files",
        "cat /root/copied; stat -c %a /root/copied; cat /v/copied",
    );
    assert_eq!(seen.text(), "from the host640\nfrom the host");
    let on_host = fs::read_to_string(dir.join("volume/copied")).expect("read");
    assert_eq!(on_host, "from the host");
    // And out again; what is copied is the container's file, not the host's of the same name.
    engine.ok(["cp", "files:/etc/passwd", &target]);
    let passwd = fs::read_to_string(&target).expect("read");
    assert!(
        passwd.contains("user:x:1000") && !passwd.contains("bash"),
        "{passwd}"
    );
    engine.remove("files");
}

pub(crate) fn a_paused_container_stands_still(engine: &Engine) {
    engine.start("still", [], PATIENT);
    engine.ok(["pause", "still"]);
    let status = |engine: &Engine| engine.ok(["inspect", "--format", "{{.State.Status}}", "still"]);
    assert_eq!(status(engine), "paused");
    let refused = engine.exec("still", "true");
    assert_ne!(refused.status, 0, "{refused:?}");
    engine.ok(["unpause", "still"]);
    assert_eq!(status(engine), "running");
    assert_eq!(engine.exec("still", "echo back").text(), "back\n");
    engine.remove("still");
}

pub(crate) fn usage_is_measured(engine: &Engine) {
    engine.start("busy", [], PATIENT);
    let format = "{{.Name}} {{.MemUsage}} {{.PIDs}}";
    let line = engine.ok(["stats", "--no-stream", "--format", format, "busy"]);
    assert!(line.starts_with("busy "), "{line}");
    let none = ["0B", "0", "--"];
    let numbers: Vec<&str> = line.split_whitespace().skip(1).collect();
    assert!(!none.contains(&numbers[0]), "no memory is used: {line}");
    assert!(
        !none.contains(&numbers[3]),
        "there are no processes: {line}"
    );
    engine.remove("busy");
}

pub(crate) fn a_running_container_is_removed_by_force(engine: &Engine) {
    engine.start("gone", [], PATIENT);
    engine.remove("gone");
    let listed = engine.ok(["ps", "-aq", "--filter", "name=gone"]);
    assert_eq!(listed, "");
}

pub(crate) fn a_published_port_is_reached(engine: &Engine) {
    let script =
        "mkdir /w; echo a page > /w/index.html; httpd -p 80 -h /w && echo ready; exec sleep 1000";
    engine
        .networked_call(["-d", "--name", "web", "-p", "8080:80"])
        .args([IMAGE, "sh", "-c", script])
        .succeed();
    engine.wait_for("web", "ready");
    let mut stream = TcpStream::connect("127.0.0.1:8080").expect("connect to the published port");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    assert!(answer.ends_with("a page\n"), "{answer}");
    engine.remove("web");
}

pub(crate) fn limits_are_changed(engine: &Engine) {
    engine.start("limits", ["--memory=64m", "--cpus=0.9"], PATIENT);
    engine.ok(["update", "--cpus=0.5", "limits"]);
    let limits = engine.exec("limits", "cd /sys/fs/cgroup; cat cpu.max memory.max");
    assert_eq!(limits.text(), "50000 100000\n67108864\n");
    engine.remove("limits");
}

pub(crate) use crate::server::a_server_is_built_loaded_and_keeps_its_data;
