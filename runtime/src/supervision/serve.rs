//! The task that serves a listener's file: the device on one side, the guest's stream on the other.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    time::Instant,
};

use caisson_agent_api::supervision::{TO_HOST_BYTES, ToHost};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
    sync::oneshot,
};

use super::{
    session::{Effect, Nonsense, Session},
    wire,
};
use crate::fuse;

/// Where the guest is.
enum Guest {
    /// It has no listener yet.
    Awaited(oneshot::Receiver<StdStream>),
    Live(Line),
    Gone,
}

/// The stream to the guest.
struct Line {
    stream: UnixStream,
    /// The beginning of a frame.
    received: Vec<u8>,
    /// What it has not taken yet. The session says no more than it may.
    unsent: Vec<u8>,
}

impl Line {
    fn over(stream: StdStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: UnixStream::from_std(stream)?,
            received: Vec::new(),
            unsent: Vec::new(),
        })
    }

    /// Waits until the guest has said something, and sends what there is to send; answers what it said. An error is its end.
    async fn exchange(&mut self) -> io::Result<Vec<ToHost>> {
        let interest = match self.unsent.is_empty() {
            true => Interest::READABLE,
            false => Interest::READABLE | Interest::WRITABLE,
        };
        let ready = self.stream.ready(interest).await?;
        if ready.is_writable() && !self.unsent.is_empty() {
            match self.stream.try_write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if !ready.is_readable() {
            return Ok(Vec::new());
        }
        let mut bytes = [0; 16 * TO_HOST_BYTES];
        match self.stream.try_read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => self
                .received
                .extend(bytes.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let (frames, rest) = self.received.as_chunks::<TO_HOST_BYTES>();
        let said: Option<Vec<_>> = frames.iter().map(ToHost::parse).collect();
        let rest = rest.to_vec();
        self.received = rest;
        said.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Serves until nobody has the file any more.
pub(super) async fn serve(device: AsyncFd<OwnedFd>, guest: oneshot::Receiver<StdStream>) {
    let mut session = Session::default();
    let mut guest = Guest::Awaited(guest);
    loop {
        let deadline = session.deadline();
        let went_on = tokio::select! {
            requests = fuse::requests(&device, wire::parse) => match requests {
                Some(requests) => {
                    let now = Instant::now();
                    requests.into_iter().for_each(|one| session.requested(one, now));
                    true
                }
                None => return,
            },
            heard = hear(&mut guest) => match heard {
                Ok(said) => said.into_iter().try_for_each(|one| session.told(one)).is_ok(),
                Err(_) => false,
            },
            () = until(deadline) => {
                session.waited(Instant::now());
                true
            }
        };
        if !went_on {
            guest = Guest::Gone;
            session.hung_up();
        }
        for effect in session.effects() {
            match (effect, &mut guest) {
                (Effect::Close, _) => return,
                // Who asked may have been killed, and nobody then wants the reply.
                (Effect::Write(bytes), _) => drop(rustix::io::write(&device, &bytes)),
                (Effect::Say(said), Guest::Live(line)) => line.unsent.extend(said.encode()),
                (Effect::Say(_), _) => {}
            }
        }
    }
}

/// What the guest says next; its stream comes first.
async fn hear(guest: &mut Guest) -> Result<Vec<ToHost>, Nonsense> {
    match guest {
        Guest::Awaited(coming) => {
            let stream = coming.await.map_err(|_| Nonsense)?;
            *guest = Guest::Live(Line::over(stream).map_err(|_| Nonsense)?);
            Ok(Vec::new())
        }
        // Whichever way it ends, it ends.
        Guest::Live(line) => line.exchange().await.map_err(|_| Nonsense),
        Guest::Gone => std::future::pending().await,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
