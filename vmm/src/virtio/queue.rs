//! One split virtqueue in use: chains out of the available ring, chains into the used ring.
//!
//! Contract: `pop` takes at most [`TURN`] chains between two visits of the worker, so that no queue starves the others
//! on its thread; when it says no because the ring is empty, the driver has been asked for the next kick. `push`
//! returns a chain; whether that needs an interrupt is decided once per turn (`Queue::wants_interrupt`).
//! Errors: every error is a [`GuestFault`].
//! Spec: virtio 1.2, 2.7 (split virtqueues), 2.7.7 and 2.7.10 (notification suppression with EVENT_IDX).

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Error, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::{Chain, GuestFault};
use crate::memory::Mem;

/// The most chains taken in one turn of the worker.
pub const TURN: u32 = 1024;

/// Where a queue is and how far it got: all there is to save of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Number of entries that the driver chose.
    pub size: u16,
    /// Whether the driver enabled the queue.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// Chains taken so far, modulo 2^16.
    pub next_available: u16,
    /// Chains returned so far, modulo 2^16.
    pub next_used: u16,
}

/// A queue that the driver set up. See the file header.
#[derive(Debug)]
pub struct Queue {
    ring: virtio_queue::Queue,
    mem: Mem,
    left: u32,
    pushed: bool,
}

impl Queue {
    /// Takes over the queue that `state` describes.
    ///
    /// # Errors
    /// [`GuestFault::Ring`] if its size or place is impossible.
    pub fn restore(state: &QueueState, event_idx: bool, mem: &Mem) -> Result<Self, GuestFault> {
        let saved = virtio_queue::QueueState {
            max_size: state.size,
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        };
        let ring = virtio_queue::Queue::try_from(saved)
            .map_err(|_| GuestFault::Ring("bad size or misaligned ring"))?;
        if state.ready && !ring.is_valid(mem.as_ref()) {
            return Err(GuestFault::Ring("a ring is outside of guest memory"));
        }
        Ok(Self {
            ring,
            mem: mem.clone(),
            left: TURN,
            pushed: false,
        })
    }

    /// The queue as it is now.
    pub fn state(&self) -> QueueState {
        let state = self.ring.state();
        QueueState {
            size: state.size,
            ready: state.ready,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
        }
    }

    /// Whether the driver enabled the queue.
    pub fn is_ready(&self) -> bool {
        self.ring.ready()
    }

    /// Takes the next chain into `chain`. `false`: there is none (the next one will kick), the queue is not ready, or
    /// this turn is over (the worker comes back).
    ///
    /// # Errors
    /// [`GuestFault`] for impossible indexes or a bad chain.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, GuestFault> {
        match self.pop_raw()? {
            None => Ok(false),
            Some(raw) => {
                let table = GuestAddress(self.ring.desc_table());
                chain
                    .walk(table, self.ring.size(), raw.head_index())
                    .map(|()| true)
            }
        }
    }

    /// As [`Queue::pop`], without the checks of `chain.rs`: for a server that brings its own (virtiofsd).
    ///
    /// # Errors
    /// [`GuestFault::Ring`] for impossible indexes.
    pub fn pop_raw(&mut self) -> Result<Option<DescriptorChain<Mem>>, GuestFault> {
        if self.left == 0 || !self.ring.ready() {
            return Ok(None);
        }
        let next = self.next()?;
        if next.is_none()
            && self
                .ring
                .enable_notification(self.mem.as_ref())
                .map_err(fault)?
        {
            return self.next(); // arrived between the two looks
        }
        Ok(next)
    }

    fn next(&mut self) -> Result<Option<DescriptorChain<Mem>>, GuestFault> {
        let chain = self.ring.iter(self.mem.clone()).map_err(fault)?.next();
        self.left -= u32::from(chain.is_some());
        Ok(chain)
    }

    /// Puts the chain that was popped last back, as if it had not been popped.
    pub fn unpop(&mut self) {
        self.ring.go_to_previous_position();
        self.left = self.left.saturating_add(1);
    }

    /// Returns the chain with that head, of which the device wrote `written` bytes.
    ///
    /// # Errors
    /// [`GuestFault::Ring`] if the used ring is out of reach.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), GuestFault> {
        self.pushed = true;
        self.ring
            .add_used(self.mem.as_ref(), head, written)
            .map_err(fault)
    }

    /// Whether chains are waiting.
    ///
    /// # Errors
    /// [`GuestFault::Ring`] if the available ring is out of reach.
    pub(super) fn has_waiting(&self) -> Result<bool, GuestFault> {
        if !self.ring.ready() {
            return Ok(false);
        }
        let published = self
            .ring
            .avail_idx(self.mem.as_ref(), std::sync::atomic::Ordering::Acquire);
        Ok(published.map_err(fault)?.0 != self.ring.next_avail())
    }

    /// Starts a new turn; `true` if the last one ended with chains possibly left.
    pub(crate) fn new_turn(&mut self) -> bool {
        let exhausted = self.left == 0;
        self.left = TURN;
        exhausted
    }

    /// Whether chains were pushed since the last call and the driver wants to hear of it.
    pub(super) fn wants_interrupt(&mut self) -> Result<bool, GuestFault> {
        if !std::mem::take(&mut self.pushed) {
            return Ok(false);
        }
        self.ring
            .needs_notification(self.mem.as_ref())
            .map_err(fault)
    }
}

fn fault(error: Error) -> GuestFault {
    GuestFault::Ring(match error {
        Error::InvalidAvailRingIndex => "more chains offered than the queue has entries",
        Error::InvalidDescriptorIndex => "a chain with an impossible head",
        Error::QueueNotReady => "the queue is not set up",
        _ => "a ring is out of reach",
    })
}
