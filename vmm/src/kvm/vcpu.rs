//! vCPU threads: into the guest, out for an access, back.
//!
//! Contract: a thread ends only when the guest is over for a reason of its own, which it has then reported; a stop of
//! the VM is the end of the process. Pausing is a gate: all threads leave the guest and wait at it.
//! Threads: one per vCPU; `Vcpus` belongs to the main thread.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use caisson_vmm_spec::Cause;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::{Kick, install_handler};
use crate::bus::{Bus, Demand};
use crate::console::SharedTail;
use crate::counters::{Counter, Counters};
use crate::ending::Ending;

/// Where vCPU threads wait while the VM is paused.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    waiting: usize,
    gone: usize,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is closed; says whether it was.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        if !state.closed {
            return false;
        }
        state.waiting += 1;
        self.changed.notify_all();
        while state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        true
    }

    /// A thread that will never come to the gate again.
    fn leave(&self) {
        self.lock().gone += 1;
        self.changed.notify_all();
    }

    fn close(&self) {
        self.lock().closed = true;
    }

    /// Returns when `threads` threads wait or are gone.
    fn wait_for(&self, threads: usize) {
        let mut state = self.lock();
        while state.waiting + state.gone < threads {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn open(&self) {
        self.lock().closed = false;
        self.changed.notify_all();
    }
}

/// What a vCPU thread needs beside its vCPU.
#[derive(Clone)]
pub struct Surroundings {
    /// Where accesses go.
    pub bus: Arc<Bus>,
    /// Where the end is reported.
    pub ending: Arc<Ending>,
    /// Where a panic's message is found.
    pub tail: SharedTail,
}

/// Exits to this process, by kind.
#[derive(Clone)]
struct Exits {
    port: Counter,
    memory: Counter,
    interrupted: Counter,
}

/// All vCPU threads.
pub struct Vcpus {
    gate: Arc<Gate>,
    surroundings: Surroundings,
    exits: Exits,
    threads: Vec<(JoinHandle<()>, Kick)>,
}

impl Vcpus {
    /// Starts a thread for each vCPU: the guest runs.
    ///
    /// # Errors
    /// No thread or no memory left.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        surroundings: Surroundings,
        counters: &Counters,
    ) -> io::Result<Self> {
        install_handler()?;
        let exits = Exits {
            port: counters.register("exits.port"),
            memory: counters.register("exits.memory"),
            interrupted: counters.register("exits.interrupted"),
        };
        let mut all = Self {
            gate: Arc::default(),
            surroundings,
            exits,
            threads: Vec::with_capacity(vcpus.len()),
        };
        vcpus.into_iter().try_for_each(|vcpu| all.add(vcpu))?;
        Ok(all)
    }

    /// Starts a thread for one more vCPU.
    ///
    /// # Errors
    /// As [`Vcpus::start`].
    pub fn add(&mut self, vcpu: VcpuFd) -> io::Result<()> {
        let kick = Kick::new(&vcpu)?;
        let mut runner = Runner {
            vcpu,
            gate: self.gate.clone(),
            surroundings: self.surroundings.clone(),
            exits: self.exits.clone(),
        };
        let thread = Builder::new()
            .name(format!("vcpu{}", self.threads.len()))
            .spawn(move || runner.run())?;
        self.threads.push((thread, kick));
        Ok(())
    }

    /// How many there are: at most 32.
    pub fn count(&self) -> u8 {
        u8::try_from(self.threads.len()).unwrap_or(u8::MAX)
    }

    /// Returns when all vCPUs are out of the guest and stay out.
    pub fn pause(&self) {
        self.gate.close();
        for (thread, kick) in &self.threads {
            kick.out(thread);
        }
        self.gate.wait_for(self.threads.len());
    }

    /// Lets all vCPUs run again.
    pub fn resume(&self) {
        self.gate.open();
    }
}

struct Runner {
    vcpu: VcpuFd,
    gate: Arc<Gate>,
    surroundings: Surroundings,
    exits: Exits,
}

/// What an exit means for the VM.
type Over = Option<(Cause, String)>;

impl Runner {
    fn run(&mut self) {
        loop {
            if let Some((cause, message)) = self.once() {
                self.surroundings.ending.report(cause, message);
                return self.gate.leave();
            }
        }
    }

    /// Into the guest and out once.
    fn once(&mut self) -> Over {
        let bus = &self.surroundings.bus;
        match self.vcpu.run() {
            Ok(VcpuExit::MmioRead(addr, data)) => {
                self.exits.memory.add(1);
                bus.memory_read(addr, data);
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                self.exits.memory.add(1);
                bus.memory_write(addr, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.exits.port.add(1);
                bus.port_read(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.exits.port.add(1);
                return bus
                    .port_write(port, data)
                    .map(|demand| self.demanded(demand));
            }
            Ok(exit) => return last_exit(&exit),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                self.exits.interrupted.add(1);
                self.vcpu.set_kvm_immediate_exit(0);
                if self.gate.pass() {
                    // The guest's watchdogs must not take the pause for a stall. One that does not use the clock of KVM
                    // cannot be told.
                    let _ = self.vcpu.kvmclock_ctrl();
                }
            }
            Err(error) => return Some((Cause::HostError, format!("run a vCPU: {error}"))),
        }
        None
    }

    fn demanded(&self, demand: Demand) -> (Cause, String) {
        let tail = self
            .surroundings
            .tail
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match (demand, tail.panic()) {
            (Demand::PowerOff, _) => (Cause::PowerOff, "the guest powered off".to_owned()),
            (Demand::Reset, Some(message)) => (
                Cause::GuestPanic,
                format!("the guest kernel panicked: {message}"),
            ),
            (Demand::Reset, None) => (Cause::GuestReset, "the guest reset itself".to_owned()),
        }
    }
}

/// Exits after which the vCPU cannot go on.
fn last_exit(exit: &VcpuExit<'_>) -> Over {
    match exit {
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => None,
        VcpuExit::Shutdown | VcpuExit::SystemEvent(..) => Some((
            Cause::TripleFault,
            "a vCPU shut down (triple fault)".to_owned(),
        )),
        VcpuExit::FailEntry(reason, _) => Some((
            Cause::HostError,
            format!("KVM cannot enter the guest: reason {reason:#x}"),
        )),
        VcpuExit::InternalError => Some((
            Cause::HostError,
            "KVM cannot emulate an instruction of the guest".to_owned(),
        )),
        other => Some((
            Cause::HostError,
            format!("unexpected exit from the guest: {other:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_holds_every_thread_until_it_opens() {
        let gate = Arc::new(Gate::default());
        gate.pass();
        gate.close();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let gate = gate.clone();
                std::thread::spawn(move || gate.pass())
            })
            .collect();
        gate.leave();
        gate.wait_for(4);
        assert!(threads.iter().all(|thread| !thread.is_finished()));
        gate.open();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn only_exits_without_return_end_the_vm() {
        assert_eq!(last_exit(&VcpuExit::Intr), None);
        assert_eq!(
            last_exit(&VcpuExit::Shutdown).unwrap().0,
            Cause::TripleFault
        );
        assert_eq!(
            last_exit(&VcpuExit::InternalError).unwrap().0,
            Cause::HostError
        );
        assert_eq!(
            last_exit(&VcpuExit::FailEntry(7, 0)).unwrap().0,
            Cause::HostError
        );
    }
}
