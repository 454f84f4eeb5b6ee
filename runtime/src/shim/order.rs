//! What containerd's Sandbox API orders: the kubelet's description of a pod, as the specification of its sandbox.
//!
//! Contract: pure. The specification is that of a pod's sandbox as containerd's own sandboxer writes it for a pause
//! container: hostname, namespaces, sysctls, cgroup, and annotations with the sums of the pod's containers; so whatever
//! reads one reads the other. It names a program, as every specification must, which is never run.
//! What cannot be done is refused by name.
//! Not here: what the API does with it (`tasks/held.rs`).
//! Spec: Kubernetes, cri-api `runtime.v1.PodSandboxConfig`; containerd, internal/cri/server/podsandbox.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use prost::Message;
use serde_json::{Value, json};

use super::pod::{KIND, SANDBOX_ID};
use crate::bundle::OCI_VERSION;

/// The name of the description's type, after any prefix.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// What containerd allows in a pod's network namespace unless it is configured otherwise: ports and ping for everyone.
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Orders that cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum OrderError {
    #[error("the pod's description is not of its type {TYPE}")]
    Malformed(#[source] prost::DecodeError),
    #[error(
        "a user namespace for the pod (hostUsers: false) is not supported with the Sandbox API"
    )]
    UserNamespace,
}

/// The parts of a pod's description that matter to its sandbox, under the numbers of the published message.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Description {
    #[prost(string, tag = "2")]
    pub(super) hostname: String,
    #[prost(message, optional, tag = "4")]
    dns: Option<Dns>,
    #[prost(btree_map = "string, string", tag = "7")]
    annotations: BTreeMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<Linux>,
}

/// `DNSConfig`.
#[derive(Clone, PartialEq, Message)]
struct Dns {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    options: Vec<String>,
}

/// `LinuxPodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
struct Linux {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security: Option<Security>,
    #[prost(btree_map = "string, string", tag = "3")]
    sysctls: BTreeMap<String, String>,
    #[prost(message, optional, tag = "5")]
    resources: Option<Resources>,
}

/// `LinuxSandboxSecurityContext`.
#[derive(Clone, PartialEq, Message)]
struct Security {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<Namespaces>,
}

/// `NamespaceOption`.
#[derive(Clone, PartialEq, Message)]
struct Namespaces {
    #[prost(enumeration = "Mode", tag = "1")]
    network: i32,
    #[prost(enumeration = "Mode", tag = "2")]
    pid: i32,
    #[prost(enumeration = "Mode", tag = "3")]
    ipc: i32,
    #[prost(message, optional, tag = "5")]
    user: Option<User>,
}

/// `UserNamespace`.
#[derive(Clone, PartialEq, Message)]
struct User {
    #[prost(enumeration = "Mode", tag = "1")]
    mode: i32,
}

/// `NamespaceMode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, prost::Enumeration)]
#[repr(i32)]
enum Mode {
    Pod = 0,
    Container = 1,
    Node = 2,
    Target = 3,
}

/// `LinuxContainerResources`: the sums of the pod's containers.
#[derive(Clone, PartialEq, Message)]
struct Resources {
    #[prost(int64, tag = "1")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    cpu_quota: i64,
    #[prost(int64, tag = "3")]
    cpu_shares: i64,
    #[prost(int64, tag = "4")]
    memory_bytes: i64,
}

/// The pod's description in what comes with an order; `None` if it is something else.
pub(super) fn description(options: Option<&Any>) -> Result<Option<Description>, OrderError> {
    let is_one = |any: &&Any| any.type_url.rsplit('/').next() == Some(TYPE);
    let description = options
        .filter(is_one)
        .map(|any| Description::decode(any.value.as_slice()));
    description.transpose().map_err(OrderError::Malformed)
}

