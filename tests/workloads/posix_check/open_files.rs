//! How many files can be open at once: creates them and keeps them open, writes and reads some through their own
//! descriptors and by name, and names the limit if one is met.
//!
//! Raises its own RLIMIT_NOFILE first: beyond the hard limit only with CAP_SYS_RESOURCE, and never beyond `fs.nr_open`.
//! Output is `open N of M` and, on failure, what stopped it. Exit status 0 if all were open at once and readable, else 1.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::act::{create, read_at, reader, write_at, writer};
use crate::verdict::{Fail, Verdict, equal, name};

/// Descriptors that are open besides: the standard ones and a few to spare.
const SPARE: u64 = 64;
/// Names in one directory.
const PER_DIRECTORY: usize = 1000;
/// Each how-manieth open file is read.
const SAMPLE: usize = 97;

/// Opens `count` files, of which `distinct` are different. They stay there with `keep`.
pub(crate) fn run(dir: &Path, count: usize, distinct: usize, keep: bool) -> ExitCode {
    raise_limit(count as u64 + SPARE);
    let result = env::set_current_dir(dir)
        .map_err(Fail::from)
        .and_then(|()| {
            fs::create_dir("open-files")?;
            env::set_current_dir("open-files")?;
            let result = hold(count, distinct.min(count));
            if !keep {
                env::set_current_dir("..")?;
                fs::remove_dir_all("open-files")?;
            }
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
    let mut held: Vec<OwnedFd> = Vec::with_capacity(count);
    for index in 0..count {
        let opened = if index < distinct {
            if index % PER_DIRECTORY == 0 {
                fs::create_dir(format!("{}", index / PER_DIRECTORY))?;
            }
            create(&path(index), 0o644)
        } else {
            writer(&path(index % distinct))
        };
        match opened {
            Ok(file) => held.push(file),
            Err(errno) => {
                // Naming the limit needs a descriptor or two.
                drop(held);
                return Err(Fail(format!("open {index} of {count}: {}", limit(errno))));
            }
        }
    }
    // Only now, when all are open, does each sample get something to hold.
    for index in (0..count).step_by(SAMPLE) {
        write_at(&held[index], 0, path(index).as_bytes())?;
    }
    for index in (0..count).step_by(SAMPLE) {
        // The last that was written, where several descriptors lead to one file.
        let last = (index..count)
            .step_by(SAMPLE)
            .rfind(|other| other % distinct == index % distinct);
        let expected = path(last.unwrap_or(index)).into_bytes();
        let through = read_at(&held[index], 0, expected.len())?;
        equal(
            format!("contents of open file {index}"),
            through,
            expected.clone(),
        )?;
        let name = path(index % distinct);
        let by_name = read_at(reader(&name)?, 0, expected.len())?;
        equal(format!("contents of {name}"), by_name, expected)?;
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
