//! The last steps of every process: limits, descriptors, filter, identity, rights, execve.
//!
//! The order within [`finalize`] is runc's finalizeNamespace; see there before changing it.

use super::control::Control;
use super::{ChildError, Context, FromChild};
use crate::plan::process::{CapabilityPlan, LAST_CAPABILITY, ProcessPlan};
use crate::plan::seccomp::Filter;
use crate::sys;
use oci_spec::runtime::PosixRlimitType as Limit;
use rustix::fs::{FileType, Gid, Mode, Uid, fchown, fstat};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, CpuSet, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, sched_setaffinity,
    set_capabilities, set_keep_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::{fs, io};

/// Resource limits, scheduling and personality: while all rights are still there.
pub(super) fn limits(plan: &ProcessPlan) -> Result<(), ChildError> {
    if let Some(scheduler) = &plan.scheduler {
        sys::set_scheduler(scheduler).step(|| "error setting scheduler".to_owned())?;
    }
    if let Some(priority) = plan.io_priority {
        sys::set_io_priority(priority).step(|| "error setting io priority".to_owned())?;
    }
    if let Some(domain) = plan.personality {
        sys::set_personality(domain).step(|| "error setting personality".to_owned())?;
    }
    for (kind, soft, hard) in &plan.rlimits {
        let some = |n: u64| (n != u64::MAX).then_some(n);
        let limit = Rlimit {
            current: some(*soft),
            maximum: some(*hard),
        };
        setrlimit(resource(*kind), limit).step(|| format!("error setting rlimit type {kind}"))?;
    }
    Ok(())
}

/// Makes room for [`limits`] in a user namespace, where no right raises a hard limit: those that the plan wants higher
/// are raised now, the soft ones stay.
pub(super) fn raise_hard_limits(plan: &ProcessPlan) -> Result<(), ChildError> {
    for (kind, _, hard) in &plan.rlimits {
        let now = getrlimit(resource(*kind));
        // Without a limit now there is nothing to raise.
        if now.maximum.is_some_and(|maximum| maximum < *hard) {
            let limit = Rlimit {
                current: now.current,
                maximum: (*hard != u64::MAX).then_some(*hard),
            };
            setrlimit(resource(*kind), limit)
                .step(|| format!("error setting rlimit type {kind}"))?;
        }
    }
    Ok(())
}

const fn resource(kind: Limit) -> Resource {
    match kind {
        Limit::RlimitCpu => Resource::Cpu,
        Limit::RlimitFsize => Resource::Fsize,
        Limit::RlimitData => Resource::Data,
        Limit::RlimitStack => Resource::Stack,
        Limit::RlimitCore => Resource::Core,
        Limit::RlimitRss => Resource::Rss,
        Limit::RlimitNproc => Resource::Nproc,
        Limit::RlimitNofile => Resource::Nofile,
        Limit::RlimitMemlock => Resource::Memlock,
        Limit::RlimitAs => Resource::As,
        Limit::RlimitLocks => Resource::Locks,
        Limit::RlimitSigpending => Resource::Sigpending,
        Limit::RlimitMsgqueue => Resource::Msgqueue,
        Limit::RlimitNice => Resource::Nice,
        Limit::RlimitRtprio => Resource::Rtprio,
        Limit::RlimitRttime => Resource::Rttime,
    }
}

/// Gives the preserved descriptors their numbers, from 3 upwards, and marks all others close-on-exec.
pub(super) fn place_descriptors(preserved: &[OwnedFd]) -> Result<(), ChildError> {
    let mut number = 3;
    for fd in preserved {
        sys::place(fd.as_fd(), number).step(|| format!("place descriptor {number}"))?;
        number += 1;
    }
    sys::close_on_exec_from(number.unsigned_abs()).step(|| "close_range".to_owned())
}

