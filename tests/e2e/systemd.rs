//! What systemd passes to a service and expects from it, with a container in between; and `--pidfd-socket`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use caisson_tests::{Bundle, Call, Case};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{Shutdown, shutdown};

/// A call of the runtime as systemd makes it: with `socket` as descriptor 3.
fn activated(case: &Case, socket: impl Into<OwnedFd>, arguments: &[&str]) -> Call {
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec 3<&0 </dev/null; exec \"$@\"";
    let root = case.root().display().to_string();
    let runtime = caisson_tests::case::runtime();
    case.program("/bin/bash")
        .args(["-c", script, "bash", &runtime, "--root", &root])
        .args(arguments)
        .stdin(socket.into())
}

/// A server that answers each connection with what it was asked, in capitals; on descriptor 3, as it is told.
fn server(case: &Case) -> Bundle {
    let program = "
import os, socket
assert os.environ['LISTEN_FDS'] == '1' and os.environ['LISTEN_PID'] == str(os.getpid())
listener = socket.socket(fileno=3)
assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
while True:
    connection, _ = listener.accept()
    asked = b''
    while part := connection.recv(65536):
        asked += part
    connection.sendall(asked.upper())
    connection.close()
";
    case.debian().args(["/usr/bin/python3", "-c", program])
}

/// What the server answers on a connection; it has a minute.
fn answer(stream: impl Into<OwnedFd>, asked: &[u8]) -> Vec<u8> {
    let socket: OwnedFd = stream.into();
    let minute = Some(Duration::from_secs(60));
    set_socket_timeout(&socket, Timeout::Recv, minute).expect("timeout");
    let mut stream = File::from(socket);
    stream.write_all(asked).expect("write");
    shutdown(&stream, Shutdown::Write).expect("shutdown");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("read");
    answer
}

#[test]
fn an_internet_socket_that_systemd_opened_is_served_in_the_container() {
    let case = Case::begin();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
    let address = listener.local_addr().expect("address");
    let bundle = server(&case);
    let bundle = bundle.dir().display().to_string();
    // One that comes before there is a container waits for it.
    let early = TcpStream::connect(address).expect("connect");
    activated(&case, listener, &["run", "-d", "-b", &bundle, "one"]).succeed();
    assert_eq!(answer(early, b"early"), b"EARLY");
    let large = vec![b'a'; 300_000];
    for asked in [b"second".as_slice(), &large] {
        let stream = TcpStream::connect(address).expect("connect");
        assert!(answer(stream, asked) == asked.to_ascii_uppercase());
    }
    case.delete("one");
    assert!(
        TcpStream::connect(address).is_err(),
        "somebody still listens"
    );
}

#[test]
fn a_unix_socket_that_systemd_opened_is_served_in_the_container() {
    let case = Case::begin();
    let path = case.dir().join("service.sock");
    let listener = UnixListener::bind(&path).expect("listen");
    let bundle = server(&case);
    let bundle = bundle.dir().display().to_string();
    activated(&case, listener, &["create", "-b", &bundle, "one"]).succeed();
    case.call(["start", "one"]).succeed();
    let stream = UnixStream::connect(&path).expect("connect");
    assert_eq!(answer(stream, b"unix"), b"UNIX");
    case.delete("one");
}

#[test]
fn readiness_is_passed_on() {
    let case = Case::begin();
    let program = "
import os, signal, socket
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ['NOTIFY_SOCKET'])
notify.send(b'STATUS=on its way')
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
open('/tmp/up', 'w').close()
signal.sigwait([signal.SIGUSR1])
notify.send(b'READY=1\\nSTATUS=up')
signal.sigwait([signal.SIGUSR1])
";
    let bundle = case.debian().args(["/usr/bin/python3", "-c", program]);
    let bundle = bundle.edit(|spec| spec["linux"]["readonlyPaths"] = serde_json::json!([]));
    let path = case.dir().join("notify.sock");
    let notify = UnixDatagram::bind(&path).expect("bind");
    case.create_call(&bundle, "one")
        .env("NOTIFY_SOCKET", &path)
        .succeed();
    let start = case
        .call(["start", "one"])
        .env("NOTIFY_SOCKET", &path)
        .start();
    case.wait_for_file(&bundle.rootfs("tmp/up"));
    assert!(
        !start.ends_within(Duration::from_secs(1)),
        "it was not ready"
    );
    case.call(["kill", "one", "USR1"]).succeed();
    assert_eq!(start.finish().status, 0);
    notify
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("timeout");
    let mut heard = String::new();
    for _ in 0..2 {
        let mut text = [0; 256];
        let n = notify.recv(&mut text).expect("a message");
        heard.push_str(&String::from_utf8_lossy(&text[..n]));
    }
    let pid = case.pid("one").as_raw_nonzero();
    assert_eq!(heard, format!("READY=1\nMAINPID={pid}\n"));
    case.delete("one");
}

#[test]
fn a_pidfd_of_the_container_is_sent() {
    let Some(case) = Case::begin_with_vm("runc 1.1 has no --pidfd-socket") else {
        return;
    };
    let path = case.dir().join("pidfd.sock");
    let listener = UnixListener::bind(&path).expect("listen");
    let receive = move || {
        let mut polled = [PollFd::new(&listener, PollFlags::IN)];
        let limit = Timespec::try_from(Duration::from_secs(60)).expect("time");
        let ready = poll(&mut polled, Some(&limit)).expect("poll");
        assert!(ready > 0, "nobody sends a pidfd");
        let (stream, _) = listener.accept().expect("accept");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("timeout");
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 64];
        let mut parts = [std::io::IoSliceMut::new(&mut text)];
        let flags = rustix::net::RecvFlags::empty();
        let got = rustix::net::recvmsg(&stream, &mut parts, &mut control, flags).expect("recvmsg");
        let fd = control.drain().find_map(|part| match part {
            rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let fd = fd.expect("a descriptor");
        let info =
            fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).expect("fdinfo");
        let pid = info
            .lines()
            .find_map(|line| line.strip_prefix("Pid:"))
            .expect("a pidfd")
            .trim()
            .to_owned();
        (
            String::from_utf8_lossy(&text[..got.bytes]).into_owned(),
            pid,
        )
    };
    let bundle = case.bundle().args(["sleep", "1000"]);
    std::thread::scope(|scope| {
        let received = scope.spawn(|| (receive(), receive()));
        let option = ["--pidfd-socket".as_ref(), path.as_os_str()];
        case.create_call(&bundle, "one").args(option).succeed();
        case.call(["start", "one"]).succeed();
        let file = case.dir().join("exec.pid");
        let exec = case
            .call(["exec", "-d", "--pid-file"])
            .args([&file])
            .args(option);
        exec.args(["one", "sleep", "1000"]).succeed();
        let (init, exec) = received.join().expect("received");
        assert_eq!(
            init,
            (
                "standard".to_owned(),
                case.pid("one").as_raw_nonzero().to_string()
            )
        );
        assert_eq!(
            exec,
            (
                "setns".to_owned(),
                fs::read_to_string(&file).expect("pid file")
            )
        );
    });
    case.delete("one");
}
