//! What cgroup v1 counts, in the words of cgroup v2, so that one parser understands both: a pure function of texts.
//!
//! Contract: a file that is missing stays missing; what is no number is passed on for the parser to refuse.

use std::collections::{BTreeMap, HashMap};

use crate::stats::Files;

/// The files that are read.
pub(super) const FILES: &[&str] = &[
    "cpu.stat",
    "cpuacct.stat",
    "cpuacct.usage",
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.limit_in_bytes",
    "memory.failcnt",
    "memory.oom_control",
    "memory.stat",
    "memory.memsw.usage_in_bytes",
    "memory.memsw.limit_in_bytes",
    "pids.current",
    "pids.max",
    "blkio.throttle.io_service_bytes_recursive",
    "blkio.throttle.io_serviced_recursive",
    "hugetlb.2MB.usage_in_bytes",
    "hugetlb.2MB.failcnt",
    "hugetlb.1GB.usage_in_bytes",
    "hugetlb.1GB.failcnt",
];

/// The unit of `cpuacct.stat`, in microseconds: Linux has 100 ticks a second for user space.
const TICK_US: u64 = 10_000;

/// From here on a limit is none: cgroup v1 writes the largest multiple of a page.
const UNLIMITED: u64 = i64::MAX.cast_unsigned() & !0xffff;

type Texts<'a> = HashMap<&'a str, String>;

/// The texts of cgroup v2's files.
pub(super) fn translate(texts: &Texts<'_>) -> Files {
    let mut files = Files::new();
    let mut put = |name: &str, text: Option<String>| {
        if let Some(text) = text {
            files.insert(name.to_owned(), text);
        }
    };
    put("cpu.stat", cpu(texts));
    for (new, old) in [
        ("memory.current", "memory.usage_in_bytes"),
        ("memory.peak", "memory.max_usage_in_bytes"),
        ("pids.current", "pids.current"),
        ("pids.max", "pids.max"),
        ("hugetlb.2MB.current", "hugetlb.2MB.usage_in_bytes"),
        ("hugetlb.1GB.current", "hugetlb.1GB.usage_in_bytes"),
    ] {
        put(new, texts.get(old).cloned());
    }
    for (new, old) in [
        ("hugetlb.2MB.events", "hugetlb.2MB.failcnt"),
        ("hugetlb.1GB.events", "hugetlb.1GB.failcnt"),
    ] {
        put(new, texts.get(old).map(|text| format!("max {text}")));
    }
    put("memory.max", limit(texts, "memory.limit_in_bytes"));
    put("memory.events", events(texts));
    put("memory.stat", memory(texts));
    let (used, both) = (
        number(texts, "memory.usage_in_bytes"),
        number(texts, "memory.memsw.usage_in_bytes"),
    );
    let swap = both.map(|both| both.saturating_sub(used.unwrap_or(0)).to_string());
    put("memory.swap.current", swap);
    put("memory.swap.max", swap_limit(texts));
    put("io.stat", disks(texts));
    files
}

fn number(texts: &Texts<'_>, file: &str) -> Option<u64> {
    texts.get(file)?.trim().parse().ok()
}

/// A line `name number` of a file.
fn entry(texts: &Texts<'_>, file: &str, name: &str) -> Option<u64> {
    let line = |line: &str| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    };
    texts.get(file)?.lines().find_map(line)
}

fn cpu(texts: &Texts<'_>) -> Option<String> {
    let used = number(texts, "cpuacct.usage")?;
    let ticks = |name| {
        entry(texts, "cpuacct.stat", name)
            .unwrap_or(0)
            .saturating_mul(TICK_US)
    };
    let stat = |name| entry(texts, "cpu.stat", name).unwrap_or(0);
    Some(format!(
        "usage_usec {}\nuser_usec {}\nsystem_usec {}\nnr_periods {}\nnr_throttled {}\nthrottled_usec {}\n",
        used / 1000,
        ticks("user"),
        ticks("system"),
        stat("nr_periods"),
        stat("nr_throttled"),
        stat("throttled_time") / 1000,
    ))
}

fn limit(texts: &Texts<'_>, file: &str) -> Option<String> {
    let text = texts.get(file)?;
    let none = text
        .trim()
        .parse::<u64>()
        .is_ok_and(|bytes| bytes >= UNLIMITED);
    Some(if none { "max".to_owned() } else { text.clone() })
}

