//! Rulers for benchmarks: the clock, what processors have been given to programs, and the kernel's trace events.
//!
//! In a lab with `--icount` one nanosecond is one instruction executed by anybody, on one processor. Guests execute
//! theirs between `kvm_entry` and `kvm_exit`. Histograms and traces cost instructions themselves: what is measured with
//! them is measured in a pass of its own.
//! Spec: the kernel's Documentation/trace/{ftrace,events,histogram}.rst and Documentation/scheduler/sched-stats.rst.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use rustix::time::{ClockId, clock_gettime};

/// The monotonic clock in nanoseconds; under `--icount`, instructions since the lab was started.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000
        + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Nanoseconds in which this host's processors have executed anything, from the host's boot; not those in which they
/// waited. A turn that has not ended yet does not count, so not this one.
pub fn executed() -> u64 {
    let text = fs::read_to_string("/proc/schedstat").unwrap_or_default();
    let time = |line: &str| -> Option<u64> {
        let mut fields = line.split_whitespace();
        fields.next()?.strip_prefix("cpu")?;
        fields.nth(6)?.parse().ok()
    };
    text.lines().filter_map(time).sum()
}

/// Millions with one digit.
pub fn millions(count: u64) -> String {
    let tenths = count / 100_000;
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// The kernel's trace file system.
#[derive(Debug)]
pub struct Trace {
    root: PathBuf,
}

/// What a piece of work consisted of.
#[derive(Debug, Default)]
pub struct Shares {
    /// VM exits of all guests.
    pub exits: u64,
    /// Nanoseconds that guests executed.
    pub guest_ns: u64,
    /// Nanoseconds by the name of the thread; a virtual processor's thread with its guest.
    pub threads: Vec<(String, u64)>,
}

impl Trace {
    /// Finds the trace file system, which the lab mounts.
    pub fn open() -> io::Result<Self> {
        let root = PathBuf::from("/sys/kernel/tracing");
        let trace = Self { root };
        trace.write("trace_clock", "mono")?;
        Ok(trace)
    }

    /// Writes to one of its files; a trigger is added to those that are there.
    pub fn write(&self, file: &str, text: &str) -> io::Result<()> {
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
    pub fn exits_by_reason(
        &self,
        work: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<BTreeMap<String, u64>> {
        let histogram = "keys=exit_reason:size=256";
        let ((), rows) = self.histogram("kvm/kvm_exit", histogram, work)?;
        let named = |row: Row| {
            let number: Option<u64> = row.key.parse().ok();
            (number.map_or(row.key, reason), row.hits)
        };
        Ok(rows.into_iter().map(named).collect())
    }

    /// A histogram of an event while `work` runs.
    fn histogram<T>(
        &self,
        event: &str,
        histogram: &str,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<(T, Vec<Row>)> {
        let trigger = format!("events/{event}/trigger");
        self.write(&trigger, &format!("hist:{histogram}"))?;
        let result = work();
        let text = fs::read_to_string(self.root.join(format!("events/{event}/hist")));
        self.write(&trigger, &format!("!hist:{histogram}"))?;
        Ok((result?, rows(&text?)))
    }

    /// Runs `work` and parts it. One guest may run at a time: the host has one processor.
    pub fn shares(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<Shares> {
        // Room for the exits of many guests: nothing reads the buffer meanwhile.
        self.write("buffer_size_kb", "65536")?;
        let threads = "keys=comm:vals=runtime:size=4096";
        let events = ["kvm/kvm_entry", "kvm/kvm_exit"].map(|event| (event, String::new()));
        let ((_, text), rows) = self.histogram("sched/sched_stat_runtime", threads, || {
            self.traced(&events, work)
        })?;
        let mut threads: Vec<_> = rows.into_iter().map(|row| (row.key, row.sum)).collect();
        threads.sort_by_key(|(_, ns)| std::cmp::Reverse(*ns));
        let mut shares = Shares {
            threads,
            ..Shares::default()
        };
        let mut entry = None;
        for line in text.lines() {
            if let Some((at, _)) = lines(line, "kvm_entry:").next() {
                entry = Some(at);
            } else if let Some((at, _)) = lines(line, "kvm_exit:").next() {
                shares.exits += 1;
                shares.guest_ns += entry.take().map_or(0, |entry| at.saturating_sub(entry));
            }
        }
        Ok(shares)
    }

    /// Runs `work` and returns what it did with the text of these events, each with a filter or without.
    pub fn traced<T>(
        &self,
        events: &[(&str, String)],
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<(T, String)> {
        self.write("trace", "")?;
        for (event, filter) in events {
            if !filter.is_empty() {
                self.write(&format!("events/{event}/filter"), filter)?;
            }
            self.write(&format!("events/{event}/enable"), "1")?;
        }
        let result = work();
        for (event, _) in events {
            self.write(&format!("events/{event}/enable"), "0")?;
            self.write(&format!("events/{event}/filter"), "0")?;
        }
        let text = fs::read_to_string(self.root.join("trace"))?;
        Ok((result?, text))
    }
}

/// Time in nanoseconds and text of each line of an event: `  task-12 [000] d..1. 12.345678: event: text`.
pub fn lines<'t>(text: &'t str, event: &'t str) -> impl Iterator<Item = (u64, &'t str)> {
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

/// A row of a histogram.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    key: String,
    hits: u64,
    /// Of the value that it sums up, if it does.
    sum: u64,
}

/// `{ exit_reason: 78 } hitcount: 12` lines, with the field's own rendering of the key; another value's sum may follow.
fn rows(text: &str) -> Vec<Row> {
    let row = |line: &str| {
        let (key, counts) = line.strip_prefix('{')?.split_once("} hitcount:")?;
        let mut numbers = counts
            .split_whitespace()
            .filter_map(|word| word.parse().ok());
        Some(Row {
            key: key.split_once(':')?.1.trim().to_owned(),
            hits: numbers.next()?,
            sum: numbers.next().unwrap_or(0),
        })
    };
    text.lines().filter_map(row).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_read_by_its_rows() {
        let text = "# event histogram\n\n{ comm: caisson-vmm                                       } hitcount:         12  runtime:    3456\n\
                    { exit_reason:         78 } hitcount:          3\n\nTotals:\n    Hits: 15\n";
        let row = |key: &str, hits, sum| Row {
            key: key.to_owned(),
            hits,
            sum,
        };
        assert_eq!(rows(text), [row("caisson-vmm", 12, 3456), row("78", 3, 0)]);
    }

    #[test]
    fn a_line_of_a_trace_has_its_time_in_nanoseconds() {
        let text = "    vcpu0-812     [000] d..1.   12.345678: kvm_exit: vcpu 0 reason hlt\n";
        let found: Vec<_> = lines(text, "kvm_exit:").collect();
        assert_eq!(found, [(12_345_678_000, " vcpu 0 reason hlt")]);
    }
}
