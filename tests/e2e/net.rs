//! Network namespaces with interfaces in them, as engines and CNI plugins make them, for the tests of the network.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use caisson_tests::{Bundle, Case};
use serde_json::{Value, json};

const ECHO: &str = env!("CARGO_BIN_EXE_net-echo");

/// A network namespace of the host's, and interfaces of the test's own.
pub(crate) struct Net<'a> {
    case: &'a Case,
    pub(crate) file: PathBuf,
    /// On the host's side: gone at the end.
    pub(crate) interfaces: Vec<String>,
}

impl<'a> Net<'a> {
    pub(crate) fn new(case: &'a Case, name: &str) -> Self {
        let file = case.dir().join(name);
        std::fs::write(&file, "").expect("file");
        let unshare = format!("unshare --net={} true", file.display());
        sh(case, &unshare);
        let net = Self {
            case,
            file,
            interfaces: Vec::new(),
        };
        net.inside("ip link set lo up");
        net
    }

    /// Runs a script in the namespace.
    pub(crate) fn inside(&self, script: &str) -> String {
        sh(
            self.case,
            &format!("nsenter --net={} sh -ec '{script}'", self.file.display()),
        )
    }

    /// A pair of interfaces: `outer` on the host, `inner` in the namespace, both up.
    pub(crate) fn veth(&mut self, outer: &str, inner: &str) {
        let file = self.file.display();
        sh(
            self.case,
            &format!(
                "ip link add {outer} type veth peer name {inner} netns {file}; ip link set {outer} up"
            ),
        );
        self.inside(&format!("ip link set {inner} up"));
        self.interfaces.push(outer.to_owned());
    }

    /// The usual one: `outer` has 10.77.N.1 and fd77:N::1, `inner` 10.77.N.2 and fd77:N::2 and default routes.
    pub(crate) fn connected(&mut self, outer: &str, inner: &str, n: u8) {
        self.veth(outer, inner);
        sh(
            self.case,
            &format!(
                "ip addr add 10.77.{n}.1/24 dev {outer}; ip addr add fd77:{n}::1/64 dev {outer} nodad"
            ),
        );
        self.inside(&format!(
            "ip addr add 10.77.{n}.2/24 dev {inner}; ip addr add fd77:{n}::2/64 dev {inner} nodad; \
             ip route append default via 10.77.{n}.1 metric {n}; ip route append default via fd77:{n}::1 metric {n}"
        ));
    }

    /// A bundle whose container has this namespace, and may do with it what it likes.
    pub(crate) fn bundle(&self, bundle: Bundle) -> Bundle {
        let path = self.file.clone();
        bundle.edit(|spec| {
            network_namespace(spec)["path"] = json!(path);
            administer(spec);
        })
    }

    /// What `ip -j ARGS` says here, in the order and to the degree that both sides must agree on.
    pub(crate) fn listed(&self, args: &str) -> Vec<Value> {
        comparable(&self.inside(&format!("ip -j {args}")))
    }
}

impl Drop for Net<'_> {
    fn drop(&mut self) {
        for interface in &self.interfaces {
            self.case
                .program("ip")
                .args(["link", "del", interface])
                .finish();
        }
        self.case.program("umount").args([&self.file]).finish();
    }
}

pub(crate) fn network_namespace(spec: &mut Value) -> &mut Value {
    let all = spec["linux"]["namespaces"].as_array_mut();
    let network = all.and_then(|all| all.iter_mut().find(|one| one["type"] == "network"));
    network.expect("a network namespace")
}

pub(crate) fn administer(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut();
        set.expect("capabilities")
            .extend([json!("CAP_NET_ADMIN"), json!("CAP_NET_RAW")]);
    }
}

/// Loads the host's module before a case looks at the host, which keeps its device.
pub(crate) fn load_vhost_net() {
    let status = std::process::Command::new("modprobe")
        .arg("vhost_net")
        .status();
    assert!(status.is_ok_and(|status| status.success()), "no vhost_net");
}

#[track_caller]
pub(crate) fn sh(case: &Case, script: &str) -> String {
    let outcome = case.program("sh").args(["-ec", script]).succeed();
    outcome.text().to_owned()
}

/// The output of `ip -j`, without what is the host's own business.
pub(crate) fn comparable(text: &str) -> Vec<Value> {
    let mut all: Vec<Value> = serde_json::from_str(text).unwrap_or_default();
    let is_tap = |one: &Value| {
        one["ifname"]
            .as_str()
            .is_some_and(|name| name.starts_with("caisson"))
    };
    all.retain(|one| one["protocol"] != "kernel" && one != &json!({}) && !is_tap(one));
    for one in &mut all {
        let Some(fields) = one.as_object_mut() else {
            continue;
        };
        // Queues and peers differ; a duplicate of an address is looked for once.
        for private in [
            "qdisc",
            "link_index",
            "link",
            "link_netnsid",
            "txqlen",
            "group",
            "flags",
            "operstate",
        ] {
            fields.remove(private);
        }
        for address in fields
            .get_mut("addr_info")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            let address = address.as_object_mut().expect("an address");
            address.retain(|key, _| {
                [
                    "family",
                    "local",
                    "prefixlen",
                    "scope",
                    "label",
                    "broadcast",
                ]
                .contains(&&**key)
            });
        }
    }
    all.sort_by_key(Value::to_string);
    all
}

/// Bytes there and back over TCP, and a datagram over UDP.
#[track_caller]
pub(crate) fn echoes(address: &str, bytes: usize) {
    let mut stream = TcpStream::connect((address, 7)).expect(address);
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("timeout");
    let sent: Vec<u8> = (0..251).cycle().take(bytes).collect();
    let mut writer = stream.try_clone().expect("clone");
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).expect("write");
        writer.shutdown(Shutdown::Write).expect("shutdown");
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("read");
    writing.join().expect("writer");
    assert!(
        back == sent,
        "{} of {bytes} bytes came back from {address}",
        back.len()
    );

    let any = if address.contains(':') {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    let socket = UdpSocket::bind(any).expect("bind");
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("timeout");
    let datagram = vec![7; 1200];
    socket.send_to(&datagram, (address, 7)).expect("send");
    let mut back = vec![0; 2000];
    let len = socket.recv(&mut back).expect("no datagram came back");
    assert_eq!(back[..len], datagram);
}

/// Starts a container that sends everything back, and waits until it listens.
pub(crate) fn start_echo(case: &Case, bundle: Bundle, id: &str) {
    let ready = bundle.rootfs("ready");
    let bundle = bundle.program(ECHO).script("net-echo 7 > /ready");
    case.start(&bundle, id);
    until("the container listens", || {
        std::fs::read_to_string(&ready).is_ok_and(|text| text.contains("ready"))
    });
}

#[track_caller]
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..200 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("it never came true that {what}");
}
