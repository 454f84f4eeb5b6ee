//! All vsock connections of a guest: found by their ports, served in turn, bounded in number and in memory.
//!
//! Contract: at most [`MAX_BY_GUEST`] connections that the guest asked for and as many that the owner dialled. The first
//! [`LARGE`] of all get 256 KiB of credit, the others 16 KiB: a guest and readers that stand still make this process
//! hold at most 40 MiB. Packets for nobody are answered by a reset, of which [`MAX_RESETS`] may wait for a buffer.
//! A connection that has something for the guest gets one packet per round.
//! Threads: the device's only.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::connection::{After, Connection, non_blocking};
use super::wire::{HEADER_BYTES, Header, Key, Op, Refused};
use crate::counters::{Counter, Counters};
use crate::virtio::{Chain, GuestFault, Watch};

/// The most connections that the guest may have asked for, and the most that the owner may have dialled.
pub const MAX_BY_GUEST: usize = 1024;
/// The most resets that wait for a buffer; further ones are not sent.
pub const MAX_RESETS: usize = 256;
/// How many connections get the large credit.
pub const LARGE: usize = 32;

const LARGE_BYTES: u32 = 256 << 10;
const SMALL_BYTES: u32 = 16 << 10;
/// Ports for the host's end of dialled connections: above those that owners name.
const FIRST_DIAL_PORT: u32 = 1 << 30;

/// Bits of a token that name the slot; the rest is a generation, so that a late event never meets a new connection.
const SLOT_BITS: u32 = 12;
const GENERATIONS: u32 = 1 << 19;

/// Who gets the host's end of a connection that the guest asked for.
pub trait Owner: Send {
    /// The guest connected to `port`.
    ///
    /// # Errors
    /// The connection is then refused.
    fn accepted(&self, port: u32, socket: UnixStream) -> io::Result<()>;
}

/// The connections.
pub struct Muxer {
    owner: Box<dyn Owner>,
    slots: Vec<Option<Connection>>,
    by_key: HashMap<Key, u32>,
    by_guest: usize,
    large: usize,
    runnable: VecDeque<u32>,
    resets: VecDeque<Key>,
    next_port: u32,
    generation: u32,
    opened: Counter,
    refused: Counter,
    bytes_in: Counter,
    bytes_out: Counter,
}

impl Muxer {
    /// No connections yet.
    pub fn new(owner: Box<dyn Owner>, counters: &Counters) -> Self {
        Self {
            owner,
            slots: Vec::new(),
            by_key: HashMap::new(),
            by_guest: 0,
            large: 0,
            runnable: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_DIAL_PORT,
            generation: 0,
            opened: counters.register("vsock.opened"),
            refused: counters.register("vsock.refused"),
            bytes_in: counters.register("vsock.bytes_from_guest"),
            bytes_out: counters.register("vsock.bytes_to_guest"),
        }
    }

    /// A packet of the guest: the readable part of `chain`.
    ///
    /// # Errors
    /// The chain is shorter than a header, or than the header says.
    pub fn packet(&mut self, chain: &Chain, watch: &Watch) -> Result<(), GuestFault> {
        let header = match Header::parse(&chain.read_array::<HEADER_BYTES>(0)?) {
            Ok(header) => header,
            Err(Refused::Address) => {
                self.refused.add(1);
                return Ok(());
            }
            Err(Refused::Kind(key)) => {
                self.refuse(key);
                return Ok(());
            }
        };
        match self.by_key.get(&header.key).copied() {
            Some(slot) => {
                let place = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
                let Some(connection) = place else {
                    return Ok(());
                };
                let after = connection.packet(&header, chain)?;
                if header.op == Op::Data {
                    self.bytes_in.add(u64::from(header.len));
                }
                self.settle(slot, after);
            }
            None if header.op == Op::Request => self.accept(&header, watch),
            None if header.op == Op::Reset => {}
            None => self.refuse(header.key),
        }
        Ok(())
    }

    fn accept(&mut self, header: &Header, watch: &Watch) {
        if self.by_guest == MAX_BY_GUEST {
            return self.refuse(header.key);
        }
        let connected = UnixStream::pair().and_then(|(ours, theirs)| {
            self.owner.accepted(header.key.host, theirs)?;
            non_blocking(ours)
        });
        match connected {
            Ok(socket) => {
                let connection = Connection::accepted(header, socket, self.credit());
                self.insert(connection, watch);
            }
            Err(_) => self.refuse(header.key),
        }
    }

