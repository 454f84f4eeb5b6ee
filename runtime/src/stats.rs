//! What a cgroup v2 uses and may use, in the shape in which `runc events` prints it.
//!
//! Contract: [`Stats::parse`] takes the texts of a cgroup's control files, of the guest's kernel or of the host's, and
//! believes nothing: a text that is not what the kernel writes there is an error, names are short and plain, lists are
//! bounded. A file that is missing (no such controller) counts as zero.
//! As in runc, swap includes memory, and what cgroup v2 does not count is zero.
//! Not here: reading the files (`sandbox/inquiry.rs`, `cgroup.rs`).
//! Spec: kernel Documentation/admin-guide/cgroup-v2.rst; runc 1.1, types/events.go.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

/// The files that are read.
pub const FILES: &[&str] = &[
    "cpu.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "pids.current",
    "pids.max",
    "io.stat",
    "hugetlb.2MB.current",
    "hugetlb.2MB.max",
    "hugetlb.2MB.events",
    "hugetlb.1GB.current",
    "hugetlb.1GB.max",
    "hugetlb.1GB.events",
];

/// The most lines of a file.
const MAX_LINES: usize = 256;
/// The longest name of a counter, in bytes.
const MAX_NAME_BYTES: usize = 64;
const NANOSECONDS: u64 = 1_000;

/// A text that no kernel writes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file} of the container's cgroup makes no sense")]
pub struct StatsError {
    file: String,
}

/// A control file's text by its name.
pub type Files = HashMap<String, String>;

/// Everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// Time on CPUs.
    pub cpu: Cpu,
    /// Counted by cgroup v1 only.
    pub cpuset: Cpuset,
    /// Memory.
    pub memory: Memory,
    /// Processes.
    pub pids: Pids,
    /// Disks.
    pub blkio: Blkio,
    /// Huge pages by size.
    pub hugetlb: BTreeMap<String, Hugetlb>,
    /// Nothing in a virtual machine.
    pub intel_rdt: Empty,
    /// As in runc: only for interfaces that it made itself, which are none.
    pub network_interfaces: Option<Vec<Empty>>,
}

/// An object without members.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// `cpu`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// Used.
    pub usage: CpuUsage,
    /// Held back.
    pub throttling: Throttling,
}

/// Times in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuUsage {
    /// Both.
    #[serde(skip_serializing_if = "is_zero")]
    pub total: u64,
    /// In the kernel.
    pub kernel: u64,
    /// In programs.
    pub user: u64,
}

/// By a quota.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Throttling {
    /// Periods that have passed.
    #[serde(skip_serializing_if = "is_zero")]
    pub periods: u64,
    /// In so many the quota was used up.
    #[serde(skip_serializing_if = "is_zero")]
    pub throttled_periods: u64,
    /// Waited, in nanoseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub throttled_time: u64,
}

/// `cpuset`, whose members cgroup v2 does not have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "always zero; the names are cgroup v1's files")]
pub struct Cpuset {
    pub cpu_exclusive: u64,
    pub mem_hardwall: u64,
    pub mem_exclusive: u64,
    pub memory_migrate: u64,
    pub memory_spread_page: u64,
    pub memory_spread_slab: u64,
    pub memory_pressure: u64,
    pub sched_load_balance: u64,
    pub sched_relax_domain_level: i64,
}

/// `memory`, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Of files.
    #[serde(skip_serializing_if = "is_zero")]
    pub cache: u64,
    /// All of it.
    pub usage: Amount,
    /// Memory and swap together.
    pub swap: Amount,
    /// Not counted apart.
    pub kernel: Amount,
    /// Not counted apart.
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: Amount,
    /// `memory.stat`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub raw: BTreeMap<String, u64>,
    /// Processes that the kernel has killed for want of memory. Not printed: runc has no such member.
    #[serde(skip_serializing)]
    pub oom_kills: u64,
}

/// An amount of memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Amount {
    /// Allowed; 2^64-1 is no limit.
    pub limit: u64,
    /// Now.
    #[serde(skip_serializing_if = "is_zero")]
    pub usage: u64,
    /// At most so far.
    #[serde(skip_serializing_if = "is_zero")]
    pub max: u64,
    /// How often the limit was met.
    pub failcnt: u64,
}

/// `pids`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// Now.
    #[serde(skip_serializing_if = "is_zero")]
    pub current: u64,
    /// Allowed; 0 is no limit.
    #[serde(skip_serializing_if = "is_zero")]
    pub limit: u64,
}

/// `blkio`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Blkio {
    /// Bytes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_service_bytes_recursive: Vec<BlkioEntry>,
    /// Operations.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub io_serviced_recursive: Vec<BlkioEntry>,
}

