//! vhost-net: the host's kernel serves an interface's queues, from doorbell to tap to interrupt.
//!
//! ```text
//!  driver kicks -> ioeventfd -> the kernel's worker -> tap -> ... -> the kernel's worker -> irqfd -> driver
//! ```
//!
//! Contract: the kernel is told where guest memory is, and checks every address of a ring and a descriptor against that;
//! this process reads neither from then on. It is asked only if it can do all that the driver accepted and the driver set
//! both queues up; else the caller moves the packets. One device of the kernel's serves one interface for its whole life:
//! it has one owner (this process), and starts anew with each driver.
//! Errors: what the kernel says about a ring is a `GuestFault`; anything else is the host's.
//! Spec: `linux/vhost.h`; the crate `vhost` speaks it, except for the call that names the tap.
#![allow(
    unsafe_code,
    reason = "one ioctl that the crate has for devices it opened itself"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{RECEIVE, TRANSMIT};
use crate::fds;
use crate::memory::Mem;
use crate::virtio::queue::QueueState;
use crate::virtio::{DeviceError, GuestFault, Io};

/// The features that are about rings and headers; all others are between the tap and the driver.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_F_VERSION_1;
const QUEUES: [usize; 2] = [RECEIVE, TRANSMIT];

/// A device of the kernel's, for one interface.
#[derive(Debug)]
pub(super) struct Vhost {
    device: OwnedFd,
    /// Guest memory as the kernel was told, once the device has an owner. Held while it is told.
    told: Mutex<Option<Mem>>,
    /// Written by the kernel when it cannot make sense of a ring.
    complaint: EventFd,
}

impl Vhost {
    /// The device behind this descriptor of `/dev/vhost-net`, which nobody owns yet.
    ///
    /// # Errors
    /// No descriptors left.
    pub(super) fn new(device: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            device,
            told: Mutex::default(),
            complaint: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Readable when the kernel has given up on a ring.
    pub(super) fn complaint(&self) -> BorrowedFd<'_> {
        fds::borrow(&self.complaint)
    }

    /// Has the kernel move packets between the queues in `io` and `tap`. `false`: it cannot, and nothing has changed.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub(super) fn take_over(&self, io: &Io, tap: BorrowedFd<'_>) -> Result<bool, DeviceError> {
        let kernel = Kernel {
            device: &self.device,
            mem: &io.mem,
        };
        let features = kernel
            .get_features()
            .map_err(refused("ask vhost-net for its features"))?;
        let wanted = io.features & RING_FEATURES;
        if wanted & !features != 0 || !io.queues.iter().all(|queue| queue.is_ready()) {
            return Ok(false);
        }
        let handed = io.hand_over().map_err(|source| DeviceError::Host {
            step: "hand a queue over",
            source,
        })?;
        let Some((kicks, interrupt)) = handed else {
            return Ok(false);
        };
        self.own(&kernel)?;
        kernel
            .set_features(wanted)
            .map_err(refused("agree with vhost-net on features"))?;
        // Guest memory is the process's own; what is wrong from here on is a ring.
        let fault = |_| GuestFault::Ring("vhost-net refuses it");
        for ((index, queue), kick) in QUEUES.into_iter().zip(&io.queues).zip(kicks) {
            kernel
                .set_up(index, &queue.state(), [kick, interrupt, &self.complaint])
                .map_err(fault)?;
        }
        for index in QUEUES {
            let backend = kernel.set_backend(index, Some(tap));
            backend.map_err(|_| GuestFault::Ring("vhost-net refuses it"))?;
        }
        Ok(true)
    }

    /// Makes this process the device's owner, and tells the kernel where guest memory is.
    fn own(&self, kernel: &Kernel<'_>) -> Result<(), DeviceError> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none() {
            kernel.set_owner().map_err(refused("own vhost-net"))?;
        }
        kernel
            .tell_memory()
            .map_err(refused("show guest memory to vhost-net"))?;
        *told = Some(kernel.mem.clone());
        Ok(())
    }

    /// Tells the kernel anew where guest memory is, after it has grown or shrunk. Callable from any thread.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn memory_changed(&self) -> Result<(), DeviceError> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mem) = told.as_ref() else {
            return Ok(());
        };
        let device = &self.device;
        Kernel { device, mem }
            .tell_memory()
            .map_err(refused("show guest memory to vhost-net"))
    }

    /// Has the kernel let go of queues and tap; returns when it has.
    pub(super) fn stop(&self) {
        for index in QUEUES {
            // It never held them, or it lets go of them.
            let _ = set_backend(&self.device, index, None);
        }
    }
}

