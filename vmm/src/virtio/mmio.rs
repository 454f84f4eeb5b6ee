//! The virtio-mmio registers of one device: what the driver reads and writes, as a state machine without side effects.
//!
//! Contract: every write is legal input; a malformed one (wrong width, wrong phase, unknown register) is ignored. One that
//! has consequences elsewhere returns them as an [`Effect`]; `transport.rs` carries it out. Reads never arrive here: the
//! driver reads the page on which [`Registers::show`] writes everything out after each write.
//! Phases (virtio 1.2, 3.1.1): features may be written until FEATURES_OK, queues between FEATURES_OK and DRIVER_OK;
//! writing 0 to the status resets. The status, the interrupt status and the configuration space are shown by those who
//! share them with the device's thread (`Line`, `ConfigSpace`).
//! Spec: virtio 1.2, 4.2.2 (register layout).

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
    VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::QueueState;
use super::{ConfigSpace, Page};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Feature bits that every device offers.
pub const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const KNOWN_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | DRIVER_OK
    | FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// What the driver has set so far: all there is to save of the registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterState {
    /// Device status without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// Which half of the device's features is read.
    pub device_features_select: u32,
    /// Which half of the driver's features is written.
    pub driver_features_select: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// Which queue the queue registers mean.
    pub queue_select: u32,
    /// The queues as the driver set them up.
    pub queues: Vec<QueueState>,
}

/// What a write means outside of the registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// DRIVER_OK was set: the device starts with these queues and features.
    Activate {
        /// The queues as the driver set them up; those it does not use are not ready.
        queues: Vec<QueueState>,
        /// The features it accepted.
        features: u64,
    },
    /// 0 was written to the status of an active device: it must have stopped before the write returns.
    Reset,
}

/// The registers of one device.
#[derive(Debug)]
pub struct Registers {
    id: u32,
    features: u64,
    queue_max: Vec<u16>,
    config: ConfigSpace,
    state: RegisterState,
}

impl Registers {
    /// Registers after power-on.
    pub fn new(id: u32, features: u64, queue_max: &[u16], config: ConfigSpace) -> Self {
        let features = features | COMMON_FEATURES;
        let queue_max = queue_max.to_vec();
        let state = fresh(&queue_max);
        Self {
            id,
            features,
            queue_max,
            config,
            state,
        }
    }

    /// Makes it a device of another kind, as after power-on; 0 is no device. Says whether it was active.
    pub fn replace(&mut self, id: u32) -> bool {
        let was_active = self.state.status & DRIVER_OK != 0;
        self.id = id;
        self.state = fresh(&self.queue_max);
        was_active
    }

    /// What kind of device it is.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What the driver has set so far.
    pub fn state(&self) -> &RegisterState {
        &self.state
    }