/// A number for one disk and one direction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct BlkioEntry {
    #[serde(skip_serializing_if = "is_zero")]
    pub major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub minor: u64,
    pub op: String,
    #[serde(skip_serializing_if = "is_zero")]
    pub value: u64,
}

/// `hugetlb`, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "as in `Amount`")]
pub struct Hugetlb {
    #[serde(skip_serializing_if = "is_zero")]
    pub usage: u64,
    pub failcnt: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The files again, with the file's name at hand for the error.
struct Reader<'a>(&'a Files);

impl<'a> Reader<'a> {
    fn text(&self, file: &str) -> &'a str {
        self.0.get(file).map_or("", String::as_str)
    }

    fn nonsense(file: &str) -> StatsError {
        StatsError {
            file: file.to_owned(),
        }
    }

    /// A file of one number, or `max`, or nothing.
    fn number(&self, file: &str) -> Result<u64, StatsError> {
        match self.text(file).trim_end() {
            "" => Ok(0),
            "max" => Ok(u64::MAX),
            text => text.parse().map_err(|_| Self::nonsense(file)),
        }
    }

    /// A file of lines `name number`.
    fn table(&self, file: &str) -> Result<BTreeMap<String, u64>, StatsError> {
        let mut table = BTreeMap::new();
        for line in self.text(file).lines() {
            let (name, number) = line
                .split_once(' ')
                .filter(|(name, _)| is_name(name))
                .ok_or_else(|| Self::nonsense(file))?;
            let number = number.parse().map_err(|_| Self::nonsense(file))?;
            table.insert(name.to_owned(), number);
            if table.len() > MAX_LINES {
                return Err(Self::nonsense(file));
            }
        }
        Ok(table)
    }
}

fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.';
    (1..=MAX_NAME_BYTES).contains(&text.len()) && text.bytes().all(plain)
}

impl Stats {
    /// Understands a cgroup's files.
    pub fn parse(files: &Files) -> Result<Self, StatsError> {
        let files = Reader(files);
        Ok(Self {
            cpu: Cpu::parse(&files)?,
            memory: Memory::parse(&files)?,
            pids: Pids {
                current: files.number("pids.current")?,
                limit: Some(files.number("pids.max")?)
                    .filter(|&limit| limit != u64::MAX)
                    .unwrap_or(0),
            },
            blkio: Blkio::parse(&files)?,
            hugetlb: hugetlb(&files)?,
            ..Self::default()
        })
    }
}

impl Cpu {
    fn parse(files: &Reader<'_>) -> Result<Self, StatsError> {
        let stat = files.table("cpu.stat")?;
        let number = |name: &str| stat.get(name).copied().unwrap_or(0);
        let time = |name: &str| number(name).saturating_mul(NANOSECONDS);
        Ok(Self {
            usage: CpuUsage {
                total: time("usage_usec"),
                kernel: time("system_usec"),
                user: time("user_usec"),
            },
            throttling: Throttling {
                periods: number("nr_periods"),
                throttled_periods: number("nr_throttled"),
                throttled_time: time("throttled_usec"),
            },
        })
    }
}

impl Memory {
    fn parse(files: &Reader<'_>) -> Result<Self, StatsError> {
        let raw = files.table("memory.stat")?;
        let events = files.table("memory.events")?;
        let event = |name: &str| events.get(name).copied().unwrap_or(0);
        let usage = Amount {
            limit: files.number("memory.max")?,
            usage: files.number("memory.current")?,
            max: files.number("memory.peak")?,
            failcnt: event("max"),
        };
        // Without a file there is no swap to be limited.
        let swap_limit = files.number("memory.swap.max")?;
        let swap = Amount {
            limit: swap_limit.saturating_add(usage.limit),
            usage: files
                .number("memory.swap.current")?
                .saturating_add(usage.usage),
            ..Amount::default()
        };
        Ok(Self {
            cache: raw.get("file").copied().unwrap_or(0),
            usage,
            swap,
            oom_kills: event("oom_kill"),
            raw,
            ..Self::default()
        })
    }
}

impl Blkio {
    /// Lines such as `254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
    fn parse(files: &Reader<'_>) -> Result<Self, StatsError> {
        const FILE: &str = "io.stat";
        let nonsense = || Reader::nonsense(FILE);
        let number = |text: &str| text.parse::<u64>().map_err(|_| nonsense());
        let mut blkio = Self::default();
        for (index, line) in files.text(FILE).lines().enumerate() {
            let mut words = line.split_whitespace();
            let (major, minor) = words
                .next()
                .and_then(|device| device.split_once(':'))
                .filter(|_| index < MAX_LINES / 4)
                .ok_or_else(nonsense)?;
            let (major, minor) = (number(major)?, number(minor)?);
            for word in words {
                let (name, value) = word.split_once('=').ok_or_else(nonsense)?;
                let (list, op) = match name {
                    "rbytes" => (&mut blkio.io_service_bytes_recursive, "Read"),
                    "wbytes" => (&mut blkio.io_service_bytes_recursive, "Write"),
                    "rios" => (&mut blkio.io_serviced_recursive, "Read"),
                    "wios" => (&mut blkio.io_serviced_recursive, "Write"),
                    _ => continue,
                };
                list.push(BlkioEntry {
                    major,
                    minor,
                    op: op.to_owned(),
                    value: number(value)?,
                });
            }
        }
        Ok(blkio)
    }
}

