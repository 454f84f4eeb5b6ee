//! Starting the virtual machine of a sandbox, as every door does it.
//!
//! Contract: what the configuration, the bundle and the sandbox's directory say becomes one [`Machine`], and its VMM
//! runs when [`Boot::start`] returns: in the sandbox's cgroup from its first page on, holding the lock [`VM_LOCK`] until
//! its end.
//! Not here: making the parts (`cgroup`, `share`), the wait for the agent (`sandbox/boot.rs`).

use std::{
    fs::OpenOptions,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::Duration,
};

use caisson_vmm_spec::{MemoryPolicy, OwnTrees};
use rustix::fs::{FlockOperation, flock};

use crate::{
    bundle::VmSection,
    cgroup::HostCgroup,
    config::Config,
    network::Plug,
    sandbox::{BootError, Booting},
    share::{ROOTFS, Share, ShareError},
    sizing::Bounds,
    slots::Slots,
    vmm::Machine,
};

/// Name of the locked file in a directory that the VMM holds open; that of a container in another container's virtual
/// machine is held by whoever clears it away there.
pub const VM_LOCK: &str = "vm.lock";

/// Why the virtual machine was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The shared directory cannot be handed over.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The VMM cannot be started.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host refused something.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A sandbox whose host side is ready.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The sandbox's own directory on the host.
    pub dir: &'a Path,
    /// The host's configuration.
    pub config: &'a Config,
    /// What the bundle asks of the virtual machine, if it may.
    pub vm: Option<&'a VmSection>,
    /// Its size, and what it may grow to.
    pub bounds: Bounds,
    /// From which nodes of the host its memory comes.
    pub memory_policy: Option<MemoryPolicy>,
    /// What the guest will see of the host's files.
    pub share: &'a Share,
    /// Where the VMM begins its life. `None`: where its parent is.
    pub cgroup: Option<&'a HostCgroup>,
    /// Its network interfaces (`network`).
    pub networks: Vec<Plug>,
    /// Their places, and those for more of them and for disks.
    pub slots: Slots,
}

impl Boot<'_> {
    /// Starts the VMM; the guest boots from here on. Must be called inside a runtime.
    pub fn start(self) -> Result<Booting, StartError> {
        let Self {
            dir,
            config,
            vm,
            bounds,
            memory_policy,
            share,
            cgroup,
            networks,
            slots,
        } = self;
        let kernel = vm.and_then(|vm| vm.kernel.as_ref());
        let cmdline = kernel.map_or_else(
            || config.kernel_params.clone(),
            |kernel| kernel.parameters.join(" "),
        );
        let cgroup = cgroup.map(HostCgroup::entry).transpose();
        Ok(Booting::start(Machine {
            program: &config.vmm,
            kernel: kernel.map_or(&config.kernel, |kernel| &kernel.path),
            initramfs: kernel
                .and_then(|kernel| kernel.initrd.as_ref())
                .unwrap_or(&config.initramfs),
            cmdline: &cmdline,
            bounds,
            huge_pages: config.huge_pages,
            memory_policy,
            boot_deadline: Duration::from_millis(config.boot_timeout_ms),
            share: share.root()?,
            own: OwnTrees {
                name: ROOTFS.to_owned(),
                believed_ms: config.rootfs_cache_ms,
            },
            networks,
            slots,
            vhost_net: config.vhost_net,
            console: config.debug_console.then(|| log_file(dir)).transpose()?,
            alive: Some(lock_file(dir).map_err(host("make the VMM's lock"))?),
            cgroup: cgroup.map_err(host("open the cgroup"))?,
        })?)
    }
}

/// Blocks until whoever holds [`VM_LOCK`] in `dir` is done.
pub fn wait_for_vmm(dir: &Path) -> io::Result<()> {
    match OpenOptions::new().read(true).open(dir.join(VM_LOCK)) {
        Ok(file) => Ok(rustix::io::retry_on_intr(|| {
            flock(&file, FlockOperation::LockExclusive)
        })?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn log_file(dir: &Path) -> Result<OwnedFd, StartError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(dir.join("console.log"))
        .map(Into::into)
        .map_err(host("open the guest's console log"))
}

/// The file [`VM_LOCK`] in `dir`, locked until the last copy of the descriptor is closed.
pub fn lock_file(dir: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join(VM_LOCK))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file.into())
}

fn host(step: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::Host { step, source }
}
