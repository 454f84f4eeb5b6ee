//! The identities of an ordinary user's sandbox: a user namespace that holds the user and those that the specification's
//! mappings name on the host.
//!
//! Contract: [`Identities::enter`] moves this process, which has one thread, into a user namespace of its own, in which it
//! and the programs that it executes have the rights of [`RIGHTS`] over what belongs to these identities, and none over
//! anything else. Each identity has the number there that it has on the host: the mappings themselves are the guest's
//! kernel's to apply, as in a sandbox of root's, and the container's files get the owners that they would get from runc.
//! Only the user himself is mapped without help; for others the caller runs [`map_others`], outside of the namespace.
//! Root, of a user namespace too, needs none of this.
//! Spec: user_namespaces(7), newuidmap(1); runc 1.1, `validate/rootless.go`.

#![allow(
    unsafe_code,
    reason = "unshare(2) is unsafe in rustix because it can unshare descriptors"
)]

use std::{
    fs, io,
    process::{Command, Stdio},
};

use caisson_agent_api::id_map;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use rustix::thread::{
    CapabilitySet, UnshareFlags, capabilities, configure_capability_in_ambient_set,
    set_capabilities,
};
use serde::{Deserialize, Serialize};

use crate::text::one_line;

/// What the VMM may do to the files of these identities, and why.
const RIGHTS: &[(CapabilitySet, &str)] = &[
    (CapabilitySet::CHOWN, "chown of the container's root"),
    (
        CapabilitySet::DAC_OVERRIDE,
        "the guest's kernel decides who may open what",
    ),
    (CapabilitySet::FOWNER, "chmod, utimes, extended attributes"),
    (CapabilitySet::FSETID, "set-group-ID directories"),
    (CapabilitySet::SETFCAP, "file capabilities"),
    (CapabilitySet::SETGID, "files made under another group"),
    (CapabilitySet::SETUID, "files made under another user"),
    (
        CapabilitySet::SETPCAP,
        "keeping these while the effective user changes",
    ),
];

/// Why there is no such namespace.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The specification lacks something, in runc's words.
    #[error("{0}")]
    Missing(&'static str),
    /// The kernel refuses.
    #[error(
        "make a user namespace, which the container of an ordinary user needs (see sysctl user.max_user_namespaces, \
         kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns)"
    )]
    Refused(#[source] io::Error),
    /// A file of the namespace cannot be written.
    #[error("write {file}")]
    Write {
        /// Which.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The namespace's rights cannot be passed on.
    #[error("pass the user namespace's rights on")]
    Rights(#[source] io::Error),
    /// The program that maps others is not there.
    #[error("run {program} (of Debian's package uidmap), which maps users other than the caller")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It refuses.
    #[error("map {what} {list}: {words} (what a user may map is in /etc/{file})")]
    NotAllowed {
        /// Users or groups.
        what: &'static str,
        /// The numbers.
        list: String,
        /// What the program says.
        words: String,
        /// Where it is written down.
        file: &'static str,
    },
}

/// Consecutive numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    first: u32,
    count: u32,
}

/// Who is in the namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identities {
    users: Vec<Range>,
    groups: Vec<Range>,
}

impl Identities {
    /// Those that a container of the calling process needs; `None` for root.
    pub fn of_caller(spec: &Spec) -> Result<Option<Self>, IdentityError> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if uid.is_root() {
            return Ok(None);
        }
        Self::of(spec, uid.as_raw(), gid.as_raw()).map(Some)
    }

    /// Those that a container of this user needs.
    fn of(spec: &Spec, uid: u32, gid: u32) -> Result<Self, IdentityError> {
        let linux = spec.linux().as_ref();
        let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
        let has_own = namespaces
            .into_iter()
            .flatten()
            .any(|namespace| namespace.typ() == LinuxNamespaceType::User);
        if !has_own {
            let text = "rootless container requires user namespaces";
            return Err(IdentityError::Missing(text));
        }
        let users = linux.and_then(|linux| linux.uid_mappings().as_deref());
        let groups = linux.and_then(|linux| linux.gid_mappings().as_deref());
        let (users, groups) = (users.unwrap_or_default(), groups.unwrap_or_default());
        if users.is_empty() {
            let text = "rootless containers requires at least one UID mapping";
            return Err(IdentityError::Missing(text));
        }
        if groups.is_empty() {
            let text = "rootless containers requires at least one GID mapping";
            return Err(IdentityError::Missing(text));
        }
        Ok(Self {
            users: ranges(users, uid),
            groups: ranges(groups, gid),
        })
    }

    /// Whether somebody else than the user is among them.
    fn has_others(&self) -> bool {
        let only_one = |all: &[Range]| matches!(all, [Range { count: 1, .. }]);
        !(only_one(&self.users) && only_one(&self.groups))
    }

    /// Moves this process into the namespace. `true`: [`map_others`] comes next, then [`keep_rights`].
    pub fn enter(&self) -> Result<bool, IdentityError> {
        // SAFETY: NEWUSER does not unshare the table of descriptors, which is the danger of this call.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
            .map_err(|errno| IdentityError::Refused(errno.into()))?;
        if self.has_others() {
            return Ok(true);
        }
        // Who maps nobody but himself may not have groups of his choice: user_namespaces(7).
        for (file, text) in [
            ("/proc/self/setgroups", "deny".to_owned()),
            ("/proc/self/uid_map", lines(&self.users)),
            ("/proc/self/gid_map", lines(&self.groups)),
        ] {
            fs::write(file, text).map_err(|source| IdentityError::Write { file, source })?;
        }
        Ok(false)
    }
}

