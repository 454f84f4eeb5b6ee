//! An [`Engine`]: podman or Docker with the runtime under test, one test's turn with it, and the host before and after.
//!
//! Images, and Docker's daemon, are made once for all tests of this process. The daemon dies with the thread that
//! started it, which lives as long as the process.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use caisson_tests::host::Snapshot;
use caisson_tests::{Call, Outcome, Running, call, case};
use rustix::process::{Pid, Signal};

/// The image that the tests run: busybox.
pub(crate) const IMAGE: &str = "localhost/busybox";

/// Storage, and what tests share with their containers: overlayfs and owners need a real file system.
const HOME: &str = "/scratch/engines";

/// How long a command may take: an engine's takes seconds where the processor is emulated, and minutes if it is busy.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// Mount points that the engines make once.
const KEPT_MOUNTS: &[&str] = &[
    "+ mount /engines/podman/overlay ",
    "+ mount /netns /run/netns ",
];

/// Cgroups that the engines make once.
const KEPT_CGROUPS: &[&str] = &[
    "/machine.slice",
    "/libpod_parent",
    "/libpod_parent/conmon",
    "/podman_probe",
    "/cgroup/docker",
];

static TURN: Mutex<()> = Mutex::new(());

/// One test's turn with an engine.
pub(crate) struct Engine {
    kind: Kind,
    dir: PathBuf,
    before: Snapshot,
    calls: Cell<u32>,
    _turn: MutexGuard<'static, ()>,
}

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// podman, with systemd's cgroups and the overlay driver.
    Podman,
    /// Docker, by way of its daemon, containerd and `containerd-shim-runc-v2`; with systemd's cgroups too.
    Docker,
}

impl Engine {
    /// podman's turn.
    pub(crate) fn podman() -> Self {
        static READY: OnceLock<()> = OnceLock::new();
        Self::begin(Kind::Podman, &READY)
    }

    /// Docker's turn.
    pub(crate) fn docker() -> Self {
        static READY: OnceLock<()> = OnceLock::new();
        Self::begin(Kind::Docker, &READY)
    }

