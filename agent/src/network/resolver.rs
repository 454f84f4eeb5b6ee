//! Names: what the container asks [`RESOLVER`] is asked on the host, where that resolver is.
//!
//! Contract: the socket is in the container's network namespace, and there for as long as the [`Resolver`]. An asker whose
//! answer has not come when [`RESOLVER_ASKERS`] others have asked after it gets none, as with any datagram that is lost.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use caisson_agent_api::{RESOLVER, RESOLVER_ASKERS, RESOLVER_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

use super::{NetworkError, Resident, at, inside};
use crate::socket::Socket;

/// The longest datagram.
const LONGEST_BYTES: usize = 65_535;

/// The resolver's stand-in; gone when dropped.
pub(crate) struct Resolver(JoinHandle<io::Result<()>>);

impl Resolver {
    /// Listens in the namespace of `resident`, and asks over the connection that has begun.
    pub(crate) fn begin(connecting: OwnedFd, resident: Resident<'_>) -> Result<Self, NetworkError> {
        let listen = || std::net::UdpSocket::bind((RESOLVER, RESOLVER_PORT));
        let socket = inside(resident, listen)?
            .and_then(|socket| {
                socket.set_nonblocking(true)?;
                UdpSocket::from_std(socket)
            })
            .map_err(at("listen for questions about names"))?;
        Ok(Self(tokio::spawn(async move {
            let host = Socket::connected(connecting).await?;
            relay(&socket, host).await
        })))
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

type Askers = Mutex<Vec<Option<SocketAddr>>>;

/// Until the host hangs up.
async fn relay(socket: &UdpSocket, host: Socket) -> io::Result<()> {
    let askers = Mutex::new(vec![None; usize::from(RESOLVER_ASKERS)]);
    let (answers, questions) = tokio::io::split(host);
    tokio::select! {
        ended = ask(socket, questions, &askers) => ended,
        ended = answer(socket, answers, &askers) => ended,
    }
}

async fn ask(socket: &UdpSocket, mut host: WriteHalf<Socket>, askers: &Askers) -> io::Result<()> {
    let mut question = vec![0; LONGEST_BYTES];
    let mut number = 0;
    loop {
        // An error belongs to an answer that an asker did not wait for.
        let Ok((length, asker)) = socket.recv_from(&mut question).await else {
            continue;
        };
        number = (number + 1) % RESOLVER_ASKERS;
        if let Some(place) = lock(askers).get_mut(usize::from(number)) {
            *place = Some(asker);
        }
        let Ok(bytes) = u16::try_from(length) else {
            continue;
        };
        host.write_all(&number.to_be_bytes()).await?;
        host.write_all(&bytes.to_be_bytes()).await?;
        host.write_all(question.get(..length).unwrap_or_default())
            .await?;
    }
}

async fn answer(socket: &UdpSocket, mut host: ReadHalf<Socket>, askers: &Askers) -> io::Result<()> {
    loop {
        let number = host.read_u16().await?;
        let mut answer = vec![0; usize::from(host.read_u16().await?)];
        host.read_exact(&mut answer).await?;
        let asker = lock(askers)
            .get_mut(usize::from(number))
            .and_then(Option::take);
        if let Some(asker) = asker {
            // One that has gone does not want it.
            let _ = socket.send_to(&answer, asker).await;
        }
    }
}

fn lock(askers: &Askers) -> std::sync::MutexGuard<'_, Vec<Option<SocketAddr>>> {
    askers.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[tokio::test]
    async fn each_asker_gets_its_own_answer_in_whatever_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut host = tokio::net::UnixStream::from_std(theirs).unwrap();
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let served = async {
            let stream = Socket::connected(ours.into()).await.unwrap();
            relay(&server, stream).await
        };
        let asked = async {
            let mut askers = Vec::new();
            let mut questions = Vec::new();
            for text in ["one", "two"] {
                let asker = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                asker.send_to(text.as_bytes(), address).await.unwrap();
                askers.push(asker);
                let number = host.read_u16().await.unwrap();
                let mut question = vec![0; usize::from(host.read_u16().await.unwrap())];
                host.read_exact(&mut question).await.unwrap();
                assert_eq!(question, text.as_bytes());
                questions.push((number, question));
            }
            for (number, question) in questions.into_iter().rev() {
                host.write_u16(number).await.unwrap();
                host.write_u16(3).await.unwrap();
                host.write_all(&question).await.unwrap();
            }
            for (asker, text) in askers.iter().zip(["one", "two"]) {
                let mut answer = [0; 8];
                let length = asker.recv(&mut answer).await.unwrap();
                assert_eq!(&answer[..length], text.as_bytes());
            }
        };
        tokio::select! {
            _ = served => panic!("the relay ended"),
            () = asked => {}
        }
    }
}
