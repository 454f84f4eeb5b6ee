//! virtio-net on a stream socket: one interface of the guest on a user-mode network (passt).
//!
//! Contract: to the guest the device is that of `mod.rs` without offloads: every packet is whole, with its checksums. The
//! virtio header never leaves: frames travel as `frames.rs` has them. A peer that takes nothing holds the guest's packets
//! back; one that is gone, or that sends no frames, loses packets and nothing else.
//! Not here: the tap's rate limits and filters; the peer is the caller's own process.
//! Spec: virtio 1.2, 5.1.

use std::os::fd::AsFd;
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS};
use vmm_sys_util::epoll::EventSet;

use super::Plug;
use super::frames::{Incoming, MIN_FRAME_BYTES, Outgoing};
use super::receive::Receiver;
use super::{
    HEADER_BYTES, LARGEST_BYTES, Port, QUEUE_SIZES, RECEIVE, TAP as SOCKET, TRANSMIT, Traffic,
    VIRTIO_ID_NET,
};
use crate::counters::Counters;
use crate::memory::Mem;
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, Io, Queue};

const FEATURES: u64 =
    1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_STATUS;

/// The socket while the device is active.
struct Link {
    plug: Arc<Plug>,
    incoming: Incoming,
    outgoing: Outgoing,
    receiver: Receiver,
    /// The guest has no buffers: its kick brings them.
    starved: bool,
    watched: EventSet,
}

/// A network interface.
pub struct StreamNet {
    name: String,
    port: Arc<Port>,
    config: ConfigSpace,
    mem: Mem,
    traffic: Traffic,
    /// There while the device is active and the peer is.
    link: Option<Link>,
    chain: Chain,
}

impl StreamNet {
    /// An interface on the socket that is plugged into `port`, for good.
    pub fn new(name: &str, port: &Arc<Port>, mem: &Mem, counters: &Counters) -> Self {
        Self {
            name: name.into(),
            port: port.clone(),
            config: port.config().clone(),
            mem: mem.clone(),
            traffic: Traffic::new(name, counters),
            link: None,
            chain: Chain::new(mem),
        }
    }

    /// Moves what has come into the guest.
    fn receive(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let (Some(link), Some(queue)) = (&mut self.link, io.queues.get_mut(RECEIVE)) else {
            return Ok(());
        };
        link.starved = false;
        loop {
            match link.incoming.frame() {
                Err(_) => return self.hang_up(io),
                // Another read when epoll says so again: another device's turn may be due.
                Ok(None) => break,
                Ok(Some(frame)) => {
                    if !link.receiver.gather(queue)? {
                        link.starved = true;
                        break;
                    }
                    if !link.receiver.put(queue, frame)? {
                        self.traffic.dropped.add(1);
                    }
                }
            }
            link.incoming.next();
        }
        self.watch(io)
    }

    /// Takes packets of the guest for as long as the socket takes them; it is told when it can go on.
    fn transmit(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(TRANSMIT) else {
            return Ok(());
        };
        let mut more = true;
        loop {
            if let Some(Link { plug, outgoing, .. }) = &mut self.link {
                if outgoing.flush(plug.tap.as_fd()).is_err() {
                    return self.hang_up(io);
                }
                if outgoing.waits() {
                    break;
                }
            }
            if !more {
                break;
            }
            more = self.take(queue)?;
        }
        self.watch(io)
    }

    /// Takes packets as far as there is room for them. `false`: the queue has no more.
    fn take(&mut self, queue: &mut Queue) -> Result<bool, DeviceError> {
        while self.link.as_ref().is_none_or(|it| it.outgoing.has_room()) {
            if !queue.pop(&mut self.chain)? {
                return Ok(false);
            }
            let len = self.chain.readable_len().saturating_sub(HEADER_BYTES);
            let added = self.link.as_mut().is_some_and(|link| {
                let copy = |to: &mut [u8]| self.chain.read(HEADER_BYTES, to);
                (MIN_FRAME_BYTES..=LARGEST_BYTES).contains(&len)
                    && link.outgoing.add(len, copy).is_ok()
            });
            let counter = if added {
                &self.traffic.sent
            } else {
                &self.traffic.dropped
            };
            counter.add(1);
            queue.push(self.chain.head(), 0)?;
        }
        Ok(true)
    }

    /// The peer is gone: what the guest sends from now on is dropped.
    fn hang_up(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if let Some(link) = self.link.take() {
            io.watch.remove(link.plug.tap.as_fd());
        }
        // Those that were held back are lost.
        self.transmit(io)
    }

    fn watch(&mut self, io: &Io) -> Result<(), DeviceError> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, !link.starved);
        wanted.set(EventSet::OUT, link.outgoing.waits());
        if link.watched == wanted {
            return Ok(());
        }
        link.watched = wanted;
        let changed = io.watch.modify(link.plug.tap.as_fd(), SOCKET, wanted);
        changed.map_err(|source| DeviceError::Host {
            step: "watch the network's socket",
            source,
        })
    }
}

impl Device for StreamNet {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let Some(plug) = self.port.plugged() else {
            return Ok(());
        };
        let mergeable = io.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let link = self.link.insert(Link {
            plug,
            incoming: Incoming::new(),
            outgoing: Outgoing::default(),
            receiver: Receiver::new(
                &self.mem,
                HEADER_BYTES + LARGEST_BYTES,
                mergeable,
                self.traffic.received.clone(),
            ),
            starved: false,
            watched: EventSet::IN,
        });
        let added = io.watch.add(link.plug.tap.as_fd(), SOCKET, EventSet::IN);
        added.map_err(|source| DeviceError::Host {
            step: "watch the network's socket",
            source,
        })
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        match (index, &self.link) {
            // Buffers that were not popped yet do not matter as long as packets are awaited.
            (RECEIVE, Some(Link { starved: true, .. })) => self.receive(io),
            (RECEIVE, _) => Ok(()),
            _ => self.transmit(io),
        }
    }

    fn event(&mut self, _: u32, events: u32, io: &mut Io) -> Result<(), DeviceError> {
        let events = EventSet::from_bits_truncate(events);
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        if events.contains(EventSet::IN) {
            match link.incoming.fill(link.plug.tap.as_fd()) {
                Ok(_) => self.receive(io)?,
                Err(_) => return self.hang_up(io),
            }
        } else if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            return self.hang_up(io);
        }
        if events.contains(EventSet::OUT) {
            self.transmit(io)?;
        }
        Ok(())
    }

    fn reset(&mut self, io: &mut Io) {
        if let Some(link) = self.link.take() {
            io.watch.remove(link.plug.tap.as_fd());
        }
    }
}
