//! `linux.resources` as settings of a cgroup v2.
//!
//! Contract: pure. Values given in terms of cgroup v1 are converted as runc converts them (libcontainer/cgroups/utils.go,
//! fs2); what v2 does not have (kernel memory, swappiness, real-time budgets, net_cls and net_prio) is left out as there.
//! Spec: OCI config-linux.md "Control groups"; kernel Documentation/admin-guide/cgroup-v2.rst.

use super::PlanError;
use crate::cgroup::Setting;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

fn set(out: &mut Vec<Setting>, file: &str, value: impl ToString) {
    out.push(Setting {
        file: file.to_owned(),
        value: value.to_string(),
        optional: false,
    });
}

/// Settings in the order in which they are to be written; `unified` comes last and so has the last word.
pub fn plan(resources: &LinuxResources) -> Result<Vec<Setting>, PlanError> {
    let mut out = Vec::new();
    if let Some(pids) = resources.pids().as_ref().filter(|p| p.limit() != 0) {
        set(&mut out, "pids.max", amount(pids.limit()));
    }
    if let Some(memory) = resources.memory() {
        plan_memory(memory, &mut out)?;
    }
    if let Some(cpu) = resources.cpu() {
        plan_cpu(cpu, &mut out);
    }
    if let Some(io) = resources.block_io() {
        plan_io(io, &mut out);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let file = |suffix: &str| format!("hugetlb.{}.{suffix}", limit.page_size());
        check_name(limit.page_size(), "linux.resources.hugepageLimits")?;
        // None at all of a page size that this kernel has not is what it gives anyway: a kubelet names all of its host's.
        out.push(Setting {
            file: file("max"),
            value: amount(limit.limit()),
            optional: limit.limit() == 0,
        });
        // Reservations count too where the kernel can count them.
        let value = amount(limit.limit());
        out.push(Setting {
            file: file("rsvd.max"),
            value,
            optional: true,
        });
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let part = |name: &str, n: Option<u32>| n.map_or(String::new(), |n| format!(" {name}={n}"));
        let handles = part("hca_handle", limit.hca_handles());
        let objects = part("hca_object", limit.hca_objects());
        set(&mut out, "rdma.max", format!("{device}{handles}{objects}"));
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        check_name(file, "linux.resources.unified")?;
        for line in value.lines() {
            set(&mut out, file, line);
        }
    }
    Ok(out)
}

/// The settings of an update. Unlike at creation, a quota without a period (and a period without a quota) keeps the
/// other as it is in `bandwidth`, the cgroup's `cpu.max`.
pub fn change(resources: &LinuxResources, bandwidth: &str) -> Result<Vec<Setting>, PlanError> {
    let mut out = plan(resources)?;
    let cpu = resources.cpu().as_ref();
    let quota = cpu.and_then(LinuxCpu::quota).filter(|q| *q != 0);
    let period = cpu.and_then(LinuxCpu::period).filter(|p| *p != 0);
    let mut old = bandwidth.split_whitespace();
    let (old_quota, old_period) = (old.next().unwrap_or("max"), old.next());
    if let Some(setting) = out.iter_mut().find(|setting| setting.file == "cpu.max") {
        match (quota, period) {
            (None, Some(period)) => setting.value = format!("{old_quota} {period}"),
            (Some(quota), None) => {
                let quota = if quota > 0 {
                    quota.to_string()
                } else {
                    "max".to_owned()
                };
                setting.value = format!("{quota} {}", old_period.unwrap_or("100000"));
            }
            _ => {}
        }
    }
    Ok(out)
}

/// A name that is to be (part of) a file name in the cgroup and nothing else.
fn check_name(name: &str, field: &'static str) -> Result<(), PlanError> {
    let bad = name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.');
    // The agent's own switches are not resources.
    let bad = bad || name.starts_with("cgroup.");
    if bad {
        Err(PlanError::Invalid {
            field,
            value: name.to_owned(),
        })
    } else {
        Ok(())
    }
}

