//! One-time vsock ports on which the guest's agent dials the host, one for each stream.
//!
//! Contract: a port is valid for one connection and then forgotten; a port that nobody waits for is refused by closing
//! the connection. Numbers are drawn from the kernel's random source, so that a process in the guest can neither guess
//! nor take over the stream of another.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::fd::OwnedFd,
    time::Duration,
};

use tokio::sync::oneshot;

use super::{SandboxError, Streams, Wanted};
use crate::{
    agent::{AgentError, StreamPorts},
    supervision::Handover,
};

/// Ports below this one have fixed meanings.
const FIRST: u32 = 1 << 16;

/// How long the streams that the agent dialled may take to arrive after its answer: they were accepted before it.
const STREAMS_ARRIVE: Duration = Duration::from_secs(10);

/// The ports that are being waited for.
#[derive(Debug, Default)]
pub(super) struct Ports {
    expected: HashMap<u32, oneshot::Sender<OwnedFd>>,
}

impl Ports {
    /// Opens a port and answers where its connection will appear. Dropping the receiver closes the port.
    pub(super) fn open(&mut self) -> io::Result<(u32, oneshot::Receiver<OwnedFd>)> {
        let (sender, receiver) = oneshot::channel();
        Ok((self.open_to(sender)?, receiver))
    }

    /// Opens a port whose connection goes to `sender`.
    fn open_to(&mut self, sender: Handover) -> io::Result<u32> {
        self.expected.retain(|_, waiting| !waiting.is_closed());
        loop {
            if let Entry::Vacant(free) = self.expected.entry(random()?) {
                let port = *free.key();
                free.insert(sender);
                return Ok(port);
            }
        }
    }

    /// Opens one port for each stream that is wanted.
    pub(super) fn open_all(
        &mut self,
        wanted: Wanted,
        seccomp: Option<Handover>,
    ) -> Result<(StreamPorts, Arriving), SandboxError> {
        let mut ports = StreamPorts::default();
        if let Some(handover) = seccomp {
            ports.seccomp = self.open_to(handover).map_err(SandboxError::Ports)?;
        }
        let mut arriving = Arriving::default();
        let mut open = || self.open().map_err(SandboxError::Ports);
        let plain = [
            (wanted.stdin, &mut ports.stdin, &mut arriving.stdin),
            (wanted.stdout, &mut ports.stdout, &mut arriving.stdout),
            (wanted.stderr, &mut ports.stderr, &mut arriving.stderr),
            (wanted.resolver, &mut ports.resolver, &mut arriving.resolver),
        ];
        for (wanted, port, stream) in plain {
            if wanted {
                let (number, receiver) = open()?;
                *port = number;
                *stream = Some(receiver);
            }
        }
        for _ in 0..wanted.preserved {
            let (number, receiver) = open()?;
            ports.preserved.push(number);
            arriving.preserved.push(receiver);
        }
        Ok((ports, arriving))
    }

    /// Hands a connection to whoever waits for its port; a stray one is closed. Says whether someone waited.
    pub(super) fn arrive(&mut self, port: u32, stream: OwnedFd) -> bool {
        self.expected
            .remove(&port)
            .is_some_and(|waiting| waiting.send(stream).is_ok())
    }
}

/// Streams that the agent has been asked to connect.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    stdin: Option<oneshot::Receiver<OwnedFd>>,
    stdout: Option<oneshot::Receiver<OwnedFd>>,
    stderr: Option<oneshot::Receiver<OwnedFd>>,
    resolver: Option<oneshot::Receiver<OwnedFd>>,
    preserved: Vec<oneshot::Receiver<OwnedFd>>,
}

impl Arriving {
    /// Waits until all are there.
    pub(super) async fn connected(self) -> Result<Streams, SandboxError> {
        let all = async {
            let mut streams = Streams {
                stdin: arrived(self.stdin).await?,
                stdout: arrived(self.stdout).await?,
                stderr: arrived(self.stderr).await?,
                resolver: arrived(self.resolver).await?,
                preserved: Vec::new(),
            };
            for receiver in self.preserved {
                streams.preserved.extend(arrived(Some(receiver)).await?);
            }
            Ok(streams)
        };
        tokio::time::timeout(STREAMS_ARRIVE, all)
            .await
            .unwrap_or(Err(SandboxError::Streams))
    }
}

async fn arrived(
    stream: Option<oneshot::Receiver<OwnedFd>>,
) -> Result<Option<OwnedFd>, SandboxError> {
    match stream {
        None => Ok(None),
        // The sender goes away only with the owner.
        Some(stream) => stream.await.map(Some).map_err(|_| AgentError::Gone.into()),
    }
}

/// A port without a fixed meaning, of the host or of the guest.
pub(super) fn random() -> io::Result<u32> {
    loop {
        let mut bytes = [0_u8; 4];
        // Four bytes are never cut short once the kernel's random source is ready.
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        let port = u32::from_ne_bytes(bytes);
        if (FIRST..u32::MAX).contains(&port) {
            return Ok(port);
        }
    }
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
