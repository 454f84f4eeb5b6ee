//! `caisson-rootfs-builder`: writes the guest's initramfs.

use caisson_rootfs_builder::{cpio::CpioError, initramfs};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write the guest's initial root file system
    Initramfs {
        /// The agent's static binary
        #[arg(long)]
        agent: PathBuf,
        /// The file to write; replaced as a whole
        #[arg(long)]
        output: PathBuf,
    },
}

#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Archive(#[from] CpioError),
}

fn main() -> ExitCode {
    let Command::Initramfs { agent, output } = Cli::parse().command;
    match write_initramfs(&agent, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("caisson-rootfs-builder: {e}");
            ExitCode::FAILURE
        }
    }
}

fn write_initramfs(agent: &Path, output: &Path) -> Result<(), BuildError> {
    let binary = fs::read(agent).map_err(|source| BuildError::Read {
        path: agent.to_owned(),
        source,
    })?;
    let archive = initramfs::build(&binary)?;
    // Written beside and renamed: whoever boots meanwhile sees the old one or the new one.
    let mut beside = output.as_os_str().to_owned();
    beside.push(".new");
    fs::write(&beside, archive)
        .and_then(|()| fs::rename(&beside, output))
        .map_err(|source| BuildError::Write {
            path: output.to_owned(),
            source,
        })
}
