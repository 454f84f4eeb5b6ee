//! A container's network: the interfaces of its namespace on the host, with all that belongs to them, and packets
//! through them.
//!
//! Each test has a namespace of its own, named by a file in the test's directory, and pairs of veth interfaces into it:
//! what engines and CNI plugins make. What a container sees is compared with what the namespace on the host says.

use std::path::Path;

use caisson_tests::{Case, case};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::net::{Net, administer, comparable, echoes, sh, start_echo, until};

/// What guest and VMM agree on for a network device, by the numbers of virtio's specification.
const OFFLOADS: &[(usize, &str)] = &[
    (0, "checksums of what leaves"),
    (1, "checksums of what arrives"),
    (7, "segmentation of what arrives by TCP over IPv4"),
    (8, "segmentation of what arrives by TCP over IPv6"),
    (11, "segmentation of what leaves by TCP over IPv4"),
    (12, "segmentation of what leaves by TCP over IPv6"),
    (15, "mergeable buffers"),
    (29, "event indexes"),
];

#[test]
fn interfaces_appear_with_everything_that_belongs_to_them() {
    let case = Case::begin();
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    net.connected("ct1", "net1", 2);
    net.inside(
        "ip link set eth0 mtu 1400; ip link set net1 mtu 9000; \
         ip addr add 10.99.0.1/32 dev lo; ip addr add 10.78.0.9/28 dev eth0 label eth0:1; \
         ip route add 10.80.0.0/16 via 10.77.2.77 dev net1; ip route add blackhole 10.81.0.0/16; \
         ip route add default via 10.77.2.1 table 100; ip rule add from 10.77.2.2 table 100 priority 50; \
         ip -6 route add fd80::/32 via fd77:2::99; ip -6 rule add to fd81::/32 table 100 priority 51; \
         ip neigh add 10.77.1.50 lladdr 02:00:00:00:00:50 dev eth0 nud permanent; \
         ip neigh add fd77:2::50 lladdr 02:00:00:00:00:51 dev net1 nud permanent",
    );
    let bundle = net.bundle(case.debian()).args(["sleep", "1000"]);
    let questions = [
        "addr",
        "-4 route show table all",
        "-6 route show table all",
        "-4 rule",
        "-6 rule",
        "neigh show nud permanent",
    ];
    let on_host = questions.map(|question| net.listed(question));
    case.start(&bundle, "one");
    for (question, wanted) in questions.into_iter().zip(on_host) {
        let outcome = case.exec("one", &format!("ip -j {question}"));
        assert_eq!(outcome.status, 0, "{outcome:?}");
        assert_eq!(comparable(outcome.text()), wanted, "ip {question}");
    }
    if case::runtime() == "caisson" {
        let seen = case.exec("one", "cat /sys/class/net/eth0/device/features");
        let has = |feature: usize| seen.text().as_bytes().get(feature) == Some(&b'1');
        for (feature, name) in OFFLOADS {
            assert!(has(*feature), "no {name}: {seen:?}");
        }
    }
    case.delete("one");
    assert_eq!(
        net.inside("tc qdisc show | grep -c -e ingress -e clsact || true"),
        "0\n"
    );
    assert_eq!(net.inside("ip link show | grep -c caisson || true"), "0\n");
}

#[test]
fn packets_of_every_size_go_both_ways() {
    let case = Case::begin();
    for (n, mtu) in [(1, 1500), (2, 9000), (3, 1400)] {
        let mut net = Net::new(&case, &format!("ns{n}"));
        net.connected("ct0", "eth0", n);
        sh(&case, &format!("ip link set ct0 mtu {mtu}"));
        net.inside(&format!("ip link set eth0 mtu {mtu}"));
        start_echo(&case, net.bundle(case.bundle_in(&format!("b{n}"))), "one");
        echoes(&format!("10.77.{n}.2"), 3 << 20);
        echoes(&format!("fd77:{n}::2"), 1 << 20);
        let size = mtu - 28;
        let ping = format!("ping -c 2 -s {size} 10.77.{n}.1");
        let outcome = case.exec("one", &ping);
        assert_eq!(outcome.status, 0, "{ping}: {outcome:?}");
        if case::runtime() == "caisson" {
            let metrics = case.call(["metrics"]).succeed();
            for direction in ["receive", "transmit"] {
                let bytes = passed(metrics.text(), direction);
                assert!(bytes > 4 << 20, "{direction}: {}", metrics.text());
            }
        }
        case.delete("one");
    }
}

/// The bytes that have passed the container's interface.
fn passed(metrics: &str, direction: &str) -> u64 {
    let series = format!(
        "caisson_network_{direction}_bytes_total{{container=\"one\",interface=\"eth0\",side=\"host\"}} "
    );
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no {series} in {metrics}"))
}