/// Loads the seccomp filter, if it is its turn. If it has a listener the agent takes a copy of that, and this one is
/// closed; system calls from then on may have to wait for the listener's other end.
pub(super) fn load_filter(filter: Option<&Filter>, control: &Control) -> Result<(), ChildError> {
    let Some(filter) = filter else { return Ok(()) };
    let listener = sys::load_seccomp(&filter.program, filter.flags)
        .step(|| "load the seccomp filter".to_owned())?;
    if let Some(listener) = listener {
        control.send(&FromChild::Listener(listener.as_raw_fd()));
        control.wait()?;
    }
    Ok(())
}

/// Working directory, identity and rights.
pub(super) fn finalize(plan: &ProcessPlan) -> Result<(), ChildError> {
    rustix::process::umask(Mode::from_raw_mode(plan.umask));
    let chdir = || {
        rustix::process::chdir(plan.cwd.as_str())
            .step(|| format!("chdir to cwd ({:?}) set in config.json failed", plan.cwd))
    };
    // Before the user changes, since root may reach a directory that the user cannot; and again after, since on some
    // file systems it is the other way round.
    let early = rustix::process::chdir(plan.cwd.as_str());
    match early {
        Ok(()) | Err(Errno::ACCESS | Errno::PERM) => {}
        Err(_) => chdir()?,
    }
    if let Some(sets) = &plan.capabilities {
        drop_bounding(sets.bounding)?;
    }
    set_keep_capabilities(true).step(|| "set keep caps".to_owned())?;
    change_user(plan)?;
    if early.is_err() {
        chdir()?;
    }
    check_cwd(&plan.cwd)?;
    set_keep_capabilities(false).step(|| "clear keep caps".to_owned())?;
    if let Some(sets) = &plan.capabilities {
        apply_capabilities(sets)?;
    }
    Ok(())
}

/// A working directory outside the container's root would be a way out of it (CVE-2024-21626).
fn check_cwd(cwd: &str) -> Result<(), ChildError> {
    let refuse = |reason| {
        Err(ChildError::Cwd {
            cwd: cwd.to_owned(),
            reason,
        })
    };
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.to_bytes().starts_with(b"/") => Ok(()),
        Ok(_) | Err(Errno::NOENT) => {
            refuse("current working directory is outside of container mount namespace root")
        }
        Err(_) => refuse("the current working directory cannot be named"),
    }
}

fn change_user(plan: &ProcessPlan) -> Result<(), ChildError> {
    if !is_mapped("/proc/self/uid_map", plan.uid) {
        return Err(ChildError::Unmapped("uid"));
    }
    if !is_mapped("/proc/self/gid_map", plan.gid) {
        return Err(ChildError::Unmapped("gid"));
    }
    own_streams(plan.uid)?;
    let groups: Vec<Gid> = plan.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    let denied = || fs::read_to_string("/proc/self/setgroups").is_ok_and(|t| t.trim() == "deny");
    match set_thread_groups(&groups) {
        Err(Errno::PERM) if groups.is_empty() && denied() => {}
        other => other.step(|| "setgroups".to_owned())?,
    }
    let gid = Some(Gid::from_raw(plan.gid));
    set_thread_res_gid(gid, gid, gid).step(|| "setgid".to_owned())?;
    let uid = Some(Uid::from_raw(plan.uid));
    set_thread_res_uid(uid, uid, uid).step(|| "setuid".to_owned())
}

/// Whether the identity exists in this user namespace. Without a readable map (no /proc) the kernel decides.
fn is_mapped(map: &str, id: u32) -> bool {
    let Ok(text) = fs::read_to_string(map) else {
        return true;
    };
    text.lines().any(|line| {
        let numbers: Vec<u64> = line
            .split_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect();
        matches!(numbers[..], [first, _, count] if (first..first + count).contains(&id.into()))
    })
}

