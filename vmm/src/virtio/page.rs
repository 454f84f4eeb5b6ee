//! A device's registers as the guest reads them: one page of plain memory, mapped read-only into the guest.
//!
//! Contract: what a read would answer is always written out here, so that reading a register never leaves the guest: on
//! the path of every interrupt that is the interrupt status, and while drivers probe it is everything else. Writes still
//! come out. A page holds nothing but registers, so a guest that reads all of it learns nothing.
//! Threads: vCPU threads (`transport.rs`, `config.rs`) and the device's thread (`line.rs`) store, each its own words;
//! a word is stored whole.

use std::sync::atomic::{AtomicU32, Ordering};

/// Size of a page in bytes.
pub const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / size_of::<AtomicU32>();

/// The registers of one device. Pages live as long as the process, because KVM is given their address.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Page([AtomicU32; WORDS]);

impl Page {
    /// So many pages of zeros, side by side.
    pub fn leak(count: usize) -> &'static [Self] {
        let zeros = || Self([const { AtomicU32::new(0) }; WORDS]);
        Vec::from_iter(std::iter::repeat_with(zeros).take(count)).leak()
    }

    /// The word at `offset` bytes; every register is one. Offsets past the end wrap around: callers name registers.
    pub fn word(&self, offset: u32) -> &AtomicU32 {
        // A u32 fits into a usize on x86-64.
        &self.0[offset as usize / size_of::<AtomicU32>() % WORDS]
    }

    /// Writes bytes out from the word at `offset` on, the last word filled up with zeros.
    pub fn write(&self, offset: u32, bytes: &[u8]) {
        for (at, chunk) in (offset..)
            .step_by(size_of::<AtomicU32>())
            .zip(bytes.chunks(4))
        {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(at)
                .store(u32::from_le_bytes(word), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_side_by_side_and_hold_what_was_written() {
        let pages = Page::leak(3);
        let addresses: Vec<_> = pages
            .iter()
            .map(|page| std::ptr::from_ref(page).addr())
            .collect();
        assert!(addresses.iter().all(|at| at.is_multiple_of(PAGE_BYTES)));
        assert_eq!(addresses[2] - addresses[0], 2 * PAGE_BYTES);
        pages[1].write(0x100, &[1, 2, 3, 4, 5]);
        let words = [0xfc, 0x100, 0x104, 0x108].map(|at| pages[1].word(at).load(Ordering::Acquire));
        assert_eq!(words, [0, 0x0403_0201, 5, 0]);
        assert_eq!(pages[0].word(0x100).load(Ordering::Acquire), 0);
    }
}
