//! How large the virtual machine of a container is: a pure function of its specification and the host.
//!
//! - vCPUs: `ceil(quota / period)` of `linux.resources.cpu`; without a quota the host's configured default; at least 1,
//!   at most 32, never more than the host has.
//! - Memory: the container's limit rounded up to MiB, plus the configured overhead for the guest's kernel and agent,
//!   at least [`SMALLEST`]; without a limit the configured default. A limit below [`SMALLEST_LIMIT`] is refused. Huge pages
//!   (`hugepageLimits`) come on top of that.
//! - What it may grow to while it runs: `max_vcpus` and `max_memory_mib` of the configuration, never more than the host has,
//!   never less than it boots with.
//! - `vm.hwConfig` of the specification, which has passed `bundle`, overrides either.

pub use caisson_vmm_spec::MiB;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::{bundle::VmSection, config::Config, huge_pages};

/// The smallest guest that boots.
pub const SMALLEST: MiB = MiB(64);

/// The smallest memory limit of a container: below it not even a shell starts.
pub const SMALLEST_LIMIT: MiB = MiB(4);

/// Most vCPUs of a virtual machine.
pub const MOST_VCPUS: u8 = 32;

/// The kernel's period for CPU quotas where a specification names none, in microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// The size of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// 1 to 32.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: MiB,
}

/// How large a virtual machine is at first, and what it may grow to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// What it boots with, which is the least.
    pub boot: VmSize,
    /// The most.
    pub most: VmSize,
    /// Memory for the guest's kernel and agent, beside its containers' limits.
    pub overhead: MiB,
    /// What it boots with for its first container's huge pages.
    pub huge: MiB,
}

/// What one container of a sandbox may use. Zero: no limit, and nothing to be made room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Needs {
    /// Its memory limit.
    pub memory_bytes: u64,
    /// Its quota of CPU time in thousandths of a CPU.
    pub milli_cpus: u64,
    /// Its huge pages, which are set aside beside what the memory limit counts.
    pub huge_bytes: u64,
}

impl Bounds {
    /// Those of a machine that boots with `boot` for the container of `spec`.
    pub fn of(boot: VmSize, spec: &Spec, config: &Config, host: Host) -> Self {
        let host_mib = u32::try_from(host.memory_bytes >> 20).unwrap_or(u32::MAX);
        let memory = match config.max_memory_mib {
            MiB(0) => host_mib,
            MiB(most) => most.min(host_mib),
        };
        let vcpus = config.max_vcpus.min(cpus_of(host));
        Self {
            boot,
            most: VmSize {
                vcpus: vcpus.max(boot.vcpus),
                memory: MiB(memory.max(boot.memory.0)),
            },
            overhead: config.memory_overhead_mib,
            huge: round_up(huge_pages::bytes(spec)),
        }
    }

    /// What a machine must have for containers with so many huge pages, if that is more than it may have.
    pub fn beyond(&self, huge_bytes: u64) -> Option<MiB> {
        let needed = self
            .beside_huge_pages()
            .saturating_add(round_up(huge_bytes).0);
        (needed > self.most.memory.0).then_some(MiB(needed))
    }

    /// What it boots with for everything else.
    fn beside_huge_pages(&self) -> u32 {
        self.boot.memory.0.saturating_sub(self.huge.0)
    }

    /// The machine for containers with these needs together, as far as there may be one.
    pub fn fitting(&self, all: impl Iterator<Item = Needs>) -> VmSize {
        let (mut bytes, mut milli, mut huge) = (0_u64, 0_u64, 0_u64);
        for needs in all {
            bytes = bytes.saturating_add(needs.memory_bytes);
            milli = milli.saturating_add(needs.milli_cpus);
            huge = huge.saturating_add(needs.huge_bytes);
        }
        let mut needed = self.beside_huge_pages();
        if bytes > 0 {
            needed = needed.max(round_up(bytes.saturating_add(self.overhead.bytes())).0);
        }
        let needed = needed.saturating_add(round_up(huge).0);
        // The guest takes memory two MiB at a time.
        let most = self.most.memory.0.saturating_sub(self.boot.memory.0) & !1;
        let extra = needed.saturating_sub(self.boot.memory.0);
        let extra = extra.checked_next_multiple_of(2).unwrap_or(most).min(most);
        let vcpus = u8::try_from(milli.div_ceil(1000)).unwrap_or(MOST_VCPUS);
        VmSize {
            vcpus: vcpus.clamp(self.boot.vcpus, self.most.vcpus),
            memory: MiB(self.boot.memory.0 + extra),
        }
    }
}

