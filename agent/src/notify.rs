//! The socket on which a container says that it is ready: sd_notify(3).
//!
//! Contract: made before the container is set up, which bind-mounts its directory; removed with the value. As in runc,
//! only `READY=` counts.

use caisson_agent_api::{NOTIFY_DIRECTORY, NOTIFY_SOCKET};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// As much of a message as is looked at.
const MAX_BYTES: usize = 4096;

/// A container's notify socket.
pub(crate) struct Notify {
    directory: PathBuf,
    socket: AsyncFd<std::os::fd::OwnedFd>,
}

impl Notify {
    /// Makes the socket; anybody in the container may write to it.
    pub(crate) fn open(container: &str) -> io::Result<Self> {
        let directory = Path::new(NOTIFY_DIRECTORY).join(container);
        fs::create_dir_all(&directory)?;
        let path = directory.join(NOTIFY_SOCKET);
        let socket = UnixDatagram::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
        socket.set_nonblocking(true)?;
        let socket = crate::sys::watch(socket.into(), Interest::READABLE)?;
        Ok(Self { directory, socket })
    }

    /// Waits until the container is ready.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        loop {
            let mut text = [0; MAX_BYTES];
            let received = self.socket.async_io(Interest::READABLE, |fd| {
                Ok(rustix::io::read(fd, &mut text)?)
            });
            let n = received.await?;
            if is_ready(&text[..n]) {
                return Ok(());
            }
        }
    }
}

impl Drop for Notify {
    fn drop(&mut self) {
        // It lives in the guest's memory; what is left of it ends with the guest.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn is_ready(message: &[u8]) -> bool {
    message
        .split(|b| *b == b'\n')
        .any(|line| line.starts_with(b"READY="))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_may_stand_on_any_line() {
        assert!(is_ready(b"READY=1") && is_ready(b"STATUS=up\nREADY=1\n"));
        assert!(!is_ready(b"") && !is_ready(b"STATUS=READY=1") && !is_ready(b"WATCHDOG=1\n"));
    }
}
