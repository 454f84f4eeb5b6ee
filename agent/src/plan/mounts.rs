//! Mount entries: options into flags, propagation, recursive attributes and data.
//!
//! Contract: pure. The option names and their meaning are those of runc (libcontainer/specconv, parseMountOptions);
//! what is not a known option is data for the file system.
//! Spec: OCI config.md "Mounts", config-linux.md; mount(2), mount_setattr(2).

use super::PlanError;
use oci_spec::runtime::Mount;
use rustix::mount::{MountFlags, MountPropagationFlags};
use serde::{Deserialize, Serialize};
use std::path::{Component, Path, PathBuf};

/// `MOUNT_ATTR_*` of mount_setattr(2).
pub mod attribute {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// No set-user-ID programs.
    pub const NOSUID: u64 = 0x2;
    /// No device nodes.
    pub const NODEV: u64 = 0x4;
    /// No programs.
    pub const NOEXEC: u64 = 0x8;
    /// The field of access-time settings; relatime is its zero.
    pub const ATIME: u64 = 0x70;
    /// No access times.
    pub const NOATIME: u64 = 0x10;
    /// Access times always.
    pub const STRICTATIME: u64 = 0x20;
    /// No access times of directories.
    pub const NODIRATIME: u64 = 0x80;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// Attributes of one mount, or of a tree of mounts, to set and to clear.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributePlan {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
}

impl AttributePlan {
    /// A bit that is set is not cleared as well, but for the field of access times: the kernel takes a value of it only
    /// with the whole field cleared.
    pub(crate) const fn add(&mut self, set: u64, clear: u64) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !(set & !attribute::ATIME)) | clear;
    }

    /// Nothing to change.
    pub const fn is_empty(self) -> bool {
        self.set == 0 && self.clear == 0
    }
}

/// One mount, ready to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPlan {
    /// Where, in the container: absolute, without `.` and `..`.
    pub destination: PathBuf,
    /// What: a path of the guest for a bind mount, else a name for the file system.
    pub source: PathBuf,
    /// File system; `bind` for bind mounts.
    pub kind: String,
    /// `MS_*` for mount(2).
    pub flags: u32,
    /// The same wishes as attributes of the mount, for bind mounts.
    pub attributes: AttributePlan,
    /// `MS_*` propagation settings, applied in order.
    pub propagation: Vec<u32>,
    /// Attributes for the whole tree of mounts (rro and its kin).
    pub recursive: AttributePlan,
    /// A tmpfs that starts as a copy of what it covers.
    pub copy_up: bool,
    /// For the file system.
    pub data: String,
}

impl MountPlan {
    /// A bind mount.
    pub fn is_bind(&self) -> bool {
        self.kind == "bind"
    }

    /// A bind mount that brings along what is mounted below its source.
    pub const fn is_recursive(&self) -> bool {
        self.flags & MountFlags::REC.bits() != 0
    }
}

/// What an option does.
enum Effect {
    /// Sets and clears `MS_*` flags, and the same as mount attributes.
    Flag(MountFlags, MountFlags, u64, u64),
    /// Sets and clears attributes of the tree.
    Recursive(u64, u64),
    /// Changes propagation.
    Propagation(MountPropagationFlags, bool),
    /// tmpfs only.
    CopyUp,
    /// Not in the guest.
    Refused,
}

const NONE: MountFlags = MountFlags::empty();
/// `MS_NOSYMFOLLOW`, mount(2); newer than rustix's table.
const NO_SYMFOLLOW: MountFlags = MountFlags::from_bits_retain(256);
/// `MS_I_VERSION` and `MS_POSIXACL`, which only the kernel's headers name.
const I_VERSION: MountFlags = MountFlags::from_bits_retain(1 << 23);
const POSIX_ACL: MountFlags = MountFlags::from_bits_retain(1 << 16);
const MANDATORY_LOCKS: MountFlags = MountFlags::from_bits_retain(64);

