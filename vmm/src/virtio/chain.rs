//! Descriptor chains: the only code that turns guest-written descriptors into ranges of guest memory.
//!
//! Contract: a chain's ranges lie in guest RAM, every byte; a chain visits at most [`MAX_SEGMENTS`] descriptors; each
//! descriptor is read from guest memory once; readable descriptors come before writable ones; a zero-length buffer is
//! legal and yields nothing; both parts together are less than 4 GiB.
//! Errors: everything is the guest's doing, a [`GuestFault`]; host failures never start here, except in transfers.
//! Threads: no state of its own beyond its buffers; a device keeps a [`Chain`] and reuses it, so that the steady state
//! allocates nothing.
//! Not here: ring indexes and notifications (`queue.rs`), meaning of the bytes (each device).
//! Spec: virtio 1.2, 2.7.4 (message framing), 2.7.5 (descriptor table), 2.7.5.3 (indirect descriptors).

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestAddress;

use super::GuestFault;
use super::slice::{At, GuestSlice, read_into, write_from};
use crate::memory::Mem;

/// The most descriptors of one chain, direct or indirect: what one system call takes.
pub const MAX_SEGMENTS: usize = 1024;
const DESCRIPTOR_BYTES: usize = 16;
const WORD_BYTES: usize = 8;

/// One entry of a descriptor table, as the guest wrote it.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Reads entry `index` of a table, which has so many, once.
    fn fetch(table: GuestSlice, index: u16) -> Self {
        let at = usize::from(index) * DESCRIPTOR_BYTES;
        let (addr, rest) = (word(table, at), word(table, at + WORD_BYTES));
        let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_le_bytes();
        Self {
            addr,
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    const fn has(&self, flag: u32) -> bool {
        self.flags as u32 & flag != 0
    }
}

/// A checked descriptor chain: a part that the device reads and a part that it writes.
#[derive(Debug)]
pub struct Chain {
    mem: Mem,
    head: u16,
    readable: Vec<GuestSlice>,
    writable: Vec<GuestSlice>,
    readable_len: usize,
    writable_len: usize,
}

impl Chain {
    /// An empty chain, to be filled by `Queue::pop`.
    pub fn new(mem: &Mem) -> Self {
        Self {
            mem: mem.clone(),
            head: 0,
            readable: Vec::new(),
            writable: Vec::new(),
            readable_len: 0,
            writable_len: 0,
        }
    }

    /// Fills the chain from the descriptor `head` of a table with `table_len` entries.
    pub(super) fn walk(
        &mut self,
        table: GuestAddress,
        table_len: u16,
        head: u16,
    ) -> Result<(), GuestFault> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
        let (mut table_len, mut index) = (table_len, head);
        let mut table = find_table(&self.mem, table, table_len)?;
        let mut indirect = false;
        for _ in 0..=MAX_SEGMENTS {
            if index >= table_len {
                return Err(GuestFault::Chain(
                    "a descriptor index is past the table's end",
                ));
            }
            let descriptor = Descriptor::fetch(table, index);
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                if indirect {
                    return Err(GuestFault::Chain("an indirect table names another"));
                }
                if descriptor.has(VRING_DESC_F_NEXT) {
                    return Err(GuestFault::Chain(
                        "a descriptor is both indirect and continued",
                    ));
                }
                indirect = true;
                table_len = indirect_entries(descriptor.len)?;
                table = find_table(&self.mem, GuestAddress(descriptor.addr), table_len)?;
                index = 0;
                continue;
            }
            self.add(&descriptor)?;
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(GuestFault::Chain("more than 1024 descriptors, or a loop"))
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), GuestFault> {
        let writable = descriptor.has(VRING_DESC_F_WRITE);
        if !writable && !self.writable.is_empty() {
            return Err(GuestFault::Chain(
                "a readable descriptor follows a writable one",
            ));
        }
        let Descriptor { addr, len, .. } = *descriptor;
        if len == 0 {
            return Ok(());
        }
        // A u32 fits into a usize on x86-64.
        let bytes = len as usize;
        if self.readable_len + self.writable_len + bytes > u32::MAX as usize {
            return Err(GuestFault::Chain("more than 4 GiB in one chain"));
        }
        let slice = GuestSlice::resolve(&self.mem, GuestAddress(addr), bytes)
            .ok_or(GuestFault::Outside { addr, len })?;
        let (slices, total) = if writable {
            (&mut self.writable, &mut self.writable_len)
        } else {
            (&mut self.readable, &mut self.readable_len)
        };
        slices.push(slice);
        *total += bytes;
        Ok(())
    }

    /// The index by which `Queue::push` returns this chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// The ranges that the device may write, in order; none is empty.
    pub fn writable(&self) -> &[GuestSlice] {
        &self.writable
    }

    /// Copies `to.len()` bytes out of the readable part from `offset` on.
    ///
    /// # Errors
    /// [`GuestFault::Short`] if there are fewer; `to` is then partly filled.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), GuestFault> {
        need(self.readable_len, offset, to.len())?;
        let mut done = 0;
        for slice in parts(&self.readable, offset, to.len()) {
            done += slice.copy_to(&mut to[done..]);
        }
        Ok(())
    }

    /// Copies an array out of the readable part.
    ///
    /// # Errors
    /// As [`Chain::read`].
    pub fn read_array<const N: usize>(&self, offset: usize) -> Result<[u8; N], GuestFault> {
        let mut array = [0; N];
        self.read(offset, &mut array)?;
        Ok(array)
    }

    /// Copies `from` into the writable part at `offset`.
    ///
    /// # Errors
    /// [`GuestFault::Short`] if it does not fit; nothing is written then.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), GuestFault> {
        need(self.writable_len, offset, from.len())?;
        let mut done = 0;
        for slice in parts(&self.writable, offset, from.len()) {
            done += slice.copy_from(&from[done..]);
        }
        Ok(())
    }

    /// Writes at most `len` bytes of the readable part, from `offset` on, to `fd`; returns the bytes written.
    ///
    /// # Errors
    /// The system call's, unchanged: `WouldBlock` and `Interrupted` are the caller's to handle.
    pub fn write_to(
        &self,
        offset: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        at: At,
    ) -> io::Result<usize> {
        write_from(fd, at, parts(&self.readable, offset, len))
    }

    /// Reads from `fd` into the writable part, from `offset` on and at most `len` bytes; returns the bytes read.
    ///
    /// # Errors
    /// As [`Chain::write_to`].
    pub fn read_from(
        &self,
        offset: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        at: At,
    ) -> io::Result<usize> {
        read_into(fd, at, parts(&self.writable, offset, len))
    }
}

