//! Pods, told by the annotations that containerd's CRI and CRI-O set: one virtual machine for all containers.

use std::path::PathBuf;

use caisson_tests::case::{processes_named, runtime};
use caisson_tests::{Case, Outcome, Tmpfs};
use serde_json::{Value, json};

use crate::daemon::{Daemon, begin};

/// The two forms of the annotations.
pub(crate) const FORMS: [[&str; 2]; 2] = [
    [
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ],
    [
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ],
];

/// A pod's files on the host.
pub(crate) struct Pod {
    form: [&'static str; 2],
    rootfs: PathBuf,
    shm: Tmpfs,
}

impl Pod {
    pub(crate) fn new(case: &Case, form: [&'static str; 2]) -> Self {
        Self {
            form,
            rootfs: case.bundle_in("pod").rootfs("/"),
            shm: Tmpfs::mount(&case.dir().join("shm")),
        }
    }

    fn spec(&self, kind: &str, id: &str, args: &[&str], namespaces: Value) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"},
            "root": {"path": self.rootfs},
            "hostname": if kind == "sandbox" { json!("the-pod") } else { Value::Null },
            "annotations": {self.form[0]: kind, self.form[1]: "sandbox"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/shm", "type": "bind", "source": self.shm.dir(), "options": ["rbind"]},
            ],
            "linux": {"cgroupsPath": format!("/pods/{id}"), "namespaces": namespaces, "resources": {}},
        })
    }

    pub(crate) fn sandbox(&self) -> Value {
        let own = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
        self.spec("sandbox", "sandbox", &["sleep", "100000"], json!(own))
    }

    /// A member; `joined` beside the network, which every member joins.
    pub(crate) fn member(&self, id: &str, joined: &[&str], script: &str) -> Value {
        let all = ["pid", "ipc", "uts", "mount", "network"];
        let namespaces = all.map(|kind| match joined.contains(&kind) || kind == "network" {
            true => json!({"type": kind, "path": format!("/proc/1/ns/{kind}")}),
            false => json!({"type": kind}),
        });
        let mut spec = self.spec(
            "container",
            id,
            &["/bin/sh", "-c", script],
            json!(namespaces),
        );
        if spec["hostname"].is_null() {
            spec.as_object_mut().expect("object").remove("hostname");
        }
        spec
    }
}

#[test]
fn a_pods_containers_share_one_machine() {
    if runtime() == "runc" {
        println!("skipped on runc: under ctr, without the CRI, nothing makes its pods");
        return;
    }
    for form in FORMS {
        let case = begin();
        let containerd = Daemon::start(&case);
        let pod = Pod::new(&case, form);
        let started = |outcome: Outcome| assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        started(containerd.run_spec("sandbox", &pod.sandbox()));
        let wait = "exec sleep 1000";
        started(containerd.run_spec("a", &pod.member("a", &["ipc", "uts"], wait)));
        started(containerd.run_spec("b", &pod.member("b", &["ipc", "uts", "pid"], wait)));
        assert_eq!(processes_named("caisson-vmm").len(), 1);
        assert_eq!(processes_named("containerd-shim-caisson-v2").len(), 1);
        let said = |id: &str, script: &str| {
            let outcome = containerd.exec(id, "e", script).succeed();
            outcome.text().trim().to_owned()
        };
        assert_eq!(said("a", "hostname"), "the-pod");
        assert_eq!(
            said("a", "echo hello > /dev/shm/x; stat -f -c %T /dev/shm"),
            "tmpfs"
        );
        assert_eq!(said("b", "cat /dev/shm/x"), "hello");
        for kind in ["ipc", "uts", "net"] {
            let link = format!("readlink /proc/self/ns/{kind}");
            assert_eq!(said("a", &link), said("b", &link), "{kind}");
        }
        let link = "readlink /proc/self/ns/pid";
        assert_ne!(said("a", link), said("b", link));
        assert_eq!(said("b", link), said("sandbox", link));
        // A member's name ends and begins anew in a sandbox that lives on.
        for _ in 0..3 {
            containerd.remove("a");
            started(containerd.run_spec("a", &pod.member("a", &["ipc", "uts"], wait)));
            assert_eq!(said("a", "cat /dev/shm/x"), "hello");
        }
        for id in ["a", "b", "sandbox"] {
            containerd.remove(id);
        }
        assert!(processes_named("caisson-vmm").is_empty());
    }
}

#[test]
fn a_member_without_its_sandbox_is_refused() {
    if runtime() == "runc" {
        println!("skipped on runc: it does not know of pods");
        return;
    }
    let case = begin();
    let containerd = Daemon::start(&case);
    let pod = Pod::new(&case, FORMS[0]);
    let outcome = containerd.run_spec("a", &pod.member("a", &["ipc"], "true"));
    assert_ne!(outcome.status, 0);
    assert!(
        outcome.stderr.contains("sandbox sandbox is not running"),
        "{}",
        outcome.stderr
    );
    containerd.ctr(["container", "rm", "a"]).finish();
}
