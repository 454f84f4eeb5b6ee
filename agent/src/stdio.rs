//! Standard streams: pipes or a terminal on the process's side, one connection each on the host's side.
//!
//! Contract: bytes and their order are kept; the end of a stream is passed on as the end of a stream, in each direction
//! on its own; a slow reader stops its writer and nobody else. The count of what a process has written is exact at any
//! moment: what was passed on, plus what waits in its pipe.
//! Programs get pipes, not sockets: they may open /dev/stdout again, and expect SIGPIPE. Between a pipe and the host,
//! pages are moved; a terminal's bytes are copied.

use crate::socket::{Dial, Socket, finish_writing};
use caisson_agent_api::Stdio;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread, read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

type Descriptor = Arc<AsyncFd<OwnedFd>>;

/// What is read at once, and what a pipe holds unless told otherwise.
const CHUNK_BYTES: usize = 64 << 10;
/// The same for a stream that flows: one that has carried [`FLOWING_BYTES`].
const LARGE_CHUNK_BYTES: usize = 1 << 20;
const FLOWING_BYTES: usize = 256 << 10;
/// More than a terminal holds: what comes after so much was written by others, after the process's end.
const SETTLE_BYTES: u64 = 128 << 10;

/// One direction that is being pumped.
struct Outlet {
    /// Weak: only the pump keeps the pipe open, so that a writer learns that nobody reads any more.
    from: Weak<AsyncFd<OwnedFd>>,
    /// Bytes read so far; closed when the pump has ended.
    read: watch::Receiver<u64>,
}

impl Outlet {
    /// Everything that the process has written so far.
    fn total(&self) -> u64 {
        let waiting = self
            .from
            .upgrade()
            .map_or(0, |fd| ioctl_fionread(fd.get_ref()).unwrap_or(0));
        *self.read.borrow() + waiting
    }
}

/// Connections to the host, begun but perhaps not made yet.
pub(crate) struct Dialed {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    preserved: Vec<OwnedFd>,
}

