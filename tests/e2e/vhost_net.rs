//! Packets that the host's kernel moves (`vhost_net`).

use caisson_tests::Case;
use caisson_tests::case::processes_named;

use crate::net::{Net, echoes, load_vhost_net, sh, start_echo, until};

/// The VMM's threads that are the kernel's workers.
fn workers() -> usize {
    let Some(vmm) = processes_named("caisson-vmm").pop() else {
        return 0;
    };
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.pid)).expect("tasks");
    let is_worker = |task: std::io::Result<std::fs::DirEntry>| {
        let name = task.and_then(|task| std::fs::read_to_string(task.path().join("comm")));
        name.is_ok_and(|name| name.starts_with("vhost-"))
    };
    tasks.map(is_worker).filter(|is| *is).count()
}

/// Has the machine grow, and fetches a file in the memory that came with that, which is sent from where it is.
fn sends_from_memory_that_came_later(case: &Case) {
    let more = ["update", "--memory", "600m", "--memory-swap", "600m", "one"];
    case.call(more).succeed();
    let script =
        "head -c 3000000 /dev/urandom > /dev/shm/x; httpd -p 80 -h /dev/shm; md5sum < /dev/shm/x";
    let made = case.exec("one", script);
    let fetched = sh(case, "busybox wget -q -O - http://10.77.1.2/x | md5sum");
    assert_eq!(
        (made.text(), made.status),
        (&*fetched, 0),
        "{}",
        made.stderr
    );
}

#[test]
fn the_kernel_moves_packets_of_interfaces_there_and_plugged_in_later() {
    load_vhost_net();
    let Some(case) = Case::begin_with_vm("runc has no virtual interfaces") else {
        return;
    };
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    case.configure("vhost_net = true\n");
    start_echo(&case, net.bundle(case.bundle()), "one");
    assert_eq!(workers(), 1);
    echoes("10.77.1.2", 3 << 20);
    echoes("fd77:1::2", 1 << 20);

    net.connected("ct1", "net1", 2);
    until("the second interface has a worker", || workers() == 2);
    until("it answers", || {
        sh(
            &case,
            "ping -c 1 -w 2 10.77.2.2 >/dev/null && echo yes || true",
        ) == "yes\n"
    });
    echoes("10.77.2.2", 1 << 20);
    sh(&case, "ip link del ct1");
    until("its worker is gone", || workers() == 1);
    echoes("10.77.1.2", 1 << 16);
    sends_from_memory_that_came_later(&case);
    case.delete("one");

    case.configure("vhost_net = false\n");
    start_echo(&case, net.bundle(case.bundle_in("own")), "two");
    assert_eq!(workers(), 0);
    echoes("10.77.1.2", 1 << 16);
    case.delete("two");
}

#[test]
fn without_the_device_the_vmm_moves_packets() {
    let Some(case) = Case::begin_with_vm("runc has no virtual interfaces") else {
        return;
    };
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    case.configure("vhost_net = true\n");
    let ready = case.dir().join("own/rootfs/ready");
    let bundle = net.bundle(case.bundle_in("own"));
    let bundle = bundle.program(env!("CARGO_BIN_EXE_net-echo"));
    let bundle = bundle.script("net-echo 7 > /ready");
    // The device is hidden from the runtime alone.
    let hide = "mount -t tmpfs none /mnt && touch /mnt/vhost-net; rm -f /mnt/vhost-net; \
        for node in kvm null zero full random urandom tty ptmx fuse; do \
        test -e /dev/$node && touch /mnt/$node && mount --bind /dev/$node /mnt/$node; done; \
        mkdir /mnt/net /mnt/pts /mnt/shm; mount --rbind /dev/net /mnt/net; mount --rbind /dev/pts /mnt/pts; \
        mount --move /mnt /dev; exec \"$@\"";
    let call = case.program("unshare");
    let call = call.args(["--mount", "sh", "-ec", hide, "sh", "caisson", "--root"]);
    let call = call.args([case.root()]).args(["run", "--detach", "-b"]);
    call.args([bundle.dir()]).args(["one"]).succeed();
    until("the container listens", || {
        std::fs::read_to_string(&ready).is_ok_and(|text| text.contains("ready"))
    });
    assert_eq!(workers(), 0);
    echoes("10.77.1.2", 1 << 16);
    case.delete("one");
}
