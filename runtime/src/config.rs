//! The host's configuration file: which guest is booted and how, the same for every container of this host.
//!
//! Contract: a missing file means the defaults; a present one is read whole, then its drop-ins (`*.toml` in the
//! directory of the same name with `.d`) in the order of their names, each of which replaces the keys that it names. An
//! unknown key, a wrong type or a value out of its bounds is refused with its file and line. [`DEFAULT_FILE`] documents
//! every key.
//! Not here: what a single container asks for (`config/annotations.rs`, `bundle.rs`, `sizing.rs`).

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use caisson_vmm_spec::MiB;
use serde::{Deserialize, Serialize};
use toml::Table;

mod annotations;

pub use annotations::AnnotationError;

/// Where the file is, unless [`PATH_VARIABLE`] names another.
pub const DEFAULT_PATH: &str = "/etc/caisson/config.toml";

/// Environment variable that names another configuration file, which then must exist.
pub const PATH_VARIABLE: &str = "CAISSON_CONFIG";

/// The configuration file as it would be written to hold the defaults, with a comment for each key.
pub const DEFAULT_FILE: &str = include_str!("config.toml");

/// Bytes per second that can be a limit: up to a terabit.
const NETWORK_RATES: std::ops::RangeInclusive<u64> = 1024..=125_000_000_000;
/// A burst holds the largest packet.
const NETWORK_BURSTS: std::ops::RangeInclusive<u32> = 64 << 10..=1 << 30;

/// What the file says, or the defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The guest kernel, an uncompressed ELF image.
    pub kernel: PathBuf,
    /// The guest's initial root file system with the agent.
    pub initramfs: PathBuf,
    /// The VMM's program.
    pub vmm: PathBuf,
    /// Words added to the guest kernel's command line.
    pub kernel_params: String,
    /// vCPUs of a container without a CPU quota, 1 to 32.
    pub default_vcpus: u8,
    /// Guest memory for a container without a memory limit.
    pub default_memory_mib: MiB,
    /// Guest memory beyond the container's limit: guest kernel, agent and page tables.
    pub memory_overhead_mib: MiB,
    /// vCPUs that a virtual machine may grow to.
    pub max_vcpus: u8,
    /// Memory that it may grow to; 0: the host's.
    pub max_memory_mib: MiB,
    /// How many network interfaces a container may get after its start, beyond those that it has then.
    pub spare_interfaces: u8,
    /// The program that connects a container without a network namespace.
    pub passt: PathBuf,
    /// Connect such a container of root's as well.
    pub user_network: bool,
    /// The host's TCP ports that lead into it, as passt's `--tcp-ports` has them.
    pub user_network_tcp: String,
    /// The same for UDP.
    pub user_network_udp: String,
    /// An address at which it finds the host's first name server.
    pub user_network_dns: String,
    /// Its gateway's address is the host's loopback.
    pub user_network_host: bool,
    /// Drop what a container sends from a MAC address that is not its interface's.
    pub network_source_mac_filter: bool,
    /// What each interface may receive, in bytes per second. 0: no limit.
    pub network_rx_bytes_per_second: u64,
    /// What it may receive at once.
    pub network_rx_burst_bytes: u32,
    /// How many packets it may receive per second. 0: no limit.
    pub network_rx_packets_per_second: u32,
    /// What each interface may send, in bytes per second. 0: no limit.
    pub network_tx_bytes_per_second: u64,
    /// What it may send at once.
    pub network_tx_burst_bytes: u32,
    /// How many packets it may send per second. 0: no limit.
    pub network_tx_packets_per_second: u32,
    /// Have the host's kernel move the packets of network interfaces, where it can.
    pub vhost_net: bool,
    /// How long a container may believe what it has read of its root file system's names and attributes. 0: not at all.
    pub rootfs_cache_ms: u32,
    /// Ask the host for huge pages.
    pub huge_pages: bool,
    /// How long a guest may take from its first instruction until its agent answers. 0: no limit.
    pub boot_timeout_ms: u64,
    /// Write the guest's whole kernel log to `console.log` in the container's state directory.
    pub debug_console: bool,
    /// Let a container's `config.json` choose kernel, initramfs and size of its virtual machine.
    pub allow_vm_section: bool,
    /// The keys of this file that a container's annotations `io.caisson.KEY` may change.
    pub allowed_annotations: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/lib/caisson/vmlinux".into(),
            initramfs: "/usr/lib/caisson/initramfs.cpio".into(),
            vmm: "/usr/lib/caisson/caisson-vmm".into(),
            kernel_params: String::new(),
            default_vcpus: 1,
            default_memory_mib: MiB(256),
            memory_overhead_mib: MiB(64),
            max_vcpus: 1,
            max_memory_mib: MiB(0),
            spare_interfaces: 4,
            passt: "/usr/bin/passt".into(),
            user_network: false,
            user_network_tcp: String::new(),
            user_network_udp: String::new(),
            user_network_dns: String::new(),
            user_network_host: false,
            network_source_mac_filter: false,
            network_rx_bytes_per_second: 0,
            network_rx_burst_bytes: 256 << 10,
            network_rx_packets_per_second: 0,
            network_tx_bytes_per_second: 0,
            network_tx_burst_bytes: 256 << 10,
            network_tx_packets_per_second: 0,
            vhost_net: false,
            rootfs_cache_ms: 0,
            huge_pages: true,
            boot_timeout_ms: 30_000,
            debug_console: false,
            allow_vm_section: false,
            allowed_annotations: Vec::new(),
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("read the configuration file {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("configuration file {path}, line {line}: {problem}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A value is out of its bounds.
    #[error("configuration file {path}, line {line}: {key} must be {bounds}", path = path.display())]
    Bounds {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Which value.
        key: &'static str,
        /// What it may be.
        bounds: &'static str,
    },
}