impl Dialed {
    /// Begins to connect to every port.
    pub(crate) fn begin(dial: &dyn Dial, ports: &Stdio, preserved: &[u32]) -> io::Result<Self> {
        let one = |port: u32| (port != 0).then(|| dial.connect(port)).transpose();
        Ok(Self {
            stdin: one(ports.stdin_port)?,
            stdout: one(ports.stdout_port)?,
            stderr: one(ports.stderr_port)?,
            preserved: preserved
                .iter()
                .map(|p| dial.connect(*p))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// The process's ends, to be handed to it.
pub(crate) struct ChildEnds {
    /// Standard input, output and error; `None` is /dev/null.
    pub(crate) streams: [Option<OwnedFd>; 3],
    /// From 3 upwards.
    pub(crate) preserved: Vec<OwnedFd>,
}

/// The agent's ends, before they are joined to the host's.
pub(crate) struct OurEnds {
    dialed: Dialed,
    streams: [Option<OwnedFd>; 3],
    preserved: Vec<OwnedFd>,
}

/// Makes the pipes. With a terminal the streams come later, with the terminal.
pub(crate) fn make(dialed: Dialed, terminal: bool) -> io::Result<(ChildEnds, OurEnds)> {
    let wanted = [&dialed.stdin, &dialed.stdout, &dialed.stderr].map(|d| d.is_some() && !terminal);
    let mut child: [Option<OwnedFd>; 3] = [None, None, None];
    let mut ours: [Option<OwnedFd>; 3] = [None, None, None];
    for (number, _) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let (theirs, mine) = if number == 0 {
            (reader, writer)
        } else {
            (writer, reader)
        };
        rustix::io::ioctl_fionbio(&mine, true)?;
        (child[number], ours[number]) = (Some(theirs), Some(mine));
    }
    let mut child = ChildEnds {
        streams: child,
        preserved: Vec::new(),
    };
    let mut preserved = Vec::new();
    for _ in &dialed.preserved {
        let (theirs, mine) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&mine, true)?;
        child.preserved.push(theirs);
        preserved.push(mine);
    }
    Ok((
        child,
        OurEnds {
            dialed,
            streams: ours,
            preserved,
        },
    ))
}

/// The running streams of a process.
pub(crate) struct Streams {
    stdout: Option<Outlet>,
    stderr: Option<Outlet>,
    /// Tasks that end with the process rather than with its output.
    inward: Vec<JoinHandle<()>>,
    /// The terminal's master side.
    pub(crate) terminal: Option<Descriptor>,
}

impl OurEnds {
    /// Finishes the connections and lets the bytes flow.
    pub(crate) async fn join(self, terminal: Option<OwnedFd>) -> io::Result<Streams> {
        let Self {
            dialed,
            streams: [stdin, stdout, stderr],
            preserved,
        } = self;
        let terminal = terminal.map(descriptor).transpose()?;
        let ours = |pipe: Option<OwnedFd>| -> io::Result<Option<Descriptor>> {
            pipe.map_or_else(|| Ok(terminal.clone()), |pipe| descriptor(pipe).map(Some))
        };
        let (stdin, stdout, stderr) = (ours(stdin)?, ours(stdout)?, ours(stderr)?);
        let mut streams = Streams {
            stdout: None,
            stderr: None,
            inward: Vec::new(),
            terminal,
        };
        if let (Some(host), Some(process)) = (connected(dialed.stdin).await?, stdin) {
            streams.inward.push(tokio::spawn(inward(host, process)));
        }
        if let (Some(host), Some(process)) = (connected(dialed.stdout).await?, stdout) {
            streams.stdout = Some(outward(process, host));
        }
        if let (Some(host), Some(process)) = (connected(dialed.stderr).await?, stderr) {
            streams.stderr = Some(outward(process, host));
        }
        for (host, process) in dialed.preserved.into_iter().zip(preserved) {
            let host = Arc::new(Socket::connected(host).await?.into_fd());
            let process = descriptor(process)?;
            streams.inward.push(tokio::spawn(inward(
                Arc::clone(&host),
                Arc::clone(&process),
            )));
            outward(process, host);
        }
        Ok(streams)
    }
}

impl Streams {
    /// Waits until the terminal's output so far is read: unlike a pipe, a terminal cannot tell how much it holds.
    pub(crate) async fn settle(&mut self) {
        let (Some(terminal), Some(outlet)) = (&self.terminal, &mut self.stdout) else {
            return;
        };
        let start = *outlet.read.borrow_and_update();
        while holds_output(terminal) && *outlet.read.borrow() - start < SETTLE_BYTES {
            if outlet.read.changed().await.is_err() {
                return;
            }
        }
    }

    /// Bytes written to standard output and standard error so far.
    pub(crate) fn written(&self) -> (u64, u64) {
        let total = |outlet: &Option<Outlet>| outlet.as_ref().map_or(0, Outlet::total);
        (total(&self.stdout), total(&self.stderr))
    }
}

impl Drop for Streams {
    /// Nothing will read input any more; output goes on to its end.
    fn drop(&mut self) {
        self.inward.iter().for_each(JoinHandle::abort);
    }
}

/// Whether a terminal's master side can be read; asking makes the kernel deliver what is under way (n_tty_poll).
fn holds_output(terminal: &Descriptor) -> bool {
    let mut fds = [PollFd::new(terminal.get_ref(), PollFlags::IN)];
    let asked = poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    );
    asked.is_ok() && fds[0].revents().contains(PollFlags::IN)
}

fn descriptor(fd: OwnedFd) -> io::Result<Descriptor> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(Arc::new(crate::sys::watch(
        fd,
        Interest::READABLE | Interest::WRITABLE,
    )?))
}

async fn connected(connecting: Option<OwnedFd>) -> io::Result<Option<Descriptor>> {
    match connecting {
        None => Ok(None),
        Some(fd) => Ok(Some(Arc::new(Socket::connected(fd).await?.into_fd()))),
    }
}

/// Host to process. A process that no longer reads closes the connection; the host's end of file closes the pipe.
async fn inward(host: Descriptor, process: Descriptor) {
    let _ = pump(&host, &process, None).await;
    // The last owner of the pipe's end closes it; a socket that also goes the other way is told.
    finish_writing(&process);
}

/// Both directions of a connection, each to its end.
pub(crate) async fn both_ways(host: OwnedFd, process: OwnedFd) -> io::Result<()> {
    let (host, process) = (descriptor(host)?, descriptor(process)?);
    let out = async {
        let _ = pump(&process, &host, None).await;
        finish_writing(&host);
    };
    tokio::join!(inward(Arc::clone(&host), Arc::clone(&process)), out);
    Ok(())
}

/// Process to host, with a count.
fn outward(process: Descriptor, host: Descriptor) -> Outlet {
    let (counter, read) = watch::channel(0);
    let outlet = Outlet {
        from: Arc::downgrade(&process),
        read,
    };
    tokio::spawn(async move {
        let _ = pump(&process, &host, Some(&counter)).await;
        finish_writing(&host);
    });
    outlet
}

/// Passes on until the end of `from`, or until `to` takes no more.
async fn pump(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    counter: Option<&watch::Sender<u64>>,
) -> io::Result<()> {
    match move_pages(from, to, counter).await {
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            copy(from, to, counter).await
        }
        moved => moved,
    }
}

fn count(counter: Option<&watch::Sender<u64>>, passed: usize) {
    if let Some(counter) = counter {
        counter.send_modify(|total| *total += u64::try_from(passed).unwrap_or(0));
    }
}

