//! What changes when a container's limits are changed: in the guest, on the host, or nothing because it cannot be.
//!
//! Contract: pure. As in runc, zeros and missing fields of a change leave things as they are. The limits hold in the
//! guest; the host's cgroup follows where it has the same limit (CPU bandwidth and weight, CPUs and nodes, disks, whether
//! memory is limited at all). The virtual machine grows and shrinks with them within its bounds; what needs more is refused.
//! No limit at all leaves it as it is. What a lower memory limit frees of the memory that it booted with goes back to the
//! host page by page (free page reporting).
//! Not here: writing (`cgroup.rs`, the agent), the order and the way back when one side refuses (`update/apply.rs`), the
//! machine (`sandbox/growth.rs`).

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};

use crate::{
    cgroup::{self, Limit},
    guest_spec, huge_pages,
    sizing::{Bounds, Needs, SMALLEST_LIMIT, VmSize},
};

mod apply;

pub use apply::{ApplyError, apply};

/// The kernel's period where none is given, in microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// Why limits stay as they are.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// More memory than the machine may have.
    #[error(
        "memory limit of {bytes} bytes: the virtual machine may have at most {} bytes of memory (max_memory_mib)",
        most.memory.bytes()
    )]
    Memory {
        /// As asked.
        bytes: i64,
        /// The largest machine.
        most: VmSize,
    },
    /// Nothing runs in so little memory.
    #[error(
        "memory limit of {bytes} bytes: a container in a virtual machine needs at least {} ({} MiB)",
        SMALLEST_LIMIT.bytes(), SMALLEST_LIMIT.0
    )]
    TooSmall {
        /// As asked.
        bytes: i64,
    },
    /// More CPUs than the machine may have.
    #[error(
        "CPU quota of {quota} in a period of {period} microseconds: the virtual machine may have at most {} vCPU(s) \
         (max_vcpus)",
        most.vcpus
    )]
    Cpus {
        /// As asked.
        quota: i64,
        /// As asked, or as it was.
        period: u64,
        /// The largest machine.
        most: VmSize,
    },
    /// The change is not a `linux.resources` object.
    #[error("read the resources")]
    Json(#[from] serde_json::Error),
}

/// The limits of a container as they are now.
#[derive(Debug, Clone)]
pub struct Limits {
    resources: LinuxResources,
    bounds: Bounds,
}

/// A change that can be made.
#[derive(Debug)]
pub struct Change {
    /// The limits afterwards.
    pub limits: Limits,
    /// What the guest is told: a `linux.resources` object.
    pub guest: Vec<u8>,
    asked: LinuxResources,
}

impl Change {
    /// What is written on the host for a machine of that size.
    pub fn host(&self, size: VmSize) -> Vec<Limit> {
        cgroup::limits_of_change(&self.asked, &self.limits.resources, size)
    }
}

