//! Cgroups of the host, of whichever version it has: the one hierarchy of cgroup v2, or those of cgroup v1.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Whether the host has cgroup v1.
pub fn is_v1() -> bool {
    !Path::new(ROOT).join("cgroup.procs").exists()
}

/// The mounted hierarchies that cgroups are made in.
fn hierarchies() -> Vec<PathBuf> {
    if !is_v1() {
        return vec![ROOT.into()];
    }
    let entries = fs::read_dir(ROOT).expect("hierarchies").flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.map(|entry| entry.path())
        .filter(|path| !path.ends_with("unified"))
        .collect()
}

/// The directories of the cgroup at `path` (as in `linux.cgroupsPath`), one in each hierarchy.
pub fn dirs(path: &str) -> Vec<PathBuf> {
    let relative = path.trim_start_matches('/');
    let dirs = hierarchies().into_iter();
    dirs.map(|hierarchy| hierarchy.join(relative)).collect()
}

/// The text of a control file of the cgroup at `path`, without white space at its end. `file` begins with the name of its
/// controller.
pub fn read(path: &str, file: &str) -> String {
    let controller = file.split('.').next().unwrap_or_default();
    let controller = if controller == "cgroup" {
        "memory"
    } else {
        controller
    };
    let is_its = |dir: &&PathBuf| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        !is_v1() || name.split(',').any(|one| one == controller)
    };
    let all = hierarchies();
    let dir = all.iter().find(is_its).expect(controller);
    let file = dir.join(path.trim_start_matches('/')).join(file);
    let text = fs::read_to_string(&file);
    text.unwrap_or_else(|e| panic!("read {}: {e}", file.display()))
        .trim_end()
        .to_owned()
}

/// The limit of memory in bytes.
pub fn memory_limit(path: &str) -> u64 {
    let file = if is_v1() {
        "memory.limit_in_bytes"
    } else {
        "memory.max"
    };
    read(path, file).parse().expect("a limit in bytes")
}

/// Quota and period in microseconds.
pub fn bandwidth(path: &str) -> (u64, u64) {
    let text = if is_v1() {
        let [quota, period] =
            ["cpu.cfs_quota_us", "cpu.cfs_period_us"].map(|file| read(path, file));
        format!("{quota} {period}")
    } else {
        read(path, "cpu.max")
    };
    let numbers: Vec<u64> = text
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    assert_eq!(numbers.len(), 2, "{text}");
    (numbers[0], numbers[1])
}

/// A cgroup of the test's own, as an engine makes it for its containers; removed when dropped.
pub struct Parent {
    path: String,
}

impl Parent {
    /// Makes it in every hierarchy.
    pub fn make() -> Self {
        let path = format!("/caisson-e2e-{}", std::process::id());
        for dir in dirs(&path) {
            fs::create_dir(dir).expect("a cgroup");
        }
        Self { path }
    }

    /// `linux.cgroupsPath` of a child.
    pub fn child(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for dir in dirs(&self.path) {
            let _ = fs::remove_dir(dir);
        }
    }
}
