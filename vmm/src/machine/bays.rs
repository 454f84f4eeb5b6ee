//! The places of network interfaces, as the owner fills and empties them while the guest runs: with a tap, or with a disk.
//!
//! Contract: a place holds one thing at a time. A disk has a thread of its own, because it waits for the host's storage; that
//! thread has ended, and the disk's file is closed, when [`Bays::empty`] returns. A driver that still uses what is taken
//! away finds a device of no kind.
//! Threads: the main thread alone.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use caisson_vmm_spec::NETWORK_DEVICES_FROM;

use super::one_line;
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

/// All places.
pub(super) struct Bays {
    bus: Arc<Bus>,
    ports: Vec<Arc<Port>>,
    /// The threads of disks.
    disks: HashMap<u8, JoinHandle<()>>,
    mem: Mem,
    ending: Arc<Ending>,
    counters: Counters,
}

const TAKEN: &str = "there is no free place for a device of that number";

impl Bays {
    pub(super) fn new(
        bus: &Arc<Bus>,
        ports: Vec<Arc<Port>>,
        mem: &Mem,
        ending: &Arc<Ending>,
        counters: &Counters,
    ) -> Self {
        Self {
            bus: bus.clone(),
            ports,
            disks: HashMap::new(),
            mem: mem.clone(),
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
            .filter(|_| !self.disks.contains_key(&slot))
            .filter(|(port, _)| port.plug(tap, vhost, mac));
        let (_, device) = free.ok_or(TAKEN)?;
        device.replace(VIRTIO_ID_NET);
        Ok(())
    }

    /// Puts a disk in; an error is one line.
    pub(super) fn plug_disk(&mut self, slot: u8, disk: NewDisk) -> Result<(), String> {
        let free = self
            .place(slot)
            .filter(|(port, _)| !port.is_plugged() && !self.disks.contains_key(&slot));
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
        let thread = worker.spawn(&name).map_err(failed)?;
        device.lodge(disk);
        self.disks.insert(slot, thread);
        Ok(())
    }

    /// Takes out what is there, if anything is.
    pub(super) fn empty(&mut self, slot: u8) {
        let disk = self.disks.remove(&slot);
        let Some((port, device)) = self.place(slot) else {
            return;
        };
        match disk {
            Some(thread) => {
                device.evict();
                // What went wrong in it has ended the machine already.
                let _ = thread.join();
            }
            None => {
                // In this order: a driver that starts anew in between finds nothing.
                port.unplug();
                device.replace(0);
            }
        }
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
