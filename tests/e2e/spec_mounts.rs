//! The root file system and the mounts of `config.json`: their attributes, propagation and owners.
//!
//! `docs/runtime-spec.md` names these tests, field by field. What runc 1.1 does not know yet runs on caisson alone.

use std::fs;
use std::os::unix::fs::MetadataExt;

use caisson_tests::Case;
use caisson_tests::mount::Tmpfs;
use serde_json::{Value, json};

use crate::spec_fields::{TOO_NEW, mapped};

#[test]
fn a_read_only_root_first_gets_the_mount_points_and_the_directory_that_it_lacks() {
    let case = Case::begin();
    let file = case.dir().join("file");
    fs::write(&file, "from outside\n").expect("write");
    let bundle = case.bundle().script("pwd; cat /new/file; echo x > /new/deep/x; echo $?; (echo x > /here) 2>&1; (echo x > here) 2>&1");
    let bundle = bundle.edit(|spec| {
        spec["root"]["readonly"] = json!(true);
        spec["process"]["cwd"] = json!("/work/deep");
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/new/deep", "type": "tmpfs", "source": "tmpfs"}));
        mounts.push(json!({"destination": "/new/file", "type": "bind", "source": file, "options": ["bind", "ro"]}));
    });
    let outcome = case.run(&bundle);
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(
        lines[..3],
        ["/work/deep", "from outside", "0"],
        "{outcome:?}"
    );
    assert_eq!(lines.len(), 5, "{outcome:?}");
    assert!(
        lines[3..]
            .iter()
            .all(|line| line.contains("Read-only file system")),
        "{outcome:?}"
    );
    // As with runc they stay.
    assert!(bundle.rootfs("work/deep").is_dir() && bundle.rootfs("new/deep").is_dir());
    assert_eq!(
        fs::metadata(bundle.rootfs("new/file"))
            .expect("a mount point")
            .len(),
        0
    );
    assert!(!bundle.rootfs("here").exists());
}

#[test]
fn recursive_attributes_reach_the_mounts_below() {
    let case = Case::begin();
    let outer = Tmpfs::mount(&case.dir().join("outer"));
    let inner = Tmpfs::mount(&outer.dir().join("inner"));
    fs::copy("/bin/busybox", inner.dir().join("busybox")).expect("copy");
    let source = outer.dir().to_str().expect("text");
    let script = "for d in all top; do for f in $d/x $d/inner/x; do (echo > /$f) 2>/dev/null && echo $f can be written; done; \
                  /$d/inner/busybox echo $d runs 2>/dev/null; done; true";
    let bundle = case
        .bundle()
        .script(script)
        .mount(source, "/all", &["rbind", "rro", "rnoexec"])
        .mount(source, "/top", &["rbind"]);
    let outcome = case.run(&bundle);
    assert_eq!(
        outcome.text(),
        "top/x can be written\ntop/inner/x can be written\ntop runs\n",
        "{outcome:?}"
    );
    drop(inner);
}

#[test]
fn every_recursive_attribute_is_on_the_mounts_below_too() {
    let case = Case::begin();
    let outer = Tmpfs::mount(&case.dir().join("outer"));
    let inner = Tmpfs::mount(&outer.dir().join("inner"));
    let source = outer.dir().to_str().expect("text");
    let rights = ["rbind", "rnosuid", "rnodev", "rnosymfollow", "rnoatime"];
    let bundle = case
        .bundle()
        .script("ls /all/inner /strict/inner /none/inner > /dev/null; awk '$5 ~ \"^/(all|strict|none)\" {print $5, $6}' /proc/self/mountinfo | sort")
        .mount(source, "/all", &rights)
        .mount(source, "/strict", &["rbind", "rstrictatime", "rnodiratime"])
        .mount(source, "/none", &["rbind", "nosuid", "rsuid"]);
    let outcome = case.run(&bundle);
    let wanted = [
        ("/all", "rw,nosuid,nodev,noatime,nosymfollow"),
        ("/none", "rw,relatime"),
        ("/strict", "rw,nodiratime"),
    ];
    let wanted: String = wanted
        .iter()
        .map(|(path, seen)| format!("{path} {seen}\n{path}/inner {seen}\n"))
        .collect();
    assert_eq!(outcome.text(), wanted, "{outcome:?}");
    drop(inner);
}

