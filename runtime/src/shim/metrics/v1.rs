//! The message of cgroup v1, of a guest that has cgroup v2.
//!
//! Contract: pure. What both count under different names is here under v1's; the counters of v2 include the cgroups
//! below, so v1's `total_*` are the same numbers. No limit of memory is what v1's files say then; none of pids is 0.
//! Swap is with memory, in v1 as in [`Stats`].

use containerd_shim_protos::cgroups::metrics as v1;

use crate::stats::{Amount, BlkioEntry, Stats};

/// What a v1 kernel shows as a limit that is none: the largest number of pages, in bytes.
const NO_LIMIT_BYTES: u64 = 0x7fff_ffff_ffff_f000;

/// A container's numbers.
pub(super) fn message(stats: &Stats) -> v1::Metrics {
    let (usage, throttling) = (&stats.cpu.usage, &stats.cpu.throttling);
    let pages = stats.hugetlb.iter().map(|(size, pages)| v1::HugetlbStat {
        usage: pages.usage,
        failcnt: pages.failcnt,
        pagesize: size.clone(),
        ..Default::default()
    });
    v1::Metrics {
        hugetlb: pages.collect(),
        pids: Some(v1::PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(v1::CPUStat {
            usage: Some(v1::CPUUsage {
                total: usage.total,
                kernel: usage.kernel,
                user: usage.user,
                ..Default::default()
            })
            .into(),
            throttling: Some(v1::Throttle {
                periods: throttling.periods,
                throttled_periods: throttling.throttled_periods,
                throttled_time: throttling.throttled_time,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        memory: Some(memory(stats)).into(),
        blkio: Some(v1::BlkIOStat {
            io_service_bytes_recursive: entries(&stats.blkio.io_service_bytes_recursive),
            io_serviced_recursive: entries(&stats.blkio.io_serviced_recursive),
            ..Default::default()
        })
        .into(),
        memory_oom_control: Some(v1::MemoryOomControl {
            oom_kill: stats.memory.oom_kills,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn memory(stats: &Stats) -> v1::MemoryStat {
    let counted = |name: &str| stats.memory.raw.get(name).copied().unwrap_or(0);
    let (usage, swap) = (&stats.memory.usage, &stats.memory.swap);
    let mut told = v1::MemoryStat {
        cache: counted("file"),
        rss: counted("anon"),
        rss_huge: counted("anon_thp"),
        mapped_file: counted("file_mapped"),
        dirty: counted("file_dirty"),
        writeback: counted("file_writeback"),
        pg_fault: counted("pgfault"),
        pg_maj_fault: counted("pgmajfault"),
        inactive_anon: counted("inactive_anon"),
        active_anon: counted("active_anon"),
        inactive_file: counted("inactive_file"),
        active_file: counted("active_file"),
        unevictable: counted("unevictable"),
        hierarchical_memory_limit: limit(usage.limit),
        hierarchical_swap_limit: limit(swap.limit),
        usage: Some(entry(usage)).into(),
        swap: Some(entry(swap)).into(),
        kernel: Some(entry(&Amount {
            limit: u64::MAX,
            usage: counted("kernel"),
            ..Default::default()
        }))
        .into(),
        kernel_tcp: Some(entry(&Amount {
            limit: u64::MAX,
            usage: counted("sock"),
            ..Default::default()
        }))
        .into(),
        ..Default::default()
    };
    told.total_cache = told.cache;
    told.total_rss = told.rss;
    told.total_rss_huge = told.rss_huge;
    told.total_mapped_file = told.mapped_file;
    told.total_dirty = told.dirty;
    told.total_writeback = told.writeback;
    told.total_pg_fault = told.pg_fault;
    told.total_pg_maj_fault = told.pg_maj_fault;
    told.total_inactive_anon = told.inactive_anon;
    told.total_active_anon = told.active_anon;
    told.total_inactive_file = told.inactive_file;
    told.total_active_file = told.active_file;
    told.total_unevictable = told.unevictable;
    told
}

fn entry(amount: &Amount) -> v1::MemoryEntry {
    v1::MemoryEntry {
        limit: limit(amount.limit),
        usage: amount.usage,
        max: amount.max,
        failcnt: amount.failcnt,
        ..Default::default()
    }
}

fn limit(bytes: u64) -> u64 {
    bytes.min(NO_LIMIT_BYTES)
}

fn entries(all: &[BlkioEntry]) -> Vec<v1::BlkIOEntry> {
    let entry = |entry: &BlkioEntry| v1::BlkIOEntry {
        op: entry.op.clone(),
        major: entry.major,
        minor: entry.minor,
        value: entry.value,
        ..Default::default()
    };
    all.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_numbers_have_v1s_names_and_units() {
        let mut stats = Stats::default();
        stats.cpu.usage.total = 5_000;
        stats.cpu.throttling.throttled_time = 7;
        stats.memory.usage = Amount {
            limit: 1 << 20,
            usage: 10,
            max: 12,
            failcnt: 1,
        };
        stats.memory.swap.limit = u64::MAX;
        for (name, value) in [("anon", 7), ("inactive_file", 3), ("kernel", 2)] {
            stats.memory.raw.insert(name.to_owned(), value);
        }
        stats.memory.oom_kills = 2;
        stats.blkio.io_serviced_recursive = vec![BlkioEntry {
            major: 254,
            op: "Read".to_owned(),
            value: 11,
            ..Default::default()
        }];
        let told = message(&stats);
        assert_eq!(told.cpu.usage.total, 5_000);
        assert_eq!(told.cpu.throttling.throttled_time, 7);
        let memory = &told.memory;
        assert_eq!((memory.usage.limit, memory.usage.usage), (1 << 20, 10));
        assert_eq!((memory.usage.max, memory.usage.failcnt), (12, 1));
        assert_eq!((memory.rss, memory.total_rss), (7, 7));
        assert_eq!((memory.total_inactive_file, memory.kernel.usage), (3, 2));
        assert_eq!(memory.hierarchical_memory_limit, 1 << 20);
        // 2^63 less a page.
        assert_eq!(memory.swap.limit, (1 << 63) - 4096);
        assert_eq!(told.memory_oom_control.oom_kill, 2);
        let disk = told.blkio.io_serviced_recursive.first().unwrap();
        assert_eq!(
            (disk.major, disk.op.as_str(), disk.value),
            (254, "Read", 11)
        );
    }
}