/// Half a descriptor. Tables are aligned, short of a driver that makes indirect ones anywhere.
fn word(table: GuestSlice, at: usize) -> u64 {
    let aligned = table.load_u64(at, Ordering::Relaxed);
    aligned.map_or_else(|| unaligned_word(table, at), u64::from_le)
}

#[cold]
fn unaligned_word(table: GuestSlice, at: usize) -> u64 {
    let mut raw = [0; WORD_BYTES];
    table.part(at, WORD_BYTES).copy_to(&mut raw);
    u64::from_le_bytes(raw)
}

fn find_table(mem: &Mem, at: GuestAddress, entries: u16) -> Result<GuestSlice, GuestFault> {
    GuestSlice::resolve(mem, at, usize::from(entries) * DESCRIPTOR_BYTES).ok_or(GuestFault::Chain(
        "the descriptor table is not in guest memory",
    ))
}

fn indirect_entries(bytes: u32) -> Result<u16, GuestFault> {
    // A u32 fits into a usize on x86-64.
    let bytes = bytes as usize;
    if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(GuestFault::Chain("an indirect table has a broken size"));
    }
    u16::try_from(bytes / DESCRIPTOR_BYTES)
        .map_err(|_| GuestFault::Chain("an indirect table has more than 65535 entries"))
}

fn need(available: usize, offset: usize, need: usize) -> Result<(), GuestFault> {
    let got = available.saturating_sub(offset);
    if got < need {
        Err(GuestFault::Short { need, got })
    } else {
        Ok(())
    }
}

