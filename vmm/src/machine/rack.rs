//! Puts the devices together: each gets a slot on the bus, an interrupt, a worker thread.
//!
//! Slots are given in order: the four that every VM has, then networks, spare ones included, disks and shares in the
//! spec's order. Shares get a thread each, because they wait for the host's file system; all others share one.

use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caisson_vmm_spec::{
    Cause, Event, MAX_NETWORKS, MEMORY_DEVICE, MiB, NETWORK_DEVICES_FROM, NetworkKind,
};

use super::files::DeviceFiles;
use super::{SetupError, host};
use crate::bus::device_base;
use crate::console;
use crate::control::Control;
use crate::counters::Counters;
use crate::devices::balloon::Balloon;
use crate::devices::block::Block;
use crate::devices::fs::Fs;
use crate::devices::mem::{Growth, MemoryDevice};
use crate::devices::net::{Net, Port, StreamNet};
use crate::devices::rng::Rng;
use crate::devices::vsock::muxer::Owner;
use crate::devices::vsock::{Dials, Vsock};
use crate::ending::Ending;
use crate::kvm::Vm;
use crate::memory::Mem;
use crate::milestones::Milestones;
use crate::virtio::transport::{Doorbells, Link, Transport};
use crate::virtio::worker::Worker;
use crate::virtio::{Device, Page};

/// The devices of every VM.
const COMMON_DEVICES: usize = 4;
/// The most devices of a VM.
const MAX_DEVICES: usize = 64;

/// The interrupts of the first `count` slots: 1 and up, without the console's. The fewer pins the IOAPIC needs, the
/// fewer exits the guest's boot has: the memory device, which has little to say, shares the interrupt of the one before it.
pub(super) fn interrupts(count: usize) -> Vec<u8> {
    let mut own = (1..=u8::MAX).filter(|irq| *irq != console::IRQ);
    let mut all: Vec<u8> = Vec::with_capacity(count.min(MAX_DEVICES));
    for slot in 0..count.min(MAX_DEVICES) {
        let shared = all.last().filter(|_| slot == MEMORY_DEVICE as usize);
        all.extend(shared.copied().or_else(|| own.next()));
    }
    all
}

/// The way to the sandbox's owner, for the socket device.
#[derive(Debug)]
pub(super) struct OwnerLink {
    control: Arc<Control>,
    ending: Arc<Ending>,
    booted: AtomicBool,
    /// Of this boot.
    pub(super) milestones: Milestones,
}

impl OwnerLink {
    /// Over this socket, for the boot with these milestones.
    pub(super) fn new(control: Arc<Control>, ending: Arc<Ending>, milestones: Milestones) -> Self {
        Self {
            control,
            ending,
            booted: AtomicBool::new(false),
            milestones,
        }
    }

    /// Whether the guest has connected to anything yet.
    pub(super) fn has_booted(&self) -> bool {
        self.booted.load(Ordering::Acquire)
    }

    /// Answers a request. An owner that takes no answers has lost track of the VM, which ends.
    pub(super) fn answer(&self, event: &Event) {
        match self.control.answer(event) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self
                .ending
                .report(Cause::HostError, "its owner does not take an answer"),
            // Gone, which the main thread hears.
            Err(_) | Ok(()) => {}
        }
    }

    /// The guest has followed a request for memory.
    fn has_memory(&self, bytes: u64) {
        // The owner asked for it in MiB: fits.
        let extra = MiB(u32::try_from(bytes >> 20).unwrap_or(u32::MAX));
        self.answer(&Event::Memory { extra });
    }
}

impl Owner for Arc<OwnerLink> {
    fn accepted(&self, port: u32, socket: UnixStream) -> io::Result<()> {
        let is_first = !self.booted.swap(true, Ordering::AcqRel);
        let boot = is_first.then(|| self.milestones.times());
        self.control.send(
            &Event::Accepted { port, boot },
            Some(std::os::fd::AsFd::as_fd(&socket)),
        )
    }
}

/// Devices on their way onto the bus.
pub(super) struct Rack<'a> {
    vm: &'a Arc<Vm>,
    mem: &'a Mem,
    ending: &'a Arc<Ending>,
    counters: &'a Counters,
    io: Worker,
    shares: Vec<Worker>,
    transports: Vec<Transport>,
    /// The registers, by slot.
    pages: &'static [Page],
}

impl<'a> Rack<'a> {
    /// An empty rack with room for `configured` devices beside those that every VM has.
    pub(super) fn new(
        vm: &'a Arc<Vm>,
        mem: &'a Mem,
        ending: &'a Arc<Ending>,
        counters: &'a Counters,
        configured: usize,
    ) -> Result<Self, SetupError> {
        let count = COMMON_DEVICES + configured;
        if count > MAX_DEVICES {
            return Err(SetupError::Value("more than 64 devices"));
        }
        let pages = Page::leak(count);
        vm.show(pages, device_base(0))?;
        let io = Worker::new(mem, ending, counters).map_err(host("make the io worker"))?;
        Ok(Self {
            vm,
            mem,
            ending,
            counters,
            io,
            shares: Vec::new(),
            transports: Vec::new(),
            pages,
        })
    }

