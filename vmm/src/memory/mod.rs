//! Guest memory: where RAM lies in the guest's address space and how it is mapped on the host.
//!
//! Contract: private anonymous memory, zero, without swap reservation; RAM below [`MMIO_START`] first, what does not
//! fit there from 4 GiB up, and above it [`Room`] for memory that comes later (`room.rs`). The mapping lives as long as any
//! clone of [`Mem`], and never moves or shrinks: code may keep host pointers into it as long as it keeps a [`Mem`]. With
//! huge pages, host and guest addresses agree modulo 2 MiB, else KVM could not map a huge page as one.
#![allow(unsafe_code, reason = "mmap, madvise and set_mempolicy")]

mod room;

use std::io;
use std::ptr;
use std::sync::Arc;

use caisson_vmm_spec::{MemoryPolicy, MemorySpec};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap,
};

pub use room::{BLOCK_BYTES, CHUNK_BLOCKS, CHUNK_BYTES, Room};

/// Guest memory, shared by every thread of the VM. One kind of memory, no type parameter.
pub type Mem = Arc<Memory>;

/// All memory of a guest: what it boots with, and what it has got since.
#[derive(Debug)]
pub struct Memory {
    boot: GuestMemoryMmap,
    room: Room,
}

impl Memory {
    /// Where memory comes and goes.
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// How much of a region, from its start, is mapped.
    pub fn mapped(&self, region: &GuestRegionMmap) -> u64 {
        if region.start_addr().0 == self.room.start() {
            self.room.reach()
        } else {
            region.len()
        }
    }

    /// Whether all of a range that begins in guest memory is that: a range in the room must be plugged to its end. That a
    /// range elsewhere does not leave its region is for the region to say.
    pub fn holds(&self, addr: GuestAddress, len: usize) -> bool {
        addr.0 < self.room.start() || self.room.covers(addr, len)
    }
}

/// Memory without room.
impl From<GuestMemoryMmap> for Memory {
    fn from(boot: GuestMemoryMmap) -> Self {
        let room = Room::above(u64::from(u32::MAX), 0, false);
        Self { boot, room }
    }
}

impl GuestMemory for Memory {
    type R = GuestRegionMmap;

    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.boot.find_region(addr).or_else(|| self.room.find(addr))
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.boot.iter().chain(self.room.region())
    }
}

/// Start of the hole for devices, below 4 GiB; RAM never lies in it.
pub const MMIO_START: u64 = 0xd000_0000;
/// First address after the hole.
pub const HIGH_START: u64 = 1 << 32;
/// Least size of guest memory, in bytes.
pub const MIN_BYTES: u64 = 64 << 20;

const HUGE_PAGE: usize = 2 << 20;
const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

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
    /// The host refused the policy: a node that it does not have, or a contradiction.
    #[error("error setting memory policy")]
    Policy(#[source] io::Error),
    /// A node that no host has.
    #[error("memory policy: nodes are 0 to 1023")]
    Node,
    /// A mapping cannot be described as a region.
    #[error("describe guest memory")]
    Region(#[source] MmapRegionError),
    /// The regions do not make up a memory.
    #[error("lay out guest memory")]
    Layout(#[source] GuestRegionCollectionError),
}

/// As many nodes as a policy can name (`MemoryPolicy::nodes`).
const NODES: usize = 1024;
const WORD: usize = u64::BITS as usize;

/// Has this thread, and all that it makes from here on, take memory as the policy says (set_mempolicy(2)).
fn follow(policy: &MemoryPolicy) -> Result<(), MemoryError> {
    let mut mask = [0_u64; NODES / WORD];
    for node in &policy.nodes {
        let node = usize::try_from(*node).unwrap_or(NODES);
        let word = mask.get_mut(node / WORD).ok_or(MemoryError::Node)?;
        *word |= 1 << (node % WORD);
    }
    // The kernel reads one bit less than it is told.
    let (pointer, bits) = if policy.nodes.is_empty() {
        (ptr::null(), 0)
    } else {
        (mask.as_ptr(), NODES + 1)
    };
    // SAFETY: the kernel reads at most NODES bits of the mask, which is alive and that long; null with 0 bits is no mask.
    let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, policy.mode, pointer, bits) };
    if done == 0 {
        Ok(())
    } else {
        Err(MemoryError::Policy(io::Error::last_os_error()))
    }
}

