//! A supervisor of system calls (seccomp_unotify(2)), as the runtime finds it at a profile's `listenerPath`.
#![allow(
    unsafe_code,
    reason = "ioctl(2) has no safe wrapper for seccomp's operations"
)]

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

/// Where runtimes bring their listeners.
pub struct Supervisor(UnixListener);

/// The listener of one process's filter.
pub struct Listener {
    fd: OwnedFd,
    /// What the runtime says of the process.
    pub message: Value,
}

/// A system call that waits.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Notification {
    /// Its number for the answer.
    pub id: u64,
    /// Who called.
    pub pid: u32,
    flags: u32,
    /// The call's number.
    pub call: i32,
    arch: u32,
    instruction: u64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// An answer.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    /// The call fails.
    Error(i32),
    /// The call is carried out.
    Continue,
}

#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

impl Supervisor {
    /// Listens at a path.
    pub fn bind(path: &Path) -> Self {
        Self(UnixListener::bind(path).expect("bind"))
    }

    /// The next listener: the one message of a connection.
    pub fn accept(&self) -> Listener {
        let (connection, _) = self.0.accept().expect("accept");
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 8192];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(&mut text)];
        let received = recvmsg(&connection, &mut parts, &mut control, flags).expect("recvmsg");
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Listener {
            fd: fd.expect("no descriptor in the message"),
            message: serde_json::from_slice(&text[..received.bytes]).expect("JSON"),
        }
    }
}

impl Listener {
    /// The next system call that waits; none when no process is under the filter any more.
    pub fn next(&self) -> Option<Notification> {
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        poll(&mut polled, None).expect("poll");
        if !polled[0].revents().contains(PollFlags::IN) {
            return None;
        }
        let mut notification = Notification::default();
        let place = (&raw mut notification).cast();
        self.operate(0xc050_2100, place).ok()?;
        Some(notification)
    }

    /// Whether it still waits.
    pub fn is_valid(&self, notification: &Notification) -> Result<(), Option<i32>> {
        let mut id = notification.id;
        self.operate(0x4008_2102, (&raw mut id).cast())
    }

    /// Answers it.
    pub fn answer(&self, notification: &Notification, answer: Answer) -> Result<(), Option<i32>> {
        let (error, flags) = match answer {
            Answer::Error(number) => (-number, 0),
            Answer::Continue => (0, 1),
        };
        let mut response = Response {
            id: notification.id,
            value: 0,
            error,
            flags,
        };
        self.operate(0xc018_2101, (&raw mut response).cast())
    }

    fn operate(&self, operation: libc::Ioctl, argument: *mut u8) -> Result<(), Option<i32>> {
        // SAFETY: the callers' arguments are the structures that linux/seccomp.h gives for these operations, and live.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), operation, argument) };
        match result {
            0.. => Ok(()),
            _ => Err(std::io::Error::last_os_error().raw_os_error()),
        }
    }
}
