//! Where a vCPU's port and memory accesses go: the console, the power register, the keyboard controller's reset line,
//! and the virtio devices.
//!
//! Contract: every access is answered; what nobody owns reads as all ones and ignores writes. Two exceptions are there
//! because the kernel waits for them: the CMOS clock never has an update in progress, and the keyboard controller is
//! always ready (else 12 s and 2 s of a boot are lost).
//! There is no PIC: its ports read as all ones, by which the kernel knows.
//! Threads: any vCPU thread; one lock for the console, one for the IOAPIC, one per device.

use std::sync::{Mutex, PoisonError};

use crate::console::{self, Console};
use crate::kvm::ioapic::{self, IoApic, Message};
use crate::memory::MMIO_START;
use crate::virtio::transport::Transport;

/// The power register: a byte-wide output port. The same constant as `POWER_PORT` of the agent's contract; the VMM
/// does not depend on that package.
pub const POWER_PORT: u16 = 0x600;
/// Written to [`POWER_PORT`]: the guest is done.
pub const POWER_OFF: u8 = 1;
/// Bytes of address space for each device.
pub const DEVICE_BYTES: u64 = 0x1000;

const KEYBOARD_STATUS: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
const CMOS_DATA: u16 = 0x71;
const SPEAKER: u16 = 0x61;
const CONSOLE_END: u16 = console::PORT + 7;

/// What the guest asked of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// It powered itself off.
    PowerOff,
    /// It wants to be reset.
    Reset,
}

/// Guest physical address of device `slot`.
pub fn device_base(slot: usize) -> u64 {
    // Slots are few (`machine::devices`): no overflow.
    MMIO_START + slot as u64 * DEVICE_BYTES
}

/// Who is told what interrupts mean: KVM, and the test double.
pub trait Router: Send + Sync {
    /// Every interrupt that means something, and what.
    fn route(&self, messages: &[(u8, Message)]);
}

/// All that vCPUs can reach.
pub struct Bus {
    console: Mutex<Console>,
    devices: Vec<Transport>,
    ioapic: Mutex<IoApic>,
    router: Box<dyn Router>,
}

impl Bus {
    /// A bus with these devices, in slots of their order.
    pub fn new(
        console: Console,
        devices: Vec<Transport>,
        ioapic: IoApic,
        router: Box<dyn Router>,
    ) -> Self {
        Self {
            console: Mutex::new(console),
            devices,
            ioapic: Mutex::new(ioapic),
            router,
        }
    }

    /// The devices, by slot.
    pub fn devices(&self) -> &[Transport] {
        &self.devices
    }

    /// A vCPU reads a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(match port {
            console::PORT..=CONSOLE_END => self.console().read(console_register(port)),
            SPEAKER => 0x20, // its timer has run out
            KEYBOARD_STATUS | CMOS_DATA => 0,
            _ => 0xff,
        });
    }

    /// A vCPU writes a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Demand> {
        match port {
            console::PORT..=CONSOLE_END => {
                let mut console = self.console();
                data.iter()
                    .for_each(|byte| console.write(console_register(port), *byte));
                None
            }
            POWER_PORT if data.contains(&POWER_OFF) => Some(Demand::PowerOff),
            KEYBOARD_STATUS if data.contains(&KEYBOARD_RESET) => Some(Demand::Reset),
            _ => None,
        }
    }

    fn console(&self) -> std::sync::MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU reads memory that is not RAM.
    pub fn memory_read(&self, addr: u64, data: &mut [u8]) {
        if let Some(offset) = ioapic_offset(addr) {
            self.ioapic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data);
            return;
        }
        // The devices' registers are memory to KVM: a read of them never gets here.
        data.fill(0xff);
    }

    /// A vCPU writes memory that is not RAM.
    pub fn memory_write(&self, addr: u64, data: &[u8]) {
        if let Some(offset) = ioapic_offset(addr) {
            // Held until the routes are in force, so that two vCPUs cannot swap theirs.
            let mut ioapic = self.ioapic.lock().unwrap_or_else(PoisonError::into_inner);
            if ioapic.write(offset, data) {
                self.router.route(&ioapic.messages());
            }
            return;
        }
        if let Some((device, offset)) = self.device(addr) {
            device.write(offset, data);
        }
    }

    fn device(&self, addr: u64) -> Option<(&Transport, u32)> {
        let offset = addr.checked_sub(MMIO_START)?;
        let slot = usize::try_from(offset / DEVICE_BYTES).ok()?;
        let offset = u32::try_from(offset % DEVICE_BYTES).ok()?;
        self.devices.get(slot).map(|device| (device, offset))
    }
}

fn ioapic_offset(addr: u64) -> Option<u64> {
    addr.checked_sub(ioapic::ADDR)
        .filter(|offset| *offset < ioapic::BYTES)
}

fn console_register(port: u16) -> u8 {
    // 0 to 7 by the match above.
    u8::try_from(port - console::PORT).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::console::SharedTail;

    #[derive(Clone, Default)]
    struct Routes(Arc<Mutex<Vec<(u8, Message)>>>);

    impl Router for Routes {
        fn route(&self, messages: &[(u8, Message)]) {
            *self.0.lock().unwrap() = messages.to_vec();
        }
    }

    fn bus_with(routes: &Routes) -> Bus {
        let console = Console::transmitter(SharedTail::default());
        Bus::new(
            console,
            Vec::new(),
            IoApic::new(7),
            Box::new(routes.clone()),
        )
    }

    fn bus() -> Bus {
        bus_with(&Routes::default())
    }

    #[test]
    fn the_guests_wiring_of_interrupts_becomes_routes() {
        let routes = Routes::default();
        let bus = bus_with(&routes);
        let write = |register: u32, value: u32| {
            bus.memory_write(ioapic::ADDR, &register.to_le_bytes());
            bus.memory_write(ioapic::ADDR + 0x10, &value.to_le_bytes());
        };
        write(0x10 + 2 * 5, 0x41);
        assert_eq!(
            *routes.0.lock().unwrap(),
            [(
                5,
                Message {
                    address: 0xfee0_0000,
                    data: 0x41
                }
            )]
        );
        write(0x10 + 2 * 5, 0x1_0041);
        assert_eq!(*routes.0.lock().unwrap(), []);
    }

    #[test]
    fn power_off_and_reset_are_the_only_demands() {
        let bus = bus();
        for port in 0..=u16::MAX {
            for value in [0, POWER_OFF, KEYBOARD_RESET, 0xff] {
                let expected = match (port, value) {
                    (POWER_PORT, POWER_OFF) => Some(Demand::PowerOff),
                    (KEYBOARD_STATUS, KEYBOARD_RESET) => Some(Demand::Reset),
                    _ => None,
                };
                assert_eq!(
                    bus.port_write(port, &[value]),
                    expected,
                    "{port:#x} {value:#x}"
                );
            }
        }
    }

    #[test]
    fn the_clock_and_the_keyboard_controller_are_always_ready() {
        let bus = bus();
        for (port, expected) in [
            (0x64, 0),
            (0x71, 0),
            (0x70, 0xff),
            (0x3fd, 0x60),
            (0x60, 0xff),
        ] {
            let mut data = [0xaa];
            bus.port_read(port, &mut data);
            assert_eq!(data[0], expected, "{port:#x}");
        }
    }

    #[test]
    fn memory_of_nobody_reads_as_ones() {
        let mut data = [0; 8];
        for addr in [0, MMIO_START - 1, MMIO_START, u64::MAX] {
            bus().memory_read(addr, &mut data);
            assert_eq!(data, [0xff; 8]);
            bus().memory_write(addr, &data);
        }
    }
}
