//! The thread that runs devices: one epoll instance, the devices' kicks and watches, a mailbox from the registers.
//!
//! Contract: each device is called by one thread only. A guest fault stops its device (DEVICE_NEEDS_RESET), moves
//! `<device>.faults`, and is logged within what the guest may have logged (`log.rs`); a host failure ends the VM.
//! A turn per ready descriptor, at most `queue::TURN` chains per queue and turn, so no device starves another.
//! Not here: what the events mean (each device), the registers (`mmio.rs`).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use caisson_vmm_spec::Cause;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::line::Reason;
use super::queue::{Queue, QueueState};
use super::transport::{Link, Occupant, Transport};
use super::{Device, DeviceError};
use crate::counters::{Counter, Counters};
use crate::ending::Ending;
use crate::log;
use crate::memory::Mem;

const EVENTS_PER_WAIT: usize = 32;
/// The token that stands for a device's kick; devices use smaller ones.
const KICK: u32 = u32::MAX;
/// The slot that stands for the worker's own mailbox.
const MAILBOX: u32 = u32::MAX;

/// What the registers tell the worker.
#[derive(Debug)]
pub enum Command {
    /// The driver is ready.
    Activate {
        /// Which device.
        slot: usize,
        /// Its queues.
        queues: Vec<QueueState>,
        /// The features that the driver accepted.
        features: u64,
    },
    /// Stop the device; the sender is dropped when that is done.
    Reset {
        /// Which device.
        slot: usize,
        /// Dropped when the device has stopped.
        done: SyncSender<()>,
    },
    /// Stop the devices and end the thread. The last command that is obeyed.
    End,
}

/// A device that is being stopped.
pub struct Stopping(Receiver<()>);

impl Stopping {
    /// Returns when it has stopped.
    pub fn wait(self) {
        // Nothing is ever sent: the error is the sender's end.
        let _ = self.0.recv();
    }
}

/// Commands on their way to a worker. At most two per device and vCPU: the registers alternate activation and reset, and
/// who resets waits for it.
#[derive(Debug)]
pub struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    wake: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            commands: Mutex::default(),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Leaves a command.
    pub fn send(&self, command: Command) {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(command);
        // Fails only when the counter is full, and then the worker is awake already.
        let _ = self.wake.write(1);
    }

    /// Stops the device in `slot` and returns when it has stopped.
    pub fn reset(&self, slot: usize) {
        self.begin_reset(slot).wait();
    }

    /// Has the device in `slot` stop.
    pub fn begin_reset(&self, slot: usize) -> Stopping {
        let (done, stopped) = sync_channel(0);
        self.send(Command::Reset { slot, done });
        Stopping(stopped)
    }

    fn take(&self) -> Option<Command> {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}

/// The means of a device to be told of further descriptors (level-triggered unless `events` says otherwise).
#[derive(Debug, Clone)]
pub struct Watch {
    epoll: Arc<Epoll>,
    slot: u32,
}

impl Watch {
    /// A watch for the device in `slot`.
    pub(crate) fn new(epoll: Arc<Epoll>, slot: u32) -> Self {
        Self { epoll, slot }
    }

    /// Calls `Device::event` with `token` (below 2^32 - 1) when one of `events` is there.
    ///
    /// # Errors
    /// epoll's: the descriptor is watched already, or is a regular file.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), token, events)
    }

    /// Changes the events or the token of a watched descriptor.
    ///
    /// # Errors
    /// epoll's: the descriptor is not watched.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), token, events)
    }

    /// Stops watching. Closing the last copy of a descriptor does the same.
    pub fn remove(&self, fd: BorrowedFd<'_>) {
        // The descriptor may be unwatched already: the same end.
        let _ = self.control(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            0,
            EventSet::empty(),
        );
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        token: u32,
        events: EventSet,
    ) -> io::Result<()> {
        let data = u64::from(self.slot) << 32 | u64::from(token);
        self.epoll.ctl(operation, fd, EpollEvent::new(events, data))
    }
}

/// What an active device works with.
#[derive(Debug)]
pub struct Io {
    /// The queues, by index. Those that the driver did not set up are not ready and yield nothing.
    pub queues: Vec<Queue>,
    /// The features that the driver accepted.
    pub features: u64,
    /// Guest memory, for `Chain::new`.
    pub mem: Mem,
    /// To be told of further descriptors.
    pub watch: Watch,
    link: Arc<Link>,
}

