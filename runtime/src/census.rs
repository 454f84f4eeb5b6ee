//! Who is here: the sandboxes that live on this host, whichever door they came in by.
//!
//! Contract: found by the processes that hold them (a monitor, a shim's server), which keep the directory of their
//! container open and locked; there is no list on disk that could be stale. Each is asked over the control socket in
//! that directory, reached through the process's own descriptor, so that neither its mount namespace nor the name of the
//! directory matters. A process that ends meanwhile, or does not answer in time, is passed over.
//! Not here: containers that have stopped, which nobody holds (`state.rs`).

use std::{
    fs,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    control::{Answer, Control, ControlError, Request, attached},
    network::Namespace,
    state::State,
    stats::Stats,
};

/// How long a holder may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The programs that hold sandboxes.
const PROGRAMS: [&str; 2] = ["caisson", "containerd-shim-caisson-v2"];

/// The largest answer, in bytes: far more than a pod of a hundred containers needs.
const MAX_ANSWER_BYTES: u64 = 16 << 20;

/// A container that lives.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Resident {
    /// As `state` tells it.
    pub state: State,
    /// The container that brought the virtual machine: the pod's sandbox, or the container itself.
    pub pod: String,
    /// What it uses, by the guest's count; `None`: not asked for, or not running.
    pub guest: Option<Box<Stats>>,
}

/// What a holder tells.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Household {
    /// Its containers.
    pub residents: Vec<Resident>,
    /// What the whole sandbox uses, by the host's count; `None`: not asked for, or without a cgroup of its own.
    pub host: Option<Box<Stats>>,
}

/// A process that holds a sandbox, or a container in another's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// The directory in which it has its container's: the state root, or containerd's.
    pub root: PathBuf,
    /// Its container's directory, by its descriptor.
    door: PathBuf,
}

/// Finds the holders among this host's processes, in the order of their pids.
pub fn holders() -> Vec<Holder> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut found: Vec<_> = pids
        .filter_map(|pid| holder(Path::new("/proc"), pid))
        .collect();
    found.sort_unstable_by_key(|holder| holder.pid);
    found
}

fn holder(proc: &Path, pid: u32) -> Option<Holder> {
    let process = proc.join(pid.to_string());
    let program = fs::read_link(process.join("exe")).ok()?;
    if !is_ours(&program) {
        return None;
    }
    let fds = fs::read_dir(process.join("fd")).ok()?;
    let mut doors = fds.flatten().map(|entry| entry.path());
    let door = doors.find(|door| door.join(crate::control::SOCKET).exists())?;
    Some(Holder {
        pid,
        root: fs::read_link(&door).ok()?.parent()?.to_owned(),
        door,
    })
}

/// A program may have been replaced by a newer one since it was started.
fn is_ours(program: &Path) -> bool {
    let name = program.file_name().and_then(|name| name.to_str());
    let name = name.map(|name| name.strip_suffix(" (deleted)").unwrap_or(name));
    name.is_some_and(|name| PROGRAMS.contains(&name))
}

impl Holder {
    /// The sandbox's network namespace.
    pub fn network(&self) -> std::io::Result<Namespace> {
        Namespace::of(self.pid, &self.door)
    }

    /// Asks who lives there, and if `count` what they use.
    pub fn ask(&self, count: bool) -> Result<Household, ControlError> {
        let control = Control::connect(&self.door)?;
        control.set_patience(PATIENCE)?;
        match control.ask(&Request::Census { count }, &[])? {
            (Answer::Census, fds) => read(fds),
            _ => Err(ControlError::Unexpected),
        }
    }
}

/// The answer, as the file that is attached to it.
pub(crate) fn file_of(household: &Household) -> std::io::Result<fs::File> {
    attached(&serde_json::to_vec(household)?)
}

fn read(fds: Vec<OwnedFd>) -> Result<Household, ControlError> {
    let file = fds.into_iter().next().ok_or(ControlError::Unexpected)?;
    let mut bytes = Vec::new();
    let read = fs::File::from(file)
        .take(MAX_ANSWER_BYTES)
        .read_to_end(&mut bytes);
    read.map_err(|_| ControlError::Unexpected)?;
    serde_json::from_slice(&bytes).map_err(|_| ControlError::Unexpected)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_replaced_program_is_still_ours_and_others_are_not() {
        for (program, ours) in [
            ("/usr/bin/caisson", true),
            ("/usr/bin/caisson (deleted)", true),
            ("/x/containerd-shim-caisson-v2", true),
            ("/usr/lib/caisson/caisson-vmm", false),
            ("/", false),
        ] {
            assert_eq!(is_ours(Path::new(program)), ours, "{program}");
        }
    }

    #[test]
    fn a_holder_is_known_by_the_directory_that_it_keeps_open() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("root/c1");
        fs::create_dir_all(&bundle).unwrap();
        let process = dir.path().join("7");
        fs::create_dir_all(process.join("fd")).unwrap();
        symlink("/usr/bin/caisson", process.join("exe")).unwrap();
        symlink("/dev/null", process.join("fd/0")).unwrap();
        symlink(&bundle, process.join("fd/5")).unwrap();
        assert_eq!(holder(dir.path(), 7), None, "a command that only looks");
        fs::write(bundle.join(crate::control::SOCKET), "").unwrap();
        let found = holder(dir.path(), 7).unwrap();
        assert_eq!(found.root, dir.path().join("root"));
        assert_eq!(holder(dir.path(), 8), None);
    }

    #[test]
    fn an_answer_comes_through_its_file_and_nonsense_is_refused() {
        let file = file_of(&Household::default()).unwrap();
        assert!(read(vec![file.into()]).unwrap().residents.is_empty());
        assert!(read(vec![attached(b"{").unwrap().into()]).is_err());
        assert!(read(Vec::new()).is_err());
    }
}
