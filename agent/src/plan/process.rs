//! The process itself: identity, rights, limits, environment.
//!
//! Contract: pure. Unknown capability names are dropped, as runc drops them (with a warning there).
//! Spec: OCI config.md "Process", config-linux.md "personality".

use super::PlanError;
use crate::sys::SchedAttributes;
use caisson_agent_api::{is_engines_apparmor_profile, number_list};
use oci_spec::runtime::{
    Capabilities, IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, PosixRlimitType, Process, Scheduler,
};
use serde::{Deserialize, Serialize};

/// A process, ready to be started.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Program and arguments; never empty.
    pub args: Vec<String>,
    /// `KEY=value`, each key once.
    pub env: Vec<String>,
    /// Working directory, in the container.
    pub cwd: String,
    /// Standard streams are a pseudo-terminal of the container.
    pub terminal: bool,
    /// Rows and columns of the terminal.
    pub console_size: Option<(u16, u16)>,
    /// User, as the container sees it.
    pub uid: u32,
    /// Group, as the container sees it.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    /// The five sets, if the specification names any.
    pub capabilities: Option<CapabilityPlan>,
    /// No rights are gained by execve.
    pub no_new_privileges: bool,
    /// The filter, compiled.
    pub seccomp: Option<super::seccomp::Filter>,
    /// `RLIMIT_*`, soft, hard.
    pub rlimits: Vec<(PosixRlimitType, u64, u64)>,
    /// How readily the OOM killer takes it.
    pub oom_score_adjust: Option<i32>,
    /// For personality(2).
    pub personality: Option<u64>,
    /// For sched_setattr(2).
    pub scheduler: Option<SchedAttributes>,
    /// For ioprio_set(2).
    pub io_priority: Option<u32>,
    /// The guest's processors that a further process of a container runs on; not for its first.
    pub affinity: AffinityPlan,
    /// Number of further descriptors, from 3 upwards.
    pub preserved: u32,
}

/// Processors by number (`process.execCPUAffinity`); empty: left as it is.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinityPlan {
    /// Before the process is in the container's cgroup.
    pub before: Vec<u32>,
    /// In it.
    pub after: Vec<u32>,
}

/// Capability sets as bits (capabilities(7)).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilityPlan {
    /// What execve may ever give.
    pub bounding: u64,
    /// In force.
    pub effective: u64,
    /// Kept over execve, with the file's.
    pub inheritable: u64,
    /// What may be put in force.
    pub permitted: u64,
    /// Kept over execve of a plain file.
    pub ambient: u64,
}

/// In the kernel's order: the place is the number.
#[rustfmt::skip]
const CAPABILITIES: [&str; 41] = [
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
];

/// The number of the last capability that this agent knows.
pub const LAST_CAPABILITY: u32 = 40;

fn capability_bits(set: Option<&Capabilities>) -> u64 {
    let bit = |name: &str| CAPABILITIES.iter().position(|c| *c == name).map(|n| 1 << n);
    set.into_iter()
        .flatten()
        .filter_map(|c| bit(&c.to_string()))
        .fold(0, |all, one: u64| all | one)
}

/// Preserved descriptors: the numbers below the child's own (`child.rs`, `HIGH`).
const MOST_PRESERVED: u32 = 250;