impl Io {
    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&self) {
        self.link.line.raise(Reason::Config);
    }

    /// Leaves the queues to somebody who waits for kicks and interrupts the driver by himself, until the device is reset:
    /// the doorbells of all queues, in their order, and the interrupt. `None`: the queues have no doorbells of their own.
    ///
    /// # Errors
    /// epoll's.
    pub fn hand_over(&self) -> io::Result<Option<(&[EventFd], &EventFd)>> {
        if self.link.kicks.len() != self.queues.len() {
            return Ok(None);
        }
        for kick in &self.link.kicks {
            let gone = ControlOperation::Delete;
            self.watch
                .control(gone, kick.as_raw_fd(), 0, EventSet::empty())?;
        }
        self.link.line.share();
        Ok(Some((&self.link.kicks, &self.link.line.irqfd)))
    }
}

struct Slot {
    device: Box<dyn Device>,
    link: Arc<Link>,
    io: Option<Io>,
    faults: Counter,
}

/// Devices that share a thread. Filled by [`Worker::attach`], then started by [`Worker::spawn`].
pub struct Worker {
    epoll: Arc<Epoll>,
    mailbox: Arc<Mailbox>,
    slots: Vec<Slot>,
    mem: Mem,
    ending: Arc<Ending>,
    counters: Counters,
    over: bool,
}

/// Where a device is served: its worker's mailbox, and its number there.
#[derive(Debug, Clone)]
pub struct Place {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) slot: usize,
}

