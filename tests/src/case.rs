//! One test: the host before it, a directory of its own, the runtime under test, and the host after it.
//!
//! Cases take turns (one lock): each looks at the whole host. Dropping a case checks that nothing is left of it, and
//! cleans up if something is, so that one failure does not fail the next test.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::host::{self, Snapshot};
use crate::{Bundle, Call, Outcome};

/// Where tests keep their files: on a real file system, because they are about owners, attributes and handles.
const SCRATCH: &str = "/scratch";

static TURN: Mutex<()> = Mutex::new(());

/// A test in its turn.
pub struct Case {
    dir: PathBuf,
    before: Snapshot,
    calls: Cell<u32>,
    /// Closed at the case's end; until then a thread waits for that, with a limit.
    _watched: mpsc::Sender<()>,
    _turn: MutexGuard<'static, ()>,
}

/// How long most cases may take before their processes are killed.
const LIMIT: Duration = Duration::from_secs(300);

/// Kills this process's descendants when a case takes too long: a test that reads from them then fails.
fn watch(case: &str, limit: Duration) -> mpsc::Sender<()> {
    let (sender, receiver) = mpsc::channel::<()>();
    let case = case.to_owned();
    std::thread::spawn(move || {
        if receiver.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{case} takes longer than {limit:?}: killing its processes");
            for process in host::descendants(std::process::id().cast_signed()) {
                if let Some(pid) = Pid::from_raw(process.pid) {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
        }
    });
    sender
}

/// The name of the runtime under test.
pub fn runtime() -> String {
    std::env::var("RUNTIME").unwrap_or_else(|_| "caisson".to_owned())
}

impl Case {
    /// Waits for its turn and looks at the host.
    pub fn begin() -> Self {
        Self::begin_within(LIMIT)
    }

    /// The same for a case that does a lot: its processes are killed after `limit`.
    pub fn begin_within(limit: Duration) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let name = std::thread::current()
            .name()
            .unwrap_or("test")
            .replace("::", "-");
        let base = if Path::new(SCRATCH).exists() {
            SCRATCH.into()
        } else {
            std::env::temp_dir()
        };
        // The path of a socket in it may have 104 bytes (containerd).
        let short = name.get(..48).unwrap_or(&name);
        let dir = base.join(format!("caisson-{}-{short}", std::process::id()));
        fs::create_dir_all(&dir).expect("scratch directory");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("permissions");
        fs::write(dir.join("config.toml"), configuration()).expect("config.toml");
        let before = Snapshot::take();
        Self {
            dir,
            before,
            calls: Cell::new(0),
            _watched: watch(&name, limit),
            _turn: turn,
        }
    }

    /// A case for a test that runc cannot take, or `None` on runc, with the reason in the test's output.
    pub fn begin_with_vm(reason: &str) -> Option<Self> {
        if runtime() == "caisson" {
            return Some(Self::begin());
        }
        println!("skipped on {}: {reason}", runtime());
        None
    }

    /// This test's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The runtime's `--root`.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// A busybox bundle in the directory `bundle`.
    pub fn bundle(&self) -> Bundle {
        self.bundle_in("bundle")
    }

    /// A busybox bundle in another directory.
    pub fn bundle_in(&self, name: &str) -> Bundle {
        Bundle::busybox(&self.dir.join(name), &self.default_spec())
    }

    /// A bundle with this host's Debian system.
    pub fn debian(&self) -> Bundle {
        Bundle::debian(&self.dir.join("debian"), &self.default_spec())
    }

    /// What `spec` writes.
    fn default_spec(&self) -> String {
        let dir = self.dir.join("spec");
        if !dir.exists() {
            fs::create_dir(&dir).expect("directory");
            self.call(["spec", "-b"]).args([&dir]).succeed();
        }
        fs::read_to_string(dir.join("config.json")).expect("spec wrote no config.json")
    }

    /// A call of the runtime with this case's state directory.
    pub fn call<const N: usize>(&self, args: [&str; N]) -> Call {
        let root = self.root();
        self.program(&runtime())
            .args([Path::new("--root"), &root])
            .args(args)
    }

    /// A call of any program.
    pub fn program(&self, program: &str) -> Call {
        let number = self.calls.get();
        self.calls.set(number + 1);
        Call::new(program, &self.dir.join(format!("call-{number}")))
            .env("CAISSON_CONFIG", self.dir.join("config.toml"))
    }

    /// A copy of the case's configuration file in which `key` has another value, as TOML spells it.
    pub fn configured(&self, key: &str, value: &str) -> PathBuf {
        let text = fs::read_to_string(self.dir.join("config.toml")).expect("config.toml");
        let is_other = |line: &&str| line.split(' ').next() != Some(key);
        let mut changed: String = text
            .lines()
            .filter(is_other)
            .map(|line| format!("{line}\n"))
            .collect();
        changed.push_str(&format!("{key} = {value}\n"));
        let file = self.dir.join("changed.toml");
        fs::write(&file, changed).expect("changed.toml");
        file
    }

    /// Adds a drop-in with these lines to the configuration, in place of the last one.
    pub fn configure(&self, lines: &str) {
        let dir = self.dir.join("config.toml.d");
        fs::create_dir_all(&dir).expect("directory");
        fs::write(dir.join("test.toml"), lines).expect("drop-in");
    }

    /// `run` of a bundle in the foreground.
    pub fn run(&self, bundle: &Bundle) -> Outcome {
        self.run_call(bundle, "run").finish()
    }

    /// `run` of a bundle in the foreground, to be changed or started.
    pub fn run_call(&self, bundle: &Bundle, id: &str) -> Call {
        self.call(["run", "-b"]).args([bundle.dir()]).args([id])
    }

    /// `create`; the outcome is the call's, not the container's.
    pub fn create(&self, bundle: &Bundle, id: &str) -> Outcome {
        self.create_call(bundle, id).succeed()
    }

    /// `create`, to be changed or started.
    pub fn create_call(&self, bundle: &Bundle, id: &str) -> Call {
        let pid_file = self.pid_file(id);
        self.call(["create", "-b"])
            .args([bundle.dir()])
            .args(["--pid-file".as_ref(), pid_file.as_os_str()])
            .args([id])
    }

    /// `create` of a container with a terminal, whose master goes to the console socket at `path`.
    pub fn create_with_console(&self, bundle: &Bundle, id: &str, path: &Path) {
        let pid_file = self.pid_file(id);
        self.call(["create", "-b"])
            .args([bundle.dir()])
            .args(["--pid-file".as_ref(), pid_file.as_os_str()])
            .args(["--console-socket".as_ref(), path.as_os_str()])
            .args([id])
            .succeed();
    }

    /// Where [`Self::create`] has the pid written.
    pub fn pid_file(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.pid"))
    }

    /// The pid in the pid file.
    pub fn pid(&self, id: &str) -> Pid {
        let text = fs::read_to_string(self.pid_file(id)).expect("pid file");
        text.trim()
            .parse()
            .ok()
            .and_then(Pid::from_raw)
            .expect("a pid in the pid file")
    }

    /// `create` and `start`.
    pub fn start(&self, bundle: &Bundle, id: &str) {
        self.create(bundle, id);
        self.call(["start", id]).succeed();
    }

    /// `exec` of a shell script.
    pub fn exec(&self, id: &str, script: &str) -> Outcome {
        self.call(["exec", id, "/bin/sh", "-c", script]).finish()
    }

    /// What `state` says, or `None` if there is no such container.
    pub fn state(&self, id: &str) -> Option<Value> {
        let outcome = self.call(["state", id]).finish();
        (outcome.status == 0)
            .then(|| serde_json::from_slice(&outcome.stdout).expect("state is JSON"))
    }

    /// The `status` in [`Self::state`]; `none` if there is no such container.
    pub fn status(&self, id: &str) -> String {
        let state = self.state(id);
        state.map_or("none".into(), |state| {
            state["status"].as_str().expect("status").to_owned()
        })
    }

    /// Waits until the process in the pid file has ended.
    #[track_caller]
    pub fn wait(&self, id: &str) {
        let ended = crate::call::wait_for_exit(self.pid(id), Duration::from_secs(60));
        assert!(ended, "container {id} did not end");
    }

    /// Waits until there is a file below this case's directory, for at most a minute.
    #[track_caller]
    pub fn wait_for_file(&self, path: &Path) {
        let dir = path.parent().expect("a file in a directory");
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).expect("inotify");
        inotify::add_watch(&watch, dir, inotify::WatchFlags::CREATE).expect("watch");
        let limit = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let mut events = [0; 4096];
        while !path.exists() {
            let mut polled = [PollFd::new(&watch, PollFlags::IN)];
            assert!(
                poll(&mut polled, Some(&limit)).expect("poll") > 0,
                "no {}",
                path.display()
            );
            rustix::io::read(&watch, &mut events).expect("read");
        }
    }

    /// `delete --force`.
    #[track_caller]
    pub fn delete(&self, id: &str) {
        self.call(["delete", "--force", id]).succeed();
    }

    /// What differs on the host from when the case began; the state directory must be empty too.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Snapshot::take().changes_since(&self.before);
        for entry in fs::read_dir(self.root()).into_iter().flatten().flatten() {
            found.push(format!("+ state {}", entry.path().display()));
        }
        found
    }

    /// Fails the test if the host differs from when the case began.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        let left = self.leftovers();
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    }

    /// Ends what a failed test left running.
    fn clean_up(&self) {
        for entry in fs::read_dir(self.root()).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            self.call(["delete", "--force", &id]).finish();
        }
        let left = self.leftovers();
        let new = |kind: &'static str| {
            left.iter()
                .rev()
                .filter_map(move |line| line.strip_prefix("+ ")?.strip_prefix(kind))
        };
        for pid in new("process ").filter_map(|line| line.split(' ').next()?.parse().ok()) {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                crate::call::wait_for_exit(pid, Duration::from_secs(10));
            }
        }
        for point in new("mount ").filter_map(|line| line.split(' ').nth(1)) {
            let _ = Command::new("umount").args(["-l", point]).status();
        }
        new("cgroup ").for_each(|path| drop(fs::remove_dir(path)));
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let left = self.leftovers();
        if !left.is_empty() {
            self.clean_up();
        }
        let removed = fs::remove_dir_all(&self.dir);
        if !std::thread::panicking() {
            assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
            removed.expect("remove the test's directory");
        }
    }
}

/// Processes on the host with this name.
pub fn processes_named(name: &str) -> Vec<host::Process> {
    host::processes()
        .into_iter()
        .filter(|process| process.name == name)
        .collect()
}

/// caisson's configuration for the tests: the files of this build.
pub fn configuration() -> String {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"));
    let guest =
        std::env::var_os("CAISSON_GUEST").map_or(repository.join("target/guest"), PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let vmm = std::env::split_paths(&path)
        .map(|dir| dir.join("caisson-vmm"))
        .find(|file| file.exists());
    // The lab's emulated processor contradicts itself about XSAVE when it is nested.
    let in_lab = std::env::var_os("CAISSON_LAB").is_some();
    format!(
        "kernel = {:?}\ninitramfs = {:?}\nvmm = {:?}\nkernel_params = {:?}\n",
        guest.join("vmlinux"),
        guest.join("initramfs.cpio"),
        vmm.unwrap_or_else(|| "/usr/lib/caisson/caisson-vmm".into()),
        if in_lab { "noxsave" } else { "" },
    )
}
