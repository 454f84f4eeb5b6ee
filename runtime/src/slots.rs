//! The places of a virtual machine for what comes later: network interfaces and disks.
//!
//! Contract: a place is whoever's took it, until it is given back. Interfaces take the first free one, disks the last, so
//! that both find room. Clones mean the same places.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_vmm_spec::{MAX_NETWORKS, NETWORK_DEVICES_FROM};

/// The places of one virtual machine, at most [`MAX_NETWORKS`].
#[derive(Debug, Clone, Default)]
pub struct Slots(Arc<Mutex<Vec<bool>>>);

impl Slots {
    /// So many, all of them free.
    pub fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![false; count.min(MAX_NETWORKS)])))
    }

    /// How many are free.
    pub fn free(&self) -> usize {
        self.taken().iter().filter(|taken| !**taken).count()
    }

    /// Takes the first that is free.
    pub fn take_first(&self) -> Option<u8> {
        self.take(|free| free.next())
    }

    /// Takes the last that is free.
    pub fn take_last(&self) -> Option<u8> {
        self.take(|free| free.next_back())
    }

    /// Gives one back.
    pub fn give_back(&self, slot: u8) {
        if let Some(taken) = self.taken().get_mut(usize::from(slot)) {
            *taken = false;
        }
    }

    fn take(
        &self,
        choose: impl FnOnce(&mut dyn DoubleEndedIterator<Item = usize>) -> Option<usize>,
    ) -> Option<u8> {
        let mut taken = self.taken();
        let chosen = choose(&mut (0..taken.len()).filter(|slot| !taken[*slot]))?;
        taken[chosen] = true;
        // There are at most 16.
        u8::try_from(chosen).ok()
    }

    /// Nothing waits while it is held.
    fn taken(&self) -> MutexGuard<'_, Vec<bool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's number for the device in a place: `virtio-mmio.<number>`.
pub fn device(slot: u8) -> u32 {
    NETWORK_DEVICES_FROM + u32::from(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_and_disks_meet_in_the_middle() {
        let slots = Slots::new(3);
        assert_eq!((slots.take_first(), slots.take_last()), (Some(0), Some(2)));
        assert_eq!((slots.free(), slots.clone().take_last()), (1, Some(1)));
        assert_eq!((slots.take_first(), slots.take_last()), (None, None));
        slots.give_back(2);
        slots.give_back(99);
        assert_eq!(slots.take_first(), Some(2));
        assert_eq!(Slots::new(99).free(), MAX_NETWORKS);
    }
}