/// The user may open its own standard streams again by /dev/stdout and its like (runc: fixStdioPermissions).
fn own_streams(uid: u32) -> Result<(), ChildError> {
    let null = fs::metadata("/dev/null")
        .map(|m| std::os::unix::fs::MetadataExt::rdev(&m))
        .ok();
    for stream in [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ] {
        let stat = fstat(stream).step(|| "fstat a standard stream".to_owned())?;
        let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && Some(stat.st_rdev) == null;
        if is_null || stat.st_uid == uid {
            continue;
        }
        match fchown(
            stream,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(stat.st_gid)),
        ) {
            // A stream that is not of this user namespace, or of a read-only file system, stays as it is.
            Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS) => {}
            Err(e) => return Err(e).step(|| "chown a standard stream".to_owned()),
        }
    }
    Ok(())
}

fn drop_bounding(keep: u64) -> Result<(), ChildError> {
    for number in 0..=LAST_CAPABILITY {
        let one = 1u64 << number;
        if keep & one != 0 {
            continue;
        }
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(one)) {
            // A kernel that does not know it cannot give it.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(e) => return Err(e).step(|| "drop the bounding set".to_owned()),
        }
    }
    Ok(())
}

fn apply_capabilities(plan: &CapabilityPlan) -> Result<(), ChildError> {
    let bits = CapabilitySet::from_bits_retain;
    let sets = CapabilitySets {
        effective: bits(plan.effective),
        permitted: bits(plan.permitted),
        inheritable: bits(plan.inheritable),
    };
    set_capabilities(None, sets).step(|| "error setting capabilities".to_owned())?;
    clear_ambient_capability_set().step(|| "clear the ambient set".to_owned())?;
    for number in 0..=LAST_CAPABILITY {
        let one = 1u64 << number;
        if plan.ambient & one != 0 {
            // Only what is permitted and inheritable can be ambient; runc ignores the rest with a warning.
            let _ = configure_capability_in_ambient_set(bits(one), true);
        }
    }
    Ok(())
}

/// The process's environment; HOME comes from the container's /etc/passwd if it is not given (runc: setupUser).
pub(super) fn environment(plan: &ProcessPlan) -> Vec<CString> {
    let mut env: Vec<CString> = plan
        .env
        .iter()
        .filter_map(|v| CString::new(v.as_str()).ok())
        .collect();
    let home = |v: &CString| v.to_bytes().starts_with(b"HOME=");
    if env.iter().any(|v| home(v) && v.to_bytes().len() > 5) {
        return env;
    }
    env.retain(|v| !home(v));
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let value = home_of(&String::from_utf8_lossy(&passwd), plan.uid).unwrap_or("/".to_owned());
    env.extend(CString::new(format!("HOME={value}")));
    env
}

/// The home directory of a user (passwd(5)).
fn home_of(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.nth(2)?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        found.then(|| home.to_owned())
    })
}

/// execve; returns only the error.
pub(super) fn execute(program: &CStr, args: &[String], env: &[CString]) -> ChildError {
    let path = program.to_string_lossy().into_owned();
    let args: Result<Vec<CString>, _> = args.iter().map(|a| CString::new(a.as_str())).collect();
    match args {
        Ok(args) => ChildError::Execute {
            path,
            source: sys::execute(program, &args, env),
        },
        Err(_) => ChildError::Execute {
            path,
            source: io::ErrorKind::InvalidInput.into(),
        },
    }
}

/// Has this process run on the given processors alone; on any if none is given. `when` is runc's word.
pub(super) fn set_affinity(processors: &[u32], when: &str) -> Result<(), ChildError> {
    if processors.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for number in processors {
        // Below the set's size, as the plan says (`number_list::LIMIT`).
        set.set(usize::try_from(*number).unwrap_or(0));
    }
    sched_setaffinity(None, &set).step(|| format!("error setting {when} CPU affinity"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_directory_is_the_sixth_field_of_the_users_line() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nu:x:7:7::/home/u:/bin/sh\n";
        assert_eq!(home_of(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_of(passwd, 7).as_deref(), Some("/home/u"));
        assert_eq!(home_of(passwd, 8), None);
    }
}
