//! cgroup v1: one directory in each of several hierarchies stands for a sandbox.
//!
//! Contract: the cgroup has the same place in every hierarchy that is mounted, `name=systemd` included (as in runc).
//! Hierarchies are looked for below `/sys/fs/cgroup` under the names of their controllers, where every init system mounts
//! them: the monitor's own list of mounts is not the host's (`view.rs`), its paths are. Without
//! a `cgroupsPath`, or with a relative one, that is below the caller's own cgroup in the [main](Tree::main) hierarchy, the
//! one for memory; the path there stands for all of them in state files. A hybrid host's cgroup v2 is not touched.
//! systemd makes a scope's cgroup in its own hierarchy and in those whose controllers it uses; [`Tree::make`] makes the rest.
//! Not here: which limits (`limits.rs`), when (`cgroup.rs`); how systemd is asked (`systemd.rs`).
//! Spec: Linux, Documentation/admin-guide/cgroup-v1; runc 1.1, libcontainer/cgroups/fs.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{CgroupError, is_gone, place, write_existing};
use crate::{state::ContainerId, stats::Files};

mod counters;

/// Who is in a cgroup; who writes 0 there goes in.
const PROCS: &str = "cgroup.procs";

/// Where a hybrid host has cgroup v2.
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// What a cgroup must have before a process may go into it, and does not have by itself.
const INHERITED: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// Its controllers, or `name=NAME`.
    names: Vec<String>,
    mount: PathBuf,
    /// The caller's own cgroup, relative to the mount.
    own: PathBuf,
}

impl Hierarchy {
    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }
}

/// One cgroup, in all hierarchies.
#[derive(Debug)]
pub(super) struct Tree {
    hierarchies: Vec<Hierarchy>,
    /// Below each mount.
    place: PathBuf,
}

impl Tree {
    /// The cgroup for a container, which need not exist. `None`: nothing is mounted.
    pub(super) fn of(asked: Option<&Path>, id: &ContainerId) -> Result<Option<Self>, CgroupError> {
        let hierarchies = mounted()?;
        let Some(main) = main(&hierarchies) else {
            return Ok(None);
        };
        let place = match asked {
            Some(path) if path.is_absolute() => place::below(path)?,
            Some(path) => main.own.join(place::below(path)?),
            None => main.own.join(id.as_str()),
        };
        Ok(Some(Self { hierarchies, place }))
    }

    /// The cgroup at a place below the root of every hierarchy, which need not exist.
    pub(super) fn below_root(place: &Path) -> Result<Self, CgroupError> {
        let (hierarchies, place) = (mounted()?, place.to_owned());
        let is_mounted = !hierarchies.is_empty();
        let tree = is_mounted.then_some(Self { hierarchies, place });
        tree.ok_or_else(none_mounted)
    }

    /// The cgroup whose directory in the main hierarchy is `path`.
    pub(super) fn at(path: &Path) -> Option<Self> {
        let hierarchies = mounted().ok()?;
        let place = path.strip_prefix(&main(&hierarchies)?.mount).ok()?;
        let place = place.to_owned();
        Some(Self { hierarchies, place })
    }

    /// Its directory in the hierarchy that stands for all.
    pub(super) fn main(&self) -> PathBuf {
        main(&self.hierarchies).map_or_else(PathBuf::new, |main| main.mount.join(&self.place))
    }

    fn dirs(&self) -> impl Iterator<Item = PathBuf> {
        let dirs = self.hierarchies.iter();
        dirs.map(|hierarchy| hierarchy.mount.join(&self.place))
    }

    /// Makes it; what was made is told one by one, outermost first, even if a later step fails.
    pub(super) fn make(&self, made: &mut Vec<PathBuf>) -> Result<(), CgroupError> {
        for hierarchy in &self.hierarchies {
            let mut path = hierarchy.mount.clone();
            for part in self.place.components() {
                path.push(part);
                match fs::create_dir(&path) {
                    Ok(()) => made.push(path.clone()),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(source) => return Err(failed("make", &path, source)),
                }
                if hierarchy.has("cpuset") {
                    inherit(&path).map_err(|source| failed("prepare", &path, source))?;
                }
            }
        }
        Ok(())
    }

