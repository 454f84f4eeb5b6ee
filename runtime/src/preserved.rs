//! Descriptors from 3 upwards (`--preserve-fds`): taken from the caller, and each joined to a stream to the guest.
//!
//! Contract: what crosses into the guest is bytes, and the end of bytes. The container's descriptor is a stream socket
//! whatever the caller's is; which ways it carries bytes follows from how the caller's is open: read-only, to the guest;
//! write-only, from the guest; both (every socket), both ways, each of which ends on its own. What a container writes
//! that the caller cannot is dropped. A file is read ahead of the container, so that the caller's offset moves on.
//! What cannot be a stream (a directory, a datagram socket) is refused; a listening socket too, unless systemd passes it
//! (`LISTEN_FDS`): then one of its kind listens in the guest, and connections are handed in (`monitor/doors.rs`).
//! Threads: as in `stdio.rs`. Not here: carrying descriptors between processes (`packet.rs`).

use std::{
    env,
    fs::OpenOptions,
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use caisson_agent_api::{Family, Listening};
use rustix::{
    fs::{FileType, OFlags},
    net::{Shutdown, SocketType, shutdown, sockopt},
};

use crate::{
    packet::MAX_FDS,
    spawn::take_inherited,
    stdio::{self, Progress},
};

/// The most descriptors beyond the standard streams: they travel in one packet with those and one file more.
pub const MOST: usize = MAX_FDS - 4;

/// Why descriptors cannot be preserved.
#[derive(Debug, thiserror::Error)]
pub enum PreservedError {
    /// More than a packet carries.
    #[error("--preserve-fds {0}: at most {MOST} are supported")]
    TooMany(u32),
    /// The caller has not opened it.
    #[error("unable to use preserved-fd {index} (of {count}), which is descriptor {number}", number = index + 3)]
    Closed {
        /// From 0.
        index: u32,
        /// How many there should be.
        count: u32,
        /// Why.
        source: io::Error,
    },
    /// It is nothing to read from or write to in order.
    #[error("unable to use preserved-fd {index} (of {count}), which is descriptor {number}: {what} cannot be passed \
             into a virtual machine", number = index + 3)]
    NoStream {
        /// From 0.
        index: u32,
        /// How many there should be.
        count: u32,
        /// What it is.
        what: &'static str,
    },
}

/// The first vsock port of the guest for connections to its listening sockets.
const FIRST_DOOR: u32 = 2048;

/// How many descriptors systemd has passed to this process: `LISTEN_FDS`, if `LISTEN_PID` means it (sd_listen_fds(3)).
pub fn activated() -> u32 {
    let number = |name| env::var(name).ok()?.parse::<u32>().ok();
    match number("LISTEN_PID") {
        Some(pid) if pid == std::process::id() => number("LISTEN_FDS").unwrap_or(0),
        _ => 0,
    }
}

/// Takes descriptors from 3 upwards over from whoever started this process: first those that systemd has passed, which
/// may listen, then `count` others.
pub fn take(activated: u32, count: u32) -> Result<Vec<OwnedFd>, PreservedError> {
    let all = activated.saturating_add(count);
    if usize::try_from(all).is_ok_and(|all| all <= MOST) {
        let one = |index| take_one(index, all, index < activated);
        (0..all).map(one).collect()
    } else {
        Err(PreservedError::TooMany(all))
    }
}

/// Those of the descriptors that listen, as the agent is told.
pub fn listening(fds: &[OwnedFd]) -> io::Result<Vec<Listening>> {
    let mut all = Vec::new();
    for (fd, index) in fds.iter().zip(0..) {
        if !listens(fd.as_fd()) {
            continue;
        }
        let address = rustix::net::getsockname(fd)?;
        let (family, port) = match SocketAddr::try_from(address) {
            Ok(SocketAddr::V4(address)) => (Family::INET, address.port()),
            Ok(SocketAddr::V6(address)) => (Family::INET6, address.port()),
            Err(_) => (Family::UNIX, 0),
        };
        all.push(Listening {
            index,
            vsock_port: FIRST_DOOR + index,
            family: family.into(),
            port: port.into(),
            ..Default::default()
        });
    }
    Ok(all)
}

/// Whether this is a stream socket that listens.
fn listens(fd: BorrowedFd<'_>) -> bool {
    sockopt::socket_type(fd) == Ok(SocketType::STREAM) && sockopt::socket_acceptconn(fd) == Ok(true)
}

fn take_one(index: u32, count: u32, may_listen: bool) -> Result<OwnedFd, PreservedError> {
    let closed = |source| PreservedError::Closed {
        index,
        count,
        source,
    };
    let fd = take_inherited(3 + index).map_err(closed)?;
    if may_listen && listens(fd.as_fd()) {
        return Ok(fd);
    }
    match ways(fd.as_fd()).map_err(closed)? {
        Ok(_) => Ok(fd),
        Err(what) => Err(PreservedError::NoStream { index, count, what }),
    }
}

/// Which ways a descriptor carries bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ways {
    ToGuest,
    FromGuest,
    Both,
}

