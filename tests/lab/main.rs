//! `lab`: an outer virtual machine with a `/dev/kvm` of its own, on any machine.
//!
//! QEMU emulates an AMD processor with SVM in software; Debian's stock kernel inside offers nested KVM, so the whole
//! product runs there end to end. `lab up` starts it and keeps it, `lab exec` runs a command in it and ends with the
//! command's exit status, `lab run` is both with `lab down` after. The repository and the build directory appear in it
//! read-only at their own paths, so fresh binaries run without copying; `/scratch` is an empty local ext4 disk.
//!
//! Several labs may run at once, each with its own state directory (`LAB_STATE`).
//! Here: the command line. Not here: the image (`image.rs`, `flavour.rs`, `archive.rs`), the virtual machine
//! (`machine.rs`, `mend.rs`), the process that owns it (`owner.rs`), the client of a command (`exec.rs`), what runs
//! inside (`labd.rs`).

mod archive;
mod exec;
mod flavour;
mod frame;
mod image;
mod machine;
mod mend;
mod owner;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Exit status when the lab itself fails.
const LAB_FAILED: u8 = 125;

#[derive(Parser)]
#[command(
    name = "lab",
    about = "A virtual machine with its own KVM, for tests and benchmarks"
)]
struct Cli {
    /// Where this lab's sockets and logs are.
    #[arg(long, env = "LAB_STATE", global = true)]
    state: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build a disk image of the lab, unless it is in the cache.
    Image {
        /// What is in it.
        #[arg(value_enum, default_value = "base")]
        flavour: flavour::Flavour,
    },
    /// Start the lab, unless it is up.
    Up(machine::Shape),
    /// Run a command in the lab that is up.
    Exec(CommandLine),
    /// Start a lab, run a command in it, stop the lab.
    Run(RunLine),
    /// Stop the lab; returns when nothing of it is left.
    Down,
    /// Print the lab's console.
    Log,
    /// Say whether the lab is up (exit status 0) or not (1).
    Status,
    /// The process behind `up`; not for people.
    #[command(hide = true)]
    Own(machine::Shape),
}

#[derive(Args)]
struct RunLine {
    #[command(flatten)]
    shape: machine::Shape,
    #[command(flatten)]
    command: CommandLine,
}

/// A command for the lab.
#[derive(Args)]
struct CommandLine {
    /// Pass standard input on.
    #[arg(short = 'i')]
    stdin: bool,
    /// Give up after this many seconds, with exit status 124.
    #[arg(short = 't', value_name = "SECS")]
    seconds: Option<u64>,
    /// Set an environment variable.
    #[arg(short = 'e', value_name = "K=V")]
    env: Vec<String>,
    /// Working directory in the lab; by default the current one, if it is shared.
    #[arg(short = 'C', value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Directory that comes first in PATH, where the tested binaries are.
    #[arg(long, env = "LAB_BIN", value_name = "DIR")]
    bin: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    argv: Vec<String>,
}

fn main() -> ExitCode {
    match perform(Cli::parse()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::from(LAB_FAILED)
        }
    }
}

fn perform(cli: Cli) -> io::Result<u8> {
    let state = match cli.state {
        Some(dir) => std::path::absolute(dir)?,
        None => machine::repository().join("target/lab/run"),
    };
    match cli.verb {
        Verb::Image { flavour } => image::image(flavour).map(|_| 0),
        Verb::Up(shape) => owner::up(&state, &shape).map(|()| 0),
        Verb::Exec(command) => exec::exec(&state, command),
        Verb::Run(line) => {
            owner::up(&state, &line.shape)?;
            let status = exec::exec(&state, line.command);
            owner::down(&state)?;
            status
        }
        Verb::Down => owner::down(&state).map(|()| 0),
        Verb::Log => {
            let mut console = std::fs::File::open(state.join("console"))?;
            io::copy(&mut console, &mut io::stdout()).map(|_| 0)
        }
        Verb::Status => Ok(u8::from(!owner::is_up(&state)?)),
        Verb::Own(shape) => owner::own(&state, &shape).map(|()| 0),
    }
}
