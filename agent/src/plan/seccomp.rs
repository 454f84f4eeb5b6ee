//! The seccomp profile, compiled to a filter by libseccomp.
//!
//! Contract: pure but for the library's memory and one memory file. The result loads with one system call in the child,
//! so that every process of a container shares one compilation. As in runc, system calls that the profile's rules do
//! not know because they are newer get ENOSYS instead of the default action, so that C libraries fall back
//! (libcontainer/seccomp/patchbpf).
//! A filter that notifies (SCMP_ACT_NOTIFY) has a listener; see `supervision.rs`.
//! Spec: OCI config-linux.md "Seccomp"; seccomp(2).

use super::PlanError;
use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg,
    LinuxSeccompFilterFlag as Flag, LinuxSeccompOperator as Operator, LinuxSyscall,
};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use std::io::{Read, Seek};

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// One `sock_filter` each, in its memory layout.
    pub program: Vec<u64>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
}

fn step(step: impl Into<String>) -> impl FnOnce(SeccompError) -> PlanError {
    let step = step.into();
    move |source| PlanError::Seccomp { step, source }
}

/// A filter's flag that makes a listener.
const NEW_LISTENER: u64 = 1 << 3;
/// What TSYNC needs beside it.
const TSYNC_ESRCH: u64 = 1 << 4;
const TSYNC: u64 = 1;

/// Compiles a profile.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter, PlanError> {
    let mut notifies = false;
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default).map_err(step("start a filter"))?;
    for arch in profile.architectures().iter().flatten() {
        let arch = architecture(*arch)?;
        context
            .add_arch(arch)
            .map_err(step(format!("add architecture {arch:?}")))?;
    }
    let mut newest = 0;
    for rule in profile.syscalls().iter().flatten() {
        if rule.names().is_empty() {
            return Err(PlanError::Missing {
                field: "linux.seccomp.syscalls.names",
            });
        }
        let verdict = action(rule.action(), rule.errno_ret())?;
        notifies |= verdict == ScmpAction::Notify;
        for name in rule.names() {
            // A name that this libseccomp does not know is left out, as runc does.
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            newest = newest.max(i32::from(call));
            if verdict != default {
                add(&mut context, rule, call, verdict, name)?;
            }
        }
    }
    let mut program = export(&context)?;
    let lenient = [
        Action::ScmpActAllow,
        Action::ScmpActLog,
        Action::ScmpActTrace,
    ];
    if !lenient.contains(&profile.default_action()) {
        program.splice(0..0, unknown_is_enosys(u32::try_from(newest).unwrap_or(0)));
    }
    let mut flags = profile
        .flags()
        .iter()
        .flatten()
        .fold(0, |all, flag| all | flag_bit(*flag));
    if notifies {
        flags |= NEW_LISTENER;
        flags |= if flags & TSYNC == 0 { 0 } else { TSYNC_ESRCH };
    }
    Ok(Filter { program, flags })
}

const fn flag_bit(flag: Flag) -> u64 {
    match flag {
        Flag::SeccompFilterFlagTsync => TSYNC,
        Flag::SeccompFilterFlagLog => 1 << 1,
        Flag::SeccompFilterFlagSpecAllow => 1 << 2,
        Flag::SeccompFilterFlagWaitKillableRecv => 1 << 5,
    }
}

fn action(action: Action, errno: Option<u32>) -> Result<ScmpAction, PlanError> {
    const EPERM: u32 = 1;
    let number = errno.unwrap_or(EPERM);
    let invalid = |_| PlanError::Invalid {
        field: "linux.seccomp.errnoRet",
        value: number.to_string(),
    };
    let takes_errno = matches!(action, Action::ScmpActErrno | Action::ScmpActTrace);
    if errno.is_some() && !takes_errno {
        return Err(PlanError::Invalid {
            field: "linux.seccomp",
            value: format!("errnoRet with {action}"),
        });
    }
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActErrno => ScmpAction::Errno(i32::try_from(number).map_err(invalid)?),
        Action::ScmpActTrace => ScmpAction::Trace(u16::try_from(number).map_err(invalid)?),
        Action::ScmpActLog => ScmpAction::Log,
        Action::ScmpActAllow => ScmpAction::Allow,
        Action::ScmpActNotify => ScmpAction::Notify,
    })
}

