//! What the VMM is given and what it says: the whole contract between `caisson` and `caisson-vmm`.
//!
//! The VMM is a function of its input. A [`VmSpec`] arrives as JSON on descriptor [`SPEC_FD`] (read to its end), with
//! every file it will ever use as an inherited descriptor, named in the spec by number. After that the VMM opens
//! nothing by path. While it runs it speaks over one `SOCK_SEQPACKET` Unix socket, [`VmSpec::control`]: each packet is
//! one JSON value, a [`Request`] to the VMM or an [`Event`] from it, with at most [`MAX_DESCRIPTORS`] attached
//! (`SCM_RIGHTS`). When the peer closes that socket the VMM ends at once: a sandbox never outlives its owner.
//!
//! Not here: how the host side finds or prepares those files (`runtime`), how they become devices (`vmm`).

use serde::{Deserialize, Serialize};

/// The descriptor on which the VMM reads its [`VmSpec`], as JSON, to end of file.
pub const SPEC_FD: i32 = 3;

/// The largest packet on the control socket, in bytes. Longer ones are refused by both sides.
pub const MAX_PACKET_BYTES: usize = 64 << 10;

/// The most descriptors that come with a packet.
pub const MAX_DESCRIPTORS: usize = 2;

/// The context identifier of every guest. Connections are carried over Unix sockets, so identifiers cannot collide.
pub const GUEST_CID: u64 = 3;

/// How many devices come before the first network interface: number `n` of the interfaces is device
/// `NETWORK_DEVICES_FROM + n` of the guest (`virtio-mmio.<number>`).
pub const NETWORK_DEVICES_FROM: u32 = MEMORY_DEVICE + 1;

/// The device that memory comes with: `virtio-mmio.<number>`, of no kind until the first [`Request::Memory`].
pub const MEMORY_DEVICE: u32 = 3;

/// The most network interfaces, spare ones included, and disks in their places.
pub const MAX_NETWORKS: usize = 16;

/// An open file descriptor that the VMM inherits, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

/// An amount of memory in units of 2^20 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MiB(pub u32);

impl MiB {
    /// The same amount in bytes; 2^32 MiB is 2^52 bytes, which always fits.
    pub const fn bytes(self) -> u64 {
        (self.0 as u64) << 20
    }
}

/// A virtual machine: its size, its boot files and its devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: Fd,
    /// The control socket (`SOCK_SEQPACKET`): [`Request`]s in, [`Event`]s out.
    pub control: Fd,
    /// The guest kernel, an uncompressed ELF image with a PVH entry note.
    pub kernel: Fd,
    /// The guest's initial root file system, an uncompressed cpio archive.
    pub initramfs: Fd,
    /// Words for the end of the kernel's command line, after those that describe the machine itself.
    #[serde(default)]
    pub cmdline: String,
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// The most vCPUs that [`Request::Vcpus`] may ask for; below `vcpus`: no more than that. The guest boots with `vcpus`.
    #[serde(default)]
    pub most_vcpus: u8,
    /// Guest memory, at least 64 MiB.
    pub memory: MemorySpec,
    /// How long the guest may take from its first instruction to its first vsock connection, in milliseconds.
    /// After that the VM ends with [`Cause::BootTimeout`]. 0: no limit.
    pub boot_deadline_ms: u64,
    /// Shared directories, each a virtio-fs device.
    #[serde(default)]
    pub shares: Vec<ShareSpec>,
    /// Network interfaces, each a virtio-net device.
    #[serde(default)]
    pub networks: Vec<NetworkSpec>,
    /// How many more interfaces and disks may be plugged in while the guest runs ([`Request::Plug`], [`Request::PlugDisk`]).
    /// Until then each is a device of no kind.
    #[serde(default)]
    pub spare_networks: u8,
    /// Whether network interfaces may come with [`NetworkSpec::vhost`]: each of their queues then has a doorbell of its own.
    #[serde(default)]
    pub vhost_net: bool,
    /// Disks, each a virtio-blk device.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Debug console: the guest's whole kernel log is written here, through an emulated 8250. `None`: only errors and
    /// panics are captured, for [`Event::Ended`].
    #[serde(default)]
    pub console: Option<Fd>,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Size at boot.
    pub size: MiB,
    /// What it may grow to by [`Request::Memory`]; below `size`: not at all.
    #[serde(default = "none")]
    pub most: MiB,
    /// Ask the host for transparent huge pages (five times fewer exits while the guest boots).
    pub huge_pages: bool,
    /// From which nodes of the host it comes; `None`: as for the VMM's parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<MemoryPolicy>,
}

