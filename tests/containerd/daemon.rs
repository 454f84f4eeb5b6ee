//! A containerd of a test's own, with one image under two names.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use caisson_tests::call::wait_for_exit;
use caisson_tests::case::{processes_named, runtime};
use caisson_tests::host::Process;
use caisson_tests::{Call, Case, Outcome};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::config;

/// The image's name.
pub(crate) const IMAGE: &str = "docker.io/test/busybox:latest";

/// The same as the image of a pod's sandbox: it waits.
pub(crate) const PAUSE: &str = "docker.io/test/pause:latest";

/// What containerd says when it serves.
const READY: &str = "containerd successfully booted";

/// How long it may take to say so.
const BOOT: Duration = Duration::from_secs(60);

/// How long a shim may take to end.
const LAST: Duration = Duration::from_secs(10);

/// A running containerd; dropping it ends it.
pub(crate) struct Daemon<'c> {
    case: &'c Case,
    child: Option<Child>,
}

/// A case in which containerd's own directories are there already: they are not what a test leaves behind.
pub(crate) fn begin() -> Case {
    make_directories();
    Case::begin()
}

/// The same for a case that does a lot.
pub(crate) fn begin_within(limit: Duration) -> Case {
    make_directories();
    Case::begin_within(limit)
}

fn make_directories() {
    for dir in [
        "/run/containerd/s",
        "/run/containerd/fifo",
        "/run/containerd/runc/default",
        "/opt/containerd",
    ] {
        fs::create_dir_all(dir).expect("containerd's directories");
    }
    // Runtimes make the parents of a cgroup and leave them.
    for group in ["default", "pods", "k8s.io"] {
        fs::create_dir_all(Path::new("/sys/fs/cgroup").join(group)).expect("cgroup");
    }
}

impl<'c> Daemon<'c> {
    /// Starts containerd without its CRI and imports the image.
    pub(crate) fn start(case: &'c Case) -> Self {
        Self::configured(case, "default", &config::without_cri(), "")
    }

    /// Starts containerd with more configuration, before and after the common part, and imports the images into one of
    /// its namespaces.
    pub(crate) fn configured(case: &'c Case, namespace: &str, first: &str, last: &str) -> Self {
        let dir = case.dir();
        let config = config::common(dir, first, last);
        fs::write(dir.join("containerd.toml"), config).expect("containerd.toml");
        let mut daemon = Self { case, child: None };
        daemon.restart();
        let image = image(case);
        daemon
            .ctr(["--namespace", namespace, "image", "import"])
            .args([&image])
            .succeed();
        daemon
    }

    /// Where it serves.
    pub(crate) fn socket(&self) -> PathBuf {
        self.case.dir().join("containerd.sock")
    }

    /// Starts containerd once more, after [`Self::kill`].
    pub(crate) fn restart(&mut self) {
        let dir = self.case.dir();
        let mut child = Command::new("containerd")
            .arg("--config")
            .arg(dir.join("containerd.toml"))
            .env("CAISSON_CONFIG", dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("containerd is not installed: use the lab's image `systemd`");
        let log = BufReader::new(child.stderr.take().expect("stderr"));
        let mut file = append(&dir.join("containerd.log"));
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                let _ = writeln!(file, "{line}");
                if line.contains(READY) {
                    let _ = tell.send(());
                }
            }
        });
        self.child = Some(child);
        told.recv_timeout(BOOT).expect("containerd does not serve");
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    /// A call of ctr.
    pub(crate) fn ctr<const N: usize>(&self, args: [&str; N]) -> Call {
        self.case
            .program("ctr")
            .args([
                "-a".as_ref(),
                self.case.dir().join("containerd.sock").as_os_str(),
            ])
            .args(args)
            .limit(Duration::from_secs(120))
    }

    /// `ctr run` of the image, with more flags and a script.
    pub(crate) fn run<const N: usize>(&self, flags: [&str; N], id: &str, script: &str) -> Call {
        // A killed shim's client leaves its FIFOs: here they go with the test.
        self.ctr(["run", "--runtime", shim(), "--fifo-dir"])
            .args([self.case.dir().join("fifo")])
            .args(flags)
            .args([IMAGE, id, "/bin/sh", "-c", script])
    }

    /// `ctr task exec` of a script.
    pub(crate) fn exec(&self, id: &str, exec_id: &str, script: &str) -> Call {
        self.ctr([
            "task",
            "exec",
            "--exec-id",
            exec_id,
            id,
            "/bin/sh",
            "-c",
            script,
        ])
    }

    /// The status that `ctr task ls` shows.
    pub(crate) fn status(&self, id: &str) -> String {
        let listing = self.ctr(["task", "ls"]).succeed();
        let words = |line: &str| {
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let line = listing
            .text()
            .lines()
            .map(words)
            .find(|words| words[0] == id);
        line.map_or("none".to_owned(), |words| words[2].clone())
    }

    /// Kills what runs and removes a container.
    pub(crate) fn remove(&self, id: &str) {
        // One that has ended already is not killed.
        self.ctr(["task", "delete", "--force", id]).finish();
        self.ctr(["container", "rm", id]).succeed();
    }

    /// Creates and starts a container with a `config.json` of the test's own, detached; the outcome is ctr's.
    pub(crate) fn run_spec(&self, id: &str, spec: &Value) -> Outcome {
        let file = self.case.dir().join(format!("{id}.json"));
        fs::write(&file, spec.to_string()).expect("config.json");
        self.ctr(["run", "--detach", "--runtime", shim(), "--config"])
            .args([file.as_os_str(), id.as_ref()])
            .finish()
    }

    /// containerd's log so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.case.dir().join("containerd.log")).unwrap_or_default()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().rev().take(40).collect();
            for line in lines.into_iter().rev() {
                eprintln!("{line}");
            }
        }
        // A shim has answered `Shutdown` before it ends.
        for shim in shims() {
            Pid::from_raw(shim.pid).map(|pid| wait_for_exit(pid, LAST));
        }
        let _ = kill_process(Pid::from_child(&child), Signal::TERM);
        let _ = child.wait();
    }
}