/// What a host has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
}

impl Host {
    /// Asks the kernel.
    pub fn detect() -> Self {
        let info = rustix::system::sysinfo();
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: info.totalram.saturating_mul(u64::from(info.mem_unit)),
        }
    }
}

/// Why there is no virtual machine of the size that was asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// The limit of the container is too small.
    #[error(
        "linux.resources.memory.limit is {limit_bytes} bytes: a container in a virtual machine needs at least {} ({} MiB)",
        SMALLEST_LIMIT.bytes(), SMALLEST_LIMIT.0
    )]
    LimitTooSmall {
        /// As given.
        limit_bytes: i64,
    },
    /// The virtual machine that was asked for cannot boot.
    #[error(
        "vm.hwConfig.memory is {bytes} bytes: a virtual machine needs at least {} ({} MiB)",
        SMALLEST.bytes(), SMALLEST.0
    )]
    MachineTooSmall {
        /// As given.
        bytes: u64,
    },
    /// The virtual machine would not fit into the host.
    #[error(
        "the virtual machine would need {needed_bytes} bytes of memory: this host has {host_bytes}"
    )]
    HostTooSmall {
        /// What the machine needs.
        needed_bytes: u64,
        /// What there is.
        host_bytes: u64,
    },
    /// A number of vCPUs that no virtual machine has.
    #[error("vm.hwConfig.vcpus is {vcpus}: a virtual machine has 1 to {MOST_VCPUS}")]
    Vcpus {
        /// As given.
        vcpus: u32,
    },
}

/// The size of the virtual machine for a container.
pub fn size(
    spec: &Spec,
    vm: Option<&VmSection>,
    config: &Config,
    host: Host,
) -> Result<VmSize, SizingError> {
    let asked = vm.and_then(|vm| vm.hw_config.as_ref());
    let vcpus = match asked.and_then(|hw| hw.vcpus) {
        Some(vcpus) => u8::try_from(vcpus)
            .ok()
            .filter(|vcpus| (1..=MOST_VCPUS).contains(vcpus))
            .ok_or(SizingError::Vcpus { vcpus })?,
        // Vcpus that share a CPU only slow each other down: so many are made only for who names their number.
        None => vcpus_of(spec, config).min(cpus_of(host)),
    };
    let memory = match asked.and_then(|hw| hw.memory) {
        Some(bytes) if bytes < SMALLEST.bytes() => {
            return Err(SizingError::MachineTooSmall { bytes });
        }
        Some(bytes) => round_up(bytes),
        None => {
            let huge = round_up(huge_pages::bytes(spec)).0;
            MiB(memory_of(spec, config, host)?.0.saturating_add(huge))
        }
    };
    if memory.bytes() > host.memory_bytes {
        return Err(SizingError::HostTooSmall {
            needed_bytes: memory.bytes(),
            host_bytes: host.memory_bytes,
        });
    }
    Ok(VmSize { vcpus, memory })
}

/// As many vCPUs as a machine of this host may have.
fn cpus_of(host: Host) -> u8 {
    u8::try_from(host.cpus)
        .unwrap_or(MOST_VCPUS)
        .clamp(1, MOST_VCPUS)
}

fn vcpus_of(spec: &Spec, config: &Config) -> u8 {
    let cpu = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|r| r.cpu().as_ref());
    let quota = cpu
        .and_then(|cpu| cpu.quota())
        .and_then(|quota| u64::try_from(quota).ok());
    let Some(quota) = quota.filter(|&quota| quota > 0) else {
        return config.default_vcpus;
    };
    let period = cpu
        .and_then(|cpu| cpu.period())
        .filter(|&period| period > 0);
    let whole = quota.div_ceil(period.unwrap_or(DEFAULT_PERIOD_US));
    u8::try_from(whole)
        .unwrap_or(MOST_VCPUS)
        .clamp(1, MOST_VCPUS)
}

/// The container's memory limit in bytes; `None`: unlimited.
pub fn memory_limit(spec: &Spec) -> Option<i64> {
    let resources = spec.linux().as_ref()?.resources().as_ref()?;
    // -1 is runc's "no limit"; 0 sets none either.
    resources
        .memory()
        .as_ref()?
        .limit()
        .filter(|&limit| limit > 0)
}