impl Description {
    /// The specification of the sandbox `id`, whose network namespace on the host is `network`, or a new one.
    pub(super) fn specification(
        &self,
        id: &str,
        network: &str,
        annotations: &HashMap<String, String>,
    ) -> Result<Value, OrderError> {
        let linux = self.linux.clone().unwrap_or_default();
        let security = linux.security.clone().unwrap_or_default();
        let namespaces = security.namespaces.unwrap_or_default();
        if namespaces.user.as_ref().map(User::mode) == Some(Mode::Pod) {
            return Err(OrderError::UserNamespace);
        }
        let mut spec = json!({
            "ociVersion": OCI_VERSION,
            "process": {
                "user": {"uid": 65535, "gid": 65535},
                "args": ["/pause"],
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {},
            },
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                super::pod::shared_memory(),
            ],
            "annotations": self.all_annotations(id, annotations),
            "linux": {
                "cgroupsPath": cgroups_path(&linux.cgroup_parent, id),
                "namespaces": namespaces.list(network),
                "sysctl": namespaces.sysctls(&linux.sysctls),
            },
        });
        if !self.hostname.is_empty() && namespaces.network() != Mode::Node {
            spec["hostname"] = json!(self.hostname);
        }
        Ok(spec)
    }

    /// Those of the pod and of the order, and those by which a sandbox is known and sized.
    fn all_annotations(
        &self,
        id: &str,
        ordered: &HashMap<String, String>,
    ) -> BTreeMap<String, String> {
        let mut all = self.annotations.clone();
        all.extend(ordered.iter().map(|(k, v)| (k.clone(), v.clone())));
        let linux = self.linux.clone().unwrap_or_default();
        let sums = linux.resources.unwrap_or_default();
        let sums = [
            ("cpu-period", sums.cpu_period),
            ("cpu-quota", sums.cpu_quota),
            ("cpu-shares", sums.cpu_shares),
            ("memory", sums.memory_bytes),
        ];
        for (name, sum) in sums {
            let name = format!("io.kubernetes.cri.sandbox-{name}");
            all.insert(name, sum.to_string());
        }
        all.insert(KIND.to_owned(), "sandbox".to_owned());
        all.insert(SANDBOX_ID.to_owned(), id.to_owned());
        all
    }

    /// The pod's resolv.conf; `None`: as on the host.
    pub(super) fn resolv_conf(&self) -> Option<String> {
        let dns = self.dns.as_ref()?;
        let mut text = String::new();
        if !dns.searches.is_empty() {
            text += &format!("search {}\n", dns.searches.join(" "));
        }
        for server in &dns.servers {
            text += &format!("nameserver {server}\n");
        }
        if !dns.options.is_empty() {
            text += &format!("options {}\n", dns.options.join(" "));
        }
        Some(text).filter(|text| !text.is_empty())
    }
}

impl Namespaces {
    /// Those that the sandbox has of its own.
    fn list(&self, network: &str) -> Vec<Value> {
        let mut list = vec![json!({"type": "mount"})];
        if self.network() != Mode::Node {
            list.push(json!({"type": "uts"}));
            list.push(match network {
                "" => json!({"type": "network"}),
                path => json!({"type": "network", "path": path}),
            });
        }
        if self.ipc() != Mode::Node {
            list.push(json!({"type": "ipc"}));
        }
        if self.pid() != Mode::Node {
            list.push(json!({"type": "pid"}));
        }
        list
    }

    /// What the pod asks for, and containerd's own in a network namespace that is the pod's.
    fn sysctls(&self, asked: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let own = SYSCTLS.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let own = own.into_iter().filter(|_| self.network() != Mode::Node);
        own.chain(asked.clone()).collect()
    }
}