#[test]
fn what_changes_on_the_host_follows() {
    let case = Case::begin();
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    let bundle = net.bundle(case.debian()).args(["sleep", "1000"]);
    case.create(&bundle, "one");
    // As engines do between create and start.
    net.connected("ct1", "net1", 2);
    case.call(["start", "one"]).succeed();
    let seen = |question: &str| comparable(case.exec("one", &format!("ip -j {question}")).text());
    let agree = |question: &str| {
        until(&format!("ip {question} agrees"), || {
            seen(question) == net.listed(question)
        });
    };
    assert_eq!(seen("addr"), net.listed("addr"), "at start");
    assert_eq!(seen("route"), net.listed("route"), "at start");

    net.inside("ip addr add 10.77.1.7/24 dev eth0; ip addr del 10.77.2.2/24 dev net1");
    agree("addr");
    net.inside("ip route add 10.90.0.0/16 via 10.77.1.1; ip link set eth0 mtu 1300");
    agree("route");
    agree("addr");
    net.inside("ip link set net1 down; ip link set net1 name lan0; ip link set lan0 up");
    agree("addr");
    sh(&case, "ip link del ct1");
    agree("addr");
    let mut net = net;
    net.connected("ct2", "late0", 3);
    until("the late interface is there", || {
        comparable(case.exec("one", "ip -j addr").text()) == net.listed("addr")
    });
    let ping = case.exec(
        "one",
        "ping -c 1 -w 20 10.77.3.1 || busybox ping -c 1 -w 20 10.77.3.1",
    );
    assert_eq!(ping.status, 0, "{ping:?}");
    case.delete("one");
}

#[test]
fn a_hook_moves_an_interface_in() {
    let case = Case::begin();
    let script = case.dir().join("hook.sh");
    std::fs::write(
        &script,
        "#!/bin/bash -e\npid=$(jq .pid)\nip link add ct0 type veth peer name eth0 netns $pid\n\
         ip link set ct0 up\nip addr add 10.77.1.1/24 dev ct0\n\
         nsenter -t $pid -n sh -ec 'ip addr add 10.77.1.2/24 dev eth0; ip link set eth0 up'\n",
    )
    .expect("hook");
    let path = std::env::var("PATH").unwrap_or_default();
    for list in ["prestart", "createRuntime"] {
        let bundle = case.bundle_in(list).edit(|spec| {
            administer(spec);
            spec["hooks"] = json!({list: [
                {"path": "/bin/bash", "args": ["bash", script], "env": [format!("PATH={path}")]},
            ]});
        });
        start_echo(&case, bundle, "one");
        echoes("10.77.1.2", 1 << 16);
        case.delete("one");
        until("the interface is gone", || {
            !Path::new("/sys/class/net/ct0").exists()
        });
    }
}

#[test]
fn containers_on_a_bridge_reach_each_other() {
    let case = Case::begin();
    sh(
        &case,
        "ip link add ctbr type bridge; ip link set ctbr up; ip addr add 10.76.0.1/24 dev ctbr",
    );
    let nets = ["left", "right"].map(|name| Net::new(&case, name));
    let mut nets = nets.into_iter().zip(2..).map(|(mut net, n)| {
        net.veth(&format!("ct{n}"), "eth0");
        sh(&case, &format!("ip link set ct{n} master ctbr"));
        net.inside(&format!("ip addr add 10.76.0.{n}/24 dev eth0"));
        net
    });
    let (mut left, right) = (nets.next().expect("left"), nets.next().expect("right"));
    left.interfaces.push("ctbr".to_owned());
    start_echo(&case, left.bundle(case.bundle_in("bl")), "left");
    start_echo(&case, right.bundle(case.bundle_in("br")), "right");
    for (id, other) in [("left", 3), ("right", 2)] {
        let script =
            format!("ping -c 1 -w 20 10.76.0.{other}; echo hello | nc -w 20 10.76.0.{other} 7");
        let outcome = case.exec(id, &script);
        assert!(outcome.text().ends_with("hello\n"), "{outcome:?}");
    }
    echoes("10.76.0.2", 1 << 20);
    case.delete("left");
    case.delete("right");
}

