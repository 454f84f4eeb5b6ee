//! The driver's half of a queue, for tests and fuzz targets: lays chains out in guest memory and reads what came back.
//!
//! Contract: nothing here checks anything, so that it can also say what no driver should. Offered chains use fresh
//! descriptors and fresh buffers until [`Driver::rewind`].

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::{Mem, Memory};
use crate::virtio::queue::QueueState;
use crate::virtio::{Chain, Queue};

/// Size of the guest's memory.
pub const MEMORY_BYTES: u64 = 8 << 20;
const MEMORY_LEN: usize = 8 << 20;
/// Number of entries of the queue.
pub const ENTRIES: u16 = 256;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x6000;
const BUFFERS: u64 = 0x10_0000;

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub const WRITE: u16 = 2;

/// A descriptor as the guest writes it: address, length, flags, next.
pub type Raw = (u64, u32, u16, u16);

/// One queue of one guest, seen by its driver.
pub struct Driver {
    /// The guest's memory.
    pub mem: Mem,
    /// The device's half.
    pub queue: Queue,
    descriptors: u16,
    buffers: u64,
    offered: u16,
}

#[allow(clippy::new_without_default, reason = "it maps memory")]
impl Driver {
    /// An empty queue in zeroed memory.
    ///
    /// # Panics
    /// If the host has no 8 MiB.
    #[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
    pub fn new() -> Self {
        let ranges = [(GuestAddress(0), MEMORY_LEN)];
        let mem: Mem = Arc::new(Memory::from(GuestMemoryMmap::from_ranges(&ranges).unwrap()));
        let state = QueueState {
            size: ENTRIES,
            ready: true,
            descriptors: TABLE,
            available: AVAILABLE,
            used: USED,
            ..QueueState::default()
        };
        let queue = Queue::restore(&state, false, &mem).unwrap();
        Self {
            mem,
            queue,
            descriptors: 0,
            buffers: BUFFERS,
            offered: 0,
        }
    }

    /// Starts over with descriptors, buffers and the device's turn; the ring goes on.
    pub fn rewind(&mut self) {
        (self.descriptors, self.buffers) = (0, BUFFERS);
        if let Ok(queue) = Queue::restore(&self.queue.state(), false, &self.mem) {
            self.queue = queue;
        }
    }

    /// Offers a chain of buffers that hold `readable`, followed by writable ones of the given lengths, and returns the
    /// addresses of all.
    pub fn offer(&mut self, readable: &[&[u8]], writable: &[u32]) -> Vec<u64> {
        let mut chain: Vec<Raw> = Vec::new();
        for bytes in readable {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let at = self.place(len);
            self.put(at, bytes);
            chain.push((at, len, 0, 0));
        }
        for len in writable {
            chain.push((self.place(*len), *len, WRITE, 0));
        }
        let addresses = chain.iter().map(|raw| raw.0).collect();
        if let Some((_, linked)) = chain.split_last_mut() {
            for (next, raw) in (self.descriptors + 1..).zip(linked) {
                raw.2 |= NEXT;
                raw.3 = next;
            }
        }
        self.offer_raw(&chain);
        addresses
    }

    /// Writes descriptors as they are, and offers the first of them as the head of a chain.
    pub fn offer_raw(&mut self, chain: &[Raw]) {
        let head = self.descriptors;
        for (addr, len, flags, next) in chain {
            let mut raw = addr.to_le_bytes().to_vec();
            raw.extend(len.to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend(next.to_le_bytes());
            self.put(TABLE + 16 * u64::from(self.descriptors), &raw);
            self.descriptors = (self.descriptors + 1) % ENTRIES;
        }
        let slot = AVAILABLE + 4 + 2 * u64::from(self.offered % ENTRIES);
        self.put(slot, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.offered.to_le_bytes());
    }

    /// The offered chain, checked.
    ///
    /// # Errors
    /// What `Queue::pop` finds.
    pub fn pop(&mut self) -> Result<Option<Chain>, crate::virtio::GuestFault> {
        let mut chain = Chain::new(&self.mem);
        Ok(self.queue.pop(&mut chain)?.then_some(chain))
    }

    /// Writes guest memory; what lies outside is dropped.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.mem.write_slice(bytes, GuestAddress(at));
    }

    /// Reads guest memory; zeros where there is none.
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = self.mem.read_slice(&mut bytes, GuestAddress(at));
        bytes
    }

    /// The number of chains that came back, and head and length of the last.
    pub fn used(&self) -> (u16, u32, u32) {
        let word = |at: u64| u32::from_le_bytes(self.get(at, 4).try_into().unwrap_or_default());
        let [_, _, low, high] = word(USED).to_le_bytes();
        let count = u16::from_le_bytes([low, high]);
        let last = USED + 4 + 8 * u64::from(count.wrapping_sub(1) % ENTRIES);
        (count, word(last), word(last + 4))
    }

    fn place(&mut self, len: u32) -> u64 {
        let at = self.buffers;
        self.buffers += u64::from(len).next_multiple_of(16);
        at
    }
}
