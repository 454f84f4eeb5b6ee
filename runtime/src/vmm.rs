//! The VMM process as seen from its owner: started with open files, spoken to in packets, ended for certain.
//!
//! Contract: the child inherits exactly the descriptors that its [`VmSpec`] names, an environment with nothing in it,
//! and a pipe for its last words. Dropping a [`Vmm`] kills the process and reaps it: no VM outlives its owner, and if
//! the owner itself is killed the kernel kills the VMM with it (`spawn.rs`), and a VMM that lives ends when its control
//! socket closes.
//! What the VMM says is bounded and checked, because a guest may have taken it over.
//! Not here: what accepted connections are for (`sandbox/`), what is shared (`share.rs`).

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_agent_api::SHARE_TAG;
use caisson_vmm_spec::{
    Cause, Event, Fd, MemoryPolicy, MemorySpec, NetworkSpec, OwnTrees, Request, SPEC_FD, ShareSpec,
    VmSpec,
};
use rustix::{
    fs::{MemfdFlags, Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    cgroup::Entry,
    network::Plug,
    packet::{self, PacketError, Packets},
    sizing::Bounds,
    slots::Slots,
    spawn::{Child, spawn},
    text::one_line,
    watched::watch,
};

/// How many bytes of the VMM's standard error are kept for an error's text.
const MAX_LAST_WORDS_BYTES: usize = 4096;

/// A virtual machine as its owner wants it.
#[derive(Debug)]
pub struct Machine<'a> {
    /// The VMM's program.
    pub program: &'a Path,
    /// The guest kernel.
    pub kernel: &'a Path,
    /// The guest's initial root file system.
    pub initramfs: &'a Path,
    /// Words for the guest kernel's command line.
    pub cmdline: &'a str,
    /// vCPUs and memory, and what they may grow to.
    pub bounds: Bounds,
    /// Ask for huge pages.
    pub huge_pages: bool,
    /// From which nodes of the host guest memory comes.
    pub memory_policy: Option<MemoryPolicy>,
    /// How long the agent may take to dial; zero: for ever.
    pub boot_deadline: Duration,
    /// The shared directory.
    pub share: OwnedFd,
    /// Trees in it that the guest may believe.
    pub own: OwnTrees,
    /// The network interfaces that are there from the start, in the slots of their order.
    pub networks: Vec<Plug>,
    /// Their places, and those for more of them and for disks.
    pub slots: Slots,
    /// Whether the host's kernel may move their packets.
    pub vhost_net: bool,
    /// Where the guest's whole kernel log goes, if anywhere.
    pub console: Option<OwnedFd>,
    /// A locked file that the VMM holds open and never uses: whoever gets its lock knows that the process is gone.
    pub alive: Option<OwnedFd>,
    /// The cgroup in which the process begins its life.
    pub cgroup: Option<Entry>,
}

/// Why a VM could not be started or spoken to.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A file of the machine cannot be opened.
    #[error("open {what} {path}", path = path.display())]
    Open {
        /// Which file.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// This user may not use KVM.
    #[error("open the KVM device {path}: it belongs to {owner}, and this user does not (usermod -aG, then log in anew)", path = KVM)]
    KvmDenied {
        /// Whose it is.
        owner: String,
        /// Why.
        source: io::Error,
    },
    /// The program cannot be started.
    #[error("start the VMM {path}", path = path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host refused something on the way.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The conversation broke.
    #[error("speak with the VMM")]
    Control(#[from] PacketError),
}

/// How a VM came to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Why.
    pub cause: Cause,
    /// One line for people.
    pub message: String,
    /// The guest's last console lines, oldest first.
    pub console: Vec<String>,
}

/// A running VMM.
#[derive(Debug)]
pub struct Vmm {
    control: Packets,
    process: Process,
}

/// The child itself and what it says at last.
#[derive(Debug)]
struct Process {
    child: Child,
    exited: AsyncFd<OwnedFd>,
    last_words: File,
}