fn hugetlb(files: &Reader<'_>) -> Result<BTreeMap<String, Hugetlb>, StatsError> {
    let mut all = BTreeMap::new();
    for size in ["1GB", "2MB"] {
        if files.0.contains_key(&format!("hugetlb.{size}.current")) {
            let events = files.table(&format!("hugetlb.{size}.events"))?;
            let entry = Hugetlb {
                usage: files.number(&format!("hugetlb.{size}.current"))?,
                failcnt: events.get("max").copied().unwrap_or(0),
            };
            all.insert(size.to_owned(), entry);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(texts: &[(&str, &str)]) -> Files {
        let pair = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        texts.iter().map(pair).collect()
    }

    #[test]
    fn a_kernels_texts_become_runcs_numbers() {
        let stats = Stats::parse(&files(&[
            ("cpu.stat", "usage_usec 552277\nuser_usec 185721\nsystem_usec 366555\nnr_periods 2\nthrottled_usec 3\n"),
            ("memory.current", "331776\n"),
            ("memory.max", "max\n"),
            ("memory.swap.max", "max\n"),
            ("memory.swap.current", "1\n"),
            ("memory.stat", "anon 53248\nfile 7\n"),
            ("memory.events", "low 0\nmax 4\noom_kill 2\n"),
            ("pids.current", "1\n"),
            ("pids.max", "max\n"),
            ("io.stat", "254:0 rbytes=4096 wbytes=8 rios=1 wios=2 dbytes=0 dios=0\n254:16\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.events", "max 5\n"),
        ]))
        .unwrap();
        assert_eq!(stats.memory.oom_kills, 2);
        let shown = serde_json::to_value(&stats).unwrap();
        assert_eq!(
            shown["cpu"],
            serde_json::json!({"usage": {"total": 552_277_000, "kernel": 366_555_000, "user": 185_721_000},
                               "throttling": {"periods": 2, "throttledTime": 3_000}})
        );
        assert_eq!(shown["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(shown["memory"]["usage"]["failcnt"], 4);
        assert_eq!(shown["memory"]["swap"]["usage"], 331_777);
        assert_eq!(shown["memory"]["swap"]["limit"], u64::MAX);
        assert_eq!(shown["memory"]["cache"], 7);
        assert!(shown["memory"].get("oom_kills").is_none());
        assert_eq!(shown["pids"], serde_json::json!({"current": 1}));
        assert_eq!(
            shown["blkio"]["ioServiceBytesRecursive"][1],
            serde_json::json!({"major": 254, "op": "Write", "value": 8})
        );
        assert_eq!(shown["hugetlb"], serde_json::json!({"2MB": {"failcnt": 5}}));
        assert_eq!(shown["network_interfaces"], serde_json::Value::Null);
    }

    #[test]
    fn what_no_kernel_writes_is_refused_by_name() {
        let long = "x 1\n".to_owned() + &(0..300).map(|n| format!("n{n} 1\n")).collect::<String>();
        for (name, text) in [
            ("memory.current", "-1\n"),
            ("memory.max", "a\x1b[1m\n"),
            ("memory.stat", "anon\n"),
            ("memory.stat", "a\"b 1\n"),
            ("memory.stat", long.as_str()),
            ("io.stat", "x:y rbytes=1\n"),
            ("io.stat", "1:1 rbytes\n"),
            ("pids.current", "99999999999999999999999\n"),
        ] {
            let error = Stats::parse(&files(&[(name, text)])).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("{name} of the container's cgroup makes no sense")
            );
        }
    }

    #[test]
    fn a_cgroup_without_controllers_uses_nothing() {
        assert_eq!(Stats::parse(&Files::new()), Ok(Stats::default()));
    }

    #[test]
    fn what_is_passed_on_between_processes_stays_the_same_but_for_what_is_not_shown() {
        let stats = Stats::parse(&files(&[
            ("cpu.stat", "usage_usec 5\n"),
            ("memory.stat", "anon 1\n"),
        ]));
        let stats = stats.unwrap();
        let text = serde_json::to_string(&stats).unwrap();
        assert_eq!(serde_json::from_str::<Stats>(&text).unwrap(), stats);
    }
}
