//! The message of cgroup v2.
//!
//! Contract: pure. As in the kernel's files, no limit is the largest number. Swap is without memory here, and with it in
//! [`Stats`], as in runc.

use std::collections::BTreeMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};

use crate::stats::{BlkioEntry, Stats};

/// Nanoseconds in a microsecond.
const NANOSECONDS: u64 = 1_000;

/// A container's numbers.
pub(super) fn message(stats: &Stats) -> Metrics {
    let cpu = &stats.cpu;
    let pages = stats.hugetlb.iter().map(|(size, pages)| HugeTlbStat {
        current: pages.usage,
        failcnt: pages.failcnt,
        pagesize: size.clone(),
        ..Default::default()
    });
    Metrics {
        pids: Some(PidsStat {
            current: stats.pids.current,
            limit: match stats.pids.limit {
                0 => u64::MAX,
                limit => limit,
            },
            ..Default::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: cpu.usage.total / NANOSECONDS,
            user_usec: cpu.usage.user / NANOSECONDS,
            system_usec: cpu.usage.kernel / NANOSECONDS,
            nr_periods: cpu.throttling.periods,
            nr_throttled: cpu.throttling.throttled_periods,
            throttled_usec: cpu.throttling.throttled_time / NANOSECONDS,
            ..Default::default()
        })
        .into(),
        memory: Some(memory(stats)).into(),
        io: Some(disks(stats)).into(),
        hugetlb: pages.collect(),
        memory_events: Some(MemoryEvents {
            max: stats.memory.usage.failcnt,
            oom_kill: stats.memory.oom_kills,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn memory(stats: &Stats) -> MemoryStat {
    let counted = |name: &str| stats.memory.raw.get(name).copied().unwrap_or(0);
    let (usage, swap) = (&stats.memory.usage, &stats.memory.swap);
    MemoryStat {
        anon: counted("anon"),
        file: counted("file"),
        kernel_stack: counted("kernel_stack"),
        slab: counted("slab"),
        sock: counted("sock"),
        shmem: counted("shmem"),
        file_mapped: counted("file_mapped"),
        file_dirty: counted("file_dirty"),
        file_writeback: counted("file_writeback"),
        anon_thp: counted("anon_thp"),
        inactive_anon: counted("inactive_anon"),
        active_anon: counted("active_anon"),
        inactive_file: counted("inactive_file"),
        active_file: counted("active_file"),
        unevictable: counted("unevictable"),
        slab_reclaimable: counted("slab_reclaimable"),
        slab_unreclaimable: counted("slab_unreclaimable"),
        pgfault: counted("pgfault"),
        pgmajfault: counted("pgmajfault"),
        usage: usage.usage,
        usage_limit: usage.limit,
        swap_usage: swap.usage.saturating_sub(usage.usage),
        swap_limit: match swap.limit {
            u64::MAX => u64::MAX,
            limit => limit.saturating_sub(usage.limit),
        },
        max_usage: usage.max,
        ..Default::default()
    }
}

fn disks(stats: &Stats) -> IOStat {
    let mut disks: BTreeMap<(u64, u64), IOEntry> = BTreeMap::new();
    let mut add = |entries: &[BlkioEntry], put: fn(&mut IOEntry, &str, u64)| {
        for entry in entries {
            let disk = disks.entry((entry.major, entry.minor)).or_default();
            (disk.major, disk.minor) = (entry.major, entry.minor);
            put(disk, &entry.op.to_lowercase(), entry.value);
        }
    };
    add(
        &stats.blkio.io_service_bytes_recursive,
        |disk, op, value| match op {
            "read" => disk.rbytes = value,
            "write" => disk.wbytes = value,
            _ => {}
        },
    );
    add(
        &stats.blkio.io_serviced_recursive,
        |disk, op, value| match op {
            "read" => disk.rios = value,
            "write" => disk.wios = value,
            _ => {}
        },
    );
    IOStat {
        usage: disks.into_values().collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(op: &str, value: u64) -> BlkioEntry {
        BlkioEntry {
            major: 254,
            op: op.to_owned(),
            value,
            ..Default::default()
        }
    }

    #[test]
    fn the_guests_numbers_reach_containerd_in_its_units() {
        let mut stats = Stats::default();
        stats.cpu.usage.total = 5_000;
        stats.memory.usage.usage = 10;
        stats.memory.usage.limit = u64::MAX;
        stats.memory.swap.usage = 13;
        stats.memory.swap.limit = u64::MAX;
        stats.memory.raw.insert("anon".to_owned(), 7);
        stats.memory.oom_kills = 2;
        stats.pids.current = 3;
        stats.blkio.io_service_bytes_recursive = vec![entry("Read", 11), entry("Write", 12)];
        stats.blkio.io_serviced_recursive = vec![entry("Read", 1), entry("Discard", 9)];
        let told = message(&stats);
        assert_eq!(told.cpu.usage_usec, 5);
        assert_eq!((told.memory.usage, told.memory.anon), (10, 7));
        assert_eq!(
            (told.memory.swap_usage, told.memory.swap_limit),
            (3, u64::MAX)
        );
        assert_eq!(told.memory_events.oom_kill, 2);
        assert_eq!((told.pids.current, told.pids.limit), (3, u64::MAX));
        let disk = told.io.usage.first().unwrap();
        assert_eq!(
            (disk.major, disk.rbytes, disk.wbytes, disk.rios),
            (254, 11, 12, 1)
        );
    }
}
