//! The specification as the guest applies it, and what of it stays on the host: one pure function.
//!
//! Contract: the guest's specification names no path of the host. The root file system and every bind mount's source
//! become paths below the shared directory, as [`crate::share`] lays it out (but `/sys` on `/sys` is the guest's own); the cgroup path, paths of namespaces,
//! hooks of the host's side, the supervisor of system calls, the `vm` section and limits on the host's CPUs, NUMA nodes and disks ([`crate::cgroup`]
//! sets those) are removed. Everything else is passed on untouched: the agent is the
//! one that applies it, or refuses it.
//! Not here: which specifications are accepted (`bundle`), making the mounts (`share.rs`).

use std::path::{Path, PathBuf};

use caisson_agent_api::{NOTIFY_DIRECTORY, NOTIFY_SOCKET, SHARE_MOUNT};
use oci_spec::runtime::{
    Hooks, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Root, Spec,
};

use crate::id_mapping::{self, IdMapping};

/// A bind mount whose source is a path of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Its place among the specification's mounts, and its name in the shared directory.
    pub index: usize,
    /// The file or directory on the host.
    pub source: PathBuf,
    /// With everything that is mounted below it.
    pub recursive: bool,
    /// The guest may not write.
    pub read_only: bool,
    /// What the host mounts below the source later appears in the guest.
    pub follows_host: bool,
    /// Its files' owners, if they are others on this mount.
    pub identities: Option<IdMapping>,
}

/// What the host has to provide for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFiles {
    /// The root file system on the host.
    pub rootfs: PathBuf,
    /// It is read-only once the container is set up.
    pub rootfs_read_only: bool,
    /// The bind mounts.
    pub binds: Vec<Bind>,
}

/// Splits a checked specification into the guest's and the host's part. `bundle` is absolute.
pub fn split(id: &str, bundle: &Path, mut spec: Spec) -> (Spec, HostFiles) {
    let in_guest = Path::new(SHARE_MOUNT).join(id);
    let root = spec.root().clone().unwrap_or_default();
    let host = HostFiles {
        rootfs: bundle.join(root.path()),
        rootfs_read_only: root.readonly().unwrap_or(false),
        binds: binds(bundle, &spec),
    };
    let mut guest_root = Root::default();
    guest_root
        .set_path(in_guest.join("rootfs"))
        .set_readonly(root.readonly());
    spec.set_root(Some(guest_root));
    for bind in &host.binds {
        if let Some(mount) = spec
            .mounts_mut()
            .as_mut()
            .and_then(|all| all.get_mut(bind.index))
        {
            mount.set_source(Some(in_guest.join("mounts").join(bind.index.to_string())));
            id_mapping::remove(mount);
        }
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(None);
        linux.set_net_devices(None);
        linux.set_memory_policy(None);
        if let Some(seccomp) = linux.seccomp_mut() {
            seccomp.set_listener_path(None).set_listener_metadata(None);
        }
        for namespace in linux.namespaces_mut().iter_mut().flatten() {
            namespace.set_path(None);
        }
        linux
            .resources_mut()
            .iter_mut()
            .for_each(remove_host_limits);
    }
    let hooks = spec.hooks().as_ref().and_then(guest_hooks);
    spec.set_hooks(hooks);
    spec.set_vm(None);
    (spec, host)
}

/// Tells the program about descriptors that systemd passes (sd_listen_fds(3)). In its own PID namespace it is process 1.
pub fn add_listen_fds(spec: &mut Spec, count: u32) {
    if count > 0 {
        add_environment(
            spec,
            [format!("LISTEN_FDS={count}"), "LISTEN_PID=1".to_owned()],
        );
    }
}

/// Gives the container `id` its notify socket, at the place where runc puts it.
pub fn add_notify_socket(spec: &mut Spec, id: &str) {
    const WHERE: &str = "/run/notify";
    let mut mount = Mount::default();
    mount
        .set_destination(WHERE.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(Path::new(NOTIFY_DIRECTORY).join(id)))
        .set_options(Some(
            ["bind", "nosuid", "noexec", "nodev", "ro"]
                .map(str::to_owned)
                .to_vec(),
        ));
    spec.mounts_mut().get_or_insert_default().push(mount);
    add_environment(spec, [format!("NOTIFY_SOCKET={WHERE}/{NOTIFY_SOCKET}")]);
}

fn add_environment(spec: &mut Spec, added: impl IntoIterator<Item = String>) {
    if let Some(process) = spec.process_mut() {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(added);
        process.set_env(Some(env));
    }
}

/// Gives a container without a network namespace one in the guest, for the interface of its user-mode network, and the
/// sysfs that belongs to it.
pub fn add_network(spec: &mut Spec) {
    if let Some(linux) = spec.linux_mut() {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(LinuxNamespaceType::Network);
        linux
            .namespaces_mut()
            .get_or_insert_default()
            .push(namespace);
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if is_bind(mount) && is_kernels(mount) {
            mount.set_typ(Some("sysfs".to_owned()));
            mount.set_source(Some("sysfs".into()));
            if let Some(options) = mount.options_mut() {
                options.retain(|option| option != "bind" && option != "rbind");
            }
        }
    }
}

