//! The available and the used ring of a split virtqueue: found in guest memory once, then read and written in place.
//!
//! Contract: all of both rings, and of the descriptor table, is guest memory when the [`Rings`] are made. What the guest
//! unplugs of it later stays mapped, and so it only harms itself. Positions count modulo 2^16, as the guest's.
//! Finding the memory anew for each access, as for descriptors, would cost more than all the rest of a queue.
//! Spec: virtio 1.2, 2.7.6 (available ring), 2.7.8 (used ring), 2.7.7 and 2.7.10 (EVENT_IDX).

use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;

use super::GuestFault;
use super::queue::QueueState;
use super::slice::GuestSlice;
use crate::memory::Mem;

/// Flags and index come first in both.
const HEADER_BYTES: usize = 4;
const INDEX_AT: usize = 2;
const HEAD_BYTES: usize = 2;
/// Head and length.
const USED_BYTES: usize = 8;
const EVENT_BYTES: usize = 2;
const DESCRIPTOR_BYTES: usize = 16;

/// Both rings of a queue.
#[derive(Debug)]
pub(super) struct Rings {
    available: GuestSlice,
    used: GuestSlice,
    size: u16,
}

impl Rings {
    /// Those of the queue that `state` describes; `None` unless they and the table are guest memory.
    pub(super) fn resolve(state: &QueueState, mem: &Mem) -> Option<Self> {
        let size = usize::from(state.size);
        let find = |at, len| GuestSlice::resolve(mem, GuestAddress(at), len);
        find(state.descriptors, size * DESCRIPTOR_BYTES)?;
        let around = HEADER_BYTES + EVENT_BYTES;
        Some(Self {
            available: find(state.available, around + size * HEAD_BYTES)?,
            used: find(state.used, around + size * USED_BYTES)?,
            size: state.size,
        })
    }

    fn place(&self, position: u16, entry_bytes: usize) -> usize {
        // A size is a power of 2, and not 0.
        HEADER_BYTES + usize::from(position & (self.size - 1)) * entry_bytes
    }

    /// The position after the last chain that the driver offers; what it wrote before that is seen.
    pub(super) fn available(&self) -> Result<u16, GuestFault> {
        let index = self.available.load_u16(INDEX_AT, Ordering::Acquire);
        index.map(u16::from_le).ok_or(OUT_OF_REACH)
    }

    /// Whether there is a chain at `next`.
    pub(super) fn offered(&self, next: u16) -> Result<bool, GuestFault> {
        let waiting = self.available()?.wrapping_sub(next);
        if waiting > self.size {
            let what = "more chains offered than the queue has entries";
            return Err(GuestFault::Ring(what));
        }
        Ok(waiting > 0)
    }

    /// The head of the chain offered at a position.
    pub(super) fn head(&self, position: u16) -> Result<u16, GuestFault> {
        let at = self.place(position, HEAD_BYTES);
        let head = self.available.load_u16(at, Ordering::Relaxed);
        head.map(u16::from_le).ok_or(OUT_OF_REACH)
    }

    /// Asks for a kick when the chain at `next` is offered.
    pub(super) fn ask_for_kick(&self, next: u16) -> Result<(), GuestFault> {
        let at = HEADER_BYTES + usize::from(self.size) * USED_BYTES;
        let asked = self.used.store_u16(next.to_le(), at, Ordering::Relaxed);
        asked.ok_or(OUT_OF_REACH)
    }

    /// Writes a used chain down.
    pub(super) fn put_used(&self, at: u16, head: u16, written: u32) -> Result<(), GuestFault> {
        let at = self.place(at, USED_BYTES);
        let put = |number: u32, at| self.used.store_u32(number.to_le(), at, Ordering::Relaxed);
        put(head.into(), at)
            .and_then(|()| put(written, at + USED_BYTES / 2))
            .ok_or(OUT_OF_REACH)
    }

    /// Shows the driver the used chains before `next`.
    pub(super) fn publish_used(&self, next: u16) -> Result<(), GuestFault> {
        let published = self
            .used
            .store_u16(next.to_le(), INDEX_AT, Ordering::Release);
        published.ok_or(OUT_OF_REACH)
    }

    /// The used chain that the driver wants to hear of.
    pub(super) fn used_event(&self) -> Result<u16, GuestFault> {
        let at = HEADER_BYTES + usize::from(self.size) * HEAD_BYTES;
        let event = self.available.load_u16(at, Ordering::Relaxed);
        event.map(u16::from_le).ok_or(OUT_OF_REACH)
    }
}

/// Cannot be: every place is inside what was found, and aligned as the rings are.
const OUT_OF_REACH: GuestFault = GuestFault::Ring("a ring is out of reach");

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::memory::Memory;

    const STATE: QueueState = QueueState {
        size: 4,
        ready: true,
        descriptors: 0x100,
        available: 0x200,
        used: 0x300,
        next_available: 0,
        next_used: 0,
    };

    fn memory() -> Mem {
        let ranges = [(GuestAddress(0), 0x1000)];
        Arc::new(Memory::from(GuestMemoryMmap::from_ranges(&ranges).unwrap()))
    }

    #[test]
    fn entries_are_where_the_specification_has_them() {
        let mem = memory();
        let rings = Rings::resolve(&STATE, &mem).unwrap();
        let available: Vec<u8> = [0_u16, 6, 10, 11, 12, 13, 99]
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        mem.write_slice(&available, GuestAddress(0x200)).unwrap();
        assert_eq!(rings.available().unwrap(), 6);
        assert_eq!(
            [4, 7, u16::MAX].map(|at| rings.head(at).unwrap()),
            [10, 13, 13]
        );
        assert_eq!(rings.used_event().unwrap(), 99);
        rings.put_used(5, 7, 1000).unwrap();
        rings.publish_used(6).unwrap();
        rings.ask_for_kick(9).unwrap();
        let mut used = [0; 38];
        mem.read_slice(&mut used, GuestAddress(0x300)).unwrap();
        assert_eq!(used[..4], [0, 0, 6, 0]);
        assert_eq!(used[12..20], [7, 0, 0, 0, 232, 3, 0, 0]);
        assert_eq!(used[36..], [9, 0]);
    }

    #[test]
    fn at_most_as_many_chains_are_offered_as_there_are_entries() {
        let mem = memory();
        let rings = Rings::resolve(&STATE, &mem).unwrap();
        mem.write_obj(2_u16, GuestAddress(0x202)).unwrap();
        assert_eq!(rings.offered(2), Ok(false));
        assert_eq!(rings.offered(u16::MAX - 1), Ok(true), "four, across zero");
        assert!(rings.offered(u16::MAX - 2).is_err());
        assert!(rings.offered(3).is_err());
    }

    #[test]
    fn all_of_a_queue_must_be_in_memory() {
        let mem = memory();
        let fits = |state: QueueState| Rings::resolve(&state, &mem).is_some();
        let (descriptors, available, used) = (0x1000 - 64, 0x1000 - 14, 0x1000 - 38);
        assert!(fits(QueueState {
            descriptors,
            ..STATE
        }));
        assert!(!fits(QueueState {
            descriptors: descriptors + 16,
            ..STATE
        }));
        assert!(fits(QueueState { available, ..STATE }));
        assert!(!fits(QueueState {
            available: available + 2,
            ..STATE
        }));
        assert!(fits(QueueState { used, ..STATE }));
        assert!(!fits(QueueState {
            used: used + 4,
            ..STATE
        }));
    }
}
