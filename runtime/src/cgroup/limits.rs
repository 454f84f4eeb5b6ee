//! What a sandbox's host cgroup is limited to: a pure function of the specification and the machine's size.
//!
//! - `memory.max`: guest memory plus [`HOST_OVERHEAD`], if the container has a memory limit.
//! - `cpu.max`: the container's quota plus a tenth of one CPU for the VMM's io threads, if it has a quota.
//! - `cpu.weight` from `shares`, `io.weight` from `weight`; `cpuset.cpus`, `cpuset.mems` and `io.max` as given: only the host knows these CPUs,
//!   nodes and disks.
//! - Processes are not counted here: the container's `pids.limit` holds in the guest.

use caisson_vmm_spec::MiB;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxResources, LinuxThrottleDevice, Spec};
use serde_json::Value;

use crate::sizing::{self, VmSize};

/// Host memory that a sandbox may use beyond the guest's: VMM, monitor, page tables and the shared files' cache.
pub const HOST_OVERHEAD: MiB = MiB(64);

/// The kernel's period where a specification names none, in microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// A value for a file of a cgroup, under cgroup v2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// The file's name.
    pub file: &'static str,
    /// What is written to it.
    pub value: String,
    /// The same for a host with cgroup v1: its files and their values, in order.
    pub first_version: Vec<(&'static str, String)>,
}

/// What a machine of that size may use on the host.
pub(super) fn machine_memory(size: VmSize) -> u64 {
    size.memory.bytes() + HOST_OVERHEAD.bytes()
}

/// All limits, in the order in which they are to be written.
pub(super) fn of(spec: &Spec, size: VmSize) -> Vec<Limit> {
    let mut limits = Vec::new();
    if sizing::memory_limit(spec).is_some() {
        limits.push(of_memory(Some(machine_memory(size))));
    }
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    if let Some(cpu) = resources.and_then(|resources| resources.cpu().as_ref()) {
        limits.extend(of_cpu(cpu));
    }
    if let Some(io) = resources.and_then(|resources| resources.block_io().as_ref()) {
        limits.extend(of_io(io));
    }
    limits
}

/// Whether the specification asks for anything that runc needs a controller for, be it held in the guest.
pub(super) fn are_asked(spec: &Spec) -> bool {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    // A list, an object or a text that is empty asks for nothing; nor does a zero.
    let asks = |resources: &LinuxResources| {
        let mut rest = resources.clone();
        rest.set_devices(None);
        serde_json::to_value(rest).is_ok_and(|rest| says_something(&rest))
    };
    resources.is_some_and(asks)
}

fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) => true,
        Value::Number(number) => number.as_i64() != Some(0),
        Value::String(text) => !text.is_empty(),
        Value::Array(all) => all.iter().any(says_something),
        Value::Object(all) => all.values().any(says_something),
    }
}

/// What a change of a running container's limits means: `change` says what is touched, `all` what holds afterwards.
pub(super) fn of_change(change: &LinuxResources, all: &LinuxResources, size: VmSize) -> Vec<Limit> {
    let mut limits = Vec::new();
    let memory = change.memory().as_ref().and_then(|memory| memory.limit());
    if let Some(limit) = memory.filter(|&limit| limit != 0) {
        limits.push(of_memory((limit > 0).then(|| machine_memory(size))));
    }
    if let Some(cpu) = change.cpu() {
        let mut touched = cpu.clone();
        let has_quota = cpu.quota().is_some_and(|quota| quota != 0);
        let has_period = cpu.period().is_some_and(|period| period != 0);
        touched.set_quota(None).set_period(None);
        limits.extend(of_cpu(&touched));
        if has_quota || has_period {
            let value = all.cpu().as_ref().and_then(bandwidth);
            limits.push(value.unwrap_or_else(|| Limit {
                file: "cpu.max",
                value: "max".to_owned(),
                first_version: vec![("cpu.cfs_quota_us", "-1".to_owned())],
            }));
        }
    }
    if let Some(io) = change.block_io() {
        limits.extend(of_io(io));
    }
    limits
}

fn of_cpu(cpu: &LinuxCpu) -> Vec<Limit> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let set = |file, numbers: &Option<String>| {
        given(numbers).map(|value| Limit {
            file,
            first_version: vec![(file, value.clone())],
            value,
        })
    };
    let shares = cpu.shares().filter(|&shares| shares > 0);
    let shares = shares.map(|shares| Limit {
        file: "cpu.weight",
        value: weight(shares).to_string(),
        first_version: vec![("cpu.shares", shares.to_string())],
    });
    [
        set("cpuset.cpus", cpu.cpus()),
        set("cpuset.mems", cpu.mems()),
        shares,
        bandwidth(cpu),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Memory in bytes; `None`: as much as there is.
pub(super) fn of_memory(bytes: Option<u64>) -> Limit {
    let text = |none: &str| bytes.map_or_else(|| none.to_owned(), |bytes| bytes.to_string());
    Limit {
        file: "memory.max",
        value: text("max"),
        first_version: vec![("memory.limit_in_bytes", text("-1"))],
    }
}

/// cgroup v1's shares (2 to 262,144) as cgroup v2's weight (1 to 10,000): runc's formula.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn bandwidth(cpu: &LinuxCpu) -> Option<Limit> {
    let quota = cpu
        .quota()
        .and_then(|quota| u64::try_from(quota).ok())
        .filter(|&q| q > 0)?;
    let period = cpu
        .period()
        .filter(|&period| period > 0)
        .unwrap_or(DEFAULT_PERIOD_US);
    let quota = quota.saturating_add(period / 10);
    Some(Limit {
        file: "cpu.max",
        value: format!("{quota} {period}"),
        first_version: vec![
            ("cpu.cfs_period_us", period.to_string()),
            ("cpu.cfs_quota_us", quota.to_string()),
        ],
    })
}

