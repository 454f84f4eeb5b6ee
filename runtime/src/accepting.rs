//! Listening sockets that are served for as long as their owner lives.
//!
//! Contract: a connection that cannot be accepted ends nothing. What the host has too little of is waited for, with
//! [`PAUSE`] between two attempts, and said once until it works again. Only a descriptor that can never accept is the end.
//! Not here: where connections lead (`monitor/doors.rs`, `network/loopback.rs`).

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    io::Errno,
    net::{SocketFlags, accept_with},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::watched::watch;

/// How long a host that has no descriptors or no memory left has until the next attempt.
const PAUSE: Duration = Duration::from_millis(200);

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listening {
    socket: AsyncFd<OwnedFd>,
    /// The last attempt has failed, and it has been said.
    fails: bool,
}

/// What an attempt has failed for.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// Its maker has gone before it was its turn.
    Connection,
    /// It may work later.
    Host,
    /// It never works.
    Socket,
}

impl Listening {
    /// Takes over a socket that does not block. Must be called inside a runtime.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = watch(socket, Interest::READABLE)?;
        Ok(Self {
            socket,
            fails: false,
        })
    }

    /// The next connection; none will ever come: `None`. Loses none when it is cancelled.
    pub(crate) async fn accept(&mut self, complain: impl Fn(&str)) -> Option<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            let accepted = self
                .socket
                .async_io(Interest::READABLE, |fd| Ok(accept_with(fd, flags)?));
            let error = match accepted.await {
                Ok(connection) => {
                    self.fails = false;
                    return Some(connection);
                }
                Err(error) => error,
            };
            match fault(&error) {
                Fault::Connection => {}
                Fault::Host => {
                    if !std::mem::replace(&mut self.fails, true) {
                        complain(&format!("connections have to wait: {error}"));
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                Fault::Socket => {
                    complain(&format!("no more connections: {error}"));
                    return None;
                }
            }
        }
    }
}

fn fault(error: &io::Error) -> Fault {
    match Errno::from_io_error(error) {
        Some(Errno::CONNABORTED) => Fault::Connection,
        Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK) => Fault::Socket,
        _ => Fault::Host,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::RefCell,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn only_a_descriptor_that_can_never_accept_is_the_end() {
        let of = |errno: Errno| fault(&errno.into());
        assert_eq!(of(Errno::CONNABORTED), Fault::Connection);
        for errno in [Errno::BADF, Errno::INVAL, Errno::NOTSOCK] {
            assert_eq!(of(errno), Fault::Socket);
        }
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::PERM] {
            assert_eq!(of(errno), Fault::Host);
        }
    }

    #[tokio::test]
    async fn connections_are_accepted_and_what_does_not_listen_is_complained_of() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let _maker = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let said = RefCell::new(Vec::new());
        let complain = |text: &str| said.borrow_mut().push(text.to_owned());
        let mut listening = Listening::new(listener.into()).unwrap();
        assert!(listening.accept(complain).await.is_some());
        assert!(said.borrow().is_empty());
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        one.shutdown(std::net::Shutdown::Both).unwrap();
        let mut deaf = Listening::new(one.into()).unwrap();
        assert!(deaf.accept(complain).await.is_none());
        assert_eq!(said.borrow().len(), 1);
    }
}