/// A filter for an architecture that the guest cannot execute would be dead weight; runc adds them all, and so do we.
fn architecture(arch: Arch) -> Result<ScmpArch, PlanError> {
    Ok(match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        other => {
            return Err(PlanError::Unsupported {
                feature: format!("seccomp architecture {other}"),
            });
        }
    })
}

fn compare(argument: &LinuxSeccompArg) -> Result<ScmpArgCompare, PlanError> {
    let (value, second) = (argument.value(), argument.value_two().unwrap_or(0));
    // The masked comparison has the mask first: (argument & value) == valueTwo.
    let (operator, datum) = match argument.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        Operator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
    };
    let index = u32::try_from(argument.index())
        .ok()
        .filter(|i| *i < 6)
        .ok_or_else(|| {
            let value = argument.index().to_string();
            PlanError::Invalid {
                field: "linux.seccomp.syscalls.args.index",
                value,
            }
        })?;
    Ok(ScmpArgCompare::new(index, operator, datum))
}

/// Adds one rule. Several comparisons of one argument cannot be joined by "and" in a filter: they become rules of
/// their own, joined by "or", as runc has always read them.
fn add(
    context: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    call: ScmpSyscall,
    verdict: ScmpAction,
    name: &str,
) -> Result<(), PlanError> {
    let args = rule.args().as_deref().unwrap_or_default();
    let comparisons = args.iter().map(compare).collect::<Result<Vec<_>, _>>()?;
    let repeated = (0..6).any(|index| args.iter().filter(|a| a.index() == index).count() > 1);
    let failed = || step(format!("add a rule for {name}"));
    if comparisons.is_empty() {
        context.add_rule(verdict, call).map_err(failed())?;
    } else if repeated {
        for comparison in comparisons {
            context
                .add_rule_conditional(verdict, call, &[comparison])
                .map_err(failed())?;
        }
    } else {
        context
            .add_rule_conditional(verdict, call, &comparisons)
            .map_err(failed())?;
    }
    Ok(())
}

fn export(context: &ScmpFilterContext) -> Result<Vec<u64>, PlanError> {
    let fd = rustix::fs::memfd_create("seccomp", MemfdFlags::CLOEXEC)
        .map_err(|e| PlanError::SeccompExport(e.into()))?;
    let mut file = std::fs::File::from(fd);
    context
        .export_bpf(&mut file)
        .map_err(step("compile the filter"))?;
    let mut bytes = Vec::new();
    let read = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    read.map_err(PlanError::SeccompExport)?;
    let (chunks, _) = bytes.as_chunks::<8>();
    Ok(chunks.iter().map(|c| u64::from_le_bytes(*c)).collect())
}