/// A limit where a negative number means none.
fn amount(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

fn plan_memory(memory: &LinuxMemory, out: &mut Vec<Setting>) -> Result<(), PlanError> {
    let limit = memory.limit().filter(|l| *l != 0);
    // Without a limit there is none of swap either, unless one is given (runc: ConvertMemorySwapToCgroupV2Value).
    let no_limit = limit.filter(|&limit| limit == -1);
    if let Some(swap) = memory.swap().filter(|s| *s != 0).or(no_limit) {
        // v1 counts memory and swap together, v2 swap alone.
        let swap_only = match (swap, limit) {
            (-1, _) => "max".to_owned(),
            (_, None | Some(-1)) => {
                return Err(PlanError::Memory(
                    "unable to set swap limit without memory limit",
                ));
            }
            (swap, Some(limit)) if swap < limit => {
                return Err(PlanError::Memory(
                    "memory+swap limit should be >= memory limit",
                ));
            }
            (swap, Some(limit)) => (swap - limit).to_string(),
        };
        set(out, "memory.swap.max", swap_only);
    }
    if let Some(limit) = limit {
        set(out, "memory.max", amount(limit));
    }
    if let Some(low) = memory.reservation().filter(|r| *r != 0) {
        set(out, "memory.low", amount(low));
    }
    Ok(())
}

fn plan_cpu(cpu: &LinuxCpu, out: &mut Vec<Setting>) {
    // An idle cgroup takes no weight, so this comes first.
    if let Some(idle) = cpu.idle() {
        set(out, "cpu.idle", idle);
    }
    let weighs = cpu.idle().unwrap_or(0) == 0;
    if let Some(shares) = cpu.shares().filter(|&shares| shares != 0 && weighs) {
        set(out, "cpu.weight", weight_of_shares(shares));
    }
    let quota = cpu.quota().filter(|q| *q != 0);
    let period = cpu.period().filter(|p| *p != 0);
    if quota.is_some() || period.is_some() {
        let quota = quota
            .filter(|q| *q > 0)
            .map_or_else(|| "max".to_owned(), |q| q.to_string());
        set(
            out,
            "cpu.max",
            format!("{quota} {}", period.unwrap_or(100_000)),
        );
    }
    if let Some(burst) = cpu.burst() {
        set(out, "cpu.max.burst", burst);
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|l| !l.is_empty()) {
            set(out, file, list);
        }
    }
}

/// Shares 2..=262144 to weight 1..=10000, linearly (runc: ConvertCPUSharesToCgroupV2Value).
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// Weight 10..=1000 of blkio to 1..=10000 of io (runc: ConvertBlkIOToIOWeightValue).
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1_000) - 10) * 9_999 / 990
}