impl Worker {
    /// A worker without devices.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(mem: &Mem, ending: &Arc<Ending>, counters: &Counters) -> io::Result<Self> {
        Ok(Self {
            epoll: Arc::new(Epoll::new()?),
            mailbox: Arc::new(Mailbox::new()?),
            slots: Vec::new(),
            mem: mem.clone(),
            ending: ending.clone(),
            counters: counters.clone(),
            over: false,
        })
    }

    /// Takes over a device; returns its side of the bus.
    pub fn attach(&mut self, device: Box<dyn Device>, link: Arc<Link>) -> Transport {
        let place = self.next_place();
        let transport = Transport::new(device.as_ref(), link.clone(), place);
        self.take_over(device, link);
        transport
    }

    /// Takes over a device for [`Transport::lodge`], once this worker runs.
    pub fn attach_at(&mut self, device: Box<dyn Device>, transport: &Transport) -> Occupant {
        let occupant = Occupant::new(device.as_ref(), self.next_place());
        self.take_over(device, transport.shared_link());
        occupant
    }

    fn next_place(&self) -> Place {
        Place {
            mailbox: self.mailbox.clone(),
            slot: self.slots.len(),
        }
    }

    fn take_over(&mut self, device: Box<dyn Device>, link: Arc<Link>) {
        let faults = self.counters.register(format!("{}.faults", device.name()));
        self.slots.push(Slot {
            device,
            link,
            io: None,
            faults,
        });
    }

    /// Starts the thread, which never ends: the VM ends by leaving the process.
    ///
    /// # Errors
    /// No thread or no descriptors left.
    pub fn spawn(self, name: &str) -> io::Result<()> {
        self.spawn_until(name, || {})
    }

    /// The same for a thread that is to get [`Command::End`]. It calls `over` last, when its devices are dropped.
    ///
    /// # Errors
    /// As above.
    pub fn spawn_until(
        mut self,
        name: &str,
        over: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let data = u64::from(MAILBOX) << 32;
        let event = EpollEvent::new(EventSet::IN, data);
        self.epoll
            .ctl(ControlOperation::Add, self.mailbox.wake.as_raw_fd(), event)?;
        let thread = Builder::new().name(name.into());
        thread.spawn(move || match self.run() {
            Ok(()) => {
                drop(self);
                over();
            }
            Err(error) => self
                .ending
                .report(Cause::HostError, format!("device thread: {error}")),
        })?;
        Ok(())
    }

    fn run(&mut self) -> io::Result<()> {
        for slot in &mut self.slots {
            slot.device.enter_thread()?;
        }
        let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
        while !self.over {
            let ready = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                ready => ready?,
            };
            for event in &events[..ready] {
                self.dispatch(event.data(), event.events());
            }
        }
        Ok(())
    }

    fn dispatch(&mut self, data: u64, events: u32) {
        // Both halves of the token fit by construction (`Watch::control`).
        let [a, b, c, d, e, f, g, h] = data.to_le_bytes();
        let (token, slot) = (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        );
        if slot == MAILBOX {
            let _ = self.mailbox.wake.read();
            while let Some(command) = self.mailbox.take() {
                self.obey(command);
            }
            return;
        }
        self.turn(slot as usize, |device, io| match token {
            KICK => kicked(device, io),
            token => device.event(token, events, io),
        });
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Activate {
                slot,
                queues,
                features,
            } => self.activate(slot, &queues, features),
            Command::Reset { slot, done } => {
                self.deactivate(slot);
                drop(done);
            }
            Command::End => {
                for index in 0..self.slots.len() {
                    self.deactivate(index);
                }
                self.over = true;
            }
        }
    }

    fn activate(&mut self, index: usize, states: &[QueueState], features: u64) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues: Result<_, _> = states
            .iter()
            .map(|state| Queue::restore(state, event_idx, &self.mem))
            .collect();
        let queues = match queues {
            Ok(queues) => queues,
            Err(fault) => return self.failed(index, DeviceError::Guest(fault)),
        };
        // Slots are counted by the machine and are few.
        let number = u32::try_from(index).unwrap_or(MAILBOX - 1);
        let watch = Watch::new(self.epoll.clone(), number);
        let link = slot.link.clone();
        let mut watched = link.kicks.iter().map(|kick| {
            watch.control(
                ControlOperation::Add,
                kick.as_raw_fd(),
                KICK,
                // The edge is all that matters: the counter is never read, which saves a system call a kick.
                EventSet::IN | EventSet::EDGE_TRIGGERED,
            )
        });
        if let Err(source) = watched.try_for_each(|watched| watched) {
            return self.failed(
                index,
                DeviceError::Host {
                    step: "watch a queue",
                    source,
                },
            );
        }
        slot.io = Some(Io {
            queues,
            features,
            mem: self.mem.clone(),
            watch,
            link,
        });
        self.turn(index, |device, io| {
            device.activate(io)?;
            kicked(device, io)
        });
    }

    /// One call into a device, and what follows from it: interrupts, or its end.
    fn turn(
        &mut self,
        index: usize,
        call: impl FnOnce(&mut dyn Device, &mut Io) -> Result<(), DeviceError>,
    ) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let Some(io) = slot.io.as_mut() else { return };
        let result = call(slot.device.as_mut(), io).and_then(|()| finish_turn(&slot.link, io));
        if let Err(error) = result {
            self.failed(index, error);
        }
    }

    fn failed(&mut self, index: usize, error: DeviceError) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let name = slot.device.name().to_owned();
        match error {
            DeviceError::Host { step, source } => {
                self.ending
                    .report(Cause::HostError, format!("{name}: {step}: {source}"));
            }
            DeviceError::Guest(fault) => {
                slot.faults.add(1);
                log::guest_caused(format_args!("{name}: guest fault: {fault}"));
                slot.link.line.raise_needs_reset();
            }
        }
        self.deactivate(index);
    }

    fn deactivate(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if let Some(mut io) = slot.io.take() {
            slot.device.reset(&mut io);
            for kick in &slot.link.kicks {
                let (gone, kick) = (ControlOperation::Delete, kick.as_raw_fd());
                let _ = io.watch.control(gone, kick, 0, EventSet::empty());
            }
        }
    }
}

/// The driver kicked: every queue with chains gets its turn.
fn kicked(device: &mut dyn Device, io: &mut Io) -> Result<(), DeviceError> {
    for index in 0..io.queues.len() {
        if io.queues[index].has_waiting()? {
            device.process(index, io)?;
        }
    }
    Ok(())
}

/// Interrupts for what was returned; another turn for queues that were cut short.
fn finish_turn(link: &Link, io: &mut Io) -> Result<(), DeviceError> {
    let (mut interrupt, mut again) = (false, false);
    for queue in &mut io.queues {
        interrupt |= queue.wants_interrupt()?;
        again |= queue.new_turn();
    }
    if interrupt {
        link.line.raise(Reason::Used);
    }
    if again {
        link.kick();
    }
    Ok(())
}
