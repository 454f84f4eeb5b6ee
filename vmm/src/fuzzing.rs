//! Entry points for fuzzing: each guest-facing parser as a plain function of bytes.
//!
//! Contract: no function here panics, loops for long, or needs KVM or root, whatever the bytes; a panic is a bug of the
//! parser. `fuzz/` runs them under libFuzzer; `cargo test` replays `fuzz/corpus/<target>/*` through the same functions,
//! so what a fuzzer once found stays found.
//! Format of the bytes: [`Image`] for queues and chains; for the rest see the function.

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::devices::driver::{Driver, ENTRIES, MEMORY_BYTES, Raw};
use crate::virtio::mmio::Registers;
use crate::virtio::queue::QueueState;
use crate::virtio::{Chain, ConfigSpace, Page, Queue};

/// A fuzz target: takes any bytes.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus folder.
pub const TARGETS: &[(&str, Target)] = &[
    ("balloon", crate::devices::balloon::fuzz),
    ("block", crate::devices::block::fuzz),
    ("chain", chain),
    ("fs", crate::devices::fs::fuzz),
    ("mem", crate::devices::mem::fuzz),
    ("net", crate::devices::net::fuzz),
    ("queue", queue),
    ("registers", registers),
    ("vsock", crate::devices::vsock::fuzz::run),
];

/// Runs the target of that name, if there is one.
pub fn run(name: &str, bytes: &[u8]) {
    if let Some((_, target)) = TARGETS.iter().find(|(known, _)| *known == name) {
        target(bytes);
    }
}

/// Where an image's bytes for buffers lie in guest memory.
pub const BUFFERS: u64 = 0x20_0000;

/// Chains and the memory behind them, out of fuzzer bytes: one byte with the number of descriptors (at most 63), eight
/// bytes for each, and the rest is guest memory from [`BUFFERS`] on.
///
/// A descriptor is `offset: u24, region: u8, len: u16, flags: u8, next: u8`. Region 0 counts from [`BUFFERS`], 1 from the
/// end of memory backwards, 2 is the address itself, 3 counts from the end of all addresses backwards. A length of
/// 0xff00 and more is meant in units of 64 KiB.
pub struct Image {
    /// The guest.
    pub driver: Driver,
}

impl Image {
    /// Lays the bytes out in a fresh guest and offers the chain that starts at descriptor 0.
    pub fn new(bytes: &[u8]) -> Self {
        let mut driver = Driver::new();
        let (count, rest) = bytes.split_first().unwrap_or((&0, &[]));
        let (descriptors, buffers) = rest.split_at(rest.len().min(usize::from(count % 64) * 8));
        let chain: Vec<Raw> = descriptors
            .as_chunks::<8>()
            .0
            .iter()
            .map(descriptor)
            .collect();
        driver.offer_raw(&chain);
        driver.put(BUFFERS, buffers);
        Self { driver }
    }
}

fn descriptor(raw: &[u8; 8]) -> Raw {
    let [o0, o1, o2, region, l0, l1, flags, next] = *raw;
    let offset = u64::from(u32::from_le_bytes([o0, o1, o2, 0]));
    let addr = match region % 4 {
        0 => BUFFERS + offset,
        1 => MEMORY_BYTES.saturating_sub(offset),
        2 => offset,
        _ => u64::MAX - offset,
    };
    let len = u32::from(u16::from_le_bytes([l0, l1]));
    let len = if len >= 0xff00 { len << 16 } else { len };
    (addr, len, u16::from(flags), u16::from(next))
}

/// A chain is walked, read and written all over.
fn chain(bytes: &[u8]) {
    let mut image = Image::new(bytes);
    let Ok(Some(chain)) = image.driver.pop() else {
        return;
    };
    let mut all = vec![0; chain.readable_len().min(1 << 20)];
    for offset in [0, 1, all.len(), chain.readable_len(), usize::MAX] {
        let _ = chain.read(offset, &mut all);
    }
    for offset in [0, 1, chain.writable_len(), usize::MAX] {
        let _ = chain.write(offset, &[7; 100]);
        let _ = chain.write(offset, &[]);
    }
    let writable: usize = chain.writable().iter().map(|slice| slice.len()).sum();
    assert_eq!(writable, chain.writable_len());
}

