//! passt: a process of the caller's that carries the guest's packets on in ordinary sockets of the host.
//!
//! ```text
//!  guest -- virtio-net -- VMM == stream socket, frames == passt -- sockets -- the caller's network namespace
//! ```
//!
//! Contract: passt runs in the caller's namespaces, where it was started, in a sandbox that it makes itself. It ends with
//! this value; with this process, if that is killed; and by itself once the other end of its socket is closed, which is the
//! VMM's. [`Passt::socket`] returns when it serves, or says why it does not: its ports are bound then.
//! Not here: what the guest sees of the host (`outside.rs`).
//! Spec: passt(1); RFC 826 (ARP), RFC 4861, 4.3 (neighbour solicitation).

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    pipe::{PipeFlags, pipe_with},
};

use super::outside::{GUEST_MAC, Outside, Way};
use crate::{
    config::Config,
    spawn::{Child, Program, spawn_bound},
    text::one_line,
};

/// The number under which passt finds its socket.
const SOCKET: i32 = 3;
/// passt's own address on the guest's side. Not that of the host's interface, which older versions take by themselves.
const MAC: &str = "9a:55:9a:55:9a:55";
/// How long it may take until it serves.
const PATIENCE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};
/// How much of its complaint is kept.
const MAX_WORDS_BYTES: u64 = 4096;
/// The largest frame that is believed while it starts.
const MAX_FRAME_BYTES: u32 = 128 << 10;

/// Why there is no user-mode network.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// The program cannot be started.
    #[error(
        "start {path} (of Debian's package passt), which connects a container without a network namespace",
        path = path.display()
    )]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended.
    #[error("passt: {0}")]
    Ended(String),
    /// It does not answer.
    #[error("passt does not answer")]
    Silent,
    /// A step on the host.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The process.
#[derive(Debug)]
pub(super) struct Passt {
    child: Child,
    words: File,
    /// Until it is the VMM's.
    socket: Option<OwnedFd>,
}

impl Passt {
    /// Starts it for a guest that is shown `outside`.
    pub(super) fn start(config: &Config, outside: &Outside) -> Result<Self, PasstError> {
        let host = |step| {
            move |errno: rustix::io::Errno| PasstError::Host {
                step,
                source: errno.into(),
            }
        };
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(host("make a socket pair"))?;
        // It must never wait for somebody to read its complaints.
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (words, stderr) = pipe_with(flags).map_err(host("make a pipe"))?;
        let program = Program {
            path: config.passt.clone(),
            args: arguments(config, outside),
            env: Vec::new(),
        };
        let files = vec![(theirs, SOCKET), (stderr, 2)];
        let child = spawn_bound(&program, files, None).map_err(|source| PasstError::Start {
            path: config.passt.clone(),
            source,
        })?;
        Ok(Self {
            child,
            words: words.into(),
            socket: Some(ours),
        })
    }

    /// Its socket, non-blocking, for the VMM; once. Waits until it answers.
    pub(super) fn socket(&mut self, outside: &Outside) -> Result<OwnedFd, PasstError> {
        let socket = self.socket.take().ok_or(PasstError::Silent)?;
        let mut socket = File::from(socket);
        for question in outside.ways().map(Way::question) {
            // An error is its end, which is seen next.
            let _ = socket.write_all(&framed(&question));
            self.answer(&mut socket)?;
        }
        let socket = OwnedFd::from(socket);
        rustix::io::ioctl_fionbio(&socket, true).map_err(|errno| PasstError::Host {
            step: "prepare passt's socket",
            source: errno.into(),
        })?;
        Ok(socket)
    }

    /// Takes one frame: whatever it is, it was sent by a passt that serves.
    fn answer(&mut self, socket: &mut File) -> Result<(), PasstError> {
        let mut length = [0; 4];
        self.read(socket, &mut length)?;
        let length = u32::from_be_bytes(length);
        if length > MAX_FRAME_BYTES {
            return Err(PasstError::Silent);
        }
        // 128 KiB: fits.
        let mut frame = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read(socket, &mut frame)
    }

    fn read(&mut self, socket: &mut File, mut to: &mut [u8]) -> Result<(), PasstError> {
        while !to.is_empty() {
            if !is_ready(socket.as_fd(), self.child.descriptor()) {
                return Err(PasstError::Silent);
            }
            match socket.read(to) {
                Ok(len) if len > 0 => to = &mut to[len..],
                _ => return Err(self.ended()),
            }
        }
        Ok(())
    }

