//! Ethernet frames on a stream socket, each with its length in front (32 bits, big-endian): what passt speaks, and QEMU's
//! `-netdev stream`.
//!
//! Contract: a length that no frame has ([`MIN_FRAME_BYTES`] to [`LARGEST_BYTES`]) breaks the stream for good: nothing
//! after it can be told apart. Both directions hold a bounded number of bytes, and no call waits.
//! Spec: passt(1), `--fd`; QEMU's `net/stream.c`.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;

use super::LARGEST_BYTES;

/// An Ethernet header: less is no frame.
pub(super) const MIN_FRAME_BYTES: usize = 14;
/// The length in front.
const LENGTH_BYTES: usize = 4;
/// As much as is read at once, and as may wait to be sent: always more than the largest frame.
const BUFFER_BYTES: usize = 256 << 10;

/// What is wrong with a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

/// A non-blocking stream socket.
struct Socket<'a>(BorrowedFd<'a>);

impl Read for Socket<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.0, to)?)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let flags = rustix::net::SendFlags::NOSIGNAL;
        Ok(rustix::net::send(self.0, from, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that have come and are not the guest's yet.
#[derive(Debug)]
pub(super) struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER_BYTES].into(),
            start: 0,
            end: 0,
        }
    }

    /// Reads once. `false`: there is nothing. The peer's end of the stream is an error.
    pub(super) fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        loop {
            return match Socket(socket).read(&mut self.buffer[self.end..]) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    self.end += len;
                    Ok(true)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// The first frame, if all of it is there.
    pub(super) fn frame(&self) -> Result<Option<&[u8]>, Broken> {
        let bytes = &self.buffer[self.start..self.end];
        let Some((length, rest)) = bytes.split_first_chunk() else {
            return Ok(None);
        };
        match usize::try_from(u32::from_be_bytes(*length)) {
            Ok(len @ MIN_FRAME_BYTES..=LARGEST_BYTES) => Ok(rest.get(..len)),
            _ => Err(Broken),
        }
    }

    /// Done with the first frame.
    pub(super) fn next(&mut self) {
        if let Ok(Some(frame)) = self.frame() {
            self.start += LENGTH_BYTES + frame.len();
        }
    }
}

/// Bytes that the socket has not taken yet.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    buffer: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    /// Whether another frame may come.
    pub(super) fn has_room(&self) -> bool {
        self.buffer.len() < BUFFER_BYTES
    }

    /// Whether something waits for the socket.
    pub(super) fn waits(&self) -> bool {
        self.sent < self.buffer.len()
    }

    /// Adds a frame of `len` bytes, which `copy` writes; nothing if that fails.
    pub(super) fn add<E>(
        &mut self,
        len: usize,
        copy: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let before = self.buffer.len();
        // Frames are far smaller than 4 GiB.
        let length = u32::try_from(len).unwrap_or(u32::MAX);
        self.buffer.extend(length.to_be_bytes());
        self.buffer.resize(before + LENGTH_BYTES + len, 0);
        let copied = copy(&mut self.buffer[before + LENGTH_BYTES..]);
        if copied.is_err() {
            self.buffer.truncate(before);
        }
        copied
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.waits() {
            match Socket(socket).write(&self.buffer[self.sent..]) {
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.buffer.clear();
        self.sent = 0;
        Ok(())
    }
}

/// A stream with these bytes (`crate::fuzzing`): it ends or breaks.
#[cfg(any(test, feature = "fuzzing"))]
#[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
pub(super) fn fuzz(bytes: &[u8]) {
    use std::os::fd::AsFd;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    (&theirs)
        .write_all(&bytes[..bytes.len().min(64 << 10)])
        .unwrap();
    drop(theirs);
    let mut incoming = Incoming::new();
    while incoming.fill(ours.as_fd()).is_ok() {
        while let Ok(Some(frame)) = incoming.frame() {
            assert!((MIN_FRAME_BYTES..=LARGEST_BYTES).contains(&frame.len()));
            incoming.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    fn framed(frame: &[u8]) -> Vec<u8> {
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        [&length, frame].concat()
    }

    #[test]
    fn frames_are_told_apart_wherever_the_stream_is_cut() {
        let stream = [framed(&[1; 14]), framed(&[2; 60])].concat();
        for cut in 0..=stream.len() {
            let (ours, mut theirs) = pair();
            let mut incoming = Incoming::new();
            let mut lengths = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                theirs.write_all(part).unwrap();
                incoming.fill(ours.as_fd()).unwrap();
                while let Some(frame) = incoming.frame().unwrap() {
                    assert!(frame.iter().all(|byte| *byte == frame[0]));
                    lengths.push(frame.len());
                    incoming.next();
                }
            }
            assert_eq!(lengths, [14, 60], "cut at {cut}");
        }
    }

    #[test]
    fn a_length_that_no_frame_has_breaks_the_stream() {
        for length in [0, 13, LARGEST_BYTES + 1, u32::MAX as usize] {
            let (ours, mut theirs) = pair();
            let length = u32::try_from(length).unwrap().to_be_bytes();
            theirs.write_all(&length).unwrap();
            let mut incoming = Incoming::new();
            assert!(incoming.fill(ours.as_fd()).unwrap());
            assert_eq!(incoming.frame(), Err(Broken));
            incoming.next();
            assert_eq!(incoming.frame(), Err(Broken), "for good");
        }
    }

    #[test]
    fn nothing_there_is_no_end_and_a_closed_peer_is() {
        let (ours, theirs) = pair();
        let mut incoming = Incoming::new();
        assert!(!incoming.fill(ours.as_fd()).unwrap());
        drop(theirs);
        assert!(incoming.fill(ours.as_fd()).is_err());
    }

    #[test]
    fn what_a_full_socket_does_not_take_follows_later() {
        let (ours, mut theirs) = pair();
        let mut outgoing = Outgoing::default();
        let mut frames: usize = 0;
        while !outgoing.waits() {
            let fill = |frame: &mut [u8]| {
                frame.fill(7);
                Ok::<_, Broken>(())
            };
            outgoing.add(60_000, fill).unwrap();
            outgoing.flush(ours.as_fd()).unwrap();
            frames += 1;
        }
        let mut got = vec![0; frames * 60_004];
        let (first, rest) = got.split_at_mut(60_004);
        theirs.read_exact(first).unwrap();
        outgoing.flush(ours.as_fd()).unwrap();
        assert!(!outgoing.waits() && outgoing.has_room());
        theirs.read_exact(rest).unwrap();
        assert!(
            got.chunks(60_004)
                .all(|frame| frame == framed(&[7; 60_000]))
        );
    }

    #[test]
    fn a_frame_that_cannot_be_copied_is_not_there() {
        let mut outgoing = Outgoing::default();
        assert!(outgoing.add(20, |_| Err(Broken)).is_err());
        assert!(!outgoing.waits());
    }
}
