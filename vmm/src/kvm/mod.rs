//! The machine as KVM knows it: address space, interrupt controllers, devices' doorbells, vCPUs.
//!
//! Contract: memory in, vCPUs out; interrupts are delivered by irqfd, kicks by ioeventfd, both in the kernel. Local
//! APICs are KVM's, the IOAPIC is ours (`ioapic.rs`). There is no PIC and no PIT: the guest has kvm-clock and a
//! TSC-deadline timer.
//! Not here: guest memory's contents (`boot`), what exits mean (`vcpu.rs`, `bus.rs`).
#![allow(unsafe_code, reason = "KVM is given the address of guest memory")]

pub mod cpuid;
pub mod ioapic;
pub mod kick;
mod release;
pub mod state;
pub mod vcpu;

use std::ops::Range;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY,
};
use vm_memory::{GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::Entry;
use crate::devices::mem::Slots;
use crate::memory::{CHUNK_BYTES, Mem};
use crate::virtio::Page;
use crate::virtio::transport::Link;
use ioapic::{MAX_PINS, Message};
use release::Keeper;
use state::VcpuState;

/// The version of KVM's API, unchanged since 2007.
const API_VERSION: i32 = 12;
/// Three pages below the BIOS for Intel's real-mode emulation, out of the way of everything else.
const TSS_ADDR: usize = 0xfffb_d000;

/// Slots of KVM for chunks of memory that came later; those before are the memory's at boot and the registers'.
const FIRST_CHUNK_SLOT: u32 = 8;

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
#[error("KVM: {step}")]
pub struct KvmError {
    /// What was asked of it.
    pub step: &'static str,
    /// The cause.
    #[source]
    pub source: kvm_ioctls::Error,
}

fn step(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError { step, source }
}

/// A VM without vCPUs.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    vm: VmFd,
    /// Takes the acknowledgements of all devices; nobody reads it.
    acknowledged: EventFd,
    /// Kept because KVM has its address.
    mem: Mem,
    _keeper: Option<Keeper>,
}

impl Vm {
    /// A VM with this memory and local APICs.
    ///
    /// # Errors
    /// [`KvmError`]: `kvm` is no KVM device, or the host refuses a step.
    pub fn new(kvm: Kvm, mem: &Mem) -> Result<Self, KvmError> {
        if kvm.get_api_version() != API_VERSION {
            let source = kvm_ioctls::Error::new(libc::ENOTTY);
            return Err(KvmError {
                step: "ask for its version (is it /dev/kvm?)",
                source,
            });
        }
        let acknowledged = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|error| KvmError {
            step: "make an eventfd",
            source: error.into(),
        })?;
        let vm = kvm.create_vm().map_err(step("create a VM"))?;
        let keeper = Keeper::of(&vm);
        vm.set_tss_address(TSS_ADDR)
            .map_err(step("set the TSS address"))?;
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [u64::from(MAX_PINS), 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        vm.enable_cap(&split)
            .map_err(step("create the local APICs"))?;
        for (slot, region) in (0..).zip(mem.iter()) {
            let memory = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is the whole of one mapping of `mem`, which lives as long as the VM (`self.mem`).
            unsafe { vm.set_user_memory_region(memory) }.map_err(step("map guest memory"))?;
        }
        Ok(Self {
            kvm,
            vm,
            acknowledged,
            mem: mem.clone(),
            _keeper: keeper,
        })
    }

