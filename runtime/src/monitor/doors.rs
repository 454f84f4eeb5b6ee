//! Listening sockets that systemd has passed: each connection is accepted here and handed into the guest whole.
//!
//! The bytes do not pass through this process: the VMM is given the accepted socket, and joins it to a vsock port on
//! which the agent listens.

use std::{os::fd::OwnedFd, sync::Arc};

use crate::{accepting::Listening, log::Log, sandbox::Sandbox};

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
    pub(super) async fn serve(self, sandbox: Sandbox, log: Option<Arc<Log>>) {
        let Self { socket, port } = self;
        let complain = |text: &str| log.iter().for_each(|log| log.warning(text));
        let listening = rustix::io::ioctl_fionbio(&socket, true)
            .map_err(Into::into)
            .and_then(|()| Listening::new(socket));
        let mut listening = match listening {
            Ok(listening) => listening,
            Err(error) => return complain(&format!("accept connections: {error}")),
        };
        while let Some(connection) = listening.accept(complain).await {
            if sandbox.connect(port, connection).await.is_err() {
                return;
            }
        }
    }
}
