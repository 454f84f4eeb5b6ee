//! virtio-balloon: pages that the guest does not use go back to the host.
//!
//! Contract: free page reporting is what matters: the guest names free ranges (2 MiB and more), the host drops them,
//! and only then may the guest use them again; they read as zeros. Inflating the balloon to a target works the same
//! way page by page; deflating needs nothing, the pages come back when they are touched. Only whole pages of guest RAM
//! are ever dropped, and only such as the chain or the page number names: the guest's own.
//! Nothing is decided here: the target is [`Target`]'s.
//! Spec: virtio 1.2, 5.5. Like every driver and device in use, queues are numbered without gaps: inflate, deflate,
//! reporting.

use crate::counters::{Counter, Counters};
use crate::memory::Mem;
use crate::virtio::slice::{GuestSlice, PAGE_BYTES};
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, GuestFault, Io};
use vm_memory::GuestAddress;

const VIRTIO_ID_BALLOON: u32 = 5;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
const QUEUE_SIZES: [u16; 3] = [128, 128, 128];
const NUM_PAGES_AT: usize = 0;
const ACTUAL_AT: usize = 4;
/// `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
const CONFIG_BYTES: usize = 16;
/// The most page numbers of one chain. Linux sends 256.
const MAX_PAGES: usize = 4096;

/// How large the balloon should be and is. Cheap to clone; any thread.
#[derive(Debug, Clone)]
pub struct Target(ConfigSpace);

impl Target {
    /// Asks for a balloon of that many pages of 4 KiB. The caller tells the driver with `Io::config_changed`.
    pub fn set_pages(&self, pages: u32) {
        self.0.update(|bytes| {
            bytes[NUM_PAGES_AT..NUM_PAGES_AT + 4].copy_from_slice(&pages.to_le_bytes());
        });
    }

    /// How large the guest says that it is, in pages of 4 KiB.
    pub fn actual_pages(&self) -> u32 {
        self.0.read_u32(ACTUAL_AT)
    }
}

/// The balloon.
pub struct Balloon {
    config: ConfigSpace,
    mem: Mem,
    chain: Chain,
    reclaimed: Counter,
}

impl Balloon {
    /// A balloon over `mem`, empty.
    pub fn new(mem: &Mem, counters: &Counters) -> Self {
        let writable = ACTUAL_AT..ACTUAL_AT + 4;
        Self {
            config: ConfigSpace::with_writable(vec![0; CONFIG_BYTES], writable),
            mem: mem.clone(),
            chain: Chain::new(mem),
            reclaimed: counters.register("balloon.reclaimed_bytes"),
        }
    }

    /// The means to change the balloon's size.
    pub fn target(&self) -> Target {
        Target(self.config.clone())
    }
}

/// Drops the reported ranges; returns the number of bytes.
fn report(chain: &Chain) -> u64 {
    chain.writable().iter().map(GuestSlice::release_pages).sum()
}

/// Drops the pages whose numbers the chain holds; returns the number of bytes.
fn inflate(mem: &Mem, chain: &Chain) -> Result<u64, GuestFault> {
    let len = chain.readable_len();
    if !len.is_multiple_of(4) || len > 4 * MAX_PAGES {
        return Err(GuestFault::Protocol(
            "a list of pages that is too long or broken",
        ));
    }
    let mut numbers = vec![0; len];
    chain.read(0, &mut numbers)?;
    let (numbers, _) = numbers.as_chunks::<4>();
    let mut numbers = numbers
        .iter()
        .map(|bytes| u64::from(u32::from_le_bytes(*bytes)))
        .peekable();
    let mut dropped = 0;
    while let Some(first) = numbers.next() {
        let mut end = first + 1;
        while numbers.next_if_eq(&end).is_some() {
            end += 1;
        }
        let (start, bytes) = (first * PAGE_BYTES, (end - first) * PAGE_BYTES);
        // At most MAX_PAGES pages: fits.
        let bytes = usize::try_from(bytes).unwrap_or(0);
        let range = GuestSlice::resolve(mem, GuestAddress(start), bytes)
            .ok_or(GuestFault::Protocol("a page that is not guest memory"))?;
        dropped += range.release_pages();
    }
    Ok(dropped)
}

impl Device for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << VIRTIO_BALLOON_F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, _: &mut Io) -> Result<(), DeviceError> {
        Ok(())
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(index) else {
            return Ok(());
        };
        while queue.pop(&mut self.chain)? {
            match index {
                INFLATE => self.reclaimed.add(inflate(&self.mem, &self.chain)?),
                REPORTING => self.reclaimed.add(report(&self.chain)),
                DEFLATE => {}
                _ => return Err(GuestFault::Protocol("a queue that the balloon has not").into()),
            }
            queue.push(self.chain.head(), 0)?;
        }
        Ok(())
    }

    fn reset(&mut self, _: &mut Io) {
        self.config
            .update(|bytes| bytes[ACTUAL_AT..ACTUAL_AT + 4].fill(0));
    }
}