    /// The owner wants a connection to the guest's `port`. If it cannot be had, `socket` is closed.
    pub fn dial(&mut self, port: u32, socket: UnixStream, watch: &Watch) {
        if self.by_key.len() - self.by_guest >= MAX_BY_GUEST {
            return;
        }
        let Ok(socket) = non_blocking(socket) else {
            return;
        };
        let mut key = Key {
            guest: port,
            host: self.next_port,
        };
        while self.by_key.contains_key(&key) {
            key.host = key.host.wrapping_add(1).max(FIRST_DIAL_PORT);
        }
        self.next_port = key.host.wrapping_add(1).max(FIRST_DIAL_PORT);
        let connection = Connection::dialled(key, socket, self.credit());
        self.insert(connection, watch);
    }

    fn credit(&self) -> u32 {
        if self.large < LARGE {
            LARGE_BYTES
        } else {
            SMALL_BYTES
        }
    }

    fn insert(&mut self, mut connection: Connection, watch: &Watch) {
        let free = self
            .slots
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.slots.len());
        // At most 2048.
        let slot = u32::try_from(free).unwrap_or(u32::MAX);
        self.generation = (self.generation + 1) % GENERATIONS;
        connection.token = self.generation << SLOT_BITS | slot;
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if watch
            .add(connection.as_fd(), connection.token, events)
            .is_err()
        {
            return self.refuse(connection.key());
        }
        self.opened.add(1);
        self.by_guest += usize::from(connection.by_guest);
        self.large += usize::from(connection.alloc() == LARGE_BYTES);
        self.by_key.insert(connection.key(), slot);
        if free == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[free] = Some(connection);
        self.settle(slot, After::Keep);
    }

    fn refuse(&mut self, key: Key) {
        self.refused.add(1);
        self.reset(key);
    }

    fn reset(&mut self, key: Key) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(key);
        }
    }

    /// The socket of the connection with that token is ready. Late events are dropped.
    pub fn event(&mut self, token: u32, events: u32) {
        let slot = token & ((1 << SLOT_BITS) - 1);
        let place = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
        if let Some(connection) = place.filter(|connection| connection.token == token) {
            let after = connection.event(events);
            self.settle(slot, after);
        }
    }

    /// Lines a connection up if it has something to send, or ends it. Closing its socket ends the watch, too.
    fn settle(&mut self, slot: u32, after: After) {
        let Some(place) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let Some(connection) = place.as_mut() else {
            return;
        };
        if after == After::Keep {
            if connection.has_work() && !connection.queued {
                connection.queued = true;
                self.runnable.push_back(slot);
            }
            return;
        }
        let key = connection.key();
        self.by_guest -= usize::from(connection.by_guest);
        self.large -= usize::from(connection.alloc() == LARGE_BYTES);
        *place = None;
        self.by_key.remove(&key);
        if after == After::Reset {
            self.reset(key);
        }
    }

    /// Whether something waits for a buffer of the guest.
    pub fn has_work(&self) -> bool {
        !self.resets.is_empty() || !self.runnable.is_empty()
    }

    /// Fills the writable part of `chain` with the next packet; its length, or `None` if there is none after all.
    ///
    /// # Errors
    /// The chain is too short for a packet.
    pub fn emit(&mut self, chain: &Chain) -> Result<Option<usize>, GuestFault> {
        if let Some(key) = self.resets.pop_front() {
            chain.write(0, &Header::bare(key, Op::Reset).encode())?;
            return Ok(Some(HEADER_BYTES));
        }
        while let Some(slot) = self.runnable.pop_front() {
            let place = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
            let Some(connection) = place else { continue };
            connection.queued = false;
            match connection.emit(chain)? {
                Ok(Some(len)) => {
                    self.bytes_out.add(len.saturating_sub(HEADER_BYTES) as u64);
                    self.settle(slot, After::Keep);
                    return Ok(Some(len));
                }
                Ok(None) => self.settle(slot, After::Keep),
                Err(after) => {
                    self.settle(slot, after);
                    return if self.resets.is_empty() {
                        Ok(None)
                    } else {
                        self.emit(chain)
                    };
                }
            }
        }
        Ok(None)
    }

    /// Closes everything.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.by_key.clear();
        (self.by_guest, self.large) = (0, 0);
        self.runnable.clear();
        self.resets.clear();
    }
}
