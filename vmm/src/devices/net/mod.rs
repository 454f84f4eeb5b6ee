//! virtio-net: one interface of the guest on a tap of the host.
//!
//! | file | is |
//! |---|---|
//! | `receive.rs` | packets from the tap into the guest's buffers |
//! | `transmit.rs` | packets of the guest to the tap |
//! | `port.rs` | what the interface is connected to, plugged and unplugged while the guest runs |
//! | `tap.rs` | what the tap is told: header size, offloads (`unsafe`) |
//! | `stream.rs`, `frames.rs` | the device on a stream socket in place of a tap |
//! | `vhost.rs` | the host's kernel moves the packets instead (`unsafe`) |
//!
//! Contract: a packet moves with one system call between tap and guest memory, with its virtio header, which the tap
//! speaks too; we read nothing of it. Checksums and TCP segmentation are left undone between guest and host where both
//! can (CSUM, TSO4, TSO6 in both directions; the host's kernel checks the headers that the guest writes). Bounded work
//! per call: [`receive::PACKETS_PER_EVENT`] packets in, a queue's turn out. A tap that is gone (its namespace was
//! removed) loses packets and nothing else. The guest's agent sets the MTU, which follows the host's: it is not offered as
//! a feature, because a driver takes that for the largest one ever.
//! With a vhost-net device the kernel serves both queues of a driver that set both up, and this thread neither wakes for
//! a packet nor sees one. Limits and filters are the tap's, on the host.
//! Spec: virtio 1.2, 5.1.

mod frames;
mod port;
mod receive;
mod stream;
mod tap;
mod transmit;
mod vhost;

use std::os::fd::AsFd;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;

use crate::counters::{Counter, Counters};
use crate::memory::Mem;
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, GuestFault, Io};

use port::Plug;
pub use port::Port;
use receive::{Receiver, Stop};
pub use stream::StreamNet;

/// The device's kind while something is plugged in.
pub const VIRTIO_ID_NET: u32 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// The tap's token.
const TAP: u32 = 0;
/// The token of vhost-net's complaints.
const COMPLAINT: u32 = 1;

/// `struct virtio_net_hdr_v1`, in front of each packet.
const HEADER_BYTES: usize = 12;
/// The largest packet with segmentation left to do: 64 KiB of IP, Ethernet and a VLAN tag.
const LARGEST_BYTES: usize = (64 << 10) + 18;

const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS;

/// How many packets went which way.
#[derive(Debug, Clone)]
struct Traffic {
    received: Counter,
    sent: Counter,
    /// Packets of the guest that the tap did not take, or that are none.
    dropped: Counter,
}

impl Traffic {
    fn new(name: &str, counters: &Counters) -> Self {
        let counter = |what: &str| counters.register(format!("{name}.{what}"));
        Self {
            received: counter("received"),
            sent: counter("sent"),
            dropped: counter("dropped"),
        }
    }
}

/// Whether the thread is told of packets in the tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Yes,
    /// Not while the guest has no buffers: its kick brings them.
    Paused,
    /// Never again: the tap has lost its interface, and epoll would not stop saying so.
    Gone,
}

/// A network interface.
pub struct Net {
    name: String,
    port: Arc<Port>,
    config: ConfigSpace,
    mem: Mem,
    traffic: Traffic,
    /// There while the device is active and something is plugged in.
    plug: Option<Arc<Plug>>,
    /// There with it, unless the kernel moves the packets.
    receiver: Option<Receiver>,
    watched: Watched,
    chain: Chain,
}

impl Net {
    /// An interface on whatever is plugged into `port`.
    pub fn new(name: &str, port: &Arc<Port>, mem: &Mem, counters: &Counters) -> Self {
        Self {
            name: name.into(),
            port: port.clone(),
            config: port.config().clone(),
            mem: mem.clone(),
            traffic: Traffic::new(name, counters),
            plug: None,
            receiver: None,
            watched: Watched::Gone,
            chain: Chain::new(mem),
        }
    }

    /// Moves packets into the guest until the tap is empty, the guest's buffers are, or it is another's turn.
    fn receive(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let (Some(receiver), Some(plug), Some(queue)) =
            (&mut self.receiver, &self.plug, io.queues.get_mut(RECEIVE))
        else {
            return Ok(());
        };
        let wanted = match receiver.run(queue, plug.tap.as_fd())? {
            Stop::TapEmpty | Stop::Turn => Watched::Yes,
            Stop::NoBuffers => Watched::Paused,
            Stop::TapGone => Watched::Gone,
        };
        self.watch(wanted, io)
    }