/// Plans a process of a container; `filter` and `personality` are the container's, whichever process it is.
pub fn plan(
    process: &Process,
    filter: Option<super::seccomp::Filter>,
    personality: Option<&LinuxPersonality>,
    preserved: u32,
) -> Result<ProcessPlan, PlanError> {
    let args = process.args().clone().filter(|a| !a.is_empty());
    let args = args.ok_or(PlanError::Missing {
        field: "process.args",
    })?;
    let cwd = process
        .cwd()
        .to_str()
        .filter(|c| c.starts_with('/'))
        .ok_or_else(|| PlanError::Invalid {
            field: "process.cwd",
            value: process.cwd().display().to_string(),
        })?;
    let strings = args.iter().chain(process.env().iter().flatten());
    if let Some(bad) = strings.chain([&cwd.to_owned()]).find(|s| s.contains('\0')) {
        return Err(PlanError::Invalid {
            field: "process",
            value: bad.clone(),
        });
    }
    if preserved > MOST_PRESERVED {
        let value = format!("{preserved} descriptors, at most {MOST_PRESERVED}");
        return Err(PlanError::Invalid {
            field: "preserved descriptors",
            value,
        });
    }
    refuse_labels(process)?;
    let sets = process.capabilities().as_ref();
    let user = process.user();
    Ok(ProcessPlan {
        args,
        env: environment(process.env().as_deref().unwrap_or_default())?,
        cwd: cwd.to_owned(),
        terminal: process.terminal().unwrap_or(false),
        console_size: process.console_size().map(|size| {
            let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
            (clamp(size.height()), clamp(size.width()))
        }),
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask().unwrap_or(0o022) & 0o777,
        capabilities: sets.map(|s| CapabilityPlan {
            bounding: capability_bits(s.bounding().as_ref()),
            effective: capability_bits(s.effective().as_ref()),
            inheritable: capability_bits(s.inheritable().as_ref()),
            permitted: capability_bits(s.permitted().as_ref()),
            ambient: capability_bits(s.ambient().as_ref()),
        }),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        seccomp: filter,
        rlimits: rlimits(process)?,
        oom_score_adjust: process.oom_score_adj(),
        personality: personality.map(personality_bits).transpose()?,
        scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
        io_priority: process
            .io_priority()
            .as_ref()
            .map(|p| {
                let class = match p.class() {
                    IOPriorityClass::IoprioClassRt => 1,
                    IOPriorityClass::IoprioClassBe => 2,
                    IOPriorityClass::IoprioClassIdle => 3,
                };
                let level = u32::try_from(p.priority()).ok().filter(|l| *l < 8);
                let value = p.priority().to_string();
                level
                    .map(|level| class << 13 | level)
                    .ok_or(PlanError::Invalid {
                        field: "process.ioPriority.priority",
                        value,
                    })
            })
            .transpose()?,
        affinity: affinity(process)?,
        preserved,
    })
}

fn affinity(process: &Process) -> Result<AffinityPlan, PlanError> {
    let Some(given) = process.exec_cpu_affinity() else {
        return Ok(AffinityPlan::default());
    };
    let numbers = |text: &Option<String>, field| match text.as_deref() {
        None | Some("") => Ok(Vec::new()),
        Some(text) => number_list::parse(text).map_err(|error| PlanError::Invalid {
            field,
            value: error.to_string(),
        }),
    };
    Ok(AffinityPlan {
        before: numbers(given.initial(), "process.execCPUAffinity.initial")?,
        after: numbers(given.cpu_affinity_final(), "process.execCPUAffinity.final")?,
    })
}

/// The guest's kernel has no such security modules. A profile of somebody's own is a wish that would go unfulfilled;
/// runc refuses any where AppArmor is off, and skips an SELinux label where SELinux is off.
fn refuse_labels(process: &Process) -> Result<(), PlanError> {
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if matches!(profile, "" | "unconfined") || is_engines_apparmor_profile(profile) {
        return Ok(());
    }
    Err(PlanError::Unsupported {
        feature: format!("process.apparmorProfile {profile:?}"),
    })
}

/// The variables, each name once with its last value, in the order of first appearance (as Go's `os.Setenv` leaves them).
fn environment(given: &[String]) -> Result<Vec<String>, PlanError> {
    let mut env: Vec<&str> = Vec::with_capacity(given.len() + 1);
    for variable in given {
        let Some((name, _)) = variable
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
        else {
            return Err(PlanError::Invalid {
                field: "process.env",
                value: variable.clone(),
            });
        };
        let known = env
            .iter_mut()
            .find(|v| v.split_once('=').is_some_and(|(n, _)| n == name));
        match known {
            Some(known) => *known = variable,
            None => env.push(variable),
        }
    }
    Ok(env.into_iter().map(str::to_owned).collect())
}

fn rlimits(process: &Process) -> Result<Vec<(PosixRlimitType, u64, u64)>, PlanError> {
    let mut out: Vec<(PosixRlimitType, u64, u64)> = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        if out.iter().any(|(kind, ..)| *kind == limit.typ()) {
            let value = format!("{} twice", limit.typ());
            return Err(PlanError::Invalid {
                field: "process.rlimits",
                value,
            });
        }
        out.push((limit.typ(), limit.soft(), limit.hard()));
    }
    Ok(out)
}

