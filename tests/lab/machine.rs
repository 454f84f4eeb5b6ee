//! The outer virtual machine: its shape, its file servers and its QEMU command line.
//!
//! Measured choices: root on an emulated NVMe disk (driver built into Debian's cloud kernel; `snapshot=on`, so nothing
//! is ever written back), EPYC with SVM and nested paging, two virtual processors on two host threads.
//! `--icount` runs one processor with QEMU's instruction clock: 1 ns of guest time is one executed instruction, exact
//! to the last digit in repeated runs, and about eight times slower.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::Args;
use rustix::io::{FdFlags, fcntl_setfd};

use crate::flavour::Flavour;
use crate::image::{Image, image};

/// Debian's QEMU file server (package qemu-system-common).
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Commands that can run at once.
const PORTS: usize = 12;

/// The hierarchies that a host's init system mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Cgroups {
    /// The one of cgroup v2.
    V2,
    /// Those of cgroup v1.
    V1,
    /// Those of cgroup v1, and one of cgroup v2 without controllers.
    Hybrid,
}

impl Cgroups {
    /// On the command line, and in `labd`.
    const fn name(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::V1 => "v1",
            Self::Hybrid => "hybrid",
        }
    }
}

/// The shape of a lab.
#[derive(Args)]
pub(crate) struct Shape {
    /// Virtual processors.
    #[arg(long, env = "LAB_SMP", default_value_t = 2)]
    smp: u32,
    /// Memory in MiB.
    #[arg(long, env = "LAB_MEM", default_value_t = 4096)]
    mem: u32,
    /// QEMU's name of the processor.
    #[arg(long, env = "LAB_CPU", default_value = "EPYC,+svm,+npt")]
    cpu: String,
    /// Count instructions: one processor, a clock that shows 1 ns per instruction.
    #[arg(long, env = "LAB_ICOUNT")]
    icount: bool,
    /// What is in the disk image.
    #[arg(long, env = "LAB_IMAGE", value_enum, default_value = "base")]
    pub(crate) image: Flavour,
    /// How the lab's cgroups are mounted.
    #[arg(long, env = "LAB_CGROUP", value_enum, default_value = "v2")]
    cgroup: Cgroups,
    /// Words for the end of the kernel's command line.
    #[arg(long, env = "LAB_APPEND", default_value = "")]
    append: String,
}

impl Shape {
    /// The command-line arguments that make this shape.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--smp={}", self.smp),
            format!("--mem={}", self.mem),
            format!("--cpu={}", self.cpu),
            format!("--image={}", self.image.name()),
            format!("--cgroup={}", self.cgroup.name()),
            format!("--append={}", self.append),
        ];
        arguments.extend(self.icount.then(|| "--icount".to_owned()));
        arguments
    }
}

/// The root of the source tree that this program was built from.
pub(crate) fn repository() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// Host directories that appear in the lab at their own paths: the repository, cargo's build directory if that is
/// elsewhere, and the colon-separated list in `LAB_SHARE`.
pub(crate) fn shared_directories() -> Vec<PathBuf> {
    let mut shared = vec![repository()];
    let more =
        ["CARGO_TARGET_DIR", "LAB_SHARE"].map(|name| std::env::var_os(name).unwrap_or_default());
    for dir in more.iter().flat_map(std::env::split_paths) {
        if dir.is_dir() && !shared.iter().any(|known| dir.starts_with(known)) {
            shared.push(dir);
        }
    }
    shared
}

/// A running machine and the host's ends of its ports.
pub(crate) struct Machine {
    pub(crate) qemu: Child,
    pub(crate) ports: Vec<UnixStream>,
    /// They live as long as the owner; nobody waits for them.
    pub(crate) file_servers: Vec<Child>,
}