/// The kernel's device beside the memory that it works on.
struct Kernel<'a> {
    device: &'a OwnedFd,
    mem: &'a Mem,
}

impl AsRawFd for Kernel<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel<'_> {
    type AS = Mem;

    fn mem(&self) -> &Mem {
        self.mem
    }
}

impl Kernel<'_> {
    fn tell_memory(&self) -> vhost::Result<()> {
        self.set_mem_table(&table(self.mem))
    }

    fn set_up(
        &self,
        index: usize,
        queue: &QueueState,
        [kick, interrupt, complaint]: [&EventFd; 3],
    ) -> vhost::Result<()> {
        self.set_vring_num(index, queue.size)?;
        self.set_vring_base(index, queue.next_available)?;
        let place = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: queue.descriptors,
            used_ring_addr: queue.used,
            avail_ring_addr: queue.available,
            log_addr: None,
        };
        self.set_vring_addr(index, &place)?;
        self.set_vring_call(index, interrupt)?;
        self.set_vring_err(index, complaint)?;
        self.set_vring_kick(index, kick)
    }

    fn set_backend(&self, index: usize, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        set_backend(self.device, index, tap)
    }
}

/// Joins a queue to a tap, or parts them.
fn set_backend(device: &OwnedFd, index: usize, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let file = vhost_vring_file {
        // 0 or 1.
        index: u32::try_from(index).unwrap_or(u32::MAX),
        fd: tap.map_or(-1, |tap| tap.as_fd().as_raw_fd()),
    };
    // SAFETY: VHOST_NET_SET_BACKEND reads one `struct vhost_vring_file`, during the call.
    match unsafe { ioctl_with_ref(device, VHOST_NET_SET_BACKEND(), &file) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Guest memory as the kernel is told of it, which refuses an empty range: room that nobody has asked for yet.
fn table(mem: &Mem) -> Vec<VhostUserMemoryRegionInfo> {
    mem.iter()
        .filter(|region| mem.mapped(region) > 0)
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: mem.mapped(region),
            userspace_addr: region.as_ptr() as u64,
            ..VhostUserMemoryRegionInfo::default()
        })
        .collect()
}

fn refused(step: &'static str) -> impl FnOnce(vhost::Error) -> DeviceError {
    move |error| {
        let source = match error {
            vhost::Error::IoctlError(source) => source,
            other => io::Error::other(other.to_string()),
        };
        DeviceError::Host { step, source }
    }
}

#[cfg(test)]
mod tests {
    use caisson_vmm_spec::{MemorySpec, MiB};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory;

    #[test]
    fn the_kernel_is_told_of_all_guest_memory_and_nothing_else() {
        let spec = MemorySpec {
            size: MiB(5 << 10),
            most: MiB(6 << 10),
            huge_pages: false,
            policy: None,
        };
        let mem = memory::map(&spec).unwrap();
        let table = table(&mem);
        let ranges: Vec<_> = table
            .iter()
            .map(|region| (GuestAddress(region.guest_phys_addr), region.memory_size))
            .collect();
        assert_eq!(ranges, memory::layout(5 << 30));
        let host = mem
            .get_host_address(GuestAddress(memory::HIGH_START))
            .unwrap();
        assert_eq!(table[1].userspace_addr, host as u64);
        mem.room().reach_to(1).unwrap();
        let grown = super::table(&mem);
        assert_eq!(grown[2].guest_phys_addr, mem.room().start());
        assert_eq!(grown[2].memory_size, memory::CHUNK_BYTES);
    }

    #[test]
    fn a_device_that_nobody_owns_is_told_nothing() {
        let nothing = std::fs::File::open("/dev/null").unwrap();
        let vhost = Vhost::new(nothing.into()).unwrap();
        vhost.memory_changed().unwrap();
        vhost.stop();
    }
}
