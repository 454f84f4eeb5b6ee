//! A device's interrupt line: raised by the device's thread, acknowledged by vCPU threads.
//!
//! Contract: `raise` sets the reason before it fires the irqfd, so a driver that sees the interrupt sees the reason.
//! An acknowledgement of nothing but returned chains never arrives here: KVM swallows it, which saves an exit for every
//! interrupt. The bit then stays set, and a driver that reads it looks at its rings once more than it must.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the driver is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Chains were returned.
    Used,
    /// The configuration space or the device's status changed.
    Config,
}

/// One interrupt line.
#[derive(Debug)]
pub struct Line {
    /// Wired to the guest's interrupt controller by the machine.
    pub irqfd: EventFd,
    pending: AtomicU32,
    needs_reset: AtomicBool,
}

impl Line {
    /// A quiet line.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            irqfd: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            pending: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        })
    }

    /// Interrupts the driver.
    pub fn raise(&self, reason: Reason) {
        let bit = match reason {
            Reason::Used => VIRTIO_MMIO_INT_VRING,
            Reason::Config => VIRTIO_MMIO_INT_CONFIG,
        };
        self.pending.fetch_or(bit, Ordering::SeqCst);
        // Fails only when the counter is full, and then an interrupt is pending already.
        let _ = self.irqfd.write(1);
    }

    /// Tells the driver that the device stopped and waits for a reset.
    pub fn raise_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(Reason::Config);
    }

    /// The interrupt status register.
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// The interrupt acknowledge register.
    pub fn acknowledge(&self, bits: u32) {
        self.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Whether the device asks for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.pending.store(0, Ordering::SeqCst);
    }
}