impl Config {
    /// Reads the host's configuration: the file that [`PATH_VARIABLE`] names, else [`DEFAULT_PATH`] if it exists, and
    /// the drop-ins beside it.
    pub fn load() -> Result<Self, ConfigError> {
        let named = env::var_os(PATH_VARIABLE).filter(|path| !path.is_empty());
        match named {
            Some(path) => Self::load_from(Path::new(&path)),
            None => Self::read(Path::new(DEFAULT_PATH), true),
        }
    }

    /// Reads a file that must exist, and the drop-ins beside it.
    pub fn load_from(path: &Path) -> Result<Self, ConfigError> {
        Self::read(path, false)
    }

    fn read(path: &Path, may_be_absent: bool) -> Result<Self, ConfigError> {
        let mut merged = Table::new();
        match fs::read_to_string(path) {
            Ok(text) => merged = layer(&text, path)?,
            Err(error) if may_be_absent && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(unread(path)(source)),
        }
        for path in drop_ins(path)? {
            let text = fs::read_to_string(&path).map_err(unread(&path))?;
            merged.extend(layer(&text, &path)?);
        }
        // Each key has been accepted in its own file.
        Self::deserialize(merged).map_err(|error| ConfigError::Syntax {
            path: path.into(),
            line: 1,
            problem: error.message().to_owned(),
        })
    }

    /// Reads the text of a configuration file; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(syntax(text, path))?;
        config
            .check()
            .map_err(|(key, bounds)| ConfigError::Bounds {
                path: path.into(),
                line: line_of_key(text, key),
                key,
                bounds,
            })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, &'static str)> {
        for (key, path) in [
            ("kernel", &self.kernel),
            ("initramfs", &self.initramfs),
            ("vmm", &self.vmm),
            ("passt", &self.passt),
        ] {
            if !path.is_absolute() {
                return Err((key, "an absolute path"));
            }
        }
        if !(1..=32).contains(&self.default_vcpus) {
            return Err(("default_vcpus", "1 to 32"));
        }
        if !(1..=32).contains(&self.max_vcpus) {
            return Err(("max_vcpus", "1 to 32"));
        }
        if self.spare_interfaces > 8 {
            return Err(("spare_interfaces", "0 to 8"));
        }
        for (key, rate) in [
            (
                "network_rx_bytes_per_second",
                self.network_rx_bytes_per_second,
            ),
            (
                "network_tx_bytes_per_second",
                self.network_tx_bytes_per_second,
            ),
        ] {
            if rate != 0 && !NETWORK_RATES.contains(&rate) {
                return Err((key, "0, or 1024 to 125000000000"));
            }
        }
        for (key, burst) in [
            ("network_rx_burst_bytes", self.network_rx_burst_bytes),
            ("network_tx_burst_bytes", self.network_tx_burst_bytes),
        ] {
            if !NETWORK_BURSTS.contains(&burst) {
                return Err((key, "65536 to 1073741824"));
            }
        }
        if self.rootfs_cache_ms > 60_000 {
            return Err(("rootfs_cache_ms", "0 to 60000"));
        }
        if self.default_memory_mib < MiB(64) {
            return Err(("default_memory_mib", "at least 64"));
        }
        if self.memory_overhead_mib < MiB(32) {
            return Err(("memory_overhead_mib", "at least 32"));
        }
        if !self
            .allowed_annotations
            .iter()
            .all(|key| annotations::may_be_listed(key))
        {
            return Err((
                "allowed_annotations",
                "names of keys of this file, without vmm, passt, user_network, allow_vm_section and itself",
            ));
        }
        Ok(())
    }
}

/// The keys of one file, all of which are right.
fn layer(text: &str, path: &Path) -> Result<Table, ConfigError> {
    Config::parse(text, path)?;
    toml::from_str(text).map_err(syntax(text, path))
}