#[test]
fn the_roots_propagation_is_as_asked() {
    let Some(case) = Case::begin_with_vm("runc 1.1 applies it to the root before pivot_root")
    else {
        return;
    };
    for (word, is_shared) in [("shared", true), ("private", false)] {
        let bundle = case
            .bundle_in(word)
            .script("awk '$5 == \"/\"' /proc/self/mountinfo");
        let bundle = bundle.edit(|spec| spec["linux"]["rootfsPropagation"] = json!(word));
        let outcome = case.run(&bundle);
        assert_eq!(
            outcome.text().contains(" shared:"),
            is_shared,
            "{word}: {outcome:?}"
        );
    }
}

/// Mappings of users and groups alike: the owner on the file system, the owner on the mount.
fn map(spec: &mut Value, owners: &[(u32, u32)]) {
    let mappings = owners
        .iter()
        .map(|(from, to)| json!({"containerID": from, "hostID": to, "size": 1}));
    let mappings: Vec<_> = mappings.collect();
    let mount = spec["mounts"].as_array_mut().and_then(|all| all.last_mut());
    let mount = mount.expect("a mount");
    mount["uidMappings"] = json!(mappings);
    mount["gidMappings"] = json!(mappings);
}

fn owners(path: &std::path::Path) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).expect("stat");
    (meta.uid(), meta.gid())
}

/// A directory with a file of user 1000's, and below it a mount with one of user 1001's.
fn directory_with_mount(case: &Case) -> (std::path::PathBuf, Tmpfs) {
    let source = case.dir().join("source");
    fs::create_dir(&source).expect("mkdir");
    let inner = Tmpfs::mount(&source.join("inner"));
    for (name, owner) in [("outer-file", 1000), ("inner/inner-file", 1001)] {
        fs::write(source.join(name), "").expect("write");
        let path = source.join(name);
        std::os::unix::fs::chown(path, Some(owner), Some(owner)).expect("chown");
    }
    fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o777))
        .expect("chmod");
    (source, inner)
}

#[test]
fn an_id_mapped_mount_shows_and_makes_files_under_other_owners() {
    let Some(case) = Case::begin_with_vm(TOO_NEW) else {
        return;
    };
    let (source, inner) = directory_with_mount(&case);
    let source_text = source.to_str().expect("text");
    let script = "stat -c %u:%g /m/outer-file /m/inner/inner-file; touch /m/by-root; \
                  mkdir /m/dir; chown 2001:2001 /m/dir; stat -c %u:%g /m/by-root /m/dir; \
                  touch /m/foreign; chown 7:7 /m/foreign || echo no; rm -f /m/foreign";
    for (option, inner_owner) in [("idmap", "1001:1001"), ("ridmap", "2001:2001")] {
        let bundle = case
            .bundle_in(option)
            .mount(source_text, "/m", &["rbind", option]);
        let bundle = bundle
            .privileged_files()
            .script(script)
            .edit(|spec| map(spec, &[(0, 0), (1000, 2000), (1001, 2001)]));
        let outcome = case.run(&bundle);
        assert_eq!(
            outcome.text(),
            format!("2000:2000\n{inner_owner}\n0:0\n2001:2001\nno\n"),
            "{option}: {outcome:?}"
        );
        assert_eq!(owners(&source.join("by-root")), (0, 0));
        assert_eq!(owners(&source.join("dir")), (1001, 1001));
        fs::remove_file(source.join("by-root")).expect("remove");
        fs::remove_dir(source.join("dir")).expect("remove");
    }
    drop(inner);
}

#[test]
fn an_id_mapped_mount_without_mappings_has_those_of_the_user_namespace() {
    let Some(case) = Case::begin_with_vm(TOO_NEW) else {
        return;
    };
    let source = case.dir().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("theirs"), "").expect("write");
    let bundle = case
        .bundle()
        .script("stat -c %u:%g /m /m/theirs; touch /m/mine; stat -c %u:%g /m/mine")
        .mount(source.to_str().expect("text"), "/m", &["bind", "idmap"]);
    let bundle = mapped(bundle);
    let own = case.program("chown").args(["-R", "100000:100000"]);
    own.args([bundle.rootfs("")]).succeed();
    let outcome = case.run(&bundle);
    assert_eq!(outcome.text(), "0:0\n0:0\n0:0\n", "{outcome:?}");
    assert_eq!(owners(&source.join("mine")), (0, 0));
}

#[test]
fn a_file_system_without_id_mapped_mounts_is_named() {
    let Some(case) = Case::begin_with_vm(TOO_NEW) else {
        return;
    };
    let bundle = case.bundle().mount("/sys/class", "/m", &["bind", "idmap"]);
    let bundle = bundle.edit(|spec| map(spec, &[(0, 5)]));
    case.run(&bundle)
        .is_refusal("failed to set MOUNT_ATTR_IDMAP on /sys/class");
    case.nothing_is_left();
}
