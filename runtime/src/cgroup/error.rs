//! Why the host's cgroup cannot be used.

use std::{io, path::PathBuf};

use super::{LEAVE_LIMIT, ROOT, SystemdError};

/// Why the host's cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// systemd does not do its part.
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    /// A path that means nothing to systemd.
    #[error(
        "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {path:?} instead"
    )]
    NoUnit {
        /// As given.
        path: PathBuf,
    },
    /// A slice that cannot be.
    #[error("invalid slice name: {0}")]
    Slice(String),
    /// A unit that cannot hold a sandbox.
    #[error("linux.cgroupsPath: {0:?} is not the name of a scope")]
    Unit(String),
    /// An annotation that is no property.
    #[error("annotation org.systemd.property.{name}: {value:?} is not the value of a property")]
    Annotation {
        /// The rest of its name.
        name: String,
        /// As given.
        value: String,
    },
    /// A path that would leave the hierarchy, or means systemd.
    #[error("linux.cgroupsPath {path:?} is not a path below {ROOT}")]
    Path {
        /// As given.
        path: PathBuf,
    },
    /// Somebody else's processes are in it.
    #[error("cgroup {path} is not empty: it belongs to somebody else", path = path.display())]
    Populated {
        /// Its directory.
        path: PathBuf,
    },
    /// Killed processes did not go.
    #[error("cgroup {path} still has processes {seconds} s after they were killed", path = path.display(), seconds = LEAVE_LIMIT.as_secs())]
    Stuck {
        /// Its directory.
        path: PathBuf,
    },
    /// A limit is refused by the kernel.
    #[error("write {value:?} to {path}", path = path.display())]
    Limit {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Something was asked that needs a cgroup, by a caller without the right to make one.
    #[error("rootless needs no limits + no cgrouppath when no permission is granted for cgroups")]
    Unpermitted(#[source] Box<Self>),
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

impl CgroupError {
    /// Whether the caller lacks the rights.
    pub(super) fn is_permission(&self) -> bool {
        use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        let (Self::Io { source, .. } | Self::Limit { source, .. }) = self else {
            return false;
        };
        matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem)
    }
}
