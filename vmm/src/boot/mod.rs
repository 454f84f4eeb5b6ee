//! What lies in guest memory before the first instruction: kernel, initramfs, command line, MP table, PVH start info.
//!
//! Contract: the kernel is an uncompressed ELF image with a PVH note; it and the initramfs are read from their
//! descriptors straight into guest memory. Nothing is left half-loaded: an error ends the VM before it starts.
//! Memory map of a guest (below the device hole):
//! `0x6000` start info, `0x2_0000` command line, `0x9_fc00` MP table, `0x10_0000` and up kernel, end: initramfs.
//! Spec: Xen's x86 HVM direct boot ABI (`start_info`), version 1.

pub mod cmdline;
pub mod mptable;

use std::fs::File;
use std::io;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, ReadVolatile};

use crate::memory::Mem;

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6080;
const COMMAND_LINE: u64 = 0x2_0000;
const KERNEL_MIN: u64 = 0x10_0000;
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const RAM: u32 = 1;
const PAGE: u64 = 0x1000;

/// The boot files do not make a bootable guest.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// It is not an ELF image, or does not fit into guest memory.
    #[error("load the kernel (is it an uncompressed ELF image?)")]
    Kernel(#[source] linux_loader::loader::Error),
    /// It is an ELF image, but not a kernel with CONFIG_PVH.
    #[error("the kernel has no PVH entry point")]
    NoEntry,
    /// Reading failed.
    #[error("read the initramfs")]
    Initramfs(#[source] io::Error),
    /// Guest memory is too small for the boot files.
    #[error("{need} bytes of guest memory are needed for kernel and initramfs, it has {have}")]
    TooLarge {
        /// Bytes from the start of memory to the end of what must be loaded.
        need: u64,
        /// Bytes of guest memory below the device hole.
        have: u64,
    },
    /// The owner's words are too many.
    #[error("the kernel command line has {0} bytes, more than the 2047 that the kernel takes")]
    CommandLine(usize),
    /// The tables at the start of memory cannot be written.
    #[error("write the boot tables")]
    Tables(#[source] vm_memory::GuestMemoryError),
    /// As above, from the PVH configurator.
    #[error("write the start info")]
    StartInfo(#[source] linux_loader::configurator::Error),
}

/// The boot files, open.
#[derive(Debug)]
pub struct Files {
    /// The kernel.
    pub kernel: File,
    /// The initial root file system.
    pub initramfs: File,
}

/// What the guest must be told about its machine.
#[derive(Debug)]
pub struct Platform {
    /// The kernel's command line.
    pub words: String,
    /// Number of processors.
    pub cpus: u8,
    /// Interrupts in use.
    pub interrupts: Vec<u8>,
}

/// Where the first vCPU starts, and what it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first instruction.
    pub rip: u64,
    /// Address of the start info.
    pub start_info: u64,
}

/// Loads everything and says where to start.
///
/// # Errors
/// [`BootError`]: all but `Tables` and `StartInfo` are about the files.
pub fn load(mem: &Mem, mut files: Files, platform: &Platform) -> Result<Entry, BootError> {
    let low_end = low_memory(mem);
    let (rip, kernel_end) = load_kernel(mem, &mut files.kernel)?;
    let initramfs = load_initramfs(mem, &mut files.initramfs, kernel_end, low_end)?;
    write_command_line(mem, &platform.words)?;
    let table = mptable::build(platform.cpus, &platform.interrupts);
    mem.write_slice(&table, GuestAddress(mptable::ADDR))
        .map_err(BootError::Tables)?;
    write_start_info(mem, initramfs, low_end)?;
    Ok(Entry {
        rip,
        start_info: START_INFO,
    })
}

/// Bytes of RAM below the device hole.
fn low_memory(mem: &Mem) -> u64 {
    mem.find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
}

fn load_kernel(mem: &Mem, kernel: &mut File) -> Result<(u64, u64), BootError> {
    let loaded = Elf::load(mem.as_ref(), None, kernel, Some(GuestAddress(KERNEL_MIN)))
        .map_err(BootError::Kernel)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok((entry.0, loaded.kernel_end)),
        _ => Err(BootError::NoEntry),
    }
}

fn load_initramfs(
    mem: &Mem,
    file: &mut File,
    kernel_end: u64,
    low_end: u64,
) -> Result<hvm_modlist_entry, BootError> {
    let size = file.metadata().map_err(BootError::Initramfs)?.len();
    let too_large = || BootError::TooLarge {
        need: kernel_end.saturating_add(size),
        have: low_end,
    };
    let start = low_end.checked_sub(size).ok_or_else(too_large)? & !(PAGE - 1);
    if start < kernel_end {
        return Err(too_large());
    }
    // Below `low_end`, so it fits into a usize.
    let slice = mem.get_slice(
        GuestAddress(start),
        usize::try_from(size).unwrap_or(usize::MAX),
    );
    let mut slice = slice.map_err(BootError::Tables)?;
    file.read_exact_volatile(&mut slice)
        .map_err(|error| BootError::Initramfs(io::Error::other(error)))?;
    Ok(hvm_modlist_entry {
        paddr: start,
        size,
        ..hvm_modlist_entry::default()
    })
}

fn write_command_line(mem: &Mem, words: &str) -> Result<(), BootError> {
    if words.len() >= cmdline::MAX_BYTES || words.contains('\0') {
        return Err(BootError::CommandLine(words.len()));
    }
    let mut bytes = words.as_bytes().to_vec();
    bytes.push(0);
    mem.write_slice(&bytes, GuestAddress(COMMAND_LINE))
        .map_err(BootError::Tables)
}

fn write_start_info(
    mem: &Mem,
    initramfs: hvm_modlist_entry,
    low_end: u64,
) -> Result<(), BootError> {
    let map = memory_map(mem, low_end);
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: 1,
        modlist_paddr: MODULES,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0), // two or three
        ..hvm_start_info::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&[initramfs], GuestAddress(MODULES));
    PvhBootConfigurator::write_bootparams(&params, mem.as_ref()).map_err(BootError::StartInfo)
}

