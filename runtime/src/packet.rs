//! Packets: one JSON value and a few descriptors at a time, over a `SOCK_SEQPACKET` Unix socket.
//!
//! Contract: a packet arrives whole or not at all; one that is longer than [`MAX_BYTES`] or carries more than
//! [`MAX_FDS`] descriptors is an error and never a partial value. Received descriptors are close-on-exec and owned.
//! End of file is `Ok(None)`. The blocking functions serve the command line, [`Packets`] serves tokio tasks and may be
//! cancelled at any await without losing a packet.
//! Not here: what the packets mean (`vmm.rs`, `control.rs`, `monitor/`).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use caisson_vmm_spec::MAX_PACKET_BYTES;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

use crate::watched::watch;

/// The longest packet, in bytes of JSON.
pub const MAX_BYTES: usize = MAX_PACKET_BYTES;

/// The most descriptors in one packet; the kernel's own bound is 253.
pub const MAX_FDS: usize = 64;

/// Why a packet could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("{step} a packet")]
    Socket {
        /// `send` or `receive`.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Longer than a packet may be, or with more descriptors.
    #[error("a packet is too large")]
    TooLarge,
    /// Not the JSON that belongs here.
    #[error("a packet is not understood")]
    Syntax(#[source] serde_json::Error),
}

/// A connected pair of blocking packet sockets, both close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one value with descriptors.
pub fn send(
    socket: BorrowedFd<'_>,
    value: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> Result<(), PacketError> {
    send_bytes(socket, &encode(value, fds)?, fds).map_err(sending)
}

/// Receives one value with its descriptors; `None` at the end.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<Option<(T, Vec<OwnedFd>)>, PacketError> {
    let mut buffer = vec![0; MAX_BYTES];
    decode(
        receive_bytes(socket, &mut buffer).map_err(receiving)?,
        &buffer,
    )
}

/// A packet socket for tokio tasks.
#[derive(Debug)]
pub struct Packets(AsyncFd<OwnedFd>);

impl Packets {
    /// Takes over a packet socket; must be called inside a runtime.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(watch(
            socket,
            Interest::READABLE | Interest::WRITABLE,
        )?))
    }

    /// The process on the other side when it connected.
    pub fn peer(&self) -> Option<u32> {
        let peer = rustix::net::sockopt::socket_peercred(self.0.get_ref()).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    /// Sends one value with descriptors, waiting for room.
    pub async fn send(
        &self,
        value: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), PacketError> {
        let bytes = encode(value, fds)?;
        self.0
            .async_io(Interest::WRITABLE, |socket| {
                send_bytes(socket.as_fd(), &bytes, fds)
            })
            .await
            .map_err(sending)
    }

    /// Receives one value with its descriptors; `None` at the end.
    pub async fn receive<T: DeserializeOwned>(
        &self,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, PacketError> {
        let mut buffer = Vec::new();
        let received = self
            .0
            .async_io(Interest::READABLE, |socket| {
                buffer.resize(MAX_BYTES, 0);
                receive_bytes(socket.as_fd(), &mut buffer)
            })
            .await
            .map_err(receiving)?;
        decode(received, &buffer)
    }
}

/// What `recvmsg` reported: bytes, descriptors, and whether something was cut off.
type Received = (usize, Vec<OwnedFd>, bool);

fn encode(value: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<Vec<u8>, PacketError> {
    let bytes = serde_json::to_vec(value).map_err(PacketError::Syntax)?;
    if bytes.len() > MAX_BYTES || fds.len() > MAX_FDS {
        return Err(PacketError::TooLarge);
    }
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(
    (length, fds, cut): Received,
    buffer: &[u8],
) -> Result<Option<(T, Vec<OwnedFd>)>, PacketError> {
    if cut {
        return Err(PacketError::TooLarge);
    }
    match buffer.get(..length) {
        None | Some([]) => Ok(None),
        Some(bytes) => Ok(Some((
            serde_json::from_slice(bytes).map_err(PacketError::Syntax)?,
            fds,
        ))),
    }
}

fn send_bytes(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    })?;
    Ok(())
}

fn receive_bytes(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| {
        recvmsg(
            socket,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    let cut = message
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok((message.bytes, fds, cut))
}

fn sending(source: io::Error) -> PacketError {
    PacketError::Socket {
        step: "send",
        source,
    }
}

fn receiving(source: io::Error) -> PacketError {
    PacketError::Socket {
        step: "receive",
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, io::Seek, io::Write};

    use super::*;

    #[test]
    fn a_value_and_its_descriptors_arrive_together() {
        let (a, b) = pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"contents").unwrap();
        send(a.as_fd(), &vec![1, 2, 3], &[file.as_fd()]).unwrap();
        let (value, mut fds): (Vec<u32>, _) = receive(b.as_fd()).unwrap().unwrap();
        assert_eq!(value, [1, 2, 3]);
        let mut twin = File::from(fds.pop().unwrap());
        assert!(fds.is_empty());
        twin.rewind().unwrap();
        let mut text = String::new();
        twin.read_to_string(&mut text).unwrap();
        assert_eq!(text, "contents");
    }

    #[test]
    fn a_closed_peer_is_the_end_and_not_an_error() {
        let (a, b) = pair().unwrap();
        drop(a);
        assert!(receive::<u32>(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn too_long_packets_are_refused_on_both_sides() {
        let (a, b) = pair().unwrap();
        let long = "x".repeat(MAX_BYTES);
        assert!(matches!(
            send(a.as_fd(), &long, &[]),
            Err(PacketError::TooLarge)
        ));
        let bytes = vec![b'1'; MAX_BYTES + 1];
        rustix::net::send(&a, &bytes, SendFlags::empty()).unwrap();
        assert!(matches!(
            receive::<serde_json::Value>(b.as_fd()),
            Err(PacketError::TooLarge)
        ));
    }

    #[test]
    fn a_packet_that_is_no_json_is_an_error() {
        let (a, b) = pair().unwrap();
        rustix::net::send(&a, b"{", SendFlags::empty()).unwrap();
        assert!(matches!(
            receive::<u32>(b.as_fd()),
            Err(PacketError::Syntax(_))
        ));
    }

    #[tokio::test]
    async fn packets_cross_between_tasks() {
        let (a, b) = pair().unwrap();
        let (a, b) = (Packets::new(a).unwrap(), Packets::new(b).unwrap());
        let (sent, received) = tokio::join!(a.send(&7, &[]), b.receive::<u32>());
        sent.unwrap();
        assert_eq!(received.unwrap().unwrap().0, 7);
        drop(a);
        assert!(b.receive::<u32>().await.unwrap().is_none());
    }
}
