//! A bundle: `config.json` and its root file system, loaded and checked before anything is done on the host.
//!
//! Contract: a [`Bundle`] exists only if this runtime can do its host-side part of everything the specification asks
//! for; whatever it cannot do is refused by name. Nothing is written and nothing is left open.
//! Unknown properties are ignored, as the specification demands.
//! Not here: what the guest does with the specification (the agent refuses its own part), sizes (`sizing.rs`).
//! Spec: OCI runtime specification 1.0 to 1.3.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use caisson_vmm_spec::MemoryPolicy;
use oci_spec::runtime::Spec;

pub use vm::VmSection;

use crate::{config::Config, memory_policy};

/// The newest version of the OCI runtime specification that this runtime knows.
pub const OCI_VERSION: &str = "1.3.0";

pub(crate) mod capabilities;
mod rules;
mod seccomp;
mod vm;

/// A checked bundle.
#[derive(Debug, Clone, PartialEq)]
pub struct Bundle {
    /// The bundle's directory, absolute, without symbolic links.
    pub path: PathBuf,
    /// The root file system: a directory, absolute.
    pub rootfs: PathBuf,
    /// `config.json`.
    pub spec: Spec,
    /// What `config.json` asks of the virtual machine, if the host's configuration allows it to.
    pub vm: Option<VmSection>,
    /// What is asked for and is not done, without harm: for the log.
    pub warnings: Vec<String>,
}

/// Where a container is to live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a virtual machine of its own, or as the first of a pod.
    Alone,
    /// In one that has containers already.
    Member,
    /// In one of these, or the next: which one is decided later.
    Undecided,
    /// In a virtual machine of its own; without a network namespace it gets a network in user mode.
    Connected,
}

/// How the caller of `create` or `run` deals with the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The caller goes away before the container ends: `create`, or `run --detach`.
    pub detach: bool,
    /// There is a `--console-socket`.
    pub console_socket: bool,
}

