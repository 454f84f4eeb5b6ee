//! What `cgroupsPath` means to systemd: `slice:prefix:name`, a unit in a slice.
//!
//! Contract: pure. Whether systemd takes the unit's name is systemd's to say.
//! Spec: runc 1.1, libcontainer/specconv and cgroups/systemd/common.go; systemd.slice(5).

use std::path::{Path, PathBuf};

use super::CgroupError;
use crate::state::ContainerId;

/// Where containers are without a word about it, as in runc.
const SLICE: &str = "system.slice";
/// The first word of a unit's name then.
const PREFIX: &str = "caisson";

/// A sandbox's unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) slice: String,
    /// Its name, without prefix.
    pub(super) name: String,
    pub(super) unit: String,
    /// Its cgroup, below the root of the hierarchy.
    pub(super) path: PathBuf,
}

impl Scope {
    /// The one for a container.
    pub(super) fn of(asked: Option<&Path>, id: &ContainerId) -> Result<Self, CgroupError> {
        let Some(asked) = asked else {
            return Self::new(SLICE, PREFIX, id.as_str());
        };
        let text = asked.to_string_lossy();
        let parts: Vec<&str> = text.split(':').collect();
        match *parts.as_slice() {
            ["", prefix, name] => Self::new(SLICE, prefix, name),
            [slice, prefix, name] => Self::new(slice, prefix, name),
            _ => Err(CgroupError::NoUnit {
                path: asked.to_owned(),
            }),
        }
    }

    fn new(slice: &str, prefix: &str, name: &str) -> Result<Self, CgroupError> {
        let within = expanded(slice).ok_or_else(|| CgroupError::Slice(slice.to_owned()))?;
        // A unit of this name would be a slice, which holds no processes.
        if name.ends_with(".slice") || name.contains('/') || prefix.contains('/') {
            return Err(CgroupError::Unit(name.to_owned()));
        }
        let unit = format!("{prefix}-{name}.scope");
        Ok(Self {
            slice: slice.to_owned(),
            name: name.to_owned(),
            path: within.join(&unit),
            unit,
        })
    }
}

/// Whether a path has the form `slice:prefix:name`, where the slice may be left out.
pub(super) fn is_unit_path(asked: &Path) -> bool {
    let text = asked.to_string_lossy();
    match text.split(':').collect::<Vec<_>>().as_slice() {
        [slice, _, _] => slice.is_empty() || slice.ends_with(".slice"),
        _ => false,
    }
}

/// A slice's cgroup: `a-b.slice` is in `a.slice`, `-.slice` is the root.
fn expanded(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    if name.contains('/') {
        return None;
    }
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(asked: Option<&str>) -> Result<Scope, CgroupError> {
        Scope::of(asked.map(Path::new), &ContainerId::parse("c1").unwrap())
    }

    #[test]
    fn a_path_names_slice_prefix_and_name() {
        for (asked, unit, path) in [
            (None, "caisson-c1.scope", "system.slice/caisson-c1.scope"),
            (
                Some("machine.slice:libpod:abc"),
                "libpod-abc.scope",
                "machine.slice/libpod-abc.scope",
            ),
            (
                Some(":docker:1"),
                "docker-1.scope",
                "system.slice/docker-1.scope",
            ),
            (
                Some("a-b-c.slice:p:n"),
                "p-n.scope",
                "a.slice/a-b.slice/a-b-c.slice/p-n.scope",
            ),
            (Some("-.slice:p:n"), "p-n.scope", "p-n.scope"),
        ] {
            let scope = scope(asked).unwrap();
            assert_eq!((scope.unit.as_str(), scope.path), (unit, path.into()));
        }
    }

    #[test]
    fn a_path_for_systemd_is_told_from_one_in_the_hierarchy() {
        for (path, is_units) in [
            ("kubepods-pod1.slice:cri-containerd:abc", true),
            (":docker:abc", true),
            ("/a/b", false),
            ("/a.slice/b:c:d", false),
            ("a:b:c", false),
            ("a.slice:b", false),
        ] {
            assert_eq!(is_unit_path(Path::new(path)), is_units, "{path}");
        }
    }

    #[test]
    fn other_paths_are_refused_in_runcs_words() {
        for path in ["/a/b", "a:b", "a:b:c:d"] {
            assert_eq!(
                scope(Some(path)).unwrap_err().to_string(),
                format!(
                    "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {path:?} instead"
                )
            );
        }
        for slice in [
            "a",
            ".slice",
            "a--b.slice",
            "-a.slice",
            "a-.slice",
            "a/b.slice",
        ] {
            let error = scope(Some(&format!("{slice}:p:n"))).unwrap_err();
            assert_eq!(error.to_string(), format!("invalid slice name: {slice}"));
        }
        for path in ["a.slice:p:n.slice", "a.slice:p:../../x", "a.slice:../p:n"] {
            assert!(matches!(scope(Some(path)), Err(CgroupError::Unit(_))));
        }
    }
}