fn memory_of(spec: &Spec, config: &Config, host: Host) -> Result<MiB, SizingError> {
    let Some(limit) = memory_limit(spec) else {
        // A small host still runs a container that did not ask for anything.
        return Ok(config.default_memory_mib);
    };
    let bytes = u64::try_from(limit).unwrap_or_default();
    if bytes < SMALLEST_LIMIT.bytes() {
        return Err(SizingError::LimitTooSmall { limit_bytes: limit });
    }
    // A limit beyond the host limits nothing under runc; here it asks for as much as the host has.
    let most = host
        .memory_bytes
        .saturating_sub(config.memory_overhead_mib.bytes());
    let bytes = bytes
        .min(most)
        .saturating_add(config.memory_overhead_mib.bytes());
    Ok(round_up(bytes).max(SMALLEST).min(MiB(
        u32::try_from(host.memory_bytes >> 20).unwrap_or(u32::MAX)
    )))
}

fn round_up(bytes: u64) -> MiB {
    MiB(u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const HOST: Host = Host {
        cpus: 8,
        memory_bytes: 8 * GIB,
    };

    fn sized(resources: &str, vm: &str, host: Host) -> Result<VmSize, SizingError> {
        let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        let vm: Option<VmSection> = serde_json::from_str(vm).unwrap();
        size(
            &serde_json::from_str(&spec).unwrap(),
            vm.as_ref(),
            &Config::default(),
            host,
        )
    }

    fn vcpus(cpu: &str) -> u8 {
        sized(&format!(r#"{{"cpu":{cpu}}}"#), "null", HOST)
            .unwrap()
            .vcpus
    }

    #[test]
    fn nothing_asked_gives_the_configured_defaults() {
        let default = VmSize {
            vcpus: 1,
            memory: MiB(256),
        };
        assert_eq!(sized("{}", "null", HOST), Ok(default));
        assert_eq!(
            sized(
                r#"{"cpu":{"quota":-1},"memory":{"limit":-1}}"#,
                "null",
                HOST
            ),
            Ok(default)
        );
    }

    #[test]
    fn a_quota_is_rounded_up_to_whole_vcpus() {
        assert_eq!(vcpus(r#"{"quota":50000,"period":100000}"#), 1);
        assert_eq!(vcpus(r#"{"quota":150000,"period":100000}"#), 2);
        assert_eq!(vcpus(r#"{"quota":200000}"#), 2);
        assert_eq!(vcpus(r#"{"quota":200000,"period":0}"#), 2);
        assert_eq!(
            vcpus(r#"{"quota":9223372036854775807,"period":1}"#),
            8,
            "the host has 8"
        );
    }

    #[test]
    fn a_host_with_many_cpus_gives_at_most_32() {
        let host = Host { cpus: 500, ..HOST };
        let all = r#"{"cpu":{"quota":9223372036854775807,"period":1}}"#;
        assert_eq!(sized(all, "null", host).unwrap().vcpus, 32);
    }

    #[test]
    fn a_memory_limit_is_rounded_up_and_gets_the_overhead() {
        let memory = |limit: u64| {
            sized(
                &format!(r#"{{"memory":{{"limit":{limit}}}}}"#),
                "null",
                HOST,
            )
        };
        assert_eq!(memory(128 << 20).unwrap().memory, MiB(128 + 64));
        assert_eq!(memory((128 << 20) + 1).unwrap().memory, MiB(129 + 64));
        assert_eq!(memory(4 << 20).unwrap().memory, MiB(4 + 64));
        assert_eq!(
            memory(i64::MAX as u64).unwrap().memory,
            MiB(8192),
            "all the host has"
        );
    }

    #[test]
    fn a_limit_below_what_a_container_needs_is_refused_with_the_number() {
        let error = sized(r#"{"memory":{"limit":1000}}"#, "null", HOST)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("1000 bytes") && error.contains("4194304 (4 MiB)"),
            "{error}"
        );
    }

    #[test]
    fn the_vm_section_overrides_within_bounds() {
        let vm = r#"{"hwConfig":{"vcpus":3,"memory":134217728}}"#;
        assert_eq!(
            sized("{}", vm, HOST),
            Ok(VmSize {
                vcpus: 3,
                memory: MiB(128)
            })
        );
        let smaller = Host { cpus: 1, ..HOST };
        assert_eq!(sized("{}", vm, smaller).map(|size| size.vcpus), Ok(3));
        let small = sized("{}", r#"{"hwConfig":{"memory":1048576}}"#, HOST).unwrap_err();
        assert_eq!(small, SizingError::MachineTooSmall { bytes: 1 << 20 });
        for vcpus in [0, 33, 257] {
            let vm = format!(r#"{{"hwConfig":{{"vcpus":{vcpus}}}}}"#);
            assert_eq!(sized("{}", &vm, HOST), Err(SizingError::Vcpus { vcpus }));
        }
    }

    #[test]
    fn a_machine_grows_to_the_sum_of_its_containers_and_no_further() {
        let config = Config {
            max_vcpus: 6,
            max_memory_mib: MiB(1024),
            ..Config::default()
        };
        let boot = VmSize {
            vcpus: 1,
            memory: MiB(256),
        };
        let bounds = Bounds::of(boot, &Spec::default(), &config, HOST);
        let fitting = |all: &[(u64, u64)]| {
            let needs = all.iter().map(|(mib, milli_cpus)| Needs {
                memory_bytes: mib << 20,
                milli_cpus: *milli_cpus,
                huge_bytes: 0,
            });
            let VmSize { vcpus, memory } = bounds.fitting(needs);
            (memory.0, vcpus)
        };
        assert_eq!(fitting(&[]), (256, 1));
        assert_eq!(fitting(&[(0, 0), (0, 0)]), (256, 1));
        assert_eq!(fitting(&[(192, 1000)]), (256, 1), "it fits");
        assert_eq!(fitting(&[(193, 1001)]), (258, 2));
        assert_eq!(fitting(&[(193, 900), (100, 900), (0, 0)]), (358, 2));
        assert_eq!(fitting(&[(960, 6000)]), (1024, 6));
        assert_eq!(fitting(&[(960, 6000), (960, 6000)]), (1024, 6));
        assert_eq!(fitting(&[(u64::MAX >> 20, u64::MAX)]), (1024, 6));
    }

    #[test]
    fn huge_pages_come_on_top_of_everything_else() {
        let resources = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":67108864},{"pageSize":"1GB","limit":0}]}"#;
        let boot = sized(resources, "null", HOST).unwrap();
        assert_eq!(boot.memory, MiB(256 + 64));
        let json = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        let spec: Spec = serde_json::from_str(&json).unwrap();
        let config = Config {
            max_memory_mib: MiB(512),
            ..Config::default()
        };
        let bounds = Bounds::of(boot, &spec, &config, HOST);
        let fitting = |all: &[(u64, u64)]| {
            let needs = all.iter().map(|(mib, huge_mib)| Needs {
                memory_bytes: mib << 20,
                milli_cpus: 0,
                huge_bytes: huge_mib << 20,
            });
            bounds.fitting(needs).memory.0
        };
        assert_eq!(fitting(&[(0, 64)]), 320, "what it booted with");
        assert_eq!(fitting(&[(0, 64), (0, 32)]), 352);
        assert_eq!(
            fitting(&[(0, 64), (192, 0)]),
            320,
            "256 MiB beside the pages"
        );
        assert_eq!(fitting(&[(0, 64), (256, 32)]), 320 + 96);
        assert_eq!(fitting(&[(0, 64), (0, 500)]), 512);
        assert_eq!(bounds.beyond(256 << 20), None);
        assert_eq!(bounds.beyond(257 << 20), Some(MiB(513)));
    }

    #[test]
    fn the_most_is_the_hosts_where_nothing_else_is_configured() {
        let boot = VmSize {
            vcpus: 2,
            memory: MiB(256),
        };
        let config = |max_vcpus, max_memory_mib| Config {
            max_vcpus,
            max_memory_mib: MiB(max_memory_mib),
            ..Config::default()
        };
        let most = |config: &Config| Bounds::of(boot, &Spec::default(), config, HOST).most;
        let size = |vcpus, memory| VmSize {
            vcpus,
            memory: MiB(memory),
        };
        assert_eq!(most(&config(32, 0)), size(8, 8192));
        assert_eq!(most(&config(4, 512)), size(4, 512));
        assert_eq!(most(&config(1, 64)), boot);
    }

    #[test]
    fn a_machine_larger_than_the_host_is_refused() {
        let host = Host {
            cpus: 1,
            memory_bytes: 128 << 20,
        };
        assert!(matches!(
            sized("{}", "null", host),
            Err(SizingError::HostTooSmall { .. })
        ));
    }
}