#[rustfmt::skip]
fn effect(option: &str) -> Option<Effect> {
    use Effect::{CopyUp, Flag, Propagation, Recursive, Refused};
    use MountFlags as M;
    use MountPropagationFlags as P;
    use attribute as a;
    Some(match option {
        "defaults" | "async_" => Flag(NONE, NONE, 0, 0),
        "ro" => Flag(M::RDONLY, NONE, a::RDONLY, 0),
        "rw" => Flag(NONE, M::RDONLY, 0, a::RDONLY),
        "nosuid" => Flag(M::NOSUID, NONE, a::NOSUID, 0),
        "suid" => Flag(NONE, M::NOSUID, 0, a::NOSUID),
        "nodev" => Flag(M::NODEV, NONE, a::NODEV, 0),
        "dev" => Flag(NONE, M::NODEV, 0, a::NODEV),
        "noexec" => Flag(M::NOEXEC, NONE, a::NOEXEC, 0),
        "exec" => Flag(NONE, M::NOEXEC, 0, a::NOEXEC),
        "sync" => Flag(M::SYNCHRONOUS, NONE, 0, 0),
        "async" => Flag(NONE, M::SYNCHRONOUS, 0, 0),
        "dirsync" => Flag(M::DIRSYNC, NONE, 0, 0),
        "remount" => Flag(MountFlags::from_bits_retain(32), NONE, 0, 0),
        "mand" => Flag(MANDATORY_LOCKS, NONE, 0, 0),
        "nomand" => Flag(NONE, MANDATORY_LOCKS, 0, 0),
        "noatime" => Flag(M::NOATIME, NONE, a::NOATIME, a::ATIME),
        "atime" => Flag(NONE, M::NOATIME, 0, a::ATIME),
        "nodiratime" => Flag(M::NODIRATIME, NONE, a::NODIRATIME, 0),
        "diratime" => Flag(NONE, M::NODIRATIME, 0, a::NODIRATIME),
        "relatime" => Flag(M::RELATIME, NONE, 0, a::ATIME),
        "norelatime" => Flag(NONE, M::RELATIME, 0, 0),
        "strictatime" => Flag(M::STRICTATIME, NONE, a::STRICTATIME, a::ATIME),
        "nostrictatime" => Flag(NONE, M::STRICTATIME, 0, a::ATIME),
        "lazytime" => Flag(M::LAZYTIME, NONE, 0, 0),
        "nolazytime" => Flag(NONE, M::LAZYTIME, 0, 0),
        "silent" => Flag(M::SILENT, NONE, 0, 0),
        "loud" => Flag(NONE, M::SILENT, 0, 0),
        "iversion" => Flag(I_VERSION, NONE, 0, 0),
        "noiversion" => Flag(NONE, I_VERSION, 0, 0),
        "acl" => Flag(POSIX_ACL, NONE, 0, 0),
        "noacl" => Flag(NONE, POSIX_ACL, 0, 0),
        "nosymfollow" => Flag(NO_SYMFOLLOW, NONE, a::NOSYMFOLLOW, 0),
        "symfollow" => Flag(NONE, NO_SYMFOLLOW, 0, a::NOSYMFOLLOW),
        "bind" => Flag(M::BIND, NONE, 0, 0),
        "rbind" => Flag(M::BIND.union(M::REC), NONE, 0, 0),
        "private" => Propagation(P::PRIVATE, false),
        "shared" => Propagation(P::SHARED, false),
        "slave" => Propagation(P::DOWNSTREAM, false),
        "unbindable" => Propagation(P::UNBINDABLE, false),
        "rprivate" => Propagation(P::PRIVATE, true),
        "rshared" => Propagation(P::SHARED, true),
        "rslave" => Propagation(P::DOWNSTREAM, true),
        "runbindable" => Propagation(P::UNBINDABLE, true),
        "rro" => Recursive(a::RDONLY, 0),
        "rrw" => Recursive(0, a::RDONLY),
        "rnosuid" => Recursive(a::NOSUID, 0),
        "rsuid" => Recursive(0, a::NOSUID),
        "rnodev" => Recursive(a::NODEV, 0),
        "rdev" => Recursive(0, a::NODEV),
        "rnoexec" => Recursive(a::NOEXEC, 0),
        "rexec" => Recursive(0, a::NOEXEC),
        "rnodiratime" => Recursive(a::NODIRATIME, 0),
        "rdiratime" => Recursive(0, a::NODIRATIME),
        "rrelatime" | "rnostrictatime" | "ratime" => Recursive(0, a::ATIME),
        "rnorelatime" | "rstrictatime" => Recursive(a::STRICTATIME, a::ATIME),
        "rnoatime" => Recursive(a::NOATIME, a::ATIME),
        "rnosymfollow" => Recursive(a::NOSYMFOLLOW, 0),
        "rsymfollow" => Recursive(0, a::NOSYMFOLLOW),
        "tmpcopyup" => CopyUp,
        // The host does that, on the mount that it shares.
        "idmap" | "ridmap" => Refused,
        _ => return None,
    })
}

