//! Namespaces: which to make, which to join, with which identity mappings and clock offsets.
//!
//! Contract: pure. A container always gets a mount namespace: without one of its own it would share the agent's.
//! Spec: OCI config-linux.md "Namespaces", "User namespace mappings", "Offset for Time Namespace".

use super::PlanError;
use caisson_agent_api::id_map;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType as Kind, Spec};
use serde::{Deserialize, Serialize};
use std::{fmt::Write, path::PathBuf};

/// What becomes of the namespaces of a process.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespacePlan {
    /// `CLONE_NEW*` to be made.
    pub create: u32,
    /// `CLONE_NEW*` and the path (of the guest) of the namespace to join.
    pub join: Vec<(u32, PathBuf)>,
    /// `CLONE_NEW*` to join of the process behind an inherited pidfd.
    pub join_init: u32,
    /// Lines for `/proc/PID/uid_map`.
    pub uid_map: String,
    /// Lines for `/proc/PID/gid_map`.
    pub gid_map: String,
    /// Lines for `/proc/PID/timens_offsets`.
    pub time_offsets: String,
}

/// `CLONE_NEWUSER`: the one that decides who is allowed what.
pub const USER: u32 = Kind::User as u32;
/// `CLONE_NEWCGROUP`.
pub const CGROUP: u32 = Kind::Cgroup as u32;
/// `CLONE_NEWTIME`.
pub const TIME: u32 = Kind::Time as u32;
/// `CLONE_NEWNET`.
pub const NETWORK: u32 = Kind::Network as u32;
/// `CLONE_NEWNS`.
pub const MOUNT: u32 = Kind::Mount as u32;

impl NamespacePlan {
    /// Whether the process is root only within a user namespace.
    pub fn has_user(&self) -> bool {
        self.create & USER != 0 || self.join.iter().any(|(kind, _)| *kind == USER)
    }

    /// The plan for a further process: joins all that the first one has of its own.
    pub fn for_exec(&self) -> Self {
        let joined = self.join.iter().fold(0, |all, (kind, _)| all | kind);
        Self {
            join_init: self.create | joined,
            ..Self::default()
        }
    }
}

fn entry(spec: &Spec, kind: Kind) -> Option<&oci_spec::runtime::LinuxNamespace> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|n| n.typ() == kind)
}

/// Whether the container has a namespace of this kind apart from the guest's.
pub fn is_private(spec: &Spec, kind: Kind) -> bool {
    entry(spec, kind).is_some()
}

/// Refuses `what` when it is asked for without a UTS namespace to apply it to.
pub fn require_uts(spec: &Spec, asked: bool, what: &str) -> Result<(), PlanError> {
    if asked && !is_private(spec, Kind::Uts) {
        return Err(PlanError::NeedsNamespace {
            what: what.to_owned(),
            namespace: "uts",
        });
    }
    Ok(())
}

/// The guest's user that owns the container's cgroup, if that is to be the container's root: in a user namespace and a
/// cgroup namespace of its own, with the hierarchy mounted for writing (as in runc since 1.1).
pub fn cgroup_owner(spec: &Spec, mounts: &[super::mounts::MountPlan]) -> Option<u32> {
    let own = |kind| entry(spec, kind).is_some_and(|n| n.path().is_none());
    let writable = mounts.iter().any(|m| {
        m.kind.starts_with("cgroup") && m.attributes.set & super::mounts::attribute::RDONLY == 0
    });
    if !(own(Kind::User) && own(Kind::Cgroup) && writable) {
        return None;
    }
    let maps = spec.linux().as_ref()?.uid_mappings().as_ref()?;
    maps.iter()
        .find(|m| m.container_id() == 0)
        .map(LinuxIdMapping::host_id)
}