#[test]
fn every_kind_of_ethernet_works() {
    let case = Case::begin();
    let mut net = Net::new(&case, "ns");
    // By default the module makes an interface of its own.
    sh(&case, "modprobe dummy numdummies=0");
    // The lower interface is the host's; its peer stands for the rest of the network.
    let mut far = Net::new(&case, "far");
    far.veth("ctlow", "far0");
    far.inside("ip addr add 10.75.0.1/24 dev far0");
    let file = net.file.display().to_string();
    for (kind, n) in [("macvlan mode bridge", 2), ("ipvlan mode l2", 3)] {
        sh(
            &case,
            &format!(
                "ip link add link ctlow name ctnew type {kind}; ip link set ctnew netns {file} name eth{n}"
            ),
        );
        net.inside(&format!(
            "ip link set eth{n} up; ip addr add 10.75.0.{n}/24 dev eth{n}"
        ));
        let bundle = net.bundle(case.bundle_in(&format!("b{n}")));
        start_echo(&case, bundle, "one");
        let ping = far.inside(&format!("ping -c 2 -w 20 10.75.0.{n}"));
        assert!(
            ping.contains("2 packets received") || ping.contains("2 received"),
            "{kind}: {ping}"
        );
        case.delete("one");
        net.inside(&format!("ip link del eth{n}"));
    }
    net.inside("ip link add dum0 type dummy; ip addr add 10.74.0.1/24 dev dum0; ip link set dum0 up; ip tuntap add tap7 mode tap; ip link set tap7 up");
    let outcome = case.run(
        &net.bundle(case.bundle_in("bd"))
            .script("cat /sys/class/net/dum0/mtu; cat /sys/class/net/tap7/address"),
    );
    let tap = net.inside("ip -o link show tap7 | sed s/.*ether.// | cut -d\" \" -f1");
    assert_eq!(outcome.text(), format!("1500\n{tap}"));
    net.veth("ct9", "eth9");
}

#[test]
fn a_namespace_of_its_own_has_loopback_only() {
    let case = Case::begin();
    let bundle = case.bundle().script(
        "cat /proc/net/dev | tail -n +3 | cut -d: -f1; ping -c 1 127.0.0.1 > /dev/null && echo up",
    );
    let bundle = bundle.edit(administer);
    let outcome = case.run(&bundle);
    let words: Vec<&str> = outcome.text().split_whitespace().collect();
    assert_eq!(words, ["lo", "up"], "{outcome:?}");
    // And whoever looks for it at the pid finds a namespace that is not the host's.
    case.start(&case.bundle_in("b2").args(["sleep", "1000"]), "one");
    let link = format!("/proc/{}/ns/net", case.pid("one").as_raw_nonzero());
    let own = std::fs::read_link("/proc/self/ns/net").expect("own namespace");
    assert_ne!(std::fs::read_link(link).expect("namespace"), own);
    case.delete("one");
}

#[test]
fn whoever_is_killed_the_namespace_is_clean_after_delete() {
    let Some(case) = Case::begin_with_vm("runc puts nothing into the namespace") else {
        return;
    };
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    let clean = |context: &str| {
        let left = net.inside("ip -o link show | cut -d: -f2 | cut -d@ -f1; tc qdisc show dev eth0; tc filter show dev eth0 ingress 2>&1 || true");
        assert_eq!(
            left, " lo\n eth0\nqdisc noqueue 0: root refcnt 2 \n",
            "{context}"
        );
    };
    let bundle = net.bundle(case.bundle()).args(["sleep", "1000"]);
    clean("before");
    case.configure("network_tx_bytes_per_second = 1000000\nnetwork_source_mac_filter = true\n");
    for victim in ["caisson", "caisson-vmm"] {
        case.start(&bundle, "one");
        let processes = caisson_tests::case::processes_named(victim);
        let pid = processes
            .first()
            .map(|process| process.pid)
            .expect("a victim");
        kill_process(
            rustix::process::Pid::from_raw(pid).expect("pid"),
            Signal::KILL,
        )
        .expect("kill");
        case.wait("one");
        case.delete("one");
        clean(victim);
    }
    // And a container that fails on the way.
    let bundle = bundle.args(["/nonexistent"]);
    case.run_call(&bundle, "two").finish();
    clean("a program that does not exist");
}

#[test]
fn two_machines_cannot_share_interfaces() {
    let Some(case) = Case::begin_with_vm("with runc two containers can share a namespace") else {
        return;
    };
    let mut net = Net::new(&case, "ns");
    net.connected("ct0", "eth0", 1);
    start_echo(&case, net.bundle(case.bundle()), "one");
    let outcome = case
        .run_call(&net.bundle(case.bundle_in("b2")), "two")
        .finish();
    assert_ne!(outcome.status, 0);
    assert!(
        outcome.stderr.contains("is another container's"),
        "{}",
        outcome.stderr
    );
    echoes("10.77.1.2", 1 << 12);
    case.delete("one");
}