/// Both together in cgroup v1, apart in cgroup v2.
fn swap_limit(texts: &Texts<'_>) -> Option<String> {
    let both = number(texts, "memory.memsw.limit_in_bytes")?;
    let memory = number(texts, "memory.limit_in_bytes").unwrap_or(0);
    Some(if both >= UNLIMITED {
        "max".to_owned()
    } else {
        both.saturating_sub(memory).to_string()
    })
}

fn events(texts: &Texts<'_>) -> Option<String> {
    let met = number(texts, "memory.failcnt")?;
    let kills = entry(texts, "memory.oom_control", "oom_kill").unwrap_or(0);
    Some(format!("max {met}\noom_kill {kills}\n"))
}

/// cgroup v1's own table; what it calls `cache`, the parser looks for as `file`.
fn memory(texts: &Texts<'_>) -> Option<String> {
    let text = texts.get("memory.stat")?;
    let cache = entry(texts, "memory.stat", "cache").unwrap_or(0);
    Some(format!("{}\nfile {cache}\n", text.trim_end()))
}

fn disks(texts: &Texts<'_>) -> Option<String> {
    let mut disks: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
    for (file, names) in [
        (
            "blkio.throttle.io_service_bytes_recursive",
            ["rbytes", "wbytes", "dbytes"],
        ),
        (
            "blkio.throttle.io_serviced_recursive",
            ["rios", "wios", "dios"],
        ),
    ] {
        for line in texts.get(file)?.lines() {
            let mut words = line.split(' ');
            let (Some(disk), Some(kind), Some(count)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let place = ["Read", "Write", "Discard"].iter().position(|k| *k == kind);
            if let Some(name) = place.and_then(|place| names.get(place)) {
                disks.entry(disk).or_default().insert(name, count);
            }
        }
    }
    let mut text = String::new();
    for (disk, counts) in disks {
        text.push_str(disk);
        for (name, count) in counts {
            text.push_str(&format!(" {name}={count}"));
        }
        text.push('\n');
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Stats;

    fn texts(all: &[(&'static str, &str)]) -> Texts<'static> {
        all.iter()
            .map(|(name, text)| (*name, (*text).to_owned()))
            .collect()
    }

    #[test]
    fn the_parser_of_cgroup_v2_understands_the_first_versions_counters() {
        let files = translate(&texts(&[
            ("cpuacct.usage", "5000000\n"),
            ("cpuacct.stat", "user 3\nsystem 2\n"),
            (
                "cpu.stat",
                "nr_periods 7\nnr_throttled 1\nthrottled_time 9000\n",
            ),
            ("memory.usage_in_bytes", "4096\n"),
            ("memory.max_usage_in_bytes", "8192\n"),
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.failcnt", "4\n"),
            (
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            ),
            ("memory.stat", "cache 100\nrss 20\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "blkio.throttle.io_service_bytes_recursive",
                "8:0 Read 10\n8:0 Write 20\n8:0 Total 30\nTotal 30\n",
            ),
            (
                "blkio.throttle.io_serviced_recursive",
                "8:0 Read 1\nTotal 1\n",
            ),
        ]));
        let stats = Stats::parse(&files).unwrap();
        let cpu = &stats.cpu;
        assert_eq!((cpu.usage.total, cpu.usage.user), (5_000_000, 30_000_000));
        assert_eq!(
            (cpu.throttling.periods, cpu.throttling.throttled_time),
            (7, 9000)
        );
        let memory = &stats.memory;
        assert_eq!((memory.usage.usage, memory.usage.max), (4096, 8192));
        assert_eq!((memory.usage.limit, memory.usage.failcnt), (u64::MAX, 4));
        assert_eq!((memory.cache, memory.oom_kills), (100, 2));
        assert_eq!(stats.pids.current, 3);
        assert!(
            stats
                .blkio
                .io_service_bytes_recursive
                .iter()
                .any(|entry| entry.value == 20)
        );
    }

    #[test]
    fn swap_is_what_both_have_beyond_memory() {
        let files = translate(&texts(&[
            ("memory.usage_in_bytes", "100"),
            ("memory.limit_in_bytes", "1000"),
            ("memory.memsw.usage_in_bytes", "150"),
            ("memory.memsw.limit_in_bytes", "1500"),
        ]));
        assert_eq!(files["memory.swap.current"], "50");
        assert_eq!(files["memory.swap.max"], "500");
        assert!(translate(&texts(&[])).is_empty());
    }
}