/// Moves pages while one of the two is a pipe; `EINVAL` if none is.
async fn move_pages(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    counter: Option<&watch::Sender<u64>>,
) -> io::Result<()> {
    let (mut at_once, mut total) = (CHUNK_BYTES, 0);
    loop {
        drop(from.readable().await?);
        match splice(from, None, to, None, at_once, SpliceFlags::NONBLOCK) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                count(counter, n);
                total += n;
                if total >= FLOWING_BYTES && at_once == CHUNK_BYTES {
                    // Fewer, larger steps. What is no pipe refuses, and stays as it is.
                    let _ = fcntl_setpipe_size(from.get_ref(), LARGE_CHUNK_BYTES);
                    let _ = fcntl_setpipe_size(to.get_ref(), LARGE_CHUNK_BYTES);
                    at_once = LARGE_CHUNK_BYTES;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => both_ready(from, to).await?,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits for the side that made splice(2) say that it would block. It does not say which one, and a side that is ready
/// would not be heard of again: so they are asked.
async fn both_ready(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        // Taken before asking: what becomes ready meanwhile is not cleared below.
        let (mut reading, mut writing) = (from.readable().await?, to.writable().await?);
        let mut fds = [
            PollFd::new(from.get_ref(), PollFlags::IN),
            PollFd::new(to.get_ref(), PollFlags::OUT),
        ];
        poll(&mut fds, Some(&Timespec::default()))?;
        let [from_ready, to_ready] = fds.map(|fd| !fd.revents().is_empty());
        if from_ready && to_ready {
            return Ok(());
        }
        if !from_ready {
            reading.clear_ready();
        }
        if !to_ready {
            writing.clear_ready();
        }
    }
}

async fn copy(
    from: &AsyncFd<OwnedFd>,
    to: &AsyncFd<OwnedFd>,
    counter: Option<&watch::Sender<u64>>,
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(CHUNK_BYTES);
    loop {
        buffer.clear();
        let read = from.async_io(Interest::READABLE, |fd| {
            Ok(read(fd, spare_capacity(&mut buffer))?)
        });
        match read.await {
            Ok(0) => return Ok(()),
            Ok(n) => count(counter, n),
            // A terminal whose last user is gone.
            Err(e) if e.raw_os_error() == Some(Errno::IO.raw_os_error()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        write_all(to, &buffer).await?;
    }
}

async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to
            .async_io(Interest::WRITABLE, |fd| Ok(write(fd, bytes)?))
            .await
        {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn bytes() -> Vec<u8> {
        (0..3_000_000u32)
            .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
            .collect()
    }

    /// Writes into one end, reads slowly and in odd pieces from the other, and compares.
    async fn pumped(into: OwnedFd, from: OwnedFd, to: OwnedFd, out: OwnedFd) -> u64 {
        let writing = std::thread::spawn(move || File::from(into).write_all(&bytes()).unwrap());
        let reading = std::thread::spawn(move || {
            let (mut received, mut out, mut part) = (Vec::new(), File::from(out), [0; 70_001]);
            loop {
                match out.read(&mut part).unwrap() {
                    0 => return received,
                    n => received.extend_from_slice(&part[..n]),
                }
            }
        });
        let (counter, total) = watch::channel(0);
        let (from, to) = (descriptor(from).unwrap(), descriptor(to).unwrap());
        pump(&from, &to, Some(&counter)).await.unwrap();
        finish_writing(&to);
        drop(to);
        writing.join().unwrap();
        assert!(reading.join().unwrap() == bytes(), "other bytes came out");
        *total.borrow()
    }

    #[tokio::test]
    async fn a_pipe_is_pumped_into_a_socket() {
        let ((from, into), (to, out)) = (pipe().unwrap(), UnixStream::pair().unwrap());
        assert_eq!(pumped(into, from, to.into(), out.into()).await, 3_000_000);
    }

    #[tokio::test]
    async fn a_socket_is_pumped_into_a_pipe() {
        let ((into, from), (out, to)) = (UnixStream::pair().unwrap(), pipe().unwrap());
        assert_eq!(pumped(into.into(), from.into(), to, out).await, 3_000_000);
    }

    #[tokio::test]
    async fn what_is_no_pipe_is_copied() {
        let ((into, from), (to, out)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let total = pumped(into.into(), from.into(), to.into(), out.into()).await;
        assert_eq!(total, 3_000_000);
    }

    #[tokio::test]
    async fn a_process_that_no_longer_reads_ends_the_pump() {
        let ((mut into, from), (out, to)) = (UnixStream::pair().unwrap(), pipe().unwrap());
        into.write_all(b"for nobody").unwrap();
        drop(out);
        let (from, to) = (descriptor(from.into()).unwrap(), descriptor(to).unwrap());
        let error = pump(&from, &to, None).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
