//! Standard streams byte for byte: order, volume, and the end of each direction on its own.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use caisson_tests::case::runtime;
use caisson_tests::{Call, Case, Outcome};

/// How much goes through a pipe each way, in MiB; `CAISSON_TEST_BULK_MIB` overrides it.
const BULK_MIB: usize = 1024;

fn bulk_bytes() -> usize {
    let asked = std::env::var("CAISSON_TEST_BULK_MIB").ok();
    asked.map_or(BULK_MIB, |text| {
        text.parse().expect("CAISSON_TEST_BULK_MIB")
    }) << 20
}

/// A MiB that is like no other: numbers that are made once, and in every page the number of the page in the stream.
/// Making and checking a stream of them costs little beside moving it.
struct Mebibyte(Vec<u8>);

impl Mebibyte {
    fn new() -> Self {
        let numbers = std::iter::successors(Some(1u64), |n| {
            Some(n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1))
        });
        Self(
            numbers
                .take(1 << 17)
                .flat_map(|n| n.to_le_bytes())
                .collect(),
        )
    }

    /// The MiB with that number in the stream.
    fn numbered(&mut self, mib: usize) -> &[u8] {
        for (page, bytes) in self.0.chunks_exact_mut(4096).enumerate() {
            bytes[..8].copy_from_slice(&(mib << 8 | page).to_le_bytes());
        }
        &self.0
    }
}

fn piped(call: Call) -> Call {
    call.stdin(Stdio::piped()).stdout(Stdio::piped())
}

#[test]
fn a_gibibyte_goes_through_and_comes_back_unchanged() {
    let case = Case::begin();
    let bundle = case.bundle().args(["cat"]);
    let mut running = piped(case.run_call(&bundle, "one"))
        .limit(Duration::from_secs(600))
        .start();
    let (mut stdin, mut stdout) = (running.take_stdin(), running.take_stdout());
    let total = bulk_bytes();
    let writer = std::thread::spawn(move || {
        let mut block = Mebibyte::new();
        for mib in 0..total >> 20 {
            stdin
                .write_all(block.numbered(mib))
                .expect("write to the container");
        }
    });
    let (mut expected, mut buffer) = (Mebibyte::new(), vec![0; 1 << 20]);
    for mib in 0..total >> 20 {
        stdout
            .read_exact(&mut buffer)
            .unwrap_or_else(|e| panic!("MiB {mib}: {e}"));
        assert!(
            buffer == expected.numbered(mib),
            "other bytes came back in MiB {mib}"
        );
    }
    assert_eq!(
        stdout.read(&mut buffer).expect("read"),
        0,
        "more came back than went in"
    );
    writer.join().expect("join");
    assert_eq!(running.finish().status, 0);
}

#[test]
fn stdout_and_stderr_are_apart_and_binary() {
    let case = Case::begin();
    let bundle = case.bundle().script(
        "i=0; while [ $i -lt 500 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; printf '\\000\\377\\r\\n'",
    );
    let outcome = case.run(&bundle);
    let numbered = |name: &str| {
        (0..500)
            .map(|n| format!("{name} {n}\n"))
            .collect::<String>()
    };
    assert_eq!(outcome.stderr, numbered("err"));
    assert_eq!(
        outcome.stdout,
        [numbered("out").as_bytes(), b"\0\xff\r\n"].concat()
    );
}

#[test]
fn both_streams_into_one_pipe_keep_their_order() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("for i in 1 2 3 4 5; do echo out $i; echo err $i >&2; done");
    let both = std::fs::File::create(case.dir().join("both")).expect("create");
    let stderr = both.try_clone().expect("dup");
    let outcome = case
        .run_call(&bundle, "one")
        .stdout(both)
        .stderr(stderr)
        .finish();
    assert_eq!(outcome.status, 0);
    let mut lines: Vec<String> = std::fs::read_to_string(case.dir().join("both"))
        .expect("read")
        .lines()
        .map(str::to_owned)
        .collect();
    // Each stream's own order holds; between two streams of a virtual machine there is none.
    lines.sort_by_key(|line| line.starts_with("err"));
    let expected = ["out", "err"].map(|name| (1..=5).map(move |n| format!("{name} {n}")));
    assert_eq!(lines, expected.into_iter().flatten().collect::<Vec<_>>());
}

#[test]
fn the_end_of_stdin_reaches_the_program_which_can_still_answer() {
    let case = Case::begin();
    let bundle = case.bundle().script("wc -c; echo after the end");
    let mut running = piped(case.run_call(&bundle, "one")).start();
    let mut stdin = running.take_stdin();
    stdin.write_all(&[b'x'; 12345]).expect("write");
    drop(stdin);
    let mut answer = String::new();
    running
        .take_stdout()
        .read_to_string(&mut answer)
        .expect("read");
    assert_eq!(
        answer.split_whitespace().collect::<Vec<_>>(),
        ["12345", "after", "the", "end"]
    );
    assert_eq!(running.finish().status, 0);
}

