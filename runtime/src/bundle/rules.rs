//! What a specification must say, may say and must not say to this runtime: pure functions of its values.
//!
//! Contract: the first rule that is broken is reported, with the property's path in `config.json` or in runc's words
//! where runc has the rule too.
//! Not here: what the guest's agent can and cannot do (its own plan refuses that).

use std::path::Path;

use caisson_agent_api::is_engines_apparmor_profile;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Process, Spec};

use super::{BundleError, Caller, OCI_VERSION, Place, VmSection, seccomp};
use crate::config::Config;
use crate::{disks, id_mapping, memory_policy};

/// All rules, in the order in which a person would read the file.
pub(super) fn check(
    spec: &Spec,
    vm: Option<&VmSection>,
    config: &Config,
    place: Place,
) -> Result<(), BundleError> {
    version(spec.version())?;
    process(spec.process().as_ref())?;
    mounts(spec)?;
    hooks(spec)?;
    linux(spec, place)?;
    vm.map_or(Ok(()), |vm| section_vm(vm, config))
}

/// What is asked for, cannot be done in a virtual machine, and does no harm undone.
pub(super) fn warnings(spec: &Spec) -> Vec<String> {
    let label = spec
        .process()
        .as_ref()
        .and_then(|process| process.selinux_label().as_ref());
    let mount_label = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.mount_label().as_ref());
    let labels = [
        ("process.selinuxLabel", label),
        ("linux.mountLabel", mount_label),
    ]
    .into_iter()
    .filter(|(_, label)| label.is_some_and(|label| !label.is_empty()))
    .map(|(field, _)| format!("{field} is not applied: the guest kernel has no SELinux"));
    let profile = spec
        .process()
        .as_ref()
        .and_then(|process| process.apparmor_profile().as_deref());
    let apparmor = profile
        .filter(|profile| is_engines_apparmor_profile(profile))
        .map(|_| {
            "process.apparmorProfile is not applied: the guest kernel has no AppArmor".to_owned()
        });
    labels
        .chain(apparmor)
        .chain(first_version_of_cgroups(spec))
        .chain(disks_left_out(spec))
        .collect()
}

/// Engines give a privileged container a node for each device of the host.
fn disks_left_out(spec: &Spec) -> Option<String> {
    let left: Vec<_> = disks::left_out(spec)
        .into_iter()
        .map(|path| path.to_string_lossy())
        .collect();
    (!left.is_empty()).then(|| {
        format!(
            "linux.devices: there is no disk behind {}: a container gets those that a rule of its own names",
            left.join(", ")
        )
    })
}

/// Settings of cgroup v1 that v2 does not have. runc leaves them out there without a word.
fn first_version_of_cgroups(spec: &Spec) -> impl Iterator<Item = String> {
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let memory = resources.and_then(|resources| resources.memory().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let io = resources.and_then(|resources| resources.block_io().as_ref());
    let amount = |amount: Option<i64>| amount.is_some_and(|amount| amount > 0);
    [
        ("memory.kernel", memory.is_some_and(|m| amount(m.kernel()))),
        (
            "memory.kernelTCP",
            memory.is_some_and(|m| amount(m.kernel_tcp())),
        ),
        (
            "memory.swappiness",
            memory.is_some_and(|m| m.swappiness().is_some()),
        ),
        (
            "memory.disableOOMKiller",
            memory.is_some_and(|m| m.disable_oom_killer() == Some(true)),
        ),
        (
            "cpu.realtimeRuntime",
            cpu.is_some_and(|c| amount(c.realtime_runtime())),
        ),
        (
            "cpu.realtimePeriod",
            cpu.is_some_and(|c| c.realtime_period().is_some_and(|n| n > 0)),
        ),
        (
            "blockIO.leafWeight",
            io.is_some_and(|io| io.leaf_weight().is_some_and(|n| n > 0)),
        ),
        (
            "blockIO.weightDevice",
            io.is_some_and(|io| {
                io.weight_device()
                    .as_ref()
                    .is_some_and(|all| !all.is_empty())
            }),
        ),
    ]
    .into_iter()
    .filter(|&(_, asked)| asked)
    .map(|(field, _)| {
        format!("linux.resources.{field} is not applied: the guest's cgroup v2 has no such setting")
    })
}

/// runc 1.1, `utils_linux.go`, `checkTerminal`.
pub(super) fn terminal(terminal: bool, caller: Caller) -> Result<(), &'static str> {
    match (terminal, caller.detach, caller.console_socket) {
        (true, true, false) => {
            Err("cannot allocate tty if caisson will detach without setting console socket")
        }
        (_, false, true) | (false, _, true) => {
            Err("cannot use console socket if caisson will not detach or allocate tty")
        }
        _ => Ok(()),
    }
}

