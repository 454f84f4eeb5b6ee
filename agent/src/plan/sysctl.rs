//! Sysctls: only those that belong to the container's own namespaces.
//!
//! Contract: pure. The lists and the messages are runc's (libcontainer/configs/validate, sysctl), but for `net.*`: the
//! guest's network belongs to the sandbox alone, so those are the container's own with and without a namespace.

use super::{PlanError, namespaces};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Files relative to /proc/sys and their values, sorted by name.
pub fn plan(spec: &Spec) -> Result<Vec<(String, String)>, PlanError> {
    let Some(given) = spec.linux().as_ref().and_then(|l| l.sysctl().as_ref()) else {
        return Ok(Vec::new());
    };
    let mut out = Vec::with_capacity(given.len());
    for (name, value) in given {
        let path = path(name);
        check(spec, name, &path)?;
        out.push((path, value.clone()));
    }
    out.sort();
    Ok(out)
}

/// The file below /proc/sys. Whichever of `.` and `/` comes first separates; the other then stands for a `.` in a name
/// (sysctl(8), sysctl.d(5)).
fn path(name: &str) -> String {
    if name
        .find(['.', '/'])
        .is_some_and(|at| name[at..].starts_with('/'))
    {
        return name.to_owned();
    }
    name.chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            other => other,
        })
        .collect()
}

fn check(spec: &Spec, given: &str, path: &str) -> Result<(), PlanError> {
    let refuse = |reason| {
        Err(PlanError::Sysctl {
            name: given.to_owned(),
            reason,
        })
    };
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refuse("is not a valid name");
    }
    let name = path.replace('/', ".");
    let name = name.as_str();
    if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        return match namespaces::is_private(spec, LinuxNamespaceType::Ipc) {
            true => Ok(()),
            false => refuse("is not allowed in the hosts ipc namespace"),
        };
    }
    if name.starts_with("net.") {
        return Ok(());
    }
    let uts = namespaces::is_private(spec, LinuxNamespaceType::Uts);
    match name {
        "kernel.domainname" if uts => Ok(()),
        "kernel.domainname" => refuse("is not allowed in the hosts uts namespace"),
        "kernel.hostname" => refuse("is not allowed as it conflicts with the OCI hostname field"),
        _ => refuse("is not in a separate kernel namespace"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, namespaces: &str) -> Result<Vec<(String, String)>, String> {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}],
            "sysctl":{{"{name}":"1"}}}}}}"#
        );
        plan(&super::super::parse(json.as_bytes()).unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn names_become_paths() {
        assert_eq!(
            run("net.ipv4.ip_forward", "").unwrap()[0].0,
            "net/ipv4/ip_forward"
        );
        assert_eq!(
            run("net/ipv4/conf/eth0.1/forwarding", "").unwrap()[0].0,
            "net/ipv4/conf/eth0.1/forwarding"
        );
    }

    #[test]
    fn ipc_and_uts_sysctls_need_their_namespaces() {
        assert!(run("kernel.shmmax", r#"{"type":"ipc"}"#).is_ok());
        assert_eq!(
            run("kernel.shmmax", "").unwrap_err(),
            r#"sysctl "kernel.shmmax" is not allowed in the hosts ipc namespace"#
        );
        assert!(run("fs.mqueue.msg_max", r#"{"type":"ipc"}"#).is_ok());
        assert!(run("kernel.domainname", r#"{"type":"uts"}"#).is_ok());
        assert!(run("kernel.hostname", r#"{"type":"uts"}"#).is_err());
    }

    #[test]
    fn sysctls_of_the_whole_kernel_are_refused() {
        assert_eq!(
            run("vm.swappiness", "").unwrap_err(),
            r#"sysctl "vm.swappiness" is not in a separate kernel namespace"#
        );
        for name in [
            "net/../vm/swappiness",
            "net..x",
            "/net/x",
            "net/a/../../kernel/x",
        ] {
            assert!(run(name, "").is_err(), "{name}");
        }
    }
}