#[test]
fn a_reader_that_goes_away_is_seen_by_the_program() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("trap '' PIPE; while echo y; do :; done 2>/dev/null; exit 8");
    let mut running = piped(case.run_call(&bundle, "one")).start();
    assert_eq!(running.line(), "y");
    drop(running.take_stdout());
    assert_eq!(running.finish().status, 8);
}

#[test]
fn exec_has_streams_of_its_own() {
    let case = Case::begin();
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    let call = case.call(["exec", "one", "sh", "-c", "cat; echo error >&2; exit 7"]);
    let mut running = call.stdin(Stdio::piped()).start();
    running
        .take_stdin()
        .write_all(b"through exec")
        .expect("write");
    let outcome = running.finish();
    assert_eq!((outcome.status, outcome.text()), (7, "through exec"));
    assert_eq!(outcome.stderr, "error\n");
    case.delete("one");
}

#[test]
fn a_child_that_holds_the_streams_does_not_hold_exec() {
    let Some(case) = Case::begin_with_vm("runc 1.1.5 waits for the end of the streams") else {
        return;
    };
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    let outcome = case.exec("one", "sleep 500 & echo done");
    assert_eq!((outcome.status, outcome.text()), (0, "done\n"));
    case.delete("one");
}

/// `run` from a shell that opens descriptors first: it becomes the runtime.
fn run_with<const N: usize>(
    case: &Case,
    opened: &str,
    options: &str,
    container: [&str; N],
) -> Outcome {
    let bundle = case.bundle().args(container);
    let script = format!("exec {opened}; exec \"$@\" {options} -b \"$BUNDLE\" one");
    let root = case.root();
    case.program("sh")
        .args(["-c", &script, "sh", &runtime(), "--root"])
        .args([&root])
        .args(["run"])
        .env("BUNDLE", bundle.dir())
        .dir(case.dir())
        .finish()
}

#[test]
fn preserved_descriptors_are_read_and_written_under_their_numbers() {
    let case = Case::begin();
    fs::write(case.dir().join("in"), "from the host\n").expect("write");
    let outcome = run_with(
        &case,
        "3<in 4>out",
        "--preserve-fds 2",
        ["sh", "-c", "cat <&3; echo from the container >&4"],
    );
    assert_eq!(outcome.status, 0, "{outcome:?}");
    assert_eq!(outcome.text(), "from the host\n");
    let written = fs::read_to_string(case.dir().join("out")).expect("read");
    assert_eq!(written, "from the container\n");
    case.nothing_is_left();
}

#[test]
fn a_preserved_pipe_carries_everything_to_its_end() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .args(["sh", "-c", "head -c 3000000 /dev/zero >&3"]);
    // The pipe's reader is the end of the pipeline, and ends when the last writer has closed it.
    let outcome = case
        .program("sh")
        .args([
            "-c",
            "\"$@\" --preserve-fds 1 -b \"$BUNDLE\" one 3>&1 >/dev/null | wc -c",
        ])
        .args(["sh", &runtime(), "--root"])
        .args([&case.root()])
        .args(["run"])
        .env("BUNDLE", bundle.dir())
        .succeed();
    assert_eq!(outcome.text().trim(), "3000000");
    case.nothing_is_left();
}

#[test]
fn an_executed_process_gets_preserved_descriptors() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.start(&bundle, "one");
    fs::write(case.dir().join("in"), "from the host\n").expect("write");
    let outcome = case
        .program("sh")
        .args([
            "-c",
            "exec 3<in 4>out; exec \"$@\" --preserve-fds 2 one sh -c 'cat <&3; echo back >&4; exit 7'",
        ])
        .args(["sh", &runtime(), "--root"])
        .args([&case.root()])
        .args(["exec"])
        .dir(case.dir())
        .finish();
    assert_eq!(outcome.status, 7, "{outcome:?}");
    assert_eq!(outcome.text(), "from the host\n");
    let written = fs::read_to_string(case.dir().join("out")).expect("read");
    assert_eq!(written, "back\n");
    case.call(["delete", "-f", "one"]).succeed();
    case.nothing_is_left();
}

#[test]
fn preserved_descriptors_that_are_not_open_are_refused() {
    let case = Case::begin();
    // Forty, because a runtime may have a few of its own.
    let outcome = run_with(&case, "3</dev/null", "--preserve-fds 40", ["true"]);
    outcome.is_refusal("preserved-fd");
    case.nothing_is_left();
}
