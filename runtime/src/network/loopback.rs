//! The loopback interface of a pod's network namespace on the host: what connects to it is connected to the guest's.
//!
//! `kubectl port-forward` ends in the engine, which enters the pod's network namespace on this host and connects to
//! 127.0.0.1 or ::1 there. The servers are in the guest. A program of the kernel's socket lookup ([`super::bpf`]) leads
//! every TCP connection to a loopback address of the namespace to a socket of ours; the address that it was meant for is
//! the accepted connection's own.
//!
//! Contract: the agent connects first, in the container's network namespace; then the VMM is given the host's end whole, so
//! that bytes do not pass through this process. Where the agent cannot connect, the host's end is reset. At most
//! [`MOST_DIALLING`] wait for the agent, of each family. The guest can open nothing here: it only answers.
//! Everything is gone with the [`Forwarding`]; if its owner is killed, the kernel sees to that.
//! Not here: UDP; sockets that listen in the namespace on the host, which loopback addresses no longer lead to.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags},
    net::{
        AddressFamily, SocketFlags, SocketType, bind, getsockname, listen, socket_with, sockopt,
    },
};
use tokio::task::JoinSet;

use super::bpf::Lookup;
use crate::{
    accepting::Listening,
    sandbox::{Sandbox, SandboxError},
};

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 128;
/// How many may wait for the guest.
const MOST_DIALLING: usize = 32;

/// Where connections to a namespace's loopback addresses arrive.
#[derive(Debug)]
pub struct Loopback {
    sockets: Vec<OwnedFd>,
    lookup: Lookup,
}

/// The tasks that serve a [`Loopback`]; ended when dropped.
#[derive(Debug)]
pub struct Forwarding {
    _tasks: JoinSet<()>,
    _lookup: Lookup,
}

impl Loopback {
    /// That of the current namespace.
    pub(super) fn open() -> io::Result<Self> {
        let v4 = listening((Ipv4Addr::LOCALHOST, 0).into())?;
        // A kernel without IPv6 has nobody who would connect.
        let v6 = listening((Ipv6Addr::LOCALHOST, 0).into()).ok();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let namespace = rustix::fs::open("/proc/thread-self/ns/net", flags, Mode::empty())?;
        let v6_fd = v6.as_ref().map(AsFd::as_fd);
        let lookup = Lookup::attach(namespace.as_fd(), v4.as_fd(), v6_fd)?;
        let sockets = [Some(v4), v6].into_iter().flatten().collect();
        Ok(Self { sockets, lookup })
    }

    /// Serves it for the container `id`, which has the namespace's counterpart in the guest. Must be called inside a runtime.
    pub fn serve(self, sandbox: &Sandbox, id: &str) -> io::Result<Forwarding> {
        let mut tasks = JoinSet::new();
        for socket in self.sockets {
            let socket = Listening::new(socket)?;
            tasks.spawn(serve(socket, sandbox.clone(), id.to_owned()));
        }
        Ok(Forwarding {
            _tasks: tasks,
            _lookup: self.lookup,
        })
    }
}

/// A listening socket, whether the address is there yet or not.
fn listening(address: SocketAddr) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true)?,
    }
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

async fn serve(mut socket: Listening, sandbox: Sandbox, id: String) {
    let complain = |text: &str| eprintln!("caisson: port-forward to {id}: {text}");
    let mut dialling = JoinSet::new();
    loop {
        tokio::select! {
            accepted = socket.accept(complain), if dialling.len() < MOST_DIALLING => {
                let Some(connection) = accepted else { return };
                let (sandbox, id) = (sandbox.clone(), id.clone());
                dialling.spawn(async move {
                    // The connection's reset is what its maker hears.
                    let _ = forward(connection, &sandbox, &id).await;
                });
            }
            Some(_) = dialling.join_next() => {}
        }
    }
}

/// Connects one connection through, or resets it.
async fn forward(connection: OwnedFd, sandbox: &Sandbox, id: &str) -> Result<(), SandboxError> {
    let reset_when_closed = |reset: bool| {
        let linger = reset.then_some(Duration::ZERO);
        sockopt::set_socket_linger(&connection, linger)
    };
    let prepared = reset_when_closed(true).and_then(|()| getsockname(&connection));
    let address = prepared.and_then(SocketAddr::try_from);
    let address = address.map_err(|errno| SandboxError::Ports(errno.into()))?;
    let port = sandbox.dial(id, address).await?;
    reset_when_closed(false).map_err(|errno| SandboxError::Ports(errno.into()))?;
    sandbox.connect(port, connection).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[tokio::test]
    async fn an_accepted_connection_knows_what_it_was_meant_for() {
        let socket = listening((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let at = SocketAddr::try_from(getsockname(&socket).unwrap()).unwrap();
        let maker = TcpStream::connect(at).unwrap();
        let mut socket = Listening::new(socket).unwrap();
        let accepted = socket.accept(|text| panic!("{text}")).await;
        let meant = getsockname(accepted.unwrap()).unwrap();
        assert_eq!(SocketAddr::try_from(meant).unwrap(), at);
        drop(maker);
    }

    #[test]
    fn an_address_that_is_not_there_can_be_listened_on() {
        let nowhere = Ipv4Addr::new(192, 0, 2, 1);
        assert!(listening((nowhere, 0).into()).is_ok());
    }
}