/// Leaves out what only the host can limit: the guest numbers its CPUs, nodes and disks differently.
pub fn remove_host_limits(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None).set_mems(None);
    }
    if let Some(io) = resources.block_io_mut() {
        io.set_weight_device(None)
            .set_throttle_read_bps_device(None)
            .set_throttle_write_bps_device(None)
            .set_throttle_read_iops_device(None)
            .set_throttle_write_iops_device(None);
    }
}

/// Points the namespaces of these kinds, in the guest's part of a specification, at those of a process in the guest.
pub fn join_namespaces(guest: &mut Spec, kinds: &[LinuxNamespaceType], guest_pid: u32) {
    let Some(linux) = guest.linux_mut() else {
        return;
    };
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        if kinds.contains(&namespace.typ())
            && let Some(name) = file_of(namespace.typ())
        {
            namespace.set_path(Some(format!("/proc/{guest_pid}/ns/{name}").into()));
        }
    }
}

/// A namespace's name in `/proc/PID/ns`; `None` for the kinds that containers do not share.
const fn file_of(kind: LinuxNamespaceType) -> Option<&'static str> {
    match kind {
        LinuxNamespaceType::Network => Some("net"),
        LinuxNamespaceType::Ipc => Some("ipc"),
        LinuxNamespaceType::Uts => Some("uts"),
        LinuxNamespaceType::Pid => Some("pid"),
        // Of pods with `hostUsers: false`, from containerd 2.0 on.
        LinuxNamespaceType::User => Some("user"),
        _ => None,
    }
}

/// Whether a mount shows the kernel's own files where they belong, as containers without a network namespace have them:
/// the kernel is the guest's.
fn is_kernels(mount: &Mount) -> bool {
    const SYS: &str = "/sys";
    mount.destination() == Path::new(SYS) && mount.source().as_deref() == Some(Path::new(SYS))
}

/// Whether a mount's source is a file or directory of the host; as runc decides it.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || has_option(mount, "bind")
        || has_option(mount, "rbind")
}

fn has_option(mount: &Mount, wanted: &str) -> bool {
    mount
        .options()
        .iter()
        .flatten()
        .any(|option| option == wanted)
}

fn binds(bundle: &Path, spec: &Spec) -> Vec<Bind> {
    let bind = |(index, mount): (usize, &Mount)| Bind {
        index,
        // As runc: relative to the bundle. An absolute source replaces the bundle's path.
        source: bundle.join(mount.source().as_deref().unwrap_or_else(|| Path::new(""))),
        recursive: has_option(mount, "rbind"),
        read_only: read_only(mount),
        follows_host: ["shared", "rshared", "slave", "rslave"]
            .iter()
            .any(|propagation| has_option(mount, propagation)),
        // One that makes no sense was refused with the bundle.
        identities: id_mapping::of(mount, spec).ok().flatten(),
    };
    spec.mounts()
        .iter()
        .flatten()
        .enumerate()
        .filter(|(_, mount)| is_bind(mount) && !is_kernels(mount))
        .map(bind)
        .collect()
}

/// The last of `ro` and `rw` counts, as in mount(8); `rro` also means read-only.
fn read_only(mount: &Mount) -> bool {
    mount
        .options()
        .iter()
        .flatten()
        .fold(false, |read_only, option| match option.as_str() {
            "ro" | "rro" => true,
            "rw" | "rrw" => false,
            _ => read_only,
        })
}

