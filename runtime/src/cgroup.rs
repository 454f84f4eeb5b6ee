//! The cgroup on the host that holds a sandbox's monitor and VMM.
//!
//! Contract: made below the cgroup v2 mount at the place that `linux.cgroupsPath` names (without one: beside the
//! caller's own cgroup, under the container's ID, as runc does), limited by `limits.rs`, joined by the monitor before
//! it starts the VMM, which inherits it, and removed by `delete` with whatever process is left in it. Dropping a made
//! cgroup removes it again until [`HostCgroup::keep`].
//! On a host with cgroup v1 it is one in each hierarchy (`v1.rs`).
//! With `--systemd-cgroup` systemd makes it: a transient scope, which the monitor is in from the beginning; with cgroup v1
//! the hierarchies of which systemd knows nothing follow.
//! Where the caller may do without rights (`rootless.rs`) and asks neither for limits nor for a place, a sandbox whose
//! cgroup cannot be made goes without one.
//! A populated cgroup is never taken over: what is in it belongs to somebody else.
//! Not here: the container's own limits, which hold in the guest.
//! Spec: Linux, Documentation/admin-guide/cgroup-v2.rst; runc 1.1, libcontainer/cgroups/fs2.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use oci_spec::runtime::LinuxResources;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::retry_on_intr,
};
use serde::{Deserialize, Serialize};

use crate::{
    rootless::Rootless,
    sizing::VmSize,
    stats::{self, Files, Stats, StatsError},
};

mod error;
mod files;
mod limits;
mod place;
mod properties;
mod scope;
mod site;
mod systemd;
mod v1;

use files::{controllers, hand_down, is_gone, populated, remove_tree, rewound, write_existing};

pub use error::CgroupError;
pub use files::is_v2;
pub use limits::{HOST_OVERHEAD, Limit};
pub use site::{Note, Site};
pub use systemd::SystemdError;

/// Where the one hierarchy of cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Controllers that are handed down to every sandbox's cgroup, where the host has them: they also count what it uses.
/// `cpuset` counts nothing and its first user makes the kernel patch itself, so it is handed down only for a limit.
const COUNTING: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// How long killed processes may take to leave a cgroup.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);

/// What is to be written on the host when a container's limits change to `all`; `change` says which.
pub fn limits_of_change(change: &LinuxResources, all: &LinuxResources, size: VmSize) -> Vec<Limit> {
    limits::of_change(change, all, size)
}

/// Whether a `cgroupsPath` is in the form that systemd's cgroups have: it means nothing else.
pub fn is_unit_path(asked: &Path) -> bool {
    scope::is_unit_path(asked)
}

/// How a caller wants cgroups made.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Terms {
    /// By systemd, which `cgroupsPath` is then a word for.
    pub systemd: bool,
    /// Whether there may be none for want of rights.
    pub rootless: Rootless,
}

/// How a process gets into a cgroup.
#[derive(Debug)]
pub enum Entry {
    /// It is born there: the directory, of cgroup v2.
    Directory(OwnedFd),
    /// It writes 0 into each: the files `cgroup.procs` of cgroup v1.
    Doors(Vec<OwnedFd>),
}

/// A version of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    First,
    Second,
}

/// The files by which this process, if it is moved, comes back to where it is now.
pub fn way_back() -> Vec<PathBuf> {
    if !is_v2() {
        return v1::way_back();
    }
    let own = place::own().map(|own| Path::new(ROOT).join(own).join("cgroup.procs"));
    own.into_iter().collect()
}

/// The cgroup of one sandbox.
#[derive(Debug)]
pub struct HostCgroup {
    path: PathBuf,
    /// All of it on a host with cgroup v1, where `path` is that in the hierarchy for memory.
    first: Option<v1::Tree>,
    /// systemd's name for it, if it is systemd's.
    unit: Option<String>,
    /// Directories that making it made, outermost first; removed on drop.
    made: Vec<PathBuf>,
    /// The files by which this process goes back to where it came from into a scope; on drop it does, and the scope ends.
    way_back: Vec<PathBuf>,
}

impl HostCgroup {
    /// Names the cgroup of an existing container, as its state file has it: the directory, and systemd's unit if it is
    /// one.
    pub fn at(path: PathBuf, unit: Option<String>) -> Self {
        let first = if is_v2() { None } else { v1::Tree::at(&path) };
        Self {
            path,
            first,
            unit,
            made: Vec::new(),
            way_back: Vec::new(),
        }
    }