/// RAM as the guest may use it: without the MP table and the legacy hole above it.
fn memory_map(mem: &Mem, low_end: u64) -> Vec<hvm_memmap_table_entry> {
    let ram = |addr, size| hvm_memmap_table_entry {
        addr,
        size,
        type_: RAM,
        reserved: 0,
    };
    let mut map = vec![ram(0, mptable::ADDR), ram(KERNEL_MIN, low_end - KERNEL_MIN)];
    let high = mem.iter().filter(|region| region.start_addr().0 != 0);
    map.extend(high.map(|region| ram(region.start_addr().0, region.len())));
    map
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn memory(bytes: usize) -> Mem {
        Arc::new(
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)])
                .unwrap()
                .into(),
        )
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        file
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let mem = memory(2 << 20);
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096], b"\x7fELF\x02\x01\x01"] {
            assert!(load_kernel(&mem, &mut file(bytes)).is_err());
        }
    }

    #[test]
    fn the_initramfs_lies_page_aligned_at_the_end_and_never_on_the_kernel() {
        let mem = memory(2 << 20);
        let mut small = file(&[7; 5000]);
        let module = load_initramfs(&mem, &mut small, 0x10_0000, 2 << 20).unwrap();
        assert_eq!((module.paddr, module.size), ((2 << 20) - 8192, 5000));
        assert_eq!(
            mem.read_obj::<u8>(GuestAddress(module.paddr + 4999))
                .unwrap(),
            7
        );
        for (len, kernel_end) in [
            (5000, (2 << 20) - 100),
            (3 << 20, 0),
            (1 << 20, (1 << 20) + 1),
        ] {
            let mut large = file(&vec![0; len]);
            let loaded = load_initramfs(&mem, &mut large, kernel_end, 2 << 20);
            assert!(matches!(loaded, Err(BootError::TooLarge { .. })));
        }
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_is_refused() {
        let mem = memory(2 << 20);
        assert!(write_command_line(&mem, &"x".repeat(cmdline::MAX_BYTES - 1)).is_ok());
        assert!(write_command_line(&mem, &"x".repeat(cmdline::MAX_BYTES)).is_err());
        assert!(write_command_line(&mem, "a\0b").is_err());
    }

    #[test]
    fn the_memory_map_leaves_the_mp_table_out() {
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 1 << 20)];
        let mem: Mem = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap().into());
        let map: Vec<_> = memory_map(&mem, 4 << 20)
            .iter()
            .map(|e| (e.addr, e.size))
            .collect();
        assert_eq!(
            map,
            [(0, mptable::ADDR), (1 << 20, 3 << 20), (1 << 32, 1 << 20)]
        );
    }
}
