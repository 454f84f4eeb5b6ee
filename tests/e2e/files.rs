//! Files on the share: what the container makes is what the host has, and the other way round.

use std::fs;
use std::path::Path;
use std::time::Duration;

use caisson_tests::{Bundle, Case, Tmpfs};
use serde_json::json;

const FS_TREE: &str = env!("CARGO_BIN_EXE_fs-tree");
const POSIX_CHECK: &str = env!("CARGO_BIN_EXE_posix-check");

/// A big tree and a hundred thousand files take their time in an emulated machine, above all in a busy one.
const LONG: Duration = Duration::from_secs(900);
/// With what comes before and after.
const CASE: Duration = Duration::from_secs(1100);

/// A bundle with the workloads in it, what they need, and an empty directory `/share` for them.
fn working(case: &Case) -> Bundle {
    let bundle = case
        .bundle()
        .privileged_files()
        .program(FS_TREE)
        .program(POSIX_CHECK);
    fs::create_dir(bundle.rootfs("share")).expect("mkdir");
    bundle.edit(|spec| {
        spec["process"]["rlimits"] =
            json!([{"type": "RLIMIT_NOFILE", "hard": 200_000, "soft": 200_000}]);
    })
}

/// Everything that a tree on the host holds, one line an entry.
pub(crate) fn manifest(case: &Case, dir: &Path) -> String {
    let outcome = case
        .program(FS_TREE)
        .args(["manifest".as_ref(), dir.as_os_str()])
        .succeed();
    outcome.text().to_owned()
}

#[track_caller]
fn assert_same(one: &str, other: &str) {
    let differing: Vec<_> = one
        .lines()
        .zip(other.lines())
        .filter(|(a, b)| a != b)
        .take(5)
        .collect();
    let (one, other) = (one.lines().count(), other.lines().count());
    assert!(
        differing.is_empty() && one == other,
        "{one} and {other} entries; first differences: {differing:#?}"
    );
}

/// Makes the tree at `dir` on the host.
fn make_tree(case: &Case, dir: &Path) {
    case.program(FS_TREE)
        .args(["make", "--omit", "trusted"])
        .args([dir])
        .limit(LONG)
        .succeed();
}

#[test]
fn a_tree_of_20000_files_made_in_the_container_is_the_same_on_the_host() {
    let case = Case::begin_within(CASE);
    let bundle = working(&case).args(["fs-tree", "make", "--omit", "trusted", "/share/tree"]);
    let outcome = case.run_call(&bundle, "one").limit(LONG).finish();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    // The same plan carried out on the host says what there must be.
    let made = case.dir().join("made");
    make_tree(&case, &made);
    let made = manifest(&case, &made);
    assert_eq!(made.lines().count(), 20_000);
    assert_same(&manifest(&case, &bundle.rootfs("share/tree")), &made);
}

#[test]
fn a_tree_of_20000_files_made_on_the_host_is_the_same_in_the_container() {
    let case = Case::begin_within(CASE);
    let bundle = working(&case);
    let tree = bundle.rootfs("share/tree");
    make_tree(&case, &tree);
    let bundle = bundle.args(["fs-tree", "manifest", "/share/tree"]);
    let outcome = case.run_call(&bundle, "one").limit(LONG).finish();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let made = manifest(&case, &tree);
    assert_eq!(made.lines().count(), 20_000);
    assert_same(outcome.text(), &made);
}

/// Runs the checks that are chosen.
#[track_caller]
fn check(choice: &[&str]) {
    let case = Case::begin_within(CASE);
    let mut args = vec!["posix-check", "/share"];
    if caisson_tests::case::runtime() == "caisson" {
        args.extend(["--on", "virtio-fs"]);
    }
    args.extend(choice);
    let outcome = case
        .run_call(&working(&case).args(args), "one")
        .limit(LONG)
        .finish();
    let failed: Vec<&str> = outcome
        .text()
        .lines()
        .filter(|line| !line.starts_with("ok "))
        .collect();
    assert_eq!(
        outcome.status,
        0,
        "{}\n{}",
        failed.join("\n"),
        outcome.stderr
    );
}

#[test]
fn the_share_behaves_as_posix_says_of_names() {
    check(&["--only", "name", "--only", "link", "--only", "rename"]);
}

#[test]
fn the_share_behaves_as_posix_says_of_directories() {
    check(&["--only", "directory", "--only", "handle"]);
}

#[test]
fn the_share_behaves_as_posix_says_of_the_rest() {
    let others = ["name", "link", "rename", "directory", "handle"];
    check(&others.map(|group| ["--without", group]).concat());
}

#[test]
fn a_hundred_thousand_descriptors_are_open_at_once() {
    let case = Case::begin_within(CASE);
    // A volume in memory: what is asked for is descriptors, not a disk; ten for each file, which are quicker to open than
    // new files are to make.
    let volume = Tmpfs::mount(&case.dir().join("volume"));
    let source = volume.dir().display().to_string();
    let bundle = working(&case)
        .mount(&source, "/share", &["rbind", "rw"])
        .args([
            "posix-check",
            "open-files",
            "--keep",
            "--distinct",
            "10000",
            "/share",
        ]);
    let outcome = case.run_call(&bundle, "one").limit(LONG).finish();
    assert_eq!(outcome.status, 0, "{} {}", outcome.text(), outcome.stderr);
    assert!(
        outcome.text().contains("open 100000 of 100000"),
        "{outcome:?}"
    );
    // They are the host's files.
    let last = fs::read_dir(volume.dir().join("open-files/9")).expect("the last directory");
    assert_eq!(last.count(), 1000);
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
    let bundle = bundle
        .mount(&source, "/rw", &["rbind", "rw", "rnoatime"])
        .mount(&source, "/ro", &["rbind", "ro", "noatime"]);
    case.start(&bundle, "one");
    let settings = case.exec("one", "grep -c ' /r[ow] .*noatime' /proc/mounts");
    assert_eq!(settings.text(), "2\n", "{settings:?}");
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

#[test]
fn a_root_file_system_may_be_believed_for_a_while_and_volumes_never() {
    let Some(case) = Case::begin_with_vm("runc's container has the host's files") else {
        return;
    };
    case.configure("rootfs_cache_ms = 60000\n");
    let volume = case.dir().join("volume");
    fs::create_dir(&volume).expect("mkdir");
    fs::write(volume.join("file"), "1").expect("write");
    let source = volume.display().to_string();
    let bundle = case.bundle().args(["sleep", "1000"]);
    let bundle = bundle.mount(&source, "/volume", &["rbind", "rw"]);
    case.start(&bundle, "one");
    let exec = |script: &str| case.exec("one", script).text().to_owned();
    let look =
        "cat /volume/file; test -e /volume/new && echo new; test -e /tmp/new && echo late; true";
    assert_eq!(exec(look), "1");
    fs::write(volume.join("file"), "22").expect("write");
    fs::write(volume.join("new"), "").expect("write");
    fs::write(bundle.rootfs("tmp/new"), "").expect("write");
    assert_eq!(exec(look), "22new\n", "a volume is asked for");
    // What the container does itself it sees, and so does the host.
    let own = "cd /tmp; test -e a || echo 12 > a; ln a b; mv a c; ls b c; test -e a || echo gone; \
               echo 345 >> b; cat c; rm b; stat -c %h c";
    assert_eq!(exec(own), "b\nc\ngone\n12\n345\n1\n");
    let made = fs::read_to_string(bundle.rootfs("tmp/c")).expect("read");
    assert_eq!(made, "12\n345\n");
    case.delete("one");
}
