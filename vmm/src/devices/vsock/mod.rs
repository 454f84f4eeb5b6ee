//! virtio socket device, served in user space: every connection is a stream socket between this process and the owner.
//!
//! Contract: a guest's connection to port P of the host becomes a socket pair, one end of which goes to the owner; the
//! owner's wish for a connection to port P of the guest comes with its end of a pair. No kernel module, no context
//! identifiers to collide.
//!
//! | file | is |
//! |---|---|
//! | `wire.rs` | packet headers |
//! | `connection.rs` | one connection: credit, half-close, buffer |
//! | `muxer.rs` | all of them: found by ports, served in turn |
//! | `fuzz.rs` | all of it under a hostile guest |
//!
//! Spec: virtio 1.2, 5.10.

pub mod connection;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod muxer;
#[cfg(test)]
mod tests;
pub mod wire;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use caisson_vmm_spec::GUEST_CID;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::counters::Counters;
use crate::fds::borrow;
use crate::memory::Mem;
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, Io};
use muxer::{Muxer, Owner};

/// To the guest, from the guest, events (unused). The guest fills the first with buffers of 32 KiB (our kernel; 4 KiB
/// without its patch): its size is the guest's memory.
const QUEUES: &[u16] = &[16, 128, 8];
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
/// The token of the dials; connections have small ones.
const DIALS: u32 = u32::MAX - 1;
/// The most dials that may wait for the device.
const MAX_DIALS: usize = 128;

/// Connections that the owner asks for, on their way to the device's thread.
#[derive(Debug)]
pub struct Dials {
    waiting: Mutex<VecDeque<(u32, UnixStream)>>,
    wake: EventFd,
}

impl Dials {
    /// None yet.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self {
            waiting: Mutex::default(),
            wake,
        })
    }

    /// Connects `socket` to the guest's `port`, once the guest's driver is there. Too many at once are closed.
    pub fn push(&self, port: u32, socket: UnixStream) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MAX_DIALS {
            waiting.push_back((port, socket));
        }
        // Fails only when the counter is full, and then the device is awake already.
        let _ = self.wake.write(1);
    }

    fn pop(&self) -> Option<(u32, UnixStream)> {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    fn wake(&self) -> BorrowedFd<'_> {
        borrow(&self.wake)
    }
}

/// The socket device.
pub struct Vsock {
    config: ConfigSpace,
    to_guest: Chain,
    from_guest: Chain,
    muxer: Muxer,
    dials: Arc<Dials>,
}

impl Vsock {
    /// A device that hands the guest's connections to `owner` and takes the owner's from `dials`.
    pub fn new(mem: &Mem, owner: Box<dyn Owner>, dials: Arc<Dials>, counters: &Counters) -> Self {
        Self {
            config: ConfigSpace::read_only(GUEST_CID.to_le_bytes().to_vec()),
            to_guest: Chain::new(mem),
            from_guest: Chain::new(mem),
            muxer: Muxer::new(owner, counters),
            dials,
        }
    }

    /// Gives the guest what waits for it, as far as it has buffers.
    fn fill(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let queue = &mut io.queues[TO_GUEST];
        while self.muxer.has_work() && queue.pop(&mut self.to_guest)? {
            match self.muxer.emit(&self.to_guest)? {
                // At most the guest's buffer, whose chain is below 4 GiB.
                Some(len) => {
                    queue.push(self.to_guest.head(), u32::try_from(len).unwrap_or(u32::MAX))?;
                }
                None => queue.unpop(),
            }
        }
        Ok(())
    }

    fn dial(&mut self, io: &Io) {
        // Empty if the device was activated meanwhile.
        let _ = self.dials.wake.read();
        while let Some((port, socket)) = self.dials.pop() {
            self.muxer.dial(port, socket, &io.watch);
        }
    }
}

impl Device for Vsock {
    fn name(&self) -> &str {
        "vsock"
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let step = "watch for connections";
        io.watch
            .add(self.dials.wake(), DIALS, EventSet::IN)
            .map_err(|source| DeviceError::Host { step, source })?;
        self.dial(io);
        self.fill(io)
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        if index == FROM_GUEST {
            let Io { queues, watch, .. } = &mut *io;
            let queue = &mut queues[FROM_GUEST];
            while queue.pop(&mut self.from_guest)? {
                self.muxer.packet(&self.from_guest, watch)?;
                queue.push(self.from_guest.head(), 0)?;
            }
        }
        self.fill(io)
    }

    fn event(&mut self, token: u32, events: u32, io: &mut Io) -> Result<(), DeviceError> {
        match token {
            DIALS => self.dial(io),
            token => self.muxer.event(token, events),
        }
        self.fill(io)
    }

    fn reset(&mut self, io: &mut Io) {
        io.watch.remove(self.dials.wake());
        self.muxer.clear();
    }
}
