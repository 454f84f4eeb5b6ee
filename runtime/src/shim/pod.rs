//! Which sandbox a container belongs to, by the annotations of containerd's CRI and of CRI-O: pure functions.
//!
//! Contract: a container without them is alone in its virtual machine. A pod's *sandbox* (the pause container) brings
//! the virtual machine, whose size comes from the annotations that sum the pod up; the pod's other containers are
//! *members*: they join the IPC, UTS, network and, when asked, PID and user namespace of the sandbox's own process in the guest,
//! and its /dev/shm, a tmpfs in the guest.
//! Spec: containerd, pkg/cri/annotations; CRI-O, pkg/annotations; kubelet sets none of them.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use caisson_agent_api::SHM_MOUNT;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxNamespaceType, LinuxResources, Mount, Spec};
use serde::Deserialize;

use crate::guest_spec::HostFiles;

/// A container's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// No pod.
    Alone,
    /// The pod's first container, which stands for it.
    Sandbox,
    /// One more container of a pod.
    Member {
        /// The pod's sandbox.
        sandbox: String,
    },
}

/// containerd's names for a container's type and its sandbox.
pub(super) const KIND: &str = "io.kubernetes.cri.container-type";
pub(super) const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Container type and sandbox id, as each engine names them.
const NAMES: [(&str, &str); 2] = [
    (KIND, SANDBOX_ID),
    (
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ),
];

/// CRI-O's names for the sum of a pod's resources: the CRI's `LinuxContainerResources` as JSON. The later name first.
const SUMS: [&str; 2] = [
    "pod-linux-resources.crio.io",
    "io.kubernetes.cri-o.PodLinuxResources",
];

/// Where shared memory is, in every container of a pod.
const SHM: &str = "/dev/shm";

/// The size of a pod's shared memory if its mount on the host cannot be asked, in bytes: containerd's own default.
const DEFAULT_SHM_BYTES: u64 = 64 << 20;

type Annotations = HashMap<String, String>;

/// The only part of `config.json` that matters here.
#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: Option<Annotations>,
}

/// Why a container's role is not known: no readable `config.json`, a type that no engine has, a member of no sandbox.
#[derive(Debug, thiserror::Error)]
pub(super) enum RoleError {
    #[error("read {path}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}", path = path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("annotation {name}: unknown container type {value:?}")]
    Type { name: &'static str, value: String },
    #[error("annotation {0} is missing: which pod does the container belong to?")]
    NoSandbox(&'static str),
}

/// Reads the role of the container in a bundle.
pub(super) fn role_of(bundle: &Path) -> Result<Role, RoleError> {
    let path = bundle.join("config.json");
    let read = fs::read(&path);
    let text = read.map_err(|source| RoleError::Read {
        path: path.clone(),
        source,
    })?;
    let config: Annotated =
        serde_json::from_slice(&text).map_err(|source| RoleError::Json { path, source })?;
    role(config.annotations.as_ref())
}

/// The same for a bundle that a server is started for: without a specification it is for the Sandbox API.
pub(super) fn role_at_start(bundle: &Path) -> Result<Role, RoleError> {
    match role_of(bundle) {
        Err(RoleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Role::Sandbox)
        }
        role => role,
    }
}

fn role(annotations: Option<&Annotations>) -> Result<Role, RoleError> {
    let value = |name| {
        annotations
            .and_then(|all| all.get(name))
            .map(String::as_str)
    };
    for (name, sandbox_name) in NAMES {
        match value(name) {
            None | Some("") => {}
            Some("sandbox") => return Ok(Role::Sandbox),
            Some("container") => {
                let sandbox = value(sandbox_name).filter(|id| !id.is_empty());
                return Ok(Role::Member {
                    sandbox: sandbox
                        .ok_or(RoleError::NoSandbox(sandbox_name))?
                        .to_owned(),
                });
            }
            Some(other) => {
                return Err(RoleError::Type {
                    name,
                    value: other.to_owned(),
                });
            }
        }
    }
    Ok(Role::Alone)
}

/// What the containers of a pod may use together. Zero and less: no limit.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Sum {
    cpu_quota: i64,
    cpu_period: i64,
    cpu_shares: i64,
    memory_limit_in_bytes: i64,
}

