//! The parts that this program plays when a check executes a copy of it.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use clap::Subcommand;
use rustix::process::{getegid, geteuid};
use rustix::thread::capabilities;

#[derive(Subcommand)]
pub(crate) enum Part {
    /// Print the effective user, group and capabilities.
    Identity,
    /// Say so, then run until standard input ends.
    Stay,
}

/// Plays the part.
pub(crate) fn run(part: Part) -> ExitCode {
    match play(part) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("posix-check actor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn play(part: Part) -> io::Result<()> {
    match part {
        Part::Identity => {
            let (uid, gid, held) = (
                geteuid().as_raw(),
                getegid().as_raw(),
                capabilities(None)?.effective,
            );
            println!("{uid} {gid} {:x}", held.bits());
        }
        Part::Stay => {
            println!("here");
            io::stdout().flush()?;
            io::stdin().read_to_end(&mut Vec::new())?;
        }
    }
    Ok(())
}