/// Moves this process, which has one thread, into a user namespace that holds the caller and nobody else, so that it may
/// have other namespaces of its own. Root needs none.
pub fn enter_alone() -> Result<(), IdentityError> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if uid.is_root() {
        return Ok(());
    }
    let alone = |first| vec![Range { first, count: 1 }];
    let identities = Identities {
        users: alone(uid.as_raw()),
        groups: alone(gid.as_raw()),
    };
    identities.enter().map(drop)
}

/// Lets the programs that this process executes from now on, the VMM, have [`RIGHTS`].
pub fn keep_rights() -> Result<(), IdentityError> {
    let failed = |errno: rustix::io::Errno| IdentityError::Rights(errno.into());
    let all = RIGHTS
        .iter()
        .fold(CapabilitySet::empty(), |all, (right, _)| all | *right);
    let mut own = capabilities(None).map_err(failed)?;
    own.inheritable = all;
    set_capabilities(None, own).map_err(failed)?;
    RIGHTS
        .iter()
        .try_for_each(|(right, _)| configure_capability_in_ambient_set(*right, true))
        .map_err(failed)
}

/// Maps the identities in the user namespace of the process `pid`, a child of this one, by the programs that may do that.
pub fn map_others(identities: &Identities, pid: u32) -> Result<(), IdentityError> {
    let programs = [
        ("newuidmap", "users", &identities.users, "subuid"),
        ("newgidmap", "groups", &identities.groups, "subgid"),
    ];
    for (program, what, ranges, file) in programs {
        let mut command = Command::new(program);
        command.arg(pid.to_string()).stdin(Stdio::null());
        for Range { first, count } in ranges {
            command.args([first, first, count].map(u32::to_string));
        }
        let output = command
            .output()
            .map_err(|source| IdentityError::Program { program, source })?;
        if !output.status.success() {
            let text = |Range { first, count }: &Range| match count {
                1 => first.to_string(),
                _ => format!("{first}-{}", first.saturating_add(count - 1)),
            };
            return Err(IdentityError::NotAllowed {
                what,
                list: ranges.iter().map(text).collect::<Vec<_>>().join(", "),
                words: one_line(&String::from_utf8_lossy(&output.stderr), 512),
                file,
            });
        }
    }
    Ok(())
}

/// The mappings' identities on the host, and `own` one if it is not among them.
fn ranges(mappings: &[LinuxIdMapping], own: u32) -> Vec<Range> {
    let mut all: Vec<Range> = mappings
        .iter()
        .map(|mapping| Range {
            first: mapping.host_id(),
            count: mapping.size(),
        })
        .filter(|range| range.count > 0)
        .collect();
    let has_own = |range: &Range| own >= range.first && own - range.first < range.count;
    if !all.iter().any(has_own) {
        let own = Range {
            first: own,
            count: 1,
        };
        all.insert(0, own);
    }
    all
}

/// As the kernel wants them.
fn lines(ranges: &[Range]) -> String {
    id_map::lines(
        ranges
            .iter()
            .map(|range| (range.first, range.first, range.count)),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(linux: Value) -> Result<Identities, String> {
        let spec = json!({"ociVersion": "1.0.2", "linux": linux});
        let spec = serde_json::from_value(spec).unwrap();
        Identities::of(&spec, 1000, 1001).map_err(|error| error.to_string())
    }

    fn mapping(container: u32, host: u32, size: u32) -> Value {
        json!({"containerID": container, "hostID": host, "size": size})
    }

    #[test]
    fn a_user_alone_needs_nobody_to_map_him() {
        let identities = of(json!({
            "namespaces": [{"type": "user"}],
            "uidMappings": [mapping(0, 1000, 1)],
            "gidMappings": [mapping(0, 1001, 1)],
        }))
        .unwrap();
        assert!(!identities.has_others());
        assert_eq!(lines(&identities.users), "1000 1000 1\n");
        assert_eq!(lines(&identities.groups), "1001 1001 1\n");
    }

    #[test]
    fn everybody_keeps_his_number_and_the_user_is_always_there() {
        let identities = of(json!({
            "namespaces": [{"type": "user"}],
            "uidMappings": [mapping(0, 1000, 1), mapping(1, 100_000, 65_536)],
            "gidMappings": [mapping(0, 100_000, 65_536)],
        }))
        .unwrap();
        assert!(identities.has_others());
        assert_eq!(
            lines(&identities.users),
            "1000 1000 1\n100000 100000 65536\n"
        );
        assert_eq!(
            lines(&identities.groups),
            "1001 1001 1\n100000 100000 65536\n"
        );
        let one_other = of(json!({
            "namespaces": [{"type": "user"}],
            "uidMappings": [mapping(0, 7, 1)],
            "gidMappings": [mapping(0, 1001, 1)],
        }));
        assert!(one_other.unwrap().has_others());
    }

    #[test]
    fn what_a_rootless_container_needs_is_said_in_runcs_words() {
        let (users, none) = (json!([mapping(0, 1000, 1)]), json!([]));
        let user = json!([{"type": "user"}]);
        for (namespaces, users, groups, words) in [
            (
                &none,
                &users,
                &users,
                "rootless container requires user namespaces",
            ),
            (
                &user,
                &none,
                &users,
                "rootless containers requires at least one UID mapping",
            ),
            (
                &user,
                &users,
                &none,
                "rootless containers requires at least one GID mapping",
            ),
        ] {
            let linux =
                json!({"namespaces": namespaces, "uidMappings": users, "gidMappings": groups});
            assert_eq!(of(linux).unwrap_err(), words);
        }
    }

    #[test]
    fn every_right_has_a_reason_and_is_there_once() {
        let mut all = CapabilitySet::empty();
        for (right, reason) in RIGHTS {
            assert!(!all.intersects(*right) && !reason.is_empty(), "{right:?}");
            all |= *right;
        }
    }
}
