//! What this runtime can do, as the OCI features document: for `caisson features` and for containerd's `-info`.
//!
//! Contract: pure; true for what works, in a guest of the default kernel; the mount options and capabilities are those that
//! the agent knows. Nothing of it depends on this host.
//! Spec: OCI runtime specification, features.md.

use serde_json::{Value, json};

use crate::{bundle::OCI_VERSION, version};

/// Generic mount options, as runc lists them.
const MOUNT_OPTIONS: &str = "\
    acl async atime bind defaults dev diratime dirsync exec idmap iversion lazytime loud mand noacl noatime nodev \
    nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private ratime rbind \
    rdev rdiratime relatime remount rexec ridmap rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime rnosuid \
    rnosymfollow ro rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared \
    silent slave strictatime suid symfollow sync tmpcopyup unbindable";

const CAPABILITIES: &str = "\
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE \
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN \
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE \
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE";

const SECCOMP_FLAGS: &str = "\
    SECCOMP_FILTER_FLAG_LOG SECCOMP_FILTER_FLAG_SPEC_ALLOW SECCOMP_FILTER_FLAG_TSYNC \
    SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// The document.
pub(crate) fn document() -> Value {
    let words = |text: &str| {
        text.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let capabilities: Vec<_> = CAPABILITIES
        .split_whitespace()
        .map(|name| format!("CAP_{name}"))
        .collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": words("prestart createRuntime createContainer startContainer poststart poststop"),
        "mountOptions": words(MOUNT_OPTIONS),
        "linux": {
            "namespaces": words("cgroup ipc mount network pid time user uts"),
            "capabilities": capabilities,
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": words(
                    "SCMP_ACT_ALLOW SCMP_ACT_ERRNO SCMP_ACT_KILL SCMP_ACT_KILL_PROCESS SCMP_ACT_KILL_THREAD \
                     SCMP_ACT_LOG SCMP_ACT_NOTIFY SCMP_ACT_TRACE SCMP_ACT_TRAP",
                ),
                "operators": words(
                    "SCMP_CMP_EQ SCMP_CMP_GE SCMP_CMP_GT SCMP_CMP_LE SCMP_CMP_LT SCMP_CMP_MASKED_EQ SCMP_CMP_NE",
                ),
                "knownFlags": words(SECCOMP_FLAGS),
                "supportedFlags": words(SECCOMP_FLAGS),
                "archs": words("SCMP_ARCH_AARCH64 SCMP_ARCH_ARM SCMP_ARCH_X32 SCMP_ARCH_X86 SCMP_ARCH_X86_64"),
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "memoryPolicy": {
                "modes": words(
                    "MPOL_BIND MPOL_DEFAULT MPOL_INTERLEAVE MPOL_LOCAL MPOL_PREFERRED MPOL_PREFERRED_MANY \
                     MPOL_WEIGHTED_INTERLEAVE",
                ),
                "flags": words("MPOL_F_NUMA_BALANCING MPOL_F_RELATIVE_NODES MPOL_F_STATIC_NODES"),
            },
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": false},
        },
        // The first, where the host's configuration lists the key.
        "potentiallyUnsafeConfigAnnotations": words("io.caisson. org.systemd.property."),
        "annotations": {
            "caisson.commit": version::COMMIT,
            "caisson.version": version::VERSION,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_a_features_document() {
        let features: oci_spec::runtime::Features = serde_json::from_value(document()).unwrap();
        assert_eq!(features.oci_version_max(), OCI_VERSION);
        let linux = features.linux().as_ref().unwrap();
        assert_eq!(linux.capabilities().as_ref().unwrap().len(), 41);
        assert_eq!(linux.cgroup().as_ref().unwrap().systemd(), &Some(true));
    }
}