    fn ended(&mut self) -> PasstError {
        let mut words = Vec::new();
        let how = self.child.wait();
        // Its end of the pipe is closed.
        let _ = (&mut self.words)
            .take(MAX_WORDS_BYTES)
            .read_to_end(&mut words);
        let words = one_line(&String::from_utf8_lossy(&words), 1024);
        PasstError::Ended(match how {
            Ok(how) if words.is_empty() => how,
            Ok(how) => format!("{words} ({how})"),
            Err(error) => error.to_string(),
        })
    }
}

/// Whether there is something to read, which a closed socket has too, before patience ends.
fn is_ready(socket: BorrowedFd<'_>, process: BorrowedFd<'_>) -> bool {
    let mut watched = [
        PollFd::from_borrowed_fd(socket, PollFlags::IN),
        PollFd::from_borrowed_fd(process, PollFlags::IN),
    ];
    loop {
        match poll(&mut watched, Some(&PATIENCE)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.is_ok_and(|count| count > 0),
        }
    }
}

/// What it is told.
fn arguments(config: &Config, outside: &Outside) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    // The guest is told what DHCP, DHCPv6 and router advertisements would tell it.
    add(&[
        "--foreground",
        "--quiet",
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ra",
    ]);
    add(&["--fd", &SOCKET.to_string(), "--mac-addr", MAC]);
    for way in outside.ways() {
        add(&["--address", &way.address.to_string()]);
        if let Some(gateway) = way.gateway {
            add(&["--gateway", &gateway.to_string()]);
        }
        if way.address.is_ipv4() {
            add(&["--netmask", &way.prefix.to_string()]);
        }
    }
    match (outside.v4, outside.v6) {
        (None, _) => add(&["--ipv6-only"]),
        (_, None) => add(&["--ipv4-only"]),
        _ => {}
    }
    if !config.user_network_host {
        add(&["--no-map-gw"]);
    }
    for (option, value) in [
        ("--tcp-ports", &config.user_network_tcp),
        ("--udp-ports", &config.user_network_udp),
        ("--dns-forward", &config.user_network_dns),
    ] {
        if !value.is_empty() {
            add(&[option, value]);
        }
    }
    all
}

/// A frame as the stream carries it.
fn framed(frame: &[u8]) -> Vec<u8> {
    // A question is shorter than 100 bytes.
    let length = u32::try_from(frame.len()).unwrap_or(0).to_be_bytes();
    [&length, frame].concat()
}

impl Way {
    /// A question that passt answers by itself, as the guest's kernel asks it: who has the gateway's address?
    fn question(self) -> Vec<u8> {
        match (self.address, self.gateway) {
            (IpAddr::V6(own), gateway) => {
                let asked = match gateway {
                    Some(IpAddr::V6(gateway)) => gateway,
                    _ => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
                };
                solicitation(own, asked)
            }
            (IpAddr::V4(own), gateway) => {
                let asked = match gateway {
                    Some(IpAddr::V4(gateway)) => gateway.octets(),
                    // Any address but the guest's own.
                    _ => own.to_bits().wrapping_add(1).to_be_bytes(),
                };
                [
                    &[0xff; 6][..],
                    &GUEST_MAC,
                    &[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1],
                    &GUEST_MAC,
                    &own.octets(),
                    &[0; 6],
                    &asked,
                ]
                .concat()
            }
        }
    }
}

fn solicitation(own: Ipv6Addr, asked: Ipv6Addr) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    let target = asked.octets();
    // The solicited-node group: RFC 4291, 2.7.1.
    let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
    group[13..].copy_from_slice(&target[13..]);
    let mut message = [
        &[135, 0, 0, 0, 0, 0, 0, 0][..],
        &target,
        &[1, 1],
        &GUEST_MAC,
    ]
    .concat();
    // Shorter than 256 bytes.
    let len = u8::try_from(message.len()).unwrap_or(0);
    let pseudo = [
        &own.octets()[..],
        &group,
        &[0, 0, 0, len, 0, 0, 0, ICMPV6],
        &message,
    ]
    .concat();
    message[2..4].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    [
        &[0x33, 0x33, 0xff, target[13], target[14], target[15]][..],
        &GUEST_MAC,
        &[0x86, 0xdd, 0x60, 0, 0, 0, 0, len, ICMPV6, 255],
        &own.octets(),
        &group,
        &message,
    ]
    .concat()
}

