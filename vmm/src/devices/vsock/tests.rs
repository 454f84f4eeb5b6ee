//! The socket device against a driver and an owner that are both in this file: no KVM, no threads, no waiting.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::connection::{After, Connection};
use super::muxer::{MAX_BY_GUEST, MAX_RESETS, Muxer, Owner};
use super::wire::{
    HEADER_BYTES, Header, Key, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, from_guest, to_guest,
};
use super::*;
use crate::devices::driver::Driver;
use crate::virtio::{GuestFault, Watch};

const KEY: Key = Key {
    guest: 5000,
    host: 1024,
};
const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
const BUFFER: u32 = 4096;

#[derive(Clone, Default)]
struct Inbox(Arc<Mutex<Vec<(u32, UnixStream)>>>);

impl Owner for Inbox {
    fn accepted(&self, port: u32, socket: UnixStream) -> io::Result<()> {
        if port == 666 {
            return Err(ErrorKind::WouldBlock.into());
        }
        socket.set_nonblocking(true)?;
        self.0.lock().unwrap().push((port, socket));
        Ok(())
    }
}

/// A guest's driver and the device's connections.
struct Bench {
    driver: Driver,
    muxer: Muxer,
    inbox: Inbox,
    epoll: Arc<Epoll>,
    watch: Watch,
}

impl Bench {
    fn new() -> Self {
        let inbox = Inbox::default();
        let epoll = Arc::new(Epoll::new().unwrap());
        let muxer = Muxer::new(Box::new(inbox.clone()), &Counters::default());
        let watch = Watch::new(epoll.clone(), 0);
        Self {
            driver: Driver::new(),
            muxer,
            inbox,
            epoll,
            watch,
        }
    }

    /// The guest sends a packet.
    fn send(&mut self, header: Header, payload: &[u8]) -> Result<(), GuestFault> {
        self.driver.rewind();
        self.driver.queue.new_turn();
        self.driver.offer(&[&from_guest(&header), payload], &[]);
        let chain = self.driver.pop()?.unwrap();
        self.muxer.packet(&chain, &self.watch)?;
        self.driver.queue.push(chain.head(), 0)
    }

    fn data(&mut self, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        self.send(
            Header {
                len,
                ..packet(Op::Data)
            },
            payload,
        )
        .unwrap();
    }

    /// The device hears of its sockets, as often as there is something new.
    fn pump(&mut self) {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let ready = self.epoll.wait(0, &mut events).unwrap();
            if ready == 0 {
                return;
            }
            for event in &events[..ready] {
                let token = u32::try_from(event.data() & u64::from(u32::MAX)).unwrap();
                self.muxer.event(token, event.events());
            }
        }
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.pump();
        while self.muxer.has_work() {
            self.driver.rewind();
            self.driver.queue.new_turn();
            let at = self.driver.offer(&[], &[BUFFER])[0];
            let chain = self.driver.pop().unwrap().unwrap();
            if let Some(len) = self.muxer.emit(&chain).unwrap() {
                let bytes = self.driver.get(at, len);
                let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
                return Some((to_guest(header), payload.to_vec()));
            }
        }
        None
    }

    fn receive_op(&mut self) -> Option<(Op, u32)> {
        self.receive().map(|(header, _)| (header.op, header.flags))
    }

    /// An open connection; the owner's end of it.
    fn connected(&mut self) -> UnixStream {
        self.send(packet(Op::Request), b"").unwrap();
        assert_eq!(self.receive_op(), Some((Op::Response, 0)));
        self.inbox.0.lock().unwrap().pop().unwrap().1
    }
}

fn packet(op: Op) -> Header {
    Header {
        buf_alloc: 1 << 20,
        ..Header::bare(KEY, op)
    }
}

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..packet(Op::Shutdown)
    }
}

/// What is there now, and whether that was the end.
fn drain(socket: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Ok(_) => (bytes, true),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
            (bytes, false)
        }
    }
}