/// Memory for a guest of that size. With a policy it is this thread's from here on, and of the threads that it makes.
///
/// # Errors
/// [`MemoryError`].
pub fn map(spec: &MemorySpec) -> Result<Mem, MemoryError> {
    let bytes = spec.size.bytes();
    if bytes < MIN_BYTES {
        return Err(MemoryError::Size { mib: bytes >> 20 });
    }
    spec.policy.as_ref().map_or(Ok(()), follow)?;
    let regions = layout(bytes)
        .into_iter()
        .map(|(start, len)| map_range(start, len, spec.huge_pages))
        .collect::<Result<_, _>>()?;
    Ok(Arc::new(Memory {
        boot: GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?,
        room: Room::above(bytes, spec.most.bytes(), spec.huge_pages),
    }))
}

fn map_range(start: GuestAddress, bytes: u64, huge: bool) -> Result<GuestRegionMmap, MemoryError> {
    let failed = |source| MemoryError::Map { bytes, source };
    let too_large = || failed(io::Error::from_raw_os_error(libc::ENOMEM));
    let len = usize::try_from(bytes).map_err(|_| too_large())?;
    // One huge page more than needed: somewhere in it the right alignment begins. Unused pages cost nothing.
    let reserve = len.checked_add(HUGE_PAGE).ok_or_else(too_large)?;
    // SAFETY: a new mapping at an address of the kernel's choice; it replaces nothing.
    let base = unsafe { libc::mmap(ptr::null_mut(), reserve, ACCESS, FLAGS, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    let base = base.cast::<u8>();
    // SAFETY: the result is less than HUGE_PAGE after `base`, inside the mapping.
    let aligned = unsafe { base.add(base.align_offset(HUGE_PAGE)) };
    if huge {
        // SAFETY: advice about `len` bytes of the mapping made above; it changes no contents.
        let advised = unsafe { libc::madvise(aligned.cast(), len, libc::MADV_HUGEPAGE) };
        // EINVAL: a host kernel without huge pages. The guest runs all the same.
        if advised != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            return Err(failed(io::Error::last_os_error()));
        }
    }
    let builder = MmapRegionBuilder::new(len)
        .with_mmap_prot(ACCESS)
        .with_mmap_flags(FLAGS);
    // SAFETY: `len` bytes from `aligned` are mapped (above), and are never unmapped: the region does not own them and
    // the process keeps them to its end.
    let builder = unsafe { builder.with_raw_mmap_pointer(aligned) };
    let region = builder.build().map_err(MemoryError::Region)?;
    GuestRegionMmap::new(region, start).ok_or_else(too_large)
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
    use caisson_vmm_spec::MiB;
    use vm_memory::{Bytes, GuestMemory};

    use super::*;

    #[test]
    fn memory_is_zero_writable_and_aligned_for_huge_pages() {
        let mem = map(&MemorySpec {
            size: MiB(64),
            most: MiB(256),
            huge_pages: true,
            policy: None,
        })
        .unwrap();
        let last = GuestAddress((64 << 20) - 8);
        assert_eq!(mem.read_obj::<u64>(last).unwrap(), 0);
        mem.write_obj(7u64, last).unwrap();
        assert_eq!(mem.read_obj::<u64>(last).unwrap(), 7);
        assert!(mem.read_obj::<u8>(GuestAddress(64 << 20)).is_err());
        let host = mem.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(host.align_offset(HUGE_PAGE), 0);
    }

    #[test]
    fn too_little_memory_is_refused() {
        let spec = MemorySpec {
            size: MiB(63),
            most: MiB(0),
            huge_pages: false,
            policy: None,
        };
        assert!(matches!(map(&spec), Err(MemoryError::Size { mib: 63 })));
    }

    #[test]
    fn ram_never_lies_in_the_device_hole() {
        assert_eq!(layout(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(layout(MMIO_START), [(GuestAddress(0), MMIO_START)]);
        let big = layout(8 << 30);
        assert_eq!(big[1], (GuestAddress(HIGH_START), (8 << 30) - MMIO_START));
        assert_eq!(big.iter().map(|range| range.1).sum::<u64>(), 8 << 30);
    }
}
