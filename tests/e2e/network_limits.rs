//! What the host's configuration lets through between a container and its network: source addresses, bytes and packets.
//!
//! All of it holds on the host, whatever the guest does, and whoever moves the packets (`vhost_net`).

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use caisson_tests::Case;
use serde_json::json;

use crate::net::{Net, echoes, load_vhost_net, sh, start_echo, until};

const ONLY_WITH_VM: &str = "runc has no configuration of its own";
/// Both ways of moving packets.
const BOTH: [&str; 2] = ["vhost_net = false\n", "vhost_net = true\n"];
const MIB: usize = 1 << 20;

/// The addresses that a bridge has seen frames from.
fn seen_by_bridge(case: &Case) -> String {
    sh(case, "bridge fdb show br ctbr")
}

#[test]
fn nothing_leaves_from_another_mac_address() {
    load_vhost_net();
    let Some(case) = Case::begin_with_vm(ONLY_WITH_VM) else {
        return;
    };
    sh(
        &case,
        "ip link add ctbr type bridge; ip link set ctbr up; ip addr add 10.76.0.1/24 dev ctbr",
    );
    let mut net = Net::new(&case, "ns");
    net.veth("ct0", "eth0");
    net.interfaces.push("ctbr".to_owned());
    sh(&case, "ip link set ct0 master ctbr");
    net.inside("ip addr add 10.76.0.2/24 dev eth0");
    let own = net.inside("ip -o link show eth0 | sed \"s/.*ether \\([^ ]*\\) .*/\\1/\"");
    let ping = || {
        let script = "ping -c 1 -w 3 10.76.0.1";
        case.exec("one", script).status == 0
    };
    let take = |address: &str| {
        let outcome = case.exec("one", &format!("ip link set eth0 address {address}"));
        assert_eq!(outcome.status, 0, "{outcome:?}");
    };
    let bundle = net.bundle(case.bundle()).args(["sleep", "1000"]);
    for vhost in BOTH {
        // Without the filter a guest may call itself what it likes.
        case.configure(vhost);
        case.start(&bundle, "one");
        take("02:00:00:00:00:66");
        assert!(ping(), "{vhost}");
        assert!(seen_by_bridge(&case).contains("02:00:00:00:00:66"));
        case.delete("one");

        case.configure(&format!("network_source_mac_filter = true\n{vhost}"));
        case.start(&bundle, "one");
        assert!(ping(), "{vhost}");
        take("02:00:00:00:00:77");
        assert!(!ping(), "{vhost}");
        let seen = seen_by_bridge(&case);
        assert!(!seen.contains("02:00:00:00:00:77"), "{seen}");
        take(own.trim());
        assert!(ping(), "{vhost}");
        // The host gives the interface another address: the guest follows, and so does the filter.
        net.inside("ip link set eth0 address 02:00:00:00:00:88");
        until("the guest has the new address", || {
            let outcome = case.exec("one", "cat /sys/class/net/eth0/address");
            outcome.text().trim() == "02:00:00:00:00:88"
        });
        assert!(ping(), "{vhost}");
        take(own.trim());
        assert!(!ping(), "{vhost}");
        case.delete("one");
        net.inside(&format!("ip link set eth0 address {own}"));
    }
}

#[test]
fn bytes_take_the_time_that_their_rate_gives_them() {
    load_vhost_net();
    let Some(case) = Case::begin_with_vm(ONLY_WITH_VM) else {
        return;
    };
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    let there_and_back = |name: &str| {
        start_echo(&case, net.bundle(case.bundle_in(name)), "one");
        let start = Instant::now();
        echoes("10.77.1.2", MIB);
        let took = start.elapsed();
        let queues = net.inside("tc -s qdisc show | grep -A 2 tbf || true");
        case.delete("one");
        (took, queues)
    };
    let (free, queues) = there_and_back("free");
    assert_eq!(queues, "");
    // A MiB less a burst at a quarter of a MiB a second.
    let least = Duration::from_millis(3700);
    for (number, vhost) in BOTH.into_iter().enumerate() {
        for direction in ["rx", "tx"] {
            case.configure(&format!(
                "network_{direction}_bytes_per_second = {}\nnetwork_{direction}_burst_bytes = 65536\n{vhost}",
                MIB / 4
            ));
            let (took, queues) = there_and_back(&format!("{direction}{number}"));
            let context = format!("{direction}, {vhost}: {took:?}, {queues}");
            assert!(took >= least, "{context}");
            assert!(!queues.contains(" overlimits 0 "), "{context}");
            // What waits is not lost: TCP gets what there is.
            assert!(took < 4 * least + free, "{context}");
        }
    }
}

/// How many of a volley of datagrams come back.
fn answered(count: u32) -> usize {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
    let to: SocketAddr = "10.77.1.2:7".parse().expect("address");
    // The first finds the neighbour.
    socket
        .set_read_timeout(Some(Duration::from_secs(2)))
        .expect("timeout");
    let mut byte = [0];
    socket.send_to(b"?", to).expect("send");
    socket.recv(&mut byte).expect("no answer at all");
    for _ in 0..count {
        socket.send_to(b"!", to).expect("send");
    }
    std::iter::from_fn(|| socket.recv(&mut byte).ok()).count()
}

#[test]
fn packets_beyond_their_rate_are_dropped() {
    let Some(case) = Case::begin_with_vm(ONLY_WITH_VM) else {
        return;
    };
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    let volley = |name: &str, lines: &str| {
        case.configure(lines);
        start_echo(&case, net.bundle(case.bundle_in(name)), "one");
        let answered = answered(150);
        case.delete("one");
        answered
    };
    assert!(volley("free", "") > 100);
    for direction in ["rx", "tx"] {
        let line = format!("network_{direction}_packets_per_second = 10\n");
        // 16 at once, and ten in each of the few seconds.
        let answered = volley(direction, &line);
        assert!((1..=60).contains(&answered), "{direction}: {answered}");
    }
}

#[test]
fn an_annotation_limits_a_container_where_the_host_allows_it() {
    let Some(case) = Case::begin_with_vm(ONLY_WITH_VM) else {
        return;
    };
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    let bundle = net.bundle(case.bundle()).edit(|spec| {
        spec["annotations"] = json!({"io.caisson.network_tx_bytes_per_second": "1000000"});
    });
    let bundle = bundle.args(["sleep", "1000"]);
    let refused = case.run_call(&bundle, "one").finish();
    assert_ne!(refused.status, 0);
    let wanted = "annotation io.caisson.network_tx_bytes_per_second is not allowed here";
    assert!(refused.stderr.contains(wanted), "{}", refused.stderr);
    case.configure("allowed_annotations = [\"network_tx_bytes_per_second\"]\n");
    case.start(&bundle, "one");
    let queue = net.inside("tc qdisc show dev eth0 root");
    assert!(queue.contains("tbf") && queue.contains("8Mbit"), "{queue}");
    case.delete("one");
    assert!(!net.inside("tc qdisc show dev eth0 root").contains("tbf"));
}