/// `MS_*` for a propagation word such as `rslave`.
pub fn propagation(word: &str) -> Option<u32> {
    match effect(word) {
        Some(Effect::Propagation(kind, recursive)) => Some(bits(kind, recursive)),
        _ => None,
    }
}

const fn bits(kind: MountPropagationFlags, recursive: bool) -> u32 {
    kind.bits() | if recursive { MountFlags::REC.bits() } else { 0 }
}

/// Plans all mounts of a specification, in its order.
pub fn plan(mounts: &[Mount]) -> Result<Vec<MountPlan>, PlanError> {
    mounts.iter().map(plan_one).collect()
}

fn plan_one(mount: &Mount) -> Result<MountPlan, PlanError> {
    let destination = clean(mount.destination());
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return Err(idmap_refused(&destination));
    }
    let mut flags = NONE;
    let mut plan = MountPlan {
        source: mount.source().clone().unwrap_or_default(),
        kind: mount.typ().clone().unwrap_or_default(),
        flags: 0,
        attributes: AttributePlan::default(),
        propagation: Vec::new(),
        recursive: AttributePlan::default(),
        copy_up: false,
        data: String::new(),
        destination,
    };
    let mut data = Vec::new();
    for option in mount.options().iter().flatten() {
        match effect(option) {
            Some(Effect::Flag(set, clear, attribute_set, attribute_clear)) => {
                flags = flags.difference(clear).union(set);
                plan.attributes.add(attribute_set, attribute_clear);
            }
            Some(Effect::Recursive(set, clear)) => plan.recursive.add(set, clear),
            Some(Effect::Propagation(kind, recursive)) => {
                plan.propagation.push(bits(kind, recursive));
            }
            Some(Effect::CopyUp) => plan.copy_up = true,
            Some(Effect::Refused) => return Err(idmap_refused(&plan.destination)),
            None => data.push(option.as_str()),
        }
    }
    plan.data = data.join(",");
    plan.flags = flags.bits();
    if flags.contains(MountFlags::BIND) || plan.kind.is_empty() {
        "bind".clone_into(&mut plan.kind);
    }
    check(&plan)?;
    Ok(plan)
}

fn idmap_refused(destination: &Path) -> PlanError {
    let feature = format!("an id-mapped mount ({})", destination.display());
    PlanError::Unsupported { feature }
}

/// Files of /proc that container managers cover with their own (lxcfs); nothing else may be mounted there.
const PROC_FILES: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Whether something may be mounted over this path of procfs.
pub fn may_cover_proc(destination: &Path) -> bool {
    PROC_FILES.iter().any(|f| destination.as_os_str() == *f)
}

fn check(plan: &MountPlan) -> Result<(), PlanError> {
    let destination = plan.destination.clone();
    let refuse = |reason| {
        Err(PlanError::ProcMount {
            destination: destination.clone(),
            reason,
        })
    };
    if plan.is_bind() && !plan.source.is_absolute() {
        let value = plan.source.display().to_string();
        return Err(PlanError::Invalid {
            field: "mounts.source",
            value,
        });
    }
    if plan.copy_up && plan.kind != "tmpfs" {
        let value = "tmpcopyup".to_owned();
        return Err(PlanError::Invalid {
            field: "mounts.options",
            value,
        });
    }
    if destination.as_os_str() == "/" {
        return Err(PlanError::Invalid {
            field: "mounts.destination",
            value: "/".to_owned(),
        });
    }
    match (destination.strip_prefix("/proc"), plan.kind.as_str()) {
        (Ok(rest), "proc") if rest.as_os_str().is_empty() => Ok(()),
        // A bound /proc is checked for being procfs when it is mounted.
        (Ok(rest), "bind") if rest.as_os_str().is_empty() => Ok(()),
        (Ok(rest), _) if rest.as_os_str().is_empty() => refuse("not of type proc"),
        (Ok(_), _) if !may_cover_proc(&plan.destination) => refuse("inside /proc"),
        _ => Ok(()),
    }
}

