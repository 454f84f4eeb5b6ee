//! What packets cost: TCP between the host and a container on a veth, with runc, caisson and QEMU's microvm.
//!
//! One pair of interfaces serves all subjects in turn. QEMU gets a tap that is joined to it as caisson's are (tc
//! redirection), caisson's guest kernel, and the same server as its PID 1; the server is `net-cost`.
//! Each figure is that of a second pass: the first finds neighbours, sizes windows and fills caches.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use caisson_tests::ruler::{Trace, now};
use serde_json::json;

use crate::subject::{Place, Subject, program_on_path};

const NAMESPACE: &str = "caisson-bench";
const ADDRESS: &str = "10.79.0.2:7777";
/// Bytes each way.
const BYTES: u64 = 16 << 20;
const ROUND_TRIPS: u64 = 500;
/// The name of the container.
const ID: &str = "network";

/// What serves.
#[derive(Debug, Clone, Copy)]
enum Server {
    Runc,
    Caisson { vhost: bool },
    Microvm { vhost: bool },
}

const SERVERS: [(&str, Server); 5] = [
    ("runc", Server::Runc),
    ("caisson", Server::Caisson { vhost: false }),
    ("caisson, vhost_net", Server::Caisson { vhost: true }),
    ("QEMU microvm", Server::Microvm { vhost: false }),
    ("QEMU microvm, vhost=on", Server::Microvm { vhost: true }),
];

/// A kind of traffic: what the server is asked for, and how often.
const TRAFFIC: [(u8, u64); 3] = [(b'r', BYTES), (b's', BYTES), (b'e', ROUND_TRIPS)];

/// Prints the table.
pub(crate) fn report(place: &Place, trace: &Trace) -> io::Result<()> {
    sh("modprobe vhost_net")?;
    let program = program_on_path("net-cost")?;
    fs::copy(program, place.dir.join("bundle/rootfs/bin/net-cost"))?;
    sh(&format!(
        "ip netns add {NAMESPACE}; \
         ip link add bench0 type veth peer name eth0 netns {NAMESPACE}; \
         ip addr add 10.79.0.1/24 dev bench0; ip link set bench0 up; \
         ip -n {NAMESPACE} addr add 10.79.0.2/24 dev eth0; ip -n {NAMESPACE} link set eth0 up"
    ))?;
    let result = rows(place, trace);
    sh(&format!("ip link del bench0; ip netns del {NAMESPACE}"))?;
    place.edit(|spec| network_path(spec, None))?;
    place.configure("")?;
    result
}

fn rows(place: &Place, trace: &Trace) -> io::Result<()> {
    println!(
        "\n| TCP between host and container | to it: instructions per byte | exits per MiB | from it | exits per MiB | \
         round trip: thousand instructions | exits |\n|---|---|---|---|---|---|---|"
    );
    for (name, server) in SERVERS {
        let running = server.start(place)?;
        let figures = measure(trace);
        running.stop(place)?;
        match figures {
            Ok(figures) => println!("| {name} | {} |", figures.join(" | ")),
            Err(error) => println!("| {name} | failed: {error} | | | | | |"),
        }
    }
    Ok(())
}

/// Cost and exits of each kind of traffic.
fn measure(trace: &Trace) -> io::Result<Vec<String>> {
    let mut stream = connect()?;
    for (kind, count) in TRAFFIC {
        exchange(&mut stream, kind, count)?;
    }
    let mut figures = Vec::new();
    for (kind, count) in TRAFFIC {
        let start = now();
        exchange(&mut stream, kind, count)?;
        let cost = now() - start;
        let work = || exchange(&mut stream, kind, count);
        let exits: u64 = trace.exits_by_reason(work)?.values().sum();
        // Tenths.
        let (cost, exits) = if kind == b'e' {
            (cost / count / 100, exits * 10 / count)
        } else {
            (cost * 10 / count, ((exits * 10) << 20) / count)
        };
        figures.extend([tenths(cost), tenths(exits)]);
    }
    Ok(figures)
}

fn tenths(count: u64) -> String {
    format!("{}.{}", count / 10, count % 10)
}

