//! Volumes that the host changes as the kubelet does, so that the container's inotify(7) watches tell of it.
//!
//! ```text
//!  kubelet --rename--> directory <--inotify-- Follower --UpdateVolume--> agent --rename--> directory in the guest
//! ```
//!
//! Such a volume is a bind mount, read-only and without mapped owners, of a directory of links and directories in which
//! a link `..data` leads to a directory beside it whose name begins with two dots, too: what the kubelet makes of a
//! config map, a secret, a projected volume and the downward API, known by its shape alone. The agent has a directory of
//! its own for its links; the files stay in the share. Every other mount is the host's directory itself.
//! Contract: a directory is watched before it is read, and read again as a whole after every notice: nothing is lost, and
//! whatever happens while the guest is told becomes one change. What a directory lists is bounded ([`ROOM`]); one that is
//! larger from the start is left a plain bind mount. Failures here never end a container: they are complained of, once
//! for each volume until it can be followed again.
//! Not here: what becomes of it in the guest (the agent's `volumes.rs`).

mod listing;
mod watches;

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_agent_api::Volume as Listing;
use rustix::fs::{CWD, Mode, OFlags};
use tokio::{io::Interest, sync::mpsc, task::JoinHandle};

use self::{
    listing::{Listed, list},
    watches::{Watch, Watches},
};
use crate::{
    agent::{AgentError, RefusalKind},
    error::message,
    guest_spec::HostFiles,
    sandbox::{Sandbox, SandboxError},
    share::Share,
    watched::watch,
};

/// How much the names and targets of all volumes of a container may take, in bytes. A message to the agent has 4 MiB.
pub const ROOM: usize = 2 << 20;

/// Who is told what was not done: for which container, and what.
pub type Complain = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Why a volume is not followed.
#[derive(Debug, thiserror::Error)]
enum VolumeError {
    #[error("watch a volume: inotify is not delivered in it")]
    Watch(#[source] io::Error),
    #[error("read a volume")]
    Read(#[source] io::Error),
    #[error("a volume has too many names: inotify is not delivered in it")]
    TooMany,
    #[error("the guest does not follow a change of a volume")]
    Guest(#[source] SandboxError),
}

/// A volume that is watched.
#[derive(Debug)]
pub struct Volume {
    /// The mount in the share, private to this process: it keeps nothing on the host from being unmounted.
    dir: OwnedFd,
    /// What the guest has been told.
    told: Listing,
    /// The last attempt to tell it has failed.
    fails: bool,
    _watch: Watch,
}

/// The volumes of a sandbox. Its task begins with the first of them and ends with this value.
pub struct Follower {
    sandbox: Sandbox,
    complain: Complain,
    // Held for a moment, never across an await.
    running: Mutex<Option<Running>>,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").finish_non_exhaustive()
    }
}

struct Running {
    watches: Arc<Watches>,
    orders: mpsc::UnboundedSender<Order>,
    task: JoinHandle<()>,
}

enum Order {
    Follow(String, Vec<Volume>),
    Forget(String),
}

impl Follower {
    /// One that follows nothing yet.
    pub fn new(sandbox: &Sandbox, complain: Complain) -> Self {
        Self {
            sandbox: sandbox.clone(),
            complain,
            running: Mutex::default(),
        }
    }

    /// Finds and watches the volumes of a container that is about to be created, whose files are shared. Must be called
    /// inside a runtime.
    pub fn find(&self, share: &Share, id: &str, files: &HostFiles) -> Vec<Volume> {
        let mut found = Vec::new();
        let mut room = ROOM;
        for bind in &files.binds {
            if !bind.read_only || bind.identities.is_some() {
                continue;
            }
            let path = share.mount(id, bind.index);
            if !has_data(&path) {
                continue;
            }
            let number = u32::try_from(bind.index).unwrap_or(u32::MAX);
            match self.begin(&path, number, room) {
                Ok(Some((volume, bytes))) => {
                    room = room.saturating_sub(bytes);
                    found.push(volume);
                }
                Ok(None) => {}
                Err(error) => (self.complain)(id, &message(&error)),
            }
        }
        found
    }

    /// `None`: it only looks like one.
    fn begin(
        &self,
        path: &Path,
        number: u32,
        room: usize,
    ) -> Result<Option<(Volume, usize)>, VolumeError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty());
        let dir = opened.map_err(|errno| VolumeError::Read(errno.into()))?;
        let watches = self.watches().map_err(VolumeError::Watch)?;
        let watch = watches.add(path).map_err(VolumeError::Watch)?;
        let listed = list(&dir, number, room).map_err(VolumeError::Read)?;
        let Listed { listing, bytes, .. } = match listed {
            Listed { is_cut: true, .. } => return Err(VolumeError::TooMany),
            Listed {
                has_others: true, ..
            } => return Ok(None),
            whole => whole,
        };
        let volume = Volume {
            dir,
            told: listing,
            fails: false,
            _watch: watch,
        };
        Ok(Some((volume, bytes)))
    }

