//! A container's directory `<root>/<id>`: who holds it, what its state file says, and what is true.
//!
//! Contract: making the directory is the lock against a second container of that name. While a sandbox lives, its
//! monitor holds an exclusive `flock` on the directory itself; the lock passes from `create` to the monitor with the
//! descriptor and ends with the last of them, however they end. So "the lock is free" proves "the container is
//! stopped", whatever the state file says, and waiting for the lock is waiting for the monitor's end.
//! The state file is written beside, synced and renamed; only the holder of the lock writes it.
//! Removal never crosses a mount point.
//! Not here: the JSON and tables that people see (`commands/`), processes and mounts of a sandbox (`sandbox/`).

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustix::{
    fs::{CWD, FlockOperation, Mode, OFlags, flock, fsync, mkdirat, openat, renameat},
    io::Errno,
};

mod record;
mod removal;

pub use record::{ContainerId, State, Status, timestamp};

use removal::remove_tree;

/// Name of the state file in a container's directory.
const STATE_FILE: &str = "state.json";
/// Where it is written before it is renamed.
const STATE_FILE_NEW: &str = "state.json.new";

/// Why a state directory cannot be used, or a container's state forbids what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// runc's words.
    #[error("container id cannot be empty")]
    EmptyId,
    /// runc's words.
    #[error("invalid container ID format")]
    InvalidId,
    /// Longer than [`ContainerId::MAX_BYTES`].
    #[error("invalid container ID format: {bytes} bytes, at most 1024 are allowed")]
    LongId {
        /// How long it is.
        bytes: usize,
    },
    /// runc's words.
    #[error("container with given ID already exists")]
    Exists,
    /// runc's words.
    #[error("container does not exist")]
    NotFound,
    /// A system call on the directory or a file in it failed.
    #[error("{step} {path}", path = path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The state file is not one.
    #[error("read the state file {path}", path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Something is still mounted below the directory; it was left alone.
    #[error("remove {path}: something is still mounted there", path = path.display())]
    Mounted {
        /// The mount point.
        path: PathBuf,
    },
}

/// The directory of one container, open.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    dir: OwnedFd,
    undo: Option<Undo>,
}

/// Removes a claimed directory when it is dropped.
#[derive(Debug)]
struct Undo(PathBuf);

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // The error that led here is the one to report.
            drop(remove_tree(&self.0));
        }
    }
}

