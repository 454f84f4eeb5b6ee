//! A device's interrupt line: raised by the device's thread, acknowledged by vCPU threads.
//!
//! Contract: `raise` sets the reason before it fires the irqfd, so a driver that sees the interrupt sees the reason.
//! An acknowledgement of nothing but returned chains never arrives here: KVM swallows it, which saves an exit for every
//! interrupt. The bit then stays set, and a driver that reads it looks at its rings once more than it must. That is also
//! how others can interrupt the driver (vhost-net): the bit is set for good, and they fire the irqfd themselves.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Page;

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
    /// Where the driver reads the reasons and the status.
    page: &'static Page,
    needs_reset: AtomicBool,
    /// Others return chains, so [`Reason::Used`] is true whenever the driver looks.
    others_use: AtomicBool,
}

impl Line {
    /// A quiet line, whose reasons are read on `page`.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(page: &'static Page) -> io::Result<Self> {
        Ok(Self {
            irqfd: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            page,
            needs_reset: AtomicBool::new(false),
            others_use: AtomicBool::new(false),
        })
    }

    /// Interrupts the driver.
    pub fn raise(&self, reason: Reason) {
        let bit = match reason {
            Reason::Used => VIRTIO_MMIO_INT_VRING,
            Reason::Config => VIRTIO_MMIO_INT_CONFIG,
        };
        self.pending().fetch_or(bit, Ordering::SeqCst);
        // Fails only when the counter is full, and then an interrupt is pending already.
        let _ = self.irqfd.write(1);
    }

    /// Tells the driver that the device stopped and waits for a reset.
    pub fn raise_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.mark_status();
        self.raise(Reason::Config);
    }

    fn mark_status(&self) {
        self.status()
            .fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::SeqCst);
    }

    fn pending(&self) -> &AtomicU32 {
        self.page.word(VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    fn status(&self) -> &AtomicU32 {
        self.page.word(VIRTIO_MMIO_STATUS)
    }

    /// From here to the next reset somebody else returns chains and fires the irqfd.
    pub fn share(&self) {
        self.others_use.store(true, Ordering::SeqCst);
        self.pending()
            .fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::SeqCst);
    }

    /// The driver acknowledges these reasons.
    pub fn acknowledge(&self, bits: u32) {
        let kept = if self.others_use.load(Ordering::SeqCst) {
            VIRTIO_MMIO_INT_VRING
        } else {
            0
        };
        self.pending().fetch_and(!bits | kept, Ordering::SeqCst);
    }

    /// Shows the device's status, with the wish for a reset if there is one.
    pub fn show_status(&self, status: u32) {
        self.status().store(status, Ordering::SeqCst);
        // Looked at after the store: whichever thread comes second sees what the other did.
        if self.needs_reset.load(Ordering::SeqCst) {
            self.mark_status();
        }
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.others_use.store(false, Ordering::SeqCst);
        self.pending().store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_stay_until_they_are_acknowledged() {
        let page = &Page::leak(1)[0];
        let line = Line::new(page).unwrap();
        let status = || {
            page.word(VIRTIO_MMIO_INTERRUPT_STATUS)
                .load(Ordering::SeqCst)
        };
        line.raise(Reason::Used);
        line.raise(Reason::Config);
        assert_eq!((status(), line.irqfd.read().unwrap()), (3, 2));
        line.acknowledge(VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(status(), VIRTIO_MMIO_INT_VRING);
        line.reset();
        assert_eq!(status(), 0);
    }

    #[test]
    fn whoever_shares_a_line_is_always_a_reason() {
        let page = &Page::leak(1)[0];
        let line = Line::new(page).unwrap();
        let status = || {
            page.word(VIRTIO_MMIO_INTERRUPT_STATUS)
                .load(Ordering::SeqCst)
        };
        line.share();
        line.raise(Reason::Config);
        line.acknowledge(VIRTIO_MMIO_INT_CONFIG | VIRTIO_MMIO_INT_VRING);
        assert_eq!(status(), VIRTIO_MMIO_INT_VRING);
        line.reset();
        assert_eq!(status(), 0);
        line.raise(Reason::Used);
        line.acknowledge(VIRTIO_MMIO_INT_VRING);
        assert_eq!(status(), 0);
    }

    #[test]
    fn the_wish_for_a_reset_survives_the_drivers_own_status() {
        let page = &Page::leak(1)[0];
        let line = Line::new(page).unwrap();
        let status = || page.word(VIRTIO_MMIO_STATUS).load(Ordering::SeqCst);
        line.show_status(15);
        line.raise_needs_reset();
        assert_eq!(status(), 15 | VIRTIO_CONFIG_S_NEEDS_RESET);
        line.show_status(15);
        assert_eq!(status(), 15 | VIRTIO_CONFIG_S_NEEDS_RESET);
        line.reset();
        line.show_status(0);
        assert_eq!(status(), 0);
    }
}
