//! The places of network interfaces, as the owner fills and empties them while the guest runs: with a tap, or with a disk.
//!
//! Contract: a place holds one thing at a time. A disk has a thread of its own, because it waits for the host's storage; that
//! thread closes the disk's file, which may write all of it back, and tells the owner that the disk is gone. Until then its
//! place is taken. A driver that still uses what is taken away finds a device of no kind.
//! Threads: the main thread, which never waits for a disk; a disk's thread when it ends.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_vmm_spec::{Event, NETWORK_DEVICES_FROM};

use super::one_line;
use super::rack::OwnerLink;
use crate::bus::Bus;
use crate::counters::Counters;
use crate::devices::block::Block;
use crate::devices::net::{Port, VIRTIO_ID_NET};
use crate::ending::Ending;
use crate::memory::Mem;
use crate::virtio::transport::Transport;
use crate::virtio::worker::Worker;

/// A disk that is to be plugged in.
pub(super) struct NewDisk {
    pub(super) file: File,
    pub(super) read_only: bool,
    pub(super) serial: String,
}

/// Places that have a disk.
type Taken = Arc<Mutex<HashSet<u8>>>;

fn lock(taken: &Taken) -> MutexGuard<'_, HashSet<u8>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a place was emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Emptied {
    /// Nothing is there any more.
    Now,
    /// The owner is told when that is so.
    Soon,
}

/// All places.
pub(super) struct Bays {
    bus: Arc<Bus>,
    ports: Vec<Arc<Port>>,
    /// Those whose threads have not ended.
    disks: Taken,
    mem: Mem,
    link: Arc<OwnerLink>,
    ending: Arc<Ending>,
    counters: Counters,
}

const TAKEN: &str = "there is no free place for a device of that number";

impl Bays {
    pub(super) fn new(
        bus: &Arc<Bus>,
        ports: Vec<Arc<Port>>,
        mem: &Mem,
        link: &Arc<OwnerLink>,
        ending: &Arc<Ending>,
        counters: &Counters,
    ) -> Self {
        Self {
            bus: bus.clone(),
            ports,
            disks: Taken::default(),
            mem: mem.clone(),
            link: link.clone(),
            ending: ending.clone(),
            counters: counters.clone(),
        }
    }

    /// Connects a network interface; an error is one line.
    pub(super) fn plug(
        &self,
        slot: u8,
        tap: OwnedFd,
        vhost: Option<OwnedFd>,
        mac: [u8; 6],
    ) -> Result<(), String> {
        let free = self
            .place(slot)
            .filter(|_| !lock(&self.disks).contains(&slot))
            .filter(|(port, _)| port.plug(tap, vhost, mac));
        let (_, device) = free.ok_or(TAKEN)?;
        device.replace(VIRTIO_ID_NET);
        Ok(())
    }

    /// Puts a disk in; an error is one line.
    pub(super) fn plug_disk(&self, slot: u8, disk: NewDisk) -> Result<(), String> {
        let free = self
            .place(slot)
            .filter(|(port, _)| !port.is_plugged() && !lock(&self.disks).contains(&slot));
        let (_, device) = free.ok_or(TAKEN)?;
        let name = format!("blk{slot}");
        let NewDisk {
            file,
            read_only,
            serial,
        } = disk;
        let block = Block::new(&name, file, read_only, &serial, &self.mem, &self.counters);
        let block = block.map_err(|error| format!("a disk's size: {}", one_line(&error)))?;
        let failed = |error| format!("start a disk's thread: {}", one_line(&error));
        let mut worker = Worker::new(&self.mem, &self.ending, &self.counters).map_err(failed)?;
        let disk = worker.attach_at(Box::new(block), device);
        let (taken, link) = (self.disks.clone(), self.link.clone());
        let gone = move || {
            lock(&taken).remove(&slot);
            link.answer(&Event::Unplugged { slot });
        };
        worker.spawn_until(&name, gone).map_err(failed)?;
        lock(&self.disks).insert(slot);
        device.lodge(disk);
        Ok(())
    }

    /// Takes out what is there, if anything is.
    pub(super) fn empty(&self, slot: u8) -> Emptied {
        let Some((port, device)) = self.place(slot) else {
            return Emptied::Now;
        };
        // One that is on its way out already tells once for both requests.
        if device.evict() || lock(&self.disks).contains(&slot) {
            return Emptied::Soon;
        }
        // In this order: a driver that starts anew in between finds nothing.
        port.unplug();
        device.replace(0);
        Emptied::Now
    }

    /// Guest memory has grown or shrunk; an error is one line.
    pub(super) fn memory_changed(&self) -> Result<(), String> {
        let mut ports = self.ports.iter();
        ports
            .try_for_each(|port| port.memory_changed())
            .map_err(|error| one_line(&error))
    }

    fn place(&self, slot: u8) -> Option<(&Port, &Transport)> {
        let port = self.ports.get(usize::from(slot))?;
        let device = NETWORK_DEVICES_FROM as usize + usize::from(slot);
        Some((port, self.bus.devices().get(device)?))
    }
}
