//! The first half of the child: from the guest's namespaces into the container's.
//!
//! Contract: [`enter`] returns `None` in the first process, whose work is then done, and the prepared sources in the
//! second. Order after runc's nsexec.c: OOM score, clock offsets, joins (the user namespace last), fork into new
//! namespaces, identity mappings, session.

use super::control::{Control, FromChild};
use super::{ChildError, Context};
use crate::plan::namespaces::{CGROUP, NamespacePlan, TIME, USER};
use crate::plan::{ChildPlan, ContainerPlan};
use crate::sys;
use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::io::read;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{DumpableBehavior, Pid, set_dumpable_behavior, setsid};
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags, move_into_link_name_space,
    move_into_thread_name_spaces, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Detached mounts that the first process opened with the guest's rights.
#[derive(Default)]
pub(super) struct Sources {
    /// The root file system.
    pub(super) root: Option<OwnedFd>,
    /// One for each mount of the plan; `None` where it is no bind mount.
    pub(super) binds: Vec<Option<OwnedFd>>,
    /// One for each device of the plan, in a user namespace (where nodes cannot be made).
    pub(super) devices: Vec<OwnedFd>,
}

/// Enters the container's namespaces.
pub(super) fn enter(
    plan: &ChildPlan,
    init: Option<OwnedFd>,
    control: &Control,
) -> Result<Option<Sources>, ChildError> {
    // A process of the container may not trace this one, nor reach the agent's files through its /proc entries, between
    // the joins and execve (CVE-2016-9962).
    set_dumpable_behavior(DumpableBehavior::NotDumpable).step(|| "set dumpable".to_owned())?;
    if let Some(score) = plan.process.oom_score_adjust {
        let write = fs::write("/proc/self/oom_score_adj", score.to_string());
        write.step(|| "write oom_score_adj".to_owned())?;
    }
    if plan.container.is_none() {
        // The second process is born with it.
        super::finish::set_affinity(&plan.process.affinity.before, "initial")?;
    }
    let namespaces = &plan.namespaces;
    super::finish::raise_hard_limits(&plan.process)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = open(&plan.cgroup, flags, Mode::empty())
        .step(|| format!("open cgroup {}", plan.cgroup.display()))?;
    let sources = match &plan.container {
        Some(container) => open_sources(container, namespaces.has_user())?,
        None => Sources::default(),
    };
    if namespaces.create & TIME != 0 {
        // Offsets can be set only while the new namespace is empty: children are born into it, this process is not.
        sys::unshare(UnshareFlags::NEWTIME).step(|| "unshare the time namespace".to_owned())?;
        if !namespaces.time_offsets.is_empty() {
            let write = fs::write("/proc/self/timens_offsets", &namespaces.time_offsets);
            write.step(|| "write timens_offsets".to_owned())?;
        }
    }
    // Once in a user namespace this process has no right to put anything into the cgroup: it goes there first then, and
    // the second is born where it is.
    let joins_user =
        namespaces.join_init & USER != 0 || namespaces.join.iter().any(|(kind, _)| *kind == USER);
    if joins_user {
        let write = fs::write(plan.cgroup.join("cgroup.procs"), "0");
        write.step(|| format!("join cgroup {}", plan.cgroup.display()))?;
    }
    join(namespaces, init)?;
    let gate = if namespaces.create & USER == 0 {
        None
    } else {
        Some(pipe_with(PipeFlags::CLOEXEC).step(|| "pipe".to_owned())?)
    };
    let fork = u64::from(namespaces.create & !(CGROUP | TIME));
    match sys::fork_sibling(fork, (!joins_user).then(|| cgroup.as_fd()))
        .step(|| "clone".to_owned())?
    {
        None => {
            if let Some((opened, ours)) = gate {
                drop(ours);
                let mut byte = [0];
                let n = read(&opened, &mut byte).step(|| "wait for the mappings".to_owned())?;
                if n == 0 {
                    return Err(ChildError::AgentGone);
                }
            }
            Ok(Some(sources))
        }
        Some(pid) => {
            control.send(&FromChild::Pid(pid.as_raw_nonzero().get()));
            if let Some((_, opener)) = gate {
                map_identities(pid, namespaces)?;
                rustix::io::write(&opener, &[1]).step(|| "open the gate".to_owned())?;
            }
            Ok(None)
        }
    }
}

