//! `fs-tree`: builds a tree with everything that a Linux file system can hold, and writes down what a tree holds.
//!
//! `make` builds the same tree from the same seed everywhere; `manifest` prints one canonical line per entry. A tree
//! made inside a container and read on the host, or the other way round, must give the same manifest byte for byte.
//! `--omit` leaves out what one side cannot do; both sides must be given the same.
//! Here: the command line. Not here: what the tree holds (`plan.rs`), making it (`make.rs`), the lines (`manifest.rs`).

#[path = "../acl.rs"]
mod acl;
mod make;
mod manifest;
mod plan;
#[path = "../random.rs"]
mod random;

use std::io::{self, BufWriter};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(
    name = "fs-tree",
    about = "Builds and describes a tree of every kind of file"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the tree in DIR, which is created if need be and must be empty.
    Make {
        dir: PathBuf,
        /// How many entries the tree has, at least 2000.
        #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(2000..))]
        entries: u32,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        #[command(flatten)]
        omit: Omit,
    },
    /// Print the manifest of DIR.
    Manifest {
        dir: PathBuf,
        #[command(flatten)]
        omit: Omit,
    },
}

#[derive(Args)]
struct Omit {
    /// What to leave out, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',')]
    omit: Vec<Part>,
}

impl Omit {
    fn has(&self, part: Part) -> bool {
        self.omit.contains(&part)
    }
}

/// What may be left out of a tree, of a manifest, or of both.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Character and block devices (not made; not listed).
    Devices,
    /// Sockets (not made; not listed).
    Sockets,
    /// Owners and groups other than the caller's (not set; not listed).
    Owners,
    /// POSIX ACLs (not set; not listed).
    Acls,
    /// Attributes of the namespace `trusted.` (not set; not listed).
    Trusted,
    /// `security.capability` (not set; not listed).
    Capabilities,
    /// Other attributes of the namespace `security.`, such as labels (not listed).
    Labels,
    /// Attributes of the namespace `user.` (not set; not listed).
    User,
    /// Where sparse files have data (not listed).
    Holes,
    /// How many links a directory has (not listed).
    DirectoryLinks,
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Make {
            dir,
            entries,
            seed,
            omit,
        } => {
            let plan = plan::plan(entries as usize, seed, &omit);
            make::make(&dir, &plan).map_err(|error| error.to_string())
        }
        // Standard output alone would be written line by line, which in a container is a message for each.
        Verb::Manifest { dir, omit } => {
            manifest::print(&dir, &omit, &mut BufWriter::new(io::stdout().lock()))
                .map_err(|error| error.to_string())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fs-tree: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A name as printable ASCII: every other byte, the space and the backslash become `\xNN`.
fn escaped(name: &[u8]) -> String {
    use std::fmt::Write;
    name.iter()
        .fold(String::with_capacity(name.len()), |mut text, &byte| {
            // Writing to a string cannot fail.
            let _ = match byte {
                b'\\' => write!(text, "\\x5c"),
                b'!'..=b'~' => write!(text, "{}", char::from(byte)),
                _ => write!(text, "\\x{byte:02x}"),
            };
            text
        })
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn escaping_keeps_names_apart_and_lines_whole() {
        assert_eq!(escaped(b"a/b-~"), "a/b-~");
        assert_eq!(escaped(b"\\n\n \xff"), "\\x5cn\\x0a\\x20\\xff");
    }
}