fn plan_io(io: &LinuxBlockIo, out: &mut Vec<Setting>) {
    if let Some(weight) = io.weight().filter(|w| *w != 0) {
        let value = format!("default {}", io_weight(weight));
        out.push(Setting {
            file: "io.weight".to_owned(),
            value,
            optional: true,
        });
    }
    for device in io.weight_device().iter().flatten() {
        let Some(weight) = device.weight().filter(|w| *w != 0) else {
            continue;
        };
        let value = format!(
            "{}:{} {}",
            device.major(),
            device.minor(),
            io_weight(weight)
        );
        out.push(Setting {
            file: "io.weight".to_owned(),
            value,
            optional: true,
        });
    }
    let mut limit = |key: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
        for d in devices.iter().flatten() {
            set(
                out,
                "io.max",
                format!("{}:{} {key}={}", d.major(), d.minor(), d.rate()),
            );
        }
    };
    limit("rbps", io.throttle_read_bps_device());
    limit("wbps", io.throttle_write_bps_device());
    limit("riops", io.throttle_read_iops_device());
    limit("wiops", io.throttle_write_iops_device());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(json: &str) -> Result<Vec<(String, String)>, String> {
        let settings = plan(&serde_json::from_str(json).unwrap()).map_err(|e| e.to_string())?;
        Ok(settings.into_iter().map(|s| (s.file, s.value)).collect())
    }

    fn one(json: &str) -> (String, String) {
        let mut all = run(json).unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn an_update_of_half_a_bandwidth_keeps_the_other_half() {
        let changed = |json: &str, old: &str| {
            let settings = change(&serde_json::from_str(json).unwrap(), old).unwrap();
            settings.into_iter().map(|s| s.value).collect::<Vec<_>>()
        };
        assert_eq!(
            changed(r#"{"cpu":{"quota":500}}"#, "max 20000\n"),
            ["500 20000"]
        );
        assert_eq!(
            changed(r#"{"cpu":{"quota":-1}}"#, "700 20000\n"),
            ["max 20000"]
        );
        assert_eq!(
            changed(r#"{"cpu":{"period":5000,"quota":0}}"#, "700 20000\n"),
            ["700 5000"]
        );
        assert_eq!(
            changed(r#"{"cpu":{"period":5000,"quota":9}}"#, "700 20000\n"),
            ["9 5000"]
        );
        assert!(changed(r#"{"memory":{"limit":0},"cpu":{"shares":0}}"#, "").is_empty());
    }

    #[test]
    fn swap_is_counted_apart_from_memory() {
        let both = run(r#"{"memory":{"limit":100,"swap":150}}"#).unwrap();
        assert_eq!(
            both,
            [pair("memory.swap.max", "50"), pair("memory.max", "100")]
        );
        let none = run(r#"{"memory":{"limit":-1,"swap":-1}}"#).unwrap();
        assert_eq!(
            none,
            [pair("memory.swap.max", "max"), pair("memory.max", "max")]
        );
    }

    #[test]
    fn no_pages_of_a_size_that_there_is_not_is_no_limit() {
        let json = r#"{"hugepageLimits":[{"pageSize":"1GB","limit":0},{"pageSize":"2MB","limit":4194304}]}"#;
        let settings = plan(&serde_json::from_str(json).unwrap()).unwrap();
        let may_fail = |file: &str| {
            let found = settings.iter().find(|setting| setting.file == file);
            found.map(|setting| setting.optional)
        };
        assert_eq!(may_fail("hugetlb.1GB.max"), Some(true));
        assert_eq!(may_fail("hugetlb.2MB.max"), Some(false));
        assert_eq!(may_fail("hugetlb.2MB.rsvd.max"), Some(true));
    }

    #[test]
    fn contradictory_memory_limits_are_refused() {
        assert!(
            run(r#"{"memory":{"swap":150}}"#)
                .unwrap_err()
                .contains("without memory limit")
        );
        assert!(
            run(r#"{"memory":{"limit":200,"swap":150}}"#)
                .unwrap_err()
                .contains(">= memory")
        );
    }

    #[test]
    fn cpu_shares_and_quota_are_converted() {
        assert_eq!(one(r#"{"cpu":{"shares":1024}}"#), pair("cpu.weight", "39"));
        assert_eq!(
            one(r#"{"cpu":{"shares":262144}}"#),
            pair("cpu.weight", "10000")
        );
        assert_eq!(
            one(r#"{"cpu":{"quota":50000}}"#),
            pair("cpu.max", "50000 100000")
        );
        assert_eq!(
            one(r#"{"cpu":{"quota":-1,"period":5000}}"#),
            pair("cpu.max", "max 5000")
        );
        assert_eq!(
            one(r#"{"cpu":{"idle":1,"shares":7}}"#),
            pair("cpu.idle", "1")
        );
        assert_eq!(
            run(r#"{"cpu":{"idle":0,"shares":1024}}"#).unwrap(),
            [pair("cpu.idle", "0"), pair("cpu.weight", "39")]
        );
    }

    #[test]
    fn pids_zero_is_no_limit_and_negative_is_max() {
        assert_eq!(run(r#"{"pids":{"limit":0}}"#).unwrap(), []);
        assert_eq!(one(r#"{"pids":{"limit":-1}}"#), pair("pids.max", "max"));
        assert_eq!(one(r#"{"pids":{"limit":9}}"#), pair("pids.max", "9"));
    }

    #[test]
    fn throttles_name_their_device() {
        let json = r#"{"blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":1,"rate":7}]}}"#;
        let all = run(json).unwrap();
        assert_eq!(
            all,
            [
                pair("io.weight", "default 4950"),
                pair("io.max", "8:1 rbps=7")
            ]
        );
    }

    #[test]
    fn unified_comes_last_and_stays_in_its_directory() {
        let json = r#"{"pids":{"limit":9},"unified":{"memory.high":"100","io.max":"8:0 rbps=1\n8:1 rbps=2"}}"#;
        let all = run(json).unwrap();
        assert_eq!(
            all[1..],
            [
                pair("io.max", "8:0 rbps=1"),
                pair("io.max", "8:1 rbps=2"),
                pair("memory.high", "100")
            ]
        );
        for name in ["../x", "cgroup.procs", "", "a/b"] {
            assert!(
                run(&format!(r#"{{"unified":{{"{name}":"1"}}}}"#)).is_err(),
                "{name}"
            );
        }
    }
}
