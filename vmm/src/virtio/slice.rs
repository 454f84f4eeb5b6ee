//! Ranges of guest memory as host memory: made only after a check, copied and handed to the kernel only here.
//!
//! Contract: a [`GuestSlice`] lies wholly in one region of the [`Mem`] it was made from, and that mapping never moves
//! or shrinks; whoever keeps slices keeps the [`Mem`] too (`Chain` does). The guest may change the bytes at any time:
//! they are copied out before they are parsed, and never borrowed as `&[u8]`.
#![allow(
    unsafe_code,
    reason = "guest memory is shared with the guest: raw pointers, readv and writev"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryRegion, VolatileSlice};

use crate::memory::Mem;

/// The most slices one system call takes (the kernel's UIO_MAXIOV).
const MAX_VECTORS: usize = 1024;

/// Size of a page, of the guest and of the host.
pub const PAGE_BYTES: u64 = 4096;
const PAGE_LEN: usize = 4096;

/// A range of guest RAM in host memory.
#[derive(Debug, Clone, Copy)]
pub struct GuestSlice {
    host: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is into a mapping that is not tied to a thread; all access is volatile or by the kernel.
unsafe impl Send for GuestSlice {}

impl GuestSlice {
    /// The host memory behind `len` bytes at `addr`; `None` unless all of it is RAM of one region, plugged if it came later.
    pub fn resolve(mem: &Mem, addr: GuestAddress, len: usize) -> Option<Self> {
        let region = mem.find_region(addr).filter(|_| mem.holds(addr, len))?;
        let offset = usize::try_from(addr.checked_offset_from(region.start_addr())?).ok()?;
        if len > region.size().checked_sub(offset)? {
            return None;
        }
        // SAFETY: the region is a mapping of `size` bytes, and `offset` is at most that (above).
        let host = unsafe { region.as_ptr().add(offset) };
        Some(Self {
            host: NonNull::new(host)?,
            len,
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part from `offset` on, at most `len` bytes; may be empty.
    pub fn part(&self, offset: usize, len: usize) -> Self {
        let offset = offset.min(self.len);
        // SAFETY: offset <= self.len, so the pointer stays inside the mapping or one past its end.
        let host = unsafe { self.host.add(offset) };
        Self {
            host,
            len: len.min(self.len - offset),
        }
    }

    fn volatile(&self) -> VolatileSlice<'_> {
        // SAFETY: `resolve` checked that all `len` bytes are mapped, and the mapping outlives the slice (contract).
        unsafe { VolatileSlice::new(self.host.as_ptr(), self.len) }
    }

    /// Copies out to `to`; as many bytes as both have.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        self.volatile().copy_to(to)
    }

    /// Copies `from` in; as many bytes as both have.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let len = from.len().min(self.len);
        self.volatile().copy_from(&from[..len]);
        len
    }

    /// Where a number is; `None` unless it lies in the range, aligned.
    fn place<T>(&self, offset: usize) -> Option<*mut T> {
        let fits = self.len.checked_sub(offset)? >= size_of::<T>();
        let place = self.part(offset, size_of::<T>()).host.cast::<T>();
        (fits && place.is_aligned()).then_some(place.as_ptr())
    }

    /// Loads a number that the guest may change meanwhile; `None` unless it lies in the range, aligned.
    pub fn load_u16(&self, offset: usize, order: Ordering) -> Option<u16> {
        let place = self.place(offset)?;
        // SAFETY: two aligned bytes of a mapping that stays (`place`, contract); whoever shares them with us uses atomic or
        // volatile accesses, or is the guest.
        Some(unsafe { AtomicU16::from_ptr(place) }.load(order))
    }

    /// The same.
    pub fn load_u64(&self, offset: usize, order: Ordering) -> Option<u64> {
        let place = self.place(offset)?;
        // SAFETY: as in `load_u16`, with eight bytes.
        Some(unsafe { AtomicU64::from_ptr(place) }.load(order))
    }

    /// Stores a number for the guest to see; `None` unless it lies in the range, aligned.
    pub fn store_u16(&self, number: u16, offset: usize, order: Ordering) -> Option<()> {
        let place = self.place(offset)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(place) }.store(number, order);
        Some(())
    }

    /// The same.
    pub fn store_u32(&self, number: u32, offset: usize, order: Ordering) -> Option<()> {
        let place = self.place(offset)?;
        // SAFETY: as in `load_u16`, with four bytes.
        unsafe { AtomicU32::from_ptr(place) }.store(number, order);
        Some(())
    }

    /// Gives the whole pages of the range back to the host; they read as zeros from now on. Returns their size in bytes:
    /// 0 if there is none, or if the host refused, which then loses nothing but memory.
    pub fn release_pages(&self) -> u64 {
        let start = self.host.as_ptr().align_offset(PAGE_LEN).min(self.len);
        let len = (self.len - start) / PAGE_LEN * PAGE_LEN;
        if len == 0 {
            return 0;
        }
        let pages = self.part(start, len).host.as_ptr();
        // SAFETY: `pages` and `len` are whole pages inside the range, which is guest RAM of a private anonymous mapping
        // (`resolve`); nothing on the host borrows guest memory, so no reference sees its bytes change.
        let returned = unsafe { libc::madvise(pages.cast(), len, libc::MADV_DONTNEED) };
        if returned == 0 { len as u64 } else { 0 }
    }

    fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.host.as_ptr().cast(),
            iov_len: self.len,
        }
    }
}

/// Where in a file a transfer starts: the stream's own position, or an offset in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// A socket, pipe or tap.
    Stream,
    /// A file, at this offset.
    Offset(u64),
}

fn vectors(slices: impl Iterator<Item = GuestSlice>) -> Vec<libc::iovec> {
    slices
        .filter(|slice| !slice.is_empty())
        .take(MAX_VECTORS)
        .map(|slice| slice.iovec())
        .collect()
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn checked(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Reads from `fd` into the slices; the number of bytes read, 0 at end of file. Not retried, may be short.
pub fn read_into(
    fd: BorrowedFd<'_>,
    at: At,
    slices: impl Iterator<Item = GuestSlice>,
) -> io::Result<usize> {
    let vectors = vectors(slices);
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    let (fd, first) = (fd.as_raw_fd(), vectors.as_ptr());
    checked(match at {
        // SAFETY: `first` and `count` describe `vectors`; each entry is mapped, writable guest memory.
        At::Stream => unsafe { libc::readv(fd, first, count) },
        At::Offset(offset) => {
            let offset = file_offset(offset)?;
            // SAFETY: as above.
            unsafe { libc::preadv(fd, first, count, offset) }
        }
    })
}

/// Writes the slices to `fd`; the number of bytes written. Not retried, may be short.
pub fn write_from(
    fd: BorrowedFd<'_>,
    at: At,
    slices: impl Iterator<Item = GuestSlice>,
) -> io::Result<usize> {
    let vectors = vectors(slices);
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    let (fd, first) = (fd.as_raw_fd(), vectors.as_ptr());
    checked(match at {
        // SAFETY: `first` and `count` describe `vectors`; each entry is mapped guest memory.
        At::Stream => unsafe { libc::writev(fd, first, count) },
        At::Offset(offset) => {
            let offset = file_offset(offset)?;
            // SAFETY: as above.
            unsafe { libc::pwritev(fd, first, count, offset) }
        }
    })
}
