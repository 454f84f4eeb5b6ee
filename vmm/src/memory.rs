//! Guest memory: where RAM lies in the guest's address space and how it is mapped on the host.
//!
//! Contract: private anonymous memory, zero, without swap reservation; RAM below [`MMIO_START`] first, what does not
//! fit there from 4 GiB up. The mapping lives as long as any clone of [`Mem`], and never moves or shrinks: code may
//! keep host pointers into it as long as it keeps a [`Mem`].

use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Guest memory, shared by every thread of the VM. One kind of memory, no type parameter.
pub type Mem = Arc<GuestMemoryMmap>;

/// Start of the hole for devices, below 4 GiB; RAM never lies in it.
pub const MMIO_START: u64 = 0xd000_0000;
/// First address after the hole.
pub const HIGH_START: u64 = 1 << 32;
/// Least size of guest memory, in bytes.
pub const MIN_BYTES: u64 = 64 << 20;

/// Memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is below [`MIN_BYTES`], or more than an address can say.
    #[error("guest memory of {mib} MiB: at least 64 MiB are needed")]
    Size {
        /// What was asked for.
        mib: u64,
    },
    /// The host refused the mapping.
    #[error("map {bytes} bytes of guest memory")]
    Map {
        /// Size of the range that failed.
        bytes: u64,
        /// The cause.
        source: io::Error,
    },
}

/// The ranges of RAM for a guest of `bytes` bytes, as (start, length), ascending.
pub fn layout(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(MMIO_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if bytes > low {
        ranges.push((GuestAddress(HIGH_START), bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_never_lies_in_the_device_hole() {
        assert_eq!(layout(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(layout(MMIO_START), [(GuestAddress(0), MMIO_START)]);
        let big = layout(8 << 30);
        assert_eq!(big[1], (GuestAddress(HIGH_START), (8 << 30) - MMIO_START));
        assert_eq!(big.iter().map(|range| range.1).sum::<u64>(), 8 << 30);
    }
}