impl Machine {
    /// Starts the file servers and QEMU.
    pub(crate) fn start(state: &Path, shape: &Shape) -> io::Result<Self> {
        let Image {
            kernel,
            root,
            scratch,
        } = image(shape.image)?;
        let initramfs = state.join("init.cpio");
        fs::write(
            &initramfs,
            initramfs_of(&std::env::current_exe()?.with_file_name("labd"))?,
        )?;

        let mut qemu = child_command("qemu-system-x86_64");
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        qemu.args(["-machine", "pc,memory-backend=memory", "-cpu", &shape.cpu]);
        qemu.args(["-m", &format!("{}M", shape.mem)]);
        qemu.args([
            "-object",
            &format!(
                "memory-backend-memfd,id=memory,size={}M,share=on",
                shape.mem
            ),
        ]);
        if shape.icount {
            qemu.args([
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=0,sleep=off",
                "-smp",
                "1",
            ]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi", "-smp", &shape.smp.to_string()]);
        }
        qemu.arg("-serial")
            .arg(format!("file:{}", state.join("console").display()));
        // For a look at the processor of a lab that does not answer (`info registers`).
        qemu.arg("-qmp").arg(format!(
            "unix:{},server=on,wait=off",
            state.join("qmp.sock").display()
        ));
        // One controller for both: the kernel probes controllers in parallel and numbers them as they answer.
        qemu.args(["-device", "nvme,serial=lab"]);
        for (number, disk) in [(1, root), (2, scratch)] {
            let file = disk.display();
            let drive =
                format!("if=none,id=disk{number},format=raw,file={file},snapshot=on,cache=unsafe");
            qemu.args(["-drive", &drive]);
            qemu.args([
                "-device",
                &format!("nvme-ns,drive=disk{number},nsid={number}"),
            ]);
        }

        // Docker wants AppArmor's programs on a kernel with AppArmor; the lab has none.
        let mut words =
            "console=ttyS0 panic=-1 mitigations=off nokaslr apparmor=0 quiet".to_owned();
        let mut file_servers = Vec::new();
        for (index, dir) in shared_directories().iter().enumerate() {
            let tag = format!("share{index}");
            let socket = state.join(format!("{tag}.sock"));
            file_servers.push(serve_directory(
                dir,
                &socket,
                &state.join(format!("{tag}.log")),
            )?);
            qemu.arg("-chardev")
                .arg(format!("socket,id={tag},path={}", socket.display()));
            qemu.arg("-device").arg(format!(
                "vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"
            ));
            words += &format!(" lab.{tag}={}", dir.display());
        }
        words = format!(
            "{words} lab.cgroup={} {}",
            shape.cgroup.name(),
            shape.append
        );
        qemu.arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &words]);

        let mut ports = Vec::new();
        let mut theirs = Vec::new();
        qemu.args(["-device", "virtio-serial-pci,max_ports=31"]);
        for index in 0..PORTS {
            let (ours, guest) = UnixStream::pair()?;
            fcntl_setfd(&guest, FdFlags::empty())?;
            qemu.arg("-chardev")
                .arg(format!("socket,id=port{index},fd={}", guest.as_raw_fd()));
            qemu.arg("-device").arg(format!(
                "virtserialport,chardev=port{index},name=lab.{index}"
            ));
            ports.push(ours);
            theirs.push(guest);
        }
        let log = File::create(state.join("qemu.log"))?;
        let qemu = qemu.stdout(Stdio::null()).stderr(log).spawn()?;
        Ok(Self {
            qemu,
            ports,
            file_servers,
        })
    }
}

/// A command for a child that dies with this process.
fn child_command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", program])
        .stdin(Stdio::null());
    command
}

/// Starts a file server on a socket that already listens, so that nobody has to wait for it.
fn serve_directory(dir: &Path, socket: &Path, log: &Path) -> io::Result<Child> {
    let _ = fs::remove_file(socket);
    let listener = OwnedFd::from(UnixListener::bind(socket)?);
    fcntl_setfd(&listener, FdFlags::empty())?;
    child_command(VIRTIOFSD)
        .arg(format!("--fd={}", listener.as_raw_fd()))
        .args(["-f", "-o", "sandbox=chroot,xattr,cache=auto", "-o"])
        .arg(format!("source={}", dir.display()))
        .stdout(Stdio::null())
        .stderr(File::create(log)?)
        .spawn()
}

/// A cpio archive (format "newc") with one program in it, `/init`, and the directories it mounts on.
fn initramfs_of(program: &Path) -> io::Result<Vec<u8>> {
    let program = fs::read(program)
        .map_err(|e| io::Error::other(format!("read {}: {e}", program.display())))?;
    let mut archive = Vec::with_capacity(program.len() + 1024);
    for (index, (name, mode, data)) in [
        ("init", 0o100_755, program.as_slice()),
        ("TRAILER!!!", 0, &[]),
    ]
    .into_iter()
    .enumerate()
    {
        let (size, name_size) = (data.len(), name.len() + 1);
        let fields = [index, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        archive.extend_from_slice(b"070701");
        fields
            .iter()
            .try_for_each(|field| write!(archive, "{field:08x}"))?;
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    Ok(archive)
}
