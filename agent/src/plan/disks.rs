//! The host's block devices in a specification, in the guest's numbers.
//!
//! Contract: pure. A node of a device for which there is a disk becomes the disk's, and so does every rule that names the
//! device, alone or with all of its driver's. Where the host's kernel chose the number at run time, and the device is
//! not here, a rule is dropped and a node leads nowhere: in this kernel the number may be another container's disk.

use std::fmt;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

/// A device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// A disk for a block device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// The device's number on the host.
    pub host: Number,
    /// The disk's number here.
    pub guest: Number,
}

/// Block majors that kernels give out as they go (Documentation/admin-guide/devices.txt), and those beyond the list.
const fn is_dynamic(major: i64) -> bool {
    matches!(major, 234..=254 | 256..)
}

/// No kernel has a block device of this number.
const NOWHERE: Number = Number { major: 0, minor: 0 };

/// Translates nodes and rules.
pub fn translate(spec: &mut Spec, disks: &[Placed]) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    if let Some(nodes) = linux.devices_mut() {
        *nodes = std::mem::take(nodes)
            .into_iter()
            .map(|node| here(node, disks))
            .collect();
    }
    let resources = linux.resources_mut().as_mut();
    if let Some(rules) = resources.and_then(|resources| resources.devices_mut().as_mut()) {
        *rules = std::mem::take(rules)
            .into_iter()
            .flat_map(|rule| translated(rule, disks))
            .collect();
    }
}

/// What becomes of a node.
fn here(mut node: LinuxDevice, disks: &[Placed]) -> LinuxDevice {
    if node.typ() != LinuxDeviceType::B {
        return node;
    }
    let is_it = |disk: &&Placed| {
        node.major() == i64::from(disk.host.major) && node.minor() == i64::from(disk.host.minor)
    };
    let guest = match disks.iter().find(is_it) {
        Some(Placed { guest, .. }) => *guest,
        None if is_dynamic(node.major()) => NOWHERE,
        None => return node,
    };
    node.set_major(guest.major.into())
        .set_minor(guest.minor.into());
    node
}

/// What becomes of a rule.
fn translated(rule: LinuxDeviceCgroup, disks: &[Placed]) -> Vec<LinuxDeviceCgroup> {
    let is = |wanted: Option<i64>, number: u32| wanted == Some(i64::from(number));
    let major = match (rule.typ(), rule.major()) {
        (Some(LinuxDeviceType::B), Some(major)) if major >= 0 => major,
        _ => return vec![rule],
    };
    let is_for_all = rule.minor().is_none_or(|minor| minor < 0);
    let named = disks.iter().filter(|disk| {
        is(Some(major), disk.host.major) && (is_for_all || is(rule.minor(), disk.host.minor))
    });
    let mut all: Vec<LinuxDeviceCgroup> = named
        .map(|disk| {
            let mut here = rule.clone();
            here.set_major(Some(disk.guest.major.into()))
                .set_minor(Some(disk.guest.minor.into()));
            here
        })
        .collect();
    if !is_dynamic(major) && (all.is_empty() || is_for_all) {
        all.push(rule);
    }
    all
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn placed(host: (u32, u32), guest: (u32, u32)) -> Placed {
        let number = |(major, minor)| Number { major, minor };
        Placed {
            host: number(host),
            guest: number(guest),
        }
    }

    fn rules(rules: Value, disks: &[Placed]) -> Value {
        let mut spec: Spec = serde_json::from_value(
            json!({"ociVersion": "1.0.2", "linux": {"resources": {"devices": rules}}}),
        )
        .unwrap();
        translate(&mut spec, disks);
        let resources = serde_json::to_value(spec.linux().as_ref().unwrap().resources()).unwrap();
        resources["devices"].clone()
    }

    fn rule(kind: &str, major: i64, minor: i64) -> Value {
        json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": "rw"})
    }

    #[test]
    fn nodes_get_the_numbers_of_their_disks() {
        let node = |kind, minor| json!({"path": "/dev/x", "type": kind, "major": 7, "minor": minor, "fileMode": 0o640});
        let devices = json!([node("b", 0), node("b", 1), node("c", 0)]);
        let mut spec: Spec =
            serde_json::from_value(json!({"ociVersion": "1.0.2", "linux": {"devices": devices}}))
                .unwrap();
        translate(&mut spec, &[placed((7, 0), (254, 16))]);
        let found = serde_json::to_value(spec.linux()).unwrap();
        assert_eq!(found["devices"][0]["major"], 254);
        assert_eq!(found["devices"][0]["minor"], 16);
        assert_eq!(found["devices"][0]["fileMode"], 0o640);
        assert_eq!(
            (&found["devices"][1], &found["devices"][2]),
            (&node("b", 1), &node("c", 0))
        );
    }

    #[test]
    fn a_node_whose_number_means_another_device_here_leads_nowhere() {
        let node = |kind, major, minor| json!({"path": format!("/dev/{kind}{major}"), "type": kind, "major": major, "minor": minor});
        let devices = json!([
            node("b", 7, 0),
            node("b", 254, 0),
            node("b", 259, 1),
            node("b", 8, 0),
            node("c", 254, 0)
        ]);
        let mut spec: Spec =
            serde_json::from_value(json!({"ociVersion": "1.0.2", "linux": {"devices": devices}}))
                .unwrap();
        // The host's 254:0 is not the disk that has its number here.
        translate(&mut spec, &[placed((7, 0), (254, 0))]);
        let found = serde_json::to_value(spec.linux()).unwrap();
        let number = |index: usize| {
            let device = &found["devices"][index];
            (device["major"].as_i64(), device["minor"].as_i64())
        };
        let numbers: Vec<_> = (0..5).map(number).collect();
        let expected = [(254, 0), (0, 0), (0, 0), (8, 0), (254, 0)];
        assert_eq!(numbers, expected.map(|(a, b)| (Some(a), Some(b))));
    }

    #[test]
    fn rules_name_the_disks_of_the_devices_that_they_named() {
        let disks = [placed((7, 0), (254, 16)), placed((254, 0), (254, 32))];
        let none = json!({"allow": false, "access": "rwm"});
        assert_eq!(
            rules(json!([none, rule("b", 7, 0), rule("c", 7, 0)]), &disks),
            json!([none, rule("b", 254, 16), rule("c", 7, 0)])
        );
        assert_eq!(
            rules(json!([rule("b", 254, 0)]), &disks),
            json!([rule("b", 254, 32)])
        );
        // Loop devices of the guest's own have the same major.
        assert_eq!(
            rules(json!([rule("b", 7, -1), rule("b", 7, 5)]), &disks),
            json!([rule("b", 254, 16), rule("b", 7, -1), rule("b", 7, 5)])
        );
        let every = json!({"allow": true, "type": "b", "access": "rw"});
        assert_eq!(rules(json!([every]), &disks), json!([every]));
    }

    #[test]
    fn a_number_that_means_another_device_here_allows_nothing() {
        for host in [(254, 0), (254, -1), (259, 3)] {
            assert_eq!(rules(json!([rule("b", host.0, host.1)]), &[]), json!([]));
        }
    }
}