/// The ranges that make up `len` bytes from `offset` on, or as many as there are.
fn parts(slices: &[GuestSlice], offset: usize, len: usize) -> impl Iterator<Item = GuestSlice> {
    let (mut skip, mut left) = (offset, len);
    slices.iter().filter_map(move |slice| {
        let part = slice.part(skip, left);
        skip = skip.saturating_sub(slice.len());
        left -= part.len();
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::memory::Memory;

    /// Address, length, flags, next.
    type Entry = (u64, u32, u16, u16);

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    fn memory() -> Mem {
        Arc::new(Memory::from(
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap(),
        ))
    }

    fn put(mem: &Mem, table: u64, index: u64, (addr, len, flags, next): Entry) {
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        mem.write_slice(&raw, GuestAddress(table + 16 * index))
            .unwrap();
    }

    fn walk(descriptors: &[Entry], head: u16) -> Result<Chain, GuestFault> {
        let mem = memory();
        for (index, descriptor) in (0..).zip(descriptors) {
            put(&mem, 0, index, *descriptor);
        }
        let mut chain = Chain::new(&mem);
        chain.walk(GuestAddress(0), 16, head).map(|()| chain)
    }

    #[test]
    fn an_indirect_table_may_lie_anywhere() {
        let mem = memory();
        put(&mem, 0, 0, (0x5003, 32, INDIRECT, 0));
        put(&mem, 0x5003, 0, (0x1000, 7, NEXT, 1));
        put(&mem, 0x5003, 1, (0x2000, 9, WRITE, 0));
        let mut chain = Chain::new(&mem);
        chain.walk(GuestAddress(0), 16, 0).unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (7, 9));
    }

    #[test]
    fn a_chain_is_read_and_written_across_its_parts() {
        let descriptors = [
            (0x1000, 4, NEXT, 1),
            (0x2000, 0, NEXT, 2),
            (0x3000, 4, NEXT, 3),
            (0x4000, 8, WRITE, 0),
        ];
        let chain = walk(&descriptors, 0).unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (8, 8));
        chain
            .mem
            .write_slice(b"abcd", GuestAddress(0x1000))
            .unwrap();
        chain
            .mem
            .write_slice(b"efgh", GuestAddress(0x3000))
            .unwrap();
        assert_eq!(&chain.read_array::<5>(2).unwrap(), b"cdefg");
        assert_eq!(
            chain.read_array::<5>(4),
            Err(GuestFault::Short { need: 5, got: 4 })
        );
        assert_eq!(
            chain.read_array::<1>(usize::MAX),
            Err(GuestFault::Short { need: 1, got: 0 })
        );
        chain.write(6, b"xy").unwrap();
        assert_eq!(
            chain.write(7, b"xy"),
            Err(GuestFault::Short { need: 2, got: 1 })
        );
        let mut seen = [0; 2];
        chain
            .mem
            .read_slice(&mut seen, GuestAddress(0x4006))
            .unwrap();
        assert_eq!(&seen, b"xy");
    }

    #[test]
    fn hostile_chains_are_faults() {
        let cases: &[(&str, &[Entry])] = &[
            ("a loop", &[(0x1000, 4, NEXT, 0)]),
            ("next past the end", &[(0x1000, 4, NEXT, 16)]),
            ("outside memory", &[(0x10000, 1, 0, 0)]),
            ("half outside", &[(0xfff0, 17, 0, 0)]),
            ("address overflow", &[(u64::MAX, 2, 0, 0)]),
            ("huge length", &[(0x1000, u32::MAX, 0, 0)]),
            (
                "readable after writable",
                &[(0x1000, 4, NEXT | WRITE, 1), (0x2000, 4, 0, 0)],
            ),
            (
                "indirect and next",
                &[(0x1000, 16, INDIRECT | NEXT, 1), (0x2000, 4, 0, 0)],
            ),
            ("indirect odd size", &[(0x1000, 15, INDIRECT, 0)]),
            ("indirect empty", &[(0x1000, 0, INDIRECT, 0)]),
            ("indirect too large", &[(0x1000, 16 << 16, INDIRECT, 0)]),
            ("indirect outside", &[(0x20000, 16, INDIRECT, 0)]),
            (
                "indirect table overflow",
                &[(u64::MAX - 3, 16, INDIRECT, 0)],
            ),
        ];
        for (name, descriptors) in cases {
            assert!(walk(descriptors, 0).is_err(), "{name} was taken");
        }
        assert!(walk(&[], 16).is_err(), "a head past the table was taken");
    }

    #[test]
    fn an_indirect_table_is_followed_once() {
        let mem = memory();
        put(&mem, 0, 0, (0x800, 32, INDIRECT, 0));
        put(&mem, 0x800, 0, (0x1000, 4, NEXT, 1));
        put(&mem, 0x800, 1, (0x2000, 4, WRITE, 0));
        let mut chain = Chain::new(&mem);
        chain.walk(GuestAddress(0), 16, 0).unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (4, 4));

        put(&mem, 0x800, 1, (0x900, 16, INDIRECT, 0));
        assert!(chain.walk(GuestAddress(0), 16, 0).is_err());
    }

    #[test]
    fn overlapping_buffers_beyond_four_gib_are_refused() {
        let mem = memory();
        put(&mem, 0, 0, (0x8000, 16 * 1024, INDIRECT, 0));
        let mem_len = 0x8000;
        for index in 0..1024u64 {
            let next = u16::try_from(index + 1).unwrap();
            put(&mem, 0x8000, index, (0, mem_len, NEXT, next));
        }
        let mut chain = Chain::new(&mem);
        assert!(chain.walk(GuestAddress(0), 16, 0).is_err());
    }
}
