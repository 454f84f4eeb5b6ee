//! Connections of the host to a container's loopback interface: `kubectl port-forward`.
//!
//! Contract: a connection is made in the container's network namespace, and answered for, before the host hands its own
//! end in; then bytes and their end are passed on both ways. At most [`MOST`] at once. They end with the [`Loopback`].
//! Not here: who asks for them on the host (the runtime).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use caisson_agent_api::DialLoopbackRequest;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, connect, socket_with};
use tokio::io::Interest;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{NetworkError, Resident, inside};
use crate::socket::Socket;
use crate::stdio::both_ways;

/// How many connections there may be.
const MOST: usize = 256;
/// How long a server may take to take a connection: half of what the host gives its calls.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the host may take to fetch one that is made.
const FETCH: Duration = Duration::from_secs(60);

/// The connections.
#[derive(Default)]
pub(crate) struct Loopback(Mutex<JoinSet<()>>);

impl Loopback {
    /// Connects where the host says, and waits for it at the vsock port that it says.
    pub(crate) async fn dial(
        &self,
        resident: Resident<'_>,
        request: &DialLoopbackRequest,
    ) -> Result<(), NetworkError> {
        let port = request.port;
        let failed = |source| NetworkError::Dial { port, source };
        let to = address(request).map_err(failed)?;
        let inner = match connection(resident, to).await? {
            // Names are not resolved here, but this address is what the name `localhost` became.
            Err(error) if refused(&error) && to.ip() == Ipv4Addr::LOCALHOST => {
                let other = SocketAddr::from((Ipv6Addr::LOCALHOST, to.port()));
                // The first error is the one to report.
                connection(resident, other).await?.or(Err(error))
            }
            made => made,
        };
        let inner = inner.map_err(failed)?;
        self.offer(request.vsock_port, inner).map_err(failed)
    }

    /// Waits for the host to fetch a connection.
    fn offer(&self, vsock_port: u32, inner: OwnedFd) -> io::Result<()> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while running.try_join_next().is_some() {}
        if running.len() >= MOST {
            return Err(Errno::MFILE.into());
        }
        let outer = crate::sys::listen_vsock(vsock_port, 1)?;
        let outer = crate::sys::watch(outer, Interest::READABLE)?;
        running.spawn(async move {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fetched = outer.async_io(Interest::READABLE, |fd| Ok(accept_with(fd, flags)?));
            if let Ok(Ok(host)) = timeout(FETCH, fetched).await {
                drop(outer);
                let _ = both_ways(host, inner).await;
            }
        });
        Ok(())
    }
}

fn refused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

fn address(request: &DialLoopbackRequest) -> io::Result<SocketAddr> {
    let port = u16::try_from(request.port).map_err(io::Error::other)?;
    let bytes = request.address.as_slice();
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let address = v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
    Ok((address.map_err(io::Error::other)?, port).into())
}

/// A connection of the container's.
async fn connection(
    resident: Resident<'_>,
    to: SocketAddr,
) -> Result<io::Result<OwnedFd>, NetworkError> {
    let begun = inside(resident, || begin(to))?;
    let made = async { connected(begun?).await };
    let late = |_| Err(io::ErrorKind::TimedOut.into());
    Ok(timeout(ANSWER, made).await.unwrap_or_else(late))
}

/// A connection that is made or being made, of the current network namespace.
fn begin(to: SocketAddr) -> io::Result<OwnedFd> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno.into()),
    }
}

async fn connected(connecting: OwnedFd) -> io::Result<OwnedFd> {
    Ok(Socket::connected(connecting).await?.into_fd().into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn request(address: &[u8], port: u32) -> DialLoopbackRequest {
        DialLoopbackRequest {
            address: address.to_vec(),
            port,
            ..Default::default()
        }
    }

    #[test]
    fn addresses_have_four_or_sixteen_bytes_and_a_port() {
        let text = |bytes: &[u8], port| address(&request(bytes, port)).unwrap().to_string();
        assert_eq!(text(&[127, 0, 0, 2], 80), "127.0.0.2:80");
        let v6 = Ipv6Addr::LOCALHOST.octets();
        assert_eq!(text(&v6, 65_535), "[::1]:65535");
        for (bytes, port) in [(&[127, 0, 0][..], 80), (&[], 80), (&v6, 65_536)] {
            assert!(address(&request(bytes, port)).is_err());
        }
    }

    #[tokio::test]
    async fn a_server_is_reached_and_a_closed_port_refuses() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = server.local_addr().unwrap();
        connected(begin(at).unwrap()).await.unwrap();
        drop(server);
        let error = match begin(at) {
            Ok(connecting) => connected(connecting).await.unwrap_err(),
            Err(error) => error,
        };
        assert!(refused(&error), "{error}");
    }
}
