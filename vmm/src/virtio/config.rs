//! A device's configuration space: bytes that the driver reads at any time and may write in one declared range.
//!
//! Contract: the space is written out to the device's register page, where the driver reads it; past its end there are
//! zeros. A change by the device moves the generation before and after, so a driver that reads a field in several
//! accesses can tell (virtio 1.2, 2.5.3), and is followed by an interrupt, after which it reads again. Writes outside the
//! declared range are dropped.
//! Threads: vCPU threads write, the device's thread updates. Cloning shares.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION};

use super::Page;

#[derive(Debug, Default)]
struct Space {
    bytes: Vec<u8>,
    writable: Range<usize>,
    page: Option<&'static Page>,
}

impl Space {
    fn show(&self) {
        if let Some(page) = self.page {
            page.write(VIRTIO_MMIO_CONFIG, &self.bytes);
        }
    }

    fn move_generation(&self) {
        if let Some(page) = self.page {
            page.word(VIRTIO_MMIO_CONFIG_GENERATION)
                .fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// A shared configuration space.
#[derive(Debug, Clone, Default)]
pub struct ConfigSpace(Arc<Mutex<Space>>);

impl ConfigSpace {
    /// A space that the driver can only read.
    pub fn read_only(bytes: Vec<u8>) -> Self {
        Self::with_writable(bytes, 0..0)
    }

    /// A space of which the driver may write the bytes in `writable`.
    pub fn with_writable(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        Self(Arc::new(Mutex::new(Space {
            bytes,
            writable,
            page: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Space> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the space on `page` from now on.
    pub fn show_on(&self, page: &'static Page) {
        let mut space = self.lock();
        space.page = Some(page);
        space.show();
    }

    /// Takes the space off its page, on which zeros are left.
    pub fn hide(&self) {
        let mut space = self.lock();
        if let Some(page) = space.page.take() {
            page.write(VIRTIO_MMIO_CONFIG, &vec![0; space.bytes.len()]);
        }
    }

    /// Fills `data` from `offset` on, with zeros past the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let space = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.checked_add(index);
            *byte = at.and_then(|at| space.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// A write by the driver: taken if all of it is in the writable range, else dropped.
    pub fn driver_write(&self, offset: usize, data: &[u8]) {
        let mut space = self.lock();
        let Some(end) = offset.checked_add(data.len()) else {
            return;
        };
        let allowed = space.writable.start <= offset && end <= space.writable.end;
        if allowed && let Some(bytes) = space.bytes.get_mut(offset..end) {
            bytes.copy_from_slice(data);
            space.show();
        }
    }

    /// A change by the device. The caller then tells the driver with `Io::config_changed`.
    pub fn update(&self, change: impl FnOnce(&mut [u8])) {
        let mut space = self.lock();
        change(&mut space.bytes);
        space.move_generation();
        space.show();
        space.move_generation();
    }

    /// The little-endian u32 at `offset`; zero past the end.
    pub fn read_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_writes_only_where_it_may() {
        let config = ConfigSpace::with_writable(vec![1, 2, 3, 4, 5, 6, 7, 8], 4..8);
        config.driver_write(0, &[9; 4]);
        config.driver_write(2, &[9; 4]);
        config.driver_write(6, &[9; 4]);
        config.driver_write(usize::MAX, &[9; 4]);
        config.driver_write(4, &[0xaa, 0xbb, 0xcc, 0xdd]);
        let mut all = [0xff; 10];
        config.read(0, &mut all);
        assert_eq!(all, [1, 2, 3, 4, 0xaa, 0xbb, 0xcc, 0xdd, 0, 0]);
    }

    /// What the driver reads: the generation, and the first two words of the space.
    fn shown(page: &Page) -> [u32; 3] {
        [
            VIRTIO_MMIO_CONFIG_GENERATION,
            VIRTIO_MMIO_CONFIG,
            VIRTIO_MMIO_CONFIG + 4,
        ]
        .map(|at| page.word(at).load(Ordering::Acquire))
    }

    #[test]
    fn the_space_is_shown_as_it_is_and_as_the_driver_leaves_it() {
        let page = &Page::leak(1)[0];
        let config = ConfigSpace::with_writable(vec![1, 0, 0, 0, 2, 0], 4..6);
        config.show_on(page);
        assert_eq!(shown(page), [0, 1, 2]);
        config.driver_write(4, &[7, 1]);
        assert_eq!(shown(page), [0, 1, 0x107]);
    }

    #[test]
    fn a_change_by_the_device_moves_the_generation() {
        let page = &Page::leak(1)[0];
        let config = ConfigSpace::read_only(vec![0; 4]);
        config.show_on(page);
        config.update(|bytes| bytes.copy_from_slice(&7u32.to_le_bytes()));
        assert_eq!((config.read_u32(0), shown(page)), (7, [2, 7, 0]));
        assert_eq!(config.read_u32(usize::MAX - 1), 0);
    }
}