#[test]
fn bytes_flow_both_ways() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    bench.data(b"from the guest");
    assert_eq!(drain(&mut owner), (b"from the guest".to_vec(), false));
    owner.write_all(b"from the host").unwrap();
    let (header, payload) = bench.receive().unwrap();
    assert_eq!((header.op, header.key), (Op::Data, KEY));
    assert_eq!(payload, b"from the host");
    assert_eq!(
        header.fwd_cnt, 14,
        "what the guest sent was not reported as taken"
    );
    assert_eq!(bench.receive(), None);
}

#[test]
fn the_owner_learns_the_port_and_may_refuse() {
    let mut bench = Bench::new();
    let key = Key {
        guest: 1,
        host: 666,
    };
    bench
        .send(
            Header {
                key,
                ..packet(Op::Request)
            },
            b"",
        )
        .unwrap();
    assert_eq!(bench.receive_op(), Some((Op::Reset, 0)));
    bench.send(packet(Op::Request), b"").unwrap();
    assert_eq!(bench.inbox.0.lock().unwrap()[0].0, 1024);
}

#[test]
fn what_a_slow_owner_does_not_read_is_kept_up_to_the_credit_and_then_delivered() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    let credit = 256 << 10;
    let sent: Vec<u8> = (0..credit)
        .map(|n: u32| n.to_le_bytes()[n as usize % 3])
        .collect();
    for block in sent.chunks(16 << 10) {
        bench.data(block);
    }
    bench.send(shutdown(SHUTDOWN_SEND), b"").unwrap();
    let (mut got, mut ended) = (Vec::new(), false);
    while !ended {
        let (bytes, end) = drain(&mut owner);
        assert!(end || !bytes.is_empty(), "stuck after {} bytes", got.len());
        got.extend(bytes);
        ended = end;
        bench.pump();
    }
    assert!(got == sent);
    owner.write_all(b"still open").unwrap();
    let mut seen = Vec::new();
    while let Some((header, payload)) = bench.receive() {
        assert!([Op::Data, Op::CreditUpdate].contains(&header.op));
        seen.extend(payload);
    }
    assert_eq!(seen, b"still open");
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let mut bench = Bench::new();
    let _owner = bench.connected();
    let block = vec![0; 64 << 10];
    (0..4).for_each(|_| bench.data(&block));
    let mut ops = Vec::new();
    // The socket took some: exactly that much more is allowed, and no more.
    (0..8).for_each(|_| bench.data(&block));
    while let Some((op, _)) = bench.receive_op() {
        ops.push(op);
    }
    assert!(ops.contains(&Op::Reset), "{ops:?}");
}

#[test]
fn credit_is_given_back_when_the_owner_reads() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    let block = vec![7; 64 << 10];
    let (mut told, mut read) = (0u32, 0usize);
    for sent in 1..=64u32 {
        assert!(
            sent * (64 << 10) - told <= 256 << 10,
            "the credit was never given back"
        );
        bench.data(&block);
        read += drain(&mut owner).0.len();
        while let Some((header, _)) = bench.receive() {
            assert_eq!(header.op, Op::CreditUpdate);
            told = header.fwd_cnt;
        }
        read += drain(&mut owner).0.len();
    }
    assert_eq!(read, 4 << 20);
}

#[test]
fn the_guests_credit_is_respected_and_asked_for() {
    let mut bench = Bench::new();
    bench
        .send(
            Header {
                buf_alloc: 10,
                ..packet(Op::Request)
            },
            b"",
        )
        .unwrap();
    assert_eq!(bench.receive_op(), Some((Op::Response, 0)));
    let mut owner = bench.inbox.0.lock().unwrap().pop().unwrap().1;
    owner.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(bench.receive().unwrap().1, b"0123456789");
    assert_eq!(bench.receive_op(), Some((Op::CreditRequest, 0)));
    assert_eq!(bench.receive(), None, "asked twice");
    let update = Header {
        buf_alloc: 10,
        fwd_cnt: 4,
        ..Header::bare(KEY, Op::CreditUpdate)
    };
    bench.send(update, b"").unwrap();
    assert_eq!(bench.receive().unwrap().1, b"abcd");
    // Impossible counts give no credit.
    let update = Header {
        fwd_cnt: 1 << 31,
        ..update
    };
    bench.send(update, b"").unwrap();
    assert_eq!(bench.receive_op(), Some((Op::CreditRequest, 0)));
    assert_eq!(bench.receive(), None);
}