/// The path as an absolute one without `.`, `..` and empty parts (Go's `filepath.Clean("/" + path)`).
pub fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, destination: &str, options: &[&str]) -> Result<MountPlan, PlanError> {
        let json = serde_json::json!({
            "destination": destination, "type": kind, "source": "/src", "options": options});
        plan_one(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn options_become_flags_and_the_rest_is_data() {
        let plan = mount(
            "tmpfs",
            "/t",
            &["nosuid", "noexec", "size=1m", "mode=755", "exec"],
        );
        let plan = plan.unwrap();
        assert_eq!(plan.flags, MountFlags::NOSUID.bits());
        assert_eq!(plan.data, "size=1m,mode=755");
        assert_eq!(plan.kind, "tmpfs");
    }

    #[test]
    fn a_later_option_takes_an_earlier_one_back() {
        let plan = mount("none", "/t", &["rbind", "ro", "nodev", "rw"]).unwrap();
        assert_eq!(plan.attributes.set, attribute::NODEV);
        assert_eq!(plan.attributes.clear, attribute::RDONLY);
        assert!(plan.is_bind() && plan.is_recursive());
    }

    #[test]
    fn access_time_settings_are_one_field() {
        let planned = |options: &[&str]| {
            let plan = mount("none", "/t", options).unwrap();
            (plan.attributes, plan.recursive)
        };
        let (nothing, field) = (AttributePlan::default(), attribute::ATIME);
        let value = |set| AttributePlan { set, clear: field };
        let (never, always) = (value(attribute::NOATIME), value(attribute::STRICTATIME));
        assert_eq!(planned(&["bind", "noatime"]), (never, nothing));
        assert_eq!(
            planned(&["bind", "noatime", "strictatime"]),
            (always, nothing)
        );
        assert_eq!(
            planned(&["bind", "noatime", "relatime"]),
            (value(0), nothing)
        );
        for (option, recursive) in [
            ("rnoatime", never),
            ("rstrictatime", always),
            ("rnorelatime", always),
            ("rrelatime", value(0)),
        ] {
            assert_eq!(planned(&["rbind", option]), (nothing, recursive));
        }
    }

    #[test]
    fn propagation_keeps_its_order_and_recursion() {
        let plan = mount("none", "/t", &["bind", "rprivate", "shared"]).unwrap();
        assert_eq!(
            plan.propagation,
            [libc::MS_PRIVATE | libc::MS_REC, libc::MS_SHARED]
                .map(|f| { u32::try_from(f).unwrap() })
        );
        assert_eq!(
            propagation("rslave"),
            propagation("slave").map(|p| p | 16384)
        );
        assert_eq!(propagation("ro"), None);
    }

    #[test]
    fn recursive_attributes_are_apart_from_plain_ones() {
        let plan = mount("none", "/t", &["rbind", "rro"]).unwrap();
        assert_eq!(plan.recursive.set, attribute::RDONLY);
        assert!(plan.attributes.is_empty());
    }

    #[test]
    fn destinations_are_made_absolute_and_plain() {
        assert_eq!(clean(Path::new("a/../../b/./c")), Path::new("/b/c"));
        assert_eq!(clean(Path::new("/dev/")), Path::new("/dev"));
    }

    #[test]
    fn only_known_files_of_proc_may_be_covered() {
        assert!(mount("proc", "/proc", &[]).is_ok());
        assert!(mount("bind", "/proc/uptime", &["bind"]).is_ok());
        assert!(mount("tmpfs", "/procfs", &[]).is_ok());
        assert_eq!(
            mount("tmpfs", "/proc/sys/../sys", &[])
                .unwrap_err()
                .to_string(),
            r#""/proc/sys" cannot be mounted because it is inside /proc"#
        );
        assert!(mount("tmpfs", "/x/../proc", &[]).is_err());
    }

    #[test]
    fn what_cannot_be_given_is_refused() {
        assert!(mount("none", "/t", &["rbind", "idmap"]).is_err());
        assert!(mount("ext4", "/t", &["tmpcopyup"]).is_err());
        assert!(mount("tmpfs", "/", &[]).is_err());
    }
}
