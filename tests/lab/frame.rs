//! What `lab` and `labd` say to each other: frames on a byte stream that is never interrupted.
//!
//! A frame is one byte of kind, four bytes of length (little endian), then the payload. A link carries one command at
//! a time: the host sends [`Kind::Run`], then standard input and signals; the guest sends output, then [`Kind::Exit`],
//! and is ready for the next command. Standard input and signals that arrive between commands are dropped.
//!
//! Both sides are ours and trusted; the length is bounded only so that a stray byte cannot ask for 4 GiB.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The largest payload, in bytes.
const MAX_PAYLOAD_BYTES: usize = 16 << 20;

/// What a frame means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Host to guest: start a [`Command`] (JSON).
    Run = b'R',
    /// Host to guest: bytes for standard input.
    Stdin = b'I',
    /// Host to guest: end of standard input.
    StdinEnd = b'C',
    /// Host to guest: one byte, the signal to send to the command's process group.
    Signal = b'K',
    /// Guest to host: the guest is up.
    Hello = b'H',
    /// Guest to host: bytes from standard output.
    Stdout = b'O',
    /// Guest to host: bytes from standard error.
    Stderr = b'E',
    /// Guest to host: one byte, the exit status (128 + n for signal n). The command is over.
    Exit = b'X',
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Run,
        Self::Stdin,
        Self::StdinEnd,
        Self::Signal,
        Self::Hello,
        Self::Stdout,
        Self::Stderr,
        Self::Exit,
    ];
}

/// A command to run in the lab.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Command {
    /// Program and arguments; never empty.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub dir: String,
    /// Whether standard input follows; otherwise it is `/dev/null`.
    pub stdin: bool,
}

/// Writes one frame.
pub(crate) fn send(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

/// Reads one frame; an error also at the end of the stream.
pub(crate) fn receive(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let kind = Kind::ALL
        .into_iter()
        .find(|k| *k as u8 == kind)
        .ok_or_else(|| io::Error::other(format!("no such frame: {kind:#x}")))?;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_PAYLOAD_BYTES {
        return Err(io::Error::other(format!("frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok((kind, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_it_was_written() {
        let mut wire = Vec::new();
        send(&mut wire, Kind::Stdout, b"hello").unwrap();
        send(&mut wire, Kind::Exit, &[7]).unwrap();
        let mut wire = wire.as_slice();
        assert_eq!(
            receive(&mut wire).unwrap(),
            (Kind::Stdout, b"hello".to_vec())
        );
        assert_eq!(receive(&mut wire).unwrap(), (Kind::Exit, vec![7]));
        assert!(receive(&mut wire).is_err());
    }

    #[test]
    fn unknown_kinds_and_monstrous_lengths_are_refused() {
        assert!(receive(&mut [0, 0, 0, 0, 0].as_slice()).is_err());
        assert!(receive(&mut [b'O', 255, 255, 255, 255].as_slice()).is_err());
    }
}