/// A chain of either queue, as an image (`crate::fuzzing`).
#[cfg(any(test, feature = "fuzzing"))]
pub fn fuzz(bytes: &[u8]) {
    let mut image = crate::fuzzing::Image::new(bytes);
    let Ok(Some(chain)) = image.driver.pop() else {
        return;
    };
    assert!(report(&chain) <= chain.writable_len() as u64);
    let _ = inflate(&image.driver.mem, &chain);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver::{Driver, MEMORY_BYTES, WRITE};

    const PAGE: usize = 4096;
    const PAGE_U32: u32 = 4096;
    const AREA_PAGE: u32 = 0x200;
    const LAST_PAGE: u32 = 2047;
    const AREA: u64 = 0x20_0000;

    fn filled() -> Driver {
        let driver = Driver::new();
        driver.put(AREA, &[0xee; 4 * PAGE]);
        driver
    }

    fn zero_pages(driver: &Driver) -> Vec<bool> {
        let area = driver.get(AREA, 4 * PAGE);
        area.chunks(PAGE)
            .map(|page| page.iter().all(|byte| *byte == 0))
            .collect()
    }

    #[test]
    fn a_reported_range_is_dropped_in_whole_pages_only() {
        let mut driver = filled();
        let len = 3 * PAGE_U32;
        driver.offer_raw(&[(AREA + 1, len, WRITE, 0)]);
        let chain = driver.pop().unwrap().unwrap();
        assert_eq!(report(&chain), 2 * PAGE as u64);
        assert_eq!(zero_pages(&driver), [false, true, true, false]);
    }

    #[test]
    fn a_part_of_a_page_is_never_dropped() {
        let mut driver = filled();
        for (at, len) in [
            (AREA, 4095),
            (AREA + 1, 4095),
            (AREA + 4095, 2),
            (AREA + 10, 0),
        ] {
            driver.offer_raw(&[(at, len, WRITE, 0)]);
            assert_eq!(report(&driver.pop().unwrap().unwrap()), 0);
        }
        assert_eq!(zero_pages(&driver), [false; 4]);
    }

    #[test]
    fn a_report_that_only_reads_drops_nothing() {
        let mut driver = filled();
        driver.offer_raw(&[(AREA, 4 * PAGE_U32, 0, 0)]);
        assert_eq!(report(&driver.pop().unwrap().unwrap()), 0);
        assert_eq!(zero_pages(&driver), [false; 4]);
    }

    #[test]
    fn a_report_outside_of_memory_is_a_fault() {
        let mut driver = filled();
        driver.offer_raw(&[(MEMORY_BYTES - PAGE as u64, 2 * PAGE_U32, WRITE, 0)]);
        assert!(driver.pop().is_err());
    }

    fn inflated(numbers: &[u8]) -> (Driver, Result<u64, GuestFault>) {
        let mut driver = filled();
        driver.offer(&[numbers], &[]);
        let chain = driver.pop().unwrap().unwrap();
        let result = inflate(&driver.mem, &chain);
        (driver, result)
    }

    fn numbers(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    #[test]
    fn pages_of_the_balloon_are_dropped_in_any_order() {
        let first = AREA_PAGE;
        let (driver, result) = inflated(&numbers(&[first + 2, first + 3, first, first]));
        assert_eq!(result, Ok(4 * PAGE as u64));
        assert_eq!(zero_pages(&driver), [true, false, true, true]);
    }

    #[test]
    fn page_numbers_outside_of_memory_are_faults() {
        let last = LAST_PAGE;
        for pages in [
            &[last + 1][..],
            &[u32::MAX],
            &[last, last + 1],
            &[0xf_ffff, 0x10_0000],
        ] {
            assert!(inflated(&numbers(pages)).1.is_err(), "{pages:?}");
        }
        assert!(inflated(&[0; 5]).1.is_err());
        assert!(inflated(&vec![0; 4 * (MAX_PAGES + 1)]).1.is_err());
    }

    #[test]
    fn the_target_is_the_devices_and_the_size_the_guests() {
        let balloon = Balloon::new(&Driver::new().mem, &Counters::default());
        let target = balloon.target();
        target.set_pages(77);
        balloon.config().driver_write(0, &[1; 4]);
        balloon.config().driver_write(4, &5u32.to_le_bytes());
        assert_eq!(
            (balloon.config().read_u32(0), target.actual_pages()),
            (77, 5)
        );
    }
}