/// Why a bundle is refused.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The directory cannot be entered.
    #[error("bundle {path}", path = path.display())]
    Directory {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// runc's words.
    #[error("JSON specification file config.json not found")]
    NoSpec,
    /// It cannot be read.
    #[error("read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not JSON, or not of the specification's shape.
    #[error("{path}", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// The root file system cannot be found.
    #[error("invalid rootfs: stat {path}", path = path.display())]
    NoRootfs {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The root file system is a file or the like.
    #[error("invalid rootfs: {path} is not a directory", path = path.display())]
    RootfsNotDirectory {
        /// What it names.
        path: PathBuf,
    },
    /// The network namespace cannot be found.
    #[error("linux.namespaces: stat the network namespace {path}", path = path.display())]
    NetworkNamespace {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A value is missing or makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A value is asked for that this runtime does not support.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// Its path in `config.json`.
        field: String,
        /// Why, and what to do instead.
        reason: &'static str,
    },
}

impl Bundle {
    /// The path of the network namespace that the container is to join.
    pub fn network_path(&self) -> Option<&Path> {
        rules::network_path(&self.spec)
    }

    /// From which of the host's nodes the virtual machine's memory is to come.
    pub fn memory_policy(&self) -> Option<MemoryPolicy> {
        // One that makes no sense was refused when the bundle was loaded.
        memory_policy::of(&self.spec).ok().flatten()
    }

    /// Where its cgroup is to be.
    pub fn cgroups_path(&self) -> Option<&Path> {
        let linux = self.spec.linux().as_ref()?;
        let path = linux.cgroups_path().as_deref()?;
        Some(path).filter(|path| !path.as_os_str().is_empty())
    }

    /// Loads and checks the bundle in a directory.
    pub fn load(path: &Path, config: &Config) -> Result<Self, BundleError> {
        let bundle = Self::read(path, config, Place::Alone)?;
        network(&bundle.spec)?;
        Ok(bundle)
    }

    /// As [`Bundle::load`], for a container that joins a sandbox which has others already: it may name the namespaces
    /// that a pod shares, by paths that mean nothing but "the sandbox's".
    pub fn load_member(path: &Path, config: &Config) -> Result<Self, BundleError> {
        Self::read(path, config, Place::Member)
    }

    /// As [`Bundle::load`], where it is not yet known which of both it is: [`Bundle::check_alone`] comes next, unless it
    /// is a member.
    pub fn load_undecided(path: &Path, config: &Config) -> Result<Self, BundleError> {
        Self::read(path, config, Place::Undecided)
    }

    fn read(path: &Path, config: &Config, place: Place) -> Result<Self, BundleError> {
        let path = path
            .canonicalize()
            .map_err(|source| BundleError::Directory {
                path: path.into(),
                source,
            })?;
        let file = path.join("config.json");
        let text = fs::read(&file).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => BundleError::NoSpec,
            _ => BundleError::Read {
                path: file.clone(),
                source,
            },
        })?;
        let ((spec, vm), unknown) = capabilities::forgive(&text, vm::parse)
            .map_err(|source| BundleError::Json { path: file, source })?;
        rules::check(&spec, vm.as_ref(), config, place)?;
        let rootfs = rootfs(&path, &spec)?;
        let mut warnings = rules::warnings(&spec);
        warnings.extend(capabilities::warning(&unknown));
        Ok(Self {
            path,
            rootfs,
            spec,
            vm,
            warnings,
        })
    }

    /// The rules that [`Bundle::load`] has beyond [`Bundle::load_undecided`], for a container that turned out to join no
    /// sandbox. `user_network`: without a network namespace it is connected in user mode, and not refused.
    pub fn check_alone(&self, user_network: bool) -> Result<(), BundleError> {
        let place = if user_network {
            Place::Connected
        } else {
            Place::Alone
        };
        rules::linux(&self.spec, place)?;
        network(&self.spec)
    }

    /// The rules that [`Bundle::load`] has not, for a container that joins a virtual machine which runs already.
    pub fn check_joining(&self) -> Result<(), BundleError> {
        rules::joining(&self.spec)
    }

    /// Whether there is no network namespace at all: runc would leave the container in the caller's.
    pub fn is_without_network(&self) -> bool {
        !rules::has_network(&self.spec)
    }

    /// Checks that caller and container agree on the terminal, in runc's words.
    pub fn check_terminal(&self, caller: Caller) -> Result<(), BundleError> {
        let terminal = self
            .spec
            .process()
            .as_ref()
            .and_then(|process| process.terminal());
        check_terminal(terminal.unwrap_or(false), caller)
    }
}

/// Checks that caller and process agree on the terminal, in runc's words.
pub fn check_terminal(terminal: bool, caller: Caller) -> Result<(), BundleError> {
    rules::terminal(terminal, caller).map_err(|text| BundleError::Invalid(text.into()))
}

fn rootfs(bundle: &Path, spec: &Spec) -> Result<PathBuf, BundleError> {
    let Some(root) = spec.root() else {
        return Err(BundleError::Invalid("root must be specified".into()));
    };
    let path = bundle.join(root.path());
    match fs::metadata(&path) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Err(BundleError::RootfsNotDirectory { path }),
        Err(source) => return Err(BundleError::NoRootfs { path, source }),
    }
    path.canonicalize()
        .map_err(|source| BundleError::NoRootfs { path, source })
}

