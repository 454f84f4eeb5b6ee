//! Files on the share: what the container makes is what the host has, and the other way round.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use caisson_tests::{Bundle, Case, tree};
use rustix::fs::{XattrFlags, setxattr};
use serde_json::json;

/// The container's half of these tests.
const PROBE: &str = env!("CARGO_BIN_EXE_probe");

/// A big tree and a hundred thousand files take their time in an emulated machine.
const LONG: Duration = Duration::from_secs(240);

/// A bundle with the probe in it, and the capabilities to make any file.
fn probing(case: &Case) -> Bundle {
    let bundle = case.bundle().privileged_files();
    fs::copy(PROBE, bundle.rootfs("bin/probe")).expect("probe");
    bundle.edit(|spec| {
        spec["process"]["rlimits"] =
            json!([{"type": "RLIMIT_NOFILE", "hard": 200_000, "soft": 200_000}]);
    })
}

fn assert_same(one: &[String], other: &[String]) {
    let differing: Vec<_> = one
        .iter()
        .zip(other)
        .filter(|(a, b)| a != b)
        .take(5)
        .collect();
    assert!(
        differing.is_empty() && one.len() == other.len(),
        "{} and {} entries; first differences: {differing:#?}",
        one.len(),
        other.len()
    );
}

#[test]
fn a_tree_of_20000_files_made_in_the_container_is_the_same_on_the_host() {
    let case = Case::begin();
    let bundle = probing(&case);
    fs::create_dir(bundle.rootfs("tree")).expect("mkdir");
    let bundle = bundle.args(["sh", "-c", "probe make /tree 20000 && probe list /tree"]);
    let outcome = case.run_call(&bundle, "one").limit(LONG).finish();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let inside: Vec<String> = outcome.text().lines().map(str::to_owned).collect();
    assert!(inside.len() >= 20_000, "{} entries", inside.len());
    assert_same(&inside, &tree::manifest(&bundle.rootfs("tree")));
}

#[test]
fn a_tree_of_20000_files_made_on_the_host_is_the_same_in_the_container() {
    let case = Case::begin();
    let bundle = probing(&case);
    fs::create_dir(bundle.rootfs("tree")).expect("mkdir");
    tree::make(&bundle.rootfs("tree"), 20_000).expect("make");
    let bundle = bundle.args(["probe", "list", "/tree"]);
    let outcome = case.run_call(&bundle, "one").limit(LONG).finish();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let inside: Vec<String> = outcome.text().lines().map(str::to_owned).collect();
    assert_same(&inside, &tree::manifest(&bundle.rootfs("tree")));
}

#[test]
fn the_share_behaves_as_posix_says() {
    let case = Case::begin();
    let bundle = probing(&case);
    roots_files(&bundle.rootfs("roots"));
    for dir in ["posix", "users"] {
        fs::create_dir(bundle.rootfs(dir)).expect("mkdir");
    }
    chown(bundle.rootfs("users"), Some(1000), Some(1000)).expect("chown");
    let outcome = case
        .run_call(&bundle.args(["probe", "posix", "/posix"]), "root")
        .limit(LONG)
        .finish();
    assert_eq!(outcome.status, 0, "{}\n{}", outcome.text(), outcome.stderr);
}

#[test]
fn the_share_behaves_as_posix_says_for_a_user_without_privileges() {
    let case = Case::begin();
    let bundle = probing(&case);
    roots_files(&bundle.rootfs("roots"));
    fs::create_dir(bundle.rootfs("users")).expect("mkdir");
    chown(bundle.rootfs("users"), Some(1000), Some(1000)).expect("chown");
    let bundle = bundle.args(["probe", "posix-user", "/users"]).edit(|spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
    });
    let outcome = case.run_call(&bundle, "user").limit(LONG).finish();
    assert_eq!(outcome.status, 0, "{}\n{}", outcome.text(), outcome.stderr);
}

/// Root's files, against which a user tries its rights.
fn roots_files(dir: &Path) {
    let make = |name: &str, mode: u32, text: &str| {
        let path = dir.join(name);
        if text.is_empty() {
            fs::create_dir(&path).expect("mkdir");
        } else {
            fs::write(&path, text).expect("write");
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    };
    fs::create_dir(dir).expect("mkdir");
    make("secret", 0o600, "secret");
    make("readable", 0o644, "public");
    make("closed", 0o700, "");
    make("closed/file", 0o644, "hidden");
    make("sticky", 0o1777, "");
    make("sticky/roots", 0o666, "root's");
    make("listed", 0o600, "listed");
    setxattr(
        dir.join("listed"),
        "system.posix_acl_access",
        &tree::access_list(0),
        XattrFlags::empty(),
    )
    .expect("setfacl");
}

#[test]
fn a_hundred_thousand_files_are_open_at_once() {
    let case = Case::begin();
    let bundle = probing(&case);
    fs::create_dir(bundle.rootfs("many")).expect("mkdir");
    let bundle = bundle.args(["probe", "open", "/many", "100000"]);
    let outcome = case.run_call(&bundle, "one").limit(LONG).finish();
    assert_eq!(
        (outcome.status, outcome.text()),
        (0, "100000 files open\n"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn memory_maps_of_shared_files_are_written_back() {
    let case = Case::begin();
    let program = "import mmap\nf=open('/root/f','r+b')\nm=mmap.mmap(f.fileno(),0)\n\
                   assert m[:5]==b'hello'\nm[0:5]=b'HELLO'\nm.flush()\nprint(open('/root/f').read())";
    let bundle = case
        .debian()
        .file("root/f", "hello world")
        .args(["python3", "-c", program]);
    let outcome = case.run(&bundle);
    assert_eq!(outcome.text(), "HELLO world\n", "{outcome:?}");
    assert_eq!(
        fs::read_to_string(bundle.rootfs("root/f")).expect("read"),
        "HELLO world"
    );
}

#[test]
fn bind_mounts_are_live_in_both_directions_and_read_only_ones_refuse() {
    let case = Case::begin();
    let volume = case.dir().join("volume");
    fs::create_dir(&volume).expect("mkdir");
    fs::write(volume.join("from-host"), "1").expect("write");
    let source = volume.display().to_string();
    let bundle = case.bundle().args(["sleep", "1000"]);
    let bundle =
        bundle
            .mount(&source, "/rw", &["rbind", "rw"])
            .mount(&source, "/ro", &["rbind", "ro"]);
    case.start(&bundle, "one");
    assert_eq!(
        case.exec(
            "one",
            "cat /rw/from-host /ro/from-host; echo 2 > /rw/from-guest"
        )
        .text(),
        "11"
    );
    assert_eq!(
        fs::read_to_string(volume.join("from-guest")).expect("read"),
        "2\n"
    );
    fs::write(volume.join("later"), "3").expect("write");
    assert_eq!(case.exec("one", "cat /rw/later /ro/later").text(), "33");
    let refused = case.exec("one", "touch /ro/x");
    assert_eq!(refused.status, 1);
    assert!(
        refused.stderr.contains("Read-only file system"),
        "{refused:?}"
    );
    case.delete("one");
}
