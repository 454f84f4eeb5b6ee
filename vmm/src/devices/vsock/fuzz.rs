//! The socket device under a script of a hostile guest and a whimsical owner.
//!
//! Contract: any bytes are a script, see [`run`]. What the guest may rely on is checked on every packet that it is given:
//! a known operation, a payload as long as its header says and never more than the guest's credit.
//! Run by libFuzzer, and by `cargo test` on the corpus: no KVM, no threads, no waiting.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::connection::Credit;
use super::muxer::{Muxer, Owner};
use super::wire::{HEADER_BYTES, Key, Op};
use crate::counters::Counters;
use crate::devices::driver::Driver;
use crate::virtio::{GuestFault, Watch};

/// Bytes of one step of a script.
const STEP: usize = 8;
/// The most steps that are taken, so that no script runs for long.
const STEPS: usize = 512;
/// A port whose connections the owner refuses.
const REFUSED: u32 = 3;
const GUEST_CID: u8 = 3;
const HOST_CID: u8 = 2;

#[derive(Clone, Default)]
struct Owners(Arc<Mutex<Vec<UnixStream>>>);

impl Owners {
    /// Does something with the connection of that number, if there are any.
    fn with(&self, number: u8, act: impl FnOnce(&mut Vec<UnixStream>, usize)) {
        let mut sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !sockets.is_empty() {
            let index = usize::from(number) % sockets.len();
            act(&mut sockets, index);
        }
    }

    fn add(&self, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(socket);
        Ok(())
    }
}

impl Owner for Owners {
    fn accepted(&self, port: u32, socket: UnixStream) -> io::Result<()> {
        if port == REFUSED {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.add(socket)
    }
}

struct Script {
    driver: Driver,
    muxer: Muxer,
    owners: Owners,
    epoll: Arc<Epoll>,
    watch: Watch,
    /// What the guest has promised to take, by connection.
    credit: HashMap<Key, Credit>,
}

/// Runs a script of steps of eight bytes: what, port, operation, flags, length (two bytes), credit, forwarded.
///
/// What, modulo 8: 0 to 2 a packet of the guest; 3 and 4 a buffer for the device; 5 the owner writes; 6 it reads; 7 it
/// closes, shuts down, dials, or the device is reset, as the operation says.
pub fn run(bytes: &[u8]) {
    let Ok(mut script) = Script::new() else {
        return;
    };
    for step in bytes.as_chunks::<STEP>().0.iter().take(STEPS) {
        if script.step(step).is_err() {
            // A guest fault: the device stops and is set up anew.
            script.muxer.clear();
        }
        script.hear();
    }
}

impl Script {
    fn new() -> io::Result<Self> {
        let owners = Owners::default();
        let epoll = Arc::new(Epoll::new()?);
        Ok(Self {
            driver: Driver::new(),
            muxer: Muxer::new(Box::new(owners.clone()), &Counters::default()),
            owners,
            watch: Watch::new(epoll.clone(), 0),
            epoll,
            credit: HashMap::new(),
        })
    }

    fn step(&mut self, step: &[u8; STEP]) -> Result<(), GuestFault> {
        let [what, port, op, flags, l0, l1, alloc, forwarded] = *step;
        let len = u16::from_le_bytes([l0, l1]);
        match what % 8 {
            0..=2 => return self.packet(step, len),
            3 | 4 => return self.buffer(u32::from(len)),
            5 => self.owners.with(port, |sockets, index| {
                let _ = sockets[index].write(&vec![flags; usize::from(len)]);
            }),
            6 => self.owners.with(port, |sockets, index| {
                let _ = sockets[index].read(&mut vec![0; usize::from(len)]);
            }),
            _ => match op % 8 {
                0 => self
                    .owners
                    .with(port, |sockets, index| drop(sockets.swap_remove(index))),
                1 => self.owners.with(port, |sockets, index| {
                    let _ = sockets[index].shutdown(Shutdown::Write);
                }),
                2 => self.owners.with(port, |sockets, index| {
                    let _ = sockets[index].shutdown(Shutdown::Read);
                }),
                3 => self.muxer.clear(),
                // A late event, of a connection that may be gone.
                4 => self.muxer.event(
                    u32::from_le_bytes([port, flags, alloc, 0]),
                    u32::from(forwarded) << 2,
                ),
                _ => {
                    if let Ok((ours, theirs)) = UnixStream::pair()
                        && self.owners.add(theirs).is_ok()
                    {
                        self.muxer.dial(u32::from(port % 4), ours, &self.watch);
                    }
                }
            },
        }
        Ok(())
    }

