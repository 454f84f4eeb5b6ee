//! A container's name, and what its state file holds.
//!
//! Spec: OCI runtime specification, `runtime.md` (state); runc 1.1 for names and times.

use std::{collections::HashMap, fmt, path::PathBuf, time::SystemTime};

use serde::{Deserialize, Serialize};

use super::StateError;
use crate::{bundle::Bundle, cgroup::Note};

/// A container's name: 1 to 1,024 bytes of letters, digits and `_ + , - .`, but not `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// Longest name, in bytes.
    pub const MAX_BYTES: usize = 1024;

    /// Checks a name as runc does, and its length.
    pub fn parse(text: &str) -> Result<Self, StateError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_+,-.".contains(&b);
        if text.is_empty() {
            return Err(StateError::EmptyId);
        }
        if matches!(text, "." | "..") || !text.bytes().all(allowed) {
            return Err(StateError::InvalidId);
        }
        // A directory of this name must exist, so the file system's limit holds as well; claiming reports that.
        if text.len() > Self::MAX_BYTES {
            return Err(StateError::LongId { bytes: text.len() });
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = StateError;

    fn try_from(text: String) -> Result<Self, StateError> {
        Self::parse(&text)
    }
}

/// What a container is doing, in the words of the OCI runtime specification (and `paused`, which is runc's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being set up.
    Creating,
    /// Set up; its program waits for `start`.
    Created,
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its program has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// What the state file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The version of the specification that `config.json` named.
    pub oci_version: String,
    /// The container.
    pub id: ContainerId,
    /// The monitor, which stands for the container on the host; 0 before there is one and after it ended.
    pub pid: u32,
    /// As last recorded; [`super::StateDir::state`] corrects it.
    pub status: Status,
    /// The bundle, absolute.
    pub bundle: PathBuf,
    /// The root file system on the host, absolute.
    pub rootfs: PathBuf,
    /// RFC 3339, UTC, see [`timestamp`].
    pub created: String,
    /// From `config.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<HashMap<String, String>>,
    /// The host cgroup that holds monitor and VMM, absolute; `None`: none was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
    /// systemd's unit for it, if systemd made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub systemd_unit: Option<String>,
    /// It may not be there yet, and what is there may be another's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cgroup_intended: bool,
}

impl State {
    /// A container that is being created, by this process.
    pub fn creating(id: &ContainerId, bundle: &Bundle) -> Self {
        Self {
            oci_version: bundle.spec.version().clone(),
            id: id.clone(),
            pid: std::process::id(),
            status: Status::Creating,
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs.clone(),
            created: timestamp(SystemTime::now()),
            annotations: bundle.spec.annotations().clone(),
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        }
    }
}

impl State {
    /// Writes down what there is of a host cgroup.
    pub fn set_cgroup(&mut self, note: Note) {
        (self.cgroup, self.systemd_unit) = (note.path, note.unit);
        self.cgroup_intended = note.intended;
    }

    /// What there is of a host cgroup, by which it is removed.
    pub fn cgroup_note(&self) -> Note {
        Note {
            path: self.cgroup.clone(),
            unit: self.systemd_unit.clone(),
            intended: self.cgroup_intended,
        }
    }
}

/// A moment as runc writes it: RFC 3339, UTC, nanoseconds without trailing zeros.
pub fn timestamp(moment: SystemTime) -> String {
    let text = humantime::format_rfc3339_nanos(moment).to_string();
    let digits = text
        .trim_end_matches('Z')
        .trim_end_matches('0')
        .trim_end_matches('.');
    format!("{digits}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_runcs_rules() {
        for good in ["a", "A-b_c.d+e,f", "0", "...", &"x".repeat(1024)] {
            ContainerId::parse(good).unwrap();
        }
        for bad in [
            ".", "..", "a/b", "../a", "a b", "a\n", "ä", "a:b", "a@b", "a\0",
        ] {
            let error = ContainerId::parse(bad).unwrap_err().to_string();
            assert_eq!(error, "invalid container ID format", "{bad}");
        }
        assert_eq!(
            ContainerId::parse("").unwrap_err().to_string(),
            "container id cannot be empty"
        );
        let long = ContainerId::parse(&"x".repeat(1025))
            .unwrap_err()
            .to_string();
        assert!(
            long.starts_with("invalid container ID format") && long.contains("1025"),
            "{long}"
        );
    }

    #[test]
    fn timestamps_have_no_trailing_zeros() {
        let at = |nanos| timestamp(SystemTime::UNIX_EPOCH + std::time::Duration::from_nanos(nanos));
        assert_eq!(
            at(1_795_264_237_397_827_925),
            "2026-11-21T12:30:37.397827925Z"
        );
        assert_eq!(at(1_795_264_237_500_000_000), "2026-11-21T12:30:37.5Z");
        assert_eq!(at(1_795_264_237_000_000_000), "2026-11-21T12:30:37Z");
    }
}