impl Sum {
    /// As containerd or CRI-O tell it; nothing else is a limit.
    fn of(annotations: &Annotations) -> Self {
        let told = |name: &&str| serde_json::from_str(annotations.get(*name)?).ok();
        SUMS.iter().find_map(told).unwrap_or_else(|| {
            let number = |name: &str| annotations.get(name)?.parse().ok();
            let told = |name| number(name).unwrap_or(0);
            Self {
                cpu_quota: told("io.kubernetes.cri.sandbox-cpu-quota"),
                cpu_period: told("io.kubernetes.cri.sandbox-cpu-period"),
                cpu_shares: told("io.kubernetes.cri.sandbox-cpu-shares"),
                memory_limit_in_bytes: told("io.kubernetes.cri.sandbox-memory"),
            }
        })
    }
}

/// The specification by which a pod's virtual machine and cgroup are sized: the sandbox's own with the sums of its
/// containers, where the engine has told them.
pub(super) fn summed_up(spec: &Spec) -> Spec {
    let sum = spec.annotations().as_ref().map(Sum::of).unwrap_or_default();
    let limit = |number: i64| Some(number).filter(|&number| number > 0);
    let mut cpu = LinuxCpu::default();
    cpu.set_quota(limit(sum.cpu_quota))
        .set_period(limit(sum.cpu_period).map(i64::unsigned_abs))
        .set_shares(limit(sum.cpu_shares).map(i64::unsigned_abs));
    let mut memory = LinuxMemory::default();
    memory.set_limit(limit(sum.memory_limit_in_bytes));
    let mut resources = LinuxResources::default();
    resources.set_cpu(Some(cpu)).set_memory(Some(memory));
    let mut sized = spec.clone();
    if let Some(linux) = sized.linux_mut() {
        linux.set_resources(Some(resources));
    }
    sized
}

/// Points a container's /dev/shm, whose specification is already split into guest's and host's part, at the memory that
/// the pod's containers share in the guest. Answers how large it is to be: as large as the one on the host that it
/// replaces, by `size_of`.
pub(super) fn share_memory(
    guest: &mut Spec,
    files: &mut HostFiles,
    size_of: impl Fn(&Path) -> Option<u64>,
) -> Option<u64> {
    let mounts = guest.mounts_mut().as_mut()?;
    let is_shared = |mount: &Mount| {
        mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("bind")
    };
    let index = mounts.iter().position(is_shared)?;
    mounts.get_mut(index)?.set_source(Some(SHM_MOUNT.into()));
    let replaced = files.binds.iter().position(|bind| bind.index == index)?;
    let host = files.binds.remove(replaced).source;
    Some(size_of(&host).unwrap_or(DEFAULT_SHM_BYTES))
}

/// The mount of a pod's shared memory, as an engine specifies it that makes it on the host; here nobody does.
pub(super) fn shared_memory() -> serde_json::Value {
    serde_json::json!({
        "destination": SHM, "type": "bind", "source": "shm",
        "options": ["rbind", "nosuid", "nodev", "noexec"],
    })
}

/// Completes the specification of a member of a pod whose engine leaves the pod's files to the sandbox: those of `files`
/// (where, and from where) that it has no mount for, and in the pod's IPC namespace the pod's shared memory.
pub(super) fn furnish(spec: &mut Spec, files: &[(&str, PathBuf)]) {
    let shares_memory = joins(spec).contains(&LinuxNamespaceType::Ipc);
    let mounts = spec.mounts_mut().get_or_insert_default();
    if shares_memory {
        let own = |mount: &Mount| {
            mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs")
        };
        let shared = serde_json::from_value::<Mount>(shared_memory());
        if let (Some(own), Ok(shared)) = (mounts.iter_mut().find(|mount| own(mount)), shared) {
            *own = shared;
        }
    }
    for (place, file) in files {
        if mounts
            .iter()
            .any(|mount| mount.destination() == Path::new(place))
        {
            continue;
        }
        let mut mount = Mount::default();
        mount
            .set_destination(place.into())
            .set_typ(Some("bind".to_owned()))
            .set_source(Some(file.clone()))
            .set_options(Some(
                ["rbind", "rprivate", "rw"].map(str::to_owned).to_vec(),
            ));
        mounts.push(mount);
    }
}

