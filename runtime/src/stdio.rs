//! Moving bytes between a process's streams in the guest and the caller's descriptors.
//!
//! Contract: bytes arrive in order and unchanged; the end of one side becomes the end of the other (half-close); a
//! reader that goes away is felt by the writer; a slow reader slows the writer down. The caller's descriptors are used
//! as they are: their flags are shared with other processes and never changed, which is why each direction is a
//! blocking thread and not a task. Between a pipe and the guest, pages are moved; anything else is copied.
//! Threads: [`output`] and [`input`] start one each; it holds its two descriptors and ends with its stream. A thread that
//! still waits for input ends with the process.
//! Not here: terminals (`terminal.rs`), which streams a process has (`sandbox/`), descriptors beyond the standard three
//! (`preserved.rs`).

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{Errno, ioctl_fionbio},
    net::Shutdown,
    pipe::{SpliceFlags, splice},
};
use tokio::sync::watch;

/// Bytes moved at once; a pipe's and a vsock packet's usual capacity.
const CHUNK: usize = 64 << 10;

/// The most that is moved at once: a pipe's largest usual capacity.
const MOVE: usize = 1 << 20;

/// Stack of a pump: it has its buffer on the heap and no deep calls.
const STACK: usize = 64 << 10;

/// How far an output stream has got.
#[derive(Debug)]
pub struct Progress(watch::Receiver<u64>);

impl Progress {
    /// Waits until the stream has ended or `bytes` of it have been passed on, whichever comes first.
    pub async fn reached(&mut self, bytes: u64) {
        // An error means that the pump is gone: the stream has ended.
        let _ = self.0.wait_for(|passed| *passed >= bytes).await;
    }
}

/// Passes everything that the guest writes on to `to`.
pub fn output(from: OwnedFd, to: OwnedFd) -> io::Result<Progress> {
    output_then(from, to, || {})
}

/// As [`output`]; at the stream's end does one thing more, before that end is told.
pub fn output_then(
    from: OwnedFd,
    to: OwnedFd,
    then: impl FnOnce() + Send + 'static,
) -> io::Result<Progress> {
    let (tell, progress) = watch::channel(0);
    spawn("output", move || {
        pump_output(from, to, &tell);
        then();
    })?;
    Ok(Progress(progress))
}

/// Passes everything that the caller writes on to the guest, then the end of file.
pub fn input(from: OwnedFd, to: OwnedFd) -> io::Result<()> {
    spawn("input", move || pump_input(from, &to))
}

fn spawn(name: &str, pump: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(pump)
        .map(drop)
}

/// How moving pages ended.
#[derive(Debug, PartialEq, Eq)]
enum Moved {
    /// At the end of the stream, or at nobody's wish for more.
    All,
    /// At once: none of the two is a pipe. Bytes must be copied.
    NotHere,
    /// Whoever was to read it is gone.
    ReaderIsGone,
}

fn pump_output(from: OwnedFd, to: OwnedFd, progress: &watch::Sender<u64>) {
    let (mut from, mut to) = (File::from(from), File::from(to));
    let pass = |count: usize| {
        progress.send_modify(|passed| *passed = passed.saturating_add(count as u64));
    };
    let moved = move_all(&from, &to, || wait(&from, PollFlags::IN).is_ok(), pass);
    let mut reader_is_gone = false;
    match moved {
        Moved::All => return,
        Moved::NotHere => {}
        Moved::ReaderIsGone => {
            reader_is_gone = true;
            close_writer(&from);
        }
    }
    let mut buffer = vec![0; CHUNK];
    while let Some(chunk) = chunk(&mut from, &mut buffer) {
        if !reader_is_gone && write_all(&mut to, chunk).is_err() {
            reader_is_gone = true;
            close_writer(&from);
        }
        pass(chunk.len());
    }
}

/// The guest's writer gets EPIPE. What it has sent already is read and counted, so that nobody waits for it.
fn close_writer(from: &File) {
    let _ = rustix::net::shutdown(from, Shutdown::Both);
}

/// Moves pages from one to the other, of which one must be a pipe, as long as `ready` says that there is something.
///
/// The kernel holds the pipe's lock while it moves, and whoever else uses the pipe would wait with it: so nothing here
/// may block in splice(2) itself. The guest's side is this process's own and is made non-blocking; for the caller's there
/// is a flag.
fn move_all(
    from: &File,
    to: &File,
    ready: impl Fn() -> bool,
    mut pass: impl FnMut(usize),
) -> Moved {
    while ready() {
        match splice(from, None, to, None, MOVE, SpliceFlags::NONBLOCK) {
            Ok(0) => return Moved::All,
            Ok(count) => pass(count),
            Err(Errno::INTR) => {}
            // What is ready was read by somebody else, or the other side is full.
            Err(Errno::AGAIN) => {
                if wait(to, PollFlags::OUT).is_err() {
                    return Moved::NotHere;
                }
            }
            Err(Errno::PIPE) => return Moved::ReaderIsGone,
            Err(_) => return Moved::NotHere,
        }
    }
    Moved::All
}

