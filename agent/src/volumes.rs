//! Volumes whose changes on the host are seen by inotify(7): directories of the guest's own that follow the host's.
//!
//! ```text
//!  /run/caisson/volumes            tmpfs, shared; only the agent writes to it
//!    caisson-<container>/<number>  what the container has bind-mounted, as a slave
//!      ..2026_11_22                a mount of the share's directory of that name, read-only
//!      ..data -> ..2026_11_22
//!      key -> ..data/key
//! ```
//!
//! The kernel reports only what is done through itself. So the links, which are all that changes in place, are the
//! agent's, and what it does to them the container's watches see; the files are the share's, of whatever number and size.
//! Contract: [`Volumes::follow`] goes from the state that there is to the host's, however much lies between them. A
//! directory that the host removed meanwhile ends the way: the host is about to tell more. The container can change
//! nothing: its mount is read-only, and one that a privileged container makes writable is a few links of its own.
//! Dropping the value removes the directories.
//! Not here: which bind mounts these are and what the host lists (the runtime's `volumes.rs`).

mod top_level;

use crate::plan::ContainerPlan;
use crate::plan::mounts::{AttributePlan, MountPlan, attribute};
use crate::sys;
use caisson_agent_api::{SHARE_MOUNT, VOLUMES_MOUNT, Volume as Listing};
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, StatxFlags, Timespec, Timestamps, Uid, chmod, chown, mkdir, statx,
    utimensat,
};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount,
    open_tree, unmount,
};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use top_level::{BadName, NEW_LINK, Step, TopLevel, steps};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error(transparent)]
    Name(#[from] BadName),
    #[error("volume: {step} {path:?}")]
    Step {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("volume {0} does not exist")]
    Unknown(u32),
}

fn at(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    move |source| VolumeError::Step {
        step,
        path: path.to_owned(),
        source,
    }
}

/// A container's volumes.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    /// None: it has none.
    directory: Option<PathBuf>,
    // No await while it is held; no other lock is taken inside.
    all: Mutex<Vec<Volume>>,
}

#[derive(Debug)]
struct Volume {
    number: u32,
    /// The host's directory, in the share.
    source: PathBuf,
    /// The one that stands for it.
    place: PathBuf,
    /// Of the mounts in it.
    attributes: AttributePlan,
    now: TopLevel,
}

impl Volumes {
    /// Makes the directories of a container and points its plan at them. `name` is unique among the guest's containers.
    /// A volume that the plan does not mount is passed over; all are, if the plan cuts the container off from mounts that
    /// come later.
    pub(crate) fn make(
        id: &str,
        name: &str,
        listings: &[Listing],
        plan: &mut ContainerPlan,
    ) -> Result<Self, VolumeError> {
        let mut volumes = Self::default();
        if listings.is_empty() || plan.propagation.is_some_and(cuts_off) {
            return Ok(volumes);
        }
        let directory = Path::new(VOLUMES_MOUNT).join(name);
        make_directory(&directory)?;
        volumes.directory = Some(directory.clone());
        for listing in listings {
            let number = listing.number.to_string();
            let source = Path::new(SHARE_MOUNT).join(id).join("mounts").join(&number);
            let of_it = |mount: &&mut MountPlan| mount.is_bind() && mount.source == source;
            let Some(mount) = plan.mounts.iter_mut().find(of_it) else {
                continue;
            };
            let mut volume = Volume {
                number: listing.number,
                place: directory.join(&number),
                attributes: within(mount),
                source,
                now: TopLevel::default(),
            };
            make_directory(&volume.place)?;
            let place = volume.place.clone();
            let made = volume.follow(listing).and_then(|()| volume.resemble());
            volumes.all().push(volume);
            made?;
            mount.source = place;
            mount.flags |= MountFlags::REC.bits();
            let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
            mount.propagation = vec![slave.bits()];
        }
        Ok(volumes)
    }

    fn all(&self) -> MutexGuard<'_, Vec<Volume>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a volume follow the host. A container that was made without it sees the host's directory itself.
    pub(crate) fn follow(&self, listing: &Listing) -> Result<(), VolumeError> {
        if self.directory.is_none() {
            return Ok(());
        }
        let of_it = |volume: &&mut Volume| volume.number == listing.number;
        let mut all = self.all();
        let volume = all.iter_mut().find(of_it);
        volume
            .ok_or(VolumeError::Unknown(listing.number))?
            .follow(listing)
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        // What is left behind lives in the guest's memory and ends with it.
        for volume in self.all().iter_mut() {
            let _ = volume.take(steps(&volume.now, &TopLevel::default()));
            let _ = fs::remove_dir(&volume.place);
        }
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Whether a propagation of the root makes every mount of the container private.
fn cuts_off(word: u32) -> bool {
    let word = MountPropagationFlags::from_bits_retain(word);
    let alone = MountPropagationFlags::PRIVATE | MountPropagationFlags::UNBINDABLE;
    word.contains(MountPropagationFlags::REC) && word.intersects(alone)
}

/// What the mount of a volume's directory asks for holds for the mounts in it; and they are read-only.
const fn within(mount: &MountPlan) -> AttributePlan {
    let mut plan = AttributePlan { set: 0, clear: 0 };
    let (own, tree) = (mount.attributes, mount.recursive);
    plan.add(own.set, own.clear & attribute::ATIME);
    plan.add(tree.set, tree.clear & attribute::ATIME);
    plan.add(attribute::RDONLY, 0);
    plan
}

fn make_directory(path: &Path) -> Result<(), VolumeError> {
    mkdir(path, Mode::from_raw_mode(0o755)).map_err(|e| at("make", path)(e.into()))
}

/// The host has removed it, however its file system says so.
const fn is_gone(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::STALE | Errno::NOTDIR)
}

impl Volume {
    fn follow(&mut self, listing: &Listing) -> Result<(), VolumeError> {
        let wanted = TopLevel::of(listing)?;
        self.take(steps(&self.now, &wanted))
    }