    fn watches(&self) -> io::Result<Arc<Watches>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = &*running {
            return Ok(Arc::clone(&running.watches));
        }
        let watches = Watches::new()?;
        let notices = watch(watches.notices()?, Interest::READABLE)?;
        let (orders, inbox) = mpsc::unbounded_channel();
        let task = Task {
            watches: Arc::clone(&watches),
            inbox,
            sandbox: self.sandbox.clone(),
            complain: Arc::clone(&self.complain),
            followed: Vec::new(),
        };
        *running = Some(Running {
            watches: Arc::clone(&watches),
            orders,
            task: tokio::spawn(task.run(notices)),
        });
        Ok(watches)
    }

    fn order(&self, order: Order) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = &*running {
            // Fails only if the task has ended, and then so has the runtime.
            let _ = running.orders.send(order);
        }
    }

    /// Has a container that has been created with them follow its volumes.
    pub fn follow(&self, id: &str, volumes: Vec<Volume>) {
        if !volumes.is_empty() {
            self.order(Order::Follow(id.to_owned(), volumes));
        }
    }

    /// The container is gone.
    pub fn forget(&self, id: &str) {
        self.order(Order::Forget(id.to_owned()));
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let running = self
            .running
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.take() {
            running.task.abort();
        }
    }
}

/// What the agent is told when the container is created.
pub fn listings(volumes: &[Volume]) -> Vec<Listing> {
    volumes.iter().map(|volume| volume.told.clone()).collect()
}

/// Whether a directory has the link by which such volumes are known.
fn has_data(dir: &Path) -> bool {
    rustix::fs::readlinkat(CWD, dir.join("..data"), Vec::new()).is_ok_and(|target| {
        let target = target.as_bytes();
        target.len() > 2 && target.starts_with(b"..") && !target.contains(&b'/')
    })
}

struct Task {
    watches: Arc<Watches>,
    inbox: mpsc::UnboundedReceiver<Order>,
    sandbox: Sandbox,
    complain: Complain,
    followed: Vec<(String, Volume)>,
}

impl Task {
    async fn run(mut self, notices: tokio::io::unix::AsyncFd<OwnedFd>) {
        loop {
            tokio::select! {
                ready = notices.readable() => {
                    // What comes from here on makes it ready again.
                    if let Ok(mut ready) = ready { ready.clear_ready() }
                    self.watches.drain();
                }
                order = self.inbox.recv() => match order {
                    Some(Order::Follow(id, volumes)) => {
                        let volumes = volumes.into_iter().map(|volume| (id.clone(), volume));
                        self.followed.extend(volumes);
                    }
                    Some(Order::Forget(gone)) => self.followed.retain(|(id, _)| *id != gone),
                    None => return,
                },
            }
            for (id, volume) in &mut self.followed {
                let told = volume.tell(&self.sandbox, id).await;
                if let Some(error) = news(&mut volume.fails, told) {
                    (self.complain)(id, &message(&error));
                }
            }
        }
    }
}

impl Volume {
    /// Tells the guest what has changed, if anything has.
    async fn tell(&mut self, sandbox: &Sandbox, id: &str) -> Result<(), VolumeError> {
        let number = self.told.number;
        let Listed {
            listing, is_cut, ..
        } = list(&self.dir, number, ROOM).map_err(VolumeError::Read)?;
        if listing == self.told {
            return Ok(());
        }
        match sandbox.update_volume(id, listing.clone()).await {
            Ok(()) => self.told = listing,
            Err(error) if is_over(&error) => return Ok(()),
            Err(error) => return Err(VolumeError::Guest(error)),
        }
        if is_cut {
            return Err(VolumeError::TooMany);
        }
        Ok(())
    }
}

/// What is to be complained of: the first failure, until it works again.
fn news<E>(fails: &mut bool, done: Result<(), E>) -> Option<E> {
    let failed = std::mem::replace(fails, done.is_err());
    done.err().filter(|_| !failed)
}

/// Whether there is no container any more that could follow.
const fn is_over(error: &SandboxError) -> bool {
    matches!(
        error,
        SandboxError::NotFound(_)
            | SandboxError::Ended(_)
            | SandboxError::Agent(
                AgentError::Gone
                    | AgentError::Refused {
                        kind: RefusalKind::NotFound,
                        ..
                    }
            )
    )
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_volume_is_known_by_its_link_to_a_directory_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!has_data(dir.path()));
        let data = dir.path().join("..data");
        for (target, is_one) in [
            ("..2026_11_22", true),
            ("..", false),
            ("../other", false),
            ("data", false),
            ("/etc", false),
        ] {
            symlink(target, &data).unwrap();
            assert_eq!(has_data(dir.path()), is_one, "{target}");
            fs::remove_file(&data).unwrap();
        }
        fs::create_dir(&data).unwrap();
        assert!(!has_data(dir.path()));
        assert!(!has_data(&dir.path().join("missing")));
    }

    #[test]
    fn a_volume_that_cannot_be_followed_is_complained_of_once_until_it_can() {
        let mut fails = false;
        let mut said = |done| news(&mut fails, done);
        assert_eq!(said(Err(1)), Some(1));
        assert_eq!(said(Err(2)), None);
        assert_eq!(said(Ok(())), None);
        assert_eq!(said(Err(3)), Some(3));
    }
}
