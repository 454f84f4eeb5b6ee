//! `probe`: the container's half of the tests about files. Static, so it runs in any root file system.
//!
//! `make DIR COUNT` makes a tree, `list DIR` prints its manifest, `posix DIR` checks what POSIX promises as root,
//! `posix-user DIR` as somebody else, `open DIR COUNT` holds that many files open at once.

#![allow(clippy::panic, reason = "a failed expectation is how a check fails")]

mod posix;

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::process::ExitCode;

use caisson_tests::tree;
use rustix::process::{Resource, Rlimit, setrlimit};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["make", dir, count] => tree::make(Path::new(dir), count.parse().unwrap_or(0)),
        ["list", dir] => print_lines(&tree::manifest(Path::new(dir))),
        ["posix", dir] => posix::check(Path::new(dir), posix::AS_ROOT),
        ["posix-user", dir] => posix::check(Path::new(dir), posix::AS_USER),
        ["check", name, dir] => posix::check_one(name, Path::new(dir)),
        ["open", dir, count] => open(Path::new(dir), count.parse().unwrap_or(0)),
        _ => Err(io::Error::other(
            "usage: probe make|list|posix|posix-user|open DIR [COUNT]",
        )),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print_lines(lines: &[String]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    lines.iter().try_for_each(|line| writeln!(out, "{line}"))
}

/// Opens `count` files, all at once, and reads each back when all are open.
fn open(dir: &Path, count: usize) -> io::Result<()> {
    let limit = count as u64 + 100;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        },
    )?;
    let mut files = Vec::with_capacity(count);
    for index in 0..count {
        let sub = dir.join((index / 1000).to_string());
        if index % 1000 == 0 {
            fs::create_dir(&sub)?;
        }
        let path = sub.join(index.to_string());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        let mut file = file.map_err(|e| io::Error::other(format!("file {index}: {e}")))?;
        write!(file, "{index}")?;
        files.push(file);
    }
    for (index, file) in files.iter_mut().enumerate() {
        let mut text = String::new();
        file.rewind()?;
        file.read_to_string(&mut text)?;
        if text != index.to_string() {
            return Err(io::Error::other(format!("file {index} holds {text:?}")));
        }
    }
    println!("{} files open", files.len());
    Ok(())
}