/// The hooks of the container's side.
fn guest_hooks(hooks: &Hooks) -> Option<Hooks> {
    let mut kept = Hooks::default();
    kept.set_create_container(hooks.create_container().clone());
    kept.set_start_container(hooks.start_container().clone());
    (kept != Hooks::default()).then_some(kept)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(value: Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    fn example() -> Spec {
        spec(json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ro"]},
                {"destination": "/etc/x", "type": "none", "source": "x.conf", "options": ["bind", "ro", "rw"]},
                {"destination": "/s", "type": "bind", "source": "/s", "options": ["rbind", "rslave"]},
            ],
            "hooks": {
                "prestart": [{"path": "/a"}],
                "createRuntime": [{"path": "/b"}],
                "createContainer": [{"path": "/c"}],
                "poststop": [{"path": "/d"}],
            },
            "linux": {
                "cgroupsPath": "/kube/pod1",
                "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid"}],
            },
        }))
    }

    #[test]
    fn sysfs_is_the_guests_and_elsewhere_the_hosts() {
        let mut example = example();
        let mounts = json!([
            {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]},
            {"destination": "/hostsys", "type": "bind", "source": "/sys", "options": ["rbind", "ro"]},
        ]);
        example.set_mounts(serde_json::from_value(mounts).unwrap());
        let (guest, host) = split("c1", Path::new("/b"), example);
        let shared: Vec<_> = host.binds.iter().map(|bind| bind.index).collect();
        assert_eq!(shared, [1]);
        let value = serde_json::to_value(&guest).unwrap();
        assert_eq!(value["mounts"][0]["source"], "/sys");
        let mut connected = guest;
        add_network(&mut connected);
        let value = serde_json::to_value(&connected).unwrap();
        let sysfs =
            json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]});
        assert_eq!(value["mounts"][0], sysfs);
        assert_ne!(value["mounts"][1]["type"], "sysfs");
        let namespaces = value["linux"]["namespaces"].as_array().unwrap();
        assert_eq!(namespaces.last().unwrap()["type"], "network");
    }

    #[test]
    fn the_guests_part_names_no_path_of_the_host() {
        let (guest, _) = split("c1", Path::new("/b"), example());
        let text = serde_json::to_string(&guest).unwrap();
        for host in [
            "/srv",
            "x.conf",
            "/kube",
            "/run/netns",
            "\"/a\"",
            "\"/b\"",
            "\"/d\"",
        ] {
            assert!(!text.contains(host), "{host} is left in {text}");
        }
        let value = serde_json::to_value(&guest).unwrap();
        assert_eq!(value["root"]["path"], "/run/caisson/share/c1/rootfs");
        assert_eq!(value["root"]["readonly"], true);
        assert_eq!(value["mounts"][0]["source"], "proc");
        assert_eq!(
            value["mounts"][1]["source"],
            "/run/caisson/share/c1/mounts/1"
        );
        assert_eq!(value["mounts"][1]["options"], json!(["rbind", "ro"]));
        assert_eq!(value["hooks"], json!({"createContainer": [{"path": "/c"}]}));
        assert_eq!(
            value["linux"]["namespaces"],
            json!([{"type": "network"}, {"type": "pid"}])
        );
    }

    #[test]
    fn the_hosts_part_resolves_paths_against_the_bundle() {
        let (_, host) = split("c1", Path::new("/b"), example());
        assert_eq!(host.rootfs, Path::new("/b/rootfs"));
        assert!(host.rootfs_read_only);
        let bind = |index, source: &str, recursive, read_only, follows_host| Bind {
            index,
            source: source.into(),
            recursive,
            read_only,
            follows_host,
            identities: None,
        };
        assert_eq!(
            host.binds,
            [
                bind(1, "/srv/data", true, true, false),
                bind(2, "/b/x.conf", false, false, false),
                bind(3, "/s", true, false, true),
            ]
        );
    }

    #[test]
    fn namespaces_that_are_joined_are_those_of_a_process_in_the_guest() {
        let namespaces =
            json!([{"type": "network"}, {"type": "ipc"}, {"type": "pid"}, {"type": "mount"}]);
        let mut guest = spec(json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}}));
        let kinds = [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc];
        join_namespaces(&mut guest, &kinds, 41);
        assert_eq!(
            serde_json::to_value(guest.linux()).unwrap()["namespaces"],
            json!([{"type": "network", "path": "/proc/41/ns/net"}, {"type": "ipc", "path": "/proc/41/ns/ipc"},
                {"type": "pid"}, {"type": "mount"}])
        );
    }

    #[test]
    fn an_absolute_root_stays_where_it_is() {
        let (_, host) = split(
            "c",
            Path::new("/b"),
            spec(json!({"ociVersion": "1.0.2", "root": {"path": "/r"}})),
        );
        assert_eq!(host.rootfs, Path::new("/r"));
        assert!(!host.rootfs_read_only && host.binds.is_empty());
    }

    #[test]
    fn hooks_of_the_host_alone_leave_none_for_the_guest() {
        let value = json!({"ociVersion": "1.0.2", "hooks": {"poststart": [{"path": "/d"}]}});
        assert!(split("c", Path::new("/b"), spec(value)).0.hooks().is_none());
    }

    #[test]
    fn limits_on_the_hosts_cpus_and_disks_stay_on_the_host() {
        let device = json!([{"major": 8, "minor": 0, "rate": 1}]);
        let whole = spec(json!({"ociVersion": "1.0.2", "linux": {"resources": {
            "cpu": {"cpus": "2-3", "mems": "1", "quota": 5},
            "blockIO": {"weight": 7, "throttleReadBpsDevice": device, "throttleWriteIOPSDevice": device},
        }}}));
        let (guest, _) = split("c", Path::new("/b"), whole);
        let resources = serde_json::to_value(guest.linux().as_ref().unwrap().resources()).unwrap();
        assert_eq!(resources["cpu"], json!({"quota": 5}));
        assert_eq!(resources["blockIO"], json!({"weight": 7}));
    }
}
