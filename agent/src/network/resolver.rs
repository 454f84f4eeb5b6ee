//! Names: what the container asks [`RESOLVER`] is asked on the host, where that resolver is.
//!
//! Contract: the sockets are in the container's network namespace, and there for as long as the [`Resolver`]. An asker whose
//! answer has not come when [`RESOLVER_ASKERS`] others have asked after it gets none: a datagram that is lost, a connection
//! that is closed. A connection's questions are answered one after the other; at most [`MOST_CONNECTIONS`] are open.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use caisson_agent_api::{RESOLVER, RESOLVER_ASKERS, RESOLVER_BY_TCP, RESOLVER_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::{NetworkError, Resident, at, inside};
use crate::socket::Socket;

/// The longest datagram.
const LONGEST_BYTES: usize = 65_535;

/// Further connections wait to be accepted.
const MOST_CONNECTIONS: usize = 64;

/// The resolver's stand-in; gone when dropped.
pub(crate) struct Resolver(JoinHandle<io::Result<()>>);

impl Resolver {
    /// Listens in the namespace of `resident`, and asks over the connection that has begun.
    pub(crate) fn begin(connecting: OwnedFd, resident: Resident<'_>) -> Result<Self, NetworkError> {
        let address = (RESOLVER, RESOLVER_PORT);
        let listen = || {
            let datagrams = std::net::UdpSocket::bind(address)?;
            Ok((datagrams, std::net::TcpListener::bind(address)?))
        };
        let doors = inside(resident, listen)?
            .and_then(|(datagrams, connections)| {
                datagrams.set_nonblocking(true)?;
                connections.set_nonblocking(true)?;
                Ok(Doors {
                    datagrams: UdpSocket::from_std(datagrams)?,
                    connections: TcpListener::from_std(connections)?,
                })
            })
            .map_err(at("listen for questions about names"))?;
        Ok(Self(tokio::spawn(async move {
            let host = Socket::connected(connecting).await?;
            relay(&doors, host).await
        })))
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where questions arrive.
struct Doors {
    datagrams: UdpSocket,
    connections: TcpListener,
}

/// Who waits for an answer.
enum Asker {
    Datagram(SocketAddr),
    Connection(oneshot::Sender<Vec<u8>>),
}

/// Those who wait: the newest [`RESOLVER_ASKERS`].
struct Askers {
    last: u16,
    waiting: Vec<Option<Asker>>,
}

/// The way to the host.
struct Host {
    questions: tokio::sync::Mutex<WriteHalf<Socket>>,
    askers: Mutex<Askers>,
}

impl Host {
    fn new(questions: WriteHalf<Socket>) -> Self {
        let mut waiting = Vec::new();
        waiting.resize_with(usize::from(RESOLVER_ASKERS), || None);
        Self {
            questions: tokio::sync::Mutex::new(questions),
            askers: Mutex::new(Askers { last: 0, waiting }),
        }
    }

    /// Asks; [`Host::take`] finds the asker when the answer comes.
    async fn ask(&self, asker: Asker, question: &[u8]) -> io::Result<()> {
        let Ok(bytes) = u16::try_from(question.len()) else {
            return Ok(());
        };
        let number = self.register(asker);
        let mut host = self.questions.lock().await;
        host.write_all(&number.to_be_bytes()).await?;
        host.write_all(&bytes.to_be_bytes()).await?;
        host.write_all(question).await
    }

    fn register(&self, asker: Asker) -> u16 {
        let protocol = match asker {
            Asker::Datagram(_) => 0,
            Asker::Connection(_) => RESOLVER_BY_TCP,
        };
        let mut askers = self.askers.lock().unwrap_or_else(PoisonError::into_inner);
        askers.last = (askers.last + 1) % RESOLVER_ASKERS;
        let number = askers.last;
        if let Some(place) = askers.waiting.get_mut(usize::from(number)) {
            *place = Some(asker);
        }
        number | protocol
    }

    fn take(&self, number: u16) -> Option<Asker> {
        let place = usize::from(number & !RESOLVER_BY_TCP);
        let mut askers = self.askers.lock().unwrap_or_else(PoisonError::into_inner);
        askers.waiting.get_mut(place).and_then(Option::take)
    }
}

/// Until the host hangs up.
async fn relay(doors: &Doors, host: Socket) -> io::Result<()> {
    let (answers, questions) = tokio::io::split(host);
    let host = Arc::new(Host::new(questions));
    tokio::select! {
        ended = hear_datagrams(&doors.datagrams, &host) => ended,
        () = accept(&doors.connections, &host) => Ok(()),
        ended = answer(&doors.datagrams, answers, &host) => ended,
    }
}

async fn hear_datagrams(socket: &UdpSocket, host: &Host) -> io::Result<()> {
    let mut question = vec![0; LONGEST_BYTES];
    loop {
        // An error belongs to an answer that an asker did not wait for.
        let Ok((length, asker)) = socket.recv_from(&mut question).await else {
            continue;
        };
        let question = question.get(..length).unwrap_or_default();
        host.ask(Asker::Datagram(asker), question).await?;
    }
}

async fn accept(listener: &TcpListener, host: &Arc<Host>) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if open.len() < MOST_CONNECTIONS => {
                match accepted {
                    Ok((connection, _)) => {
                        let host = Arc::clone(host);
                        open.spawn(async move { hear_connection(connection, &host).await });
                    }
                    // Its maker has gone before.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    // No descriptor is left: one that ends frees one. Without any the datagrams remain.
                    Err(_) => {
                        if open.join_next().await.is_none() {
                            return std::future::pending().await;
                        }
                    }
                }
            }
            Some(_) = open.join_next() => {}
        }
    }
}

