//! A server of names outside of the containers: by UDP, and by TCP what is too long for that.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

const PORT: u16 = 53;
const HEADER_BYTES: usize = 12;
const TYPE_A: u16 = 1;

/// A name with as many addresses as are too many for a datagram of 512 bytes.
pub(crate) const LONG: &str = "long.outside.test";
const LONG_ADDRESSES: u16 = 40;
/// A name with one.
pub(crate) const SHORT: &str = "short.outside.test";

/// RFC 1035, 4.1.1: a response, recursion desired and available; no such name; cut short.
const RESPONSE: u16 = 0x8180;
const NO_SUCH_NAME: u16 = 3;
const TRUNCATED: u16 = 0x0200;

/// How a question came, and what for.
pub(crate) type Heard = BTreeSet<(&'static str, String)>;

/// A server that knows two names, both of which are its own; ended when dropped.
pub(crate) struct Names {
    address: Ipv4Addr,
    heard: Arc<Mutex<Heard>>,
    threads: Vec<JoinHandle<()>>,
}

impl Names {
    /// One at this address of the host's.
    pub(crate) fn serve(address: Ipv4Addr) -> Self {
        let datagrams = UdpSocket::bind((address, PORT)).expect("bind");
        let connections = TcpListener::bind((address, PORT)).expect("bind");
        let heard = Arc::new(Mutex::new(Heard::new()));
        let by_udp = {
            let heard = Arc::clone(&heard);
            move || serve_datagrams(&datagrams, address, &heard)
        };
        let by_tcp = {
            let heard = Arc::clone(&heard);
            move || serve_connections(&connections, address, &heard)
        };
        let threads = vec![std::thread::spawn(by_udp), std::thread::spawn(by_tcp)];
        Self {
            address,
            heard,
            threads,
        }
    }

    /// What it was asked so far.
    pub(crate) fn heard(&self) -> Heard {
        self.heard.lock().expect("no panic").clone()
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // Nothing at all is no question: it ends each thread.
        let last = UdpSocket::bind((self.address, 0))
            .and_then(|socket| socket.send_to(&[], (self.address, PORT)));
        let _ = last.and_then(|_| TcpStream::connect((self.address, PORT)).map(drop));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_datagrams(socket: &UdpSocket, address: Ipv4Addr, heard: &Mutex<Heard>) {
    let mut question = [0; 512];
    while let Ok((length @ 1.., asker)) = socket.recv_from(&mut question) {
        let answer = answer(&question[..length], "UDP", address, heard);
        let _ = socket.send_to(&answer, asker);
    }
}

fn serve_connections(listener: &TcpListener, address: Ipv4Addr, heard: &Mutex<Heard>) {
    for connection in listener.incoming().flatten() {
        let mut questions = 0;
        let _ = serve_connection(connection, address, heard, &mut questions);
        if questions == 0 {
            return;
        }
    }
}

fn serve_connection(
    mut connection: TcpStream,
    address: Ipv4Addr,
    heard: &Mutex<Heard>,
    questions: &mut u32,
) -> io::Result<()> {
    loop {
        let mut length = [0; 2];
        connection.read_exact(&mut length)?;
        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
        connection.read_exact(&mut question)?;
        *questions += 1;
        let answer = answer(&question, "TCP", address, heard);
        let length = u16::try_from(answer.len()).expect("length");
        connection.write_all(&[&length.to_be_bytes()[..], &answer].concat())?;
    }
}

/// The labels of the one name in a question, the kind of record, and the length of all that.
fn asked(question: &[u8]) -> (String, u16, usize) {
    let (mut at, mut labels) = (HEADER_BYTES, Vec::new());
    while question[at] != 0 {
        let end = at + 1 + usize::from(question[at]);
        labels.push(String::from_utf8_lossy(&question[at + 1..end]).to_lowercase());
        at = end;
    }
    let kind = u16::from_be_bytes([question[at + 1], question[at + 2]]);
    (labels.join("."), kind, at + 5)
}

fn answer(
    question: &[u8],
    protocol: &'static str,
    address: Ipv4Addr,
    heard: &Mutex<Heard>,
) -> Vec<u8> {
    let (name, kind, end) = asked(question);
    let (flags, records) = match name.as_str() {
        LONG if protocol == "UDP" => (RESPONSE | TRUNCATED, 0),
        LONG if kind == TYPE_A => (RESPONSE, LONG_ADDRESSES),
        SHORT if kind == TYPE_A => (RESPONSE, 1),
        LONG | SHORT => (RESPONSE, 0),
        _ => (RESPONSE | NO_SUCH_NAME, 0),
    };
    heard.lock().expect("no panic").insert((protocol, name));
    let mut answer = question[..2].to_vec();
    for word in [flags, 1, records, 0, 0] {
        answer.extend(word.to_be_bytes());
    }
    answer.extend(&question[HEADER_BYTES..end]);
    for _ in 0..records {
        // The name above, A, IN, an hour, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0x0e, 0x10, 0, 4]);
        answer.extend(address.octets());
    }
    answer
}
