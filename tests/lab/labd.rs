//! PID 1 of the lab: brings the outer virtual machine up, then runs the commands that the host sends.
//!
//! It starts as `/init` of a one-file initramfs, moves to the root disk, mounts what containers expect, loads the
//! modules listed in the image, mounts the host's shared directories (read-only, at their own paths) and re-executes
//! itself as `labd serve`. PID 1 then only reaps orphans, and powers off when the server ends; in an image with systemd
//! that is systemd's part.
//!
//! The server has one thread per virtio-serial port named `lab.<n>`; a port runs one command at a time
//! (`frame.rs`). A command is a process group of its own; it is over when its first process ended and what that
//! process wrote has been passed on, even if a daemon it left behind still holds the streams.
//! Standard input is queued without bound, so that a signal is never stuck behind it.

mod frame;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use frame::Kind;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

/// The disks: number 1 holds the lab's root, number 2 is the empty one for the tests' files. The kernel finds them side
/// by side, so either may get either name.
const DISKS: [&str; 2] = ["nvme0n1", "nvme0n2"];

/// File systems of the lab: source, target, type, data.
const MOUNTS: &[(&str, &str, &str, &str)] = &[
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    (
        "devpts",
        "/dev/pts",
        "devpts",
        "gid=5,mode=620,ptmxmode=666",
    ),
    ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
    ("mqueue", "/dev/mqueue", "mqueue", ""),
    ("tmpfs", "/run", "tmpfs", "mode=755"),
    ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
    ("bpf", "/sys/fs/bpf", "bpf", "mode=700"),
    ("debugfs", "/sys/kernel/debug", "debugfs", ""),
    ("tracefs", "/sys/kernel/tracing", "tracefs", ""),
];

/// Names of descriptors that shells expect below `/dev`.
const DEV_LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Devices with a mode and a group other than the kernel's, as udev's rules have them.
const DEVICES: &[(&str, u32, u32)] = &[("/dev/kvm", 0o660, KVM_GROUP), ("/dev/net/tun", 0o666, 0)];
/// The group `kvm` in the image.
const KVM_GROUP: u32 = 104;

/// Where it is, systemd is PID 1 from then on, and starts the server as its service.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
/// The server's program then.
const SERVER: &str = "/run/labd";

/// The words of the kernel's command line that are ours: `lab.<name>=<value>`.
type Options = HashMap<String, String>;

fn main() {
    let outcome = if std::process::id() == 1 {
        init()
    } else {
        serve_all()
    };
    if let Err(error) = outcome {
        eprintln!("labd: {error}");
    }
    if std::process::id() == 1 {
        rustix::fs::sync();
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
}

fn init() -> io::Result<()> {
    enter_root()?;
    for (source, target, kind, data) in MOUNTS {
        mount(source, target, kind, data)
            .unwrap_or_else(|e| eprintln!("labd: mount {target}: {e}"));
    }
    for (target, link) in DEV_LINKS {
        symlink(target, link)?;
    }
    mount_cgroups(options()?.get("cgroup").map_or("v2", String::as_str))?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::SHARED | MountPropagationFlags::REC,
    )?;
    rustix::system::sethostname(b"lab")?;
    for module in fs::read_to_string("/usr/lib/modules/lab.load")?.lines() {
        load_module(module).unwrap_or_else(|e| eprintln!("labd: load {module}: {e}"));
    }
    for (path, mode, group) in DEVICES {
        std::os::unix::fs::chown(path, None, Some(*group))?;
        fs::set_permissions(path, fs::Permissions::from_mode(*mode))?;
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    fs::write("/proc/sys/kernel/printk", "4 4 1 4")?;
    run("/usr/sbin/ip", &["link", "set", "lo", "up"])?;
    mount_shares(&options()?)?;
    if Path::new(SYSTEMD).exists() {
        fs::copy("/proc/self/exe", SERVER)?;
        return Err(Command::new(SYSTEMD).exec());
    }
    let server = Command::new("/proc/self/exe").arg("serve").spawn()?;
    reap_until(&server)
}

/// Leaves the initramfs for the root disk, with `/dev`.
fn enter_root() -> io::Result<()> {
    fs::create_dir_all("/dev")?;
    mount("devtmpfs", "/dev", "devtmpfs", "mode=755")?;
    let [one, two] = DISKS.map(|name| format!("/dev/{name}"));
    wait_for_device(&one)?;
    wait_for_device(&two)?;
    mount("sysfs", "/sys", "sysfs", "")?;
    let number = fs::read_to_string(format!("/sys/block/{}/nsid", DISKS[0]))?;
    rustix::mount::unmount("/sys", UnmountFlags::empty())?;
    let (root, scratch) = if number.trim() == "1" {
        (one, two)
    } else {
        (two, one)
    };
    mount(&root, "/root", "ext4", "")?;
    mount(&scratch, "/root/scratch", "ext4", "")?;
    rustix::mount::mount_move("/dev", "/root/dev")?;
    std::env::set_current_dir("/root")?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Returns when the kernel has made the device's node.
fn wait_for_device(path: &str) -> io::Result<()> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE)?;
    let mut events = File::from(watch);
    while !Path::new(path).exists() {
        let _ = events.read(&mut [0; 4096])?;
    }
    Ok(())
}