    /// systemd's name for it, if it is systemd's.
    pub fn unit(&self) -> Option<&str> {
        self.unit.as_deref()
    }

    /// Its directory; with cgroup v1 that in the hierarchy for memory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How a child of this process gets into it.
    pub fn entry(&self) -> io::Result<Entry> {
        if let Some(tree) = &self.first {
            return Ok(Entry::Doors(tree.doors()?));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.path, flags, Mode::empty())?;
        Ok(Entry::Directory(directory))
    }

    /// Changes limits, all or none; answers what was there before.
    pub fn change(&self, limits: &[Limit]) -> Result<Vec<Limit>, CgroupError> {
        match &self.unit {
            Some(unit) => {
                systemd::change(unit, &properties::of_limits(limits, self.version()))?;
            }
            None if self.first.is_none() => self.hand_down_to(&controllers(limits)),
            None => {}
        }
        let mut before: Vec<Limit> = Vec::new();
        for limit in limits {
            let old = self.current(limit);
            if let Err(refused) = self.limit(std::slice::from_ref(limit)) {
                self.change_back(&before);
                return Err(refused);
            }
            before.extend(old);
        }
        Ok(before)
    }

    fn version(&self) -> Version {
        let first = self.first.as_ref();
        first.map_or(Version::Second, |_| Version::First)
    }

    /// What holds at present where a limit is going to be written.
    fn current(&self, limit: &Limit) -> Option<Limit> {
        let text = |text: String| text.trim_end().to_owned();
        let file = limit.file;
        let Some(tree) = &self.first else {
            let value = fs::read_to_string(self.path.join(file)).ok().map(text)?;
            return Some(Limit {
                file,
                value,
                first_version: Vec::new(),
            });
        };
        let files = limit.first_version.iter();
        let old = files.filter_map(|(file, _)| Some((*file, tree.read(file).map(text)?)));
        Some(Limit {
            file,
            value: String::new(),
            first_version: old.collect(),
        })
    }

    /// Has a limit of memory, if there is one, let a machine of that size live.
    pub fn make_room(&self, size: VmSize) -> Result<(), CgroupError> {
        let limit = limits::of_memory(Some(limits::machine_memory(size)));
        let old = self.current(&limit);
        let number = old.as_ref().and_then(|old| {
            let first = old.first_version.first().map(|(_, value)| value);
            first.unwrap_or(&old.value).parse::<u64>().ok()
        });
        match number {
            Some(old) if old < limits::machine_memory(size) => self.change(&[limit]).map(drop),
            // Large enough, or none.
            _ => Ok(()),
        }
    }

    /// Undoes a change, as far as that is possible: the error that led here is the one to report.
    pub fn change_back(&self, before: &[Limit]) {
        if let Some(unit) = &self.unit {
            let _ = systemd::change(unit, &properties::of_limits(before, self.version()));
        }
        for old in before.iter().rev() {
            let _ = self.limit(std::slice::from_ref(old));
        }
    }

    /// Has all cgroups above it hand controllers down, as far as they have them.
    fn hand_down_to(&self, controllers: &[&str]) {
        let inner = self.path.strip_prefix(ROOT).unwrap_or(Path::new(""));
        let mut above = PathBuf::from(ROOT);
        for part in inner.components() {
            hand_down(&above, controllers);
            above.push(part);
        }
    }

    /// What the whole sandbox uses on the host.
    pub fn stats(&self) -> Result<Stats, StatsError> {
        if let Some(tree) = &self.first {
            return Stats::parse(&tree.counters());
        }
        let read = |&name: &&str| {
            Some((
                name.to_owned(),
                fs::read_to_string(self.path.join(name)).ok()?,
            ))
        };
        Stats::parse(&stats::FILES.iter().filter_map(read).collect::<Files>())
    }

    /// Moves the calling process into it.
    pub fn join(&self) -> Result<(), CgroupError> {
        if let Some(tree) = &self.first {
            return tree.join();
        }
        self.write("cgroup.procs", "0")
            .map_err(|source| self.failed("join", source))
    }