fn pump_input(from: OwnedFd, to: &OwnedFd) {
    let mut from = File::from(from);
    let Ok(mut sink) = to.try_clone().map(File::from) else {
        return;
    };
    // Fails for no socket; without it bytes are copied.
    let moved = match ioctl_fionbio(&sink, true) {
        // Wait for input and for the guest to close its end: then the caller's writer must feel it too.
        Ok(()) => move_all(&from, &sink, || wait_for_input(&from, &sink), |_| {}),
        Err(_) => Moved::NotHere,
    };
    if moved == Moved::NotHere {
        let mut buffer = vec![0; CHUNK];
        while wait_for_input(&from, &sink)
            && let Some(chunk) = chunk(&mut from, &mut buffer)
            && write_all(&mut sink, chunk).is_ok()
        {}
    }
    // Fails only if the guest has closed its end already.
    let _ = rustix::net::shutdown(to, Shutdown::Write);
}

/// The next bytes; `None` at the end of the stream, whether it ended well or not.
fn chunk<'b>(from: &mut File, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
    let count = read(from, buffer).ok()?;
    buffer.get(..count).filter(|chunk| !chunk.is_empty())
}

/// Says whether there is something to read, an end included; `false` if nobody is left to read it.
fn wait_for_input(from: &File, to: &File) -> bool {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(from.as_fd(), PollFlags::IN),
            // Errors and hang-ups are always reported.
            PollFd::from_borrowed_fd(to.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            // What cannot be polled can still be read.
            Err(_) => return true,
            Ok(_) => {}
        }
        let [input, output] = fds.map(|fd| fd.revents());
        if output.intersects(PollFlags::ERR | PollFlags::HUP) {
            return false;
        }
        if !input.is_empty() {
            return true;
        }
    }
}

/// Reads what is there. A descriptor that someone else made non-blocking is waited for.
fn read(from: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(from, PollFlags::IN)?,
            // A terminal whose other side is gone.
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                return Ok(0);
            }
            other => return other,
        }
    }
}

fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(to, PollFlags::OUT)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait(file: &File, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(file.as_fd(), flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::pipe::pipe;

    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count)
            .map(|n| u8::try_from(n.wrapping_mul(31) % 251).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn output_arrives_unchanged_and_ends() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe().unwrap();
        let mut progress = output(host.into(), writer).unwrap();
        let sent = bytes(1 << 20);
        let expected = sent.clone();
        let received = thread::spawn(move || {
            let mut received = Vec::new();
            File::from(reader).read_to_end(&mut received).unwrap();
            received
        });
        guest.write_all(&sent).unwrap();
        drop(guest);
        progress.reached(u64::MAX).await;
        assert_eq!(received.join().unwrap(), expected);
    }

    #[tokio::test]
    async fn what_is_no_pipe_is_copied() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let (to, mut reader) = UnixStream::pair().unwrap();
        let mut progress = output(host.into(), to.into()).unwrap();
        let sent = bytes(300_000);
        let expected = sent.clone();
        let writing = thread::spawn(move || guest.write_all(&sent).unwrap());
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        writing.join().unwrap();
        progress.reached(u64::MAX).await;
        assert_eq!(received, expected);

        let (mut guest, host) = UnixStream::pair().unwrap();
        let (mut caller, from) = UnixStream::pair().unwrap();
        input(from.into(), host.into()).unwrap();
        caller.write_all(b"typed").unwrap();
        drop(caller);
        received.clear();
        guest.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"typed");
    }

    #[test]
    fn a_pipe_that_is_full_blocks_neither_its_reader_nor_the_pump() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe().unwrap();
        let _progress = output(host.into(), writer).unwrap();
        let sent = bytes(1 << 20);
        let expected = sent.clone();
        let writing = thread::spawn(move || guest.write_all(&sent).unwrap());
        // The pipe is full before anything is read, and again after every small read.
        wait(&File::from(reader.try_clone().unwrap()), PollFlags::IN).unwrap();
        let (mut received, mut reader, mut part) = (Vec::new(), File::from(reader), [0; 1000]);
        loop {
            match reader.read(&mut part).unwrap() {
                0 => break,
                count => received.extend_from_slice(&part[..count]),
            }
        }
        writing.join().unwrap();
        assert_eq!(received, expected);
    }

    #[tokio::test]
    async fn output_can_be_left_before_its_end() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe().unwrap();
        let mut progress = output(host.into(), writer).unwrap();
        guest.write_all(b"hello").unwrap();
        progress.reached(5).await;
        let mut received = [0; 5];
        File::from(reader).read_exact(&mut received).unwrap();
        assert_eq!(&received, b"hello");
        drop(guest);
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_is_felt_by_the_guest() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut progress = output(host.into(), writer).unwrap();
        let _ = guest.write_all(b"hello");
        progress.reached(u64::MAX).await;
        assert_eq!(
            guest.write(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn input_arrives_unchanged_and_half_closes() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe().unwrap();
        input(reader, host.into()).unwrap();
        let sent = bytes(300_000);
        let expected = sent.clone();
        let writing = thread::spawn(move || File::from(writer).write_all(&sent).unwrap());
        let mut received = Vec::new();
        guest.read_to_end(&mut received).unwrap();
        writing.join().unwrap();
        assert_eq!(received, expected);
    }

    #[test]
    fn a_guest_that_closes_its_input_is_felt_by_the_caller() {
        let (guest, host) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe().unwrap();
        input(reader, host.into()).unwrap();
        drop(guest);
        // The pump drops the reading end: writing fails sooner or later, at the latest when the pipe is full.
        let mut writer = File::from(writer);
        let error = loop {
            if let Err(error) = writer.write_all(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
