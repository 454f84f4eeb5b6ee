//! Sockets that listen on the host, served in the guest: socket activation.
//!
//! Contract: the process is given a listening socket of the same family as the host's. Each connection that the host
//! hands in (to a vsock port of its choice) becomes a connection to that socket, bytes and their end are passed on both
//! ways. The inner socket belongs to the agent's network namespace, as a socket of systemd's belongs to the host's: it is
//! in nobody's way in the container's. When the process has closed it, connections are closed.
//! Not here: accepting on the host (the runtime).

use crate::stdio::both_ways;
use caisson_agent_api::{Family, Listening};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with, sockopt,
};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;

/// How many connections may wait: the most that the kernel allows by default.
const BACKLOG: i32 = 4096;

/// Where an inner socket listens.
#[derive(Debug, Clone)]
enum Address {
    Internet(SocketAddr),
    Unix(SocketAddrUnix),
}

impl Address {
    fn of(container: &str, listening: &Listening) -> io::Result<Self> {
        let port = u16::try_from(listening.port).map_err(io::Error::other)?;
        let family = listening.family.enum_value();
        Ok(
            match family.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))? {
                Family::INET => Self::Internet((Ipv4Addr::LOCALHOST, port).into()),
                Family::INET6 => Self::Internet((Ipv6Addr::LOCALHOST, port).into()),
                Family::UNIX => {
                    // As many bytes as an address holds; the number keeps it unique.
                    let name: String = container.chars().take(64).collect();
                    let name = format!("caisson/{}/{name}", listening.vsock_port);
                    Self::Unix(SocketAddrUnix::new_abstract_name(name.as_bytes())?)
                }
            },
        )
    }

    fn socket(&self, flags: SocketFlags) -> io::Result<OwnedFd> {
        let family = match self {
            Self::Internet(SocketAddr::V4(_)) => AddressFamily::INET,
            Self::Internet(SocketAddr::V6(_)) => AddressFamily::INET6,
            Self::Unix(_) => AddressFamily::UNIX,
        };
        let flags = flags | SocketFlags::CLOEXEC;
        Ok(socket_with(family, SocketType::STREAM, flags, None)?)
    }

    fn listen(&self) -> io::Result<OwnedFd> {
        let socket = self.socket(SocketFlags::empty())?;
        match self {
            Self::Internet(address) => {
                sockopt::set_socket_reuseaddr(&socket, true)?;
                bind(&socket, address)?;
            }
            Self::Unix(address) => bind(&socket, address)?,
        }
        listen(&socket, BACKLOG)?;
        Ok(socket)
    }

    /// A connection that is made or being made.
    fn connect(&self) -> io::Result<OwnedFd> {
        let socket = self.socket(SocketFlags::NONBLOCK)?;
        let connecting = match self {
            Self::Internet(address) => connect(&socket, address),
            Self::Unix(address) => connect(&socket, address),
        };
        match connecting {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Puts listening sockets in the place of a process's descriptors, and serves them for as long as the result lives.
pub(crate) fn open(
    container: &str,
    all: &[Listening],
    preserved: &mut [OwnedFd],
) -> io::Result<JoinSet<()>> {
    let mut doors = JoinSet::new();
    for listening in all {
        let address = Address::of(container, listening)?;
        let place = usize::try_from(listening.index)
            .ok()
            .and_then(|index| preserved.get_mut(index))
            .ok_or(io::ErrorKind::InvalidInput)?;
        // The process holds the only copy: once it is closed there, nobody can connect any more.
        *place = address.listen()?;
        let outer = crate::sys::listen_vsock(listening.vsock_port, BACKLOG)?;
        doors.spawn(serve(
            crate::sys::watch(outer, Interest::READABLE)?,
            address,
        ));
    }
    Ok(doors)
}

async fn serve(outer: AsyncFd<OwnedFd>, address: Address) {
    let mut connections = JoinSet::new();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        tokio::select! {
            accepted = outer.async_io(Interest::READABLE, |fd| Ok(accept_with(fd, flags)?)) => match accepted {
                Ok(host) => drop(connections.spawn(one(host, address.clone()))),
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => return crate::kmsg::error(&format!("accept a connection of the host: {e}")),
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection. What cannot be connected is closed, and so the host's peer learns of it.
async fn one(host: OwnedFd, address: Address) {
    if let Ok(inner) = address.connect() {
        let _ = both_ways(host, inner).await;
    }
}
