//! `state`: the OCI state of a container, as runc prints it.

use std::{collections::HashMap, path::Path, process::ExitCode};

use serde::Serialize;

use super::{Context, print};
use crate::{
    bundle::OCI_VERSION,
    cli::StateArgs,
    error::CommandError,
    state::{ContainerId, State, StateDir, Status},
};

/// The fields of runc's `containerState`, in its order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Shown<'a> {
    oci_version: &'a str,
    id: &'a str,
    pid: u32,
    status: Status,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<&'a HashMap<String, String>>,
    owner: &'a str,
}

impl<'a> Shown<'a> {
    pub(super) fn new(state: &'a State, owner: &'a str) -> Self {
        Self {
            oci_version: OCI_VERSION,
            id: state.id.as_str(),
            pid: state.pid,
            status: state.status,
            bundle: &state.bundle,
            rootfs: &state.rootfs,
            created: &state.created,
            annotations: state.annotations.as_ref().filter(|all| !all.is_empty()),
            owner,
        }
    }
}

pub(super) fn state(args: &StateArgs, context: &Context) -> Result<ExitCode, CommandError> {
    let id = ContainerId::parse(&args.id)?;
    let state = StateDir::open(&context.root, &id)?.state()?;
    // runc leaves the owner empty here and ends without a newline.
    let json = serde_json::to_string_pretty(&Shown::new(&state, "")).map_err(CommandError::Json)?;
    print(&json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_is_runcs_to_the_byte() {
        let state = State {
            oci_version: "1.0.2-dev".into(),
            id: ContainerId::parse("c1").unwrap(),
            pid: 29222,
            status: Status::Created,
            bundle: "/tmp/rc/b".into(),
            rootfs: "/tmp/rc/b/rootfs".into(),
            created: "2026-11-21T12:30:37.397827925Z".into(),
            annotations: Some(HashMap::new()),
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        };
        let runc = r#"{
  "ociVersion": "1.0.2-dev",
  "id": "c1",
  "pid": 29222,
  "status": "created",
  "bundle": "/tmp/rc/b",
  "rootfs": "/tmp/rc/b/rootfs",
  "created": "2026-11-21T12:30:37.397827925Z",
  "owner": ""
}"#;
        let shown = serde_json::to_string_pretty(&Shown::new(&state, "")).unwrap();
        assert_eq!(shown, runc.replace("1.0.2-dev", OCI_VERSION));
    }
}
