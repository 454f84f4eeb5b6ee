//! Room for memory that the guest gets while it runs: a range of its address space above the RAM it boots with.
//!
//! Contract: nothing is mapped, and nothing costs anything, until the first [`Room::reach_to`]. From then on the room is
//! one mapping whose first [`Room::reach`] bytes are memory, and a page more, so that whatever begins in it and is as
//! small as an entry of a ring ends in it; the rest cannot be touched. What is mapped is never unmapped. Only *plugged*
//! blocks are found by a lookup ([`Room::find`], [`Room::covers`]): to the devices the others are not memory.
//! Threads: any thread looks up; only the holder of the growth's lock (`devices::mem`) changes anything.
#![allow(unsafe_code, reason = "mmap, mprotect and madvise")]

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::{ACCESS, FLAGS, HIGH_START, HUGE_PAGE, MMIO_START, MemoryError};

/// What the guest plugs and unplugs at once: a huge page.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// What KVM is told of at once, and the unit of the room: a memory block of Linux on x86-64.
pub const CHUNK_BYTES: u64 = 128 << 20;
/// Blocks of a chunk: as many as a word has bits.
pub const CHUNK_BLOCKS: u64 = CHUNK_BYTES / BLOCK_BYTES;
/// The most room: what there are slots of KVM for.
const MOST_BYTES: u64 = 1 << 40;
/// Where a room begins: memory blocks of Linux may be as large as this.
const ALIGNMENT: u64 = 2 << 30;
const PAGE: usize = 4096;

/// A range of addresses that can become memory.
#[derive(Debug, Default)]
pub struct Room {
    start: u64,
    /// A multiple of [`CHUNK_BYTES`].
    bytes: u64,
    huge: bool,
    reserved: OnceLock<Reserved>,
    reach: AtomicU64,
}

#[derive(Debug)]
struct Reserved {
    region: GuestRegionMmap,
    /// A word for each chunk, a bit for each block.
    plugged: Vec<AtomicU64>,
}

impl Room {
    /// Room for a guest that boots with `boot` bytes of memory to grow to `most`.
    pub(super) fn above(boot: u64, most: u64, huge: bool) -> Self {
        let end = if boot > MMIO_START {
            HIGH_START + (boot - MMIO_START)
        } else {
            HIGH_START
        };
        let bytes = most.saturating_sub(boot).min(MOST_BYTES);
        Self {
            start: end.next_multiple_of(ALIGNMENT),
            bytes: bytes.next_multiple_of(CHUNK_BYTES),
            huge,
            ..Self::default()
        }
    }

    /// Its first address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many of its bytes are mapped.
    pub fn reach(&self) -> u64 {
        self.reach.load(Ordering::Acquire)
    }

    /// The whole of it, once something of it is mapped.
    pub(super) fn region(&self) -> Option<&GuestRegionMmap> {
        self.reserved.get().map(|reserved| &reserved.region)
    }

    /// The room, if there is plugged memory at `addr`.
    pub(super) fn find(&self, addr: GuestAddress) -> Option<&GuestRegionMmap> {
        self.covers(addr, 1).then(|| self.region())?
    }

    /// Whether all of a range is plugged memory.
    pub fn covers(&self, addr: GuestAddress, len: usize) -> bool {
        let Some(offset) = addr.0.checked_sub(self.start) else {
            return false;
        };
        // A usize fits into a u64 on x86-64.
        let end = offset.checked_add(len.max(1) as u64);
        end.filter(|end| *end <= self.bytes).is_some_and(|end| {
            (offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).all(|block| self.is_plugged(block))
        })
    }

    /// Whether the block with that number is plugged.
    pub fn is_plugged(&self, block: u64) -> bool {
        self.word(block)
            .is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }

    /// Whether no block of the chunk with that number is plugged.
    pub fn is_empty(&self, chunk: u64) -> bool {
        self.word(chunk * CHUNK_BLOCKS)
            .is_none_or(|(word, _)| word.load(Ordering::SeqCst) == 0)
    }