/// Where the cgroup goes: in systemd's words if its parent is a slice, as containerd has it.
fn cgroups_path(parent: &str, id: &str) -> String {
    let name = Path::new(parent).file_name().unwrap_or_default();
    match name.to_string_lossy() {
        slice if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => Path::new("/")
            .join(parent)
            .join(id)
            .to_string_lossy()
            .into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(description: &Description) -> Any {
        Any {
            type_url: format!("types.containerd.io/{TYPE}"),
            value: description.encode_to_vec(),
            ..Default::default()
        }
    }

    fn with_namespaces(namespaces: Namespaces) -> Description {
        Description {
            linux: Some(Linux {
                security: Some(Security {
                    namespaces: Some(namespaces),
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn kinds(spec: &Value) -> Vec<&str> {
        let list = spec["linux"]["namespaces"].as_array().unwrap();
        list.iter().filter_map(|n| n["type"].as_str()).collect()
    }

    #[test]
    fn a_description_is_told_from_other_options() {
        let description = Description {
            hostname: "web-0".to_owned(),
            ..Default::default()
        };
        let read = super::description(Some(&described(&description))).unwrap();
        assert_eq!(read.unwrap().hostname, "web-0");
        let other = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            ..Default::default()
        };
        assert!(super::description(Some(&other)).unwrap().is_none());
        assert!(super::description(None).unwrap().is_none());
        let broken = Any {
            value: vec![0xff],
            ..described(&description)
        };
        assert!(super::description(Some(&broken)).is_err());
    }

    #[test]
    fn a_pods_sandbox_is_described_as_containerd_describes_it() {
        let description = Description {
            hostname: "web-0".to_owned(),
            annotations: [("a".to_owned(), "b".to_owned())].into(),
            linux: Some(Linux {
                cgroup_parent: "/kubepods/pod1".to_owned(),
                sysctls: [("kernel.shmmax".to_owned(), "4096".to_owned())].into(),
                resources: Some(Resources {
                    cpu_quota: 150_000,
                    cpu_period: 100_000,
                    memory_bytes: 128 << 20,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let more = HashMap::from([("c".to_owned(), "d".to_owned())]);
        let spec = description
            .specification("s1", "/run/netns/x", &more)
            .unwrap();
        assert_eq!(spec["hostname"], "web-0");
        assert_eq!(kinds(&spec), ["mount", "uts", "network", "ipc", "pid"]);
        assert_eq!(spec["linux"]["namespaces"][2]["path"], "/run/netns/x");
        assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/pod1/s1");
        assert_eq!(spec["linux"]["sysctl"]["kernel.shmmax"], "4096");
        assert_eq!(
            spec["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"],
            "0"
        );
        let annotation = |name: &str| spec["annotations"][name].as_str();
        assert_eq!((annotation("a"), annotation("c")), (Some("b"), Some("d")));
        assert_eq!(annotation(KIND), Some("sandbox"));
        assert_eq!(annotation(SANDBOX_ID), Some("s1"));
        assert_eq!(
            annotation("io.kubernetes.cri.sandbox-memory"),
            Some("134217728")
        );
    }

    #[test]
    fn the_nodes_namespaces_are_left_out_and_a_user_namespace_is_refused() {
        let node = with_namespaces(Namespaces {
            network: Mode::Node.into(),
            pid: Mode::Node.into(),
            ipc: Mode::Node.into(),
            user: None,
        });
        let spec = node.specification("s", "", &HashMap::new()).unwrap();
        assert_eq!(kinds(&spec), ["mount"]);
        let user = |mode: Mode| {
            with_namespaces(Namespaces {
                user: Some(User { mode: mode.into() }),
                ..Default::default()
            })
            .specification("s", "", &HashMap::new())
        };
        assert!(matches!(user(Mode::Pod), Err(OrderError::UserNamespace)));
        assert!(user(Mode::Node).is_ok());
    }

    #[test]
    fn cgroups_follow_the_form_of_their_parent() {
        assert_eq!(cgroups_path("", "s"), "/s");
        assert_eq!(cgroups_path("/k8s.io", "s"), "/k8s.io/s");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod1.slice", "s"),
            "kubepods-pod1.slice:cri-containerd:s"
        );
    }

    #[test]
    fn names_are_resolved_as_the_pod_wants_or_as_on_the_host() {
        let dns = |dns: Dns| {
            Description {
                dns: Some(dns),
                ..Default::default()
            }
            .resolv_conf()
        };
        assert_eq!(dns(Dns::default()), None);
        let text = dns(Dns {
            servers: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
            searches: vec!["a".to_owned(), "b".to_owned()],
            options: vec!["ndots:5".to_owned()],
        });
        assert_eq!(
            text.unwrap(),
            "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
    }
}