    /// Writes a control file, which its controller's hierarchy has.
    pub(super) fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let write = |file: &str| {
            let path = self.file(file);
            write_existing(&path, value).map_err(|source| CgroupError::Limit {
                path,
                value: value.to_owned(),
                source,
            })
        };
        if file == "blkio.weight" && !self.file(file).exists() {
            // Kernels without CFQ.
            return write("blkio.bfq.weight");
        }
        write(file)
    }

    /// A control file's text.
    pub(super) fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.file(file)).ok()
    }

    /// Where a control file is: its name begins with its controller's.
    fn file(&self, file: &str) -> PathBuf {
        let controller = file.split('.').next().unwrap_or_default();
        let hierarchy = self.hierarchies.iter().find(|one| one.has(controller));
        // A controller that is not mounted has no files, and the error names the one that is missed.
        let mount = hierarchy.map_or(Path::new("/sys/fs/cgroup").join(controller), |one| {
            one.mount.clone()
        });
        mount.join(&self.place).join(file)
    }

    /// Its counters, by the names of cgroup v2.
    pub(super) fn counters(&self) -> Files {
        let names = counters::FILES.iter();
        let texts = names.filter_map(|name| Some((*name, self.read(name)?)));
        let texts: HashMap<&str, String> = texts.collect();
        counters::translate(&texts)
    }

    /// Moves the calling process into it.
    pub(super) fn join(&self) -> Result<(), CgroupError> {
        for dir in self.dirs() {
            write_existing(&dir.join(PROCS), "0").map_err(|source| failed("join", &dir, source))?;
        }
        Ok(())
    }

    /// Open files; a process that writes 0 into each of them is in it.
    pub(super) fn doors(&self) -> io::Result<Vec<OwnedFd>> {
        self.dirs()
            .map(|dir| {
                let file = fs::OpenOptions::new().write(true).open(dir.join(PROCS))?;
                Ok(file.into())
            })
            .collect()
    }

    /// Whether there is a process in it or below.
    pub(super) fn is_populated(&self) -> Result<bool, CgroupError> {
        let main = self.main();
        processes(&main)
            .map(|all| !all.is_empty())
            .map_err(|source| failed("examine", &main, source))
    }

    /// Waits until nobody is in it who is now; `false`: somebody stays that long.
    pub(super) fn empties(&self, patience: Duration) -> Result<bool, CgroupError> {
        let deadline = Instant::now() + patience;
        let main = self.main();
        let inside = processes(&main).map_err(|source| failed("examine", &main, source))?;
        let named = |pid: Pid| pidfd_open(pid, PidfdFlags::empty()).ok();
        Ok(inside
            .into_iter()
            .filter_map(named)
            .all(|process| ends(&process, deadline)))
    }

    /// Removes it when nobody is in it. Already gone: fine.
    pub(super) fn remove(&self) -> Result<(), CgroupError> {
        for dir in self.dirs() {
            super::remove_tree(&dir).map_err(|source| failed("remove", &dir, source))?;
        }
        Ok(())
    }

    /// Kills what is in it and waits until that is gone. There is no file for it: every process is named by a descriptor first, and killed if it is still there then.
    pub(super) fn kill(&self, patience: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + patience;
        let main = self.main();
        let listed = || processes(&main).map_err(|source| failed("examine", &main, source));
        loop {
            let named: Vec<_> = listed()?
                .into_iter()
                .filter_map(|pid| Some((pid, pidfd_open(pid, PidfdFlags::empty()).ok()?)))
                .collect();
            let still = listed()?;
            if still.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(CgroupError::Stuck { path: main });
            }
            let named = named.iter().filter(|(pid, _)| still.contains(pid));
            let named: Vec<_> = named.map(|(_, process)| process).collect();
            for process in &named {
                // Fails only if it has ended already. KVM's thread for a machine ends with that.
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            if !named.iter().all(|process| ends(process, deadline)) {
                return Err(CgroupError::Stuck { path: main });
            }
        }
    }
}

/// Waits for the end of a process.
fn ends(process: &OwnedFd, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let Ok(timeout) = Timespec::try_from(left) else {
        return false;
    };
    let mut watched = [PollFd::new(process, PollFlags::IN)];
    retry_on_intr(|| poll(&mut watched, Some(&timeout))).is_ok_and(|ready| ready > 0)
}

/// The files by which this process goes back to where it is now; that of a hybrid host's cgroup v2, by which systemd
/// knows whose a process is, is one of them.
pub(super) fn way_back() -> Vec<PathBuf> {
    let hierarchies = mounted().unwrap_or_default();
    let back = |one: &Hierarchy| one.mount.join(&one.own).join(PROCS);
    let second = place::own().map(|own| Path::new(UNIFIED).join(own).join(PROCS));
    let second = second.into_iter().filter(|file| file.exists());
    hierarchies.iter().map(back).chain(second).collect()
}

fn main(hierarchies: &[Hierarchy]) -> Option<&Hierarchy> {
    let memory = hierarchies.iter().find(|one| one.has("memory"));
    memory.or(hierarchies.first())
}

