//! The kernel's operations on a seccomp listener (linux/seccomp.h), each one ioctl.
#![allow(unsafe_code, reason = "ioctl(2) has no safe wrapper for these")]

use caisson_agent_api::supervision::{Notification, Response};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};

const RECEIVE: libc::Ioctl = 0xc050_2100; // _IOWR('!', 0, struct seccomp_notif)
const SEND: libc::Ioctl = 0xc018_2101; // _IOWR('!', 1, struct seccomp_notif_resp)
const ID_VALID: libc::Ioctl = 0x4008_2102; // _IOW('!', 2, __u64)

const fn check(result: libc::c_int, errno: Errno) -> Result<(), Errno> {
    if result < 0 { Err(errno) } else { Ok(()) }
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The next notification; waits for it.
pub(super) fn receive(listener: &OwnedFd) -> Result<Notification, Errno> {
    let mut bytes = [0_u64; Notification::BYTES / 8];
    // SAFETY: the operation reads and writes the 80 bytes of a `struct seccomp_notif`, which `bytes` has, aligned for it.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, bytes.as_mut_ptr()) };
    check(result, last())?;
    let mut notification = [0; Notification::BYTES];
    for (to, from) in notification.as_chunks_mut::<8>().0.iter_mut().zip(bytes) {
        *to = from.to_le_bytes();
    }
    Ok(Notification::new(notification))
}

/// Answers one.
pub(super) fn respond(listener: &OwnedFd, response: &Response) -> Result<(), Errno> {
    let (words, _) = response.bytes().as_chunks::<8>();
    let words: [u64; Response::BYTES / 8] =
        std::array::from_fn(|at| words.get(at).map_or(0, |word| u64::from_le_bytes(*word)));
    // SAFETY: the operation reads the 24 bytes of a `struct seccomp_notif_resp`, which `words` has, aligned for it.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), SEND, words.as_ptr()) };
    check(result, last())
}

/// Whether one still waits for its answer.
pub(super) fn is_valid(listener: &OwnedFd, id: u64) -> Result<(), Errno> {
    // SAFETY: the operation reads the eight bytes of `id`.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), ID_VALID, &raw const id) };
    check(result, last())
}
