//! The life of a VM: from a spec and inherited descriptors to an exit status.
//!
//! ```text
//! spec on fd 3 -> files -> memory -> KVM -> devices -> kernel -> vCPUs -> serve the owner -> end
//! ```
//! Contract: whatever happens, the owner gets one `Ended` event if it is there to read it, stderr gets one line if
//! something went wrong, and the exit status is that of the cause. The process is the VM's only resource: leaving it
//! frees everything.

mod bays;
mod files;
mod rack;
mod serve;

use std::error::Error;
use std::io::{self, Read};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use caisson_vmm_spec::{Cause, Event, VmSpec};

use crate::boot::{self, BootError, Entry, Platform, cmdline};
use crate::bus::{Bus, Router};
use crate::console::{self, Console, SharedTail};
use crate::control::Control;
use crate::counters::Counters;
use crate::devices::mem::Growth;
use crate::devices::vsock::Dials;
use crate::ending::{End, Ending};
use crate::fds::{self, FdError, Inherited};
use crate::kvm::ioapic::{IoApic, Message};
use crate::kvm::vcpu::{Surroundings, Vcpus};
use crate::kvm::{KvmError, Vm};
use crate::log;
use crate::memory::{self, MemoryError};
use crate::milestones::Milestones;
use bays::Bays;
use files::Files;
use rack::{OwnerLink, Rack};

/// The most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 32;
/// The longest spec, in bytes.
const MAX_SPEC_BYTES: u64 = 1 << 20;

