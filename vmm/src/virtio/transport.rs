//! One device as the guest's bus sees it: registers, interrupt line, kick, and the way to the device's thread.
//!
//! Reads need nobody: the registers are memory (`page.rs`).
//! A device that is of no kind may leave its place to another one for a while ([`Transport::lodge`]), which has a thread of
//! its own.
//! Threads: `write` is called by vCPU threads. A register is written by one at a time (the lock on the registers), but a reset
//! waits for the device's thread without the lock: whoever else comes meanwhile finds a device that was reset, and the
//! thread gets what follows from it in that order.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::line::Line;
use super::mmio::{Effect, Registers};
use super::worker::{Command, Place};
use super::{ConfigSpace, Device, Page};

/// How the driver's kicks of a device arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doorbells {
    /// At one eventfd for all queues.
    One,
    /// At one for each of so many queues.
    OnePerQueue(usize),
}

/// What the registers and the device's thread share.
#[derive(Debug)]
pub struct Link {
    /// The device's interrupt.
    pub line: Line,
    /// Written by KVM when the driver kicks: one for any queue, or one each.
    pub kicks: Vec<EventFd>,
    /// What the driver reads.
    page: &'static Page,
}

impl Link {
    /// A link for one device, whose registers are read on `page`.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(page: &'static Page, doorbells: Doorbells) -> io::Result<Self> {
        let count = match doorbells {
            Doorbells::One => 1,
            Doorbells::OnePerQueue(queues) => queues,
        };
        let kicks = (0..count).map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK));
        Ok(Self {
            line: Line::new(page)?,
            kicks: kicks.collect::<io::Result<_>>()?,
            page,
        })
    }

    /// As if the driver had kicked every queue.
    pub fn kick(&self) {
        for kick in &self.kicks {
            // Fails only when the counter is full, and then a kick is pending already.
            let _ = kick.write(1);
        }
    }
}

/// One device's registers, and where it is served.
#[derive(Debug)]
pub struct Occupant {
    registers: Registers,
    config: ConfigSpace,
    place: Place,
}

impl Occupant {
    pub(super) fn new(device: &dyn Device, place: Place) -> Self {
        let config = device.config().clone();
        let (id, features) = (device.id(), device.features());
        Self {
            registers: Registers::new(id, features, device.queue_sizes(), config.clone()),
            config,
            place,
        }
    }

    /// Makes it a device of another kind; it has stopped when this returns.
    fn replace(&mut self, id: u32) {
        if self.registers.replace(id) {
            self.place.mailbox.reset(self.place.slot);
        }
    }
}

/// Who is on the bus.
#[derive(Debug)]
struct Front {
    own: Occupant,
    /// In its place for a while.
    lodger: Option<Occupant>,
}

impl Front {
    fn current(&mut self) -> &mut Occupant {
        self.lodger.as_mut().unwrap_or(&mut self.own)
    }
}

/// The bus's side of a device.
#[derive(Debug)]
pub struct Transport {
    front: Mutex<Front>,
    link: Arc<Link>,
}

impl Transport {
    /// The bus's side of `device`, which is served at `place`.
    pub fn new(device: &dyn Device, link: Arc<Link>, place: Place) -> Self {
        let own = Occupant::new(device, place);
        own.config.show_on(link.page);
        own.registers.show(link.page);
        let lodger = None;
        Self {
            front: Mutex::new(Front { own, lodger }),
            link,
        }
    }

    /// The link to wire to KVM: irqfd and ioeventfd.
    pub fn link(&self) -> &Link {
        &self.link
    }

    pub(super) fn shared_link(&self) -> Arc<Link> {
        self.link.clone()
    }

    /// Whether it is a device of that kind now.
    pub fn is(&self, id: u32) -> bool {
        self.front().current().registers.id() == id
    }

    /// A write by a vCPU at `offset` from the device's base.
    pub fn write(&self, offset: u32, data: &[u8]) {
        match (offset, data.try_into().map(u32::from_le_bytes)) {
            (VIRTIO_MMIO_INTERRUPT_ACK, Ok(bits)) => self.link.line.acknowledge(bits),
            // Normally KVM does this by ioeventfd; a kick of another width arrives here.
            (VIRTIO_MMIO_QUEUE_NOTIFY, _) => self.link.kick(),
            _ => self.write_register(offset, data),
        }
    }

    /// Makes it a device of another kind (0: of none). If a driver is using it, it has stopped when this returns.
    pub fn replace(&self, id: u32) {
        let mut front = self.front();
        front.own.replace(id);
        self.power_on(&mut front);
    }

