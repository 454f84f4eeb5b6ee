//! System calls that a supervisor on the host decides on (`seccomp.listenerPath`).

use std::thread;

use caisson_tests::case::{self, Case};
use caisson_tests::supervisor::{Answer, Listener, Supervisor};
use serde_json::{Value, json};

/// How many times each call was seen until the last process had ended, with what the runtime said of the process.
struct Seen {
    message: Value,
    mkdir: usize,
    chmod: usize,
    chdir: usize,
}

/// Denies directories, and lets everything else be done.
fn supervise(listener: &Listener) -> Seen {
    let mut seen = Seen {
        message: listener.message.clone(),
        mkdir: 0,
        chmod: 0,
        chdir: 0,
    };
    while let Some(notification) = listener.next() {
        // Only the host's own processes can be seen from there.
        assert_eq!(notification.pid == 0, case::runtime() == "caisson");
        assert_eq!(listener.is_valid(&notification), Ok(()));
        let (count, answer) = match i64::from(notification.call) {
            libc::SYS_mkdir => (&mut seen.mkdir, Answer::Error(libc::ENOLINK)),
            libc::SYS_chmod => (&mut seen.chmod, Answer::Continue),
            _ => (&mut seen.chdir, Answer::Continue),
        };
        *count += 1;
        listener.answer(&notification, answer).expect("answer");
        let again = listener.answer(&notification, answer);
        assert!(
            matches!(again, Err(Some(libc::ENOENT | libc::EINPROGRESS))),
            "{again:?}"
        );
    }
    seen
}

#[test]
fn a_supervisor_decides_on_the_system_calls_of_init_and_of_exec() {
    let case = Case::begin();
    let path = case.dir().join("supervisor");
    let script = "mkdir /denied; touch /f; chmod 0640 /f; stat -c %a /f";
    let bundle = case
        .bundle()
        .script(&format!("({script}) 2>&1; exec sleep 1000"));
    let bundle = bundle.edit(|spec| {
        // Then the filter is there before the working directory: the process cannot be created without an answer.
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": path, "listenerMetadata": "for the supervisor", "syscalls": [
            {"names": ["mkdir", "chmod", "chdir"], "action": "SCMP_ACT_NOTIFY"}]});
    });
    case.run(&bundle)
        .is_refusal("failed to connect with seccomp agent specified in the seccomp profile");
    case.nothing_is_left();
    let supervisor = Supervisor::bind(&path);
    let supervising = thread::spawn(move || {
        let next = || {
            let listener = supervisor.accept();
            thread::spawn(move || supervise(&listener))
        };
        let both = [next(), next()];
        both.map(|one| one.join().expect("supervise"))
    });
    let output = case.dir().join("output");
    let stdout = std::fs::File::create(&output).expect("create");
    case.create_call(&bundle, "one").stdout(stdout).succeed();
    case.call(["start", "one"]).succeed();
    let exec = case.exec("one", script);
    let denied = "mkdir: can't create directory '/denied': Link has been severed\n";
    assert_eq!((exec.text(), exec.stderr.as_str()), ("640\n", denied));
    let pid = case.pid("one").as_raw_nonzero().get();
    case.delete("one");
    let said = std::fs::read_to_string(output).expect("read");
    assert_eq!(said, format!("{denied}640\n"));
    let [init, exec] = supervising.join().expect("the supervisor");
    assert_eq!([init.mkdir, init.chmod, exec.mkdir, exec.chmod], [1; 4]);
    assert!(init.chdir > 0 && exec.chdir > 0);
    for (seen, status) in [(&init, "creating"), (&exec, "running")] {
        let message = &seen.message;
        assert_eq!(message["fds"], json!(["seccompFd"]), "{message}");
        assert_eq!(message["metadata"], "for the supervisor", "{message}");
        assert_eq!(message["state"]["id"], "one", "{message}");
        assert_eq!(message["state"]["status"], status, "{message}");
        assert_eq!(message["state"]["pid"], pid, "{message}");
    }
    assert_eq!(init.message["pid"], pid);
    assert!(
        exec.message["pid"]
            .as_i64()
            .is_some_and(|other| other > 0 && other != i64::from(pid))
    );
    case.nothing_is_left();
}