/// The drop-ins of a configuration file, in the order in which they count.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut dir = path.as_os_str().to_owned();
    dir.push(".d");
    let dir = PathBuf::from(dir);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(unread(&dir)(source)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.map_err(unread(&dir))?.path();
        if file
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn unread(path: &Path) -> impl Fn(io::Error) -> ConfigError {
    move |source| ConfigError::Read {
        path: path.into(),
        source,
    }
}

fn syntax(text: &str, path: &Path) -> impl Fn(toml::de::Error) -> ConfigError {
    move |error| ConfigError::Syntax {
        path: path.into(),
        line: error.span().map_or(1, |span| line_of(text, span.start)),
        problem: error.message().to_owned(),
    }
}

/// The line that sets a key of the top level, of which all keys are.
fn line_of_key(text: &str, key: &str) -> usize {
    let sets = |line: &str| {
        let name = line.split('=').next().unwrap_or_default().trim();
        name.trim_matches(['"', '\'']) == key
    };
    text.lines().position(sets).map_or(1, |index| index + 1)
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes()
        .take(offset)
        .filter(|&byte| byte == b'\n')
        .count()
        + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/c.toml"))
    }

    #[test]
    fn the_documented_file_holds_the_defaults() {
        assert_eq!(parse(DEFAULT_FILE).unwrap(), Config::default());
    }

    #[test]
    fn the_documented_file_names_every_key_in_use() {
        let uncommented: String = DEFAULT_FILE
            .lines()
            .filter_map(|line| line.strip_prefix("# ").or_else(|| line.strip_prefix('#')))
            .filter(|line| line.contains(" = "))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(parse(&uncommented).unwrap(), Config::default());
        assert_eq!(uncommented.lines().count(), 30);
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = parse("default_vcpus = 2\n\nkernal = \"/k\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("configuration file /c.toml, line 3: unknown field `kernal`"),
            "{error}"
        );
    }

    #[test]
    fn a_wrong_type_and_broken_syntax_are_refused_with_their_line() {
        let error = parse("huge_pages = true\ndefault_vcpus = \"two\"")
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 2: invalid type"), "{error}");
        let error = parse("huge_pages = true\nkernel =")
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 2: "), "{error}");
    }

    #[test]
    fn values_out_of_bounds_are_refused() {
        for (text, wanted) in [
            ("default_vcpus = 0", "default_vcpus must be 1 to 32"),
            ("default_vcpus = 33", "default_vcpus must be 1 to 32"),
            ("max_vcpus = 0", "max_vcpus must be 1 to 32"),
            (
                "default_memory_mib = 63",
                "default_memory_mib must be at least 64",
            ),
            (
                "memory_overhead_mib = 8",
                "memory_overhead_mib must be at least 32",
            ),
            (
                "network_tx_bytes_per_second = 1023",
                "network_tx_bytes_per_second must be 0, or 1024 to 125000000000",
            ),
            (
                "network_rx_burst_bytes = 1500",
                "network_rx_burst_bytes must be 65536 to 1073741824",
            ),
            ("vmm = \"caisson-vmm\"", "vmm must be an absolute path"),
            (
                "allowed_annotations = [\"vmm\"]",
                "allowed_annotations must be names of keys of this file, without vmm, passt, user_network, allow_vm_section and itself",
            ),
        ] {
            let error = parse(&format!("# one\n\n{text}\n"))
                .unwrap_err()
                .to_string();
            assert_eq!(
                error,
                format!("configuration file /c.toml, line 3: {wanted}")
            );
        }
    }

    #[test]
    fn drop_ins_replace_keys_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::create_dir(dir.path().join("config.toml.d")).unwrap();
        let drop_in = |name: &str, text: &str| {
            fs::write(dir.path().join("config.toml.d").join(name), text).unwrap();
        };
        drop_in("20-b.toml", "default_vcpus = 3\n");
        drop_in("10-a.toml", "default_vcpus = 2\nhuge_pages = false\n");
        drop_in("30-c.toml.disabled", "nonsense");
        // Without a main file the drop-ins still count.
        let config = Config::read(&file, true).unwrap();
        assert_eq!((config.default_vcpus, config.huge_pages), (3, false));
        assert!(Config::read(&file, false).is_err());
        fs::write(&file, "default_vcpus = 4\ndefault_memory_mib = 128\n").unwrap();
        let config = Config::read(&file, false).unwrap();
        assert_eq!(
            (config.default_vcpus, config.default_memory_mib),
            (3, MiB(128))
        );
        drop_in("40-d.toml", "\nkernal = \"/k\"\n");
        let error = Config::read(&file, false).unwrap_err().to_string();
        let wanted = "config.toml.d/40-d.toml, line 2: unknown field `kernal`";
        assert!(error.contains(wanted), "{error}");
    }
}