/// A connection to the server, once it listens.
fn connect() -> io::Result<TcpStream> {
    let mut last = io::ErrorKind::TimedOut.into();
    for _ in 0..200 {
        let address = ADDRESS.parse().map_err(io::Error::other)?;
        match TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(last)
}

/// One request and what it asks for.
fn exchange(stream: &mut TcpStream, kind: u8, count: u64) -> io::Result<()> {
    let mut request = vec![kind];
    request.extend(count.to_be_bytes());
    stream.write_all(&request)?;
    let mut chunk = vec![0; 64 << 10];
    let mut left = count;
    match kind {
        b'r' => {
            while left > 0 {
                let len = usize::try_from(left).map_or(chunk.len(), |left| left.min(chunk.len()));
                stream.write_all(&chunk[..len])?;
                left -= len as u64;
            }
            stream.read_exact(&mut chunk[..1])
        }
        b's' => {
            while left > 0 {
                match stream.read(&mut chunk)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    len => left = left.saturating_sub(len as u64),
                }
            }
            Ok(())
        }
        _ => (0..count).try_for_each(|_| {
            stream.write_all(&[1])?;
            stream.read_exact(&mut chunk[..1])
        }),
    }
}

/// A server that runs.
enum Running {
    Container(Subject),
    Microvm(Child),
}

impl Server {
    fn start(self, place: &Place) -> io::Result<Running> {
        let subject = match self {
            Self::Runc => Subject::Runc,
            Self::Caisson { vhost } => {
                place.configure(&format!("vhost_net = {vhost}\n"))?;
                Subject::Caisson
            }
            Self::Microvm { vhost } => return microvm(place, vhost).map(Running::Microvm),
        };
        let bundle = place.bundle(&["net-cost", "7777"])?;
        place.edit(|spec| network_path(spec, Some(&format!("/run/netns/{NAMESPACE}"))))?;
        let mut command = subject.program(place);
        command.args(["run", "--detach", "-b"]).arg(bundle).arg(ID);
        succeed(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
        Ok(Running::Container(subject))
    }
}

impl Running {
    fn stop(self, place: &Place) -> io::Result<()> {
        match self {
            Self::Container(subject) => {
                succeed(subject.program(place).args(["delete", "--force", ID]))
            }
            Self::Microvm(mut child) => {
                child.kill()?;
                child.wait()?;
                sh(&format!(
                    "ip -n {NAMESPACE} link del benchtap; tc -n {NAMESPACE} qdisc del dev eth0 ingress"
                ))
            }
        }
    }
}

/// QEMU's microvm on a tap that is joined to the interface.
fn microvm(place: &Place, vhost: bool) -> io::Result<Child> {
    sh(&format!(
        "ip -n {NAMESPACE} tuntap add benchtap mode tap vnet_hdr; ip -n {NAMESPACE} link set benchtap up; \
         for pair in 'benchtap eth0' 'eth0 benchtap'; do set -- $pair; \
         tc -n {NAMESPACE} qdisc add dev $1 ingress; \
         tc -n {NAMESPACE} filter add dev $1 ingress matchall action mirred egress redirect dev $2; done"
    ))?;
    let mac = output(&format!(
        "ip -n {NAMESPACE} -o link show eth0 | sed 's/.*ether \\([^ ]*\\) .*/\\1/'"
    ))?;
    let script = "mkdir -p n/bin n/dev; cp bundle/rootfs/bin/busybox bundle/rootfs/bin/net-cost n/bin/; \
        printf '#!/bin/busybox sh\\nb=/bin/busybox\\n$b mount -t devtmpfs none /dev\\n$b ip addr add 10.79.0.2/24 dev eth0\\n\
        $b ip link set eth0 up\\nexec /bin/net-cost 7777 </dev/null >/dev/null 2>&1\\n' > n/init; \
        chmod +x n/init; cd n; find . | busybox cpio -o -H newc > ../network.cpio";
    sh(&format!("cd {}; {script}", place.dir.display()))?;
    let vhost = if vhost { "on" } else { "off" };
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", NAMESPACE])
        .arg("/usr/bin/qemu-system-x86_64-microvm")
        .args(place.microvm_of(&place.dir.join("network.cpio")))
        .args(["-global", "virtio-mmio.force-legacy=false", "-netdev"])
        .arg(format!(
            "tap,id=net,ifname=benchtap,script=no,downscript=no,vhost={vhost}"
        ))
        .arg("-device")
        .arg(format!("virtio-net-device,netdev=net,mac={}", mac.trim()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()
}

fn network_path(spec: &mut serde_json::Value, path: Option<&str>) {
    let all = spec["linux"]["namespaces"].as_array_mut();
    let network = all.and_then(|all| all.iter_mut().find(|one| one["type"] == "network"));
    if let Some(network) = network {
        *network = match path {
            Some(path) => json!({"type": "network", "path": path}),
            None => json!({"type": "network"}),
        };
    }
}

fn sh(script: &str) -> io::Result<()> {
    succeed(Command::new("sh").args(["-ec", script]))
}

fn output(script: &str) -> io::Result<String> {
    let output = Command::new("sh").args(["-ec", script]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn succeed(command: &mut Command) -> io::Result<()> {
    let status = command.status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("{command:?}: {status}")))
    }
}