    fn begin(kind: Kind, ready: &OnceLock<()>) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(
            std::env::var_os("CAISSON_LAB").is_some(),
            "these tests change the host they run on: they need the lab"
        );
        let dir = Path::new(HOME).join("turn");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("directory");
        let mut engine = Self {
            kind,
            dir,
            before: Snapshot::take(),
            calls: Cell::new(0),
            _turn: turn,
        };
        ready.get_or_init(|| engine.prepare());
        engine.before = Snapshot::take();
        engine
    }

    /// Which engine it is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// A directory of this test's.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A command of the engine's.
    pub(crate) fn call<const N: usize>(&self, args: [&str; N]) -> Call {
        let program = match self.kind {
            Kind::Podman => "podman",
            Kind::Docker => "docker",
        };
        self.program(program).args(args)
    }

    /// Another program.
    pub(crate) fn program(&self, program: &str) -> Call {
        let number = self.calls.get();
        self.calls.set(number + 1);
        let output = self.dir.join(format!("call-{number}"));
        Call::new(program, &output).limit(LIMIT)
    }

    /// What a command prints, without the last line's end; it must succeed.
    #[track_caller]
    pub(crate) fn ok<const N: usize>(&self, args: [&str; N]) -> String {
        let outcome = self.call(args).succeed();
        outcome.text().trim_end().to_owned()
    }

    /// `run --network none`, to be given options, image and command.
    pub(crate) fn run_call<const N: usize>(&self, options: [&str; N]) -> Call {
        self.networked_call(["--network", "none"]).args(options)
    }

    /// `run` on the engine's own bridge, to be given options, image and command.
    pub(crate) fn networked_call<const N: usize>(&self, options: [&str; N]) -> Call {
        let run = self.call(["run"]);
        let run = match self.kind {
            Kind::Podman => run,
            Kind::Docker => run.args(["--runtime", &case::runtime()]),
        };
        run.args(options)
    }

    /// A shell script in a container of its own, to its end.
    pub(crate) fn run<const N: usize>(&self, options: [&str; N], script: &str) -> Outcome {
        self.run_call(["--rm"])
            .args(options)
            .args([IMAGE, "sh", "-c", script])
            .finish()
    }

    /// The same, where only success and standard output count.
    #[track_caller]
    pub(crate) fn output<const N: usize>(&self, options: [&str; N], script: &str) -> String {
        let outcome = self.run(options, script);
        assert_eq!(outcome.status, 0, "{outcome:?}");
        outcome.text().trim_end().to_owned()
    }

    /// A shell script in a container that stays; returns when it has printed `ready`.
    #[track_caller]
    pub(crate) fn start<const N: usize>(&self, name: &str, options: [&str; N], script: &str) {
        self.run_call(["-d", "--name", name])
            .args(options)
            .args([IMAGE, "sh", "-c", script])
            .succeed();
        self.wait_for(name, "ready");
    }

    /// Returns when the container's log has a line that ends like this.
    #[track_caller]
    pub(crate) fn wait_for(&self, name: &str, end: &str) {
        self.wait_for_times(name, end, 1);
    }

    /// Returns when the container's log has so many lines that end like this.
    #[track_caller]
    pub(crate) fn wait_for_times(&self, name: &str, end: &str, times: u32) {
        let mut logs = self.follow(name);
        let mut seen = 0;
        while seen < times {
            if logs.line().ends_with(end) {
                seen += 1;
            } else {
                assert!(
                    !logs.ends_within(Duration::ZERO),
                    "the log ended before {end:?}"
                );
            }
        }
        logs.signal(Signal::KILL);
        logs.finish();
    }

    fn follow(&self, name: &str) -> Running {
        self.call(["logs", "-f", name])
            .stdout(Stdio::piped())
            .start()
    }

    /// `exec` of a shell script.
    pub(crate) fn exec(&self, name: &str, script: &str) -> Outcome {
        self.call(["exec", name, "sh", "-c", script]).finish()
    }

    /// Removes a container, running or not.
    #[track_caller]
    pub(crate) fn remove(&self, name: &str) {
        match self.kind {
            Kind::Podman => self.ok(["rm", "-f", "-t", "0", name]),
            Kind::Docker => self.ok(["rm", "-f", name]),
        };
    }

    /// Makes configuration, image and, for Docker, the daemon.
    fn prepare(&self) {
        fs::create_dir_all("/etc/caisson").expect("directory");
        fs::write("/etc/caisson/config.toml", case::configuration()).expect("configuration");
        match self.kind {
            Kind::Podman => configure_podman(),
            Kind::Docker => start_docker(&self.dir),
        }
        let archive = busybox(&self.dir);
        // `kube play` gives a container no search path of its own.
        let import = self
            .call(["import", "-c", "ENV PATH=/bin"])
            .args([archive.as_path()]);
        import.args([IMAGE]).succeed();
    }

    /// What is there that was not there before: everything but what the engine keeps between containers.
    fn leftovers(&self) -> Vec<String> {
        let kept = |line: &str| {
            line.starts_with("- ")
                || line.starts_with("+ socket")
                || (line.starts_with("+ file") && !line.contains("caisson"))
                // Made by the first container, as runc makes its own.
                || line == "+ file /run/caisson"
                || KEPT_MOUNTS.iter().any(|mount| line.starts_with(mount))
                || KEPT_CGROUPS
                    .iter()
                    .any(|end| line.starts_with("+ cgroup") && line.ends_with(end))
        };
        let mut changes = Snapshot::take().changes_since(&self.before);
        changes.retain(|line| !kept(line));
        changes
    }

    /// The engine's own processes that clean up may take a moment longer than its command.
    fn wait_for_processes(&self) {
        for line in self.leftovers() {
            let pid = line
                .strip_prefix("+ process ")
                .and_then(|rest| rest.split(' ').next()?.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw) {
                call::wait_for_exit(pid, LIMIT);
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.wait_for_processes();
            let left = self.leftovers();
            assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
            return;
        }
        let all = self.call(["ps", "-aq"]).finish();
        for id in String::from_utf8_lossy(&all.stdout).lines() {
            let rm = match self.kind {
                Kind::Podman => self.call(["rm", "-f", "-t", "0", id]),
                Kind::Docker => self.call(["rm", "-f", id]),
            };
            drop(rm.finish());
        }
    }
}

