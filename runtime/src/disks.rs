//! Block devices of the host that a container is given: which ones, and the host's devices themselves.
//!
//! Contract: a container gets the disk behind a block device of `linux.devices` if a rule of `linux.resources.devices`
//! allows that very device; a rule for all devices is none, because engines list every device of the host for a privileged
//! container. A disk that may not be written is opened, and shown to the guest, read-only. What is opened is the device of
//! that number and no other.
//! Not here: how disks get into the virtual machine (`sandbox/disks.rs`), their nodes and numbers there (the agent).

use std::{
    fmt, fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, major, minor, open, openat2};
use serde::{Deserialize, Serialize};

/// A device number of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Number {
    /// The driver's.
    pub major: u32,
    /// The device's.
    pub minor: u32,
}

impl fmt::Display for Number {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}", self.major, self.minor)
    }
}

/// A disk of the host's, open.
#[derive(Debug)]
pub struct Disk {
    /// The host's device, and whether it may be written.
    pub about: About,
    /// The device.
    pub file: OwnedFd,
}

/// What a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The host's device.
    pub number: Number,
    /// It may not be written.
    pub read_only: bool,
}

/// Why a container does not get a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such device.
    #[error("linux.devices: {path}: no block device {number} on this host", path = path.display())]
    Missing {
        /// Where the container wants it.
        path: PathBuf,
        /// The device.
        number: Number,
    },
    /// It cannot be opened.
    #[error("linux.devices: {path}: open block device {number}", path = path.display())]
    Open {
        /// Where the container wants it.
        path: PathBuf,
        /// The device.
        number: Number,
        /// Why.
        source: io::Error,
    },
}

/// Opens the disks of a container.
pub fn open_all(spec: &Spec) -> Result<Vec<Disk>, DiskError> {
    let opened = wanted(spec).into_iter().map(|(about, path)| {
        let file = open_device(about).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => DiskError::Missing {
                path: path.to_owned(),
                number: about.number,
            },
            _ => DiskError::Open {
                path: path.to_owned(),
                number: about.number,
                source,
            },
        })?;
        Ok(Disk { about, file })
    });
    opened.collect()
}

/// The block devices among a container's nodes that lead nowhere, because only a rule for all devices allows them.
pub fn left_out(spec: &Spec) -> Vec<&Path> {
    let given = wanted(spec);
    let is_given = |number| given.iter().any(|(about, _)| about.number == number);
    let left = block_devices(spec).filter(|(number, _)| {
        !is_given(*number) && access(rules(spec), *number) != Access::default()
    });
    left.map(|(_, device)| device.path().as_path()).collect()
}

/// What is to be opened, and the node that it is for.
fn wanted(spec: &Spec) -> Vec<(About, &Path)> {
    let mut all: Vec<(About, &Path)> = Vec::new();
    for (number, device) in block_devices(spec) {
        let access = access(rules(spec), number);
        let is_named = rules(spec)
            .iter()
            .any(|rule| rule.allow() && names(rule, number));
        if is_named
            && access != Access::default()
            && all.iter().all(|(about, _)| about.number != number)
        {
            let read_only = !access.write;
            all.push((About { number, read_only }, device.path()));
        }
    }
    all
}

fn block_devices(spec: &Spec) -> impl Iterator<Item = (Number, &LinuxDevice)> {
    let devices = spec.linux().as_ref().and_then(|l| l.devices().as_deref());
    let is_block = |device: &&LinuxDevice| device.typ() == LinuxDeviceType::B;
    devices
        .unwrap_or_default()
        .iter()
        .filter(is_block)
        .filter_map(|device| {
            let major = u32::try_from(device.major()).ok()?;
            let minor = u32::try_from(device.minor()).ok()?;
            Some((Number { major, minor }, device))
        })
}

fn rules(spec: &Spec) -> &[LinuxDeviceCgroup] {
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    resources
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default()
}

/// What the rules let a container do with a device beyond making its node.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Access {
    read: bool,
    write: bool,
}

/// The last rule for an access decides, and what none decides is denied; as the guest's agent understands them.
fn access(rules: &[LinuxDeviceCgroup], number: Number) -> Access {
    let mut access = Access::default();
    for rule in rules {
        let is_for_all = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        if !is_for_all && !matches(rule, number) {
            continue;
        }
        let letters = rule.access().as_deref().unwrap_or_default();
        if is_for_all || letters.contains('r') {
            access.read = rule.allow();
        }
        if is_for_all || letters.contains('w') {
            access.write = rule.allow();
        }
    }
    access
}