fn invalid(text: impl Into<String>) -> BundleError {
    BundleError::Invalid(text.into())
}

fn unsupported(field: impl Into<String>, reason: &'static str) -> BundleError {
    BundleError::Unsupported {
        field: field.into(),
        reason,
    }
}

/// SemVer: this runtime knows every 1.x up to its own; a later minor version may ask for what it does not know.
fn version(text: &str) -> Result<(), BundleError> {
    if text.is_empty() {
        return Err(invalid("ociVersion must be set"));
    }
    let known = minor(OCI_VERSION);
    match minor(text) {
        None => Err(invalid(format!(
            "ociVersion {text:?} is not a version of the form 1.x.y"
        ))),
        Some(asked) if Some(asked) > known => Err(invalid(format!(
            "ociVersion {text:?} is not supported: caisson knows 1.0.0 to {OCI_VERSION}"
        ))),
        Some(_) => Ok(()),
    }
}

/// The minor version of a SemVer version whose major version is 1.
fn minor(text: &str) -> Option<u32> {
    // Pre-release and build parts do not matter here: 1.0.2-dev, 1.1.0+dev.
    let core = text.split(['-', '+']).next()?;
    let mut numbers = core.split('.').map(|part| part.parse::<u32>().ok());
    let (major, minor, patch) = (numbers.next()??, numbers.next()??, numbers.next()?);
    (major == 1 && patch.is_some() && numbers.next().is_none()).then_some(minor)
}

fn process(process: Option<&Process>) -> Result<(), BundleError> {
    let Some(process) = process else {
        return Err(invalid("process property must not be empty"));
    };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid("args must not be empty"));
    }
    if process.cwd().as_os_str().is_empty() {
        return Err(invalid("Cwd property must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid("Cwd must be an absolute path"));
    }
    Ok(())
}

fn mounts(spec: &Spec) -> Result<(), BundleError> {
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        if mount.destination().as_os_str().is_empty() {
            return Err(invalid(format!(
                "mounts[{index}].destination must not be empty"
            )));
        }
        id_mapping::of(mount, spec)
            .map_err(|error| invalid(format!("mounts[{index}]: {error}")))?;
    }
    Ok(())
}

fn hooks(spec: &Spec) -> Result<(), BundleError> {
    for (list, hooks) in spec.hooks().iter().flat_map(crate::hooks::lists) {
        for (index, hook) in hooks.iter().enumerate() {
            if !hook.path().is_absolute() {
                return Err(invalid(format!(
                    "hooks.{list}[{index}].path must be an absolute path"
                )));
            }
            if hook.timeout().is_some_and(|seconds| seconds <= 0) {
                return Err(invalid(format!(
                    "hooks.{list}[{index}].timeout must be greater than 0"
                )));
            }
        }
    }
    Ok(())
}

pub(super) fn linux(spec: &Spec, place: Place) -> Result<(), BundleError> {
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| invalid("linux must be set"))?;
    namespaces(linux.namespaces().as_deref().unwrap_or_default(), place)?;
    memory_policy::of(spec).map_err(|error| invalid(format!("linux.memoryPolicy: {error}")))?;
    let profile = linux.seccomp().as_ref();
    profile.map_or(Ok(()), seccomp::check).map_err(invalid)?;
    unsupported_parts(linux)
}

/// What holds for a container that joins a virtual machine which runs already.
pub(super) fn joining(spec: &Spec) -> Result<(), BundleError> {
    let linux = spec.linux().as_ref();
    if linux.is_some_and(|linux| linux.memory_policy().is_some()) {
        return Err(unsupported(
            "linux.memoryPolicy",
            "the container joins another one's virtual machine, which has its memory already",
        ));
    }
    Ok(())
}

fn namespaces(all: &[LinuxNamespace], place: Place) -> Result<(), BundleError> {
    for (index, namespace) in all.iter().enumerate() {
        let kind = name(namespace.typ());
        if all
            .iter()
            .take(index)
            .any(|earlier| earlier.typ() == namespace.typ())
        {
            return Err(invalid(format!(
                "malformed spec file: duplicated ns {kind:?}"
            )));
        }
        let path = namespace
            .path()
            .as_ref()
            .filter(|path| !path.as_os_str().is_empty());
        if path.is_some() && !may_be_joined(namespace.typ(), place) {
            return Err(unsupported(
                format!("linux.namespaces: a path for the {kind} namespace"),
                "the container runs in a kernel of its own and cannot join a namespace of the host's",
            ));
        }
    }
    match place {
        Place::Alone | Place::Member if !has(all, LinuxNamespaceType::Network) => {
            Err(host_network())
        }
        _ => Ok(()),
    }
}