/// The Internet's, of an even number of bytes: RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    // Twice folded, it is 16 bits long.
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(addresses: &[(&str, &str)]) -> Outside {
        super::super::outside::tests::seen("lan0", 2, addresses)
    }

    #[test]
    fn passt_is_told_what_the_guest_is_told() {
        let both = outside(&[("192.0.2.7", "192.0.2.1"), ("2001:db8::7", "fe80::1")]);
        let text = arguments(&Config::default(), &both).join(" ");
        assert!(
            text.contains("--fd 3 ") && text.contains("--foreground"),
            "{text}"
        );
        let v4 = "--address 192.0.2.7 --gateway 192.0.2.1 --netmask 24";
        let v6 = "--address 2001:db8::7 --gateway fe80::1";
        assert!(text.contains(v4) && text.contains(v6), "{text}");
        assert!(text.ends_with("--no-map-gw"), "{text}");
        let only = arguments(&Config::default(), &outside(&[("192.0.2.7", "192.0.2.1")]));
        assert!(only.contains(&"--ipv4-only".to_owned()));
    }

    #[test]
    fn ports_names_and_the_hosts_loopback_are_asked_for() {
        let config = Config {
            user_network_host: true,
            user_network_tcp: "8080:80".into(),
            user_network_udp: "5353".into(),
            user_network_dns: "192.0.2.53".into(),
            ..Config::default()
        };
        let text = arguments(&config, &outside(&[("192.0.2.7", "192.0.2.1")])).join(" ");
        let wanted = "--ipv4-only --tcp-ports 8080:80 --udp-ports 5353 --dns-forward 192.0.2.53";
        assert!(text.ends_with(wanted), "{text}");
    }

    #[test]
    fn questions_are_whole_packets() {
        let both = outside(&[("192.0.2.7", "192.0.2.1"), ("2001:db8::7", "fe80::1")]);
        let [arp, solicitation]: [Vec<u8>; 2] = both
            .ways()
            .map(Way::question)
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        assert_eq!((arp.len(), &arp[38..]), (42, &[192, 0, 2, 1][..]));
        assert_eq!(solicitation.len(), 14 + 40 + 32);
        let pseudo = [
            &solicitation[22..54],
            &[0, 0, 0, 32, 0, 0, 0, 58],
            &solicitation[54..],
        ];
        assert_eq!(
            checksum(&pseudo.concat()),
            0,
            "a right checksum sums up to nothing"
        );
    }

    fn started(program: &str, args: &[&str]) -> (Passt, File) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (words, stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let program = Program {
            path: program.into(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: Vec::new(),
        };
        let theirs = OwnedFd::from(theirs);
        let kept = File::from(theirs.try_clone().unwrap());
        let child = spawn_bound(&program, vec![(theirs, SOCKET), (stderr, 2)], None).unwrap();
        let socket = Some(ours.into());
        (
            Passt {
                child,
                words: words.into(),
                socket,
            },
            kept,
        )
    }

    #[test]
    fn what_passt_says_at_its_end_is_the_error() {
        let (mut passt, kept) = started("/bin/sh", &["-c", "echo no such port >&2; exit 3"]);
        drop(kept);
        let error = passt
            .socket(&outside(&[("192.0.2.7", "192.0.2.1")]))
            .unwrap_err();
        assert_eq!(error.to_string(), "passt: no such port (exit status 3)");
    }

    #[test]
    fn the_first_frame_says_that_it_serves() {
        let (mut passt, mut peer) = started("/bin/sleep", &["60"]);
        peer.write_all(&framed(&[1; 60])).unwrap();
        passt
            .socket(&outside(&[("192.0.2.7", "192.0.2.1")]))
            .unwrap();
        let mut question = [0; 46];
        peer.read_exact(&mut question).unwrap();
        assert_eq!(question[..4], [0, 0, 0, 42]);
    }

    #[test]
    fn a_program_that_is_none_is_named_with_its_package() {
        let config = Config {
            passt: "/nonexistent/passt".into(),
            ..Config::default()
        };
        let error = Passt::start(&config, &outside(&[("192.0.2.7", "192.0.2.1")])).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("/nonexistent/passt (of Debian's package passt)")
        );
    }
}
