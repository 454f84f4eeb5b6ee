//! Block devices of the host in a container: disks of its virtual machine, plugged in for it and out again after it.

use std::fs;

use caisson_tests::{Case, Loop};
use serde_json::json;

use crate::members::{join, start_holder};

#[test]
fn what_a_container_writes_is_on_the_hosts_device_and_a_rule_can_forbid_it() {
    let case = Case::begin();
    let (disk, other) = (Loop::attach(&case, "disk"), Loop::attach(&case, "other"));
    fs::write(disk.device(), "from the host").expect("write");
    // The kernel's own numbers in the container are its own affair: the node is what the rule allows.
    let script = "stat -c '%a %u %g %F' /dev/xvda; head -c 4 /dev/xvda; echo; blockdev --getsize64 /dev/xvda; \
        printf there | dd of=/dev/xvda bs=1 seek=1048576 conv=notrunc 2>/dev/null; \
        blockdev --getro /dev/again; blockdev --getro /dev/ro; (echo x >/dev/ro) 2>/dev/null || echo refused; \
        mknod /hidden b 8 0; (head -c 1 /hidden) 2>/dev/null || echo denied";
    let bundle = disk.give(case.bundle().script(script), "/dev/xvda", "rwm");
    let bundle = disk.give(bundle, "/dev/again", "rwm");
    let bundle = other.give(bundle, "/dev/ro", "r");
    let outcome = case.run(&bundle);
    let size = Loop::BYTES.to_string();
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
        .args([disk.device()])
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
