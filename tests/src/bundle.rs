//! An OCI bundle: a root file system and a `config.json` that the runtime's own `spec` wrote, with edits.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

/// A bundle directory of one test.
pub struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    /// A bundle with busybox as its whole system, about to run `true`, without a terminal.
    pub(crate) fn busybox(dir: &Path, config: &str) -> Self {
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin).expect("rootfs");
        fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox-static");
        let applets = Command::new("/bin/busybox")
            .arg("--list")
            .output()
            .expect("busybox");
        for applet in String::from_utf8_lossy(&applets.stdout).lines() {
            if applet != "busybox" {
                symlink("busybox", bin.join(applet)).expect("applet");
            }
        }
        Self::with_system(dir, config)
    }

    /// A bundle with this host's Debian system, bind-mounted read-only: `bash`, `python3`, `setfacl` and the like.
    pub(crate) fn debian(dir: &Path, config: &str) -> Self {
        let rootfs = dir.join("rootfs");
        fs::create_dir_all(rootfs.join("usr")).expect("rootfs");
        for link in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{link}"), rootfs.join(link)).expect("link");
        }
        Self::with_system(dir, config).mount("/usr", "/usr", &["rbind", "ro"])
    }

    fn with_system(dir: &Path, config: &str) -> Self {
        let rootfs = dir.join("rootfs");
        for name in ["proc", "sys", "dev", "etc", "root", "tmp"] {
            fs::create_dir_all(rootfs.join(name)).expect("rootfs");
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").expect("passwd");
        fs::write(rootfs.join("etc/group"), "root:x:0:\n").expect("group");
        fs::write(dir.join("config.json"), config).expect("config.json");
        let bundle = Self {
            dir: dir.to_owned(),
        };
        bundle.args(["true"]).edit(|spec| {
            spec["process"]["terminal"] = json!(false);
            spec["root"]["readonly"] = json!(false);
        })
    }

    /// The bundle's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in its root file system.
    pub fn rootfs(&self, path: &str) -> PathBuf {
        self.dir.join("rootfs").join(path.trim_start_matches('/'))
    }

    /// Changes `config.json`.
    #[must_use]
    pub fn edit(self, change: impl FnOnce(&mut Value)) -> Self {
        let file = self.dir.join("config.json");
        let text = fs::read_to_string(&file).expect("config.json");
        let mut spec = serde_json::from_str(&text).expect("config.json is JSON");
        change(&mut spec);
        fs::write(file, spec.to_string()).expect("config.json");
        self
    }

    /// The program and its arguments.
    #[must_use]
    pub fn args<'a>(self, args: impl AsRef<[&'a str]>) -> Self {
        self.edit(|spec| spec["process"]["args"] = json!(args.as_ref()))
    }

    /// A shell script as the program.
    #[must_use]
    pub fn script(self, script: &str) -> Self {
        self.args(["/bin/sh", "-c", script])
    }

    /// The program gets a terminal.
    #[must_use]
    pub fn terminal(self) -> Self {
        self.edit(|spec| spec["process"]["terminal"] = json!(true))
    }

    /// One more mount: a bind mount of a host path.
    #[must_use]
    pub fn mount(self, source: &str, destination: &str, options: &[&str]) -> Self {
        let _ = fs::create_dir_all(self.rootfs(destination));
        self.edit(|spec| {
            let mount = json!({
                "destination": destination, "type": "bind", "source": source, "options": options,
            });
            spec["mounts"].as_array_mut().expect("mounts").push(mount);
        })
    }

    /// One of the workloads' programs, in `/bin`.
    #[must_use]
    pub fn program(self, path: &str) -> Self {
        let name = Path::new(path).file_name().expect("a program");
        fs::copy(path, self.rootfs("bin").join(name)).expect("copy the program");
        self
    }

    /// What a plain root user may do to files, in all sets, and any device node.
    #[must_use]
    pub fn privileged_files(self) -> Self {
        let names = [
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_DAC_READ_SEARCH",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_KILL",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETFCAP",
            "CAP_SETGID",
            "CAP_SETPCAP",
            "CAP_SETUID",
            "CAP_SYS_ADMIN",
            "CAP_SYS_RESOURCE",
        ];
        self.edit(|spec| {
            for set in ["bounding", "effective", "permitted"] {
                spec["process"]["capabilities"][set] = json!(names);
            }
            spec["process"]["noNewPrivileges"] = json!(false);
            spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        })
    }

    /// A file below the root, made by the host.
    #[must_use]
    pub fn file(self, path: &str, content: &str) -> Self {
        fs::write(self.rootfs(path), content).expect("file");
        self
    }
}