/// The shims of the runtime under test.
pub(crate) fn shims() -> Vec<Process> {
    processes_named(match runtime().as_str() {
        "runc" => "containerd-shim-runc-v2",
        _ => "containerd-shim-caisson-v2",
    })
}

/// The runtime under test by containerd's name for it.
pub(crate) fn shim() -> &'static str {
    if runtime() == "runc" {
        "io.containerd.runc.v2"
    } else {
        "io.containerd.caisson.v2"
    }
}

fn append(path: &Path) -> File {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.expect("containerd.log")
}

/// An OCI archive with busybox as its one layer.
fn image(case: &Case) -> PathBuf {
    let rootfs = case.bundle_in("image").rootfs("/");
    let dir = case.dir().join("oci");
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("blobs");
    let layer = case.dir().join("layer.tar");
    pack(&rootfs, &layer);
    let layer = blob(&blobs, &fs::read(layer).expect("layer"));
    let manifests = [
        manifest(&blobs, &layer, IMAGE, &["/bin/sh"]),
        manifest(&blobs, &layer, PAUSE, &["/bin/sleep", "1000000"]),
    ];
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(dir.join("index.json"), index.to_string()).expect("index");
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("layout");
    let archive = case.dir().join("image.tar");
    pack(&dir, &archive);
    archive
}

/// Stores an image's manifest and describes it.
fn manifest(blobs: &Path, layer: &Value, name: &str, command: &[&str]) -> Value {
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": command},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let with_type = |mut blob: Value, kind: &str| {
        blob["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
        blob
    };
    let manifest = json!({
        "schemaVersion": 2,
        "config": with_type(blob(blobs, config.to_string().as_bytes()), "config.v1+json"),
        "layers": [with_type(layer.clone(), "layer.v1.tar")],
    });
    let mut manifest = with_type(
        blob(blobs, manifest.to_string().as_bytes()),
        "manifest.v1+json",
    );
    manifest["annotations"] = json!({"io.containerd.image.name": name});
    manifest
}

fn pack(dir: &Path, archive: &Path) {
    let packed = Command::new("tar")
        .args([
            "-C".as_ref(),
            dir.as_os_str(),
            "-cf".as_ref(),
            archive.as_os_str(),
            ".".as_ref(),
        ])
        .status();
    assert!(packed.expect("tar").success());
}

/// Stores a blob and describes it.
fn blob(blobs: &Path, bytes: &[u8]) -> Value {
    let file = blobs.join("new");
    fs::write(&file, bytes).expect("blob");
    let sum = Command::new("sha256sum")
        .arg(&file)
        .output()
        .expect("sha256sum");
    let digest = String::from_utf8_lossy(&sum.stdout)[..64].to_owned();
    fs::rename(file, blobs.join(&digest)).expect("blob");
    json!({"digest": format!("sha256:{digest}"), "size": bytes.len()})
}
