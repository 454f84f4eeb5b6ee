//! Block devices of the host's for a test.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use serde_json::json;

use crate::{Bundle, Call, Case};

/// A block device of the host's on a file, until it is dropped.
pub struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    /// How large it is.
    pub const BYTES: u64 = 8 << 20;

    /// Attaches one to a new file in the case's directory.
    pub fn attach(case: &Case, name: &str) -> Self {
        Self::attach_in(case.dir(), name)
    }

    /// Attaches one to a new file in this directory.
    pub fn attach_in(dir: &Path, name: &str) -> Self {
        let file = dir.join(name);
        let made = File::create(&file).expect("file");
        made.set_len(Self::BYTES).expect("size");
        let shown = Call::new("losetup", &dir.join(format!("{name}-losetup")));
        let outcome = shown.args(["-f", "--show"]).args([&file]).succeed();
        Self {
            device: outcome.text().trim().into(),
            file,
        }
    }

    /// Its node.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Its number: major, minor.
    pub fn number(&self) -> (u32, u32) {
        let about = fs::metadata(&self.device).expect("the device");
        assert!(about.file_type().is_block_device());
        (major(about.rdev()), minor(about.rdev()))
    }

    /// Gives the device to a container, with a rule of its own.
    pub fn give(&self, bundle: Bundle, path: &str, access: &str) -> Bundle {
        let (major, minor) = self.number();
        bundle.edit(|spec| {
            let linux = &mut spec["linux"];
            let node = json!({"path": path, "type": "b", "major": major, "minor": minor,
                "fileMode": 0o640, "uid": 7, "gid": 8});
            let mut nodes = linux["devices"].as_array().cloned().unwrap_or_default();
            nodes.push(node);
            linux["devices"] = json!(nodes);
            let rule = json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access});
            let rules = linux["resources"]["devices"].as_array_mut();
            rules.expect("rules").push(rule);
            for set in ["bounding", "effective", "permitted"] {
                spec["process"]["capabilities"][set] = json!(["CAP_DAC_OVERRIDE", "CAP_MKNOD", "CAP_KILL"]);
            }
        })
    }

    /// What the host reads at `offset` of the device.
    pub fn text(&self, offset: u64) -> String {
        let mut bytes = [0; 5];
        let device = File::open(&self.device).expect("the device");
        device.read_exact_at(&mut bytes, offset).expect("read");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether the device still has its file: not, once it was detached and nobody has it open.
    pub fn is_in_use(&self) -> bool {
        let name = self.device.file_name().expect("a name");
        let file = Path::new("/sys/block").join(name).join("loop/backing_file");
        file.exists()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let mut detach = std::process::Command::new("losetup");
        // It may be done already.
        let _ = detach.arg("-d").arg(&self.device).output();
        let _ = fs::remove_file(&self.file);
    }
}