/// Instructions in front of a filter: a native system call with a number above `newest` gets ENOSYS.
fn unknown_is_enosys(newest: u32) -> [u64; 6] {
    const LOAD: u16 = 0x20; // A = seccomp_data[k]
    const EQUAL: u16 = 0x15;
    const GREATER: u16 = 0x25;
    const RETURN: u16 = 0x06;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const X32_BIT: u32 = 0x4000_0000;
    const RETURN_ENOSYS: u32 = 0x0005_0000 | 38;
    let one = |code: u16, yes: u8, no: u8, k: u32| {
        u64::from(code) | u64::from(yes) << 16 | u64::from(no) << 24 | u64::from(k) << 32
    };
    [
        one(LOAD, 0, 0, 4), // the architecture
        one(EQUAL, 0, 4, AUDIT_ARCH_X86_64),
        one(LOAD, 0, 0, 0), // the number
        one(GREATER, 2, 0, X32_BIT - 1),
        one(GREATER, 0, 1, newest),
        one(RETURN, 0, 0, RETURN_ENOSYS),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(json: &str) -> Result<Filter, PlanError> {
        compile(&serde_json::from_str(json).unwrap())
    }

    /// What a classic BPF filter answers to a system call with its first argument.
    fn verdict(filter: &Filter, arch: u32, call: u32, argument: u64) -> u32 {
        let mut data = Vec::new();
        data.extend(call.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        data.extend(argument.to_le_bytes());
        data.extend([0; 40]);
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let i = filter.program[at];
            let k = u32::try_from(i >> 32).unwrap();
            let (yes, no) = (
                usize::try_from(i >> 16 & 255).unwrap(),
                usize::try_from(i >> 24 & 255).unwrap(),
            );
            at += 1;
            let mut jump = |taken: bool| at += if taken { yes } else { no };
            match i & 0xffff {
                0x20 => {
                    let k = usize::try_from(k).unwrap();
                    a = u32::from_le_bytes(data[k..k + 4].try_into().unwrap());
                }
                0x54 => a &= k,
                0x15 => jump(a == k),
                0x25 => jump(a > k),
                0x35 => jump(a >= k),
                0x45 => jump(a & k != 0),
                0x05 => at += usize::try_from(k).unwrap(),
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const X86_64: u32 = 0xc000_003e;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    const MKDIR: u32 = 83;
    const PERSONALITY: u32 = 135;

    #[test]
    fn a_denied_call_gets_its_errno_and_others_pass() {
        let filter = run(r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":
            [{"names":["mkdir","no_such_call"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#)
        .unwrap();
        assert_eq!(verdict(&filter, X86_64, MKDIR, 0), ERRNO | 13);
        assert_eq!(verdict(&filter, X86_64, MKDIR + 1, 0), ALLOW);
        assert_eq!(verdict(&filter, X86_64, 9999, 0), ALLOW);
    }

    #[test]
    fn newer_calls_than_a_strict_profile_knows_do_not_exist() {
        let filter = run(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X32"],
            "syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ALLOW"}]}"#,
        )
        .unwrap();
        assert_eq!(verdict(&filter, X86_64, MKDIR, 0), ALLOW);
        assert_eq!(verdict(&filter, X86_64, MKDIR - 1, 0), ERRNO | 1);
        assert_eq!(verdict(&filter, X86_64, MKDIR + 1, 0), ERRNO | 38);
        assert_eq!(verdict(&filter, X86_64, 0x4000_0000 | MKDIR, 0), ALLOW);
        assert_eq!(
            verdict(&filter, X86_64, 0x4000_0000 | (MKDIR + 1), 0),
            ERRNO | 1
        );
    }

    #[test]
    fn comparisons_of_one_argument_are_alternatives() {
        let filter = run(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["personality"],
            "action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},
            {"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
        )
        .unwrap();
        assert_eq!(verdict(&filter, X86_64, PERSONALITY, 0), ALLOW);
        assert_eq!(verdict(&filter, X86_64, PERSONALITY, 8), ALLOW);
        assert_eq!(verdict(&filter, X86_64, PERSONALITY, 1), ERRNO | 1);
    }

    #[test]
    fn a_masked_comparison_has_the_mask_first() {
        let filter = run(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["personality"],
            "action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":240,"valueTwo":16,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
        )
        .unwrap();
        assert_eq!(verdict(&filter, X86_64, PERSONALITY, 0x1f), ALLOW);
        assert_eq!(verdict(&filter, X86_64, PERSONALITY, 0x2f), ERRNO | 1);
    }

    #[test]
    fn flags_are_the_kernels() {
        let filter = run(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}"#,
        );
        assert_eq!(filter.unwrap().flags, 6);
    }

    #[test]
    fn a_filter_that_notifies_has_a_listener() {
        let profile = |flags: &str| {
            run(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","flags":[{flags}],"syscalls":
                [{{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}}]}}"#
            ))
            .unwrap()
        };
        const NOTIFY: u32 = 0x7fc0_0000;
        let filter = profile("");
        assert_eq!(verdict(&filter, X86_64, MKDIR, 0), NOTIFY);
        assert_eq!(verdict(&filter, X86_64, MKDIR + 1, 0), ALLOW);
        assert_eq!(filter.flags, 8);
        assert_eq!(profile(r#""SECCOMP_FILTER_FLAG_TSYNC""#).flags, 1 | 8 | 16);
        assert_eq!(
            run(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap().flags,
            0
        );
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(run(r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#).is_err());
        assert!(
            run(r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
                 "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#)
            .is_err()
        );
    }
}
