//! A container's cgroup (v2): creation, limits, device rules, freezing, killing, removal.
//!
//! Contract: [`Cgroup::create`] leaves nothing behind when it fails; a [`Cgroup`] is removed by [`Cgroup::remove`],
//! which kills what still lives in it and waits for the kernel's notice that it is empty. Nothing is polled.
//! Not here: what the limits are (`plan/resources.rs`), how the device rules are compiled (`devices.rs`).
//! Spec: kernel Documentation/admin-guide/cgroup-v2.rst.

use crate::sys;
use rustix::fs::{Mode, OFlags};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::{fs, io};
use tokio::io::Interest;

/// Where the agent mounts the hierarchy.
pub const HIERARCHY: &str = "/sys/fs/cgroup";

/// A step on a cgroup that failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The directory could not be made.
    #[error("create cgroup {path}")]
    Create {
        /// The cgroup's directory.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A control file did not take a value.
    #[error("write {value:?} to {file}")]
    Write {
        /// The control file.
        file: PathBuf,
        /// What was written.
        value: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A limit asks for a controller that the guest's kernel does not have.
    #[error("resource {file:?} can't be set: its controller is not available")]
    NoController {
        /// The control file.
        file: String,
    },
    /// A control file could not be read.
    #[error("read {file}")]
    Read {
        /// The control file.
        file: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The device rules could not be put into force.
    #[error("attach the device rules to {path}")]
    Devices {
        /// The cgroup's directory.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The cgroup could not be given to the container's root.
    #[error("chown {path}")]
    Delegate {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The directory could not be removed.
    #[error("remove cgroup {path}")]
    Remove {
        /// The cgroup's directory.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// One value for one control file, in the order they are to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// File name in the cgroup's directory.
    pub file: String,
    /// What is written, in one write.
    pub value: String,
    /// The limit is skipped where the file does not exist (an optional refinement), instead of failing.
    pub optional: bool,
}

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

/// Enables every controller for the children of the hierarchy's root.
pub fn delegate_all(hierarchy: &Path) -> io::Result<()> {
    let controllers = fs::read_to_string(hierarchy.join("cgroup.controllers"))?;
    let enable: Vec<String> = controllers
        .split_whitespace()
        .map(|c| format!("+{c}"))
        .collect();
    fs::write(hierarchy.join("cgroup.subtree_control"), enable.join(" "))
}

impl Cgroup {
    /// Makes the cgroup, applies its limits and its device rules.
    pub fn create(
        hierarchy: &Path,
        name: &str,
        settings: &[Setting],
        device_filter: Option<&[u64]>,
    ) -> Result<Self, CgroupError> {
        let path = hierarchy.join(name);
        let create = |source| CgroupError::Create {
            path: path.clone(),
            source,
        };
        fs::create_dir(&path).map_err(create)?;
        let undo = RemoveOnDrop(Some(path.clone()));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(&path, flags, Mode::empty()).map_err(|e| create(e.into()))?;
        let cgroup = Self { path, directory };
        for setting in settings {
            cgroup.apply(setting)?;
        }
        if let Some(filter) = device_filter {
            sys::attach_device_filter(cgroup.directory.as_fd(), filter).map_err(|source| {
                CgroupError::Devices {
                    path: cgroup.path.clone(),
                    source,
                }
            })?;
        }
        undo.keep();
        Ok(cgroup)
    }

    fn apply(&self, setting: &Setting) -> Result<(), CgroupError> {
        match self.write(&setting.file, &setting.value) {
            Err(CgroupError::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                if setting.optional {
                    return Ok(());
                }
                Err(CgroupError::NoController {
                    file: setting.file.clone(),
                })
            }
            other => other,
        }
    }

    /// Gives the cgroup to a user namespace's root: its directory and the files that a delegate may write.
    pub fn delegate(&self, uid: u32) -> Result<(), CgroupError> {
        let failed = |path: PathBuf| move |source| CgroupError::Delegate { path, source };
        let list = fs::read_to_string("/sys/kernel/cgroup/delegate").unwrap_or_default();
        let files = list
            .lines()
            .map(|name| self.path.join(name))
            .filter(|path| path.exists());
        for path in std::iter::once(self.path.clone()).chain(files) {
            std::os::unix::fs::chown(&path, Some(uid), None).map_err(failed(path))?;
        }
        Ok(())
    }

    /// The cgroup's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn write(&self, name: &str, value: &str) -> Result<(), CgroupError> {
        let file = self.path.join(name);
        let open = fs::OpenOptions::new().write(true).open(&file);
        open.and_then(|mut f| io::Write::write_all(&mut f, value.as_bytes()))
            .map_err(|source| CgroupError::Write {
                file,
                value: value.to_owned(),
                source,
            })
    }

    fn read(&self, name: &str) -> Result<String, CgroupError> {
        let file = self.path.join(name);
        fs::read_to_string(&file).map_err(|source| CgroupError::Read { file, source })
    }

    /// Applies settings, all or none: what a refused one leaves changed is changed back.
    pub fn update(&self, settings: &[Setting]) -> Result<(), CgroupError> {
        let mut before: Vec<Setting> = Vec::new();
        for setting in settings {
            let old = self.read(&setting.file).ok();
            if let Err(refused) = self.apply(setting) {
                for old in before.iter().rev() {
                    // The refusal is the error to report.
                    let _ = self.apply(old);
                }
                return Err(refused);
            }
            before.extend(old.map(|text| Setting {
                value: text.trim_end().to_owned(),
                ..setting.clone()
            }));
        }
        Ok(())
    }

    /// A control file's text, if there is such a file.
    pub fn text(&self, name: &str) -> Option<Vec<u8>> {
        let is_name = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
        is_name.then(|| fs::read(self.path.join(name)).ok())?
    }

    /// How often the kernel has killed a process in here because a memory limit was reached.
    fn oom_kills(&self) -> u64 {
        let text = self.read("memory.events").unwrap_or_default();
        let count = field(&text, "oom_kill").and_then(|count| count.parse().ok());
        count.unwrap_or(0)
    }

    /// Returns the number of such kills when it is more than `seen`.
    pub async fn oom_kills_beyond(&self, seen: u64) -> Result<u64, CgroupError> {
        self.follow("memory.events", |text| {
            let count = field(text, "oom_kill")?.parse().ok()?;
            (count > seen).then_some(count)
        })
        .await
    }

    /// All processes of the cgroup and of those below it, by their identifiers in the agent's PID namespace.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        for directory in self.subtree() {
            let file = directory.join("cgroup.procs");
            match fs::read_to_string(&file) {
                Ok(text) => pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok())),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                // A threaded cgroup: its processes are listed by its domain.
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(source) => return Err(CgroupError::Read { file, source }),
            }
        }
        Ok(pids)
    }

    /// The cgroup and all below it, parents first.
    fn subtree(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut queue = VecDeque::from([self.path.clone()]);
        while let Some(directory) = queue.pop_front() {
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            queue.extend(
                entries
                    .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
                    .map(|e| e.path()),
            );
            found.push(directory);
        }
        found
    }

    /// Stops or continues all processes, and returns once the kernel says so.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        self.wait_for_event("frozen", value).await
    }

    /// Kills all processes, those that are being born included.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Whether the kernel killed a process in here because a memory limit was reached.
    pub fn had_oom_kill(&self) -> bool {
        self.oom_kills() > 0
    }

    /// Kills what still runs, waits until it is gone, and removes the cgroup with all below it.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        self.wait_for_event("populated", "0").await?;
        for path in self.subtree().into_iter().rev() {
            match fs::remove_dir(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(CgroupError::Remove { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns when `cgroup.events` shows the value.
    async fn wait_for_event(&self, key: &str, value: &str) -> Result<(), CgroupError> {
        self.follow("cgroup.events", |text| {
            (field(text, key) == Some(value)).then_some(())
        })
        .await
    }

    /// Returns what `wanted` finds in a file of events; the kernel wakes its readers at each change (`POLLPRI`).
    async fn follow<T>(
        &self,
        file: &str,
        wanted: impl Fn(&str) -> Option<T>,
    ) -> Result<T, CgroupError> {
        let path = self.path.join(file);
        let failed = |source| CgroupError::Read {
            file: path.clone(),
            source,
        };
        let file = fs::File::open(&path).map_err(failed)?;
        let events = sys::watch(file.into(), Interest::PRIORITY).map_err(failed)?;
        loop {
            // The read also arms the next notice.
            let mut text = [0; 512];
            let n =
                rustix::io::pread(events.get_ref(), &mut text, 0).map_err(|e| failed(e.into()))?;
            if let Some(found) = wanted(&String::from_utf8_lossy(&text[..n])) {
                return Ok(found);
            }
            events
                .ready(Interest::PRIORITY)
                .await
                .map_err(failed)?
                .clear_ready();
        }
    }
}

/// The value of a key in a flat keyed file (`key value` lines).
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
}

struct RemoveOnDrop(Option<PathBuf>);

impl RemoveOnDrop {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Nothing has joined it yet; if even this fails there is nobody to tell but the error that led here.
            let _ = fs::remove_dir(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_keyed_field_is_found_by_its_whole_name() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 7\n";
        assert_eq!(field(text, "oom_kill"), Some("2"));
        assert_eq!(field(text, "oom"), Some("3"));
        assert_eq!(field(text, "kill"), None);
    }
}