    /// Puts another device, which a running worker serves, in the place of the own one, which is of no kind from here on.
    pub fn lodge(&self, lodger: Occupant) {
        let mut front = self.front();
        front.own.replace(0);
        front.own.config.hide();
        lodger.config.show_on(self.link.page);
        front.lodger = Some(lodger);
        self.power_on(&mut front);
    }

    /// The own device is back, of no kind. The other's thread, whose only device it was, stops it and ends; nobody waits
    /// for that here. `false`: there was no other.
    pub fn evict(&self) -> bool {
        let mut front = self.front();
        let Some(lodger) = front.lodger.take() else {
            return false;
        };
        lodger.config.hide();
        lodger.place.mailbox.send(Command::End);
        front.own.config.show_on(self.link.page);
        self.power_on(&mut front);
        true
    }

    fn power_on(&self, front: &mut Front) {
        let registers = &front.current().registers;
        self.link.line.reset();
        registers.show(self.link.page);
        self.link.line.show_status(registers.state().status);
    }

    fn front(&self) -> MutexGuard<'_, Front> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_register(&self, offset: u32, data: &[u8]) {
        let mut front = self.front();
        let Occupant {
            registers, place, ..
        } = front.current();
        let status_cleared = offset == VIRTIO_MMIO_STATUS && data == [0; 4];
        match registers.write(offset, data) {
            Effect::None => {}
            Effect::Activate { queues, features } => {
                place.mailbox.send(Command::Activate {
                    slot: place.slot,
                    queues,
                    features,
                });
            }
            Effect::Reset => {
                let stopping = place.mailbox.begin_reset(place.slot);
                drop(front);
                stopping.wait();
                front = self.front();
            }
        }
        let registers = &front.current().registers;
        if status_cleared && registers.state().status == 0 {
            self.link.line.reset();
        }
        registers.show(self.link.page);
        self.link.line.show_status(registers.state().status);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use virtio_bindings::virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
    };
    use virtio_bindings::virtio_mmio::{
        VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    };

    use super::super::worker::Worker;
    use super::super::{DeviceError, Io};
    use super::*;
    use crate::counters::Counters;
    use crate::devices::driver::Driver;
    use crate::ending::Ending;

    /// A device that waits for something when it is activated.
    struct Busy(ConfigSpace, Receiver<()>);

    impl Device for Busy {
        fn name(&self) -> &str {
            "busy"
        }

        fn id(&self) -> u32 {
            2
        }

        fn queue_sizes(&self) -> &[u16] {
            &[64]
        }

        fn config(&self) -> &ConfigSpace {
            &self.0
        }

        fn activate(&mut self, _: &mut Io) -> Result<(), DeviceError> {
            let _ = self.1.recv();
            Ok(())
        }

        fn process(&mut self, _: usize, _: &mut Io) -> Result<(), DeviceError> {
            Ok(())
        }

        fn reset(&mut self, _: &mut Io) {}
    }

    fn start_driver(transport: &Transport) {
        let write = |offset, value: u32| transport.write(offset, &value.to_le_bytes());
        let known = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        let agreed = known | VIRTIO_CONFIG_S_FEATURES_OK;
        write(VIRTIO_MMIO_STATUS, known);
        write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(VIRTIO_MMIO_DRIVER_FEATURES, 1 << (VIRTIO_F_VERSION_1 - 32));
        write(VIRTIO_MMIO_STATUS, agreed);
        write(VIRTIO_MMIO_STATUS, agreed | VIRTIO_CONFIG_S_DRIVER_OK);
    }

    #[test]
    fn a_busy_device_leaves_without_anybody_waiting_for_it() {
        let mem = Driver::new().mem;
        let (ending, counters) = (Arc::new(Ending::new().unwrap()), Counters::default());
        let worker = || Worker::new(&mem, &ending, &counters).unwrap();
        let link = Arc::new(Link::new(&Page::leak(1)[0], Doorbells::One).unwrap());
        let (_idle, never) = channel();
        let mut own = worker();
        let transport = own.attach(Box::new(Busy(ConfigSpace::default(), never)), link);

        let (done, hold) = channel();
        let (over, told) = channel::<()>();
        let mut guests = worker();
        let lodger = Box::new(Busy(ConfigSpace::default(), hold));
        let lodger = guests.attach_at(lodger, &transport);
        guests.spawn_until("busy", || drop(over)).unwrap();
        transport.lodge(lodger);
        start_driver(&transport);

        assert!(transport.is(2) && transport.evict());
        assert!(transport.is(0) && !transport.evict());
        assert_eq!(told.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
        drop(done);
        assert!(told.recv().is_err());
    }
}
