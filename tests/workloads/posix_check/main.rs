//! `posix-check`: whether a directory behaves as POSIX and Linux say, one named check at a time.
//!
//! Made for virtio-fs, whose two halves (the guest's FUSE client and the host's server) share the work of a file system,
//! and tried on a plain ext4, where every check must pass: that tests the checks. Each check has an empty directory of
//! its own, runs in a process of its own with a time limit, and prints `ok NAME`, `not ok NAME: expected X got Y` or
//! `skip NAME: REASON`; exit status 1 if one failed, 2 if none could run. Needs root and the capabilities of a plain
//! root user: a missing one is a failure that `--skip` must name.
//! `open-files` is a check of its own size: how many files can be open at once.
//! Here: the command line. Not here: running checks (`runner.rs`), what a check may use (`act.rs`, `peer.rs`, `sys.rs`).

#[path = "../acl.rs"]
mod acl;
mod act;
mod actor;
mod checks;
mod open_files;
mod peer;
mod runner;
mod sys;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(
    name = "posix-check",
    about = "Checks the POSIX behaviour of a directory"
)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    /// An existing directory; what the checks make in it is removed again.
    #[arg(required = true)]
    dir: Option<PathBuf>,
    #[command(flatten)]
    choice: Choice,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(clap::Args)]
struct Choice {
    /// Print the names of the checks and run none.
    #[arg(long)]
    list: bool,
    /// Run only checks whose name starts so.
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
    /// Run no checks whose name starts so.
    #[arg(long, value_name = "PREFIX")]
    without: Vec<String>,
    /// Do not run this check, for this reason.
    #[arg(long, value_name = "NAME=REASON", value_parser = skip)]
    skip: Vec<(String, String)>,
    /// Expect the failures that are known and listed for this file system; one that passes is a failure.
    #[arg(long, value_enum)]
    on: Option<FileSystem>,
    /// Seconds that one check may take.
    #[arg(long, default_value = "120", value_parser = seconds)]
    timeout: Duration,
}

#[derive(Clone, Copy, ValueEnum)]
enum FileSystem {
    /// The list is `skips.txt`.
    VirtioFs,
}

#[derive(Subcommand)]
enum Verb {
    /// Hold many files of DIR open at once.
    OpenFiles {
        dir: PathBuf,
        /// How many to open.
        #[arg(long, default_value_t = 100_000)]
        count: usize,
        /// How many different files there are; by default as many as are opened.
        #[arg(long)]
        distinct: Option<usize>,
        /// Leave the files there.
        #[arg(long)]
        keep: bool,
    },
    /// What checks that execute a program execute; not for people.
    #[command(hide = true)]
    Actor {
        #[command(subcommand)]
        part: actor::Part,
    },
}

fn skip(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, reason)) if !reason.is_empty() => Ok((name.to_owned(), reason.to_owned())),
        _ => Err("a skip needs a reason: NAME=REASON".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse::<u32>()
        .map(|seconds| Duration::from_secs(seconds.into()))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match (cli.verb, cli.dir) {
        (
            Some(Verb::OpenFiles {
                dir,
                count,
                distinct,
                keep,
            }),
            _,
        ) => open_files::run(&dir, count, distinct.unwrap_or(count).max(1), keep),
        (Some(Verb::Actor { part }), _) => actor::run(part),
        (None, dir) => runner::run(&dir.unwrap_or_default(), &cli.choice),
    }
}
