//! How much memory the guest is to have beyond what it booted with, and how much of it it has taken.
//!
//! Contract: the owner says how much ([`Growth::ask`]), the guest's driver follows by plugging and unplugging blocks, and
//! the owner is told once when it has. A chunk is in KVM's hands for as long as one of its blocks is plugged; an unplugged
//! block is given back to the host. Whatever the guest does, it has plugged no more than the most it was asked to have.
//! Threads: the main thread asks, the device's thread follows; one lock.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::wire::{Blocks, Request, Response};
use crate::log;
use crate::memory::{BLOCK_BYTES, CHUNK_BLOCKS, CHUNK_BYTES, Mem, MemoryError};
use crate::virtio::ConfigSpace;

/// Offsets in `struct virtio_mem_config`.
const USABLE_AT: usize = 32;
const PLUGGED_AT: usize = 40;
const REQUESTED_AT: usize = 48;
pub(super) const CONFIG_BYTES: usize = 56;

/// Who gives chunks to the guest: KVM, and the test double.
pub trait Slots: Send + Sync {
    /// The guest can reach the chunk with that number from now on.
    ///
    /// # Errors
    /// In words, if the host refuses.
    fn give(&self, chunk: u64, addr: u64, host: u64) -> Result<(), String>;

    /// It cannot any more.
    ///
    /// # Errors
    /// As above.
    fn take(&self, chunk: u64, addr: u64) -> Result<(), String>;
}

/// Who is told when the guest has followed: how many bytes it has beyond what it booted with.
pub type Tell = Box<dyn Fn(u64) + Send + Sync>;

/// The state of the guest's growth; clones share it.
#[derive(Clone)]
pub struct Growth(Arc<Shared>);

struct Shared {
    mem: Mem,
    config: ConfigSpace,
    slots: Arc<dyn Slots>,
    tell: Tell,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requested: u64,
    plugged: u64,
    /// The owner waits to hear that the guest has followed.
    awaited: bool,
}

impl Growth {
    /// No growth so far.
    pub fn new(mem: &Mem, slots: Arc<dyn Slots>, tell: Tell) -> Self {
        let room = mem.room();
        let mut bytes = vec![0; CONFIG_BYTES];
        for (at, value) in [(0, BLOCK_BYTES), (16, room.start()), (24, room.bytes())] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        Self(Arc::new(Shared {
            mem: mem.clone(),
            config: ConfigSpace::read_only(bytes),
            slots,
            tell,
            state: Mutex::default(),
        }))
    }

    pub(super) fn config(&self) -> &ConfigSpace {
        &self.0.config
    }

    pub(super) fn mem(&self) -> &Mem {
        &self.0.mem
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest to have so many bytes, in whole blocks, beyond what it booted with. The caller interrupts the driver.
    ///
    /// # Errors
    /// There is no room for so much, or the host has not so much.
    pub fn ask(&self, bytes: u64) -> Result<(), MemoryError> {
        let room = self.0.mem.room();
        let bytes = bytes.next_multiple_of(BLOCK_BYTES);
        room.reach_to(bytes)?;
        let mut state = self.lock();
        state.requested = bytes;
        state.awaited = true;
        let usable = room.reach();
        self.0.config.update(|space| {
            space[USABLE_AT..USABLE_AT + 8].copy_from_slice(&usable.to_le_bytes());
            space[REQUESTED_AT..REQUESTED_AT + 8].copy_from_slice(&bytes.to_le_bytes());
        });
        self.tell(&mut state);
        Ok(())
    }

    /// Tells the owner, once, that the guest has followed.
    fn tell(&self, state: &mut State) {
        if state.awaited && state.plugged == state.requested {
            state.awaited = false;
            (self.0.tell)(state.plugged);
        }
    }

    /// Does what the guest's driver asks for.
    pub(super) fn obey(&self, request: &Request) -> Response {
        let mut state = self.lock();
        let before = state.plugged;
        let response = match request {
            Request::Plug(blocks) => self.plug(&mut state, blocks),
            Request::Unplug(blocks) => self.unplug(&mut state, blocks),
            Request::UnplugAll => {
                let all = 0..self.0.mem.room().reach() / BLOCK_BYTES;
                self.give_back(all);
                state.plugged = 0;
                Response::Ack
            }
            Request::State(blocks) => self.state_of(blocks),
        };
        if state.plugged != before {
            let plugged = state.plugged.to_le_bytes();
            let show =
                |space: &mut [u8]| space[PLUGGED_AT..PLUGGED_AT + 8].copy_from_slice(&plugged);
            self.0.config.update(show);
            self.tell(&mut state);
        }
        response
    }

    fn plug(&self, state: &mut State, blocks: &Blocks) -> Response {
        let room = self.0.mem.room();
        let fits = blocks.range().end * BLOCK_BYTES <= room.reach();
        if !fits || self.state_of(blocks) != Response::Unplugged {
            return Response::Error;
        }
        if state.plugged + blocks.bytes() > state.requested {
            return Response::Nack;
        }
        for chunk in chunks(&blocks.range()) {
            if !room.is_empty(chunk) {
                continue;
            }
            let given = room
                .chunk(chunk)
                .ok_or_else(|| "it is not mapped".to_owned())
                .and_then(|(addr, host)| self.0.slots.give(chunk, addr, host));
            if let Err(error) = given {
                log::guest_caused(format_args!("mem: give memory to the guest: {error}"));
                // What was given already is in use by nobody.
                self.take_empty(&blocks.range());
                return Response::Busy;
            }
        }
        room.mark(blocks.range(), true);
        state.plugged += blocks.bytes();
        Response::Ack
    }

    fn unplug(&self, state: &mut State, blocks: &Blocks) -> Response {
        if self.state_of(blocks) != Response::Plugged {
            return Response::Error;
        }
        self.give_back(blocks.range());
        state.plugged -= blocks.bytes();
        Response::Ack
    }

    /// To the devices it is no memory any more, then to the guest, then to the host.
    fn give_back(&self, blocks: Range<u64>) {
        let room = self.0.mem.room();
        room.mark(blocks.clone(), false);
        self.take_empty(&blocks);
        room.release(blocks);
    }

    fn take_empty(&self, blocks: &Range<u64>) {
        let room = self.0.mem.room();
        for chunk in chunks(blocks).filter(|chunk| room.is_empty(*chunk)) {
            let addr = room.start() + chunk * CHUNK_BYTES;
            // Not in KVM's hands, or it stays there: the guest may touch it, and is charged for it.
            let _ = self.0.slots.take(chunk, addr);
        }
    }

    fn state_of(&self, blocks: &Blocks) -> Response {
        let room = self.0.mem.room();
        let plugged = blocks
            .range()
            .filter(|block| room.is_plugged(*block))
            .count() as u64;
        match plugged * BLOCK_BYTES {
            0 => Response::Unplugged,
            bytes if bytes == blocks.bytes() => Response::Plugged,
            _ => Response::Mixed,
        }
    }
}

fn chunks(blocks: &Range<u64>) -> Range<u64> {
    blocks.start / CHUNK_BLOCKS..blocks.end.div_ceil(CHUNK_BLOCKS)
}
