//! The marks between the phases of a start, by the rare trace events that part them.

use std::io;

use caisson_tests::ruler::{Trace, lines};

use crate::subject::Run;

/// Offset of the queue-notify register of a virtio-mmio device (virtio 1.2, section 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// Moments of one run, in nanoseconds of the monotonic clock.
#[derive(Debug)]
pub(crate) struct Marks {
    run: Run,
    vmm: u64,
    entry: u64,
    agent: u64,
    vmm_end: u64,
}

impl Marks {
    /// Runs `work` and finds the marks of the VM that it starts.
    pub(crate) fn of(
        trace: &Trace,
        entry: u64,
        work: impl FnOnce() -> io::Result<Run>,
    ) -> io::Result<Self> {
        let events = [
            (
                "sched/sched_process_exec",
                "filename ~ \"*caisson-vmm\"".to_owned(),
            ),
            (
                "sched/sched_process_exit",
                "comm ~ \"caisson-vmm*\"".to_owned(),
            ),
            ("kvm/kvm_entry", format!("rip == {entry:#x}")),
            (
                "kvm/kvm_mmio",
                format!("gpa & {QUEUE_NOTIFY:#x} && type == 2"),
            ),
        ];
        let (run, text) = trace.traced(&events, work)?;
        Self::find(run, &text)
            .ok_or_else(|| io::Error::other(format!("marks are missing in:\n{text}")))
    }

    fn find(run: Run, text: &str) -> Option<Self> {
        let first = |name: &str| lines(text, name).next().map(|(at, _)| at);
        let entry = first("kvm_entry:")?;
        // The agent's first act is to mount the share: the first request on the virtio-fs device, which is the first
        // device on the bus and the first that is notified after the kernel's probes have filled the others' rings.
        let base = lines(text, "kvm_mmio:")
            .filter_map(|(_, line)| notified(line))
            .min()?;
        let agent = lines(text, "kvm_mmio:")
            .find(|(_, line)| notified(line) == Some(base))?
            .0;
        Some(Self {
            run,
            vmm: first("sched_process_exec:")?,
            entry,
            agent,
            vmm_end: lines(text, "sched_process_exit:").last()?.0,
        })
    }

    /// Name and length of each phase.
    pub(crate) fn phases(&self) -> Vec<(&'static str, u64)> {
        vec![
            (
                "runtime: `execve` of caisson to `execve` of the VMM",
                self.vmm - self.run.start,
            ),
            (
                "VMM: its `execve` to the guest's first instruction",
                self.entry - self.vmm,
            ),
            (
                "guest kernel: first instruction to the agent's first mount",
                self.agent - self.entry,
            ),
            (
                "agent: first mount to the program's first byte of output",
                self.run.output - self.agent,
            ),
            (
                "end of the VM: output to the VMM's last thread",
                self.vmm_end.saturating_sub(self.run.output),
            ),
            (
                "tear-down: end of the VMM to exit of caisson",
                self.run.end.saturating_sub(self.vmm_end),
            ),
        ]
    }
}

/// The base address of the device whose queue-notify register a `kvm_mmio` line writes.
fn notified(line: &str) -> Option<u64> {
    let gpa = line.split("gpa 0x").nth(1)?.split(' ').next()?;
    let gpa = u64::from_str_radix(gpa, 16).ok()?;
    (gpa & 0xfff == QUEUE_NOTIFY).then_some(gpa & !0xfff)
}
