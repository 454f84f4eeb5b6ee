//! What a start spends its time on: a reading of the clock at the end of each step.
//!
//! Contract: readings are of `CLOCK_MONOTONIC`, which all processes of a host share, and cost a few dozen nanoseconds
//! each; a trace is kept in memory while a container is created, written once when that is done and continued once when
//! it is started, to [`FILE`] in the container's directory. Nothing depends on it: a trace that cannot be written is lost.
//! A step lasts from the reading before to its own: the start is one sequence, whichever process goes on with it.
//! The file: one array of readings a line, in the order of time.
//! Not here: how a trace is shown (`commands/trace.rs`).

use std::{
    borrow::Cow,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The file's name.
pub const FILE: &str = "trace.json";

/// The longest trace that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// When this process began, in nanoseconds; zero until [`begin`].
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// Whose step it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// Nobody: it waits to be told to go on.
    Waiting,
    /// The command, `create`, `run` or `start`.
    Command,
    /// The process that holds the sandbox: the monitor or the shim.
    Holder,
    /// The virtual machine: VMM, kernel and agent.
    Machine,
}

/// The end of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Whose.
    pub who: Who,
    /// Which.
    pub what: Cow<'static, str>,
    /// When, in nanoseconds.
    pub at_ns: u64,
}

/// The steps of a start so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Trace(pub Vec<Mark>);

/// Notes that this process begins.
pub fn begin() {
    BEGUN.store(now_ns(), Ordering::Relaxed);
}

impl Trace {
    /// With this process's beginning as the first reading.
    pub fn of_process(who: Who) -> Self {
        let mut trace = Self::default();
        let begun = BEGUN.load(Ordering::Relaxed);
        trace.at(who, "begin", if begun == 0 { now_ns() } else { begun });
        trace
    }

    /// A step has ended just now.
    pub fn mark(&mut self, who: Who, what: &'static str) {
        self.at(who, what, now_ns());
    }

    /// A step has ended just now whose inner steps another process has read the clock for, as far as it came. Their
    /// readings are put in order, after the step before and before now: what that process says is not relied on.
    pub fn mark_between(
        &mut self,
        who: Who,
        inner: &[(&'static str, Option<u64>)],
        last: &'static str,
    ) {
        let now = now_ns();
        let mut from = self.0.last().map_or(now, |mark| mark.at_ns);
        for (what, at_ns) in inner {
            if let Some(at_ns) = at_ns {
                from = (*at_ns).min(now).max(from);
                self.at(who, what, from);
            }
        }
        self.at(who, last, now.max(from));
    }

    fn at(&mut self, who: Who, what: &'static str, at_ns: u64) {
        self.0.push(Mark {
            who,
            what: Cow::Borrowed(what),
            at_ns,
        });
    }

    /// Writes it to a container's directory, after what is there.
    pub fn append(&self, dir: &Path) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(dir.join(FILE))?;
        file.write_all(&line)
    }

    /// Reads what is in a container's directory, in the order of time.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let file = File::open(dir.join(FILE))?;
        let mut all = Vec::new();
        for line in BufReader::new(file.take(MAX_BYTES)).lines() {
            let Self(marks) = serde_json::from_str(&line?)?;
            all.extend(marks);
        }
        all.sort_by_key(|mark| mark.at_ns);
        Ok(Self(all))
    }

    /// Each step with its beginning and its length, in nanoseconds from the first reading.
    pub fn steps(&self) -> impl Iterator<Item = (&Mark, u64, u64)> {
        let first = self.0.first().map_or(0, |mark| mark.at_ns);
        self.0
            .iter()
            .zip(self.0.iter().skip(1))
            .map(move |(before, mark)| {
                let began = before.at_ns.saturating_sub(first);
                (mark, began, mark.at_ns.saturating_sub(before.at_ns))
            })
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock counts from the boot of the host: neither part is ever negative.
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0) * 1_000_000_000 + nanoseconds.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_continued_and_read_in_the_order_of_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut create = Trace::default();
        create.at(Who::Command, "begin", 100);
        create.at(Who::Holder, "check the bundle", 250);
        create.append(dir.path()).unwrap();
        let mut start = Trace::default();
        start.at(Who::Waiting, "wait for start", 1000);
        start.at(Who::Machine, "start the program", 1100);
        start.append(dir.path()).unwrap();
        let trace = Trace::read(dir.path()).unwrap();
        let steps: Vec<_> = trace
            .steps()
            .map(|(mark, began, took)| (mark.what.as_ref(), began, took))
            .collect();
        assert_eq!(
            steps,
            [
                ("check the bundle", 0, 150),
                ("wait for start", 150, 750),
                ("start the program", 900, 100),
            ]
        );
    }

    #[test]
    fn the_clock_does_not_go_back() {
        let mut trace = Trace::of_process(Who::Holder);
        trace.mark(Who::Holder, "a");
        trace.mark(Who::Holder, "b");
        assert!(trace.0.is_sorted_by_key(|mark| mark.at_ns));
    }

    #[test]
    fn inner_steps_stay_inside_whatever_their_readings_say() {
        let mut trace = Trace::default();
        trace.at(Who::Holder, "before", 1000);
        let inner = [
            ("early", Some(1)),
            ("missing", None),
            ("fits", Some(2000)),
            ("goes back", Some(1500)),
            ("late", Some(u64::MAX)),
        ];
        trace.mark_between(Who::Machine, &inner, "last");
        let told: Vec<_> = trace.0.iter().map(|mark| mark.what.as_ref()).collect();
        assert_eq!(
            told,
            ["before", "early", "fits", "goes back", "late", "last"]
        );
        assert!(trace.0.is_sorted_by_key(|mark| mark.at_ns));
        assert_eq!(trace.0[2].at_ns, 2000);
        assert!(trace.0[4].at_ns <= now_ns());
    }

    #[test]
    fn a_broken_trace_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Trace::read(dir.path()).is_err());
        std::fs::write(dir.path().join(FILE), "[{]\n").unwrap();
        assert!(Trace::read(dir.path()).is_err());
    }
}
