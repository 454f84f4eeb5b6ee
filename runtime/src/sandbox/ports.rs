//! One-time vsock ports on which the guest's agent dials the host, one for each stream.
//!
//! Contract: a port is valid for one connection and then forgotten; a port that nobody waits for is refused by closing
//! the connection. Numbers are drawn from the kernel's random source, so that a process in the guest can neither guess
//! nor take over the stream of another.

use std::{collections::HashMap, io, os::fd::OwnedFd};

use tokio::sync::oneshot;

/// Ports below this one have fixed meanings.
const FIRST: u32 = 1 << 16;

/// The ports that are being waited for.
#[derive(Debug, Default)]
pub(super) struct Ports {
    expected: HashMap<u32, oneshot::Sender<OwnedFd>>,
}

impl Ports {
    /// Opens a port and answers where its connection will appear. Dropping the receiver closes the port.
    pub(super) fn open(&mut self) -> io::Result<(u32, oneshot::Receiver<OwnedFd>)> {
        self.expected.retain(|_, waiting| !waiting.is_closed());
        loop {
            let port = random()?;
            if port >= FIRST && port != u32::MAX && !self.expected.contains_key(&port) {
                let (sender, receiver) = oneshot::channel();
                self.expected.insert(port, sender);
                return Ok((port, receiver));
            }
        }
    }

    /// Hands a connection to whoever waits for its port; a stray one is closed. Says whether someone waited.
    pub(super) fn arrive(&mut self, port: u32, stream: OwnedFd) -> bool {
        self.expected
            .remove(&port)
            .is_some_and(|waiting| waiting.send(stream).is_ok())
    }
}

fn random() -> io::Result<u32> {
    let mut bytes = [0_u8; 4];
    // Four bytes are never cut short once the kernel's random source is ready.
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> OwnedFd {
        crate::packet::pair().unwrap().0
    }

    #[test]
    fn a_port_serves_one_connection() {
        let mut ports = Ports::default();
        let (port, mut receiver) = ports.open().unwrap();
        assert!(ports.arrive(port, stream()));
        assert!(receiver.try_recv().is_ok());
        assert!(!ports.arrive(port, stream()));
    }

    #[test]
    fn a_port_that_nobody_opened_is_refused() {
        let mut ports = Ports::default();
        let (port, _receiver) = ports.open().unwrap();
        assert!(!ports.arrive(port ^ 1, stream()));
        assert!(!ports.arrive(1024, stream()));
    }

    #[test]
    fn a_port_closes_with_its_receiver() {
        let mut ports = Ports::default();
        let (port, receiver) = ports.open().unwrap();
        drop(receiver);
        assert!(!ports.arrive(port, stream()));
        let abandoned = ports.open().unwrap();
        drop(abandoned);
        let _kept = ports.open().unwrap();
        assert_eq!(ports.expected.len(), 1);
    }

    #[test]
    fn open_ports_differ() {
        let mut ports = Ports::default();
        let mut open: Vec<_> = (0..100).map(|_| ports.open().unwrap()).collect();
        open.sort_by_key(|(port, _)| *port);
        open.dedup_by_key(|(port, _)| *port);
        assert_eq!(open.len(), 100);
        assert!(open.iter().all(|(port, _)| *port >= FIRST));
    }
}
