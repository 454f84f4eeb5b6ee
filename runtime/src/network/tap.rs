//! A tap in the current network namespace: the host's end of one of the guest's interfaces.
//!
//! Contract: the tap is there as long as a descriptor of it is, and gets [`TAP_PREFIX`] and a number for its name.

#![allow(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{Mode, OFlags},
    ioctl::{Opcode, Updater, ioctl},
};

use super::view::TAP_PREFIX;

/// `_IOW('T', 202, int)`.
const TUNSETIFF: Opcode = 0x4004_54ca;
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// `struct ifreq` as TUNSETIFF takes it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: [u8; 2],
    unused: [u8; 22],
}

/// A tap.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) file: OwnedFd,
    /// The interface's number.
    pub(super) index: u32,
}

impl Tap {
    /// A new one in the current namespace, non-blocking.
    pub(super) fn make() -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
        let mut request = Request {
            name: [0; libc::IFNAMSIZ],
            flags: u16::try_from(FLAGS).unwrap_or_default().to_ne_bytes(),
            unused: [0; 22],
        };
        let pattern = format!("{TAP_PREFIX}%d");
        request.name[..pattern.len()].copy_from_slice(pattern.as_bytes());
        // SAFETY: TUNSETIFF reads and writes a struct ifreq, 40 bytes, which `Request` is in size and layout.
        let update = unsafe { Updater::<TUNSETIFF, Request>::new(&mut request) };
        // SAFETY: the updater above describes this ioctl.
        unsafe { ioctl(file.as_fd(), update) }?;
        let name = String::from_utf8_lossy(&request.name);
        // Any socket will do to ask for an interface's number.
        let any = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::DGRAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )?;
        let index = rustix::net::netdevice::name_to_index(&any, name.trim_end_matches('\0'))?;
        Ok(Self { file, index })
    }
}