    /// The devices of every VM. Returns the way to dial into the guest, and the guest's growth.
    pub(super) fn add_common(
        &mut self,
        link: &Arc<OwnerLink>,
    ) -> Result<(Arc<Dials>, Growth), SetupError> {
        let dials = Arc::new(Dials::new().map_err(host("make an eventfd"))?);
        let owner = Box::new(link.clone());
        self.add(Box::new(Vsock::new(
            self.mem,
            owner,
            dials.clone(),
            self.counters,
        )))?;
        self.add(Box::new(Rng::new(self.mem)))?;
        self.add(Box::new(Balloon::new(self.mem, self.counters)))?;
        let owner = link.clone();
        let tell = Box::new(move |bytes| owner.has_memory(bytes));
        let growth = Growth::new(self.mem, self.vm.clone(), tell);
        debug_assert_eq!(self.transports.len(), MEMORY_DEVICE as usize);
        self.add(Box::new(MemoryDevice::new(growth.clone(), self.counters)))?;
        Ok((dials, growth))
    }

    /// The devices that the spec asks for.
    /// Returns what the network interfaces are plugged into.
    pub(super) fn add_configured(
        &mut self,
        files: DeviceFiles,
        milestones: &Milestones,
    ) -> Result<Vec<Arc<Port>>, SetupError> {
        let ports = networks(files.networks.len(), usize::from(files.spare_networks))?;
        let mut streams = vec![false; ports.len()];
        for ((port, network), stream) in ports.iter().zip(files.networks).zip(&mut streams) {
            port.plug(network.file, network.vhost, network.mac);
            *stream = network.kind == NetworkKind::Stream;
        }
        debug_assert_eq!(self.transports.len(), NETWORK_DEVICES_FROM as usize);
        for (index, (port, stream)) in ports.iter().zip(streams).enumerate() {
            let name = format!("net{index}");
            if stream {
                let net = StreamNet::new(&name, port, self.mem, self.counters);
                self.add(Box::new(net))?;
                continue;
            }
            let net = Net::new(&name, port, self.mem, self.counters);
            let doorbells = if files.vhost_net {
                Doorbells::OnePerQueue(net.queue_sizes().len())
            } else {
                Doorbells::One
            };
            self.add_with(Box::new(net), doorbells)?;
        }
        for (index, (spec, file)) in files.disks.into_iter().enumerate() {
            let name = format!("blk{index}");
            let (read_only, serial) = (spec.read_only, &spec.serial);
            let block = Block::new(&name, file, read_only, serial, self.mem, self.counters);
            self.add(Box::new(block.map_err(device(&name))?))?;
        }
        for (index, (spec, root)) in files.shares.into_iter().enumerate() {
            let name = format!("fs{index}");
            let fs = Fs::new(&name, &spec, root, self.mem, self.counters);
            let fs = fs.map_err(device(&name))?.noting(milestones);
            let fs = Box::new(fs);
            let mut worker = Worker::new(self.mem, self.ending, self.counters)
                .map_err(host("make a share's worker"))?;
            let link = link(self.vm, self.transports.len(), self.pages, Doorbells::One)?;
            self.transports.push(worker.attach(fs, link));
            self.shares.push(worker);
        }
        Ok(ports)
    }

    fn add(&mut self, device: Box<dyn Device>) -> Result<(), SetupError> {
        self.add_with(device, Doorbells::One)
    }

    fn add_with(
        &mut self,
        device: Box<dyn Device>,
        doorbells: Doorbells,
    ) -> Result<(), SetupError> {
        let slot = self.transports.len();
        let link = link(self.vm, slot, self.pages, doorbells)?;
        self.transports.push(self.io.attach(device, link));
        Ok(())
    }

    /// Starts the threads; the devices as the bus sees them.
    pub(super) fn start(self) -> Result<Vec<Transport>, SetupError> {
        self.io.spawn("io").map_err(host("start the io thread"))?;
        for (index, worker) in self.shares.into_iter().enumerate() {
            worker
                .spawn(&format!("fs{index}"))
                .map_err(host("start a share's thread"))?;
        }
        Ok(self.transports)
    }
}

fn networks(plugged: usize, spare: usize) -> Result<Vec<Arc<Port>>, SetupError> {
    if plugged + spare > MAX_NETWORKS {
        return Err(SetupError::Value("more than 16 network interfaces"));
    }
    Ok((0..plugged + spare).map(|_| Arc::default()).collect())
}

/// The wires of the device in `slot`.
fn link(
    vm: &Vm,
    slot: usize,
    pages: &'static [Page],
    doorbells: Doorbells,
) -> Result<Arc<Link>, SetupError> {
    let (Some(page), Some(interrupt)) = (pages.get(slot), interrupts(slot + 1).pop()) else {
        return Err(SetupError::Value("more devices than slots"));
    };
    let link = Arc::new(Link::new(page, doorbells).map_err(host("make an eventfd"))?);
    vm.wire(&link, device_base(slot), u32::from(interrupt))?;
    Ok(link)
}

fn device<E: Error + Send + Sync + 'static>(what: &str) -> impl FnOnce(E) -> SetupError {
    let what = what.to_owned();
    move |source| SetupError::Device {
        what,
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_dense_and_leave_the_consoles_alone() {
        assert_eq!(interrupts(7), [1, 2, 3, 3, 5, 6, 7]);
        assert_eq!(interrupts(MAX_DEVICES + 9).len(), MAX_DEVICES);
    }
}
