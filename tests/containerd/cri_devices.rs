//! What a pod has of the node beside files and a network: block devices (`volumeDevices`), huge pages.

use std::path::Path;

use caisson_tests::{HugePages, Loop, case};
use k8s_cri::v1::{ContainerConfig, Device, HugepageLimit, LinuxContainerResources};

use crate::kubelet::{Kubelet, Pod, begin_pods, volume};

/// A container that sleeps, with a block device at `/dev/xvda`.
fn with_disk(pod: &Pod<'_>, name: &str, disk: &Loop) -> String {
    let mut config = pod.container(name, "exec sleep 1000");
    config.devices = vec![Device {
        container_path: "/dev/xvda".to_owned(),
        host_path: disk.device().to_string_lossy().into_owned(),
        permissions: "mrw".to_owned(),
    }];
    pod.run(config)
}

#[test]
fn each_container_has_its_own_block_device() {
    let case = begin_pods();
    let disks = ["one", "two"].map(|name| Loop::attach(&case, name));
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let ids = [0, 1].map(|n| with_disk(&pod, ["a", "b"][n], &disks[n]));
    for (id, text) in ids.iter().zip(["first", "other"]) {
        let write = format!("printf {text} | dd of=/dev/xvda bs=512 seek=2 conv=fsync");
        node.said(id, &write);
    }
    assert_eq!(
        disks.each_ref().map(|disk| disk.text(1024)),
        ["first", "other"]
    );
    let read = "dd if=/dev/xvda bs=512 skip=2 count=1 2>/dev/null | head -c 5";
    assert_eq!(node.said(&ids[1], read), "other");
    node.stop(&ids[0], 0);
    node.remove(&ids[0]);
    // Detaching would wait for whoever has it open.
    let detach = case.program("losetup").args(["-d"]);
    detach.args([disks[0].device()]).succeed();
    assert!(!disks[0].is_in_use());
    assert_eq!(node.said(&ids[1], read), "other");
    // One that comes later has what an earlier one of the pod has.
    let late = with_disk(&pod, "c", &disks[1]);
    assert_eq!(node.said(&late, read), "other");
    pod.end();
}

/// A container that sleeps, with a volume of huge pages and a limit of them, as the kubelet says it.
fn with_pages(pod: &Pod<'_>, name: &str, pages: &Path, mib: u64) -> ContainerConfig {
    let mut config = pod.container(name, "exec sleep 1000");
    config.mounts = vec![volume(pages, "/huge", false)];
    let limit = HugepageLimit {
        page_size: "2MB".to_owned(),
        limit: mib << 20,
    };
    config.linux.as_mut().expect("linux").resources = Some(LinuxContainerResources {
        hugepage_limits: vec![limit],
        ..Default::default()
    });
    config
}

#[test]
fn a_volume_of_huge_pages_is_shared_and_limited() {
    let case = begin_pods();
    let pages = HugePages::mount(&case.dir().join("pages"), 64);
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let [a, b] =
        [("a", 64), ("b", 4)].map(|(name, mib)| pod.run(with_pages(&pod, name, pages.dir(), mib)));
    node.said(&a, "fallocate -l 32m /huge/a");
    assert_eq!(node.said(&b, "stat -c %s /huge/a"), (32 << 20).to_string());
    // There are more, for the other one.
    node.said(&b, "fallocate -l 4m /huge/b && ! fallocate -l 2m /huge/c");
    assert_eq!(node.said(&a, "head -c 2097153 /huge/b | wc -c"), "2097153");
    if case::runtime() == "caisson" {
        let total = "grep HugePages_Total /proc/meminfo | tr -dc 0-9";
        assert_eq!(node.said(&b, total), "34");
        node.said(&a, "rm /huge/a");
        node.stop(&a, 0);
        node.remove(&a);
        assert_eq!(node.said(&b, total), "2");
        let more = with_pages(&pod, "more", pages.dir(), 1 << 16);
        let refused = pod.try_run(more).expect_err("64 GiB of pages");
        assert!(
            refused.message().contains("reserve huge pages"),
            "{refused}"
        );
    }
    pod.end();
}
