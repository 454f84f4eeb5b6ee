//! Block devices of the host in a container: disks of its virtual machine, plugged in for it and out again after it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use caisson_tests::{Bundle, Case};
use rustix::fs::{major, minor};
use serde_json::json;

use crate::members::{join, start_holder};

/// How large the device is.
const BYTES: u64 = 8 << 20;

/// A block device of the host's on a file, until it is dropped.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    fn attach(case: &Case, name: &str) -> Self {
        let file = case.dir().join(name);
        let made = File::create(&file).expect("file");
        made.set_len(BYTES).expect("size");
        let shown = case.program("losetup").args(["-f", "--show"]);
        let outcome = shown.args([&file]).succeed();
        Self {
            device: outcome.text().trim().into(),
            file,
        }
    }

    fn number(&self) -> (u32, u32) {
        let about = fs::metadata(&self.device).expect("the device");
        assert!(about.file_type().is_block_device());
        (major(about.rdev()), minor(about.rdev()))
    }

    /// Gives the device to a container, with a rule of its own.
    fn give(&self, bundle: Bundle, path: &str, access: &str) -> Bundle {
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
    fn text(&self, offset: u64) -> String {
        let mut bytes = [0; 5];
        let device = File::open(&self.device).expect("the device");
        device.read_exact_at(&mut bytes, offset).expect("read");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether the device still has its file: not, once it was detached and nobody has it open.
    fn is_in_use(&self) -> bool {
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

#[test]
fn what_a_container_writes_is_on_the_hosts_device_and_a_rule_can_forbid_it() {
    let case = Case::begin();
    let (disk, other) = (Loop::attach(&case, "disk"), Loop::attach(&case, "other"));
    fs::write(&disk.device, "from the host").expect("write");
    // The kernel's own numbers in the container are its own affair: the node is what the rule allows.
    let script = "stat -c '%a %u %g %F' /dev/xvda; head -c 4 /dev/xvda; echo; blockdev --getsize64 /dev/xvda; \
        printf there | dd of=/dev/xvda bs=1 seek=1048576 conv=notrunc 2>/dev/null; \
        blockdev --getro /dev/again; blockdev --getro /dev/ro; (echo x >/dev/ro) 2>/dev/null || echo refused; \
        mknod /hidden b 8 0; (head -c 1 /hidden) 2>/dev/null || echo denied";
    let bundle = disk.give(case.bundle().script(script), "/dev/xvda", "rwm");
    let bundle = disk.give(bundle, "/dev/again", "rwm");
    let bundle = other.give(bundle, "/dev/ro", "r");
    let outcome = case.run(&bundle);
    let size = BYTES.to_string();
    let ours = caisson_tests::case::runtime() == "caisson";
    // runc has the host's device, which the host itself may write.
    let read_only = if ours { "1" } else { "0" };
    let expected = [
        "640 7 8 block special file",
        "from",
        &size,
        "0",
        read_only,
        "refused",
        "denied",
    ];
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(lines, expected, "{outcome:?}");
    assert_eq!(disk.text(1 << 20), "there");
    case.nothing_is_left();
}

#[test]
fn a_device_that_the_host_has_not_is_an_error_and_a_rule_for_all_gives_none() {
    let Some(case) = Case::begin_with_vm("runc makes nodes that lead nowhere") else {
        return;
    };
    let give = |spec: &mut serde_json::Value, rule| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/xvda", "type": "b", "major": 4000, "minor": 1}]);
        spec["linux"]["resources"]["devices"] = json!([rule]);
    };
    let named = json!({"allow": true, "type": "b", "major": 4000, "minor": 1, "access": "rwm"});
    let bundle = case.bundle().edit(|spec| give(spec, named));
    case.run(&bundle)
        .is_refusal("linux.devices: /dev/xvda: no block device 4000:1 on this host");
    let bundle = bundle
        .script("test -b /dev/xvda")
        .edit(|spec| give(spec, json!({"allow": true, "access": "rwm"})));
    let outcome = case.run(&bundle);
    assert_eq!(outcome.status, 0, "{outcome:?}");
    case.nothing_is_left();
}

#[test]
fn a_disk_is_plugged_into_a_running_machine_shared_and_unplugged() {
    let case = Case::begin();
    start_holder(&case);
    let disk = Loop::attach(&case, "disk");
    let member = |name: &str| join(case.bundle_in(name), case.pid("holder"));
    let give = |bundle| disk.give(bundle, "/dev/xvda", "rwm");
    let write = "printf first >/dev/xvda; printf ready; exec sleep 1000";
    case.start(&give(member("one").script(write)), "one");
    // What one wrote the other reads, through whatever keeps it, without a flush.
    let script = "until [ \"$(head -c 5 /dev/xvda)\" = first ]; do sleep 1; done; printf other | dd of=/dev/xvda bs=512 seek=1 2>/dev/null; echo seen";
    let outcome = case.run(&give(member("two").script(script)));
    assert_eq!(outcome.text(), "seen\n", "{outcome:?}");
    assert_eq!(
        case.exec(
            "one",
            "dd if=/dev/xvda bs=512 skip=1 count=1 2>/dev/null | head -c 5"
        )
        .text(),
        "other"
    );
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    case.delete("one");
    assert_eq!(
        (disk.text(0), disk.text(512)),
        ("first".into(), "other".into())
    );
    // Detaching would wait for whoever has it open.
    case.program("losetup")
        .args(["-d"])
        .args([&disk.device])
        .succeed();
    assert!(!disk.is_in_use());
    let again = Loop::attach(&case, "again");
    let outcome = case.run(&again.give(
        member("three").script("head -c 5 /dev/xvdb | tr '\\0' 0"),
        "/dev/xvdb",
        "r",
    ));
    assert_eq!(outcome.text(), "00000", "{outcome:?}");
    case.delete("holder");
    drop((disk, again));
    case.nothing_is_left();
}
