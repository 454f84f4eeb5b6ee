//! Guest memory as virtiofsd wants to see it: the same mapping under the bitmap type that its reader and writer name.
//!
//! Contract: every byte reachable through the view is mapped memory of the [`Mem`] that the view keeps alive; as far as it
//! came while the guest ran ([`View::reach`]) it may be unplugged meanwhile, which is for the caller to look at first. The view has no dirty log: whoever snapshots memory by dirty bits must take the request buffers of
//! this device as dirty.
#![allow(
    unsafe_code,
    reason = "a second GuestMemoryMmap over a mapping that another one owns"
)]

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::memory::Mem;

/// Guest memory with the type parameter of virtiofsd 1.14.
pub(super) type Viewed = GuestMemoryMmap<BitmapMmapRegion>;

/// A [`Viewed`] of a [`Mem`], with the `Mem`.
#[derive(Debug)]
pub(super) struct View {
    viewed: Viewed,
    reach: u64,
    /// Owns the mapping that `viewed` points into; dropped after it.
    _owner: Mem,
}

impl View {
    /// Maps nothing: points into `mem`. `None` if vm-memory refuses what it has itself made.
    pub(super) fn of(mem: &Mem) -> Option<Self> {
        let reach = mem.room().reach();
        let regions = mem.iter().map(|region| {
            let builder = MmapRegionBuilder::new_with_bitmap(
                mem.mapped(region).try_into().ok()?,
                BitmapMmapRegion::default(),
            );
            // SAFETY: the pointer and the length are those of a live mapping of `mem`, page-aligned as mmap made it, or of
            // as much of the room as is mapped; `_owner` keeps it mapped for as long as the view exists.
            let builder = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) };
            let mapping = builder
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_PRIVATE)
                .build()
                .ok()?;
            GuestRegionMmap::new(mapping, region.start_addr())
        });
        let viewed = Viewed::from_regions(regions.collect::<Option<_>>()?).ok()?;
        Some(Self {
            viewed,
            reach,
            _owner: mem.clone(),
        })
    }

    /// How much of the room it shows.
    pub(super) fn reach(&self) -> u64 {
        self.reach
    }

    /// The memory, for `Reader::new` and `Writer::new`.
    pub(super) fn memory(&self) -> &Viewed {
        &self.viewed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Memory;

    #[test]
    fn the_view_shows_the_same_bytes_and_outlives_other_owners() {
        let ranges = [
            (GuestAddress(0), 0x10000),
            (GuestAddress(0x10_0000), 0x1000),
        ];
        let mem: Mem = Arc::new(Memory::from(GuestMemoryMmap::from_ranges(&ranges).unwrap()));
        let view = View::of(&mem).unwrap();
        mem.write_slice(b"one mapping", GuestAddress(0x10_0010))
            .unwrap();
        drop(mem);
        let mut seen = [0; 11];
        view.memory()
            .read_slice(&mut seen, GuestAddress(0x10_0010))
            .unwrap();
        assert_eq!(&seen, b"one mapping");
        assert!(view.memory().find_region(GuestAddress(0x10_1000)).is_none());
    }
}