#[test]
fn the_end_of_the_owners_stream_follows_its_last_byte() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    owner.write_all(b"last").unwrap();
    owner.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.receive().unwrap().1, b"last");
    assert_eq!(bench.receive_op(), Some((Op::Shutdown, SHUTDOWN_SEND)));
    assert_eq!(bench.receive(), None);
    bench.data(b"answer");
    bench.send(shutdown(SHUTDOWN_SEND), b"").unwrap();
    assert_eq!(drain(&mut owner), (b"answer".to_vec(), true));
    bench.send(shutdown(BOTH), b"").unwrap();
    assert_eq!(bench.receive_op(), Some((Op::Reset, 0)));
}

#[test]
fn an_owner_that_closes_ends_both_directions() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    owner.write_all(b"bye").unwrap();
    drop(owner);
    assert_eq!(bench.receive().unwrap().1, b"bye");
    assert_eq!(bench.receive_op(), Some((Op::Shutdown, BOTH)));
    bench.data(b"lost, and no harm done");
    while let Some((op, _)) = bench.receive_op() {
        assert_eq!(op, Op::CreditUpdate);
    }
}

#[test]
fn a_guest_that_stops_receiving_breaks_the_owners_pipe() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    bench.send(shutdown(SHUTDOWN_RECEIVE), b"").unwrap();
    assert_eq!(
        owner.write_all(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    bench.data(b"but it may go on sending");
    assert_eq!(drain(&mut owner).0, b"but it may go on sending");
}

#[test]
fn a_guests_close_is_answered_when_all_is_delivered() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    let block = vec![3; 64 << 10];
    (0..4).for_each(|_| bench.data(&block));
    bench.send(shutdown(BOTH), b"").unwrap();
    // The guest lost patience; its data still arrives.
    bench.send(packet(Op::Reset), b"").unwrap();
    let (mut got, mut ended) = (0, false);
    while !ended {
        let (bytes, end) = drain(&mut owner);
        got += bytes.len();
        ended = end;
        bench.pump();
    }
    assert_eq!(got, 256 << 10);
    bench.send(packet(Op::Data), b"").unwrap();
    assert_eq!(
        bench.receive_op(),
        Some((Op::Reset, 0)),
        "the connection is still there"
    );
}

#[test]
fn packets_for_nobody_are_reset_within_bounds() {
    let mut bench = Bench::new();
    for op in [
        Op::Response,
        Op::Data,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        bench.send(packet(op), b"").unwrap();
        assert_eq!(bench.receive_op(), Some((Op::Reset, 0)), "{op:?}");
    }
    bench.send(packet(Op::Reset), b"").unwrap();
    assert_eq!(bench.receive(), None, "a reset was answered by a reset");
    (0..10 * MAX_RESETS).for_each(|_| bench.send(packet(Op::Data), b"").unwrap());
    assert_eq!(
        (0..).take_while(|_| bench.receive().is_some()).count(),
        MAX_RESETS
    );
}

#[test]
fn a_second_request_for_a_connection_resets_it() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    bench.send(packet(Op::Request), b"").unwrap();
    assert_eq!(bench.receive_op(), Some((Op::Reset, 0)));
    assert_eq!(drain(&mut owner), (Vec::new(), true));
}