/// The program of the runtime under test.
pub(crate) fn runtime_path() -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(case::runtime()))
        .find(|file| file.exists());
    found.expect("the runtime is in PATH").display().to_string()
}

/// An archive with busybox as a whole system.
pub(crate) fn busybox(dir: &Path) -> PathBuf {
    let root = dir.join("busybox");
    for name in ["bin", "etc", "root", "tmp"] {
        fs::create_dir_all(root.join(name)).expect("directory");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
    let applets = Command::new("/bin/busybox").arg("--list").output();
    for applet in String::from_utf8_lossy(&applets.expect("busybox").stdout).lines() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet)).expect("applet");
        }
    }
    let accounts = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n";
    fs::write(root.join("etc/passwd"), accounts).expect("passwd");
    fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").expect("group");
    let mode = fs::Permissions::from_mode(0o1777);
    fs::set_permissions(root.join("tmp"), mode).expect("mode of /tmp");
    let archive = dir.join("busybox.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&root).arg("-cf").arg(&archive).arg(".");
    assert!(tar.status().expect("tar").success(), "tar failed");
    archive
}

/// Makes the runtime podman's for good, as the README says, and its storage a real file system.
fn configure_podman() {
    let (runtime, path) = (case::runtime(), runtime_path());
    let engine = format!(
        "[containers]\nlog_driver = \"k8s-file\"\n[engine]\nruntime = \"{runtime}\"\nruntime_supports_json = [\"crun\", \"runc\", \"caisson\"]\n\
         events_logger = \"file\"\n[engine.runtimes]\n{runtime} = [\"{path}\"]\n"
    );
    let storage = "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/containers/storage\"\n\
                   graphroot = \"/scratch/engines/podman\"\n";
    fs::create_dir_all("/etc/containers").expect("directory");
    fs::write("/etc/containers/containers.conf", engine).expect("containers.conf");
    fs::write("/etc/containers/storage.conf", storage).expect("storage.conf");
}

/// Starts Docker's daemon, and returns when it says that it is ready.
fn start_docker(dir: &Path) {
    let socket = dir.join("notify");
    let notified = UnixDatagram::bind(&socket).expect("notify socket");
    notified.set_read_timeout(Some(LIMIT)).expect("timeout");
    let log = fs::File::create(Path::new(HOME).join("dockerd.log")).expect("log");
    let (started, start) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = case::runtime();
        let mut daemon = Command::new("setpriv");
        daemon.args(["--pdeathsig", "KILL", "--", "dockerd"]);
        daemon.args(["--data-root", "/scratch/engines/docker"]);
        if runtime != "runc" {
            daemon.arg(format!("--add-runtime={runtime}={}", runtime_path()));
        }
        daemon.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null());
        daemon.stdout(log.try_clone().expect("log")).stderr(log);
        let child = daemon.spawn();
        let _ = started.send(());
        child.expect("dockerd").wait().expect("wait")
    });
    start.recv().expect("the daemon's thread");
    let mut said = [0; 4096];
    loop {
        let length = notified.recv(&mut said).expect("dockerd was never ready");
        if String::from_utf8_lossy(&said[..length]).contains("READY=1") {
            return;
        }
    }
}
