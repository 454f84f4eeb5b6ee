//! Where in the hierarchy a sandbox's cgroup belongs.
//!
//! Contract: the answer is relative to the hierarchy's root, never the root itself, and never leaves it.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use super::CgroupError;
use crate::state::ContainerId;

/// The place for a container: at `asked`, or under its ID beside the caller's own cgroup.
pub(super) fn of(asked: Option<&Path>, id: &ContainerId) -> Result<PathBuf, CgroupError> {
    match asked {
        Some(path) if path.is_absolute() => below(path),
        Some(path) => Ok(beside_own()?.join(below(path)?)),
        None => Ok(beside_own()?.join(id.as_str())),
    }
}

/// A path below the root of the hierarchy: no `..`, not the root itself, nothing in systemd's notation.
pub(super) fn below(path: &Path) -> Result<PathBuf, CgroupError> {
    let refused = || CgroupError::Path {
        path: path.to_owned(),
    };
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => clean.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(refused()),
        }
    }
    let systemd = path
        .to_str()
        .is_some_and(|text| text.matches(':').count() == 2);
    if clean.as_os_str().is_empty() || systemd {
        Err(refused())
    } else {
        Ok(clean)
    }
}

/// The parent of the caller's own cgroup, relative to the root: processes may not live in an inner cgroup that hands
/// controllers down, so a new one goes beside the caller's, not below it.
fn beside_own() -> Result<PathBuf, CgroupError> {
    own().map(|own| own.parent().map(Path::to_owned).unwrap_or_default())
}

/// The caller's own cgroup, relative to the root.
pub(super) fn own() -> Result<PathBuf, CgroupError> {
    let file = Path::new("/proc/self/cgroup");
    let text = fs::read_to_string(file).map_err(|source| CgroupError::Io {
        step: "read",
        path: file.to_owned(),
        source,
    })?;
    Ok(own_in(&text))
}

fn own_in(proc_self_cgroup: &str) -> PathBuf {
    let mut lines = proc_self_cgroup.lines();
    let own = lines.find_map(|line| line.strip_prefix("0::/"));
    own.unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_paths_stay_below_the_root() {
        for (path, wanted) in [
            ("/a/b", "a/b"),
            ("a", "a"),
            ("//a/./b/", "a/b"),
            ("/x:y", "x:y"),
        ] {
            assert_eq!(below(Path::new(path)).unwrap(), Path::new(wanted));
        }
        for path in ["/", ".", "/..", "/a/../b", "../a", "system.slice:runc:c1"] {
            assert!(
                matches!(below(Path::new(path)), Err(CgroupError::Path { .. })),
                "{path}"
            );
        }
    }

    #[test]
    fn the_callers_own_is_that_of_the_one_hierarchy() {
        for (text, own) in [
            (
                "0::/user.slice/session-1.scope\n",
                "user.slice/session-1.scope",
            ),
            ("0::/\n", ""),
            ("12:pids:/a/b\n0::/u/v/w\n", "u/v/w"),
            ("", ""),
        ] {
            assert_eq!(own_in(text), Path::new(own));
        }
    }
}