impl Limits {
    /// Those of a new container.
    pub fn new(spec: &Spec, bounds: Bounds) -> Self {
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().clone());
        Self {
            resources: resources.unwrap_or_default(),
            bounds,
        }
    }

    /// What the virtual machine must have for them.
    pub fn needs(&self) -> Needs {
        let memory = self.resources.memory().as_ref();
        let limit = memory.and_then(|memory| memory.limit());
        let cpus = self.resources.cpu().as_ref().and_then(bandwidth);
        Needs {
            memory_bytes: limit
                .and_then(|limit| u64::try_from(limit).ok())
                .unwrap_or(0),
            milli_cpus: cpus.map_or(0, |(quota, period)| {
                quota.unsigned_abs().saturating_mul(1000).div_ceil(period)
            }),
            huge_bytes: huge_pages::bytes_of(&self.resources),
        }
    }

    /// What it takes to make a change, given as JSON.
    pub fn change(&self, json: &str) -> Result<Change, UpdateError> {
        let change: LinuxResources = serde_json::from_str(json)?;
        let mut resources = self.resources.clone();
        if let Some(memory) = change.memory() {
            self.check_memory(memory)?;
            merge_memory(resources.memory_mut().get_or_insert_default(), memory);
        }
        if let Some(cpu) = change.cpu() {
            let merged = resources.cpu_mut().get_or_insert_default();
            merge_cpu(merged, cpu);
            self.check_cpu(merged)?;
        }
        let mut guest = change.clone();
        guest_spec::remove_host_limits(&mut guest);
        // The guest's devices are what they were.
        guest.set_devices(None);
        // As in runc. The pages are set aside already.
        guest.set_hugepage_limits(None);
        Ok(Change {
            guest: serde_json::to_vec(&guest)?,
            asked: change,
            limits: Self {
                resources,
                bounds: self.bounds,
            },
        })
    }

    fn check_memory(&self, memory: &LinuxMemory) -> Result<(), UpdateError> {
        let Some(bytes) = memory.limit().filter(|&limit| limit > 0) else {
            return Ok(());
        };
        let asked = u64::try_from(bytes).unwrap_or_default();
        if asked > self.bounds.most.memory.bytes() {
            let most = self.bounds.most;
            return Err(UpdateError::Memory { bytes, most });
        }
        if asked < SMALLEST_LIMIT.bytes() {
            return Err(UpdateError::TooSmall { bytes });
        }
        Ok(())
    }

    fn check_cpu(&self, merged: &LinuxCpu) -> Result<(), UpdateError> {
        let Some((quota, period)) = bandwidth(merged) else {
            return Ok(());
        };
        let most = self.bounds.most;
        if quota.unsigned_abs().div_ceil(period) > u64::from(most.vcpus) {
            return Err(UpdateError::Cpus {
                quota,
                period,
                most,
            });
        }
        Ok(())
    }
}

/// A quota, which is more than nothing, and its period.
fn bandwidth(cpu: &LinuxCpu) -> Option<(i64, u64)> {
    let quota = cpu.quota().filter(|&quota| quota > 0)?;
    let period = cpu.period().filter(|&period| period > 0);
    Some((quota, period.unwrap_or(DEFAULT_PERIOD_US)))
}

fn merge_memory(all: &mut LinuxMemory, change: &LinuxMemory) {
    let given = |amount: Option<i64>| amount.filter(|&amount| amount != 0);
    let limit = given(change.limit()).or(all.limit());
    let reservation = given(change.reservation()).or(all.reservation());
    let swap = given(change.swap()).or(all.swap());
    all.set_limit(limit)
        .set_reservation(reservation)
        .set_swap(swap);
}

fn merge_cpu(all: &mut LinuxCpu, change: &LinuxCpu) {
    let quota = change.quota().filter(|&quota| quota != 0).or(all.quota());
    let period = change
        .period()
        .filter(|&period| period != 0)
        .or(all.period());
    let shares = change
        .shares()
        .filter(|&shares| shares != 0)
        .or(all.shares());
    all.set_quota(quota).set_period(period).set_shares(shares);
}

#[cfg(test)]
mod tests {
    use crate::sizing::MiB;

    use super::*;

    fn limits(resources: &str) -> Limits {
        let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        let bounds = Bounds {
            boot: size(1, 128),
            most: size(2, 256),
            overhead: MiB(64),
            huge: MiB(0),
        };
        Limits::new(&serde_json::from_str(&spec).unwrap(), bounds)
    }

    fn size(vcpus: u8, memory: u32) -> VmSize {
        VmSize {
            vcpus,
            memory: MiB(memory),
        }
    }

    fn host(limits: &Limits, change: &str) -> Vec<(String, String)> {
        let host = limits.change(change).unwrap().host(size(2, 256));
        host.into_iter()
            .map(|limit| (limit.file.to_owned(), limit.value))
            .collect()
    }

    fn refusal(limits: &Limits, change: &str) -> String {
        limits.change(change).unwrap_err().to_string()
    }