fn matches(rule: &LinuxDeviceCgroup, number: Number) -> bool {
    let is = |wanted: Option<i64>, number: u32| match wanted {
        None | Some(-1) => true,
        Some(wanted) => wanted == i64::from(number),
    };
    rule.typ() == Some(LinuxDeviceType::B)
        && is(rule.major(), number.major)
        && is(rule.minor(), number.minor)
}

/// Whether a rule is for that device, or for those of its driver.
fn names(rule: &LinuxDeviceCgroup, number: Number) -> bool {
    matches(rule, number) && rule.major().is_some_and(|major| major >= 0)
}

/// Opens a device of the host by its number: through the name that the kernel gives it in /dev.
fn open_device(about: About) -> io::Result<OwnedFd> {
    let Number { major, minor } = about.number;
    let event = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = event
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .ok_or(io::ErrorKind::NotFound)?;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dev = open("/dev", directory, Mode::empty())?;
    let access = if about.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = openat2(dev, name, flags, Mode::empty(), below)?;
    checked(file, about.number)
}

/// The device, if it is that one.
fn checked(file: OwnedFd, number: Number) -> io::Result<OwnedFd> {
    let found = fstat(&file)?;
    let is_it = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice
        && (major(found.st_rdev), minor(found.st_rdev)) == (number.major, number.minor);
    if is_it {
        Ok(file)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(rules: Value) -> Spec {
        let node =
            |path, kind, minor| json!({"path": path, "type": kind, "major": 7, "minor": minor});
        let devices = json!([
            node("/dev/a", "b", 0),
            node("/dev/again", "b", 0),
            node("/dev/c", "c", 0),
            node("/dev/b", "b", 1)
        ]);
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "linux": {"devices": devices, "resources": {"devices": rules}},
        }))
        .unwrap()
    }

    fn found(rules: Value) -> Vec<(u32, bool)> {
        let spec = spec(rules);
        let wanted = wanted(&spec).into_iter();
        wanted
            .map(|(about, _)| (about.number.minor, about.read_only))
            .collect()
    }

    #[test]
    fn a_disk_is_given_if_a_rule_allows_that_very_device() {
        let none = json!({"allow": false, "access": "rwm"});
        let rule = |minor: i64, access: &str| json!({"allow": true, "type": "b", "major": 7, "minor": minor, "access": access});
        assert_eq!(found(json!([none])), []);
        assert_eq!(found(json!([none, rule(0, "rwm")])), [(0, false)]);
        assert_eq!(
            found(json!([none, rule(0, "r"), rule(1, "rw")])),
            [(0, true), (1, false)]
        );
        assert_eq!(found(json!([none, rule(-1, "rm")])), [(0, true), (1, true)]);
        // To make the node alone is every container's right.
        assert_eq!(found(json!([none, rule(0, "m")])), []);
        assert_eq!(found(json!([rule(0, "rwm"), none])), []);
        let deny = json!({"allow": false, "type": "b", "major": 7, "minor": 0, "access": "w"});
        assert_eq!(found(json!([none, rule(0, "rwm"), deny])), [(0, true)]);
    }

    #[test]
    fn a_rule_for_all_devices_gives_no_disk_and_is_told() {
        let all = json!({"allow": true, "access": "rwm"});
        let blocks = json!({"allow": true, "type": "b", "access": "rwm"});
        for rules in [json!([all]), json!([blocks])] {
            let spec = spec(rules.clone());
            assert_eq!(wanted(&spec), []);
            let left: Vec<_> = left_out(&spec);
            assert_eq!(
                left,
                ["/dev/a", "/dev/again", "/dev/b"].map(Path::new),
                "{rules}"
            );
        }
        assert!(left_out(&spec(json!([{"allow": false, "access": "rwm"}]))).is_empty());
        let named = json!({"allow": true, "type": "b", "major": 7, "minor": 1, "access": "rwm"});
        assert_eq!(found(json!([all, named])), [(1, false)]);
    }

    #[test]
    fn a_device_that_the_host_has_not_is_missing() {
        let about = About {
            number: Number {
                major: 4095,
                minor: 1,
            },
            read_only: true,
        };
        assert_eq!(
            open_device(about).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn another_device_of_the_same_name_is_not_taken() {
        let null = open("/dev/null", OFlags::RDONLY, Mode::empty()).unwrap();
        let number = Number { major: 1, minor: 3 };
        assert!(checked(null, number).is_err());
    }
}
