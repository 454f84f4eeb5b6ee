//! Names: questions that the guest asks Docker's resolver, asked here, where that resolver is.
//!
//! Docker runs a resolver for the containers of its own networks; it listens at [`RESOLVER`] in the container's network
//! namespace, on the host. In the guest that address is the guest's own: the agent listens there and sends what it hears
//! over a stream.
//!
//! Contract: the guest's messages are passed on as they are, except for the two bytes by which an answer by UDP finds its
//! question, and to that address alone, by the protocol that they came by. Each question by TCP has a connection of its
//! own, for at most [`PATIENCE`]; of those there are at most [`MOST_CONNECTIONS`], and a question too many is one without
//! an answer. Answers that nobody waits for are dropped. Nothing grows with what the guest sends.
//! Not here: the resolver's own questions to others (`bpf/answers.rs`).

use std::{
    fs, io,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use caisson_agent_api::{RESOLVER, RESOLVER_ASKERS, RESOLVER_BY_TCP, RESOLVER_PORT};
use oci_spec::runtime::Spec;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket, UnixStream, unix},
    task::JoinSet,
    time::timeout,
};

/// Where programs look for the resolver's address.
const CONFIGURATION: &str = "/etc/resolv.conf";

/// RFC 1035, 4.1.1: a header of 12 bytes, the first two of which are the question's number.
const HEADER_BYTES: usize = 12;

/// The longest answer that is passed on.
const LONGEST_BYTES: usize = 65_535;

/// How many questions may be asked by TCP at once, and how long each may take: Docker's resolver gives up earlier.
const MOST_CONNECTIONS: usize = 32;
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether the container is told to ask the resolver: by the file of the host's that it gets as its configuration.
pub fn is_wanted(spec: &Spec) -> bool {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let file = mounts
        .iter()
        .find(|mount| mount.destination() == Path::new(CONFIGURATION))
        .filter(|mount| crate::guest_spec::is_bind(mount))
        .and_then(|mount| mount.source().as_deref());
    file.and_then(|file| fs::read_to_string(file).ok())
        .is_some_and(|text| names_resolver(&text))
}

/// resolv.conf(5).
fn names_resolver(text: &str) -> bool {
    let mut servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver"))
            .then(|| words.next())
            .flatten()
    });
    servers.any(|server| server.parse() == Ok(RESOLVER))
}

/// A question that waits for its answer.
#[derive(Debug, Clone, Copy)]
struct Open {
    /// The number that it has here.
    ours: u16,
    /// The number that it came with.
    theirs: [u8; 2],
    /// The agent's number for the asker.
    asker: u16,
}

/// The questions that wait: the newest [`RESOLVER_ASKERS`].
type Questions = Mutex<Vec<Option<Open>>>;

/// Answers the agent's questions until it hangs up. Must be called in the container's network namespace.
pub async fn relay(agent: OwnedFd) -> io::Result<()> {
    let agent = StdStream::from(agent);
    agent.set_nonblocking(true)?;
    let resolver = UdpSocket::bind(("127.0.0.1", 0)).await?;
    resolver.connect((RESOLVER, RESOLVER_PORT)).await?;
    between(UnixStream::from_std(agent)?, &resolver).await
}

/// The way back, for whoever has an answer.
type Asker = Arc<tokio::sync::Mutex<unix::OwnedWriteHalf>>;

async fn between(agent: UnixStream, resolver: &UdpSocket) -> io::Result<()> {
    let questions = Mutex::new(vec![None; usize::from(RESOLVER_ASKERS)]);
    let (from, to) = agent.into_split();
    let to = Arc::new(tokio::sync::Mutex::new(to));
    tokio::select! {
        ended = ask(from, &to, resolver, &questions) => ended,
        ended = answer(&to, resolver, &questions) => ended,
    }
}

async fn ask(
    mut agent: unix::OwnedReadHalf,
    back: &Asker,
    resolver: &UdpSocket,
    questions: &Questions,
) -> io::Result<()> {
    let server = resolver.peer_addr()?;
    let mut connections = JoinSet::new();
    let mut number: u16 = 0;
    loop {
        let asker = agent.read_u16().await?;
        let mut question = vec![0; usize::from(agent.read_u16().await?)];
        agent.read_exact(&mut question).await?;
        if question.len() < HEADER_BYTES {
            continue;
        }
        if asker & RESOLVER_BY_TCP != 0 {
            while connections.try_join_next().is_some() {}
            if connections.len() < MOST_CONNECTIONS {
                connections.spawn(ask_by_tcp(server, asker, question, Arc::clone(back)));
            }
            continue;
        }
        number = number.wrapping_add(1);
        let Some((place, first)) = place_of(number).zip(question.first_chunk_mut::<2>()) else {
            continue;
        };
        let open = Open {
            ours: number,
            theirs: *first,
            asker,
        };
        *first = number.to_be_bytes();
        if let Some(slot) = lock(questions).get_mut(place) {
            *slot = Some(open);
        }
        // A resolver that is not there is one that does not answer.
        let _ = resolver.send(&question).await;
    }
}