    /// Writes out what the driver reads, except for the status.
    pub fn show(&self, page: &Page) {
        let queue = self.selected();
        let shown = [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, 2),
            (VIRTIO_MMIO_DEVICE_ID, self.id),
            (
                VIRTIO_MMIO_DEVICE_FEATURES,
                half(self.features, self.state.device_features_select),
            ),
            (
                VIRTIO_MMIO_QUEUE_NUM_MAX,
                queue.map_or(0, |queue| u32::from(self.queue_max[queue])),
            ),
            (
                VIRTIO_MMIO_QUEUE_READY,
                queue.map_or(0, |queue| u32::from(self.state.queues[queue].ready)),
            ),
            // No shared memory region: all ones (4.2.2).
            (VIRTIO_MMIO_SHM_LEN_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_LEN_HIGH, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_HIGH, u32::MAX),
        ];
        for (register, value) in shown {
            page.word(register).store(value, Ordering::Release);
        }
    }

    /// Index of the selected queue, if there is such a queue.
    fn selected(&self) -> Option<usize> {
        let index = usize::try_from(self.state.queue_select).ok()?;
        (index < self.queue_max.len()).then_some(index)
    }

    /// A write at `offset` from the device's base.
    pub fn write(&mut self, offset: u32, data: &[u8]) -> Effect {
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            if self.state.status & VIRTIO_CONFIG_S_DRIVER != 0 {
                self.config.driver_write(at as usize, data);
            }
            return Effect::None;
        }
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return Effect::None;
        };
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.state.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.state.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.state.queue_select = value,
            VIRTIO_MMIO_STATUS => return self.set_status(value),
            _ => self.set_queue(offset, value),
        }
        Effect::None
    }

    fn accept_features(&mut self, value: u32) {
        let select = self.state.driver_features_select;
        if self.state.status & FEATURES_OK == 0 && select < 2 {
            let shift = 32 * select;
            let kept = self.state.driver_features & !(u64::from(u32::MAX) << shift);
            self.state.driver_features = kept | u64::from(value) << shift;
        }
    }

    fn set_status(&mut self, value: u32) -> Effect {
        let before = self.state.status;
        if value == 0 {
            self.state = fresh(&self.queue_max);
            return if before & DRIVER_OK != 0 {
                Effect::Reset
            } else {
                Effect::None
            };
        }
        let mut after = before | (value & KNOWN_STATUS); // bits are only ever added
        let accepted = self.state.driver_features;
        let acceptable = accepted & !self.features == 0 && accepted & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable {
            after &= !FEATURES_OK; // 2.2.2: the driver reads it back and gives up
        }
        if after & FEATURES_OK == 0 {
            after &= !DRIVER_OK;
        }
        self.state.status = after;
        if after & !before & DRIVER_OK != 0 {
            return Effect::Activate {
                queues: self.state.queues.clone(),
                features: accepted,
            };
        }
        Effect::None
    }

    fn set_queue(&mut self, offset: u32, value: u32) {
        let status = self.state.status;
        if status & FEATURES_OK == 0 || status & DRIVER_OK != 0 {
            return;
        }
        let Some(index) = self.selected() else { return };
        let max = self.queue_max[index];
        let queue = &mut self.state.queues[index];
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1;
        }
        if queue.ready {
            return;
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= max => queue.size = size,
                _ => {}
            },
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

fn fresh(queue_max: &[u16]) -> RegisterState {
    let queues = queue_max.iter().map(|max| QueueState {
        size: *max,
        ..QueueState::default()
    });
    RegisterState {
        queues: queues.collect(),
        ..RegisterState::default()
    }
}

fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address >> 32 << 32 | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address << 32 >> 32 | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACKNOWLEDGED: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;

    fn registers() -> Registers {
        Registers::new(
            19,
            1 << 3,
            &[256, 64],
            ConfigSpace::with_writable(vec![1; 8], 0..4),
        )
    }

    fn write(registers: &mut Registers, offset: u32, value: u32) -> Effect {
        registers.write(offset, &value.to_le_bytes())
    }

    fn read(registers: &Registers, offset: u32) -> u32 {
        let page = &Page::leak(1)[0];
        registers.show(page);
        page.word(offset).load(Ordering::Acquire)
    }

    fn negotiated(features: u64) -> Registers {
        let mut r = registers();
        write(&mut r, VIRTIO_MMIO_STATUS, ACKNOWLEDGED);
        for select in [0, 1, 2] {
            write(&mut r, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            write(&mut r, VIRTIO_MMIO_DRIVER_FEATURES, half(features, select));
        }
        write(&mut r, VIRTIO_MMIO_STATUS, ACKNOWLEDGED | FEATURES_OK);
        r
    }

    #[test]
    fn the_device_introduces_itself() {
        let mut r = registers();
        assert_eq!(read(&r, VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(read(&r, VIRTIO_MMIO_VERSION), 2);
        assert_eq!(read(&r, VIRTIO_MMIO_DEVICE_ID), 19);
        assert_eq!(read(&r, VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
        write(&mut r, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(read(&r, VIRTIO_MMIO_DEVICE_FEATURES), 1);
        write(&mut r, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
        assert_eq!(read(&r, VIRTIO_MMIO_DEVICE_FEATURES), 0);
        for (queue, max) in [(0, 256), (1, 64), (2, 0), (u32::MAX, 0)] {
            write(&mut r, VIRTIO_MMIO_QUEUE_SEL, queue);
            assert_eq!(read(&r, VIRTIO_MMIO_QUEUE_NUM_MAX), max);
        }
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let offered = COMMON_FEATURES | 1 << 3;
        assert_ne!(negotiated(offered).state().status & FEATURES_OK, 0);
        for bad in [offered | 1 << 4, offered & !(1 << VIRTIO_F_VERSION_1), 0] {
            assert_eq!(negotiated(bad).state().status & FEATURES_OK, 0);
        }
    }

    #[test]
    fn a_full_set_up_activates_once_and_resets_once() {
        let mut r = negotiated(COMMON_FEATURES);
        write(&mut r, VIRTIO_MMIO_QUEUE_SEL, 1);
        write(&mut r, VIRTIO_MMIO_QUEUE_NUM, 32);
        write(&mut r, VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
        write(&mut r, VIRTIO_MMIO_QUEUE_DESC_HIGH, 0x1);
        write(&mut r, VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
        write(&mut r, VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
        write(&mut r, VIRTIO_MMIO_QUEUE_READY, 1);
        write(&mut r, VIRTIO_MMIO_QUEUE_NUM, 64); // too late
        let status = ACKNOWLEDGED | FEATURES_OK | DRIVER_OK;
        let Effect::Activate { queues, features } = write(&mut r, VIRTIO_MMIO_STATUS, status)
        else {
            panic!("not activated")
        };
        assert_eq!(features, COMMON_FEATURES);
        assert!(!queues[0].ready);
        let expected = QueueState {
            size: 32,
            ready: true,
            descriptors: 0x1_0000_1000,
            available: 0x2000,
            used: 0x3000,
            ..QueueState::default()
        };
        assert_eq!(queues[1], expected);
        assert_eq!(write(&mut r, VIRTIO_MMIO_STATUS, status), Effect::None);
        write(&mut r, VIRTIO_MMIO_QUEUE_READY, 0);
        assert!(r.state().queues[1].ready, "a live queue was changed");
        assert_eq!(write(&mut r, VIRTIO_MMIO_STATUS, 0), Effect::Reset);
        assert_eq!(write(&mut r, VIRTIO_MMIO_STATUS, 0), Effect::None);
        assert_eq!(r.state(), registers().state());
    }

    #[test]
    fn queues_cannot_be_set_up_before_the_features() {
        let mut r = registers();
        write(&mut r, VIRTIO_MMIO_QUEUE_READY, 1);
        let all = ACKNOWLEDGED | DRIVER_OK;
        assert_eq!(write(&mut r, VIRTIO_MMIO_STATUS, all), Effect::None);
        assert!(!r.state().queues[0].ready);
        assert_eq!(r.state().status & DRIVER_OK, 0);
    }

    #[test]
    fn impossible_queue_sizes_are_ignored() {
        let mut r = negotiated(COMMON_FEATURES);
        for size in [0, 3, 512, 1 << 16, u32::MAX] {
            write(&mut r, VIRTIO_MMIO_QUEUE_NUM, size);
            assert_eq!(r.state().queues[0].size, 256);
        }
    }

    #[test]
    fn writes_of_any_width_and_place_are_survived() {
        let mut r = registers();
        for offset in (0..0x120).chain([u32::MAX - 1, u32::MAX]) {
            for width in 0..=8 {
                r.write(offset, &vec![0xff; width]);
            }
        }
        assert_eq!(r.state().status & DRIVER_OK, 0);
    }
}
