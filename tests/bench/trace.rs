//! Kernel trace events as rulers: VM exits by reason, and the marks between the phases of a start.
//!
//! Spec: the kernel's Documentation/trace/{ftrace,events,histogram}.rst.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use crate::subject::Run;

/// Offset of the queue-notify register of a virtio-mmio device (virtio 1.2, section 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// The kernel's trace file system.
#[derive(Debug)]
pub(crate) struct Trace {
    root: PathBuf,
}

/// Moments of one run, in nanoseconds of the monotonic clock.
#[derive(Debug)]
pub(crate) struct Marks {
    run: Run,
    vmm: u64,
    entry: u64,
    agent: u64,
    vmm_end: u64,
}

impl Trace {
    /// Finds the trace file system, which the lab mounts.
    pub(crate) fn open() -> io::Result<Self> {
        let root = PathBuf::from("/sys/kernel/tracing");
        let trace = Self { root };
        trace.write("trace_clock", "mono")?;
        Ok(trace)
    }

    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        let path = self.root.join(file);
        let mut options = fs::OpenOptions::new();
        let file = options
            .write(true)
            .truncate(!file.ends_with("trigger"))
            .open(&path);
        file.and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
            .map_err(|e| io::Error::other(format!("write {text:?} to {}: {e}", path.display())))
    }

    /// Counts VM exits of every guest while `work` runs.
    pub(crate) fn exits_by_reason(
        &self,
        work: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<BTreeMap<String, u64>> {
        let histogram = "hist:keys=exit_reason:size=256";
        self.write("events/kvm/kvm_exit/trigger", histogram)?;
        let result = work();
        let text = fs::read_to_string(self.root.join("events/kvm/kvm_exit/hist"));
        self.write("events/kvm/kvm_exit/trigger", &format!("!{histogram}"))?;
        result?;
        Ok(parse_histogram(&text?))
    }

    /// Runs `work` and finds the marks of the VM that it starts.
    pub(crate) fn marks(
        &self,
        entry: u64,
        work: impl FnOnce() -> io::Result<Run>,
    ) -> io::Result<Marks> {
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
        self.write("trace", "")?;
        for (event, filter) in &events {
            self.write(&format!("events/{event}/filter"), filter)?;
            self.write(&format!("events/{event}/enable"), "1")?;
        }
        let run = work();
        for (event, _) in &events {
            self.write(&format!("events/{event}/enable"), "0")?;
            self.write(&format!("events/{event}/filter"), "0")?;
        }
        let text = fs::read_to_string(self.root.join("trace"))?;
        let run = run?;
        Marks::find(run, &text)
            .ok_or_else(|| io::Error::other(format!("marks are missing in:\n{text}")))
    }
}

impl Marks {
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

/// Time in nanoseconds and text of each line of an event: `  task-12 [000] d..1. 12.345678: event: text`.
fn lines<'t>(text: &'t str, event: &'t str) -> impl Iterator<Item = (u64, &'t str)> {
    text.lines().filter_map(move |line| {
        let (head, rest) = line.split_once(event)?;
        let time = head.trim_end().strip_suffix(':')?.rsplit(' ').next()?;
        let (seconds, micros) = time.split_once('.')?;
        let micros: u64 = micros.parse().ok()?;
        Some((
            seconds.parse::<u64>().ok()? * 1_000_000_000 + micros * 1000,
            rest,
        ))
    })
}

/// The base address of the device whose queue-notify register a `kvm_mmio` line writes.
fn notified(line: &str) -> Option<u64> {
    let gpa = line.split("gpa 0x").nth(1)?.split(' ').next()?;
    let gpa = u64::from_str_radix(gpa, 16).ok()?;
    (gpa & 0xfff == QUEUE_NOTIFY).then_some(gpa & !0xfff)
}

/// `{ exit_reason: 78 } hitcount: 12` lines, with the field's own rendering of the reason.
fn parse_histogram(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, count) = line.strip_prefix('{')?.split_once("} hitcount:")?;
            let key = key.split(':').nth(1)?.trim();
            let number: Option<u64> = key.parse().ok();
            Some((
                number.map_or(key.to_owned(), reason),
                count.trim().parse().ok()?,
            ))
        })
        .collect()
}

/// AMD's names of the exits that matter here (APM volume 2, appendix C).
fn reason(number: u64) -> String {
    match number {
        0x060 => "interrupt".into(),
        0x064 => "interrupt window".into(),
        0x072 => "cpuid".into(),
        0x078 => "hlt".into(),
        0x07b => "port".into(),
        0x07c => "msr".into(),
        0x400 => "nested page fault".into(),
        other => format!("{other:#x}"),
    }
}