/// The ways, or the name of what has none.
fn ways(fd: BorrowedFd<'_>) -> io::Result<Result<Ways, &'static str>> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    if kind == FileType::Directory {
        return Ok(Err("a directory"));
    }
    if flags.contains(OFlags::PATH) {
        return Ok(Err("a path"));
    }
    if kind == FileType::Socket {
        if sockopt::socket_type(fd)? != SocketType::STREAM {
            return Ok(Err("a socket that is no stream"));
        }
        if sockopt::socket_acceptconn(fd)? {
            return Ok(Err("a listening socket"));
        }
    }
    let mode = flags & OFlags::RWMODE;
    Ok(Ok(if mode == OFlags::RDONLY {
        Ways::ToGuest
    } else if mode == OFlags::WRONLY {
        Ways::FromGuest
    } else {
        Ways::Both
    }))
}

/// Joins each of the caller's descriptors to its stream. Answers how far those have got that the guest writes to.
pub fn join(caller: Vec<OwnedFd>, guest: Vec<OwnedFd>) -> io::Result<Vec<Progress>> {
    let joined = caller.into_iter().zip(guest).map(|(ours, theirs)| {
        let ways = ways(ours.as_fd())?.map_err(io::Error::other)?;
        join_one(ways, ours, theirs)
    });
    joined.filter_map(Result::transpose).collect()
}

