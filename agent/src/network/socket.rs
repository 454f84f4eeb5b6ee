//! A netlink socket: requests of the host's making, and the kernel's answer to each.
//!
//! Contract: every request is acknowledged before the next call; a list is sent in one datagram per [`BATCH_BYTES`], and
//! every request of it is tried before the first error is told.

use super::NetworkError;
use caisson_agent_api::netlink::{self, Builder};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use std::io;
use std::os::fd::OwnedFd;

/// Requests that are sent at once; their answers fit into the socket's buffer.
const BATCH_BYTES: usize = 16 << 10;
const BUFFER_BYTES: usize = 32 << 10;

/// `NLM_F_REQUEST | NLM_F_ACK`, netlink(7).
const REQUEST: u16 = 0x5;
/// `NLMSG_ERROR`, which an acknowledgement is too.
const ERROR: u16 = 2;

/// A socket of the namespace in which it was opened.
pub(super) struct Socket(OwnedFd);

impl Socket {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None, // NETLINK_ROUTE is the first of them
        )?;
        Ok(Self(socket))
    }

    /// One request of this agent's own.
    pub(super) fn request(&self, request: Builder) -> io::Result<()> {
        let mut message = request.finish();
        address(&mut message, 0);
        let mut outcome = Ok(());
        self.converse(&message, 1, |_, error| outcome = Err(error))?;
        outcome
    }

    /// A list of the host's requests.
    pub(super) fn carry_out(&self, requests: &[u8]) -> Result<(), NetworkError> {
        let all: Vec<_> = netlink::messages(requests).collect();
        let mut outcome = Ok(());
        let mut first = 0;
        while first < all.len() {
            let mut batch: Vec<u8> = Vec::new();
            let mut count = 0;
            for message in &all[first..] {
                if count > 0 && batch.len() + message.whole.len() > BATCH_BYTES {
                    break;
                }
                let start = batch.len();
                batch.extend(message.whole);
                batch.resize(batch.len().next_multiple_of(4), 0);
                address(&mut batch[start..], count);
                count += 1;
            }
            let mut failed = |sequence: u32, source: io::Error| {
                let number = first + usize::try_from(sequence).unwrap_or(usize::MAX);
                let kind = all.get(number).map_or(0, |message| message.kind);
                if outcome.is_ok() && !is_harmless(kind, &source) {
                    outcome = Err(NetworkError::Request {
                        number,
                        kind,
                        source,
                    });
                }
            };
            if let Err(error) = self.converse(&batch, count, &mut failed) {
                failed(0, error);
                break;
            }
            first += usize::try_from(count).unwrap_or(usize::MAX);
        }
        outcome
    }

    /// Sends `count` requests and takes as many answers; `failed` is told of those that are errors.
    fn converse(
        &self,
        requests: &[u8],
        count: u32,
        mut failed: impl FnMut(u32, io::Error),
    ) -> io::Result<()> {
        send(&self.0, requests, SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut answered = 0;
        while answered < count {
            let (_, len) = match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            for message in netlink::messages(&buffer[..len.min(BUFFER_BYTES)]) {
                if message.kind != ERROR {
                    continue;
                }
                answered += 1;
                let code = netlink::u32_at(message.body, 0).unwrap_or(0).cast_signed();
                if code != 0 {
                    failed(message.sequence, io::Error::from_raw_os_error(-code));
                }
            }
        }
        Ok(())
    }
}

/// Makes a message a request that is answered under this number.
fn address(message: &mut [u8], sequence: u32) {
    let Some(header) = message.get_mut(..16) else {
        return;
    };
    let flags = u16::from_ne_bytes([header[6], header[7]]) | REQUEST;
    header[6..8].copy_from_slice(&flags.to_ne_bytes());
    header[8..12].copy_from_slice(&sequence.to_ne_bytes());
    header[12..16].fill(0);
}

/// Whether an error means that the request had nothing to do: the thing is there already, or is gone already.
fn is_harmless(kind: u16, error: &io::Error) -> bool {
    // NEW, DEL, GET and SET of each kind of thing follow each other.
    const NEW: u16 = 0;
    const DEL: u16 = 1;
    match (kind % 4, error.raw_os_error()) {
        (NEW, Some(code)) => code == libc::EEXIST,
        (DEL, Some(code)) => {
            [libc::ESRCH, libc::ENOENT, libc::ENODEV, libc::EADDRNOTAVAIL].contains(&code)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_already_or_gone_already_is_no_error() {
        let error = io::Error::from_raw_os_error;
        assert!(is_harmless(libc::RTM_NEWADDR, &error(libc::EEXIST)));
        assert!(is_harmless(libc::RTM_DELROUTE, &error(libc::ESRCH)));
        assert!(is_harmless(libc::RTM_DELADDR, &error(libc::EADDRNOTAVAIL)));
        assert!(!is_harmless(libc::RTM_NEWROUTE, &error(libc::ENETUNREACH)));
        assert!(!is_harmless(libc::RTM_DELROUTE, &error(libc::EPERM)));
    }

    #[test]
    fn the_kernel_answers_every_request_of_a_list() {
        // Refused for want of rights or of an interface, whoever runs this: an error for each, none for the socket.
        let socket = Socket::open().unwrap();
        let mut body = [0; 8];
        body[4..].copy_from_slice(&0x7fff_0000_u32.to_ne_bytes());
        let request = Builder::new(libc::RTM_NEWADDR, 0, &body).finish();
        let many: Vec<u8> = std::iter::repeat_n(request, 2000).flatten().collect();
        let error = socket.carry_out(&many).unwrap_err();
        assert!(
            matches!(
                error,
                NetworkError::Request {
                    number: 0,
                    kind: libc::RTM_NEWADDR,
                    ..
                }
            ),
            "{error}"
        );
    }
}