fn mount(source: &str, target: &str, kind: &str, data: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let data = std::ffi::CString::new(data)?;
    Ok(rustix::mount::mount(
        source,
        target,
        kind,
        MountFlags::empty(),
        data.as_c_str(),
    )?)
}

/// The hierarchies of cgroup v1 as systemd mounts them, of which the kernel has those that it knows.
const HIERARCHIES: &[&str] = &[
    "cpuset",
    "cpu,cpuacct",
    "memory",
    "devices",
    "pids",
    "blkio",
    "freezer",
    "hugetlb",
    "net_cls,net_prio",
    "perf_event",
];

fn mount_cgroups(version: &str) -> io::Result<()> {
    if version == "v2" {
        let options = "nsdelegate,memory_recursiveprot";
        mount("cgroup2", "/sys/fs/cgroup", "cgroup2", options)?;
        return delegate_cgroups();
    }
    mount("tmpfs", "/sys/fs/cgroup", "tmpfs", "mode=755")?;
    for controllers in HIERARCHIES {
        let target = format!("/sys/fs/cgroup/{controllers}");
        mount("cgroup", &target, "cgroup", controllers)
            .unwrap_or_else(|e| eprintln!("labd: mount {target}: {e}"));
        for alone in controllers.split(',').filter(|one| one != controllers) {
            symlink(controllers, format!("/sys/fs/cgroup/{alone}"))?;
        }
    }
    let systemd = "/sys/fs/cgroup/systemd";
    mount("cgroup", systemd, "cgroup", "none,name=systemd")?;
    if version == "hybrid" {
        mount("cgroup2", "/sys/fs/cgroup/unified", "cgroup2", "nsdelegate")?;
    }
    // As below.
    fs::create_dir("/sys/fs/cgroup/cpuset/lab")
}

/// Makes every controller available to the cgroups that the tests make.
fn delegate_cgroups() -> io::Result<()> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", all.join(" "))?;
    // The first and the last cgroup with a cpuset patch the kernel's code, which QEMU's threads do not survive
    // ("Oops: int3"). This one stays for ever, so that happens once, now.
    fs::create_dir("/sys/fs/cgroup/lab")
}

fn load_module(path: &str) -> io::Result<()> {
    Ok(rustix::system::finit_module(File::open(path)?, c"", 0)?)
}

fn run(program: &str, arguments: &[&str]) -> io::Result<()> {
    let status = Command::new(program).args(arguments).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("{program}: {status}")))
    }
}

fn options() -> io::Result<Options> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let ours = line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("lab.")?.split_once('='));
    Ok(ours
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

/// Mounts the share with tag `share<n>` at the path that `lab.share<n>` names.
fn mount_shares(options: &Options) -> io::Result<()> {
    for (tag, path) in options.iter().filter(|(name, _)| name.starts_with("share")) {
        fs::create_dir_all(path)?;
        rustix::mount::mount(
            tag.as_str(),
            path.as_str(),
            "virtiofs",
            MountFlags::RDONLY,
            None,
        )?;
    }
    Ok(())
}

/// Reaps every child until the server has ended.
fn reap_until(server: &Child) -> io::Result<()> {
    let server = Pid::from_child(server);
    loop {
        let reaped = rustix::process::wait(rustix::process::WaitOptions::empty())?;
        if let Some((pid, status)) = reaped
            && pid == server
        {
            return Err(io::Error::other(format!("the server ended: {status:?}")));
        }
    }
}

/// Serves every port of the lab, each in its own thread; returns when all hosts' ends are closed.
fn serve_all() -> io::Result<()> {
    let mut servers = Vec::new();
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.starts_with("lab.") {
            let node = Path::new("/dev").join(entry.file_name());
            let port = File::options().read(true).write(true).open(node)?;
            servers.push(thread::spawn(move || serve(&port)));
        }
    }
    for server in servers {
        if let Ok(Err(error)) = server.join() {
            eprintln!("labd: serve: {error}");
        }
    }
    Ok(())
}

/// Takes frames from one port for ever; a command's output goes out on a thread of its own.
fn serve(port: &File) -> io::Result<()> {
    let mut link: &File = port;
    frame::send(&mut link, Kind::Hello, &[])?;
    let mut running: Option<Running> = None;
    loop {
        let (kind, payload) = frame::receive(&mut link)?;
        match (kind, &mut running) {
            (Kind::Run, running) => *running = start(port, &serde_json::from_slice(&payload)?)?,
            (Kind::Stdin, Some(running)) => running.write(payload),
            (Kind::StdinEnd, Some(running)) => running.stdin = None,
            (Kind::Signal, Some(running)) => running.signal(&payload),
            _ => {}
        }
    }
}