/// What the container's user might not reach is opened here: sources of bind mounts, the root, device nodes.
fn open_sources(container: &ContainerPlan, in_user: bool) -> Result<Sources, ChildError> {
    let tree = |path: &Path, recursive: bool| {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        open_tree(CWD, path, flags)
    };
    let root = tree(&container.rootfs, true)
        .step(|| format!("error preparing rootfs {}", container.rootfs.display()))?;
    let mut sources = Sources {
        root: Some(root),
        ..Sources::default()
    };
    for mount in &container.mounts {
        let bound = mount.is_bind() && !super::mount::is_remount(mount);
        sources.binds.push(if bound {
            Some(tree(&mount.source, mount.is_recursive()).step(|| {
                let (source, destination) = (&mount.source, &mount.destination);
                format!(
                    "error mounting {source:?} to rootfs at {destination:?}: open {}",
                    source.display()
                )
            })?)
        } else {
            None
        });
    }
    if in_user && container.own_dev {
        for device in &container.devices {
            let node = super::rootfs::guest_node(device)?;
            sources
                .devices
                .push(tree(&node, false).step(|| format!("open {}", node.display()))?);
        }
    }
    Ok(sources)
}

fn join(namespaces: &NamespacePlan, init: Option<OwnedFd>) -> Result<(), ChildError> {
    let opened: Vec<(u32, OwnedFd)> = namespaces
        .join
        .iter()
        .map(|(kind, path)| {
            let fd = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .step(|| format!("open namespace {}", path.display()))?;
            Ok((*kind, fd))
        })
        .collect::<Result<_, ChildError>>()?;
    for ((kind, fd), (_, path)) in opened.iter().zip(&namespaces.join) {
        move_into_link_name_space(fd.as_fd(), link_kind(*kind))
            .step(|| format!("join namespace {}", path.display()))?;
    }
    let Some(init) = init else { return Ok(()) };
    // The user namespace on its own and last: once in it, this process has no rights over namespaces of the guest.
    for kinds in [namespaces.join_init & !USER, namespaces.join_init & USER] {
        if kinds != 0 {
            let kinds = ThreadNameSpaceType::from_bits_retain(kinds);
            move_into_thread_name_spaces(init.as_fd(), kinds)
                .step(|| "join the container's namespaces".to_owned())?;
        }
    }
    Ok(())
}

const fn link_kind(kind: u32) -> Option<LinkNameSpaceType> {
    use oci_spec::runtime::LinuxNamespaceType as Kind;
    const MOUNT: u32 = Kind::Mount as u32;
    const UTS: u32 = Kind::Uts as u32;
    const IPC: u32 = Kind::Ipc as u32;
    const PID: u32 = Kind::Pid as u32;
    const NETWORK: u32 = Kind::Network as u32;
    Some(match kind {
        MOUNT => LinkNameSpaceType::Mount,
        CGROUP => LinkNameSpaceType::ControlGroup,
        UTS => LinkNameSpaceType::HostNameAndNISDomainName,
        IPC => LinkNameSpaceType::InterProcessCommunication,
        USER => LinkNameSpaceType::User,
        PID => LinkNameSpaceType::ProcessID,
        NETWORK => LinkNameSpaceType::Network,
        TIME => LinkNameSpaceType::Time,
        _ => return None,
    })
}

fn map_identities(pid: Pid, namespaces: &NamespacePlan) -> Result<(), ChildError> {
    let pid = pid.as_raw_nonzero();
    for (file, lines) in [
        ("uid_map", &namespaces.uid_map),
        ("gid_map", &namespaces.gid_map),
    ] {
        let path = format!("/proc/{pid}/{file}");
        fs::write(&path, lines).step(|| format!("write {path}"))?;
    }
    Ok(())
}

/// The second process's first steps: root of its user namespace, a session of its own, its cgroup namespace.
pub(super) fn settle(plan: &ChildPlan) -> Result<(), ChildError> {
    setsid().step(|| "setsid".to_owned())?;
    let joined_user = plan.namespaces.join_init & USER != 0;
    if plan.namespaces.has_user() || joined_user {
        let root = Some(rustix::process::Gid::ROOT);
        set_thread_res_gid(root, root, root)
            .step(|| "become root of the user namespace".to_owned())?;
        // Refused where the namespace forbids it, as one made by somebody unprivileged does.
        let _ = set_thread_groups(&[]);
        let root = Some(rustix::process::Uid::ROOT);
        set_thread_res_uid(root, root, root)
            .step(|| "become root of the user namespace".to_owned())?;
    }
    if plan.namespaces.create & CGROUP != 0 {
        sys::unshare(UnshareFlags::NEWCGROUP).step(|| "unshare the cgroup namespace".to_owned())?;
    }
    Ok(())
}
