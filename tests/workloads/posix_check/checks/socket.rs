//! Fifos and sockets in the directory, really used.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use rustix::fs::{FileType, OFlags, link, rename, unlink};
use rustix::io::{Errno, read, write};
use rustix::process::umask;

use super::checks;
use crate::act::*;
use crate::peer::{ALICE, start};
use crate::verdict::*;

checks![
    a_fifo_carries_bytes_between_processes,
    a_fifo_ends_when_its_writers_close,
    a_fifo_without_readers_is_epipe,
    a_fifo_obeys_its_mode,
    two_fifos_are_apart,
    a_socket_carries_bytes_between_processes,
    a_bound_socket_is_a_file,
    an_address_is_used_once,
    a_socket_without_listener_refuses,
    a_socket_obeys_its_mode,
    a_renamed_socket_is_reached_by_its_new_name,
    datagrams_are_carried_whole,
];

/// The plain error of a call of the standard library.
fn plain<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn a_fifo_carries_bytes_between_processes() -> Verdict {
    node("p", FileType::Fifo, 0o644, 0)?;
    let sender = start(|| Ok(write_all(open_as("p", OFlags::WRONLY)?, &[b'x'; 200_000])?))?;
    let received = contents("p")?;
    sender.join()?;
    equal("received", received == [b'x'; 200_000], true)?;
    equal("size of the fifo", rustix::fs::lstat("p")?.st_size, 0)
}

fn a_fifo_ends_when_its_writers_close() -> Verdict {
    node("p", FileType::Fifo, 0o644, 0)?;
    let out = open_as("p", OFlags::RDONLY | OFlags::NONBLOCK)?;
    equal("no writer yet", read(&out, &mut [0; 1][..])?, 0)?;
    let into = open_as("p", OFlags::WRONLY)?;
    fails(
        "nothing written yet",
        read(&out, &mut [0; 1][..]),
        Errno::AGAIN,
    )?;
    drop(into);
    equal("closed", read(&out, &mut [0; 1][..])?, 0)
}

fn a_fifo_without_readers_is_epipe() -> Verdict {
    node("p", FileType::Fifo, 0o644, 0)?;
    // Rust ignores SIGPIPE, so the write fails instead of killing.
    let out = open_as("p", OFlags::RDONLY | OFlags::NONBLOCK)?;
    let into = open_as("p", OFlags::WRONLY)?;
    drop(out);
    fails("write", write(&into, b"x"), Errno::PIPE)
}

fn a_fifo_obeys_its_mode() -> Verdict {
    node("p", FileType::Fifo, 0o644, 0)?;
    ALICE.run(|| {
        fails(
            "write",
            open_as("p", OFlags::WRONLY | OFlags::NONBLOCK),
            Errno::ACCESS,
        )
    })
}

fn two_fifos_are_apart() -> Verdict {
    node("p", FileType::Fifo, 0o644, 0)?;
    node("q", FileType::Fifo, 0o644, 0)?;
    let (p, q) = (
        open_as("p", OFlags::RDWR | OFlags::NONBLOCK)?,
        open_as("q", OFlags::RDWR | OFlags::NONBLOCK)?,
    );
    write_all(&p, b"x")?;
    fails("the other one", read(&q, &mut [0; 1][..]), Errno::AGAIN)?;
    link("p", "p2")?;
    let mut byte = [0; 1];
    read(
        open_as("p2", OFlags::RDWR | OFlags::NONBLOCK)?,
        &mut byte[..],
    )?;
    equal("by another name", byte, *b"x")
}

fn a_socket_carries_bytes_between_processes() -> Verdict {
    let listener = UnixListener::bind("s")?;
    let client = start(|| {
        let mut stream = UnixStream::connect("s")?;
        stream.write_all(&[b'y'; 300_000])?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        equal("answer", answer, "300000".to_owned())
    })?;
    let (mut stream, _) = listener.accept()?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    write!(stream, "{}", received.len())?;
    drop(stream);
    client.join()
}

fn a_bound_socket_is_a_file() -> Verdict {
    umask(mode(0o027));
    let _listener = UnixListener::bind("s")?;
    equal("type", kind("s")?, FileType::Socket)?;
    equal_bits("mode", bits("s")?, 0o750)
}

fn an_address_is_used_once() -> Verdict {
    let listener = UnixListener::bind("s")?;
    fails(
        "while bound",
        plain(UnixListener::bind("s")),
        Errno::ADDRINUSE,
    )?;
    drop(listener);
    fails(
        "after the close",
        plain(UnixListener::bind("s")),
        Errno::ADDRINUSE,
    )?;
    unlink("s")?;
    UnixListener::bind("s")?;
    Ok(())
}

fn a_socket_without_listener_refuses() -> Verdict {
    drop(UnixListener::bind("s")?);
    touch("f")?;
    fails(
        "closed",
        plain(UnixStream::connect("s")),
        Errno::CONNREFUSED,
    )?;
    fails(
        "no socket",
        plain(UnixStream::connect("f")),
        Errno::CONNREFUSED,
    )?;
    fails(
        "missing",
        plain(UnixStream::connect("missing")),
        Errno::NOENT,
    )
}

fn a_socket_obeys_its_mode() -> Verdict {
    let _listener = UnixListener::bind("s")?;
    set_bits("s", 0o755)?;
    ALICE.run(|| {
        fails(
            "without write permission",
            plain(UnixStream::connect("s")),
            Errno::ACCESS,
        )
    })?;
    set_bits("s", 0o777)?;
    ALICE.run(|| succeeds(plain(UnixStream::connect("s"))))
}

fn a_renamed_socket_is_reached_by_its_new_name() -> Verdict {
    let _listener = UnixListener::bind("s")?;
    rename("s", "t")?;
    fails("old name", plain(UnixStream::connect("s")), Errno::NOENT)?;
    UnixStream::connect("t")?;
    Ok(())
}

fn datagrams_are_carried_whole() -> Verdict {
    let receiver = UnixDatagram::bind("s")?;
    let sender = UnixDatagram::unbound()?;
    sender.send_to(b"one", "s")?;
    sender.send_to(b"two two", "s")?;
    let mut buffer = [0; 100];
    equal("first", receiver.recv(&mut buffer)?, 3)?;
    equal("second", receiver.recv(&mut buffer)?, 7)
}