    #[test]
    fn zeros_change_nothing() {
        let zeros = r#"{"memory":{"limit":0,"reservation":0,"swap":0},
            "cpu":{"shares":0,"quota":0,"period":0,"cpus":"","mems":""},"blockIO":{"weight":0},"pids":{"limit":0}}"#;
        assert!(host(&limits("{}"), zeros).is_empty());
    }

    #[test]
    fn the_host_follows_where_it_has_the_same_limit() {
        let before = limits(r#"{"cpu":{"quota":50000,"period":50000}}"#);
        let pair = |file: &str, value: &str| (file.to_owned(), value.to_owned());
        assert_eq!(
            host(&before, r#"{"cpu":{"quota":80000}}"#),
            [pair("cpu.max", "85000 50000")]
        );
        assert_eq!(
            host(&before, r#"{"cpu":{"quota":-1}}"#),
            [pair("cpu.max", "max")]
        );
        assert_eq!(
            host(&before, r#"{"cpu":{"shares":1024,"cpus":"0-1"}}"#),
            [pair("cpuset.cpus", "0-1"), pair("cpu.weight", "39")]
        );
        let memory = (320_u64 << 20).to_string();
        assert_eq!(
            host(&before, r#"{"memory":{"limit":134217728}}"#),
            [pair("memory.max", &memory)]
        );
        assert_eq!(
            host(&before, r#"{"memory":{"limit":-1}}"#),
            [pair("memory.max", "max")]
        );
    }

    #[test]
    fn changes_add_up() {
        let first = limits("{}")
            .change(r#"{"cpu":{"period":10000}}"#)
            .unwrap()
            .limits;
        let refused = refusal(&first, r#"{"cpu":{"quota":20001}}"#);
        assert!(
            refused.contains("20001 in a period of 10000")
                && refused.contains("2 vCPU(s) (max_vcpus)"),
            "{refused}"
        );
        first.change(r#"{"cpu":{"quota":20000}}"#).unwrap();
    }

    #[test]
    fn needs_are_those_of_limits_alone() {
        let needs = |limits: &Limits| {
            let Needs {
                memory_bytes,
                milli_cpus,
                huge_bytes: _,
            } = limits.needs();
            (memory_bytes, milli_cpus)
        };
        let before = limits(r#"{"cpu":{"quota":25000},"memory":{"limit":100000000}}"#);
        assert_eq!(needs(&before), (100_000_000, 250));
        let change = |text: &str| needs(&before.change(text).unwrap().limits);
        assert_eq!(
            change(r#"{"memory":{"limit":-1},"cpu":{"period":20000}}"#),
            (0, 1250)
        );
        assert_eq!(change(r#"{"cpu":{"quota":-1}}"#), (100_000_000, 0));
        assert_eq!(needs(&limits("{}")), (0, 0));
    }

    #[test]
    fn what_the_machine_may_not_have_is_refused_with_the_numbers() {
        let limits = limits("{}");
        let refused = refusal(&limits, r#"{"memory":{"limit":268435457}}"#);
        assert!(
            refused.contains("268435457")
                && refused.contains("at most 268435456 bytes of memory (max_memory_mib)"),
            "{refused}"
        );
        assert!(refusal(&limits, r#"{"memory":{"limit":1}}"#).contains("at least 4194304"));
        limits.change(r#"{"memory":{"limit":268435456}}"#).unwrap();
        limits.change(r#"{"cpu":{"quota":-1}}"#).unwrap();
        assert!(limits.change("[").is_err());
    }

    #[test]
    fn the_guest_is_not_told_what_concerns_the_host() {
        let change = r#"{"cpu":{"cpus":"3","shares":5},"pids":{"limit":7}}"#;
        let guest = limits("{}").change(change).unwrap().guest;
        let guest: serde_json::Value = serde_json::from_slice(&guest).unwrap();
        assert_eq!(guest["cpu"], serde_json::json!({"shares": 5}));
        assert_eq!(guest["pids"]["limit"], 7);
    }
}
