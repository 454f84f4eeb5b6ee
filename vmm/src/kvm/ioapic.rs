//! The IOAPIC: turns interrupt lines of devices into messages to the vCPUs' local APICs.
//!
//! Contract: only edges. KVM keeps the local APICs; this register file says which message a line means, KVM is given the
//! messages as routes, and from then on an interrupt goes from a device's eventfd to the vCPU inside the kernel, without
//! a work queue in between. KVM's own IOAPIC would do the same more slowly and always has 24 pins, each of which costs
//! the booting guest two dozen exits; this one has as many as are used.
//! A line that is masked has no route: its edge is lost, as on the real chip.
//! State: one plain struct. Threads: vCPU threads, behind the bus's lock.
//! Spec: Intel 82093AA, 3.1 (memory-mapped registers) and 3.2 (redirection table); Intel SDM 3A, 11.11 (messages).

use serde::{Deserialize, Serialize};

/// Its place in the guest's address space.
pub const ADDR: u64 = 0xfec0_0000;
/// Bytes of address space.
pub const BYTES: u64 = 0x1000;
/// The most pins, as the version register can say.
pub const MAX_PINS: u8 = 240;

const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;
const CHIP_VERSION: u32 = 0x11;
const ID_BITS: u32 = 0xf << 24;

const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR: the chip's own.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
const LOGICAL: u64 = 1 << 11;
const VECTOR_AND_MODE: u64 = 0x7ff;
const MESSAGE_BASE: u32 = 0xfee0_0000;

/// What a vCPU's local APIC is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Destination, in the form of an address.
    pub address: u32,
    /// Vector and delivery mode.
    pub data: u32,
}

/// All there is to save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Identity, bits 24 to 27.
    pub id: u32,
    /// The register that the window shows.
    pub select: u8,
    /// Redirection entries, by pin.
    pub entries: Vec<u64>,
}

/// The chip.
#[derive(Debug)]
pub struct IoApic(IoApicState);

impl IoApic {
    /// A chip after power-on with pins 0 to `last`.
    pub fn new(last: u8) -> Self {
        let pins = usize::from(last.min(MAX_PINS - 1)) + 1;
        Self(IoApicState {
            id: 0,
            select: 0,
            entries: vec![MASKED; pins],
        })
    }

    /// A read at `offset`; only whole registers answer.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.0.select),
            WINDOW => self.register(),
            _ => 0,
        };
        data.fill(0);
        let len = data.len().min(4);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn register(&self) -> u32 {
        match self.0.select {
            ID | ARBITRATION => self.0.id,
            VERSION => {
                // At most MAX_PINS.
                let last = u32::try_from(self.0.entries.len() - 1).unwrap_or(0);
                CHIP_VERSION | last << 16
            }
            _ => self.entry().map_or(0, |(pin, shift)| {
                let [a, b, c, d, ..] = (self.0.entries[pin] >> shift).to_le_bytes();
                u32::from_le_bytes([a, b, c, d])
            }),
        }
    }

    /// The selected redirection entry, and the half of it.
    fn entry(&self) -> Option<(usize, u32)> {
        let index = self.0.select.checked_sub(TABLE)?;
        let pin = usize::from(index / 2);
        (pin < self.0.entries.len()).then_some((pin, u32::from(index % 2) * 32))
    }

    /// A write at `offset`. `true`: the messages changed.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return false;
        };
        match (offset, self.0.select) {
            (SELECT, _) => {
                self.0.select = value.to_le_bytes()[0];
                false
            }
            (WINDOW, ID) => {
                self.0.id = value & ID_BITS;
                false
            }
            (WINDOW, _) => self.set_entry(value),
            _ => false,
        }
    }

    fn set_entry(&mut self, value: u32) -> bool {
        let Some((pin, shift)) = self.entry() else {
            return false;
        };
        let before = self.message(pin);
        let entry = &mut self.0.entries[pin];
        let half = u64::from(u32::MAX) << shift;
        *entry = (*entry & !half | u64::from(value) << shift) & !READ_ONLY;
        before != self.message(pin)
    }

    fn message(&self, pin: usize) -> Option<Message> {
        let entry = self.0.entries[pin];
        if entry & MASKED != 0 {
            return None;
        }
        let [.., destination] = entry.to_le_bytes();
        let logical = if entry & LOGICAL != 0 { 1 << 2 } else { 0 };
        Some(Message {
            address: MESSAGE_BASE | u32::from(destination) << 12 | logical,
            // 11 bits.
            data: u32::try_from(entry & VECTOR_AND_MODE).unwrap_or(0),
        })
    }

    /// The message of every pin that has one.
    pub fn messages(&self) -> Vec<(u8, Message)> {
        (0u8..)
            .zip(0..self.0.entries.len())
            .filter_map(|(number, pin)| Some((number, self.message(pin)?)))
            .collect()
    }

    /// All there is to save.
    pub fn state(&self) -> &IoApicState {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(chip: &mut IoApic, register: u8, value: u32) -> bool {
        assert!(!chip.write(SELECT, &u32::from(register).to_le_bytes()));
        chip.write(WINDOW, &value.to_le_bytes())
    }

    fn read(chip: &mut IoApic, register: u8) -> u32 {
        chip.write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0xee; 4];
        chip.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_says_how_many_pins_it_has_and_keeps_its_id() {
        let mut chip = IoApic::new(6);
        assert_eq!(read(&mut chip, VERSION), 0x11 | 6 << 16);
        write(&mut chip, ID, u32::MAX);
        assert_eq!(read(&mut chip, ID), ID_BITS);
        assert_eq!(read(&mut chip, TABLE + 2 * 6), 0x1_0000);
        assert_eq!(read(&mut chip, TABLE + 2 * 7), 0, "there is no pin 7");
        assert_eq!(chip.messages(), []);
    }

    #[test]
    fn an_unmasked_pin_has_a_message() {
        let mut chip = IoApic::new(23);
        assert!(!write(&mut chip, TABLE + 11, 3 << 24), "still masked");
        assert!(write(&mut chip, TABLE + 10, 0x0031));
        assert_eq!(
            chip.messages(),
            [(
                5,
                Message {
                    address: 0xfee0_3000,
                    data: 0x31
                }
            )]
        );
        assert!(
            !write(&mut chip, TABLE + 10, 0x5031),
            "read-only bits and polarity"
        );
        assert!(
            write(&mut chip, TABLE + 10, 0x0931),
            "logical, lowest priority"
        );
        assert_eq!(
            chip.messages(),
            [(
                5,
                Message {
                    address: 0xfee0_3004,
                    data: 0x131
                }
            )]
        );
        assert!(write(&mut chip, TABLE + 10, 0x1_0931));
        assert_eq!(chip.messages(), []);
    }

    #[test]
    fn any_access_is_survived() {
        for last in [0, 1, MAX_PINS - 1, u8::MAX] {
            let mut chip = IoApic::new(last);
            for select in 0..=u8::MAX {
                write(&mut chip, select, u32::MAX);
                write(&mut chip, select, u32::from(select));
                read(&mut chip, select);
            }
            for (offset, width) in [(1, 4), (0x40, 4), (0x10, 1), (0x10, 8), (0xfff, 8)] {
                let mut data = vec![0xff; width];
                chip.read(offset, &mut data);
                assert!(!chip.write(offset, &data));
            }
        }
    }
}