/// A network namespace given by path must exist and must not be the host's own.
fn network(spec: &Spec) -> Result<(), BundleError> {
    let Some(path) = rules::network_path(spec) else {
        return Ok(());
    };
    let asked = fs::metadata(path).map_err(|source| BundleError::NetworkNamespace {
        path: path.into(),
        source,
    })?;
    // Those of the host and of the caller; without the right to look at the first, the second is what there is.
    let own = ["/proc/1/ns/net", "/proc/self/ns/net"].map(fs::metadata);
    let is_own = |own: &fs::Metadata| (own.dev(), own.ino()) == (asked.dev(), asked.ino());
    if own.iter().flatten().any(is_own) {
        Err(rules::host_network())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const GOOD: &str = r#"{"ociVersion":"1.0.2","process":{"user":{},"args":["sh"],"cwd":"/"},
        "root":{"path":"rootfs"},"linux":{"namespaces":[{"type":"network"}]}}"#;

    fn load(dir: &Path) -> Result<Bundle, String> {
        Bundle::load(dir, &Config::default()).map_err(|error| crate::error::message(&error))
    }

    /// A bundle with this `config.json`.
    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        dir
    }

    #[test]
    fn paths_are_absolute_and_free_of_links() {
        let dir = bundle(GOOD);
        let link = dir.path().join("link");
        symlink(dir.path(), &link).unwrap();
        let bundle = load(&link).unwrap();
        assert_eq!(bundle.path, dir.path().canonicalize().unwrap());
        assert_eq!(bundle.rootfs, bundle.path.join("rootfs"));
        assert_eq!(bundle.vm, None);
    }

    #[test]
    fn a_missing_bundle_or_config_is_named() {
        let text = load(Path::new("/nonexistent/bundle")).unwrap_err();
        assert_eq!(
            text,
            "bundle /nonexistent/bundle: No such file or directory (os error 2)"
        );
        let dir = tempfile::tempdir().unwrap();
        let text = load(dir.path()).unwrap_err();
        assert_eq!(text, "JSON specification file config.json not found");
    }

    #[test]
    fn broken_json_is_reported_with_its_position() {
        let text = load(bundle("{\"ociVersion\": \"1.0.2\", }").path()).unwrap_err();
        assert!(
            text.ends_with("/config.json: trailing comma at line 1 column 25"),
            "{text}"
        );
        let text = load(bundle("").path()).unwrap_err();
        assert!(text.ends_with("line 1 column 0"), "{text}");
        let text = load(bundle("{\"ociVersion\": 5}").path()).unwrap_err();
        assert!(
            text.contains("invalid type: integer `5`, expected a string at line 1"),
            "{text}"
        );
    }

    #[test]
    fn a_root_file_system_must_be_a_directory() {
        let dir = bundle(&GOOD.replace("\"rootfs\"", "\"nope\""));
        let text = load(dir.path()).unwrap_err();
        assert!(
            text.starts_with("invalid rootfs: stat /") && text.contains("/nope: No such"),
            "{text}"
        );
        let dir = bundle(&GOOD.replace("\"rootfs\"", "\"config.json\""));
        let text = load(dir.path()).unwrap_err();
        assert!(text.ends_with("/config.json is not a directory"), "{text}");
        let dir = bundle(&GOOD.replace("\"root\":", "\"toor\":"));
        assert_eq!(load(dir.path()).unwrap_err(), "root must be specified");
    }

    #[test]
    fn an_absolute_root_may_lie_outside_the_bundle() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().canonicalize().unwrap();
        let dir = bundle(&GOOD.replace("\"rootfs\"", &format!("{root:?}")));
        assert_eq!(load(dir.path()).unwrap().rootfs, root);
    }

    #[test]
    fn the_hosts_own_network_namespace_is_refused_by_any_path() {
        let with =
            |path: &str| GOOD.replace("\"network\"", &format!("\"network\",\"path\":{path:?}"));
        let text = load(bundle(&with("/proc/self/ns/net")).path()).unwrap_err();
        assert!(text.contains("host networking"), "{text}");
        let text = load(bundle(&with("/nonexistent/netns")).path()).unwrap_err();
        assert!(
            text.contains("stat the network namespace /nonexistent/netns: No such"),
            "{text}"
        );
        // Another namespace; which one does not matter here.
        load(bundle(&with("/proc/self/ns/mnt")).path()).unwrap();
    }

    #[test]
    fn console_sockets_and_terminals_must_agree() {
        let dir = bundle(&GOOD.replace("\"args\"", "\"terminal\":true,\"args\""));
        let bundle = load(dir.path()).unwrap();
        let caller = Caller {
            detach: true,
            console_socket: false,
        };
        let error = bundle.check_terminal(caller).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot allocate tty if caisson will detach without setting console socket"
        );
        bundle
            .check_terminal(Caller {
                console_socket: true,
                ..caller
            })
            .unwrap();
    }
}
