//! What a host looks like: everything a runtime could leave behind, as one set of lines.
//!
//! Two snapshots are compared line by line; a line says what kind of thing it is. Kernel threads, zombies that PID 1 is
//! about to reap and the test's own threads are not part of it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Directories in which a runtime might leave files; the tests' own scratch directory is not below them.
const WATCHED: &[&str] = &["/run", "/tmp", "/var", "/dev", "/etc", "/root"];

/// The host at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at processes, namespaces, mounts, cgroups, network interfaces, named sockets and files.
    pub fn take() -> Self {
        let mut lines = BTreeSet::new();
        for process in processes() {
            lines.extend(
                process
                    .namespaces
                    .iter()
                    .map(|ns| format!("namespace {ns}")),
            );
            lines.insert(format!("process {} {}", process.pid, process.command));
        }
        lines.extend(mounts().map(|mount| format!("mount {mount}")));
        directories("/sys/fs/cgroup".as_ref(), &mut |path| {
            lines.insert(format!("cgroup {}", path.display()));
        });
        for name in names("/sys/class/net") {
            lines.insert(format!("interface {name}"));
        }
        for table in ["/proc/net/unix", "/proc/net/packet", "/proc/net/vsock"] {
            lines.extend(sockets(table));
        }
        for dir in WATCHED {
            files(dir.as_ref(), &mut lines);
        }
        Self(lines)
    }

    /// What is there now and was not before, and what is gone.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let new = self.0.difference(&before.0).map(|line| format!("+ {line}"));
        let gone = before.0.difference(&self.0).map(|line| format!("- {line}"));
        new.chain(gone).collect()
    }
}

/// A process of the host, as far as the tests look at it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's number.
    pub parent: i32,
    /// The file name of its program.
    pub name: String,
    /// Its arguments, joined with spaces.
    pub command: String,
    /// Its namespaces, as `mnt:[4026531840]`.
    pub namespaces: Vec<String>,
}

/// All processes except kernel threads, zombies that belong to PID 1, and this one.
pub fn processes() -> Vec<Process> {
    names("/proc")
        .filter_map(|name| process(name.parse().ok()?))
        .collect()
}

/// Processes below `ancestor`, nearest first.
pub fn descendants(ancestor: i32) -> Vec<Process> {
    let all = processes();
    let mut found: Vec<Process> = Vec::new();
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        for process in all.iter().filter(|process| process.parent == parent) {
            parents.push(process.pid);
            found.push(process.clone());
        }
    }
    found
}

fn process(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let (state, parent) = (fields.next()?, fields.next()?.parse().ok()?);
    let is_kernels = pid == 2 || parent == 2;
    let is_being_reaped = state == "Z" && parent == 1;
    if is_kernels || is_being_reaped || pid.cast_unsigned() == std::process::id() {
        return None;
    }
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let name = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command)
        .replace('\0', " ")
        .trim()
        .to_owned();
    let namespaces = names(format!("/proc/{pid}/ns"));
    let namespaces = namespaces.filter_map(|name| {
        let link = fs::read_link(format!("/proc/{pid}/ns/{name}")).ok()?;
        Some(link.to_string_lossy().into_owned())
    });
    Some(Process {
        pid,
        parent,
        name,
        command,
        namespaces: namespaces.collect(),
    })
}

/// Mount points with type and source, without the numbers that differ from boot to boot.
fn mounts() -> impl Iterator<Item = String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let lines: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let place: Vec<&str> = place.split(' ').collect();
            Some(format!("{} {} {kind}", place.get(3)?, place.get(4)?))
        })
        .collect();
    lines.into_iter()
}

/// Sockets with a name or a protocol, without inode numbers.
fn sockets(table: &str) -> Vec<String> {
    let text = fs::read_to_string(table).unwrap_or_default();
    let named = text.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let name = if table.ends_with("unix") {
            fields.get(7)?
        } else {
            fields.get(2)?
        };
        Some(format!("socket {table} {name}"))
    });
    named.collect()
}

fn names(dir: impl AsRef<Path>) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn directories(dir: &Path, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found(&entry.path());
            directories(&entry.path(), found);
        }
    }
}

/// Files below `dir` on the same file system, so not the shares.
fn files(dir: &Path, lines: &mut BTreeSet<String>) {
    let device = |path: &Path| {
        fs::symlink_metadata(path)
            .map(|metadata| metadata.dev())
            .ok()
    };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path == Path::new("/run/mount") {
            continue; // made by mount(8) when it is first used
        }
        lines.insert(format!("file {}", path.display()));
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir && device(&path) == device(dir) {
            files(&path, lines);
        }
    }
}