impl StateDir {
    /// Makes `<root>/<id>` and locks it. Until [`StateDir::keep`], dropping the value removes the directory again.
    pub fn claim(root: &Path, id: &ContainerId) -> Result<Self, StateError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|source| StateError::Io {
                step: "make",
                path: root.into(),
                source,
            })?;
        let path = root.join(id.as_str());
        match mkdirat(CWD, &path, Mode::from_raw_mode(0o711)) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(StateError::Exists),
            Err(errno) => return Err(io_error("make", &path, errno)),
        }
        let undo = Some(Undo(path.clone()));
        let dir = open_dir(&path).map_err(|errno| io_error("open", &path, errno))?;
        let claimed = Self { path, dir, undo };
        // A command that looks whether the lock is free may hold it for a moment: wait for it.
        rustix::io::retry_on_intr(|| flock(&claimed.dir, FlockOperation::LockExclusive))
            .map_err(|errno| io_error("lock", &claimed.path, errno))?;
        Ok(claimed)
    }

    /// Takes over a directory that the caller's parent claimed: `dir` is the inherited descriptor that holds the lock.
    pub fn adopt(root: &Path, id: &ContainerId, dir: OwnedFd) -> Self {
        Self {
            path: root.join(id.as_str()),
            dir,
            undo: None,
        }
    }

    /// Opens the directory of an existing container.
    pub fn open(root: &Path, id: &ContainerId) -> Result<Self, StateError> {
        let path = root.join(id.as_str());
        match open_dir(&path) {
            Ok(dir) => Ok(Self {
                path,
                dir,
                undo: None,
            }),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => Err(StateError::NotFound),
            Err(errno) => Err(io_error("open", &path, errno)),
        }
    }

    /// The names of all containers below `root`, sorted. No such directory: none.
    pub fn ids(root: &Path) -> Result<Vec<ContainerId>, StateError> {
        let listing = match fs::read_dir(root) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                return Err(StateError::Io {
                    step: "list",
                    path: root.into(),
                    source,
                });
            }
        };
        let mut ids: Vec<_> = listing
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| ContainerId::parse(entry.file_name().to_str()?).ok())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// `<root>/<id>`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor that carries the lock, to be inherited by a monitor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The directory stays when the value is dropped; its lock ends with the last copy of the descriptor.
    #[must_use]
    pub fn keep(mut self) -> Self {
        if let Some(mut undo) = self.undo.take() {
            undo.0 = PathBuf::new();
        }
        self
    }

    /// Writes the state file: whoever reads it sees the old one or the new one, also after a power cut.
    pub fn store(&self, state: &State) -> Result<(), StateError> {
        let failed = |step| move |errno| io_error(step, &self.path.join(STATE_FILE), errno);
        let json = serde_json::to_vec(state).map_err(|source| StateError::Corrupt {
            path: self.path.join(STATE_FILE),
            source,
        })?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let file = openat(&self.dir, STATE_FILE_NEW, flags, Mode::from_raw_mode(0o600))
            .map_err(failed("write"))?;
        let mut rest = json.as_slice();
        while !rest.is_empty() {
            let written = rustix::io::write(&file, rest).map_err(failed("write"))?;
            rest = rest.get(written..).unwrap_or_default();
        }
        fsync(&file).map_err(failed("sync"))?;
        renameat(&self.dir, STATE_FILE_NEW, &self.dir, STATE_FILE).map_err(failed("replace"))
    }

    /// The truth about the container: its state file, corrected to `stopped` and pid 0 if no monitor lives.
    /// A container whose creation was killed before it wrote a state file is stopped too, with an empty bundle.
    pub fn state(&self) -> Result<State, StateError> {
        // First the lock, then the file: a monitor that ends in between has written its last state already.
        let alive = self.is_alive()?;
        let path = self.path.join(STATE_FILE);
        let mut state = match read_at(&self.dir, STATE_FILE) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| StateError::Corrupt { path, source })?,
            Err(Errno::NOENT) => self.unborn()?,
            Err(errno) => return Err(io_error("read", &path, errno)),
        };
        if !alive {
            state.status = Status::Stopped;
            state.pid = 0;
        }
        Ok(state)
    }

    /// Whether a monitor (or a `create` on its way to one) holds the container.
    pub fn is_alive(&self) -> Result<bool, StateError> {
        let probe = self.reopen()?;
        match flock(&probe, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(io_error("lock", &self.path, errno)),
        }
    }

    /// Blocks until no monitor holds the container, then holds it itself so that nobody else removes it.
    pub fn wait_until_dead(&self) -> Result<(), StateError> {
        rustix::io::retry_on_intr(|| flock(&self.dir, FlockOperation::LockExclusive))
            .map_err(|errno| io_error("lock", &self.path, errno))
    }

    /// The user who made the container.
    pub fn owner(&self) -> Result<u32, StateError> {
        let meta = fs::metadata(&self.path).map_err(|source| StateError::Io {
            step: "examine",
            path: self.path.clone(),
            source,
        })?;
        Ok(meta.uid())
    }

    /// Removes the directory and all in it. A mount point below is an error, never followed.
    pub fn remove(self) -> Result<(), StateError> {
        let kept = self.keep();
        remove_tree(&kept.path)
    }

    fn reopen(&self) -> Result<OwnedFd, StateError> {
        // A new open file, so that its lock conflicts with one that this process holds itself.
        openat(&self.dir, ".", DIR_FLAGS, Mode::empty())
            .map_err(|errno| io_error("open", &self.path, errno))
    }

    fn unborn(&self) -> Result<State, StateError> {
        let name = self
            .path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let made = fs::metadata(&self.path).and_then(|meta| meta.modified());
        Ok(State {
            oci_version: crate::bundle::OCI_VERSION.to_owned(),
            id: ContainerId::parse(name)?,
            pid: 0,
            status: Status::Creating,
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            created: timestamp(made.unwrap_or(SystemTime::UNIX_EPOCH)),
            annotations: None,
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        })
    }
}

const DIR_FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    openat(CWD, path, DIR_FLAGS, Mode::empty())
}

fn io_error(step: &'static str, path: &Path, errno: Errno) -> StateError {
    StateError::Io {
        step,
        path: path.into(),
        source: errno.into(),
    }
}

