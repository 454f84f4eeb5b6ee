//! A cgroup's files of the second version: what they say and how they are written.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use rustix::io::Errno;

use super::{COUNTING, ROOT, limits::Limit};

/// What the files of a cgroup say when it is removed.
pub(super) fn is_gone(error: &io::Error) -> bool {
    let codes = [Errno::NOENT, Errno::NODEV].map(|errno| Some(errno.raw_os_error()));
    codes.contains(&error.raw_os_error())
}

pub(super) fn rewound(mut file: &fs::File) -> io::Result<&fs::File> {
    use io::Seek;
    file.rewind()?;
    Ok(file)
}

/// Whether this host has the second version, and nothing else.
pub fn is_v2() -> bool {
    const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
    rustix::fs::statfs(ROOT).is_ok_and(|stat| u64::try_from(stat.f_type) == Ok(CGROUP2_SUPER_MAGIC))
}

pub(super) fn populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// The controllers that a cgroup with these limits needs.
pub(super) fn controllers(limits: &[Limit]) -> Vec<&'static str> {
    let mut all = COUNTING.to_vec();
    let named = limits
        .iter()
        .filter_map(|limit| limit.file.split('.').next());
    all.extend(named.filter(|name| !COUNTING.contains(name)));
    all.dedup();
    all
}

pub(super) fn hand_down(path: &Path, wanted: &[&str]) {
    let file = path.join("cgroup.subtree_control");
    let Ok(has) = fs::read_to_string(path.join("cgroup.controllers")) else {
        return;
    };
    let down = fs::read_to_string(&file).unwrap_or_default();
    let missing = missing(wanted, &has, &down);
    if !missing.is_empty() && write_existing(&file, &missing.concat()).is_err() {
        // One that the kernel refuses must not keep the others from being handed down.
        for controller in missing {
            drop(write_existing(&file, &controller));
        }
    }
}

/// What to write for the controllers that a cgroup has and does not hand down yet.
fn missing(wanted: &[&str], has: &str, down: &str) -> Vec<String> {
    let is_in = |words: &str, name: &str| words.split_whitespace().any(|word| word == name);
    let missing = wanted
        .iter()
        .filter(|name| is_in(has, name) && !is_in(down, name));
    missing.map(|name| format!("+{name} ")).collect()
}

/// Not `fs::write`: a cgroup's files are neither made nor truncated, and take a value in one write.
pub(super) fn write_existing(file: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(file)?;
    file.write_all(value.as_bytes())
}

/// Removes a cgroup and those below it. Their files go with them.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let listing = match fs::read_dir(path) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in listing {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match rustix::fs::rmdir(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wanted_there_and_missing_is_handed_down() {
        let all = missing(&COUNTING, "cpuset cpu io memory hugetlb pids\n", "memory\n");
        assert_eq!(all.concat(), "+cpu +io +pids ");
        assert!(missing(&COUNTING, "", "").is_empty());
    }

    #[test]
    fn a_limit_brings_its_controller() {
        let limit = |file| Limit {
            file,
            value: String::new(),
            first_version: Vec::new(),
        };
        assert_eq!(
            controllers(&[limit("memory.max"), limit("cpu.max")]),
            COUNTING
        );
        let sets = [limit("cpuset.cpus"), limit("cpuset.mems")];
        assert_eq!(
            controllers(&sets),
            ["cpu", "io", "memory", "pids", "cpuset"]
        );
    }
}