impl Vmm {
    /// Starts the VMM; the guest boots from here on. Must be called inside a runtime.
    pub fn start(machine: Machine<'_>) -> Result<Self, VmmError> {
        let (ours, theirs) = packet::pair().map_err(|source| VmmError::Host {
            step: "make a socket pair",
            source,
        })?;
        let mut files = Files::default();
        let networks = machine.networks.into_iter();
        let spec = VmSpec {
            kvm: files.add(open_kvm()?),
            control: files.add(theirs),
            kernel: files.add(open("the guest kernel", machine.kernel, OFlags::RDONLY)?),
            initramfs: files.add(open("the initramfs", machine.initramfs, OFlags::RDONLY)?),
            cmdline: machine.cmdline.to_owned(),
            vcpus: machine.bounds.boot.vcpus,
            most_vcpus: machine.bounds.most.vcpus,
            memory: MemorySpec {
                size: machine.bounds.boot.memory,
                most: machine.bounds.most.memory,
                huge_pages: machine.huge_pages,
                policy: machine.memory_policy,
            },
            boot_deadline_ms: u64::try_from(machine.boot_deadline.as_millis()).unwrap_or(u64::MAX),
            shares: vec![ShareSpec {
                tag: SHARE_TAG.to_owned(),
                root: files.add(machine.share),
                own: Some(machine.own),
            }],
            networks: networks
                .map(|plug| NetworkSpec {
                    tap: files.add(plug.tap),
                    kind: plug.kind,
                    mac: plug.mac,
                    vhost: plug.vhost.map(|vhost| files.add(vhost)),
                })
                .collect(),
            // At most 16.
            spare_networks: u8::try_from(machine.slots.free()).unwrap_or(u8::MAX),
            vhost_net: machine.vhost_net,
            disks: Vec::new(),
            console: machine.console.map(|file| files.add(file)),
        };
        if let Some(alive) = machine.alive {
            files.add(alive);
        }
        let process = Process::start(
            machine.program,
            files.with_spec(&spec)?,
            machine.cgroup.as_ref(),
        )?;
        let control = Packets::new(ours).map_err(|source| VmmError::Host {
            step: "watch the VMM's socket",
            source,
        })?;
        Ok(Self { control, process })
    }

    /// The process, for the host's cgroup and for people.
    pub fn pid(&self) -> u32 {
        self.process.child.pid()
    }

    /// The next event with its descriptor; `None` once the VMM has closed the socket. Safe to cancel.
    pub async fn event(&self) -> Result<Option<(Event, Option<OwnedFd>)>, VmmError> {
        let packet = self.control.receive().await?;
        Ok(packet.map(|(event, fds): (Event, Vec<OwnedFd>)| (event, fds.into_iter().next())))
    }

    /// Asks the VMM for something, with the descriptors that it needs.
    pub async fn request(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), VmmError> {
        Ok(self.control.send(request, fds).await?)
    }

    /// Hands a connected stream socket in, to a vsock port on which the guest listens.
    pub async fn connect(&self, port: u32, socket: OwnedFd) -> Result<(), VmmError> {
        let request = Request::Connect { port };
        Ok(self.control.send(&request, &[socket.as_fd()]).await?)
    }

    /// Ends the process now, whatever it is doing.
    pub fn kill(&mut self) {
        self.process.child.kill();
    }

    /// Waits for the process to end, kills it after `patience`, and tells why it ended if it did not say so itself.
    pub async fn end(mut self, patience: Duration) -> Ended {
        if tokio::time::timeout(patience, self.process.exited())
            .await
            .is_err()
        {
            self.kill();
            self.process.exited().await;
        }
        let status = self.process.child.wait();
        let words = self.process.last_words();
        let how = match status {
            Ok(how) => how,
            Err(error) => error.to_string(),
        };
        let message = if words.is_empty() {
            format!("the VMM ended without a word: {how}")
        } else {
            format!("the VMM ended: {how}: {words}")
        };
        Ended {
            cause: Cause::HostError,
            message,
            console: Vec::new(),
        }
    }
}

impl Process {
    fn start(
        program: &Path,
        mut files: Vec<(OwnedFd, i32)>,
        cgroup: Option<&Entry>,
    ) -> Result<Self, VmmError> {
        let host = |step| move |source| VmmError::Host { step, source };
        let (last_words, stderr) = pipe_with(PipeFlags::CLOEXEC)
            .map_err(|errno| host("make a pipe for the VMM")(errno.into()))?;
        files.push((stderr, 2));
        let child = spawn(program, files, cgroup).map_err(|source| VmmError::Start {
            path: program.to_owned(),
            source,
        })?;
        let exited = child
            .descriptor()
            .try_clone_to_owned()
            .and_then(|process| watch(process, Interest::READABLE))
            .map_err(host("watch the VMM's end"))?;
        Ok(Self {
            child,
            exited,
            last_words: last_words.into(),
        })
    }

    async fn exited(&self) {
        // A process descriptor becomes readable when the process ends; an error means that it cannot be watched, and
        // the blocking wait that follows is then the right thing.
        let _ = self.exited.readable().await;
    }

    fn last_words(&mut self) -> String {
        let mut bytes = Vec::new();
        // The writer is gone, so this ends; without an end there is nothing to report either.
        let _ = (&mut self.last_words)
            .take(MAX_LAST_WORDS_BYTES as u64)
            .read_to_end(&mut bytes);
        one_line(&String::from_utf8_lossy(&bytes), MAX_LAST_WORDS_BYTES)
    }
}

/// The device that every virtual machine needs.
const KVM: &str = "/dev/kvm";

