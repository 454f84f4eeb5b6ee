//! Terminals: in the foreground, through a console socket, resized.

use caisson_tests::{Case, Terminal};

#[test]
fn run_in_a_terminal_talks_resizes_and_returns_the_status() {
    let case = Case::begin();
    // A shell's `read` fails when a trapped signal interrupts it.
    let bundle = case.bundle().script(
        "trap 'stty size' WINCH; tty; stty size; while :; do read x || continue; [ $x = go ] || exit $x; done",
    );
    let bundle = bundle.terminal();
    let (mut terminal, slave) = Terminal::open();
    terminal.resize(33, 44);
    let stream = || slave.try_clone().expect("dup");
    let root = case.root();
    let call = case
        .program("setsid")
        .args(["--ctty", "--wait"])
        .args([caisson_tests::case::runtime()]);
    let call = call.args([
        "--root".as_ref(),
        root.as_os_str(),
        "run".as_ref(),
        "-b".as_ref(),
    ]);
    let call = call.args([bundle.dir()]).args(["one"]);
    let running = call
        .stdin(stream())
        .stdout(stream())
        .stderr(stream())
        .start();
    drop(slave);
    terminal.expect("/dev/");
    terminal.expect("33 44");
    terminal.resize(10, 120);
    terminal.write("go\n");
    terminal.expect("10 120");
    terminal.write("12\n");
    assert_eq!(running.finish().status, 12);
}

#[test]
fn a_console_socket_receives_the_terminal() {
    let case = Case::begin();
    // Sizes and bytes take different ways into a guest: what is typed may be there first.
    let bundle = case.bundle().script(
        "stty size; read line; echo got $line; until stty size | grep -q '^50 60$'; do sleep 0.1; done; stty size; exit 3",
    );
    let bundle = bundle.terminal().edit(|spec| {
        spec["process"]["consoleSize"] = serde_json::json!({"height": 24, "width": 77});
    });
    let path = case.dir().join("tty.sock");
    let socket = Terminal::console_socket(&path);
    let receiver = std::thread::spawn(move || Terminal::receive(&socket));
    case.create_with_console(&bundle, "one", &path);
    let mut terminal = receiver.join().expect("no terminal arrived");
    case.call(["start", "one"]).succeed();
    terminal.expect("24 77");
    terminal.resize(50, 60);
    terminal.write("hello\n");
    terminal.expect("got hello");
    terminal.expect("50 60");
    case.wait("one");
    assert_eq!(terminal.finish().trim(), "");
    case.call(["delete", "one"]).succeed();
}

#[test]
fn control_characters_work_in_an_exec_terminal() {
    let case = Case::begin();
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    let (mut terminal, shell) = Terminal::start(case.call(["exec", "-t", "one", "sh"]));
    terminal.expect("# ");
    // What is printed is not what is typed, so the echo cannot be taken for it.
    terminal.write("sh -c 'echo rea\"\"dy; exec sleep 500'\n");
    terminal.expect("ready");
    terminal.write("\u{3}");
    terminal.expect("# ");
    terminal.write("echo status $(($? + 0))\n");
    terminal.expect("status 130");
    terminal.write("echo still $((40 + 2))\n");
    terminal.expect("still 42");
    // The shell's line editor sees the end-of-file character as such once it is back at its prompt, and not before: what
    // is typed while the terminal is still in line mode is lost when the mode changes.
    terminal.expect("# ");
    terminal.write("\u{4}");
    assert_eq!(shell.finish().status, 0);
    case.delete("one");
}

#[test]
fn a_container_whose_terminal_hangs_up_can_be_deleted() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]).terminal();
    let path = case.dir().join("tty.sock");
    let socket = Terminal::console_socket(&path);
    let receiver = std::thread::spawn(move || Terminal::receive(&socket));
    case.create_with_console(&bundle, "one", &path);
    let terminal = receiver.join().expect("no terminal arrived");
    case.call(["start", "one"]).succeed();
    drop(terminal);
    case.delete("one");
    case.nothing_is_left();
}
