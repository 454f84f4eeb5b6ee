//! `exec` and `attach` under the CRI, as `kubectl exec`, `attach` and `cp` use them.

use std::fs;
use std::time::Duration;

use k8s_cri::v1::{AttachRequest, ExecRequest};

use crate::kubelet::{Kubelet, begin_pods, until};
use crate::streaming::Stream;

/// How long a container may take to do something.
const SOON: Duration = Duration::from_secs(60);

/// A program without a terminal.
fn program(id: &str, command: &[&str], stdin: bool) -> ExecRequest {
    ExecRequest {
        container_id: id.to_owned(),
        cmd: command.iter().map(|&word| word.to_owned()).collect(),
        stdin,
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

#[test]
fn exec_and_attach_have_terminals_with_a_size() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let mut config = pod.container(
        "main",
        "while read line; do echo \"got $line\"; stty size; done; exit 5",
    );
    (config.tty, config.stdin) = (true, true);
    let id = pod.run(config);
    let exec = ExecRequest {
        container_id: id.clone(),
        cmd: vec!["/bin/sh".to_owned()],
        tty: true,
        stdin: true,
        stdout: true,
        ..Default::default()
    };
    let mut shell = Stream::exec(&node, exec);
    shell.resize(133, 37);
    shell.wait_for("#");
    // The size is told beside the input, not in order with it.
    shell.write("until stty size | grep '37 133'; do :; done; tty\r");
    shell.wait_for("/dev/pts/");
    shell.write("exit 9\r");
    shell.finish();
    assert!(shell.status.contains("\"9\""), "{:?}", shell.status);
    let attach = AttachRequest {
        container_id: id.clone(),
        stdin: true,
        tty: true,
        stdout: true,
        stderr: false,
    };
    let mut main = Stream::attach(&node, attach);
    main.resize(99, 44);
    main.write("hello\r");
    main.wait_for("got hello");
    while !main.output.contains("44 99") {
        main.write("again\r");
        main.wait_for("got again");
        main.output = main
            .output
            .split_off(main.output.rfind("got").unwrap_or(0) + 3);
        main.wait_for("\n");
        main.wait_for(" ");
    }
    main.write("\x04");
    assert_eq!(node.wait(&id).exit_code, 5);
    pod.end();
}

#[test]
fn without_a_terminal_streams_stay_apart_and_end() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let echo =
        "while read line; do echo \"out $line\"; echo \"err $line\" >&2; done; echo over; exit 5";
    let mut config = pod.container("main", echo);
    (config.stdin, config.stdin_once) = (true, true);
    let id = pod.run(config);
    // As `kubectl cp` does it, to the container; the end of the connection is the end of the input.
    let bytes: Vec<u8> = (0..300_000_u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    fs::write(case.dir().join("file"), &bytes).expect("file");
    let archive = case.dir().join("file.tar");
    let tar = |args: &[&str]| {
        let call = case
            .program("tar")
            .args(["-C".as_ref(), case.dir().as_os_str()]);
        call.args(args).succeed()
    };
    tar(&["-cf", archive.to_str().expect("a path"), "file"]);
    let mut unpack = Stream::exec(
        &node,
        program(&id, &["tar", "-xf", "-", "-C", "/tmp"], true),
    );
    unpack.send(&fs::read(&archive).expect("archive"));
    unpack.close();
    until(SOON, "the file is whole", || {
        let size = node.said(&id, "stat -c %s /tmp/file 2>/dev/null || true");
        (size == bytes.len().to_string()).then_some(())
    });
    // And from the container.
    let mut pack = Stream::exec(
        &node,
        program(&id, &["tar", "-cf", "-", "-C", "/tmp", "file"], false),
    );
    pack.finish();
    assert!(pack.status.contains("Success"), "{:?}", pack.status);
    fs::write(&archive, &pack.bytes).expect("archive");
    fs::remove_file(case.dir().join("file")).expect("file");
    tar(&["-xf", archive.to_str().expect("a path")]);
    assert!(fs::read(case.dir().join("file")).expect("file") == bytes);
    let mixed = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let mut mixed = Stream::exec(&node, program(&id, &mixed, false));
    mixed.finish();
    assert_eq!((&*mixed.output, &*mixed.errors), ("out\n", "err\n"));
    assert!(mixed.status.contains("\"3\""), "{:?}", mixed.status);

    let attach = AttachRequest {
        container_id: id.clone(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let mut main = Stream::attach(&node, attach);
    main.write("hello\n");
    main.wait_for("out hello\n");
    while main.errors != "err hello\n" {
        assert!(main.read(), "{:?}", main.errors);
    }
    assert_eq!(main.output, "out hello\n");
    main.close();
    assert_eq!(node.wait(&id).exit_code, 5);
    let mut log = pod.log("main");
    log.sort();
    assert_eq!(
        log,
        ["stderr F err hello", "stdout F out hello", "stdout F over"]
    );
    pod.end();
}
