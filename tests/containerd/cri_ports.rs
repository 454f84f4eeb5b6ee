//! Port-forward: containerd enters the pod's network namespace on the host and connects to its loopback interface.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use caisson_tests::case::runtime;
use k8s_cri::v1::PortForwardRequest;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::kubelet::{Kubelet, Pod, begin_pods};
use crate::streaming::forwarded;

/// How long a connection may stand still.
const LIMIT: Duration = Duration::from_secs(60);

/// What a port of the pod answers to `said`, and what the CRI says of it.
fn answered(node: &Kubelet<'_>, pod: &Pod<'_>, port: i32, said: &str) -> (String, String) {
    let request = PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![port],
    };
    let answer = node.cri.answer(node.cri.runtime().port_forward(request));
    forwarded(&answer.expect("PortForward").url, said)
}

/// A connection to the loopback interface of the pod's network namespace, made as containerd makes it.
fn connected(pod: &Pod<'_>, address: &str) -> TcpStream {
    let namespace = File::open(pod.network_namespace()).expect("the namespace");
    let connect = || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        TcpStream::connect(address)
    };
    let made = thread::scope(|scope| scope.spawn(connect).join());
    let stream = made.expect("a thread").expect("a connection");
    stream.set_read_timeout(Some(LIMIT)).expect("a limit");
    stream.set_write_timeout(Some(LIMIT)).expect("a limit");
    stream
}

#[test]
fn ports_of_localhost_are_forwarded() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script(
        "main",
        "mkdir /www; echo hello > /www/x; httpd -p 127.0.0.1:8080 -h /www; httpd -p '[::1]:8086' -h /www; \
         exec nc -ll -p 9000 -e cat",
    );
    node.said(
        &id,
        "until netstat -ltn | grep -q :9000; do sleep 0.1; done",
    );
    // Servers on 127.0.0.1 alone and on ::1 alone. The engine asks for `localhost`: runc's pods need a host where that is
    // ::1 too.
    let ports = if runtime() == "runc" {
        &[8080][..]
    } else {
        &[8080, 8086]
    };
    for port in ports {
        let (data, error) = answered(&node, &pod, *port, "GET /x HTTP/1.0\r\n\r\n");
        assert!(
            data.starts_with("HTTP/1.") && data.ends_with("hello\n"),
            "{port}: {data:?} {error:?}"
        );
    }
    let mut six = connected(&pod, "[::1]:8086");
    six.write_all(b"GET /x HTTP/1.0\r\n\r\n").expect("write");
    let mut page = String::new();
    six.read_to_string(&mut page).expect("read");
    assert!(page.ends_with("hello\n"), "{page:?}");
    let (data, error) = answered(&node, &pod, 7, "");
    assert_eq!(data, "");
    assert!(
        error.contains("connection re"),
        "refused or reset: {error:?}"
    );
    // One on every address, to which the end of what is sent must come through: `cat` ends with it.
    let sent: Vec<u8> = (0..4_u32 << 20)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let mut stream = connected(&pod, "127.0.0.1:9000");
    let mut writing = stream.try_clone().expect("a copy");
    let back = thread::scope(|scope| {
        scope.spawn(|| {
            writing.write_all(&sent).expect("write");
            writing.shutdown(Shutdown::Write).expect("half-close");
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).expect("read");
        back
    });
    assert!(back == sent, "{} bytes came back", back.len());
    pod.end();
}
