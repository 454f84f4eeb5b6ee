//! Volumes as the kubelet makes them: directories and files of the host below a pod's own directory.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use caisson_tests::{Case, Published, Tmpfs};
use k8s_cri::v1::MountPropagation;

use crate::kubelet::{Kubelet, begin_pods, until, volume};

#[test]
fn a_host_path_is_shared_both_ways_or_read_only() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let (open, closed) = (case.dir().join("open"), case.dir().join("closed"));
    for dir in [&open, &closed] {
        fs::create_dir(dir).expect("directory");
        fs::write(dir.join("before"), "here").expect("file");
    }
    fs::create_dir(open.join("sub")).expect("subPath");
    fs::write(open.join("sub/app.conf"), "a = 1").expect("file");
    fs::write(case.dir().join("message"), "").expect("file");
    let mut config = pod.container("main", "exec sleep 1000");
    config.mounts = vec![
        volume(&open, "/open", false),
        volume(&closed, "/closed", true),
        volume(&open.join("sub/app.conf"), "/etc/app.conf", true),
        volume(&open.join("sub"), "/sub", false),
        volume(&case.dir().join("message"), "/dev/termination-log", false),
    ];
    let id = pod.run(config);
    assert_eq!(
        node.said(&id, "cat /open/before /closed/before"),
        "herehere"
    );
    fs::write(open.join("later"), "from the host").expect("file");
    assert_eq!(node.said(&id, "cat /open/later"), "from the host");
    node.said(
        &id,
        "echo from the guest > /open/back; echo why > /dev/termination-log",
    );
    assert_eq!(
        fs::read_to_string(open.join("back")).expect("file"),
        "from the guest\n"
    );
    let message = fs::read_to_string(case.dir().join("message"));
    assert_eq!(message.expect("file"), "why\n");
    let refused = node
        .exec_sync(&id, "touch /closed/x", 60)
        .expect("ExecSync");
    assert_ne!(refused.exit_code, 0);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"));
    assert_eq!(
        node.said(&id, "cat /etc/app.conf /sub/app.conf"),
        "a = 1a = 1"
    );
    node.said(&id, "touch /sub/made; ! touch /etc/app.conf");
    assert!(open.join("sub/made").exists());
    pod.end();
}

/// The workload that prints what inotify tells, in a directory of its own.
fn notices(case: &Case) -> PathBuf {
    let own = std::env::current_exe().expect("this program");
    // target/TRIPLE/release/deps/this
    let built = own.ancestors().nth(2).expect("release").join("notices");
    let dir = case.dir().join("tools");
    fs::create_dir(&dir).expect("directory");
    fs::copy(built, dir.join("notices")).expect("the workload");
    dir
}

#[test]
fn watches_see_a_config_map_change() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let mut map = Published::make(&case.dir().join("config"));
    map.write(&[("key", "one")]);
    let mut config = pod.container("main", "exec /tools/notices /config");
    config.mounts = vec![
        volume(&notices(&case), "/tools", true),
        volume(map.dir(), "/config", true),
    ];
    let id = pod.run(config);
    let wait_for = |line: &str| {
        until(Duration::from_secs(60), line, || {
            pod.log("main")
                .iter()
                .any(|logged| logged.ends_with(line))
                .then_some(())
        });
    };
    wait_for("ready");
    // Another container of the pod has the same directory, and the same events do not end with it.
    let mut other = pod.container("other", "exec sleep 1000");
    other.mounts = vec![volume(map.dir(), "/other", true)];
    let other = pod.run(other);
    assert_eq!(node.said(&id, "cat /config/key"), "one");
    map.write(&[("key", "two")]);
    assert_eq!(node.said(&id, "sleep 1; cat /config/key"), "two");
    wait_for("delete ..1/");
    assert_eq!(node.said(&other, "cat /other/key"), "two");
    node.stop(&other, 0);
    node.remove(&other);
    map.write(&[("key", "three")]);
    assert_eq!(node.said(&id, "sleep 1; cat /config/key"), "three");
    wait_for("delete ..2/");
    let one = |old: u32| {
        let new = old + 1;
        [
            format!("create ..{new}/"),
            "create ..data_tmp".to_owned(),
            "moved-from ..data_tmp".to_owned(),
            "moved-to ..data".to_owned(),
            format!("delete ..{old}/"),
        ]
    };
    let lines = pod.log("main").into_iter().skip(1);
    let told: Vec<_> = lines
        .map(|line| line.replacen("stdout F ", "", 1))
        .collect();
    assert_eq!(told, [one(1), one(2)].concat());
    pod.end();
}

#[test]
fn an_empty_dir_in_memory_has_its_size_limit() {
    let case = begin_pods();
    let memory = Tmpfs::mount(&case.dir().join("memory"));
    let limited = Command::new("mount")
        .args(["-o", "remount,size=1m"])
        .arg(memory.dir())
        .status();
    assert!(limited.expect("mount").success());
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let ids = ["a", "b"].map(|name| {
        let mut config = pod.container(name, "exec sleep 1000");
        config.mounts = vec![volume(memory.dir(), "/memory", false)];
        pod.run(config)
    });
    node.said(&ids[0], "head -c 900000 /dev/zero > /memory/x");
    assert_eq!(node.said(&ids[1], "wc -c < /memory/x"), "900000");
    let more = node.exec_sync(&ids[1], "dd if=/dev/zero of=/memory/y bs=100k count=9", 60);
    let more = more.expect("ExecSync");
    assert_ne!(more.exit_code, 0);
    let stderr = String::from_utf8_lossy(&more.stderr);
    assert!(stderr.contains("No space left"), "{stderr}");
    pod.end();
    assert!(memory.dir().join("x").exists());
}

#[test]
fn a_volume_follows_what_the_host_mounts_in_it() {
    let case = begin_pods();
    let outer = Tmpfs::mount(&case.dir().join("outer"));
    let shared = Command::new("mount")
        .arg("--make-shared")
        .arg(outer.dir())
        .status();
    assert!(shared.expect("mount").success());
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let mut config = pod.container("main", "exec sleep 1000");
    let mut mount = volume(outer.dir(), "/outer", false);
    mount.set_propagation(MountPropagation::PropagationHostToContainer);
    config.mounts = vec![mount];
    let id = pod.run(config);
    {
        let inner = Tmpfs::mount(&outer.dir().join("inner"));
        fs::write(inner.dir().join("x"), "mounted later").expect("file");
        assert_eq!(node.said(&id, "cat /outer/inner/x"), "mounted later");
    }
    assert_eq!(node.said(&id, "ls /outer/inner"), "");
    pod.end();
}