/// The part of a command that frames from the host can reach.
struct Running {
    /// `None` once the process group's leader is reaped: its number may then be someone else's.
    group: Arc<Mutex<Option<Pid>>>,
    /// Queue of standard input; `None` after its end.
    stdin: Option<mpsc::Sender<Vec<u8>>>,
}

impl Running {
    fn write(&mut self, bytes: Vec<u8>) {
        if self
            .stdin
            .as_ref()
            .is_some_and(|queue| queue.send(bytes).is_err())
        {
            self.stdin = None;
        }
    }

    fn signal(&self, payload: &[u8]) {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        let signal = payload
            .first()
            .and_then(|n| Signal::from_named_raw(i32::from(*n)));
        if let (Some(group), Some(signal)) = (*group, signal) {
            let _ = rustix::process::kill_process_group(group, signal);
        }
    }
}

/// Starts a command. One that cannot be started is answered at once, as a shell does: 126 or 127.
fn start(port: &File, command: &frame::Command) -> io::Result<Option<Running>> {
    let mut link = port.try_clone()?;
    let mut child = match spawn(command) {
        Ok(child) => child,
        Err(error) => {
            let text = format!("lab: {}: {error}\n", command.argv.join(" "));
            frame::send(&mut link, Kind::Stderr, text.as_bytes())?;
            let not_found = error.kind() == io::ErrorKind::NotFound;
            frame::send(&mut link, Kind::Exit, &[if not_found { 127 } else { 126 }])?;
            return Ok(None);
        }
    };
    let stdin = child.stdin.take().map(|mut pipe| {
        let (sender, queue) = mpsc::channel::<Vec<u8>>();
        thread::spawn(move || queue.iter().try_for_each(|bytes| pipe.write_all(&bytes)));
        sender
    });
    let group = Arc::new(Mutex::new(Some(Pid::from_child(&child))));
    let running = Running {
        group: Arc::clone(&group),
        stdin,
    };
    thread::spawn(move || {
        if let Err(error) = finish(child, &group, &mut link) {
            eprintln!("labd: {error}");
        }
    });
    Ok(Some(running))
}

fn spawn(command: &frame::Command) -> io::Result<Child> {
    let (program, arguments) = command
        .argv
        .split_first()
        .ok_or_else(|| io::Error::other("empty command"))?;
    let path = command.env.iter().find(|(name, _)| name == "PATH");
    Command::new(find_program(program, path.map_or("", |(_, value)| value)))
        .arg0(program)
        .args(arguments)
        .env_clear()
        .envs(command.env.iter().map(|(name, value)| (name, value)))
        .current_dir(&command.dir)
        .process_group(0)
        .stdin(if command.stdin {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// The program's path in the command's own `PATH`, which is not this process's.
fn find_program(program: &str, path: &str) -> PathBuf {
    let candidates = path.split(':').map(|dir| Path::new(dir).join(program));
    let mut found = candidates.filter(|_| !program.contains('/'));
    found
        .find(|path| path.is_file())
        .unwrap_or_else(|| program.into())
}

/// Passes output on until the process has ended and nothing it wrote is left, then its exit status.
fn finish(mut child: Child, group: &Mutex<Option<Pid>>, link: &mut File) -> io::Result<()> {
    let process = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let mut outputs = [
        (
            child
                .stdout
                .take()
                .map(|out| File::from(OwnedFd::from(out))),
            Kind::Stdout,
        ),
        (
            child
                .stderr
                .take()
                .map(|err| File::from(OwnedFd::from(err))),
            Kind::Stderr,
        ),
    ];
    for (pipe, _) in outputs
        .iter()
        .filter_map(|(pipe, kind)| Some((pipe.as_ref()?, kind)))
    {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    let mut ended = false;
    while !ended {
        let open = outputs.iter().filter_map(|(pipe, _)| pipe.as_ref());
        let mut waits: Vec<_> = open.map(|pipe| PollFd::new(pipe, PollFlags::IN)).collect();
        waits.push(PollFd::new(&process, PollFlags::IN));
        poll(&mut waits, None)?;
        ended = waits
            .last()
            .is_some_and(|process| !process.revents().is_empty());
        drop(waits);
        for (pipe, kind) in &mut outputs {
            forward(pipe, *kind, link)?;
        }
    }
    let status = {
        let mut group = group.lock().unwrap_or_else(PoisonError::into_inner);
        *group = None;
        child.wait()?
    };
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    frame::send(
        link,
        Kind::Exit,
        &[code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255)],
    )
}

/// Sends all that is readable now; the pipe is dropped at its end.
fn forward(pipe: &mut Option<File>, kind: Kind, link: &mut File) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while let Some(open) = pipe {
        match open.read(&mut buffer) {
            Ok(0) => *pipe = None,
            Ok(length) => frame::send(link, kind, &buffer[..length])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