fn personality_bits(personality: &LinuxPersonality) -> Result<u64, PlanError> {
    if let Some(flag) = personality.flags().iter().flatten().next() {
        return Err(PlanError::Unsupported {
            feature: format!("linux.personality.flags {flag}"),
        });
    }
    Ok(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

fn scheduler(given: &Scheduler) -> Result<SchedAttributes, PlanError> {
    let policy = match given.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flag = |f: &LinuxSchedulerFlag| match f {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    let priority = given.priority().unwrap_or(0);
    let invalid = || PlanError::Invalid {
        field: "process.scheduler.priority",
        value: priority.to_string(),
    };
    Ok(SchedAttributes {
        size: u32::try_from(size_of::<SchedAttributes>()).unwrap_or(48),
        policy,
        flags: given
            .flags()
            .iter()
            .flatten()
            .map(flag)
            .fold(0, |all, one| all | one),
        nice: given.nice().unwrap_or(0),
        priority: u32::try_from(priority).map_err(|_| invalid())?,
        runtime: given.runtime().unwrap_or(0),
        deadline: given.deadline().unwrap_or(0),
        period: given.period().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(more: &str) -> Result<ProcessPlan, PlanError> {
        let json = format!(r#"{{"user":{{"uid":0,"gid":0}},"args":["sh"],"cwd":"/"{more}}}"#);
        plan(&serde_json::from_str(&json).unwrap(), None, None, 0)
    }

    #[test]
    fn capabilities_become_the_kernels_bits() {
        let plan = run(
            r#","capabilities":{"bounding":["CAP_CHOWN","CAP_CHECKPOINT_RESTORE"],
                          "effective":["CAP_SYS_ADMIN"],"ambient":[]}"#,
        )
        .unwrap();
        let sets = plan.capabilities.unwrap();
        assert_eq!(sets.bounding, 1 | 1 << 40);
        assert_eq!(sets.effective, 1 << 21);
        assert_eq!((sets.permitted, sets.inheritable, sets.ambient), (0, 0, 0));
        assert!(run("").unwrap().capabilities.is_none());
    }

    #[test]
    fn processors_are_numbers_and_ranges() {
        let plan = run(r#","execCPUAffinity":{"initial":"0-2,7"}"#).unwrap();
        assert_eq!(plan.affinity.before, [0, 1, 2, 7]);
        assert!(plan.affinity.after.is_empty());
        let error = run(r#","execCPUAffinity":{"final":"2-1"}"#).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("process.execCPUAffinity.final: ")
        );
        assert_eq!(run("").unwrap().affinity, AffinityPlan::default());
    }

    #[test]
    fn the_last_value_of_a_variable_counts_in_its_first_place() {
        let plan = run(r#","env":["A=1","B=2","A=3=4"]"#).unwrap();
        assert_eq!(plan.env, ["A=3=4", "B=2"]);
        assert!(run(r#","env":["A"]"#).is_err());
        assert!(run(r#","env":["=x"]"#).is_err());
    }

    #[test]
    fn more_preserved_descriptors_than_there_are_numbers_for_are_refused() {
        let json = r#"{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/"}"#;
        let with = |n| plan(&serde_json::from_str(json).unwrap(), None, None, n).is_ok();
        assert!(with(MOST_PRESERVED) && !with(MOST_PRESERVED + 1));
    }

    #[test]
    fn the_umask_is_022_unless_given() {
        assert_eq!(run("").unwrap().umask, 0o022);
    }

    #[test]
    fn a_relative_cwd_and_an_empty_command_are_refused() {
        for json in [
            r#"{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"tmp"}"#,
            r#"{"user":{"uid":0,"gid":0},"args":[],"cwd":"/"}"#,
            "{\"user\":{\"uid\":0,\"gid\":0},\"args\":[\"a\\u0000b\"],\"cwd\":\"/\"}",
        ] {
            assert!(
                plan(&serde_json::from_str(json).unwrap(), None, None, 0).is_err(),
                "{json}"
            );
        }
    }

    #[test]
    fn the_same_rlimit_twice_is_refused() {
        let limit = r#"{"type":"RLIMIT_NOFILE","soft":1,"hard":2}"#;
        assert_eq!(
            run(&format!(r#","rlimits":[{limit}]"#))
                .unwrap()
                .rlimits
                .len(),
            1
        );
        assert!(run(&format!(r#","rlimits":[{limit},{limit}]"#)).is_err());
    }

    #[test]
    fn priorities_are_encoded_and_checked() {
        let plan = run(r#","ioPriority":{"class":"IOPRIO_CLASS_BE","priority":4},
                          "scheduler":{"policy":"SCHED_BATCH","nice":5}"#)
        .unwrap();
        assert_eq!(plan.io_priority, Some(2 << 13 | 4));
        let scheduler = plan.scheduler.unwrap();
        assert_eq!(
            (scheduler.policy, scheduler.nice, scheduler.size),
            (3, 5, 48)
        );
        assert!(run(r#","ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}"#).is_err());
    }

    #[test]
    fn an_apparmor_profile_is_refused_unless_every_container_has_it() {
        let error = run(r#","apparmorProfile":"mine""#).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"process.apparmorProfile "mine" is not supported"#
        );
        assert!(run(r#","apparmorProfile":"docker-default""#).is_ok());
        assert!(run(r#","apparmorProfile":"containers-default-0.50.1""#).is_ok());
        assert!(run(r#","apparmorProfile":"unconfined","selinuxLabel":"x""#).is_ok());
    }
}