    /// Lets the guest read `pages` from `base` on; its writes there still come out.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn show(&self, pages: &'static [Page], base: u64) -> Result<(), KvmError> {
        let memory = kvm_userspace_memory_region {
            // The first number that guest memory, in its few regions, has not taken.
            slot: u32::try_from(self.mem.num_regions()).unwrap_or(u32::MAX),
            flags: KVM_MEM_READONLY,
            guest_phys_addr: base,
            memory_size: size_of_val(pages) as u64,
            userspace_addr: pages.as_ptr() as u64,
        };
        // SAFETY: the range is `pages`, whole pages that live as long as the process; KVM lets the guest only read them,
        // and what they hold is atomic.
        unsafe { self.vm.set_user_memory_region(memory) }
            .map_err(step("map the devices' registers"))
    }

    /// Wires a device: its interrupt to `irq`, kicks of its queues (at `base`) to its eventfd.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn wire(&self, link: &Link, base: u64, irq: u32) -> Result<(), KvmError> {
        self.wire_interrupt(&link.line.irqfd, irq)?;
        let notify = IoEventAddress::Mmio(base + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        let refused = || step("register a queue's doorbell");
        match link.kicks.as_slice() {
            [kick] => self.vm.register_ioevent(kick, &notify, NoDatamatch),
            // What the driver writes is the queue's number.
            kicks => (0u32..)
                .zip(kicks)
                .try_for_each(|(queue, kick)| self.vm.register_ioevent(kick, &notify, queue)),
        }
        .map_err(refused())?;
        // The acknowledgement of returned chains ends in the kernel, see `Line`.
        let acknowledge = IoEventAddress::Mmio(base + u64::from(VIRTIO_MMIO_INTERRUPT_ACK));
        self.vm
            .register_ioevent(&self.acknowledged, &acknowledge, VIRTIO_MMIO_INT_VRING)
            .map_err(step("register an interrupt's acknowledgement"))
    }

    /// Wires an eventfd to an interrupt.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn wire_interrupt(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.vm
            .register_irqfd(event, irq)
            .map_err(step("register an interrupt"))
    }

    /// Says what every interrupt means from now on; those that are not named mean nothing.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn route(&self, messages: &[(u8, Message)]) -> Result<(), KvmError> {
        let entries: Vec<_> = messages
            .iter()
            .map(|(irq, message)| route(*irq, *message))
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError {
            step: "list the interrupt routes",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(step("route the interrupts"))
    }

    /// The vCPUs with these numbers, of `most` that there may be: the first at `entry`, the others waiting to be started by
    /// it.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn vcpus(&self, ids: Range<u8>, most: u8, entry: Entry) -> Result<Vec<VcpuFd>, KvmError> {
        let supported = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(step("ask for the supported CPUID"))?;
        ids.map(|id| self.vcpu(id, most, supported.as_slice(), entry))
            .collect()
    }

    fn set_chunk(&self, chunk: u64, addr: u64, host: Option<u64>) -> Result<(), String> {
        let memory = kvm_userspace_memory_region {
            // Chunks are few thousand (`memory::Room`).
            slot: FIRST_CHUNK_SLOT + u32::try_from(chunk).unwrap_or(u32::MAX - FIRST_CHUNK_SLOT),
            flags: 0,
            guest_phys_addr: addr,
            memory_size: host.map_or(0, |_| CHUNK_BYTES),
            userspace_addr: host.unwrap_or(0),
        };
        // SAFETY: the range is a mapped chunk of the room of `mem` (`Room::chunk`), which is never unmapped and lives as long
        // as the VM (`self.mem`); or it has no bytes, and the slot is given up.
        unsafe { self.vm.set_user_memory_region(memory) }.map_err(|error| error.to_string())
    }

    fn vcpu(
        &self,
        id: u8,
        most: u8,
        supported: &[kvm_bindings::kvm_cpuid_entry2],
        entry: Entry,
    ) -> Result<VcpuFd, KvmError> {
        let vcpu = self
            .vm
            .create_vcpu(u64::from(id))
            .map_err(step("create a vCPU"))?;
        let entries = cpuid::entries(supported, u32::from(id), u32::from(most));
        let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError {
            step: "list the CPUID entries",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(step("set the CPUID"))?;
        if id == 0 {
            let reset = vcpu
                .get_sregs()
                .map_err(step("read the system registers"))?;
            VcpuState::at_entry(reset, entry).apply(&vcpu)?;
        }
        Ok(vcpu)
    }
}

impl Slots for Vm {
    fn give(&self, chunk: u64, addr: u64, host: u64) -> Result<(), String> {
        self.set_chunk(chunk, addr, Some(host))
    }

    fn take(&self, chunk: u64, addr: u64) -> Result<(), String> {
        self.set_chunk(chunk, addr, None)
    }
}

fn route(irq: u8, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: u32::from(irq),
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi.address_lo = message.address;
    entry.u.msi.data = message.data;
    entry
}