fn mounted() -> Result<Vec<Hierarchy>, CgroupError> {
    let file = Path::new("/proc/self/cgroup");
    let text = fs::read_to_string(file).map_err(|source| failed("read", file, source))?;
    Ok(hierarchies(&text, super::ROOT.as_ref()))
}

/// The hierarchies of cgroup v1 in a `/proc/PID/cgroup` (cgroups(7)) that are mounted below `root`.
fn hierarchies(proc_self_cgroup: &str, root: &Path) -> Vec<Hierarchy> {
    let hierarchy = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (names, own) = rest.split_once(':')?;
        // The line of cgroup v2 has none.
        let first = names.split(',').next().filter(|name| !name.is_empty())?;
        let dirs = [names, first].map(|dir| dir.strip_prefix("name=").unwrap_or(dir));
        let mut mounts = dirs.map(|dir| root.join(dir)).into_iter();
        Some(Hierarchy {
            names: names.split(',').map(str::to_owned).collect(),
            mount: mounts.find(|dir| dir.join(PROCS).exists())?,
            own: own.trim_start_matches('/').into(),
        })
    };
    proc_self_cgroup.lines().filter_map(hierarchy).collect()
}

/// Gives a cgroup of a cpuset hierarchy the processors and nodes of its parent if it has none.
fn inherit(path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    for file in INHERITED {
        if fs::read_to_string(path.join(file))?.trim().is_empty() {
            let above = fs::read_to_string(parent.join(file))?;
            write_existing(&path.join(file), above.trim())?;
        }
    }
    Ok(())
}

/// The processes in a cgroup and below; none if it is gone.
fn processes(path: &Path) -> io::Result<Vec<Pid>> {
    let text = match fs::read_to_string(path.join(PROCS)) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let numbers = text.lines().filter_map(|line| line.parse().ok());
    let mut all: Vec<Pid> = numbers.filter_map(Pid::from_raw).collect();
    let listing = match fs::read_dir(path) {
        Ok(listing) => listing,
        // systemd removes a scope as soon as it is empty.
        Err(error) if is_gone(&error) => return Ok(all),
        Err(error) => return Err(error),
    };
    for entry in listing {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            all.extend(processes(&entry.path())?);
        }
    }
    Ok(all)
}

fn failed(step: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}

/// The error of a host that mounts no hierarchy at all.
pub(super) fn none_mounted() -> CgroupError {
    let source = Errno::NOENT.into();
    failed(
        "find a hierarchy of cgroups at",
        super::ROOT.as_ref(),
        source,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "\
9:name=systemd:/s/t
8:pids:/not/mounted
3:cpu,cpuacct:/
2:memory:/user/a
0::/unified
";

    #[test]
    fn what_is_mounted_is_found_and_memorys_is_the_main_one() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["systemd", "cpu,cpuacct", "memory"] {
            fs::create_dir(root.path().join(dir)).unwrap();
            fs::write(root.path().join(dir).join(PROCS), "").unwrap();
        }
        let all = hierarchies(OWN, root.path());
        let names: Vec<_> = all.iter().map(|one| one.names.join("+")).collect();
        assert_eq!(names, ["name=systemd", "cpu+cpuacct", "memory"]);
        let main = main(&all).unwrap();
        assert_eq!(main.mount, root.path().join("memory"));
        assert_eq!(main.own, Path::new("user/a"));
        assert!(hierarchies(OWN, Path::new("/nonexistent")).is_empty());
    }

    fn tree(root: &Path) -> Tree {
        let hierarchy = |name: &str| Hierarchy {
            names: vec![name.to_owned()],
            mount: root.join(name),
            own: PathBuf::new(),
        };
        Tree {
            hierarchies: vec![hierarchy("cpu"), hierarchy("memory")],
            place: "pod/c1".into(),
        }
    }

    #[test]
    fn it_is_made_in_every_hierarchy_and_its_files_are_found_by_controller() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cpu", "memory"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let tree = tree(root.path());
        let mut made = Vec::new();
        tree.make(&mut made).unwrap();
        assert_eq!(made.len(), 4);
        assert_eq!(tree.main(), root.path().join("memory/pod/c1"));
        assert_eq!(
            tree.file("cpu.shares"),
            root.path().join("cpu/pod/c1/cpu.shares")
        );
        let error = tree.write("pids.max", "1").unwrap_err();
        assert!(
            error.to_string().contains("/sys/fs/cgroup/pids/"),
            "{error}"
        );
        tree.kill(Duration::ZERO).unwrap();
        tree.remove().unwrap();
        assert!(!tree.main().exists());
    }
}