/// RFC 1035, 4.2.2: a message behind its length, two bytes.
async fn ask_by_tcp(
    server: SocketAddr,
    asker: u16,
    question: Vec<u8>,
    back: Asker,
) -> io::Result<()> {
    let exchange = async {
        let mut connection = TcpStream::connect(server).await?;
        let length = u16::try_from(question.len()).map_err(io::Error::other)?;
        let whole = [&length.to_be_bytes()[..], &question].concat();
        connection.write_all(&whole).await?;
        let mut answer = vec![0; usize::from(connection.read_u16().await?)];
        connection.read_exact(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = timeout(PATIENCE, exchange).await??;
    pass_back(&back, asker, &answer).await
}

async fn pass_back(back: &Asker, asker: u16, answer: &[u8]) -> io::Result<()> {
    let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
    let mut agent = back.lock().await;
    agent.write_u16(asker).await?;
    agent.write_u16(length).await?;
    agent.write_all(answer).await
}

async fn answer(back: &Asker, resolver: &UdpSocket, questions: &Questions) -> io::Result<()> {
    let mut answer = vec![0; LONGEST_BYTES];
    loop {
        // An error tells that the resolver is not there: once for each question.
        let Ok(length) = resolver.recv(&mut answer).await else {
            continue;
        };
        let Some(answer) = answer.get_mut(..length) else {
            continue;
        };
        let Some(first) = answer.first_chunk_mut::<2>() else {
            continue;
        };
        let number = u16::from_be_bytes(*first);
        let open = place_of(number).and_then(|place| {
            lock(questions)
                .get_mut(place)
                .and_then(|slot| slot.take_if(|open| open.ours == number))
        });
        let Some(open) = open else {
            continue;
        };
        *first = open.theirs;
        pass_back(back, open.asker, answer).await?;
    }
}

fn place_of(number: u16) -> Option<usize> {
    number.checked_rem(RESOLVER_ASKERS).map(usize::from)
}

fn lock(questions: &Questions) -> std::sync::MutexGuard<'_, Vec<Option<Open>>> {
    questions.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolver_is_wanted_where_it_is_named() {
        assert!(names_resolver(
            "search x\nnameserver 127.0.0.11\noptions ndots:0\n"
        ));
        assert!(!names_resolver(
            "nameserver 127.0.0.1\n# nameserver 127.0.0.11\n"
        ));
        assert!(!names_resolver("nameserver\nnameserver 10.0.0.1\n"));
        assert!(!is_wanted(&Spec::default()));
    }

    #[tokio::test]
    async fn answers_find_their_questions_and_stray_ones_are_dropped() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        resolver
            .connect(server.local_addr().unwrap())
            .await
            .unwrap();
        let (mut agent, ours) = UnixStream::pair().unwrap();
        let asked = async {
            // Two askers with the same number of their own, and a question that is none.
            for (asker, text) in [(7, "AAquestion-1xx"), (9, "AAquestion-2xx"), (8, "short")] {
                agent.write_u16(asker).await.unwrap();
                agent
                    .write_u16(u16::try_from(text.len()).unwrap())
                    .await
                    .unwrap();
                agent.write_all(text.as_bytes()).await.unwrap();
            }
            let mut heard = Vec::new();
            for _ in 0..2 {
                let mut question = [0; 64];
                let (length, from) = server.recv_from(&mut question).await.unwrap();
                heard.push((question[..length].to_vec(), from));
            }
            assert_ne!(heard[0].0[..2], heard[1].0[..2]);
            server
                .send_to(b"\xff\xffnobody asked", heard[0].1)
                .await
                .unwrap();
            for (question, from) in heard.iter().rev() {
                server.send_to(question, from).await.unwrap();
            }
            let mut answers = Vec::new();
            for _ in 0..2 {
                let asker = agent.read_u16().await.unwrap();
                let mut answer = vec![0; usize::from(agent.read_u16().await.unwrap())];
                agent.read_exact(&mut answer).await.unwrap();
                answers.push((asker, String::from_utf8(answer).unwrap()));
            }
            let expected = [
                (9, "AAquestion-2xx".to_owned()),
                (7, "AAquestion-1xx".to_owned()),
            ];
            assert_eq!(answers, expected);
        };
        tokio::select! {
            ended = between(ours, &resolver) => panic!("the relay ended: {ended:?}"),
            () = asked => {}
        }
    }

    #[tokio::test]
    async fn what_came_by_tcp_is_asked_by_tcp_and_a_connection_that_ends_harms_nobody() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        resolver
            .connect(server.local_addr().unwrap())
            .await
            .unwrap();
        let (mut agent, ours) = UnixStream::pair().unwrap();
        let asked = async {
            for (asker, text) in [(1, b"a question, first"), (2, b"a question, other")] {
                agent.write_u16(asker | RESOLVER_BY_TCP).await.unwrap();
                agent.write_u16(17).await.unwrap();
                agent.write_all(text).await.unwrap();
                let (mut connection, _) = server.accept().await.unwrap();
                let mut heard = [0; 19];
                connection.read_exact(&mut heard).await.unwrap();
                assert_eq!((heard[..2].to_vec(), &heard[2..]), (vec![0, 17], &text[..]));
                if asker == 2 {
                    connection.write_all(b"\0\x06answer").await.unwrap();
                }
            }
            let mut answer = [0; 10];
            agent.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"\x80\x02\0\x06answer");
        };
        tokio::select! {
            ended = between(ours, &resolver) => panic!("the relay ended: {ended:?}"),
            () = asked => {}
        }
    }
}
