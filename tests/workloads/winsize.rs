//! `winsize`: prints the size of the terminal on standard input as `ROWSxCOLUMNS`, at start and after each SIGWINCH.
//!
//! It ends with status 0 after `--count` lines, or when it is killed. Standard input that is no terminal prints `none`.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use rustix::termios::tcgetwinsize;
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

#[derive(Parser)]
#[command(
    name = "winsize",
    about = "Prints the terminal's size at start and at each change"
)]
struct Cli {
    /// End after this many lines.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

fn main() -> ExitCode {
    match print(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("winsize: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(cli: &Cli) -> io::Result<()> {
    // Caught before the first line, so that whoever read that line may resize at once.
    let mut resized = Signals::new([SIGWINCH])?;
    let mut changes = resized.forever();
    let mut lines = 0;
    loop {
        let mut stdout = io::stdout().lock();
        match tcgetwinsize(io::stdin()) {
            Ok(size) => writeln!(stdout, "{}x{}", size.ws_row, size.ws_col)?,
            Err(_) => writeln!(stdout, "none")?,
        }
        stdout.flush()?;
        drop(stdout);
        lines += 1;
        if cli.count == Some(lines) || changes.next().is_none() {
            return Ok(());
        }
    }
}