/// RFC 1035, 4.2.2: messages behind their lengths, two bytes each. Until it ends, or a question has no answer.
async fn hear_connection(mut connection: TcpStream, host: &Host) -> io::Result<()> {
    loop {
        let mut question = vec![0; usize::from(connection.read_u16().await?)];
        connection.read_exact(&mut question).await?;
        let (answer, answered) = oneshot::channel();
        host.ask(Asker::Connection(answer), &question).await?;
        let answer = answered.await.map_err(io::Error::other)?;
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let whole = [&length.to_be_bytes()[..], &answer].concat();
        connection.write_all(&whole).await?;
    }
}

async fn answer(socket: &UdpSocket, mut from: ReadHalf<Socket>, host: &Host) -> io::Result<()> {
    loop {
        let number = from.read_u16().await?;
        let mut answer = vec![0; usize::from(from.read_u16().await?)];
        from.read_exact(&mut answer).await?;
        // One that has gone does not want it.
        match host.take(number) {
            Some(Asker::Datagram(asker)) => {
                let _ = socket.send_to(&answer, asker).await;
            }
            Some(Asker::Connection(asker)) => {
                let _ = asker.send(answer);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// The doors, the agent's end of the stream, and the host's.
    async fn stage() -> (Doors, Socket, tokio::net::UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let doors = Doors {
            datagrams: UdpSocket::bind("127.0.0.1:0").await.unwrap(),
            connections: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        };
        let host = tokio::net::UnixStream::from_std(theirs).unwrap();
        let stream = Socket::connected(ours.into()).await.unwrap();
        (doors, stream, host)
    }

    #[tokio::test]
    async fn each_asker_gets_its_own_answer_in_whatever_order() {
        let (doors, stream, mut host) = stage().await;
        let address = doors.datagrams.local_addr().unwrap();
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
            _ = relay(&doors, stream) => panic!("the relay ended"),
            () = asked => {}
        }
    }

    #[tokio::test]
    async fn a_connections_questions_are_answered_one_after_the_other() {
        let (doors, stream, mut host) = stage().await;
        let address = doors.connections.local_addr().unwrap();
        let asked = async {
            let mut asker = TcpStream::connect(address).await.unwrap();
            asker.write_all(b"\0\x03one\0\x03two").await.unwrap();
            for (text, answer) in [("one", "1!"), ("two", "2!")] {
                let number = host.read_u16().await.unwrap();
                assert_ne!(number & RESOLVER_BY_TCP, 0);
                let mut question = [0; 5];
                host.read_exact(&mut question).await.unwrap();
                assert_eq!(&question[2..], text.as_bytes());
                // One that nobody waits for, and theirs.
                for number in [number ^ 1, number] {
                    host.write_u16(number).await.unwrap();
                    host.write_u16(2).await.unwrap();
                    host.write_all(answer.as_bytes()).await.unwrap();
                }
                let mut heard = [0; 4];
                asker.read_exact(&mut heard).await.unwrap();
                assert_eq!((&heard[..2], &heard[2..]), (&[0, 2][..], answer.as_bytes()));
            }
        };
        tokio::select! {
            _ = relay(&doors, stream) => panic!("the relay ended"),
            () = asked => {}
        }
    }
}
