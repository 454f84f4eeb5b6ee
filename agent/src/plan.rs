//! The plan of a process: everything its set-up needs to know, decided before anything is done.
//!
//! Contract: [`container`] and [`process`] are pure functions of the OCI specification. Every refusal of a
//! specification happens here; what they return can be carried out step by step (`child.rs`) and fails then only for
//! reasons that the kernel gives. The plan travels to the re-executed child as JSON.
//! Where the specification is silent the plan is what runc 1.1 would do.
//! Not here: limits and device rules of the cgroup (`plan/resources.rs`, `devices.rs`), which the agent itself applies.
//! Spec: OCI runtime specification 1.2, config.md and config-linux.md.

pub mod disks;
pub mod mounts;
pub mod namespaces;
pub mod process;
pub mod resources;
pub mod seccomp;
pub mod sysctl;

use mounts::MountPlan;
use namespaces::NamespacePlan;
use oci_spec::runtime::{Linux, LinuxDeviceType, Spec};
use process::ProcessPlan;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Why a specification is refused. Nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The bytes are no specification.
    #[error("parse the specification")]
    Parse(#[source] serde_json::Error),
    /// A part that must be there is not.
    #[error("{field} is missing")]
    Missing {
        /// The part's name in config.json.
        field: &'static str,
    },
    /// A value that has no meaning.
    #[error("{field}: {value:?} is not valid")]
    Invalid {
        /// The part's name in config.json.
        field: &'static str,
        /// What it says.
        value: String,
    },
    /// A part that this agent cannot give.
    #[error("{feature} is not supported")]
    Unsupported {
        /// What was asked for.
        feature: String,
    },
    /// The same namespace twice.
    #[error("malformed spec file: duplicated ns {0:?}")]
    DuplicateNamespace(String),
    /// A part that needs a namespace which the specification does not give.
    #[error("{what} needs a private {namespace} namespace")]
    NeedsNamespace {
        /// What was asked for.
        what: String,
        /// The missing namespace.
        namespace: &'static str,
    },
    /// A sysctl that is not the container's own.
    #[error("sysctl {name:?} {reason}")]
    Sysctl {
        /// The key.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// A mount that would hide or fake parts of /proc (runc: checkProcMount).
    #[error("{destination:?} cannot be mounted because it is {reason}")]
    ProcMount {
        /// The mount's destination.
        destination: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// A device rule that no cgroup can enforce.
    #[error("device rule \"{rule}\" is not valid")]
    DeviceRule {
        /// The rule.
        rule: String,
    },
    /// libseccomp refuses the profile.
    #[error("seccomp: {step}")]
    Seccomp {
        /// The step that failed.
        step: String,
        /// The library's reason.
        source: libseccomp::error::SeccompError,
    },
    /// The compiled profile could not be read back.
    #[error("seccomp: read the compiled filter")]
    SeccompExport(#[source] std::io::Error),
    /// Memory limits that contradict each other.
    #[error("{0}")]
    Memory(&'static str),
}

/// What the child is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChildPlan {
    /// The container's name: names its keyring and appears in the state given to hooks.
    pub container_id: String,
    /// The cgroup's directory, which the process is born into.
    pub cgroup: PathBuf,
    /// Namespaces to make and to join.
    pub namespaces: NamespacePlan,
    /// The container that is to be set up; `None` for a further process in one that exists.
    pub container: Option<ContainerPlan>,
    /// The process waits in its network namespace until the agent has connected that.
    pub awaits_network: bool,
    /// The process runs no program: it keeps the container's namespaces for others.
    pub holds: bool,
    /// The process itself.
    pub process: ProcessPlan,
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePlan {
    /// Where, in the container.
    pub path: PathBuf,
    /// File type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A program to run at a point of the container's life. Its path is a path **of the guest** (createContainer) or of the
/// container (startContainer); hooks of the host's side never reach the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPlan {
    /// The program.
    pub path: PathBuf,
    /// Its arguments, the first being its name.
    pub args: Vec<String>,
    /// Its whole environment.
    pub env: Vec<String>,
    /// Seconds after which it is killed and has failed.
    pub timeout: Option<u64>,
}

/// What is set up once for a container.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerPlan {
    /// The root file system, a path of the guest.
    pub rootfs: PathBuf,
    /// Mounted read-only.
    pub readonly: bool,
    /// `MS_*` propagation of the container's root mount.
    pub propagation: Option<u32>,
    /// In the order of the specification.
    pub mounts: Vec<MountPlan>,
    /// The agent populates /dev; false if the specification binds a /dev of its own.
    pub own_dev: bool,
    /// Default and further device nodes.
    pub devices: Vec<DevicePlan>,
    /// Covered by an empty file or directory.
    pub masked_paths: Vec<String>,
    /// Made read-only.
    pub readonly_paths: Vec<String>,
    /// Files below /proc/sys and their values.
    pub sysctls: Vec<(String, String)>,
    /// Host name, if it is to be set.
    pub hostname: Option<String>,
    /// NIS domain name, if it is to be set.
    pub domainname: Option<String>,
    /// Run before pivot_root.
    pub create_hooks: Vec<HookPlan>,
    /// Run before execve of the container's program.
    pub start_hooks: Vec<HookPlan>,
    /// Goes to the hooks: the bundle's path on the host and the annotations.
    pub bundle: String,
    /// Goes to the hooks.
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// The nodes that every container has (config-linux.md, "Default Devices").
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/random", 1, 8),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/zero", 1, 5),
    ("/dev/urandom", 1, 9),
];

/// Parses config.json.
pub fn parse(spec: &[u8]) -> Result<Spec, PlanError> {
    serde_json::from_slice(spec).map_err(PlanError::Parse)
}

/// Plans the part of a container that is set up once.
pub fn container(spec: &Spec, bundle: &str) -> Result<ContainerPlan, PlanError> {
    let root = spec
        .root()
        .as_ref()
        .ok_or(PlanError::Missing { field: "root" })?;
    if !root.path().is_absolute() {
        let value = root.path().display().to_string();
        return Err(PlanError::Invalid {
            field: "root.path",
            value,
        });
    }
    let linux = spec.linux().as_ref();
    let mounts = mounts::plan(spec.mounts().as_deref().unwrap_or_default())?;
    let own_dev = !mounts
        .iter()
        .any(|m| m.is_bind() && m.destination.as_os_str() == "/dev");
    let propagation = linux
        .and_then(|l| l.rootfs_propagation().as_deref())
        .filter(|p| !p.is_empty())
        .map(|p| {
            mounts::propagation(p).ok_or(PlanError::Invalid {
                field: "linux.rootfsPropagation",
                value: p.to_owned(),
            })
        })
        .transpose()?;
    let hostname = spec.hostname().clone().filter(|h| !h.is_empty());
    let domainname = spec.domainname().clone().filter(|d| !d.is_empty());
    namespaces::require_uts(spec, hostname.is_some(), "hostname")?;
    namespaces::require_uts(spec, domainname.is_some(), "domainname")?;
    if let Some(linux) = linux {
        refuse_host_hardware(linux)?;
    }
    Ok(ContainerPlan {
        rootfs: root.path().clone(),
        readonly: root.readonly().unwrap_or(false),
        propagation,
        mounts,
        own_dev,
        devices: devices(spec)?,
        masked_paths: linux
            .and_then(|l| l.masked_paths().clone())
            .unwrap_or_default(),
        readonly_paths: linux
            .and_then(|l| l.readonly_paths().clone())
            .unwrap_or_default(),
        sysctls: sysctl::plan(spec)?,
        hostname,
        domainname,
        create_hooks: hooks(
            spec.hooks()
                .as_ref()
                .and_then(|h| h.create_container().as_ref()),
        )?,
        start_hooks: hooks(
            spec.hooks()
                .as_ref()
                .and_then(|h| h.start_container().as_ref()),
        )?,
        bundle: bundle.to_owned(),
        annotations: spec
            .annotations()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
    })
}

/// What a guest cannot give, because it is a matter of the host's hardware or network.
fn refuse_host_hardware(linux: &Linux) -> Result<(), PlanError> {
    let asked = [
        ("linux.intelRdt", linux.intel_rdt().is_some()),
        (
            "linux.netDevices",
            linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()),
        ),
    ];
    match asked.iter().find(|(_, asked)| *asked) {
        Some((name, _)) => Err(PlanError::Unsupported {
            feature: format!("{name} in a guest"),
        }),
        None => Ok(()),
    }
}

fn devices(spec: &Spec) -> Result<Vec<DevicePlan>, PlanError> {
    let given = spec
        .linux()
        .as_ref()
        .and_then(|l| l.devices().as_deref())
        .unwrap_or_default();
    let mut plans: Vec<DevicePlan> = DEFAULT_DEVICES
        .iter()
        .filter(|(path, ..)| !given.iter().any(|d| d.path().as_os_str() == *path))
        .map(|&(path, major, minor)| DevicePlan {
            path: path.into(),
            mode: libc::S_IFCHR | 0o666,
            major,
            minor,
            uid: 0,
            gid: 0,
        })
        .collect();
    for device in given {
        let invalid = |what: &dyn ToString| PlanError::Invalid {
            field: "linux.devices",
            value: format!("{}: {}", device.path().display(), what.to_string()),
        };
        let kind = match device.typ() {
            LinuxDeviceType::B => libc::S_IFBLK,
            LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
            LinuxDeviceType::P => libc::S_IFIFO,
            LinuxDeviceType::A => return Err(invalid(&"type a")),
        };
        let number = |n: i64| {
            if kind == libc::S_IFIFO {
                Ok(0)
            } else {
                u32::try_from(n).map_err(|_| invalid(&n))
            }
        };
        plans.push(DevicePlan {
            path: device.path().clone(),
            mode: kind | (device.file_mode().unwrap_or(0o666) & 0o7777),
            major: number(device.major())?,
            minor: number(device.minor())?,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        });
    }
    Ok(plans)
}

fn hooks(hooks: Option<&Vec<oci_spec::runtime::Hook>>) -> Result<Vec<HookPlan>, PlanError> {
    let mut plans = Vec::new();
    for hook in hooks.into_iter().flatten() {
        if !hook.path().is_absolute() {
            let value = hook.path().display().to_string();
            return Err(PlanError::Invalid {
                field: "hooks.path",
                value,
            });
        }
        let timeout = match hook.timeout() {
            None => None,
            Some(seconds) => Some(u64::try_from(seconds).ok().filter(|s| *s > 0).ok_or(
                PlanError::Invalid {
                    field: "hooks.timeout",
                    value: seconds.to_string(),
                },
            )?),
        };
        plans.push(HookPlan {
            path: hook.path().clone(),
            args: hook.args().clone().unwrap_or_default(),
            env: hook.env().clone().unwrap_or_default(),
            timeout,
        });
    }
    Ok(plans)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<ContainerPlan, PlanError> {
        container(&parse(json.as_bytes())?, "/b")
    }

    fn message(json: &str) -> String {
        plan(json).unwrap_err().to_string()
    }

    #[test]
    fn the_default_devices_are_there_and_can_be_replaced() {
        let json = r#"{"ociVersion":"1.0.2","root":{"path":"/r"},"linux":{"devices":
            [{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":384,"uid":7}]}}"#;
        let plan = plan(json).unwrap();
        assert_eq!(plan.devices.len(), DEFAULT_DEVICES.len());
        let null = plan
            .devices
            .iter()
            .find(|d| d.path.as_os_str() == "/dev/null")
            .unwrap();
        assert_eq!((null.mode & 0o777, null.uid), (0o600, 7));
    }

    #[test]
    fn a_relative_root_and_no_root_are_refused() {
        assert_eq!(message(r#"{"ociVersion":"1.0.2"}"#), "root is missing");
        assert_eq!(
            message(r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"}}"#),
            r#"root.path: "rootfs" is not valid"#
        );
    }

    #[test]
    fn a_hostname_needs_a_uts_namespace() {
        let json = r#"{"ociVersion":"1.0.2","root":{"path":"/r"},"hostname":"h","linux":{}}"#;
        assert_eq!(message(json), "hostname needs a private uts namespace");
        let json = r#"{"ociVersion":"1.0.2","root":{"path":"/r"},"hostname":"h",
                       "linux":{"namespaces":[{"type":"uts"}]}}"#;
        assert_eq!(plan(json).unwrap().hostname.as_deref(), Some("h"));
    }

    #[test]
    fn what_is_the_hosts_hardware_is_refused_by_name() {
        for (field, value) in [
            ("intelRdt", r#"{"closID":"x"}"#),
            ("netDevices", r#"{"eth0":{}}"#),
        ] {
            let json = format!(
                r#"{{"ociVersion":"1.0.2","root":{{"path":"/r"}},"linux":{{"{field}":{value}}}}}"#
            );
            assert_eq!(
                message(&json),
                format!("linux.{field} in a guest is not supported")
            );
        }
    }

    #[test]
    fn a_bound_dev_is_left_alone() {
        let json = |options: &str| {
            format!(
                r#"{{"ociVersion":"1.0.2","root":{{"path":"/r"}},"mounts":
                [{{"destination":"/dev/","type":"tmpfs","source":"/dev","options":[{options}]}}]}}"#
            )
        };
        assert!(plan(&json("")).unwrap().own_dev);
        assert!(!plan(&json(r#""rbind""#)).unwrap().own_dev);
    }

    #[test]
    fn hooks_need_absolute_paths_and_positive_timeouts() {
        let json = |hook: &str| {
            format!(
                r#"{{"ociVersion":"1.0.2","root":{{"path":"/r"}},
                "hooks":{{"startContainer":[{hook}]}}}}"#
            )
        };
        assert_eq!(
            plan(&json(r#"{"path":"/h","timeout":3}"#))
                .unwrap()
                .start_hooks
                .len(),
            1
        );
        assert!(plan(&json(r#"{"path":"h"}"#)).is_err());
        assert!(plan(&json(r#"{"path":"/h","timeout":0}"#)).is_err());
    }
}
