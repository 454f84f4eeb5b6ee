//! One device as the guest's bus sees it: registers, interrupt line, kick, and the way to the device's thread.
//!
//! Reads need nobody: the registers are memory (`page.rs`).
//! Threads: `write` is called by vCPU threads, one at a time per device (the lock on the registers; it is held while a
//! reset waits for the device's thread, which never takes it).

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::line::Line;
use super::mmio::{Effect, Registers};
use super::worker::{Command, Mailbox};
use super::{Device, Page};

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

/// The bus's side of a device.
#[derive(Debug)]
pub struct Transport {
    registers: Mutex<Registers>,
    link: Arc<Link>,
    mailbox: Arc<Mailbox>,
    /// The device's place on its worker.
    slot: usize,
}

impl Transport {
    /// The bus's side of `device`, which is number `slot` on the worker behind `mailbox`.
    pub fn new(device: &dyn Device, link: Arc<Link>, mailbox: Arc<Mailbox>, slot: usize) -> Self {
        let config = device.config().clone();
        config.show_on(link.page);
        let registers =
            Registers::new(device.id(), device.features(), device.queue_sizes(), config);
        registers.show(link.page);
        Self {
            registers: Mutex::new(registers),
            link,
            mailbox,
            slot,
        }
    }

    /// The link to wire to KVM: irqfd and ioeventfd.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Whether it is a device of that kind now.
    pub fn is(&self, id: u32) -> bool {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .id()
            == id
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
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if registers.replace(id) {
            self.mailbox.reset(self.slot);
        }
        self.link.line.reset();
        registers.show(self.link.page);
        self.link.line.show_status(registers.state().status);
    }

    fn write_register(&self, offset: u32, data: &[u8]) {
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let status_cleared = offset == VIRTIO_MMIO_STATUS && data == [0; 4];
        match registers.write(offset, data) {
            Effect::None => {}
            Effect::Activate { queues, features } => {
                self.mailbox.send(Command::Activate {
                    slot: self.slot,
                    queues,
                    features,
                });
            }
            Effect::Reset => self.mailbox.reset(self.slot),
        }
        if status_cleared {
            self.link.line.reset();
        }
        registers.show(self.link.page);
        self.link.line.show_status(registers.state().status);
    }
}
