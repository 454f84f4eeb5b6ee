//! The control socket between the agent and its child: packets of JSON up, one byte down.
//!
//! Contract: the socket closes at execve, which is how the agent learns that execve succeeded; a failure comes as
//! [`FromChild::Failed`] before. Only read(2) and write(2) are used once the container's seccomp filter may be loaded.

use super::ChildError;
use rustix::io::{Errno, read, write};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The longest packet, in bytes; longer error texts are cut.
pub const MAX_MESSAGE_BYTES: usize = 16 << 10;

/// What the child tells the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromChild {
    /// The process's identifier in the guest's root PID namespace.
    Pid(i32),
    /// The terminal's master side is attached.
    Terminal,
    /// Init is in its network namespace and waits for the network there.
    Network,
    /// Its seccomp filter has a listener, with this number; it waits until that is attended to. A number, because what
    /// sends descriptors may be what the filter stops.
    Listener(i32),
    /// Init is set up and waits to be started.
    Ready,
    /// A step failed; the process ends.
    Failed(String),
}

/// The child's end.
pub(super) struct Control(OwnedFd);

impl Control {
    pub(super) const fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(super) fn duplicate(&self) -> io::Result<Self> {
        Ok(Self(rustix::io::fcntl_dupfd_cloexec(&self.0, super::HIGH)?))
    }

    /// Sends a message. An agent that is gone reads nothing: that shows in [`Control::wait`].
    pub(super) fn send(&self, message: &FromChild) {
        let mut text = serde_json::to_vec(message).unwrap_or_default();
        if text.len() > MAX_MESSAGE_BYTES {
            text = serde_json::to_vec(&FromChild::Failed("error message too long".to_owned()))
                .unwrap_or_default();
        }
        let _ = write(&self.0, &text);
    }

    /// Sends the terminal's master side.
    pub(super) fn send_terminal(&self, master: BorrowedFd<'_>) -> io::Result<()> {
        let text = serde_json::to_vec(&FromChild::Terminal)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [master];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(
            self.0.as_fd(),
            &[IoSlice::new(&text)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Waits for the agent's permission to go on.
    pub(super) fn wait(&self) -> Result<(), ChildError> {
        let mut byte = [0];
        loop {
            match read(&self.0, &mut byte) {
                Ok(1) => return Ok(()),
                Err(Errno::INTR) => {}
                _ => return Err(ChildError::AgentGone),
            }
        }
    }
}