fn join_one(ways: Ways, caller: OwnedFd, guest: OwnedFd) -> io::Result<Option<Progress>> {
    // That a shutdown fails means that what it would end has ended.
    match ways {
        Ways::ToGuest => {
            let nowhere = OpenOptions::new().write(true).open("/dev/null")?;
            let stream = guest.try_clone()?;
            // The container has closed its last copy: then the caller's writer must feel it.
            let end = move || shutdown(&stream, Shutdown::Both).unwrap_or_default();
            stdio::output_then(guest.try_clone()?, nowhere.into(), end)?;
            stdio::input(caller, guest)?;
            Ok(None)
        }
        Ways::FromGuest => {
            let _ = shutdown(&guest, Shutdown::Write);
            stdio::output(guest, caller).map(Some)
        }
        Ways::Both => {
            let socket = caller.try_clone()?;
            let end = move || shutdown(&socket, Shutdown::Write).unwrap_or_default();
            let progress = stdio::output_then(guest.try_clone()?, caller.try_clone()?, end)?;
            stdio::input(caller, guest)?;
            Ok(Some(progress))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        net::TcpListener,
        os::unix::net::{UnixDatagram, UnixStream},
    };

    use rustix::pipe::pipe;

    use super::*;

    fn joined(caller: impl Into<OwnedFd>) -> (UnixStream, Vec<Progress>) {
        let (guest, host) = UnixStream::pair().unwrap();
        let progress = join(vec![caller.into()], vec![host.into()]).unwrap();
        (guest, progress)
    }

    fn all_of(mut from: impl Read) -> String {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_descriptor_goes_the_ways_it_is_open_for() {
        let of = |fd: BorrowedFd<'_>| ways(fd).unwrap();
        let (reader, writer) = pipe().unwrap();
        assert_eq!(of(reader.as_fd()), Ok(Ways::ToGuest));
        assert_eq!(of(writer.as_fd()), Ok(Ways::FromGuest));
        let socket = UnixStream::pair().unwrap().0;
        assert_eq!(of(socket.as_fd()), Ok(Ways::Both));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of(file.as_file().as_fd()), Ok(Ways::Both));
        let read = File::open(file.path()).unwrap();
        assert_eq!(of(read.as_fd()), Ok(Ways::ToGuest));
        let append = OpenOptions::new().append(true).open(file.path()).unwrap();
        assert_eq!(of(append.as_fd()), Ok(Ways::FromGuest));
    }

    #[test]
    fn what_is_no_stream_is_named() {
        let what = |fd: BorrowedFd<'_>| ways(fd).unwrap().unwrap_err();
        let directory = File::open("/").unwrap();
        assert_eq!(what(directory.as_fd()), "a directory");
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(what(path.as_fd()), "a path");
        let datagrams = UnixDatagram::unbound().unwrap();
        assert_eq!(what(datagrams.as_fd()), "a socket that is no stream");
        let listening = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(what(listening.as_fd()), "a listening socket");
    }

    #[test]
    fn listening_sockets_are_told_by_family_and_port() {
        let inet = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = inet.local_addr().unwrap().port();
        let dir = tempfile::tempdir().unwrap();
        let unix = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let stream = UnixStream::pair().unwrap().0;
        let all = listening(&[stream.into(), inet.into(), unix.into()]).unwrap();
        let told: Vec<_> = all
            .iter()
            .map(|one| (one.index, one.family.enum_value().unwrap(), one.port))
            .collect();
        assert_eq!(
            told,
            [(1, Family::INET, u32::from(port)), (2, Family::UNIX, 0)]
        );
        assert_ne!(all[0].vsock_port, all[1].vsock_port);
    }

    #[test]
    fn no_more_are_taken_than_a_packet_carries() {
        let most = u32::try_from(MOST).unwrap();
        let error = take(1, most).unwrap_err().to_string();
        assert_eq!(error, "--preserve-fds 61: at most 60 are supported");
        assert!(take(0, 0).unwrap().is_empty());
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_counted_as_runc_does() {
        let source = take_inherited(1 << 20).unwrap_err();
        assert_eq!(source.raw_os_error(), Some(libc::EBADF));
        let error = PreservedError::Closed {
            index: 1,
            count: 2,
            source,
        };
        assert_eq!(
            error.to_string(),
            "unable to use preserved-fd 1 (of 2), which is descriptor 4"
        );
    }

    #[test]
    fn a_file_is_read_to_its_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"contents").unwrap();
        let (guest, progress) = joined(File::open(file.path()).unwrap());
        assert!(progress.is_empty());
        assert_eq!(all_of(&guest), "contents");
    }

    #[test]
    fn the_writer_of_a_pipe_feels_that_the_guest_has_closed_it() {
        let (reader, writer) = pipe().unwrap();
        let (guest, _) = joined(reader);
        (&guest).write_all(b"nobody wants this").unwrap();
        drop(guest);
        let mut writer = File::from(writer);
        let error = loop {
            if let Err(error) = writer.write_all(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn the_reader_of_a_pipe_sees_its_end_and_the_guest_nothing_to_read() {
        let (reader, writer) = pipe().unwrap();
        let (mut guest, mut progress) = joined(writer);
        assert_eq!(all_of(&guest), "");
        guest.write_all(b"words").unwrap();
        drop(guest);
        assert_eq!(all_of(File::from(reader)), "words");
        progress.pop().unwrap().reached(u64::MAX).await;
    }

    #[test]
    fn each_way_of_a_socket_ends_on_its_own() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        // The caller keeps a copy, and the other side sees the end nevertheless.
        let _copy = theirs.try_clone().unwrap();
        let (mut guest, _progress) = joined(theirs);
        guest.write_all(b"from the guest").unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(all_of(&ours), "from the guest");
        ours.write_all(b"to the guest").unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(all_of(&guest), "to the guest");
    }
}
