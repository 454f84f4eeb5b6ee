//! What the runtime asks of the agent in the guest, and the few names both must agree on.
//!
//! The agent dials the host on vsock port [`CONTROL_PORT`] once it is ready: that connection is the ready event, and
//! then carries ttrpc with the **host as the client**. Every standard stream of a process is a vsock connection of its
//! own that the agent dials to a port the host chose for it (see `Stdio` in the proto file).
//! The messages are those of `proto/agent.proto`; the host treats every answer as hostile.

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub mod id_map;
pub mod netlink;
pub mod number_list;
pub mod supervision;

pub use generated::agent::*;
pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};

/// The host's vsock port on which it waits for the agent's control connection.
pub const CONTROL_PORT: u32 = 1024;

/// The context identifier of the host, to which the agent dials (vsock(7), `VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// virtio-fs tag of the sandbox's shared directory.
pub const SHARE_TAG: &str = "caisson";

/// Where the agent mounts the shared directory. The runtime writes `root.path` and the sources of bind mounts as
/// absolute paths below it.
pub const SHARE_MOUNT: &str = "/run/caisson/share";

/// The resolver that Docker runs for the containers of its networks: on the host, at this address in the container's
/// network namespace. What is asked there in the guest travels to the host over a stream, a message each as the asker's
/// number and the length, two bytes in network order each, and the message.
pub const RESOLVER: core::net::Ipv4Addr = core::net::Ipv4Addr::new(127, 0, 0, 11);
/// Its port, and the most askers whose answers may be outstanding.
pub const RESOLVER_PORT: u16 = 53;
/// See [`RESOLVER`].
pub const RESOLVER_ASKERS: u16 = 256;
/// In an asker's number: the question came by TCP, and goes on by TCP.
pub const RESOLVER_BY_TCP: u16 = 0x8000;

/// Where the memory is that the containers of a sandbox share as their /dev/shm.
pub const SHM_MOUNT: &str = "/run/caisson/shm";

/// Where the directories are that stand for [volumes](Volume) in the guest.
pub const VOLUMES_MOUNT: &str = "/run/caisson/volumes";

/// Below it the agent mounts the [file systems of huge pages](HugePageVolume), each under its [name](huge_pages_name).
pub const HUGE_PAGES_MOUNT: &str = "/dev/caisson-huge-pages";

/// The name of the file system of huge pages that stands for a directory of the host.
pub fn huge_pages_name(device: u64, inode: u64) -> String {
    format!("{device}-{inode}")
}

/// Below it the agent makes a directory for the notify socket of each container that has one.
pub const NOTIFY_DIRECTORY: &str = "/dev/caisson";

/// The name of that socket.
pub const NOTIFY_SOCKET: &str = "notify.sock";

/// The VMM's control register: a byte-wide output port. See [`POWER_OFF`].
pub const POWER_PORT: u16 = 0x600;

/// Written to [`POWER_PORT`]: the VM ends, in good order.
pub const POWER_OFF: u8 = 1;

/// The beginnings of the names of [engines' AppArmor profiles](is_engines_apparmor_profile).
const ENGINES_APPARMOR_PROFILES: [&str; 5] = [
    "docker-default",
    "containers-default",
    "cri-containerd.apparmor.d",
    "crio-default",
    "nerdctl-default",
];

/// Whether an AppArmor profile is one that an engine gives to every container on a host with AppArmor. These keep a
/// container from the host's kernel and files, which a virtual machine does better: the agent passes over them, and
/// refuses all others.
pub fn is_engines_apparmor_profile(name: &str) -> bool {
    ENGINES_APPARMOR_PROFILES
        .iter()
        .any(|beginning| name.starts_with(beginning))
}