/// What set_mempolicy(2) is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryPolicy {
    /// `MPOL_*` with `MPOL_F_*`.
    pub mode: u32,
    /// The host's nodes, 0 to 1023. None: as the mode says.
    pub nodes: Vec<u32>,
}

const fn none() -> MiB {
    MiB(0)
}

/// A directory of the host that the guest can mount by its tag.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSpec {
    /// virtio-fs tag: 1 to 36 bytes.
    pub tag: String,
    /// The directory, open with `O_DIRECTORY` (`O_PATH` will do).
    pub root: Fd,
    /// Trees in it of which the guest need not ask whether somebody else has changed them. None: it asks, everywhere.
    #[serde(default)]
    pub own: Option<OwnTrees>,
}

/// The trees `*/NAME` of a share, each up to what is mounted in it, that the guest may take for its own for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnTrees {
    /// The last component of their paths.
    pub name: String,
    /// How long it may believe what it was told of names and attributes. 0: as everywhere.
    pub believed_ms: u32,
}

/// What is behind a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// An attached tap, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, non-blocking.
    #[default]
    Tap,
    /// A connected stream socket, non-blocking, that carries Ethernet frames, each behind its length (32 bits,
    /// big-endian). Such an interface stays for the life of the machine.
    Stream,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// What [`NetworkSpec::kind`] says.
    pub tap: Fd,
    /// What it is.
    #[serde(default)]
    pub kind: NetworkKind,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// `/dev/vhost-net`, opened for this interface alone: the host's kernel moves its packets.
    #[serde(default)]
    pub vhost: Option<Fd>,
}

/// A disk backed by a file or a block device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The backing file.
    pub file: Fd,
    /// Refuse writes, and say so to the guest.
    pub read_only: bool,
    /// Identity reported to the guest: at most 20 bytes.
    pub serial: String,
}

/// What the owner of the sandbox can ask of a running VMM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Connect the attached stream socket to a vsock port on which the guest listens. A refusal closes the socket.
    Connect {
        /// The guest's port.
        port: u32,
    },
    /// Connect network interface `slot`, which nothing is connected to, with the attached tap (as in
    /// [`NetworkSpec::tap`]) and, if one follows it, vhost-net device. Answered by [`Event::Plugged`]; only then may the
    /// guest's driver look for it. Or by [`Event::Refused`].
    Plug {
        /// Counted from 0, over [`VmSpec::networks`] and then the spare ones.
        slot: u8,
        /// The guest's MAC address.
        mac: [u8; 6],
    },
    /// Put a disk in the place of network interface `slot`, which nothing is connected to: the attached file or block device.
    /// Answered as [`Request::Plug`].
    PlugDisk {
        /// As in [`Request::Plug`].
        slot: u8,
        /// As in [`DiskSpec::read_only`].
        read_only: bool,
        /// As in [`DiskSpec::serial`].
        serial: String,
    },
    /// Take the network interface or disk in `slot` away from the guest and close its file. Answered by
    /// [`Event::Unplugged`].
    Unplug {
        /// As in [`Request::Plug`].
        slot: u8,
    },
    /// Ask the guest to have so much memory beyond what it booted with. [`Event::Asked`] says that its driver may look for
    /// the device, [`Event::Memory`] that it has followed, which may be never; [`Event::Failed`] that the host cannot.
    Memory {
        /// Rounded up to 2 MiB.
        extra: MiB,
    },
    /// Have so many vCPUs, from the first on: those that the guest boots with and those that it knows of are there already;
    /// none is ever taken away. Answered by [`Event::Vcpus`] or [`Event::Failed`].
    Vcpus {
        /// At most [`VmSpec::most_vcpus`].
        count: u8,
    },
    /// Stop all vCPUs; answered by [`Event::Paused`].
    Pause,
    /// Let all vCPUs run again; answered by [`Event::Resumed`].
    Resume,
    /// Report the device and exit counters; answered by [`Event::Counters`].
    Counters,
    /// End the VM now, without telling the guest.
    Stop,
}