/// The namespaces of a member that are its pod's.
pub(super) fn joins(spec: &Spec) -> Vec<LinuxNamespaceType> {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let is_joined = |kind, path: Option<&PathBuf>| {
        kind == LinuxNamespaceType::Network || path.is_some_and(|path| !path.as_os_str().is_empty())
    };
    namespaces
        .into_iter()
        .flatten()
        .filter(|namespace| is_joined(namespace.typ(), namespace.path().as_ref()))
        .map(|namespace| namespace.typ())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        let own = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
        pairs.iter().map(own).collect()
    }

    fn spec(value: Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn roles_are_told_apart_for_containerd_and_cri_o() {
        let role = |pairs: &[(&str, &str)]| role(Some(&annotations(pairs)));
        assert_eq!(super::role(None).unwrap(), Role::Alone);
        assert_eq!(role(&[("x", "y")]).unwrap(), Role::Alone);
        for (kind, sandbox) in NAMES {
            assert_eq!(role(&[(kind, "sandbox")]).unwrap(), Role::Sandbox);
            let member = role(&[(kind, "container"), (sandbox, "s1")]).unwrap();
            assert_eq!(
                member,
                Role::Member {
                    sandbox: "s1".into()
                }
            );
            assert!(role(&[(kind, "container")]).is_err());
            assert!(role(&[(kind, "podsandbox")]).is_err());
        }
    }

    #[test]
    fn a_pod_is_as_large_as_its_containers_together() {
        let sized = summed_up(&spec(json!({
            "ociVersion": "1.0.2",
            "annotations": {
                "io.kubernetes.cri.sandbox-cpu-quota": "150000",
                "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "io.kubernetes.cri.sandbox-memory": "134217728",
            },
            "linux": {"resources": {"cpu": {"shares": 2}}},
        })));
        let linux = serde_json::to_value(sized.linux()).unwrap();
        assert_eq!(
            linux["resources"]["cpu"],
            json!({"quota": 150_000, "period": 100_000})
        );
        assert_eq!(linux["resources"]["memory"]["limit"], 134_217_728);
    }

    #[test]
    fn cri_o_tells_the_sum_in_one_object() {
        for name in SUMS {
            let sum = r#"{"cpu_period":100000,"cpu_quota":50000,"cpu_shares":512,"memory_limit_in_bytes":67108864,"unified":{}}"#;
            let sized = summed_up(&spec(json!({
                "ociVersion": "1.0.2",
                "annotations": {name: sum},
                "linux": {},
            })));
            let resources = serde_json::to_value(sized.linux()).unwrap()["resources"].clone();
            let cpu = json!({"quota": 50_000, "period": 100_000, "shares": 512});
            assert_eq!(resources["cpu"], cpu);
            assert_eq!(resources["memory"]["limit"], 67_108_864);
        }
    }

    #[test]
    fn zero_means_no_limit() {
        let sized = summed_up(&spec(json!({
            "ociVersion": "1.0.2",
            "annotations": {
                "io.kubernetes.cri.sandbox-cpu-quota": "0",
                "io.kubernetes.cri.sandbox-memory": "0",
            },
            "linux": {},
        })));
        assert!(crate::sizing::memory_limit(&sized).is_none());
    }

    #[test]
    fn a_member_joins_the_sandboxs_namespaces_and_no_others() {
        let member = spec(json!({
            "ociVersion": "1.0.2",
            "mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/run/x/shm", "options": ["rbind"]}],
            "linux": {"namespaces": [
                {"type": "pid"},
                {"type": "ipc", "path": "/proc/9/ns/ipc"},
                {"type": "uts", "path": "/proc/9/ns/uts"},
                {"type": "network", "path": "/proc/9/ns/net"},
                {"type": "mount"},
            ]},
        }));
        let joined = joins(&member);
        let (mut guest, mut files) = crate::guest_spec::split("c", Path::new("/b"), member);
        crate::guest_spec::join_namespaces(&mut guest, &joined, 41);
        assert_eq!(files.binds.len(), 1);
        assert_eq!(
            share_memory(&mut guest, &mut files, |_| None),
            Some(64 << 20)
        );
        assert!(files.binds.is_empty());
        let value = serde_json::to_value(&guest).unwrap();
        let path = |n: usize| value["linux"]["namespaces"][n]["path"].clone();
        assert_eq!(path(0), Value::Null);
        assert_eq!(path(1), "/proc/41/ns/ipc");
        assert_eq!(path(2), "/proc/41/ns/uts");
        assert_eq!(path(3), "/proc/41/ns/net");
        assert_eq!(path(4), Value::Null);
        assert_eq!(value["mounts"][0]["source"], "/run/caisson/shm");
    }

    #[test]
    fn a_pods_shared_memory_is_the_guests_and_as_large_as_the_hosts() {
        let mounts = json!([
            {"destination": "/data", "type": "bind", "source": "/data"},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/shm", "options": ["rbind", "ro"]},
        ]);
        let sandbox = spec(json!({"ociVersion": "1.0.2", "mounts": mounts}));
        let (mut guest, mut files) = crate::guest_spec::split("c", Path::new("/b"), sandbox);
        let size_of = |path: &Path| (path == Path::new("/run/shm")).then_some(4096);
        assert_eq!(share_memory(&mut guest, &mut files, size_of), Some(4096));
        assert_eq!(files.binds.len(), 1);
        let mount = &serde_json::to_value(&guest).unwrap()["mounts"][1];
        assert_eq!(mount["source"], "/run/caisson/shm");
        assert_eq!(mount["options"], json!(["rbind", "ro"]));
    }

    #[test]
    fn a_bundle_without_a_specification_is_for_the_sandbox_api() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(role_at_start(dir.path()).unwrap(), Role::Sandbox);
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(role_at_start(dir.path()).unwrap(), Role::Alone);
        fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(role_at_start(dir.path()).is_err());
    }

    #[test]
    fn a_member_gets_the_pods_files_and_memory_where_it_has_none_of_its_own() {
        let member = |ipc: Value| {
            let mut spec = spec(json!({
                "ociVersion": "1.0.2",
                "mounts": [
                    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                    {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/hosts"},
                ],
                "linux": {"namespaces": [ipc]},
            }));
            let file = |name: &str| PathBuf::from("/b").join(name);
            let files = [
                ("/etc/hosts", file("hosts")),
                ("/etc/resolv.conf", file("resolv.conf")),
            ];
            furnish(&mut spec, &files);
            serde_json::to_value(spec.mounts()).unwrap()
        };
        let mounts = member(json!({"type": "ipc", "path": "/proc/9/ns/ipc"}));
        assert_eq!(mounts[0]["type"], "bind");
        assert_eq!(mounts[1]["source"], "/var/lib/hosts");
        assert_eq!(mounts[2]["destination"], "/etc/resolv.conf");
        assert_eq!(mounts[2]["source"], "/b/resolv.conf");
        assert_eq!(mounts.as_array().unwrap().len(), 3);
        assert_eq!(member(json!({"type": "ipc"}))[0]["type"], "tmpfs");
    }

    #[test]
    fn a_container_without_shared_memory_asks_for_none() {
        let plain = spec(json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
        ]}));
        let (mut guest, mut files) = crate::guest_spec::split("c", Path::new("/b"), plain);
        assert_eq!(share_memory(&mut guest, &mut files, |_| Some(1)), None);
    }
}
