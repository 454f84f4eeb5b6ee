//! Gathers the facts about this host that `judge.rs` needs. Changes nothing; what cannot be read is `None`.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, Mode, OFlags, open};

use crate::config::{Config, ConfigError};

/// What is known about a host.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// `/dev/kvm` could be opened for reading and writing; its API version, or why not.
    pub(super) kvm: Result<i32, io::ErrorKind>,
    /// Flags of the first CPU.
    pub(super) cpu_flags: Vec<String>,
    /// As `uname -r`.
    pub(super) kernel: String,
    pub(super) cgroup: Cgroup,
    /// `/dev/net/tun` could be opened, or why not.
    pub(super) tun: Result<(), io::ErrorKind>,
    /// `user.max_user_namespaces`.
    pub(super) user_namespaces: Option<u64>,
    /// Name and state of each known CPU vulnerability.
    pub(super) vulnerabilities: Vec<(String, String)>,
    /// Two threads share a core.
    pub(super) smt: Option<bool>,
    /// Kernel same-page merging runs.
    pub(super) ksm: Option<bool>,
    /// Bytes of swap.
    pub(super) swap_bytes: u64,
    /// What only somebody else than root needs.
    pub(super) user: Option<User>,
    /// The host's configuration and which of its files are missing.
    pub(super) config: Result<Vec<PathBuf>, String>,
}

/// The caller, if that is an ordinary user.
#[derive(Debug, Clone)]
pub(super) struct User {
    /// `newuidmap` and `newgidmap` are in `PATH`.
    pub(super) maps_others: bool,
    /// How many users `/etc/subuid` gives the caller, and groups `/etc/subgid`.
    pub(super) others: [u64; 2],
    /// The configuration's passt, and whether it can be started.
    pub(super) passt: (PathBuf, bool),
    /// Whom `/dev/kvm` belongs to: `group kvm`.
    pub(super) kvm_owner: String,
    /// `XDG_RUNTIME_DIR` is there, where the state is kept.
    pub(super) has_runtime_dir: bool,
}

/// Which version is mounted on `/sys/fs/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cgroup {
    V2 {
        /// `cgroup.controllers` of the root.
        controllers: String,
    },
    V1,
    None,
}

/// Looks at the host that this process runs on.
pub(super) fn host() -> Host {
    let meminfo = rustix::system::sysinfo();
    Host {
        kvm: kvm(),
        cpu_flags: cpu_flags(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        cgroup: cgroup(Path::new("/sys/fs/cgroup")),
        tun: open_rw("/dev/net/tun").map(drop),
        user_namespaces: number("/proc/sys/user/max_user_namespaces"),
        vulnerabilities: vulnerabilities(Path::new("/sys/devices/system/cpu/vulnerabilities")),
        smt: number("/sys/devices/system/cpu/smt/active").map(|active| active == 1),
        ksm: number("/sys/kernel/mm/ksm/run").map(|run| run == 1),
        swap_bytes: meminfo
            .totalswap
            .saturating_mul(u64::from(meminfo.mem_unit)),
        user: (!rustix::process::geteuid().is_root()).then(user),
        config: config(),
    }
}

fn user() -> User {
    let is_program = |path: &Path| rustix::fs::access(path, Access::EXEC_OK).is_ok();
    let path = env::var_os("PATH").unwrap_or_default();
    let is_found = |name: &str| env::split_paths(&path).any(|dir| is_program(&dir.join(name)));
    let uid = rustix::process::geteuid().as_raw();
    let name = fs::read_to_string("/etc/passwd")
        .ok()
        .and_then(|users| user_name(&users, uid));
    let others = ["/etc/subuid", "/etc/subgid"].map(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        subordinates(&text, name.as_deref(), uid)
    });
    let passt = Config::load().unwrap_or_default().passt;
    User {
        maps_others: is_found("newuidmap") && is_found("newgidmap"),
        others,
        passt: (passt.clone(), is_program(&passt)),
        kvm_owner: crate::vmm::kvm_owner(),
        has_runtime_dir: env::var_os("XDG_RUNTIME_DIR").is_some_and(|dir| Path::new(&dir).is_dir()),
    }
}

/// passwd(5).
fn user_name(users: &str, uid: u32) -> Option<String> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// The sum of a user's ranges: subuid(5).
fn subordinates(text: &str, name: Option<&str>, uid: u32) -> u64 {
    let counts = text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let is_callers = Some(owner) == name || owner.parse() == Ok(uid);
        let count: u64 = fields.nth(1)?.parse().ok()?;
        is_callers.then_some(count)
    });
    counts.sum()
}

fn open_rw(path: &str) -> Result<std::os::fd::OwnedFd, io::ErrorKind> {
    open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| io::Error::from(errno).kind())
}

fn kvm() -> Result<i32, io::ErrorKind> {
    let device = open_rw("/dev/kvm")?;
    super::super::kvm_api::version(&device).map_err(|errno| io::Error::from(errno).kind())
}

fn cgroup(root: &Path) -> Cgroup {
    match fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(controllers) => Cgroup::V2 {
            controllers: controllers.trim().to_owned(),
        },
        Err(_) if root.join("memory").exists() => Cgroup::V1,
        Err(_) => Cgroup::None,
    }
}

fn cpu_flags(cpuinfo: &str) -> Vec<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    let flags = line
        .and_then(|line| line.split_once(':'))
        .map_or("", |(_, flags)| flags);
    flags.split_whitespace().map(str::to_owned).collect()
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn vulnerabilities(dir: &Path) -> Vec<(String, String)> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let state = fs::read_to_string(entry.path()).ok()?;
            Some((
                entry.file_name().into_string().ok()?,
                state.trim().to_owned(),
            ))
        })
        .collect();
    all.sort();
    all
}

fn config() -> Result<Vec<PathBuf>, String> {
    let config = Config::load().map_err(|error: ConfigError| crate::error::message(&error))?;
    let files = [config.kernel, config.initramfs, config.vmm];
    Ok(files.into_iter().filter(|path| !path.is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_those_of_the_first_cpu() {
        let text = "processor\t: 0\nflags\t\t: fpu svm\n\nprocessor\t: 1\nflags\t\t: vmx\n";
        assert_eq!(cpu_flags(text), ["fpu", "svm"]);
        assert!(cpu_flags("").is_empty());
    }

    #[test]
    fn a_users_ranges_are_found_by_name_and_by_number() {
        let users = "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n";
        assert_eq!(user_name(users, 1000).as_deref(), Some("alice"));
        assert_eq!(user_name(users, 7), None);
        let text = "bob:100000:65536\nalice:200000:1000\n1000:300000:24\nalice:broken\n";
        assert_eq!(subordinates(text, Some("alice"), 1000), 1024);
        assert_eq!(subordinates(text, None, 7), 0);
    }

    #[test]
    fn a_directory_without_controllers_is_no_cgroup_mount() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::None);
        fs::create_dir(dir.path().join("memory")).unwrap();
        assert_eq!(cgroup(dir.path()), Cgroup::V1);
        fs::write(dir.path().join("cgroup.controllers"), "cpu\n").unwrap();
        assert_eq!(
            cgroup(dir.path()),
            Cgroup::V2 {
                controllers: "cpu".into()
            }
        );
    }

    #[test]
    fn vulnerabilities_are_listed_by_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mds"), "Not affected\n").unwrap();
        fs::write(dir.path().join("l1tf"), "Vulnerable\n").unwrap();
        let all = vulnerabilities(dir.path());
        assert_eq!(all[0], ("l1tf".to_owned(), "Vulnerable".to_owned()));
        assert_eq!(all.len(), 2);
    }
}
