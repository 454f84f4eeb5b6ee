//! virtio over MMIO: what every device shares, and the trait that a device is.
//!
//! | file | is |
//! |---|---|
//! | `mmio.rs` | the registers that the guest's driver reads and writes (vCPU threads) |
//! | `transport.rs` | registers, interrupt line, kick and mailbox of one device put together |
//! | `page.rs` | the registers as memory that the guest reads without an exit |
//! | `line.rs` | the interrupt line |
//! | `config.rs` | the device's configuration space, shared by vCPU threads and the device's thread |
//! | `worker.rs` | the thread that runs devices: epoll, kicks, faults, interrupts |
//! | `queue.rs` | one virtqueue: take a chain, return a chain |
//! | `ring.rs` | its two rings, found in guest memory once |
//! | `chain.rs` | a descriptor chain checked against guest memory |
//! | `slice.rs` | ranges of guest memory as host pointers; copies, readv and writev (`unsafe` lives there) |
//!
//! Feature bits offered for every device: VERSION_1, RING_INDIRECT_DESC, RING_EVENT_IDX.
//! Spec: virtio 1.2, 2 (basic facilities) and 4.2 (MMIO).

pub mod chain;
pub mod config;
pub mod line;
pub mod mmio;
pub mod page;
pub mod queue;
mod ring;
pub mod slice;
pub mod transport;
pub mod worker;

use std::io;

pub use chain::Chain;
pub use config::ConfigSpace;
pub use page::Page;
pub use queue::Queue;
pub use worker::{Io, Watch};

/// Something the guest did that a driver must not do. It stops the device until the guest resets it, moves the
/// counter `<device>.faults`, and never does more than that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestFault {
    /// A ring lies outside of memory or its indexes are impossible.
    #[error("virtqueue: {0}")]
    Ring(&'static str),
    /// A descriptor names memory that is not RAM.
    #[error("descriptor of {len} bytes at {addr:#x} is not guest memory")]
    Outside {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A chain is malformed: a loop, a bad index, a nested indirect table, too long, parts in the wrong order.
    #[error("descriptor chain: {0}")]
    Chain(&'static str),
    /// The chain's readable or writable part is too short for the device's protocol.
    #[error("{need} bytes are needed, the chain has {got}")]
    Short {
        /// Bytes that the device's protocol needs.
        need: usize,
        /// Bytes the chain has from the offset on.
        got: usize,
    },
    /// The device's own protocol is violated.
    #[error("{0}")]
    Protocol(&'static str),
}

/// Why a device stopped.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest's doing: the device waits for a reset by the driver.
    #[error(transparent)]
    Guest(#[from] GuestFault),
    /// The host's doing: the VM ends with `Cause::HostError`.
    #[error("{step}")]
    Host {
        /// What the device was about to do.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// A virtio device: what the guest sees of it and what it does with a chain.
///
/// One worker thread owns the device and calls every method from `enter_thread` on; the others are called before,
/// while the machine is built. Between [`Device::activate`] and [`Device::reset`] the device has an [`Io`]: its queues
/// and the means to watch further descriptors. No method may block for long except in a device on a thread of its own.
pub trait Device: Send {
    /// Short name, unique in the VM, for counters, thread names and log lines: `vsock`, `net0`, `fs0`.
    fn name(&self) -> &str;

    /// The virtio device id (virtio 1.2, section 5).
    fn id(&self) -> u32;

    /// Device-specific feature bits (0 to 23 and 50 up). The transport adds those of `virtio`'s header.
    fn features(&self) -> u64 {
        0
    }

    /// Largest size of each queue: powers of two, at most 1024.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space. The driver's writes land in it without further notice.
    fn config(&self) -> &ConfigSpace;

    /// Called once, first, on the thread that will run the device: `unshare`, capabilities.
    ///
    /// # Errors
    /// End the VM.
    fn enter_thread(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// The driver is ready (DRIVER_OK). `io.features` is what it accepted. Add watches here, not before.
    ///
    /// # Errors
    /// As [`Device::process`].
    fn activate(&mut self, io: &mut Io) -> Result<(), DeviceError>;

    /// The driver kicked the device and queue `index` holds chains that were not popped yet. Pop chains until
    /// [`Queue::pop`] says no, or stop earlier: then no kick is promised until `pop` has said no, and the device must
    /// come back by itself (from [`Device::event`]).
    ///
    /// # Errors
    /// [`DeviceError::Guest`] stops this device until it is reset; [`DeviceError::Host`] ends the VM.
    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError>;

    /// A watched descriptor is ready. `events` are epoll's. Stale events (of a descriptor unwatched in the same turn)
    /// are possible.
    ///
    /// # Errors
    /// As [`Device::process`].
    fn event(&mut self, token: u32, events: u32, io: &mut Io) -> Result<(), DeviceError> {
        let _ = (token, events, io);
        Ok(())
    }

    /// The driver resets the device: forget everything that the guest caused, remove the watches. `io` is dropped
    /// afterwards; the configuration space keeps its contents.
    fn reset(&mut self, io: &mut Io);
}
