//! One split virtqueue in use: chains out of the available ring, chains into the used ring.
//!
//! Contract: `pop` takes at most [`TURN`] chains between two visits of the worker, so that no queue starves the others
//! on its thread; when it says no because the ring is empty, the driver has been asked for the next kick. `push`
//! returns a chain; whether that needs an interrupt is decided once per turn (`Queue::wants_interrupt`).
//! Errors: every error is a [`GuestFault`].
//! Not here: where the rings are in memory (`ring.rs`), what is in a chain (`chain.rs`).
//! Spec: virtio 1.2, 2.7 (split virtqueues), 2.7.7 and 2.7.10 (notification suppression with EVENT_IDX).

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Error, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::ring::Rings;
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
    /// Place and progress.
    ring: virtio_queue::Queue,
    /// There if the driver enabled the queue.
    rings: Option<Rings>,
    event_idx: bool,
    mem: Mem,
    left: u32,
    /// The last turn ended before `pop` had said no: the driver has not been asked for the next kick.
    cut: bool,
    /// Chains returned since the last look at whether the driver wants to hear of it.
    pushed: u16,
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
        let outside = GuestFault::Ring("a ring is outside of guest memory");
        let rings = state
            .ready
            .then(|| Rings::resolve(state, mem).ok_or(outside))
            .transpose()?;
        Ok(Self {
            ring,
            rings,
            event_idx,
            mem: mem.clone(),
            left: TURN,
            cut: false,
            pushed: 0,
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
        self.rings.is_some()
    }

    /// Takes the next chain into `chain`. `false`: there is none (the next one will kick), the queue is not ready, or
    /// this turn is over (the worker comes back).
    ///
    /// # Errors
    /// [`GuestFault`] for impossible indexes or a bad chain.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, GuestFault> {
        let Some(rings) = self.rings.as_ref().filter(|_| self.left > 0) else {
            return Ok(false);
        };
        let next = self.ring.next_avail();
        if !is_offered(rings, next, self.event_idx)? {
            return Ok(false);
        }
        let head = rings.head(next)?;
        self.ring.set_next_avail(next.wrapping_add(1));
        self.left -= 1;
        let table = GuestAddress(self.ring.desc_table());
        chain.walk(table, self.ring.size(), head).map(|()| true)
    }

    /// As [`Queue::pop`], without the checks of `chain.rs`: for a server that brings its own (virtiofsd).
    ///
    /// # Errors
    /// [`GuestFault::Ring`] for impossible indexes.
    pub fn pop_raw(&mut self) -> Result<Option<DescriptorChain<Mem>>, GuestFault> {
        let Some(rings) = self.rings.as_ref().filter(|_| self.left > 0) else {
            return Ok(None);
        };
        if !is_offered(rings, self.ring.next_avail(), self.event_idx)? {
            return Ok(None);
        }
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
        let rings = self.rings.as_ref().ok_or(NOT_READY)?;
        if head >= self.ring.size() {
            return Err(GuestFault::Ring("a chain with an impossible head"));
        }
        let at = self.ring.next_used();
        let next = at.wrapping_add(1);
        rings.put_used(at, head, written)?;
        rings.publish_used(next)?;
        self.ring.set_next_used(next);
        self.pushed = self.pushed.saturating_add(1);
        Ok(())
    }

    /// Ends this turn, however many chains it has had; the worker comes back.
    pub fn end_turn(&mut self) {
        self.left = 0;
    }

    /// Whether chains are waiting, or may be without a kick to tell of them.
    ///
    /// # Errors
    /// [`GuestFault::Ring`] if the available ring is out of reach.
    pub(super) fn has_waiting(&self) -> Result<bool, GuestFault> {
        let Some(rings) = &self.rings else {
            return Ok(false);
        };
        Ok(self.cut || rings.available()? != self.ring.next_avail())
    }

    /// Starts a new turn; `true` if the last one ended with chains possibly left.
    pub(crate) fn new_turn(&mut self) -> bool {
        self.cut = self.left == 0;
        self.left = TURN;
        self.cut
    }

    /// Whether chains were pushed since the last call and the driver wants to hear of it.
    pub(super) fn wants_interrupt(&mut self) -> Result<bool, GuestFault> {
        let pushed = std::mem::take(&mut self.pushed);
        let Some(rings) = self.rings.as_ref().filter(|_| pushed > 0) else {
            return Ok(false);
        };
        if !self.event_idx {
            return Ok(true);
        }
        // What was returned must be there before the driver's wish is read: it looks the other way around.
        fence(Ordering::SeqCst);
        let past = self.ring.next_used().wrapping_sub(rings.used_event()?);
        Ok(past.wrapping_sub(1) < pushed)
    }
}

const NOT_READY: GuestFault = GuestFault::Ring("the queue is not set up");

/// Whether the driver offers a chain beyond `next`. If not, it has been asked for a kick with the next one.
fn is_offered(rings: &Rings, next: u16, event_idx: bool) -> Result<bool, GuestFault> {
    if rings.offered(next)? {
        return Ok(true);
    }
    if event_idx {
        rings.ask_for_kick(next)?;
    }
    // The wish must be there before the second look: the driver looks for it after it has offered.
    fence(Ordering::SeqCst);
    rings.offered(next)
}

fn fault(error: Error) -> GuestFault {
    GuestFault::Ring(match error {
        Error::InvalidAvailRingIndex => "more chains offered than the queue has entries",
        _ => "a ring is out of reach",
    })
}

#[cfg(test)]
mod tests {
    use crate::devices::driver::Driver;

    #[test]
    fn a_turn_that_was_ended_early_is_followed_by_one_that_asks_for_the_next_kick() {
        let mut driver = Driver::new();
        driver.offer(&[b"x"], &[]);
        let head = driver.pop().unwrap().unwrap().head();
        driver.queue.push(head, 0).unwrap();
        driver.queue.end_turn();
        assert!(driver.queue.new_turn());
        // Nothing is there, but nobody has been asked to tell when there is.
        assert!(driver.queue.has_waiting().unwrap());
        assert!(driver.pop().unwrap().is_none());
        assert!(!driver.queue.new_turn());
        assert!(!driver.queue.has_waiting().unwrap());
    }
}
