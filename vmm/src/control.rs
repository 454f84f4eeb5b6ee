//! The control socket: requests of the sandbox's owner in, events out; one packet each, at most
//! [`MAX_DESCRIPTORS`] in and one out.
//!
//! Contract: what nobody asked for is sent without waiting ([`Control::send`]) and may be lost; an answer waits for room, for
//! ten seconds at most ([`Control::answer`]), and the last word for a second ([`Control::send_last`]). The owner is trusted, but a packet that is too long or makes no sense is refused, not guessed at.
//! Threads: any thread sends; only the main thread receives.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use caisson_vmm_spec::{Event, MAX_DESCRIPTORS, MAX_PACKET_BYTES, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const LAST_WORD_PATIENCE: Duration = Duration::from_secs(1);
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// A packet could not be received.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("read the control socket")]
    Receive(#[source] io::Error),
    /// Longer than both sides agreed.
    #[error(
        "a request is longer than {MAX_PACKET_BYTES} bytes or carries more than {MAX_DESCRIPTORS} descriptors"
    )]
    TooLong,
    /// Not a [`Request`].
    #[error("a request makes no sense")]
    Nonsense(#[source] serde_json::Error),
}

/// What the owner said.
#[derive(Debug)]
pub enum Heard {
    /// A request, with the descriptors that came with it, in their order.
    Request(Request, Vec<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The owner is gone.
    Closed,
}

/// The VMM's end of the control socket.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Control {
    /// Speaks over this `SOCK_SEQPACKET` socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The next packet, without waiting.
    ///
    /// # Errors
    /// [`ControlError`]; all but `Receive` leave the socket usable.
    pub fn receive(&self) -> Result<Heard, ControlError> {
        let mut bytes = vec![0; MAX_PACKET_BYTES];
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            flags,
        ) {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                return Ok(Heard::Nothing);
            }
            Err(rustix::io::Errno::CONNRESET) => return Ok(Heard::Closed),
            Err(error) => return Err(ControlError::Receive(error.into())),
        };
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
            || fds.len() > MAX_DESCRIPTORS
        {
            return Err(ControlError::TooLong);
        }
        if received.bytes == 0 {
            return Ok(Heard::Closed);
        }
        let request = serde_json::from_slice(&bytes[..received.bytes]);
        Ok(Heard::Request(
            request.map_err(ControlError::Nonsense)?,
            fds,
        ))
    }

    /// Sends an event, with a descriptor if it has one.
    ///
    /// # Errors
    /// `WouldBlock` if the owner does not read, `BrokenPipe` if it is gone.
    pub fn send(&self, event: &Event, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = serde_json::to_vec(event)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.into_iter().collect();
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, flags)?;
        Ok(())
    }

    /// Sends the answer to a request, waiting for an owner that is behind with its reading: the guest can fill the socket with
    /// what it causes.
    ///
    /// # Errors
    /// As [`Control::send`].
    pub fn answer(&self, event: &Event) -> io::Result<()> {
        self.send_within(event, ANSWER_PATIENCE)
    }

    /// Sends the last event, waiting a second at most.
    ///
    /// # Errors
    /// As [`Control::send`].
    pub fn send_last(&self, event: &Event) -> io::Result<()> {
        self.send_within(event, LAST_WORD_PATIENCE)
    }

    fn send_within(&self, event: &Event, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let full = match self.send(event, None) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => error,
                sent => return sent,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(full);
            }
            // Room that there is then may be taken by another thread.
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, send, socketpair};

    use super::*;

    fn pair() -> (Control, OwnedFd) {
        let kind = (
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
        );
        let (ours, theirs) = socketpair(kind.0, kind.1, kind.2, None).unwrap();
        (Control::new(ours), theirs)
    }

    fn say(owner: &OwnedFd, bytes: &[u8]) {
        send(owner, bytes, SendFlags::empty()).unwrap();
    }

    #[test]
    fn requests_are_heard_one_packet_at_a_time() {
        let (control, owner) = pair();
        assert!(matches!(control.receive(), Ok(Heard::Nothing)));
        say(&owner, br#"{"request":"pause"}"#);
        say(&owner, br#"{"request":"connect","port":7}"#);
        let heard = |wanted: &Request| match control.receive() {
            Ok(Heard::Request(request, fds)) => request == *wanted && fds.is_empty(),
            _ => false,
        };
        assert!(heard(&Request::Pause) && heard(&Request::Connect { port: 7 }));
        drop(owner);
        assert!(matches!(control.receive(), Ok(Heard::Closed)));
    }

    #[test]
    fn nonsense_is_refused_and_the_socket_stays_usable() {
        let (control, owner) = pair();
        say(&owner, b"{}");
        assert!(matches!(control.receive(), Err(ControlError::Nonsense(_))));
        say(&owner, &vec![b' '; MAX_PACKET_BYTES + 1]);
        assert!(matches!(control.receive(), Err(ControlError::TooLong)));
        say(&owner, br#"{"request":"stop"}"#);
        assert!(matches!(
            control.receive(),
            Ok(Heard::Request(Request::Stop, _))
        ));
    }

    #[test]
    fn a_descriptor_travels_both_ways() {
        let (control, owner) = pair();
        let (reader, writer) = io::pipe().unwrap();
        control
            .send(
                &Event::Accepted {
                    port: 9,
                    boot: None,
                },
                Some(writer.as_fd()),
            )
            .unwrap();
        drop(writer);
        let owner = Control::new(owner);
        // The owner's side is not a `Control` really, but it receives descriptors the same way.
        assert!(matches!(owner.receive(), Err(ControlError::Nonsense(_))));
        // The descriptor that came with it was closed: the pipe has no writer left.
        assert_eq!(io::read_to_string(reader).unwrap(), "");
    }

    #[test]
    fn an_answer_waits_for_an_owner_that_is_behind() {
        let (control, owner) = pair();
        let accepted = Event::Accepted {
            port: 1,
            boot: None,
        };
        while control.send(&accepted, None).is_ok() {}
        let owner = std::thread::spawn(move || {
            let mut bytes = [0; 256];
            let mut last = Vec::new();
            while let Ok((len @ 1.., _)) = recv(&owner, &mut bytes[..], RecvFlags::empty()) {
                last = bytes[..len].to_vec();
            }
            last
        });
        control.answer(&Event::Paused).unwrap();
        drop(control);
        let last = owner.join().unwrap();
        assert_eq!(last, serde_json::to_vec(&Event::Paused).unwrap());
    }

    #[test]
    fn an_owner_that_does_not_read_cannot_block_the_vm() {
        let (control, _owner) = pair();
        let error = (0..100_000)
            .find_map(|_| control.send(&Event::Paused, None).err())
            .unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
