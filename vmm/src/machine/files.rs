//! The descriptors of a spec, taken over and given names.

use std::fs::File;
use std::os::fd::OwnedFd;

use caisson_vmm_spec::{DiskSpec, NetworkKind, ShareSpec, VmSpec};

use super::SetupError;
use crate::boot;
use crate::fds::Inherited;

/// Every file of a VM except its control socket.
pub(super) struct Files {
    pub(super) kvm: OwnedFd,
    pub(super) boot: boot::Files,
    pub(super) console: Option<File>,
    pub(super) devices: DeviceFiles,
}

/// The devices that the spec asks for, each with its file.
pub(super) struct DeviceFiles {
    pub(super) networks: Vec<Network>,
    pub(super) spare_networks: u8,
    pub(super) vhost_net: bool,
    pub(super) disks: Vec<(DiskSpec, File)>,
    pub(super) shares: Vec<(ShareSpec, OwnedFd)>,
}

/// A network interface.
pub(super) struct Network {
    pub(super) mac: [u8; 6],
    /// A tap, or what is in its place.
    pub(super) file: OwnedFd,
    pub(super) kind: NetworkKind,
    pub(super) vhost: Option<OwnedFd>,
}

impl DeviceFiles {
    /// The number of devices.
    pub(super) fn count(&self) -> usize {
        self.networks.len()
            + usize::from(self.spare_networks)
            + self.disks.len()
            + self.shares.len()
    }
}

impl Files {
    /// Takes over all that `spec` names, before this process opens anything itself.
    pub(super) fn take(spec: &VmSpec, inherited: &mut Inherited) -> Result<Self, SetupError> {
        let kvm = inherited.take("the KVM device", spec.kvm)?;
        let kernel = File::from(inherited.take("the kernel", spec.kernel)?);
        let initramfs = File::from(inherited.take("the initramfs", spec.initramfs)?);
        let console = spec
            .console
            .map(|fd| inherited.take("the debug console", fd))
            .transpose()?;
        let (mut networks, mut disks, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        for network in &spec.networks {
            let vhost = network
                .vhost
                .map(|fd| inherited.take("a vhost-net device", fd));
            networks.push(Network {
                mac: network.mac,
                file: inherited.take("a tap", network.tap)?,
                kind: network.kind,
                vhost: vhost.transpose()?,
            });
        }
        for disk in &spec.disks {
            disks.push((
                disk.clone(),
                File::from(inherited.take("a disk", disk.file)?),
            ));
        }
        for share in &spec.shares {
            shares.push((
                share.clone(),
                inherited.take("a shared directory", share.root)?,
            ));
        }
        Ok(Self {
            kvm,
            boot: boot::Files { kernel, initramfs },
            console: console.map(File::from),
            devices: DeviceFiles {
                networks,
                spare_networks: spec.spare_networks,
                vhost_net: spec.vhost_net,
                disks,
                shares,
            },
        })
    }
}
