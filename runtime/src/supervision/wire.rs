//! FUSE, as far as one file with seccomp's ioctls needs it: requests of the host's kernel parsed, replies written.
//!
//! Contract: [`parse`] reads one request as read(2) on the device gave it; what is cut short is `None`. Numbers are in
//! the host's byte order, which is little-endian here.
//! Not here: the device and the frame of a message (`fuse.rs`).
//! Spec: linux/fuse.h (protocol 7.31), linux/seccomp.h.

use caisson_agent_api::supervision::{Notification, Response};
use rustix::io::Errno;

use crate::fuse::{self, Call, message};
pub(super) use crate::fuse::{init, open, reply};

/// `struct fuse_ioctl_in`, after the header.
const IOCTL_BYTES: usize = 32;

/// seccomp's operations on a listener.
const RECEIVE: u32 = 0xc050_2100;
const SEND: u32 = 0xc018_2101;
const ID_VALID: u32 = 0x4008_2102;
const ADD_FD: u32 = 0x4018_2103;

/// A request and the number that its reply must bear.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) unique: u64,
    pub(super) kind: Kind,
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Init,
    Attributes,
    Open,
    /// The file is closed for good.
    Release,
    /// The next notification; the place for it is empty, as it must be.
    Receive,
    Respond(Response),
    IsValid(u64),
    Poll {
        handle: u64,
        /// Tell when one of these is ready.
        wanted: Option<u32>,
    },
    /// A signal has come for who waits for the reply to this request.
    Interrupt(u64),
    /// Nothing that is answered.
    Forget,
    /// Something that is refused.
    Refused(Errno),
}

/// What may be ready on a listener (poll(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ready {
    /// A notification waits.
    pub(super) readable: bool,
    /// One has been received and waits for its answer.
    pub(super) writable: bool,
    /// There will be no more.
    pub(super) over: bool,
}

impl Ready {
    /// Whether there is something that a poller for these events returns with.
    pub(super) fn is_wanted(self, events: u32) -> bool {
        self.over || self.events() & events != 0
    }

    fn events(self) -> u32 {
        [
            (self.readable, 0x41), // POLLIN, POLLRDNORM
            (self.writable, 0x104),
            (self.over, 0x10),
        ]
        .iter()
        .fold(0, |all, (is, bits)| if *is { all | bits } else { all })
    }
}

pub(super) fn parse(bytes: &[u8]) -> Option<Request> {
    let call = Call::parse(bytes)?;
    let kind = match call.opcode {
        2 | 42 => Kind::Forget,
        3 => Kind::Attributes,
        14 => Kind::Open,
        // Reading and writing: the kernel's own listener has neither.
        15 | 16 => Kind::Refused(Errno::INVAL),
        18 => Kind::Release,
        26 => Kind::Init,
        36 => Kind::Interrupt(call.number(0)?),
        39 => operation(&call)?,
        40 => Kind::Poll {
            handle: call.number(8)?,
            wanted: match call.small(16)? & 1 {
                0 => None,
                _ => Some(call.small(20)?),
            },
        },
        _ => Kind::Refused(Errno::NOSYS),
    };
    Some(Request {
        unique: call.unique,
        kind,
    })
}

/// The numbers say how long their arguments are, and the kernel has copied as much.
fn operation(call: &Call<'_>) -> Option<Kind> {
    Some(match call.small(12)? {
        RECEIVE => {
            let place: [u8; Notification::BYTES] = fuse::array(call.body, IOCTL_BYTES)?;
            match place.iter().all(|byte| *byte == 0) {
                true => Kind::Receive,
                false => Kind::Refused(Errno::INVAL),
            }
        }
        SEND => Response::parse(fuse::array(call.body, IOCTL_BYTES)?)
            .map_or(Kind::Refused(Errno::INVAL), Kind::Respond),
        ID_VALID => Kind::IsValid(call.number(IOCTL_BYTES)?),
        // A descriptor of the host's cannot become one of the guest's.
        ADD_FD => Kind::Refused(Errno::OPNOTSUPP),
        _ => Kind::Refused(Errno::INVAL),
    })
}

/// Tells the kernel that more is ready for a handle of [`Kind::Poll`] (`FUSE_NOTIFY_POLL`).
pub(super) fn wake(handle: u64) -> Vec<u8> {
    message(1, 0, &handle.to_le_bytes())
}

/// `struct fuse_attr_out` of the one file, which is the file system's root.
pub(super) fn attributes() -> Vec<u8> {
    let mut body = vec![0; 104];
    for (at, value) in [(16, 1_u32), (76, MODE), (80, 1)] {
        for (to, from) in body.iter_mut().skip(at).zip(value.to_le_bytes()) {
            *to = from;
        }
    }
    body
}

/// A regular file that its owner may use.
pub(super) const MODE: u32 = 0o100_600;

/// `struct fuse_ioctl_out` and what the operation gives back.
pub(super) fn done(output: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 16];
    body.extend(output);
    body
}

/// `struct fuse_poll_out`.
pub(super) fn polled(ready: Ready) -> Vec<u8> {
    let mut body = ready.events().to_le_bytes().to_vec();
    body.resize(8, 0);
    body
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request as the kernel writes it.
    pub(in crate::supervision) fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
        crate::fuse::tests::request(opcode, unique, 1, body)
    }

    fn ioctl(command: u32, argument: &[u8]) -> Option<Kind> {
        let mut body = vec![0; 12];
        body.extend(command.to_le_bytes());
        body.resize(IOCTL_BYTES, 0);
        body.extend(argument);
        parse(&request(39, 5, &body)).map(|request| request.kind)
    }

    #[test]
    fn operations_are_seccomps() {
        assert_eq!(ioctl(RECEIVE, &[0; 80]), Some(Kind::Receive));
        assert_eq!(ioctl(RECEIVE, &[1; 80]), Some(Kind::Refused(Errno::INVAL)));
        assert_eq!(
            ioctl(ID_VALID, &9_u64.to_le_bytes()),
            Some(Kind::IsValid(9))
        );
        let mut response = [0; 24];
        response[0] = 3;
        assert!(matches!(ioctl(SEND, &response), Some(Kind::Respond(given)) if given.id() == 3));
        response[20] = 2;
        assert_eq!(ioctl(SEND, &response), Some(Kind::Refused(Errno::INVAL)));
        assert_eq!(
            ioctl(ADD_FD, &[0; 24]),
            Some(Kind::Refused(Errno::OPNOTSUPP))
        );
        assert_eq!(ioctl(0x5401, &[]), Some(Kind::Refused(Errno::INVAL)));
    }

    #[test]
    fn a_request_that_is_cut_short_is_none() {
        let mut body = vec![0; 12];
        body.extend(SEND.to_le_bytes());
        body.resize(IOCTL_BYTES + 24, 0);
        for whole in [
            request(39, 1, &body),
            request(36, 1, &[0; 8]),
            request(40, 1, &[0; 24]),
        ] {
            assert!(parse(&whole).is_some());
            for length in 0..fuse::HEADER_BYTES + 8 {
                assert_eq!(parse(&whole[..length]), None);
            }
        }
        assert_eq!(parse(&[0; 15]), None);
    }

    #[test]
    fn replies_have_the_kernels_sizes() {
        assert_eq!([attributes().len(), done(&[0; 80]).len()], [104, 96]);
        let ready = Ready {
            readable: true,
            writable: false,
            over: true,
        };
        assert_eq!(polled(ready), [0x51, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            wake(2)[..16],
            [24, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
    }
}