fn of_io(io: &LinuxBlockIo) -> Vec<Limit> {
    let weight = io
        .weight()
        .filter(|&weight| weight != 0)
        .map(|weight| Limit {
            file: "io.weight",
            value: io_weight(weight.into()).to_string(),
            first_version: vec![("blkio.weight", weight.to_string())],
        });
    let lists = [
        (
            "rbps",
            "blkio.throttle.read_bps_device",
            io.throttle_read_bps_device(),
        ),
        (
            "wbps",
            "blkio.throttle.write_bps_device",
            io.throttle_write_bps_device(),
        ),
        (
            "riops",
            "blkio.throttle.read_iops_device",
            io.throttle_read_iops_device(),
        ),
        (
            "wiops",
            "blkio.throttle.write_iops_device",
            io.throttle_write_iops_device(),
        ),
    ];
    let all = lists
        .into_iter()
        .flat_map(|(key, old, list)| list.iter().flatten().map(move |device| (key, old, device)));
    let throttles = all.map(|(key, old, device)| Limit {
        file: "io.max",
        value: throttle(key, device),
        first_version: vec![(
            old,
            format!("{}:{} {}", device.major(), device.minor(), device.rate()),
        )],
    });
    weight.into_iter().chain(throttles).collect()
}

/// cgroup v1's weight (10 to 1,000) as cgroup v2's (1 to 10,000): runc's formula.
fn io_weight(weight: u64) -> u64 {
    1 + (weight.clamp(10, 1_000) - 10) * 9_999 / 990
}

fn throttle(key: &str, device: &LinuxThrottleDevice) -> String {
    format!(
        "{}:{} {key}={}",
        device.major(),
        device.minor(),
        device.rate()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(resources: &str) -> Vec<String> {
        let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        let size = VmSize {
            vcpus: 1,
            memory: MiB(192),
        };
        let all = of(&serde_json::from_str(&spec).unwrap(), size);
        all.into_iter()
            .map(|limit| format!("{}={}", limit.file, limit.value))
            .collect()
    }

    #[test]
    fn nothing_asked_limits_nothing() {
        assert!(limits("{}").is_empty());
        assert!(
            limits(r#"{"cpu":{"quota":-1,"shares":0,"cpus":""},"memory":{"limit":-1}}"#).is_empty()
        );
    }

    #[test]
    fn zeros_and_devices_ask_for_nothing() {
        let asked = |resources: &str| {
            let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
            are_asked(&serde_json::from_str(&spec).unwrap())
        };
        for nothing in [
            "{}",
            r#"{"devices":[{"allow":true,"major":1,"access":"rwm"}]}"#,
            r#"{"cpu":{"shares":0,"cpus":""},"memory":{"limit":0},"hugepageLimits":[]}"#,
        ] {
            assert!(!asked(nothing), "{nothing}");
        }
        for something in [
            r#"{"pids":{"limit":-1}}"#,
            r#"{"cpu":{"cpus":"0"}}"#,
            r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":5}]}}"#,
            r#"{"unified":{"memory.high":"5"}}"#,
        ] {
            assert!(asked(something), "{something}");
        }
    }

    #[test]
    fn memory_covers_the_guest_and_the_overhead() {
        let bytes = (192 + 64) << 20;
        assert_eq!(
            limits(r#"{"memory":{"limit":134217728}}"#),
            [format!("memory.max={bytes}")]
        );
    }

    #[test]
    fn a_quota_gets_a_tenth_of_a_cpu_on_top() {
        assert_eq!(
            limits(r#"{"cpu":{"quota":50000,"period":50000}}"#),
            ["cpu.max=55000 50000"]
        );
        assert_eq!(
            limits(r#"{"cpu":{"quota":20000}}"#),
            ["cpu.max=30000 100000"]
        );
    }

    #[test]
    fn shares_become_a_weight_as_in_runc() {
        for (shares, wanted) in [
            (1, 1),
            (2, 1),
            (1024, 39),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight(shares), wanted, "{shares}");
        }
    }

    #[test]
    fn every_limit_has_its_files_in_the_first_version() {
        let text = r#"{"memory":{"limit":134217728},
            "cpu":{"cpus":"0-1","quota":50000,"period":50000,"shares":1024},
            "blockIO":{"weight":500,"throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":9}]}}"#;
        let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{text}}}}}"#);
        let size = VmSize {
            vcpus: 1,
            memory: MiB(192),
        };
        let all = of(&serde_json::from_str(&spec).unwrap(), size);
        let files: Vec<_> = all
            .iter()
            .flat_map(|limit| &limit.first_version)
            .map(|(file, value)| format!("{file}={value}"))
            .collect();
        let memory = format!("memory.limit_in_bytes={}", (192 + 64) << 20);
        assert_eq!(
            files,
            [
                &memory,
                "cpuset.cpus=0-1",
                "cpu.shares=1024",
                "cpu.cfs_period_us=50000",
                "cpu.cfs_quota_us=55000",
                "blkio.weight=500",
                "blkio.throttle.write_iops_device=8:0 9",
            ]
        );
    }

    #[test]
    fn cpus_nodes_and_disks_are_limited_on_the_host() {
        let text = r#"{"cpu":{"cpus":"0-1","mems":"0"},
            "blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1000}]}}"#;
        assert_eq!(
            limits(text),
            [
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "io.weight=4950",
                "io.max=8:0 rbps=1000"
            ]
        );
    }
}