/// When a boot got how far: readings of `CLOCK_MONOTONIC` in nanoseconds. What has not been passed is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootTimes {
    /// The VMM's first act.
    pub began_ns: Option<u64>,
    /// The guest's first instruction.
    pub entered_ns: Option<u64>,
    /// The guest's kernel drives its first share: it has come to its drivers.
    pub drivers_ns: Option<u64>,
    /// The guest's first request to a share: somebody mounts it.
    pub mounted_ns: Option<u64>,
}

/// What a VMM tells the owner of the sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The guest connected to a port of the host; the attached stream socket is the host's end.
    /// An owner that does not expect the port closes the socket, which resets the guest's connection.
    Accepted {
        /// The host's port that the guest named.
        port: u32,
        /// Told with the guest's first connection.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boot: Option<BootTimes>,
    },
    /// The interface or disk is there.
    Plugged {
        /// Where.
        slot: u8,
    },
    /// It cannot be: nothing has changed, and what was attached is closed.
    Refused {
        /// Where.
        slot: u8,
        /// One line for people.
        message: String,
    },
    /// The interface or disk is gone.
    Unplugged {
        /// Which.
        slot: u8,
    },
    /// The guest has been asked for another size of memory.
    Asked,
    /// The guest has as much memory as it was asked to have: told once for each request, before the next one.
    Memory {
        /// Beyond what it booted with.
        extra: MiB,
    },
    /// There are so many vCPUs; those that are new wait to be started by the guest.
    Vcpus {
        /// How many.
        count: u8,
    },
    /// The host could not do what it was asked last for memory or vCPUs; everything is as before.
    Failed {
        /// One line for people.
        message: String,
    },
    /// All vCPUs are stopped.
    Paused,
    /// All vCPUs run.
    Resumed,
    /// Named counters since start, for benchmarks and metrics: `exits.<kind>`, `<device>.<what>`.
    Counters {
        /// Name and value, sorted by name.
        values: Vec<(String, u64)>,
    },
    /// The VM is over; the process exits next, with [`Cause::exit_status`].
    Ended {
        /// Why.
        cause: Cause,
        /// One line for people: the error, or the guest's panic message.
        message: String,
        /// The last lines of the guest's console, oldest first; empty unless something went wrong.
        console: Vec<String>,
    },
}

/// Why a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The guest powered itself off, the owner asked for a stop, or the owner is gone.
    PowerOff,
    /// The VM could not be set up: a bad spec, no KVM, a kernel that is none, too little memory.
    Setup,
    /// The guest kernel panicked.
    GuestPanic,
    /// The guest reset itself without a panic message.
    GuestReset,
    /// A vCPU shut down: triple fault.
    TripleFault,
    /// The agent did not connect before the boot deadline.
    BootTimeout,
    /// KVM could not go on running a vCPU, or the host failed a device.
    HostError,
}

impl Cause {
    /// Exit status of the VMM process.
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Setup => 1,
            Self::GuestPanic => 2,
            Self::GuestReset => 3,
            Self::TripleFault => 4,
            Self::BootTimeout => 5,
            Self::HostError => 6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_spec_has_no_devices() {
        let spec: VmSpec = serde_json::from_str(
            r#"{"kvm":4,"control":5,"kernel":6,"initramfs":7,"vcpus":1,
                "memory":{"size":128,"huge_pages":true},"boot_deadline_ms":10000}"#,
        )
        .unwrap();
        assert_eq!(spec.memory.size.bytes(), 128 << 20);
        assert!(spec.shares.is_empty() && spec.networks.is_empty() && spec.console.is_none());
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = r#"{"request":"connect","port":1,"path":"/etc/passwd"}"#;
        assert!(serde_json::from_str::<Request>(text).is_err());
    }

    #[test]
    fn exit_statuses_are_distinct() {
        use Cause::*;
        let all = [
            PowerOff,
            Setup,
            GuestPanic,
            GuestReset,
            TripleFault,
            BootTimeout,
            HostError,
        ];
        let mut statuses = all.map(Cause::exit_status).to_vec();
        statuses.dedup();
        assert_eq!(statuses.len(), all.len());
    }
}
