//! Names: questions that the guest asks Docker's resolver, asked here, where that resolver is.
//!
//! Docker runs a resolver for the containers of its own networks; it listens at [`RESOLVER`] in the container's network
//! namespace, on the host. In the guest that address is the guest's own: the agent listens there and sends what it hears
//! over a stream.
//!
//! Contract: the guest's datagrams are passed on as they are, except for the two bytes by which an answer finds its
//! question, and to that address alone. Answers that nobody waits for are dropped. Nothing grows with what the guest sends.
//! Not here: queries by TCP; the resolver's own questions to others.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    path::Path,
    sync::{Mutex, PoisonError},
};

use caisson_agent_api::{RESOLVER, RESOLVER_ASKERS, RESOLVER_PORT};
use oci_spec::runtime::Spec;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UdpSocket, UnixStream, unix},
};

/// Where programs look for the resolver's address.
const CONFIGURATION: &str = "/etc/resolv.conf";

/// RFC 1035, 4.1.1: a header of 12 bytes, the first two of which are the question's number.
const HEADER_BYTES: usize = 12;

/// The longest answer that is passed on.
const LONGEST_BYTES: usize = 65_535;

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

async fn between(agent: UnixStream, resolver: &UdpSocket) -> io::Result<()> {
    let questions = Mutex::new(vec![None; usize::from(RESOLVER_ASKERS)]);
    let (from, to) = agent.into_split();
    tokio::select! {
        ended = ask(from, resolver, &questions) => ended,
        ended = answer(to, resolver, &questions) => ended,
    }
}

async fn ask(
    mut agent: unix::OwnedReadHalf,
    resolver: &UdpSocket,
    questions: &Questions,
) -> io::Result<()> {
    let mut number: u16 = 0;
    loop {
        let asker = agent.read_u16().await?;
        let mut question = vec![0; usize::from(agent.read_u16().await?)];
        agent.read_exact(&mut question).await?;
        if question.len() < HEADER_BYTES {
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

async fn answer(
    mut agent: unix::OwnedWriteHalf,
    resolver: &UdpSocket,
    questions: &Questions,
) -> io::Result<()> {
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
        let (Some(open), Ok(bytes)) = (open, u16::try_from(length)) else {
            continue;
        };
        *first = open.theirs;
        agent.write_u16(open.asker).await?;
        agent.write_u16(bytes).await?;
        agent.write_all(answer).await?;
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
}
