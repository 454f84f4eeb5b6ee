//! How many files can be open at once: opens them, reads some through their own descriptors, and names the limit if one is met.
//!
//! Raises its own RLIMIT_NOFILE first: beyond the hard limit only with CAP_SYS_RESOURCE, and never beyond `fs.nr_open`.
//! Output is `open N of M` and, on failure, what stopped it. Exit status 0 if all were open at once and readable, else 1.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::act::{put, read_at, reader};
use crate::verdict::{Fail, Verdict, equal, name};

/// Descriptors that are open besides: the standard ones and a few to spare.
const SPARE: u64 = 64;
/// Names in one directory.
const PER_DIRECTORY: usize = 1000;
/// Each how-manieth open file is read.
const SAMPLE: usize = 97;

/// Opens `count` files, of which `distinct` are different.
pub(crate) fn run(dir: &Path, count: usize, distinct: usize) -> ExitCode {
    raise_limit(count as u64 + SPARE);
    let result = env::set_current_dir(dir)
        .map_err(Fail::from)
        .and_then(|()| {
            fs::create_dir("open-files")?;
            env::set_current_dir("open-files")?;
            let result = hold(count, distinct.min(count));
            env::set_current_dir("..")?;
            fs::remove_dir_all("open-files")?;
            result
        });
    match result {
        Ok(()) => {
            println!("open {count} of {count}");
            ExitCode::SUCCESS
        }
        Err(Fail(message)) => {
            println!("not ok open-files: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Raises the limit as far as it goes; what is not reached shows when the files are opened.
fn raise_limit(wanted: u64) {
    let ceiling = fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let wanted = wanted.min(ceiling.unwrap_or(u64::MAX));
    let held = getrlimit(Resource::Nofile);
    let both = Rlimit {
        current: Some(wanted),
        maximum: Some(held.maximum.unwrap_or(u64::MAX).max(wanted)),
    };
    if held.current.is_some_and(|current| current < wanted)
        && setrlimit(Resource::Nofile, both).is_err()
    {
        let hard = Rlimit {
            current: held.maximum,
            maximum: held.maximum,
        };
        // The soft limit may always rise to the hard one; if even that fails, opening says so.
        let _ = setrlimit(Resource::Nofile, hard);
    }
}

fn path(index: usize) -> String {
    format!("{}/{index}", index / PER_DIRECTORY)
}

fn hold(count: usize, distinct: usize) -> Verdict {
    for index in 0..distinct {
        if index % PER_DIRECTORY == 0 {
            fs::create_dir(format!("{}", index / PER_DIRECTORY))?;
        }
        put(&path(index), index.to_string().as_bytes())?;
    }
    let mut open: Vec<OwnedFd> = Vec::with_capacity(count);
    for index in 0..count {
        match reader(&path(index % distinct)) {
            Ok(file) => open.push(file),
            Err(errno) => {
                // Naming the limit needs a descriptor or two.
                drop(open);
                return Err(Fail(format!("open {index} of {count}: {}", limit(errno))));
            }
        }
    }
    for index in (0..count).step_by(SAMPLE) {
        let expected = (index % distinct).to_string().into_bytes();
        equal(
            format!("contents of open file {index}"),
            read_at(&open[index], 0, 20)?,
            expected,
        )?;
    }
    Ok(())
}

/// Which limit an error of `open` means.
fn limit(errno: Errno) -> String {
    let soft = getrlimit(Resource::Nofile)
        .current
        .map_or("unlimited".to_owned(), |limit| limit.to_string());
    let sysctl = |name: &str| {
        fs::read_to_string(format!("/proc/sys/fs/{name}"))
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let which = match errno {
        Errno::MFILE => format!(
            "RLIMIT_NOFILE is {soft}, fs.nr_open is {}",
            sysctl("nr_open")
        ),
        Errno::NFILE => format!(
            "fs.file-max is {}, or the server of the file system has no more",
            sysctl("file-max")
        ),
        Errno::NOMEM => "no memory".to_owned(),
        _ => "not a limit of this side".to_owned(),
    };
    format!("{}: {which}", name(errno))
}