    fn watch(&mut self, wanted: Watched, io: &Io) -> Result<(), DeviceError> {
        let Some(Plug { tap, .. }) = self.plug.as_deref() else {
            return Ok(());
        };
        if self.watched == wanted {
            return Ok(());
        }
        self.watched = wanted;
        let events = match wanted {
            Watched::Yes => EventSet::IN,
            Watched::Paused => EventSet::empty(),
            Watched::Gone => {
                io.watch.remove(tap.as_fd());
                return Ok(());
            }
        };
        let changed = io.watch.modify(tap.as_fd(), TAP, events);
        changed.map_err(|source| DeviceError::Host {
            step: "watch the tap",
            source,
        })
    }
}

/// `struct virtio_net_config`, as far as the features go: mac, status.
fn config_space(mac: [u8; 6]) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac;
    [a, b, c, d, e, f, VIRTIO_NET_S_LINK_UP.to_le_bytes()[0], 0]
}

impl Device for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        if self.port.is_plugged() {
            VIRTIO_ID_NET
        } else {
            0
        }
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
        let host = |step| move |source| DeviceError::Host { step, source };
        let has = |feature: u32| io.features & 1 << feature != 0;
        // A guest may use a device of no kind; it gets no packets.
        let Some(plug) = self.port.plugged() else {
            return Ok(());
        };
        let plug = self.plug.insert(plug);
        let tap = plug.tap.as_fd();
        tap::set_up(tap, tap::offloads(io.features)).map_err(host("set up the tap"))?;
        if let Some(vhost) = &plug.vhost
            && vhost.take_over(io, tap)?
        {
            return io
                .watch
                .add(vhost.complaint(), COMPLAINT, EventSet::IN)
                .map_err(host("watch vhost-net"));
        }
        self.receiver = Some(Receiver::new(
            &self.mem,
            HEADER_BYTES + LARGEST_BYTES,
            has(VIRTIO_NET_F_MRG_RXBUF),
            self.traffic.received.clone(),
        ));
        self.watched = Watched::Yes;
        io.watch
            .add(tap, TAP, EventSet::IN)
            .map_err(host("watch the tap"))
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        if index == RECEIVE {
            // Buffers that were not popped yet do not matter as long as packets are awaited.
            return match self.watched {
                Watched::Paused => self.receive(io),
                Watched::Yes | Watched::Gone => Ok(()),
            };
        }
        let plug = self.plug.as_deref();
        if plug.is_some() && self.receiver.is_none() {
            return Ok(()); // the kernel's
        }
        let Some(queue) = io.queues.get_mut(TRANSMIT) else {
            return Ok(());
        };
        while queue.pop(&mut self.chain)? {
            let sent = plug.is_some_and(|plug| transmit::send(&self.chain, plug.tap.as_fd()));
            let counter = if sent {
                &self.traffic.sent
            } else {
                &self.traffic.dropped
            };
            counter.add(1);
            queue.push(self.chain.head(), 0)?;
        }
        Ok(())
    }

    fn event(&mut self, token: u32, events: u32, io: &mut Io) -> Result<(), DeviceError> {
        if token == COMPLAINT {
            let what = "vhost-net cannot make sense of it";
            return Err(GuestFault::Ring(what).into());
        }
        if EventSet::from_bits_truncate(events).intersects(EventSet::ERROR | EventSet::HANG_UP) {
            return self.watch(Watched::Gone, io);
        }
        self.receive(io)
    }

    fn reset(&mut self, io: &mut Io) {
        if let Some(plug) = self.plug.take() {
            io.watch.remove(plug.tap.as_fd());
            if let Some(vhost) = &plug.vhost {
                io.watch.remove(vhost.complaint());
                vhost.stop();
            }
        }
        self.watched = Watched::Gone;
        self.receiver = None;
    }
}

/// Packets out of and into the chain of an image (`crate::fuzzing`).
#[cfg(any(test, feature = "fuzzing"))]
#[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
pub fn fuzz(bytes: &[u8]) {
    use crate::fuzzing::Image;
    frames::fuzz(bytes);
    let (tap, wire) = std::os::unix::net::UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    for mergeable in [false, true] {
        let mut image = Image::new(bytes);
        if wire.send(&[9; 60]).is_err() {
            return;
        }
        let counters = Counters::default();
        let mut receiver = Receiver::new(
            &image.driver.mem,
            1530,
            mergeable,
            counters.register("received"),
        );
        let _ = receiver.run(&mut image.driver.queue, tap.as_fd());
    }
    if let Ok(Some(chain)) = Image::new(bytes).driver.pop() {
        transmit::send(&chain, tap.as_fd());
    }
}