/// A queue at any place and in any state: 32 bytes of [`QueueState`], the rest is guest memory from 0 on.
fn queue(bytes: &[u8]) {
    let Some((raw, memory)) = bytes.split_first_chunk::<32>() else {
        return;
    };
    let driver = Driver::new();
    driver.put(0, memory);
    let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
    // Four bytes say enough about 8 MiB; the top bit stands for the other end of the address space.
    let address = |at: usize| {
        let low = u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        if low >> 31 == 0 {
            u64::from(low)
        } else {
            u64::MAX << 32 | u64::from(low)
        }
    };
    let state = QueueState {
        size: word(0),
        ready: raw[2] & 1 != 0,
        descriptors: address(4),
        available: address(8),
        used: address(12),
        next_available: word(16),
        next_used: word(18),
    };
    let Ok(mut queue) = Queue::restore(&state, raw[2] & 2 != 0, &driver.mem) else {
        return;
    };
    let mut chain = Chain::new(&driver.mem);
    for _ in 0..2 * ENTRIES {
        match queue.pop(&mut chain) {
            Ok(true) => {
                let _ = queue.push(chain.head(), 1);
            }
            Ok(false) | Err(_) => break,
        }
    }
    let _ = queue.state();
}

/// Register writes: five bytes each, `offset: u16` (halved range), what and how wide, then two bytes of value.
fn registers(bytes: &[u8]) {
    let config = ConfigSpace::with_writable(vec![1; 60], 4..8);
    let mut registers = Registers::new(26, 1 << 5, &[128, 1024, 64], config);
    PAGE.with(|page| {
        for access in bytes.as_chunks::<5>().0 {
            let [o0, o1, how, v0, v1] = *access;
            let offset = u32::from(u16::from_le_bytes([o0, o1]) % 0x300);
            let width = usize::from(how >> 1 & 0xf);
            let value = [v0, v1, how & 0x80, 0, v0, v1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let _ = registers.write(offset, &value[..width]);
            registers.show(page);
        }
    });
    let _ = registers.state();
}

thread_local! {
    /// Where registers are shown; pages are never given back.
    static PAGE: &'static Page = &Page::leak(1)[0];
}

/// A file of zeros in memory, for targets that need a disk.
///
/// # Panics
/// If the host has no memory.
#[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
pub fn memory_file(bytes: u64) -> std::fs::File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(bytes).unwrap();
    file
}

/// A directory as `thread::enter` wants it.
///
/// # Errors
/// It cannot be opened.
pub fn directory(path: &Path) -> std::io::Result<OwnedFd> {
    std::fs::File::open(path).map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target);
        let files = std::fs::read_dir(&folder).unwrap_or_else(|_| panic!("no {folder:?}"));
        files
            .map(|file| {
                let path = file.unwrap().path();
                (path.display().to_string(), std::fs::read(&path).unwrap())
            })
            .collect()
    }

    #[test]
    fn every_target_takes_its_corpus_and_the_edges() {
        for (name, target) in TARGETS {
            let seeds = corpus(name);
            assert!(!seeds.is_empty(), "{name} has no corpus");
            for bytes in [&[][..], &[0], &[0xff; 7], &[0xff; 4096], &[0; 4096]] {
                target(bytes);
            }
            for (path, bytes) in seeds {
                println!("{path}");
                target(&bytes);
            }
        }
    }

    #[test]
    fn every_corpus_has_a_target() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for folder in std::fs::read_dir(corpus).unwrap() {
            let name = folder.unwrap().file_name();
            assert!(
                TARGETS.iter().any(|(target, _)| name == *target),
                "{name:?}"
            );
        }
    }

    #[test]
    fn an_image_says_what_its_bytes_say() {
        let raw = [
            2, 4, 0, 0, 0, 8, 0, 1, 1, 0, 0, 0, 0, 16, 0, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8,
        ];
        let chain = Image::new(&raw).driver.pop().unwrap().unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (8, 16));
        assert_eq!(chain.read_array::<4>(0).unwrap(), [5, 6, 7, 8]);
        assert_eq!(
            descriptor(&[1, 0, 0, 3, 1, 0xff, 0, 0]),
            (u64::MAX - 1, 0xff01_0000, 0, 0)
        );
    }
}
