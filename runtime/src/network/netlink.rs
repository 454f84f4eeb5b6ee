//! A netlink socket of the container's network namespace: requests, listings, notices of changes.
//!
//! Contract: a socket belongs to the namespace in which it was opened, wherever its process goes later. Calls block for
//! as long as the kernel needs, which is not long. A listing that was disturbed by a change is made again.
//! Not here: what is asked (`joint.rs`), what the answers mean (`view.rs`).
//! Spec: netlink(7).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use caisson_agent_api::netlink::{self, Builder, Message};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
        netlink::SocketAddrNetlink, recv, send, socket_with,
    },
};

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`.
const ACKNOWLEDGE: u16 = 0x4;
/// `NLM_F_DUMP`.
const LISTING: u16 = 0x300;
/// `NLM_F_DUMP_INTR`: something changed meanwhile.
const DISTURBED: u16 = 0x10;
/// `NLM_F_CREATE | NLM_F_EXCL`.
pub(super) const NEW: u16 = 0x600;

const ERROR: u16 = 2;
const DONE: u16 = 3;

/// A listing's datagram is at most this long.
const BUFFER_BYTES: usize = 32 << 10;
/// How often a listing is begun anew; then what was seen last is taken, and the notice of the change brings the rest.
const ATTEMPTS: u32 = 5;

/// Everything that a container can see of its network: `RTMGRP_LINK`, `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`,
/// `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`; IPv6's rules have a number (19) instead of a name.
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;

/// Requests and listings.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// A socket of the current namespace.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self(open(SocketFlags::empty())?))
    }

    /// One request.
    pub(super) fn request(&self, request: Builder) -> io::Result<()> {
        let mut message = request.finish();
        address(&mut message, REQUEST | ACKNOWLEDGE);
        send(&self.0, &message, SendFlags::empty())?;
        let mut outcome = Ok(());
        self.receive(|message| {
            if message.kind == ERROR {
                outcome = verdict(message);
            }
            message.kind == ERROR
        })?;
        outcome
    }

    /// All messages of a listing.
    pub(super) fn list(&self, request: Builder) -> io::Result<Vec<Vec<u8>>> {
        let mut message = request.finish();
        address(&mut message, REQUEST | LISTING);
        let mut listed = Vec::new();
        for _ in 0..ATTEMPTS {
            send(&self.0, &message, SendFlags::empty())?;
            listed.clear();
            let (mut outcome, mut disturbed) = (Ok(()), false);
            self.receive(|message| {
                disturbed |= message.flags & DISTURBED != 0;
                match message.kind {
                    ERROR => outcome = verdict(message),
                    DONE => {}
                    _ => listed.push(message.whole.to_vec()),
                }
                matches!(message.kind, ERROR | DONE)
            })?;
            outcome?;
            if !disturbed {
                break;
            }
        }
        Ok(listed)
    }

    /// Receives until `is_last` says so.
    fn receive(&self, mut is_last: impl FnMut(Message<'_>) -> bool) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let (_, len) = match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            for message in netlink::messages(&buffer[..len.min(BUFFER_BYTES)]) {
                if is_last(message) {
                    return Ok(());
                }
            }
        }
    }
}

/// Notices of changes; what changed exactly is not looked at.
#[derive(Debug)]
pub(super) struct Notices(OwnedFd);

impl Notices {
    /// Notices of the current namespace, from now on.
    pub(super) fn open() -> io::Result<Self> {
        let socket = open(SocketFlags::NONBLOCK)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self(socket))
    }

    /// Takes all that wait; whether there were any. Too many at once are some, too.
    pub(super) fn take(&self) -> bool {
        let mut any = false;
        let mut byte = [0];
        loop {
            match recv(&self.0, &mut byte, RecvFlags::TRUNC) {
                Ok((_, 0)) | Err(Errno::AGAIN) => return any,
                Ok(_) | Err(Errno::NOBUFS) => any = true,
                Err(Errno::INTR) => {}
                Err(_) => return any,
            }
        }
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn open(more: SocketFlags) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | more;
    // No protocol: NETLINK_ROUTE is the first of them.
    Ok(socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        None,
    )?)
}

fn address(message: &mut [u8], flags: u16) {
    if let Some(header) = message.get_mut(6..8) {
        let flags = u16::from_ne_bytes([header[0], header[1]]) | flags;
        header.copy_from_slice(&flags.to_ne_bytes());
    }
}

fn verdict(message: Message<'_>) -> io::Result<()> {
    match netlink::u32_at(message.body, 0).unwrap_or(0).cast_signed() {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_ends_and_a_refusal_is_an_error() {
        // Sockets in this machine's own namespace: nothing is changed.
        let socket = Socket::open().unwrap();
        let links = socket
            .list(Builder::new(libc::RTM_GETLINK, 0, &[0; 16]))
            .unwrap();
        assert!(!links.is_empty());
        let mut nobody = [0; 16];
        nobody[4..8].copy_from_slice(&0x7fff_0000_u32.to_ne_bytes());
        assert!(
            socket
                .request(Builder::new(libc::RTM_DELLINK, 0, &nobody))
                .is_err()
        );
    }

    #[test]
    fn without_a_change_there_is_no_notice() {
        let notices = Notices::open().unwrap();
        notices.take();
        let mut socket = [0; 1];
        assert!(recv(&notices, &mut socket, RecvFlags::DONTWAIT).is_err());
    }
}
