//! `file-cost`: does each kind of operation to many files, and says when: `begin`, then the name of each one done.
//!
//! Whoever reads this takes the time, because a guest's clock need not run like the host's. Each operation is done to every one of the files before the next, so that no cost hides in another's; the names say
//! what is done to a file, not which system calls that takes.
//! Here: the operations. Not here: time (the benchmark), correctness (`posix-check`, `fs-tree`).

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use rustix::fs::{
    CWD, FileType, Gid, Mode, OFlags, Uid, XattrFlags, chmod, chown, fstat, link, lstat, mkdir,
    mknodat, open, readlink, rename, rmdir, setxattr, symlink, unlink,
};
use rustix::io::{Errno, pread, pwrite};
use rustix::process::chdir;

#[derive(Parser)]
#[command(
    name = "file-cost",
    about = "Does each kind of operation to many files"
)]
struct Cli {
    /// An existing directory; what is made in it is removed again.
    dir: PathBuf,
    /// How many files each operation is done to.
    #[arg(long, default_value_t = 200)]
    files: u32,
}

/// An operation on the file of this name.
type Act = fn(&str) -> Result<(), Errno>;

/// The operations in their order: each finds what the ones before it left.
const ACTS: &[(&str, Act)] = &[
    ("create", |name| create(name).map(drop)),
    ("create-exists", |name| {
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        open(name, flags, Mode::from_raw_mode(0o644)).map(drop)
    }),
    ("stat", |name| lstat(name).map(drop)),
    ("stat-missing", |name| {
        match lstat(format!("{name}.missing")) {
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(Errno::EXIST),
        }
    }),
    ("open-read-close", |name| {
        let file = open(name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        pread(file, &mut [0; 100][..], 0).map(drop)
    }),
    ("open-fstat-close", |name| {
        let file = open(name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        fstat(file).map(drop)
    }),
    ("open-write-close", |name| {
        let file = open(name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        pwrite(file, &[7; 200], 0).map(drop)
    }),
    ("chmod", |name| chmod(name, Mode::from_raw_mode(0o600))),
    ("chown", |name| {
        chown(name, Some(Uid::from_raw(1)), Some(Gid::from_raw(1)))
    }),
    ("setxattr", |name| {
        setxattr(name, "user.cost", b"value", XattrFlags::empty())
    }),
    ("link", |name| link(name, format!("{name}.link"))),
    ("unlink-link", |name| unlink(format!("{name}.link"))),
    ("symlink", |name| symlink(name, format!("{name}.symlink"))),
    ("readlink", |name| {
        readlink(format!("{name}.symlink"), Vec::new()).map(drop)
    }),
    ("unlink-symlink", |name| unlink(format!("{name}.symlink"))),
    ("mknod", |name| {
        let mode = Mode::from_raw_mode(0o600);
        mknodat(CWD, format!("{name}.fifo"), FileType::Fifo, mode, 0)
    }),
    ("unlink-fifo", |name| unlink(format!("{name}.fifo"))),
    ("rename", |name| rename(name, format!("{name}.renamed"))),
    ("rename-over", |name| {
        create(name)?;
        rename(format!("{name}.renamed"), name)
    }),
    ("unlink", |name| unlink(name)),
    ("mkdir", |name| mkdir(name, Mode::from_raw_mode(0o755))),
    ("rmdir", |name| rmdir(name)),
];

fn create(name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    open(name, flags, Mode::from_raw_mode(0o644))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match measure(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err((step, error)) => {
            eprintln!("file-cost: {step}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(cli: &Cli) -> Result<(), (&'static str, Errno)> {
    chdir(&cli.dir).map_err(|error| ("change to the directory", error))?;
    let names: Vec<String> = (0..cli.files).map(|index| format!("f{index}")).collect();
    println!("begin");
    for (name, act) in ACTS {
        let done = names.iter().try_for_each(|file| act(file));
        done.map_err(|error| (*name, error))?;
        println!("{name}");
    }
    Ok(())
}