    /// Takes this process out of the scope that it was needed for to make it, once another process is there.
    pub fn leave(&self) -> Result<(), CgroupError> {
        let back = |file: &PathBuf| {
            write_existing(file, "0").map_err(|source| CgroupError::Io {
                step: "go back by",
                path: file.clone(),
                source,
            })
        };
        // One that fails must not keep this process in the others.
        let went: Vec<_> = self.way_back.iter().map(back).collect();
        went.into_iter().collect()
    }

    /// It stays when the value is dropped. Returns its directory.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        self.made.clear();
        self.way_back.clear();
        std::mem::take(&mut self.path)
    }

    /// Kills what is left in it and removes it. Already gone: fine. Waits until the killed processes have left.
    pub fn remove(self) -> Result<(), CgroupError> {
        if let Some(tree) = &self.first {
            tree.kill(LEAVE_LIMIT)?;
            if let Some(unit) = &self.unit {
                systemd::stop(unit)?;
            }
            return tree.remove();
        }
        if self.path.exists() {
            match self.write("cgroup.kill", "1") {
                Ok(()) => {}
                Err(error) if is_gone(&error) => {}
                Err(source) => return Err(self.failed("kill the processes of", source)),
            }
            self.wait_until_empty()?;
        }
        if let Some(unit) = &self.unit {
            systemd::stop(unit)?;
        }
        remove_tree(&self.path).map_err(|source| self.failed("remove", source))
    }

    /// Removes what somebody has died in making, if it was made: as [`HostCgroup::remove`], except that one in which there
    /// are processes is another's and stays.
    fn remove_unless_used(self) -> Result<(), CgroupError> {
        // He may still be leaving it.
        let is_used = match &self.first {
            Some(tree) => !tree.empties(LEAVE_LIMIT)?,
            None => match self.wait_until_empty() {
                Ok(()) => false,
                Err(CgroupError::Stuck { .. }) => true,
                Err(error) => return Err(error),
            },
        };
        if is_used { Ok(()) } else { self.remove() }
    }

    fn limit(&self, limits: &[limits::Limit]) -> Result<(), CgroupError> {
        for limit in limits {
            if let Some(tree) = &self.first {
                let mut files = limit.first_version.iter();
                files.try_for_each(|(file, value)| tree.write(file, value))?;
                continue;
            }
            self.write(limit.file, &limit.value)
                .map_err(|source| CgroupError::Limit {
                    path: self.path.join(limit.file),
                    value: limit.value.clone(),
                    source,
                })?;
        }
        Ok(())
    }

    fn is_populated(&self) -> Result<bool, CgroupError> {
        fs::read_to_string(self.path.join("cgroup.events"))
            .map(|events| populated(&events))
            .map_err(|source| self.failed("examine", source))
    }

    /// The kernel announces a change of `cgroup.events` as a priority event on the open file.
    fn wait_until_empty(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let events = match fs::File::open(&path) {
            Ok(events) => events,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(source) => return Err(self.failed("watch", source)),
        };
        let timeout = Timespec {
            tv_sec: i64::try_from(LEAVE_LIMIT.as_secs()).unwrap_or(10),
            tv_nsec: 0,
        };
        loop {
            match rewound(&events).and_then(io::read_to_string) {
                Ok(text) if !populated(&text) => return Ok(()),
                // systemd removes a scope as soon as it is empty.
                Err(error) if is_gone(&error) => return Ok(()),
                Err(source) => return Err(self.failed("watch", source)),
                Ok(_) => {}
            }
            let mut watched = [PollFd::new(&events, PollFlags::PRI)];
            let changes = retry_on_intr(|| poll(&mut watched, Some(&timeout)))
                .map_err(|errno| self.failed("watch", errno.into()))?;
            if changes == 0 {
                return Err(CgroupError::Stuck {
                    path: self.path.clone(),
                });
            }
        }
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        write_existing(&self.path.join(file), value)
    }

    fn failed(&self, step: &'static str, source: io::Error) -> CgroupError {
        CgroupError::Io {
            step,
            path: self.path.clone(),
            source,
        }
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        // systemd ends a scope by killing what is in it.
        if let Some(unit) = &self.unit
            && !self.way_back.is_empty()
            && self.leave().is_ok()
        {
            let _ = systemd::stop(unit);
        }
        // The error that led here is the one to report; a parent that others use meanwhile stays.
        for path in self.made.iter().rev() {
            drop(fs::remove_dir(path));
        }
    }
}