/// The VM cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The spec cannot be read.
    #[error("read the spec")]
    ReadSpec(#[source] io::Error),
    /// The spec is not one.
    #[error("understand the spec")]
    Spec(#[source] serde_json::Error),
    /// A value of the spec is out of its range.
    #[error("spec: {0}")]
    Value(&'static str),
    /// A descriptor is missing.
    #[error(transparent)]
    Fd(#[from] FdError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Kernel and initramfs.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device.
    #[error("set up {what}")]
    Device {
        /// Which.
        what: String,
        /// The cause.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The host has no more descriptors or threads.
    #[error("{step}")]
    Host {
        /// What was wanted.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
}

fn host(step: &'static str) -> impl FnOnce(io::Error) -> SetupError {
    move |source| SetupError::Host { step, source }
}

/// A running VM.
struct Machine {
    vm: Arc<Vm>,
    vcpus: Vcpus,
    /// As many as the guest knows of.
    most_vcpus: u8,
    entry: Entry,
    growth: Growth,
    ending: Arc<Ending>,
    counters: Counters,
    bus: Arc<Bus>,
    bays: Bays,
    dials: Arc<Dials>,
    tail: SharedTail,
    link: Arc<OwnerLink>,
    boot_deadline: Option<Duration>,
}

/// KVM as the bus sees it. Keeps the VM's descriptor open: KVM unwires all interrupts when it closes, even while the
/// vCPUs run.
struct Wiring {
    vm: Arc<Vm>,
    ending: Arc<Ending>,
}

impl Router for Wiring {
    fn route(&self, messages: &[(u8, Message)]) {
        if let Err(error) = self.vm.route(messages) {
            self.ending.report(Cause::HostError, one_line(&error));
        }
    }
}

/// Runs the VM that the inherited spec describes to its end; the process's exit status.
pub fn run() -> u8 {
    let milestones = Milestones::begin();
    // Without a stderr there is nothing that could block.
    let _ = log::prepare();
    let mut inherited = Inherited::default();
    let (spec, control) = match read_spec(&mut inherited) {
        Ok((spec, control)) => (spec, Arc::new(control)),
        Err(error) => return finish(None, &setup_failed(&error), Vec::new()),
    };
    match start(&spec, &mut inherited, &control, milestones) {
        Err(error) => finish(Some(&control), &setup_failed(&error), Vec::new()),
        Ok(mut machine) => {
            let end = machine.serve(&control);
            let tail = machine
                .tail
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .lines();
            finish(Some(&control), &end, tail)
        }
    }
}

fn read_spec(inherited: &mut Inherited) -> Result<(VmSpec, Control), SetupError> {
    let mut text = String::new();
    let file = inherited.spec()?;
    file.take(MAX_SPEC_BYTES)
        .read_to_string(&mut text)
        .map_err(SetupError::ReadSpec)?;
    let spec: VmSpec = serde_json::from_str(&text).map_err(SetupError::Spec)?;
    let control = Control::new(inherited.take("the control socket", spec.control)?);
    Ok((spec, control))
}

/// Everything up to the guest's first instruction.
fn start(
    spec: &VmSpec,
    inherited: &mut Inherited,
    control: &Arc<Control>,
    milestones: Milestones,
) -> Result<Machine, SetupError> {
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return Err(SetupError::Value("vcpus must be 1 to 32"));
    }
    let most_vcpus = spec.most_vcpus.clamp(spec.vcpus, MAX_VCPUS);
    let files = Files::take(spec, inherited)?;
    let ending = Arc::new(Ending::new().map_err(host("make an eventfd"))?);
    let counters = Counters::default();
    let tail = SharedTail::default();
    let link = Arc::new(OwnerLink::new(control.clone(), ending.clone(), milestones));

    let mem = memory::map(&spec.memory)?;
    let vm = Arc::new(Vm::new(fds::kvm(files.kvm), &mem)?);
    let (console, with_console) = wire_console(&vm, files.console, &tail)?;

    let mut rack = Rack::new(&vm, &mem, &ending, &counters, files.devices.count())?;
    let (dials, growth) = rack.add_common(&link)?;
    let ports = rack.add_configured(files.devices, &link.milestones)?;
    let devices = rack.start()?;

    let mut interrupts = rack::interrupts(devices.len());
    let cpus = (most_vcpus > spec.vcpus).then_some(spec.vcpus);
    let words = cmdline::build(&interrupts, cpus, with_console, &spec.cmdline);
    interrupts.dedup();
    if with_console {
        interrupts.push(console::IRQ);
    }
    let ioapic = IoApic::new(interrupts.iter().copied().max().unwrap_or(0));
    let entry = boot::load(
        &mem,
        files.boot,
        &Platform {
            words,
            cpus: most_vcpus,
            interrupts,
        },
    )?;

    // The kernel starts every processor once when it boots, those that are to be offline included, and waits ten seconds
    // for one that does not exist.
    let vcpus = vm.vcpus(0..most_vcpus, most_vcpus, entry)?;
    let wiring = Box::new(Wiring {
        vm: vm.clone(),
        ending: ending.clone(),
    });
    let bus = Arc::new(Bus::new(console, devices, ioapic, wiring));
    let surroundings = Surroundings {
        bus: bus.clone(),
        ending: ending.clone(),
        tail: tail.clone(),
    };
    link.milestones.entered();
    let vcpus =
        Vcpus::start(vcpus, surroundings, &counters).map_err(host("start the vCPU threads"))?;
    let boot_deadline =
        (spec.boot_deadline_ms > 0).then(|| Duration::from_millis(spec.boot_deadline_ms));
    Ok(Machine {
        vm,
        vcpus,
        most_vcpus,
        entry,
        growth,
        bays: Bays::new(&bus, ports, &mem, &link, &ending, &counters),
        ending,
        counters,
        bus,
        dials,
        tail,
        link,
        boot_deadline,
    })
}

fn wire_console(
    vm: &Vm,
    file: Option<std::fs::File>,
    tail: &SharedTail,
) -> Result<(Console, bool), SetupError> {
    let Some(file) = file else {
        return Ok((Console::transmitter(tail.clone()), false));
    };
    let (console, interrupt) =
        Console::full(tail.clone(), file).map_err(host("make an eventfd"))?;
    vm.wire_interrupt(&interrupt, u32::from(console::IRQ))?;
    Ok((console, true))
}

/// An error and all its causes in one line.
fn one_line(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

fn setup_failed(error: &SetupError) -> End {
    End {
        cause: Cause::Setup,
        message: one_line(error),
    }
}

/// The last words, on stderr and to the owner; the exit status.
fn finish(control: Option<&Control>, end: &End, tail: Vec<String>) -> u8 {
    let End { cause, message } = end.clone();
    let console = if cause == Cause::PowerOff {
        Vec::new()
    } else {
        tail
    };
    if cause != Cause::PowerOff {
        log::line(format_args!("{message}"));
    }
    if let Some(control) = control {
        // An owner that is gone, or does not read, has the exit status.
        let _ = control.send_last(&Event::Ended {
            cause,
            message,
            console,
        });
    }
    cause.exit_status()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let source = io::Error::from_raw_os_error(libc::EACCES);
        let error = SetupError::Device {
            what: "net0".into(),
            source: Box::new(source),
        };
        assert_eq!(
            one_line(&error),
            "set up net0: Permission denied (os error 13)"
        );
    }
}