    /// Blocks become memory for the devices, or are none any more.
    pub fn mark(&self, blocks: Range<u64>, plugged: bool) {
        for (word, bit) in blocks.filter_map(|block| self.word(block)) {
            if plugged {
                word.fetch_or(bit, Ordering::SeqCst);
            } else {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }

    fn word(&self, block: u64) -> Option<(&AtomicU64, u64)> {
        let word = usize::try_from(block / CHUNK_BLOCKS).ok()?;
        let words = &self.reserved.get()?.plugged;
        Some((words.get(word)?, 1 << (block % CHUNK_BLOCKS)))
    }

    /// Maps the room's first `bytes` bytes, rounded up to whole chunks.
    ///
    /// # Errors
    /// [`MemoryError::Map`]: the host has not so much, or the room is smaller.
    pub fn reach_to(&self, bytes: u64) -> Result<(), MemoryError> {
        let failed = |source| MemoryError::Map { bytes, source };
        let (from, to) = (self.reach(), bytes.next_multiple_of(CHUNK_BYTES));
        if to <= from {
            return Ok(());
        }
        if to > self.bytes {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let region = match self.region() {
            Some(region) => region,
            None => {
                let reserved = self.reserve()?;
                &self.reserved.get_or_init(|| reserved).region
            }
        };
        let (at, len) = host_range(region, from..to).map_err(failed)?;
        // SAFETY: the range is in the mapping of `region`, a page more than the room included (`reserve`); nothing of it
        // was memory before but that page.
        if unsafe { libc::mprotect(at.cast(), len + PAGE, ACCESS) } != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        if self.huge {
            // SAFETY: advice about the range that was just made memory; it changes no contents. Best effort.
            let _ = unsafe { libc::madvise(at.cast(), len, libc::MADV_HUGEPAGE) };
        }
        self.reach.store(to, Ordering::Release);
        Ok(())
    }

    fn reserve(&self) -> Result<Reserved, MemoryError> {
        let failed = |source| MemoryError::Map {
            bytes: self.bytes,
            source,
        };
        let too_large = || failed(io::Error::from_raw_os_error(libc::ENOMEM));
        let len = usize::try_from(self.bytes).map_err(|_| too_large())?;
        let all = len.checked_add(HUGE_PAGE + PAGE).ok_or_else(too_large)?;
        // SAFETY: a new mapping at an address of the kernel's choice; it replaces nothing.
        let base = unsafe { libc::mmap(ptr::null_mut(), all, libc::PROT_NONE, FLAGS, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let base = base.cast::<u8>();
        // SAFETY: the result is less than HUGE_PAGE after `base`, inside the mapping.
        let aligned = unsafe { base.add(base.align_offset(HUGE_PAGE)) };
        let builder = MmapRegionBuilder::new(len)
            .with_mmap_prot(ACCESS)
            .with_mmap_flags(FLAGS);
        // SAFETY: `len` bytes from `aligned` are mapped (above), and are never unmapped. Those that are not memory yet are
        // in no block that is plugged, and all access is to plugged blocks (`find`, `covers`).
        let builder = unsafe { builder.with_raw_mmap_pointer(aligned) };
        let region = builder.build().map_err(MemoryError::Region)?;
        let chunks = self.bytes / CHUNK_BYTES;
        Ok(Reserved {
            region: GuestRegionMmap::new(region, GuestAddress(self.start)).ok_or_else(too_large)?,
            plugged: (0..chunks).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// A chunk as KVM is told of it: its address in the guest, and on the host. `None`: it is not mapped.
    pub fn chunk(&self, chunk: u64) -> Option<(u64, u64)> {
        let offset = chunk.checked_mul(CHUNK_BYTES)?;
        if offset.checked_add(CHUNK_BYTES)? > self.reach() {
            return None;
        }
        let (host, _) = host_range(self.region()?, offset..offset + CHUNK_BYTES).ok()?;
        Some((self.start + offset, host as u64))
    }

    /// Gives blocks back to the host; they are zeros when they are memory again. What is not mapped is left alone.
    pub fn release(&self, blocks: Range<u64>) {
        let (from, to) = (blocks.start * BLOCK_BYTES, blocks.end * BLOCK_BYTES);
        let Some(region) = self.region().filter(|_| from < to && to <= self.reach()) else {
            return;
        };
        if let Ok((at, len)) = host_range(region, from..to) {
            // SAFETY: whole pages of a private anonymous mapping that are guest memory or were until now; nothing on the
            // host borrows guest memory, so no reference sees its bytes change.
            let _ = unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
        }
    }
}

/// Where a range of the region's bytes is on the host, and how long it is.
fn host_range(region: &GuestRegionMmap, bytes: Range<u64>) -> io::Result<(*mut u8, usize)> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let (from, to) = (
        usize::try_from(bytes.start).map_err(wrong)?,
        usize::try_from(bytes.end).map_err(wrong)?,
    );
    if from > to || to > region.size() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `from` is at most the region's size (above).
    let at = unsafe { region.as_ptr().add(from) };
    Ok((at, to - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room() -> Room {
        Room::above(GIB, 2 * GIB, false)
    }

    #[test]
    fn room_lies_above_all_memory_and_is_whole_chunks() {
        assert_eq!((room().start(), room().bytes()), (4 * GIB, GIB));
        let large = Room::above(8 * GIB, 8 * GIB + 1, false);
        assert_eq!((large.start(), large.bytes()), (10 * GIB, CHUNK_BYTES));
        assert_eq!(Room::above(2 * GIB, GIB, false).bytes(), 0);
        assert_eq!(Room::above(GIB, u64::MAX, false).bytes(), MOST_BYTES);
    }

    #[test]
    fn only_plugged_blocks_are_memory() {
        let room = room();
        let at = |offset: u64| GuestAddress(room.start() + offset);
        assert!(!room.covers(at(0), 1) && room.chunk(0).is_none());
        room.reach_to(1).unwrap();
        assert_eq!(room.reach(), CHUNK_BYTES);
        assert!(!room.covers(at(0), 1) && room.chunk(0).is_some() && room.chunk(1).is_none());
        room.mark(1..3, true);
        let both = usize::try_from(2 * BLOCK_BYTES).unwrap();
        assert!(room.covers(at(BLOCK_BYTES), both));
        assert!(!room.covers(at(BLOCK_BYTES), both + 1));
        assert!(!room.covers(at(BLOCK_BYTES - 1), 2));
        assert!(room.find(at(BLOCK_BYTES)).is_some() && room.find(at(3 * BLOCK_BYTES)).is_none());
        assert!(!room.covers(GuestAddress(room.start() - 1), 2) && !room.covers(at(GIB), 1));
        assert!(!room.covers(GuestAddress(u64::MAX), usize::MAX));
        room.mark(1..2, false);
        assert!(!room.is_empty(0));
        room.mark(2..3, false);
        assert!(room.is_empty(0));
    }

    #[test]
    fn what_is_released_is_zeros_and_the_reach_only_grows() {
        let room = room();
        room.reach_to(CHUNK_BYTES).unwrap();
        let (_, host) = room.chunk(0).unwrap();
        let byte = std::ptr::with_exposed_provenance_mut::<u8>(usize::try_from(host).unwrap());
        // SAFETY: the chunk is mapped, and nothing else looks at it.
        unsafe { byte.write(7) };
        room.release(0..1);
        // SAFETY: as above.
        assert_eq!(unsafe { byte.read() }, 0);
        room.release(0..u64::MAX / BLOCK_BYTES);
        room.reach_to(1).unwrap();
        assert_eq!(room.reach(), CHUNK_BYTES);
        room.reach_to(GIB).unwrap();
        assert!(room.reach_to(GIB + 1).is_err());
        assert_eq!(room.reach(), GIB);
    }
}
