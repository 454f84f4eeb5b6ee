//! `io-cost`: reads and writes one large file in the usual patterns, and says when: `begin`, then the name of each one done.
//!
//! The patterns are those that `fio` is asked for (sequential and random, 4 KiB and 1 MiB, through the page cache, by `pread`
//! and `pwrite`, random blocks from a fixed seed). `fio` itself looks at its jobs every 10 ms, which would be counted with
//! them. Each pattern begins with none of the file in this kernel's cache and ends with all of it written back.
//! Here: the operations. Not here: time (the benchmark).

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use rustix::fs::{Advice, Mode, OFlags, fadvise, fsync, ftruncate, open};
use rustix::io::{Errno, pread, pwrite};

#[derive(Parser)]
#[command(
    name = "io-cost",
    about = "Reads and writes one large file in the usual patterns"
)]
struct Cli {
    /// The file, which is made, and removed at the end by whoever made its directory.
    file: PathBuf,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Length of the file.
const LENGTH: usize = 16 * MIB;

/// One pattern: `count` blocks of `block` bytes.
struct Pattern {
    name: &'static str,
    write: bool,
    random: bool,
    block: usize,
    count: usize,
}

const PATTERNS: &[Pattern] = &[
    pattern("sequential write, 4 KiB", true, false, 4 * KIB, 512),
    pattern("sequential write, 1 MiB", true, false, MIB, 16),
    pattern("random write, 4 KiB", true, true, 4 * KIB, 256),
    pattern("random write, 1 MiB", true, true, MIB, 16),
    pattern("sequential read, 4 KiB", false, false, 4 * KIB, 512),
    pattern("sequential read, 1 MiB", false, false, MIB, 16),
    pattern("random read, 4 KiB", false, true, 4 * KIB, 256),
    pattern("random read, 1 MiB", false, true, MIB, 16),
];

const fn pattern(
    name: &'static str,
    write: bool,
    random: bool,
    block: usize,
    count: usize,
) -> Pattern {
    Pattern {
        name,
        write,
        random,
        block,
        count,
    }
}

impl Pattern {
    /// Does it.
    fn perform(&self, file: &OwnedFd, buffer: &mut [u8]) -> Result<(), Errno> {
        let buffer = &mut buffer[..self.block];
        // A linear congruential generator (Knuth's MMIX), of which the upper bits are random.
        let mut seed = 1u64;
        for index in 0..self.count {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let blocks = LENGTH / self.block;
            let block = if self.random {
                usize::try_from(seed >> 33).unwrap_or(0) % blocks
            } else {
                index
            };
            let offset = u64::try_from(block * self.block).unwrap_or(0);
            let done = if self.write {
                pwrite(file, &*buffer, offset)?
            } else {
                pread(file, &mut *buffer, offset)?
            };
            if done != self.block {
                return Err(Errno::IO);
            }
        }
        if self.write { fsync(file) } else { Ok(()) }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match measure(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err((step, error)) => {
            eprintln!("io-cost: {step}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(cli: &Cli) -> Result<(), (&'static str, Errno)> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let mut buffer = vec![0x5a; MIB];
    let file = open(&cli.file, flags, Mode::from_raw_mode(0o644));
    let file = file.map_err(|error| ("open the file", error))?;
    // Whole before the first pattern: no pattern makes it grow.
    let length = u64::try_from(LENGTH).unwrap_or(0);
    ftruncate(&file, length).map_err(|error| ("set its length", error))?;
    let whole = pattern("write all of it", true, false, MIB, LENGTH / MIB);
    for pattern in std::iter::once(&whole).chain(PATTERNS) {
        let forgotten = fadvise(&file, 0, None, Advice::DontNeed);
        let done = forgotten.and_then(|()| pattern.perform(&file, &mut buffer));
        done.map_err(|error| (pattern.name, error))?;
        println!("{} | {}", pattern.name, pattern.count);
    }
    Ok(())
}