    /// A packet of the guest: as the step says, down to lies about its length, address and type.
    fn packet(&mut self, step: &[u8; STEP], len: u16) -> Result<(), GuestFault> {
        let [what, port, op, flags, _, _, alloc, forwarded] = *step;
        let key = Key {
            guest: u32::from(port % 4),
            // Dialled connections have ports from 2^30 on.
            host: if port & 0x80 == 0 {
                u32::from(port >> 2 & 7)
            } else {
                (1 << 30) + u32::from(port >> 2 & 7)
            },
        };
        let (alloc, forwarded) = (u32::from(alloc) << 10, u32::from(forwarded) << 8);
        let mut raw = [0; HEADER_BYTES];
        raw[0] = GUEST_CID;
        raw[8] = if what & 0x80 == 0 { HOST_CID } else { port };
        raw[16..20].copy_from_slice(&key.guest.to_le_bytes());
        raw[20..24].copy_from_slice(&key.host.to_le_bytes());
        raw[24..26].copy_from_slice(&len.to_le_bytes());
        raw[28] = if what & 0x40 == 0 { 1 } else { flags };
        raw[30] = op % 10;
        raw[32] = flags;
        raw[36..40].copy_from_slice(&alloc.to_le_bytes());
        raw[40..44].copy_from_slice(&forwarded.to_le_bytes());
        // What really follows the header.
        let payload = match what >> 3 & 7 {
            7 => len / 2,
            _ => len,
        };
        let payload = vec![op; usize::from(payload)];
        self.driver.rewind();
        self.driver.offer(&[&raw, &payload], &[]);
        if let Some(chain) = self.driver.pop()? {
            let credit = self.credit.entry(key).or_default();
            (credit.alloc, credit.forwarded) = (alloc, forwarded);
            self.muxer.packet(&chain, &self.watch)?;
            self.driver.queue.push(chain.head(), 0)?;
        }
        Ok(())
    }

    /// A buffer of the guest's, filled with the next packet and checked.
    fn buffer(&mut self, len: u32) -> Result<(), GuestFault> {
        if !self.muxer.has_work() {
            return Ok(());
        }
        self.driver.rewind();
        // In two parts, as our guest's driver lays it out.
        let header = u32::try_from(HEADER_BYTES).unwrap_or(0).min(len);
        let addresses = self.driver.offer(&[], &[header, len - header]);
        let Some(chain) = self.driver.pop()? else {
            return Ok(());
        };
        let Some(written) = self.muxer.emit(&chain)? else {
            return Ok(());
        };
        assert!(written >= HEADER_BYTES && written <= len as usize);
        let raw = self.driver.get(addresses[0], HEADER_BYTES);
        let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let (payload, op) = (
            word(24),
            Op::from_wire(u16::from_le_bytes([raw[30], raw[31]])),
        );
        assert_eq!(payload as usize, written - HEADER_BYTES);
        let key = Key {
            guest: word(20),
            host: word(16),
        };
        let credit = self.credit.entry(key).or_default();
        match op {
            Some(Op::Request | Op::Response) => credit.sent = 0,
            Some(Op::Data) => {
                assert!(
                    payload > 0 && payload <= credit.left(),
                    "more than the guest takes"
                );
                credit.sent = credit.sent.wrapping_add(payload);
            }
            Some(_) => assert_eq!(payload, 0),
            None => unreachable!("an operation that is none"),
        }
        self.driver.queue.push(chain.head(), 0)
    }

    /// The device hears of its sockets.
    fn hear(&mut self) {
        let mut events = [EpollEvent::default(); 32];
        let ready = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..ready] {
            let [a, b, c, d, ..] = event.data().to_le_bytes();
            self.muxer
                .event(u32::from_le_bytes([a, b, c, d]), event.events());
        }
    }
}
