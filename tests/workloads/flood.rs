//! `flood`: a long, reproducible stream of bytes, to show that a pipe carries every byte, in order, to its end.
//!
//! `out` writes the stream, `in` reads standard input and says at which byte it first differs from the stream, or that
//! it ended early or late; `echo` copies standard input to standard output until its end. Chained, they prove both
//! directions: `flood out 1GiB | caisson exec ID flood echo | flood in 1GiB`.
//! Exit status: 0 as expected, 1 the stream is wrong, 2 the command line or a system call failed.

#[path = "random.rs"]
mod random;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use random::Random;

/// Bytes moved by one system call; a multiple of the generator's word.
const CHUNK: usize = 256 << 10;

#[derive(Parser)]
#[command(
    name = "flood",
    about = "Writes, verifies or echoes a reproducible stream of bytes"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Write BYTES of the stream.
    Out {
        #[arg(value_parser = bytes)]
        bytes: u64,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Where to write.
        #[arg(long, value_enum, default_value = "stdout")]
        to: Output,
    },
    /// Read exactly BYTES of the stream from standard input, then its end.
    In {
        #[arg(value_parser = bytes)]
        bytes: u64,
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Copy standard input to standard output until its end.
    Echo,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Stdout,
    Stderr,
}

#[derive(Debug, thiserror::Error)]
enum FloodError {
    #[error("read standard input")]
    Read(#[source] io::Error),
    #[error("write")]
    Write(#[source] io::Error),
    #[error("byte {at} is {got:#04x}, the stream has {expected:#04x}")]
    Differs { at: u64, expected: u8, got: u8 },
    #[error("the input ended after {at} of {bytes} bytes")]
    Short { at: u64, bytes: u64 },
    #[error("the input goes on after {bytes} bytes")]
    Long { bytes: u64 },
}

/// A number of bytes: digits and one of the suffixes KiB, MiB, GiB or none.
fn bytes(text: &str) -> Result<u64, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let (digits, shift) = units
        .iter()
        .find_map(|(suffix, shift)| text.strip_suffix(suffix).map(|digits| (digits, *shift)))
        .unwrap_or((text, 0));
    let number: u64 = digits
        .parse()
        .map_err(|error| format!("{digits:?}: {error}"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is too large"))
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Out {
            bytes,
            seed,
            to: Output::Stdout,
        } => out(io::stdout(), bytes, seed),
        Verb::Out {
            bytes,
            seed,
            to: Output::Stderr,
        } => out(io::stderr(), bytes, seed),
        Verb::In { bytes, seed } => verify(io::stdin(), bytes, seed),
        Verb::Echo => echo(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            eprintln!("flood: {error}{}", source.unwrap_or_default());
            match error {
                FloodError::Read(_) | FloodError::Write(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// The descriptor itself: std's streams would copy every byte through a line buffer.
fn unbuffered(stream: impl AsFd) -> io::Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}

fn out(stream: impl AsFd, bytes: u64, seed: u64) -> Result<(), FloodError> {
    let mut sink = unbuffered(stream).map_err(FloodError::Write)?;
    let mut random = Random::new(seed);
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        random.fill(&mut chunk[..now]);
        sink.write_all(&chunk[..now]).map_err(FloodError::Write)?;
        left -= now as u64;
    }
    Ok(())
}

fn verify(stream: impl AsFd, bytes: u64, seed: u64) -> Result<(), FloodError> {
    let mut source = unbuffered(stream).map_err(FloodError::Read)?;
    let mut random = Random::new(seed);
    let (mut expected, mut got) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < bytes {
        let now = usize::try_from(bytes - at).unwrap_or(CHUNK).min(CHUNK);
        random.fill(&mut expected[..now]);
        let filled = fill(&mut source, &mut got[..now])?;
        if let Some(index) = (0..filled).find(|&index| expected[index] != got[index]) {
            let (expected, got) = (expected[index], got[index]);
            return Err(FloodError::Differs {
                at: at + index as u64,
                expected,
                got,
            });
        }
        at += filled as u64;
        if filled < now {
            return Err(FloodError::Short { at, bytes });
        }
    }
    match fill(&mut source, &mut got[..1])? {
        0 => Ok(()),
        _ => Err(FloodError::Long { bytes }),
    }
}

/// Reads until `buffer` is full or the input ends; returns how many bytes came.
fn fill(source: &mut File, buffer: &mut [u8]) -> Result<usize, FloodError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FloodError::Read(error)),
        }
    }
    Ok(filled)
}

fn echo() -> Result<(), FloodError> {
    let mut source = unbuffered(io::stdin()).map_err(FloodError::Read)?;
    let mut sink = unbuffered(io::stdout()).map_err(FloodError::Write)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        match source.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => sink.write_all(&chunk[..count]).map_err(FloodError::Write)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FloodError::Read(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_have_binary_suffixes_and_must_fit() {
        assert_eq!(bytes("17"), Ok(17));
        assert_eq!(bytes("1GiB"), Ok(1 << 30));
        assert!(bytes("GiB").is_err() && bytes("-1").is_err() && bytes("99999999999GiB").is_err());
    }
}
