//! Connections to the host: a stream to a numbered port, whatever carries it.
//!
//! Contract: [`Dial::connect`] begins to connect and does not block; [`Socket::connected`] finishes it. A [`Socket`]
//! reads and writes without blocking the one thread of the agent.

use rustix::io::{Errno, read, write};
use rustix::net::Shutdown;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::watch;

/// A way to the host's ports: virtio-vsock, and in tests Unix sockets.
pub trait Dial: Send + Sync + 'static {
    /// A non-blocking stream socket, connected or about to be.
    fn connect(&self, port: u32) -> io::Result<OwnedFd>;
}

/// A connection to the host.
pub struct Socket {
    fd: AsyncFd<OwnedFd>,
    /// Told when the host has closed the connection.
    closed: Option<watch::Sender<bool>>,
}

impl Socket {
    /// Waits until the connection is made.
    pub async fn connected(connecting: OwnedFd) -> io::Result<Self> {
        let fd = crate::sys::watch(connecting, Interest::READABLE | Interest::WRITABLE)?;
        drop(fd.writable().await?);
        rustix::net::sockopt::socket_error(fd.get_ref())??;
        Ok(Self { fd, closed: None })
    }

    /// The notice of the connection's end.
    pub fn on_close(&mut self) -> watch::Receiver<bool> {
        let (sender, receiver) = watch::channel(false);
        self.closed = Some(sender);
        receiver
    }

    /// The descriptor, for loops of their own.
    pub(crate) fn into_fd(self) -> AsyncFd<OwnedFd> {
        self.fd
    }
}

/// Tells the host that nothing more comes.
pub(crate) fn finish_writing(socket: &AsyncFd<OwnedFd>) {
    // An already closed connection is just as finished.
    let _ = rustix::net::shutdown(socket.get_ref(), Shutdown::Write);
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let mut guard = ready!(this.fd.poll_read_ready(cx))?;
            let result = guard.try_io(|fd| Ok(read(fd, buf.initialize_unfilled())?));
            let Ok(result) = result else { continue };
            match result {
                Ok(n) if n > 0 => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                ended => {
                    if let Some(closed) = &this.closed {
                        closed.send_replace(true);
                    }
                    return Poll::Ready(ended.map(drop));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(write(fd, buf)?)) {
                Ok(Err(e)) if e.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        finish_writing(&self.fd);
        Poll::Ready(Ok(()))
    }
}