/// Whether this process may use KVM, asked before it goes where groups have no names.
pub fn may_use_kvm() -> Result<(), VmmError> {
    open_kvm().map(drop)
}

fn open_kvm() -> Result<OwnedFd, VmmError> {
    match open("the KVM device", Path::new(KVM), OFlags::RDWR) {
        Err(VmmError::Open { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            let owner = kvm_owner();
            Err(VmmError::KvmDenied { owner, source })
        }
        other => other,
    }
}

/// Who may use KVM, in words: `group kvm`.
pub(crate) fn kvm_owner() -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    match std::fs::metadata(KVM) {
        Ok(device) if device.mode() & 0o060 == 0o060 => group(device.gid(), &groups),
        _ => "root".to_owned(),
    }
}

/// The name of a group (group(5)), or its number.
fn group(gid: u32, groups: &str) -> String {
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then_some(name)
    });
    name.map_or_else(|| format!("group {gid}"), |name| format!("group {name}"))
}

fn open(what: &'static str, path: &Path, access: OFlags) -> Result<OwnedFd, VmmError> {
    rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        VmmError::Open {
            what,
            path: path.to_owned(),
            source: errno.into(),
        }
    })
}

/// The descriptors that the child inherits, numbered upwards from the one after [`SPEC_FD`].
#[derive(Debug, Default)]
struct Files(Vec<(OwnedFd, i32)>);

impl Files {
    fn add(&mut self, file: OwnedFd) -> Fd {
        // At most a dozen files are ever added.
        let number =
            i32::try_from(self.0.len()).map_or(i32::MAX, |n| n.saturating_add(SPEC_FD + 1));
        self.0.push((file, number));
        Fd(number)
    }

    fn with_spec(mut self, spec: &VmSpec) -> Result<Vec<(OwnedFd, i32)>, VmmError> {
        let failed = |source| VmmError::Host {
            step: "write the VMM's input",
            source,
        };
        let bytes = serde_json::to_vec(spec).map_err(|error| failed(error.into()))?;
        let file = rustix::fs::memfd_create("vm-spec", MemfdFlags::CLOEXEC)
            .map_err(|errno| failed(errno.into()))?;
        let mut file = File::from(file);
        file.write_all(&bytes).map_err(failed)?;
        rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::Start(0))
            .map_err(|errno| failed(errno.into()))?;
        self.0.push((file.into(), SPEC_FD));
        Ok(self.0)
    }
}

impl Ended {
    /// What the VMM reported, made fit to be shown.
    pub fn reported(cause: Cause, message: &str, console: &[String]) -> Self {
        const MAX_LINES: usize = 64;
        let start = console.len().saturating_sub(MAX_LINES);
        Self {
            cause,
            message: one_line(message, 1024),
            console: console
                .iter()
                .skip(start)
                .map(|line| one_line(line, 512))
                .collect(),
        }
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            message, console, ..
        } = self;
        write!(out, "{message}")?;
        if !console.is_empty() {
            write!(out, "; last console lines: {}", console.join(" | "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_numbered_from_the_one_after_the_spec() {
        let mut files = Files::default();
        let null = || open("null", Path::new("/dev/null"), OFlags::RDONLY).unwrap();
        assert_eq!(files.add(null()), Fd(4));
        assert_eq!(files.add(null()), Fd(5));
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = open(
            "the guest kernel",
            Path::new("/nonexistent/k"),
            OFlags::RDONLY,
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "open the guest kernel /nonexistent/k");
    }

    #[test]
    fn the_group_to_join_is_named() {
        let groups = "root:x:0:\nkvm:x:104:alice\nbroken\n";
        assert_eq!(group(104, groups), "group kvm");
        assert_eq!(group(7, groups), "group 7");
    }

    #[test]
    fn what_a_hostile_vmm_reports_is_bounded_and_printable() {
        let lines = vec!["\x1b[2J".repeat(1000); 1000];
        let ended = Ended::reported(Cause::GuestPanic, "a\nb\x07", &lines);
        assert_eq!(ended.message, "a b\\u{7}");
        assert_eq!(ended.console.len(), 64);
        assert!(ended.to_string().len() < 64 * 600);
        assert!(!ended.to_string().contains('\x1b'));
    }

    #[tokio::test]
    async fn a_vmm_that_dies_is_reported_with_its_last_words() {
        // Without arguments it complains and fails.
        let process = Process::start(Path::new("/bin/mkdir"), Vec::new(), None).unwrap();
        let (ours, _theirs) = packet::pair().unwrap();
        let vmm = Vmm {
            control: Packets::new(ours).unwrap(),
            process,
        };
        let ended = vmm.end(Duration::from_secs(60)).await;
        let words = ended
            .message
            .strip_prefix("the VMM ended: exit status 1: ")
            .unwrap();
        assert!(words.contains("missing operand"), "{words}");
    }
}