#[test]
fn a_guest_cannot_open_more_than_its_share() {
    let limits = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limits.maximum,
            ..limits
        },
    )
    .unwrap();
    let mut bench = Bench::new();
    for guest in 0..u32::try_from(MAX_BY_GUEST).unwrap() + 1 {
        let key = Key { guest, host: 1 };
        bench
            .send(
                Header {
                    key,
                    ..packet(Op::Request)
                },
                b"",
            )
            .unwrap();
        let refused = std::iter::from_fn(|| bench.receive_op()).any(|(op, _)| op == Op::Reset);
        assert_eq!(refused, guest as usize == MAX_BY_GUEST, "{guest}");
        // The owner closes its end at once: the connection stays the guest's until it is reset.
        bench.inbox.0.lock().unwrap().clear();
        bench.pump();
    }
}

#[test]
fn the_owner_dials_into_the_guest() {
    let mut bench = Bench::new();
    let (ours, mut owner) = UnixStream::pair().unwrap();
    owner.set_nonblocking(true).unwrap();
    owner.write_all(b"early").unwrap();
    bench.muxer.dial(80, ours, &bench.watch);
    let (request, _) = bench.receive().unwrap();
    assert_eq!((request.op, request.key.guest), (Op::Request, 80));
    assert_eq!(bench.receive(), None, "payload before the guest agreed");
    let answer = Header {
        buf_alloc: 100,
        ..Header::bare(request.key, Op::Response)
    };
    bench.send(answer, b"").unwrap();
    assert_eq!(bench.receive().unwrap().1, b"early");
    bench
        .send(
            Header {
                op: Op::Reset,
                ..answer
            },
            b"",
        )
        .unwrap();
    assert_eq!(drain(&mut owner), (Vec::new(), true));
}

#[test]
fn a_dial_that_the_guest_refuses_is_closed() {
    let mut bench = Bench::new();
    for answer in [Op::Reset, Op::Data, Op::Shutdown] {
        let (ours, mut owner) = UnixStream::pair().unwrap();
        bench.muxer.dial(80, ours, &bench.watch);
        let key = bench.receive().unwrap().0.key;
        bench.send(Header::bare(key, answer), b"").unwrap();
        assert_eq!(drain(&mut owner), (Vec::new(), true), "{answer:?}");
        while bench.receive().is_some() {}
    }
}

#[test]
fn a_payload_shorter_than_its_header_says_is_a_fault() {
    let mut bench = Bench::new();
    let _owner = bench.connected();
    let header = Header {
        len: 100,
        ..packet(Op::Data)
    };
    assert!(matches!(
        bench.send(header, &[0; 99]),
        Err(GuestFault::Short { .. })
    ));
}

#[test]
fn a_buffer_without_room_for_payload_is_a_fault() {
    let mut bench = Bench::new();
    bench.send(packet(Op::Request), b"").unwrap();
    bench.driver.rewind();
    bench.driver.offer(&[], &[44]);
    let chain = bench.driver.pop().unwrap().unwrap();
    assert!(bench.muxer.emit(&chain).is_err());
}

#[test]
fn a_late_event_does_not_reach_the_next_connection() {
    let mut bench = Bench::new();
    let _old = bench.connected();
    let token = 1 << 12; // generation 1, slot 0
    bench.send(packet(Op::Reset), b"").unwrap();
    let mut new = bench.connected();
    bench.muxer.event(token, libc::EPOLLHUP.cast_unsigned());
    bench.data(b"alive");
    assert_eq!(drain(&mut new), (b"alive".to_vec(), false));
}

#[test]
fn a_reset_of_the_device_closes_every_connection() {
    let mut bench = Bench::new();
    let mut owner = bench.connected();
    bench.muxer.clear();
    assert_eq!(drain(&mut owner), (Vec::new(), true));
    assert_eq!(bench.receive(), None);
}

#[test]
fn an_event_before_the_guest_agreed_keeps_or_ends_the_dial() {
    let (ours, _owner) = UnixStream::pair().unwrap();
    let mut dialled = Connection::dialled(KEY, ours, 100);
    assert_eq!(dialled.event(libc::EPOLLOUT.cast_unsigned()), After::Keep);
    assert_eq!(dialled.event(libc::EPOLLHUP.cast_unsigned()), After::Reset);
}