    /// Takes the steps in order, as far as the host has not gone on.
    fn take(&mut self, steps: Vec<Step>) -> Result<(), VolumeError> {
        for step in steps {
            if !self.carry_out(&step)? {
                break;
            }
            self.now.advance(step);
        }
        Ok(())
    }

    /// False: it cannot be done any more.
    fn carry_out(&self, step: &Step) -> Result<bool, VolumeError> {
        match step {
            Step::Attach(name) => return self.attach(Path::new(name)),
            Step::Detach(name) => {
                let path = self.place.join(name);
                let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                unmount(&path, flags).map_err(|e| at("unmount", &path)(e.into()))?;
                fs::remove_dir(&path).map_err(at("remove", &path))?;
            }
            Step::Link { name, target } => {
                let path = self.place.join(name);
                symlink(target, &path).map_err(at("link", &path))?;
            }
            Step::Switch { name, target } => {
                let (path, new) = (self.place.join(name), self.place.join(NEW_LINK));
                symlink(target, &new).map_err(at("link", &new))?;
                fs::rename(&new, &path).map_err(at("rename to", &path))?;
            }
            Step::Unlink(name) => {
                let path = self.place.join(name);
                fs::remove_file(&path).map_err(at("unlink", &path))?;
            }
        }
        Ok(true)
    }

    fn attach(&self, name: &Path) -> Result<bool, VolumeError> {
        let (source, path) = (self.source.join(name), self.place.join(name));
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
        let tree = match open_tree(CWD, &source, flags) {
            Ok(tree) => tree,
            Err(error) if is_gone(error) => return Ok(false),
            Err(error) => return Err(at("open", &source)(error.into())),
        };
        let attributes = sys::MountAttributes {
            set: self.attributes.set,
            clear: self.attributes.clear,
            ..Default::default()
        };
        sys::set_mount_attributes(tree.as_fd(), false, attributes)
            .map_err(at("set attributes of", &source))?;
        make_directory(&path)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tree, "", CWD, &path, flags).map_err(|error| {
            let _ = fs::remove_dir(&path);
            at("mount", &path)(error.into())
        })?;
        Ok(true)
    }

    /// Gives the directory the owner, mode and time of the host's.
    fn resemble(&self) -> Result<(), VolumeError> {
        let wanted = StatxFlags::UID | StatxFlags::GID | StatxFlags::MODE | StatxFlags::MTIME;
        let stat = statx(CWD, &self.source, AtFlags::empty(), wanted)
            .map_err(|e| at("stat", &self.source)(e.into()))?;
        let (uid, gid) = (Uid::from_raw(stat.stx_uid), Gid::from_raw(stat.stx_gid));
        let mode = Mode::from_raw_mode(u32::from(stat.stx_mode) & 0o7777);
        let time = Timespec {
            tv_sec: stat.stx_mtime.tv_sec,
            tv_nsec: stat.stx_mtime.tv_nsec.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        chown(&self.place, Some(uid), Some(gid))
            .and_then(|()| chmod(&self.place, mode))
            .and_then(|()| utimensat(CWD, &self.place, &times, AtFlags::empty()))
            .map_err(|e| at("change", &self.place)(e.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::mounts::{self, propagation};

    #[test]
    fn only_what_makes_every_mount_private_cuts_off() {
        let cut: Vec<_> = ["rprivate", "runbindable", "private", "rslave", "rshared"]
            .into_iter()
            .filter(|word| propagation(word).is_some_and(cuts_off))
            .collect();
        assert_eq!(cut, ["rprivate", "runbindable"]);
    }

    #[test]
    fn mounts_in_a_volume_have_its_settings_and_one_of_access_times() {
        let inner = |options: &[&str]| {
            let mount = serde_json::json!({
                "destination": "/v", "type": "bind", "source": "/src", "options": options});
            let plan = mounts::plan(&[serde_json::from_value(mount).unwrap()]).unwrap();
            within(&plan[0])
        };
        let plan = |set, clear| AttributePlan {
            set: set | attribute::RDONLY,
            clear,
        };
        let field = attribute::ATIME;
        assert_eq!(inner(&["rbind", "ro", "dev"]), plan(0, 0));
        assert_eq!(
            inner(&["rbind", "noatime", "rnosuid"]),
            plan(attribute::NOATIME | attribute::NOSUID, field)
        );
        assert_eq!(
            inner(&["rbind", "noatime", "rstrictatime"]),
            plan(attribute::STRICTATIME, field)
        );
    }
}