fn read_at(dir: &OwnedFd, name: &str) -> Result<Vec<u8>, Errno> {
    let file = openat(dir, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::with_capacity(4096);
    while rustix::io::read(&file, rustix::buffer::spare_capacity(&mut bytes))? > 0 {
        bytes.reserve(4096);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn id(text: &str) -> ContainerId {
        ContainerId::parse(text).unwrap()
    }

    fn state(id: &ContainerId) -> State {
        State {
            oci_version: "1.0.2".into(),
            id: id.clone(),
            pid: 4711,
            status: Status::Running,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2026-11-21T12:30:37.5Z".into(),
            annotations: None,
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        }
    }

    #[test]
    fn a_second_claim_is_refused_and_leaves_the_first_alone() {
        let root = tempfile::tempdir().unwrap();
        let first = StateDir::claim(&root.path().join("r"), &id("c")).unwrap();
        let error = StateDir::claim(&root.path().join("r"), &id("c")).unwrap_err();
        assert_eq!(error.to_string(), "container with given ID already exists");
        assert!(first.path().is_dir());
    }

    #[test]
    fn a_claim_that_is_not_kept_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let claim = StateDir::claim(root.path(), &id("c")).unwrap();
        fs::create_dir_all(claim.path().join("share/rootfs")).unwrap();
        fs::write(claim.path().join("log"), "x").unwrap();
        drop(claim);
        assert!(!root.path().join("c").exists());
    }

    #[test]
    fn the_state_is_true_while_the_lock_is_held_and_stopped_afterwards() {
        let root = tempfile::tempdir().unwrap();
        let held = StateDir::claim(root.path(), &id("c")).unwrap().keep();
        held.store(&state(&id("c"))).unwrap();
        let seen = StateDir::open(root.path(), &id("c")).unwrap();
        assert_eq!(seen.state().unwrap(), state(&id("c")));
        drop(held);
        let stopped = State {
            status: Status::Stopped,
            pid: 0,
            ..state(&id("c"))
        };
        assert_eq!(seen.state().unwrap(), stopped);
    }

    #[test]
    fn the_lock_lives_on_in_an_inherited_descriptor() {
        let root = tempfile::tempdir().unwrap();
        let claim = StateDir::claim(root.path(), &id("c")).unwrap();
        let inherited = claim.fd().try_clone_to_owned().unwrap();
        drop(claim.keep());
        let monitor = StateDir::adopt(root.path(), &id("c"), inherited);
        let seen = StateDir::open(root.path(), &id("c")).unwrap();
        assert!(seen.is_alive().unwrap());
        drop(monitor);
        assert!(!seen.is_alive().unwrap());
        seen.wait_until_dead().unwrap();
        assert!(seen.is_alive().unwrap(), "now it is held by whoever waited");
    }

    #[test]
    fn a_claim_without_a_state_file_is_creating_then_stopped() {
        let root = tempfile::tempdir().unwrap();
        let claim = StateDir::claim(root.path(), &id("c")).unwrap();
        assert_eq!(claim.state().unwrap().status, Status::Creating);
        drop(claim.keep());
        let seen = StateDir::open(root.path(), &id("c")).unwrap();
        assert_eq!(seen.state().unwrap().status, Status::Stopped);
        seen.remove().unwrap();
        assert!(matches!(
            StateDir::open(root.path(), &id("c")),
            Err(StateError::NotFound)
        ));
    }

    #[test]
    fn a_broken_state_file_is_an_error_that_names_it() {
        let root = tempfile::tempdir().unwrap();
        let claim = StateDir::claim(root.path(), &id("c")).unwrap();
        fs::write(claim.path().join("state.json"), "{").unwrap();
        let error = claim.state().unwrap_err().to_string();
        assert!(error.contains("c/state.json"), "{error}");
    }

    #[test]
    fn removal_does_not_follow_symbolic_links() {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        let claim = StateDir::claim(&root.path().join("r"), &id("c")).unwrap();
        symlink(&outside, claim.path().join("link")).unwrap();
        claim.remove().unwrap();
        assert!(outside.join("file").exists());
    }

    #[test]
    fn only_directories_with_valid_names_are_containers() {
        let root = tempfile::tempdir().unwrap();
        for name in ["b", "a", "not valid"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        fs::write(root.path().join("file"), "").unwrap();
        assert_eq!(StateDir::ids(root.path()).unwrap(), [id("a"), id("b")]);
        assert_eq!(StateDir::ids(&root.path().join("nope")).unwrap(), []);
    }
}
