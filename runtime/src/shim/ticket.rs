//! What a server leaves in its sandbox's bundle for the `delete` that comes after it was killed.
//!
//! Contract: written before anything is made that would outlive the server, and removed with the bundle. The VMM ends
//! with its server and so do their mounts; what remains is the cgroup, the socket and hooks that are still to run.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The file's name.
const FILE: &str = "caisson.json";

/// The traces of a sandbox on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ticket {
    /// The server.
    pub(super) pid: u32,
    /// The sandbox's cgroup, absolute.
    pub(super) cgroup: Option<PathBuf>,
    /// systemd's unit for it, if systemd made it.
    #[serde(default)]
    pub(super) unit: Option<String>,
    /// It may not be there yet, and what is there may be another's.
    #[serde(default)]
    pub(super) intended: bool,
}

impl Ticket {
    /// Writes it.
    pub(super) fn store(&self, bundle: &Path) -> io::Result<()> {
        let aside = bundle.join(format!(".{FILE}"));
        fs::write(&aside, serde_json::to_vec(self)?)?;
        fs::rename(aside, bundle.join(FILE))
    }

    /// Reads it; `None` if this bundle is not a sandbox's own.
    pub(super) fn load(bundle: &Path) -> io::Result<Option<Self>> {
        match fs::read(bundle.join(FILE)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_without_one_is_not_a_sandboxs() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Ticket::load(dir.path()).unwrap(), None);
        let ticket = Ticket {
            pid: 7,
            cgroup: Some("/sys/fs/cgroup/x".into()),
            unit: Some("x.scope".into()),
            intended: true,
        };
        ticket.store(dir.path()).unwrap();
        assert_eq!(Ticket::load(dir.path()).unwrap(), Some(ticket));
    }
}
