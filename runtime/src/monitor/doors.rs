//! Listening sockets that systemd has passed: each connection is accepted here and handed into the guest whole.
//!
//! The bytes do not pass through this process: the VMM is given the accepted socket, and joins it to a vsock port on
//! which the agent listens.

use std::os::fd::OwnedFd;

use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;

use crate::{sandbox::Sandbox, watched::watch};

/// A listening socket of the host.
#[derive(Debug)]
pub(super) struct Door {
    /// The socket.
    pub(super) socket: OwnedFd,
    /// Where its connections go: a vsock port of the guest.
    pub(super) port: u32,
}

impl Door {
    /// Serves until the sandbox ends.
    pub(super) async fn serve(self, sandbox: Sandbox) {
        let Self { socket, port } = self;
        let Ok(socket) = rustix::io::ioctl_fionbio(&socket, true)
            .map_err(Into::into)
            .and_then(|()| watch(socket, Interest::READABLE))
        else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            let accepted = socket.async_io(Interest::READABLE, |fd| Ok(accept_with(fd, flags)?));
            match accepted.await {
                Ok(connection) => {
                    if sandbox.connect(port, connection).await.is_err() {
                        return;
                    }
                }
                // The peer has gone before it was its turn.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
                Err(_) => return,
            }
        }
    }
}
