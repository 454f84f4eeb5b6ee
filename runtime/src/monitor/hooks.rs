//! Hooks of the host's side, kept in the state directory for the commands that run them.
//!
//! The specification fixes them at `create`; `start` and `delete` are later and other processes, and the bundle may have
//! changed by then.

use std::{fs, io, path::Path};

use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::state::{State, Status};

/// Name of the file; absent if there are no hooks.
const FILE: &str = "hooks.json";

/// The four lists of the host's side.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostHooks {
    /// Before the container is created.
    pub prestart: Vec<Hook>,
    /// Before the container is created, after `prestart`.
    pub create_runtime: Vec<Hook>,
    /// After the container has been started.
    pub poststart: Vec<Hook>,
    /// After the container has been deleted.
    pub poststop: Vec<Hook>,
}

impl HostHooks {
    /// Those of a specification.
    pub fn of(spec: &Spec) -> Self {
        let Some(hooks) = spec.hooks() else {
            return Self::default();
        };
        #[allow(deprecated, reason = "prestart is deprecated and in use everywhere")]
        let prestart = hooks.prestart();
        let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
        Self {
            prestart: list(prestart),
            create_runtime: list(hooks.create_runtime()),
            poststart: list(hooks.poststart()),
            poststop: list(hooks.poststop()),
        }
    }

    /// Whether any must run before the container is created.
    pub fn precede_creation(&self) -> bool {
        !(self.prestart.is_empty() && self.create_runtime.is_empty())
    }

    /// Writes them into a state directory, if there are any.
    pub fn store(&self, dir: &Path) -> io::Result<()> {
        if *self == Self::default() {
            return Ok(());
        }
        fs::write(dir.join(FILE), serde_json::to_vec(self)?)
    }

    /// Reads them from a state directory.
    pub fn load(dir: &Path) -> io::Result<Self> {
        match fs::read(dir.join(FILE)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }
}

/// The state that a hook reads on its standard input.
pub fn hook_state(state: &State, status: Status) -> Vec<u8> {
    oci_state(state, status).to_string().into_bytes()
}

/// `State` of the runtime specification.
pub fn oci_state(state: &State, status: Status) -> Value {
    let mut value = json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "status": status,
        "bundle": state.bundle,
    });
    if let Some(object) = value.as_object_mut() {
        if state.pid != 0 && status != Status::Stopped {
            object.insert("pid".into(), state.pid.into());
        }
        if let Some(annotations) = &state.annotations {
            object.insert("annotations".into(), json!(annotations));
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ContainerId;

    #[test]
    fn hooks_survive_in_the_state_directory_and_cost_nothing_when_there_are_none() {
        let dir = tempfile::tempdir().unwrap();
        HostHooks::default().store(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(HostHooks::load(dir.path()).unwrap(), HostHooks::default());
        let spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "hooks": {"prestart": [{"path": "/a"}], "poststop": [{"path": "/b", "timeout": 3}]},
        }));
        let hooks = HostHooks::of(&spec.unwrap());
        assert!(hooks.precede_creation());
        hooks.store(dir.path()).unwrap();
        assert_eq!(HostHooks::load(dir.path()).unwrap(), hooks);
    }

    #[test]
    fn a_hook_is_told_the_pid_only_of_a_container_that_has_one() {
        let state = State {
            oci_version: "1.0.2".into(),
            id: ContainerId::parse("c").unwrap(),
            pid: 7,
            status: Status::Creating,
            bundle: "/b".into(),
            rootfs: "/b/r".into(),
            created: String::new(),
            annotations: None,
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        };
        let told = |status| -> serde_json::Value {
            serde_json::from_slice(&hook_state(&state, status)).unwrap()
        };
        assert_eq!(told(Status::Creating)["pid"], 7);
        assert_eq!(told(Status::Creating)["status"], "creating");
        assert!(told(Status::Stopped).get("pid").is_none());
    }
}