fn has(all: &[LinuxNamespace], kind: LinuxNamespaceType) -> bool {
    all.iter().any(|namespace| namespace.typ() == kind)
}

/// Whether there is a network namespace, new or given by its path.
pub(super) fn has_network(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    has(all.unwrap_or_default(), LinuxNamespaceType::Network)
}

/// The kinds of namespaces that may be given by path.
fn may_be_joined(kind: LinuxNamespaceType, place: Place) -> bool {
    use LinuxNamespaceType::{Ipc, Network, Pid, User, Uts};
    match place {
        Place::Alone | Place::Connected => kind == Network,
        Place::Undecided => matches!(kind, Network | Ipc | Uts | Pid),
        Place::Member => matches!(kind, Network | Ipc | Uts | Pid | User),
    }
}

/// The refusal of host networking, however it was asked for.
pub(super) fn host_network() -> BundleError {
    unsupported(
        "linux.namespaces: the host's own network namespace (host networking)",
        "a virtual machine cannot use the host's interfaces; give {\"type\": \"network\"} without a path or with \
         the path of another network namespace",
    )
}

/// The path of the network namespace that the container is to join.
pub(super) fn network_path(spec: &Spec) -> Option<&Path> {
    let all = spec.linux().as_ref()?.namespaces().as_deref()?;
    let network = all
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?;
    network
        .path()
        .as_deref()
        .filter(|path| !path.as_os_str().is_empty())
}

fn unsupported_parts(linux: &Linux) -> Result<(), BundleError> {
    let network = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.network().as_ref());
    let rdma = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.rdma().as_ref());
    let host_only = "it is a device or setting of the host's that a virtual machine does not have";
    [
        (
            "linux.intelRdt",
            linux.intel_rdt().is_some(),
            "it divides the cache of the host's processors, which the guest's kernel does not manage",
        ),
        (
            "linux.netDevices",
            linux
                .net_devices()
                .as_ref()
                .is_some_and(|all| !all.is_empty()),
            "a device of the host's cannot move into the guest's kernel; put it into the network namespace",
        ),
        (
            "linux.resources.network",
            network.is_some_and(|network| {
                network.class_id().is_some_and(|id| id != 0)
                    || network
                        .priorities()
                        .as_ref()
                        .is_some_and(|all| !all.is_empty())
            }),
            host_only,
        ),
        (
            "linux.resources.rdma",
            rdma.is_some_and(|rdma| !rdma.is_empty()),
            host_only,
        ),
    ]
    .into_iter()
    .find(|&(_, asked, _)| asked)
    .map_or(Ok(()), |(field, _, reason)| Err(unsupported(field, reason)))
}

fn section_vm(vm: &VmSection, config: &Config) -> Result<(), BundleError> {
    if !config.allow_vm_section {
        return Err(unsupported(
            "vm",
            "this host's configuration does not let a container choose its virtual machine (allow_vm_section)",
        ));
    }
    if vm.hypervisor.is_some() {
        return Err(unsupported("vm.hypervisor", "caisson has its own"));
    }
    if vm.image.is_some() {
        return Err(unsupported("vm.image", "the guest boots from an initramfs"));
    }
    if let Some(kernel) = &vm.kernel {
        let initrd = kernel
            .initrd
            .as_ref()
            .is_some_and(|path| !path.is_absolute());
        for (field, relative) in [("path", !kernel.path.is_absolute()), ("initrd", initrd)] {
            if relative {
                return Err(invalid(format!(
                    "vm.kernel.{field} must be an absolute path"
                )));
            }
        }
    }
    let Some(hw) = &vm.hw_config else {
        return Ok(());
    };
    [
        ("vm.hwConfig.deviceTree", hw.device_tree.is_some()),
        ("vm.hwConfig.irqs", hw.irqs.is_some()),
        ("vm.hwConfig.iomems", hw.iomems.is_some()),
        ("vm.hwConfig.dtdevs", hw.dtdevs.is_some()),
    ]
    .into_iter()
    .find(|&(_, asked)| asked)
    .map_or(Ok(()), |(field, _)| {
        Err(unsupported(
            field,
            "devices of the host are not passed through",
        ))
    })
}

/// As `config.json` spells it.
const fn name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

#[cfg(test)]
mod tests;