/// Plans the namespaces of a container's init process.
pub fn plan(spec: &Spec) -> Result<NamespacePlan, PlanError> {
    let mut plan = NamespacePlan::default();
    let mut seen = 0;
    let linux = spec.linux().as_ref();
    for namespace in linux
        .and_then(|l| l.namespaces().as_ref())
        .into_iter()
        .flatten()
    {
        let kind = namespace.typ() as u32;
        if seen & kind != 0 {
            return Err(PlanError::DuplicateNamespace(namespace.typ().to_string()));
        }
        seen |= kind;
        match namespace
            .path()
            .clone()
            .filter(|p| !p.as_os_str().is_empty())
        {
            None => plan.create |= kind,
            Some(path) => plan.join.push((kind, path)),
        }
    }
    if seen & MOUNT == 0 {
        plan.create |= MOUNT;
    }
    if let Some((_, path)) = plan.join.iter().find(|(kind, _)| *kind == MOUNT) {
        // The container's root is built in it: a joined one is another container's, which would lose its own.
        let feature = format!("joining the mount namespace {}", path.display());
        return Err(PlanError::Unsupported { feature });
    }
    // A user namespace is joined last: joining it gives up the rights to join the others.
    plan.join.sort_by_key(|(kind, _)| *kind == USER);
    if plan.create & USER != 0 {
        plan.uid_map = mapping(
            linux.and_then(|l| l.uid_mappings().as_deref()),
            "linux.uidMappings",
        )?;
        plan.gid_map = mapping(
            linux.and_then(|l| l.gid_mappings().as_deref()),
            "linux.gidMappings",
        )?;
    }
    if let Some(offsets) = linux
        .and_then(|l| l.time_offsets().as_ref())
        .filter(|o| !o.is_empty())
    {
        if plan.create & TIME == 0 {
            let what = "linux.timeOffsets".to_owned();
            return Err(PlanError::NeedsNamespace {
                what,
                namespace: "time",
            });
        }
        for clock in ["boottime", "monotonic"] {
            let Some(offset) = offsets.get(clock) else {
                continue;
            };
            let (seconds, nanoseconds) =
                (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
            let _ = writeln!(plan.time_offsets, "{clock} {seconds} {nanoseconds}");
        }
        if let Some(clock) = offsets
            .keys()
            .find(|k| *k != "boottime" && *k != "monotonic")
        {
            let value = clock.clone();
            return Err(PlanError::Invalid {
                field: "linux.timeOffsets",
                value,
            });
        }
    }
    Ok(plan)
}

fn mapping(maps: Option<&[LinuxIdMapping]>, field: &'static str) -> Result<String, PlanError> {
    let maps = maps
        .filter(|m| !m.is_empty())
        .ok_or(PlanError::Missing { field })?;
    let triple = |map: &LinuxIdMapping| (map.container_id(), map.host_id(), map.size());
    Ok(id_map::lines(maps.iter().map(triple)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(linux: &str) -> Result<NamespacePlan, PlanError> {
        let json = format!(r#"{{"ociVersion":"1.0.2","linux":{{{linux}}}}}"#);
        plan(&super::super::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn a_mount_namespace_is_always_made() {
        assert_eq!(run("").unwrap().create, MOUNT);
    }

    #[test]
    fn paths_are_joined_and_the_user_namespace_last() {
        let plan = run(
            r#""namespaces":[{"type":"user","path":"/u"},{"type":"network","path":"/n"},
                       {"type":"pid"}]"#,
        )
        .unwrap();
        assert_eq!(plan.join, [(NETWORK, "/n".into()), (USER, "/u".into())]);
        assert_eq!(
            plan.for_exec().join_init,
            NETWORK | USER | MOUNT | Kind::Pid as u32
        );
        assert!(plan.has_user() && plan.for_exec().create == 0);
    }

    #[test]
    fn a_user_namespace_needs_mappings() {
        assert!(run(r#""namespaces":[{"type":"user"}]"#).is_err());
        let plan = run(
            r#""namespaces":[{"type":"user"}],
            "uidMappings":[{"containerID":0,"hostID":1000,"size":5},{"containerID":5,"hostID":1,"size":1}],
            "gidMappings":[{"containerID":0,"hostID":7,"size":5}]"#,
        )
        .unwrap();
        assert_eq!(plan.uid_map, "0 1000 5\n5 1 1\n");
        assert_eq!(plan.gid_map, "0 7 5\n");
    }

    #[test]
    fn the_cgroup_is_given_to_a_root_that_may_write_it() {
        let owner = |option: &str| {
            let json = format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{{"type":"user"}},{{"type":"cgroup"}}],
                "uidMappings":[{{"containerID":0,"hostID":1000,"size":5}}]}},
                "mounts":[{{"destination":"/sys/fs/cgroup","type":"cgroup","options":["{option}"]}}]}}"#
            );
            let spec = super::super::parse(json.as_bytes()).unwrap();
            let mounts = super::super::mounts::plan(spec.mounts().as_deref().unwrap()).unwrap();
            cgroup_owner(&spec, &mounts)
        };
        assert_eq!(owner("rw"), Some(1000));
        assert_eq!(owner("ro"), None);
    }

    #[test]
    fn the_same_namespace_twice_is_refused() {
        let e = run(r#""namespaces":[{"type":"ipc"},{"type":"ipc"}]"#).unwrap_err();
        assert_eq!(e.to_string(), r#"malformed spec file: duplicated ns "ipc""#);
    }

    #[test]
    fn clock_offsets_need_a_time_namespace() {
        let offsets =
            r#""timeOffsets":{"boottime":{"secs":100,"nanosecs":5},"monotonic":{"secs":-1}}"#;
        assert!(run(offsets).is_err());
        let plan = run(&format!(r#""namespaces":[{{"type":"time"}}],{offsets}"#)).unwrap();
        assert_eq!(plan.time_offsets, "boottime 100 5\nmonotonic -1 0\n");
    }
}
