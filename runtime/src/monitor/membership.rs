//! Containers that share a sandbox: those that name another container's network namespace, as the containers of a podman
//! pod name their infra container's, live in its virtual machine.
//!
//! ```text
//!  network namespace /proc/PID/ns/net, PID a monitor's
//!       member's monitor --Premises--> PID's monitor:   who holds the sandbox, and which process it is in the guest
//!       member's monitor --Join-----> holder's monitor: the tie; the mount namespace in which files are shared
//! ```
//!
//! Contract: a member joins the network, IPC, UTS and PID namespaces that its specification gives by paths of the same
//! process, and no others. Its end, a kill of its monitor included, leaves nothing of it in the sandbox: the holder kills
//! it, deletes it from the guest and takes its files out of the share when the tie ends. Until that is done the member's
//! own [`crate::boot::VM_LOCK`] is held, so that nobody uses its name again. The holder's end is the end of all.
//! Not here: the member's questions (`sandbox/remote.rs`).

use std::{
    borrow::Cow,
    ffi::OsStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::create::CreateError;
use crate::{
    boot,
    control::{Answer, Control, Request},
    guest_spec::HostFiles,
    network::Network,
    packet::Packets,
    sandbox::{
        Sandbox,
        remote::{self, Members},
    },
    share::{self, Share, Trees},
    sizing::Bounds,
    state::StateDir,
};

/// Where a container's sandbox is, for those who want to join it.
#[derive(Debug, Clone)]
pub(super) struct Premises {
    /// The state directory of the monitor that holds it.
    pub(super) holder: PathBuf,
    /// The container's init in the guest.
    pub(super) guest_pid: u32,
    /// The virtual machine's.
    pub(super) bounds: Bounds,
    /// The shared directory.
    pub(super) share: PathBuf,
    /// The mount namespace in which it is.
    pub(super) namespace: Arc<OwnedFd>,
}

/// A sandbox's name, that of the container which brought it, by the state directory of its holder.
pub(super) fn sandbox(holder: &Path) -> Cow<'_, str> {
    holder.file_name().unwrap_or_default().to_string_lossy()
}

/// The container whose sandbox is to be joined.
#[derive(Debug)]
pub(super) struct Sharer {
    /// Its state directory.
    dir: PathBuf,
    /// Its network namespace, on the host.
    network: PathBuf,
    /// What is joined.
    kinds: Vec<LinuxNamespaceType>,
}

/// A sandbox that has been joined.
pub(super) struct Joined {
    pub(super) sandbox: Sandbox,
    /// The state directory of the monitor that holds it.
    pub(super) holder: PathBuf,
    /// The virtual machine's.
    pub(super) bounds: Bounds,
}

impl Sharer {
    /// The container whose namespaces the specification names, if it is one of ours below `root`.
    pub(super) fn find(spec: &Spec, root: &Path) -> Option<Self> {
        let (pid, kinds) = named(spec)?;
        let is_it = |id: &crate::state::ContainerId| {
            let dir = StateDir::open(root, id).ok()?;
            let is_it = dir.state().is_ok_and(|state| state.pid == pid);
            is_it.then(|| dir.path().to_owned())
        };
        let dir = StateDir::ids(root).ok()?.iter().find_map(is_it)?;
        Some(Self {
            dir,
            network: format!("/proc/{pid}/ns/net").into(),
            kinds,
        })
    }

    /// Whether the namespace is one that is shared.
    pub(super) fn shares(&self, kind: LinuxNamespaceType) -> bool {
        self.kinds.contains(&kind)
    }

    /// Brings a container, whose specification has been split, into the sandbox. This process, which has one thread,
    /// stands in its network namespace and in its mount namespace afterwards. `dir` is the container's.
    pub(super) async fn join(
        &self,
        dir: &StateDir,
        id: &str,
        guest: &mut Spec,
        files: &HostFiles,
    ) -> Result<(Share, Joined), CreateError> {
        let answer = Control::connect(&self.dir)?.ask(&Request::Premises, &[])?;
        let (Answer::Premises { holder, guest_pid }, _) = answer else {
            return Err(crate::control::ControlError::Unexpected.into());
        };
        crate::guest_spec::join_namespaces(guest, &self.kinds, guest_pid);
        let failed = |source| CreateError::Host {
            step: "join the sandbox",
            source,
        };
        let lock = boot::lock_file(dir.path()).map_err(failed)?;
        let (tie, share, bounds, namespace) = Control::connect(&holder)?.join(id, lock.as_fd())?;
        drop(lock);
        let tie = Packets::new(tie).map_err(failed)?;
        // From here on the end of the tie undoes everything.
        let sandbox = remote::attach(holder.clone(), id.to_owned(), tie);
        let share = Share::existing(share);
        if let Err(error) = self.move_in(id, files, &share, namespace.as_fd()) {
            sandbox.stop().await;
            return Err(error);
        }
        let joined = Joined {
            sandbox,
            holder,
            bounds,
        };
        Ok((share, joined))
    }

    fn move_in(
        &self,
        id: &str,
        files: &HostFiles,
        share: &Share,
        namespace: BorrowedFd<'_>,
    ) -> Result<(), CreateError> {
        let trees = Trees::open(files)?;
        Network::stand_in(&self.network)?;
        share::enter_namespace(namespace)?;
        Ok(share.add_trees(id, files, &trees)?)
    }
}

/// The process whose network namespace is joined, and the kinds of namespaces that are joined with it; none if there is
/// another process among them.
fn named(spec: &Spec) -> Option<(u32, Vec<LinuxNamespaceType>)> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_deref()?;
    let paths = namespaces.iter().filter_map(|namespace| {
        let path = namespace.path().as_deref()?;
        (!path.as_os_str().is_empty()).then(|| (namespace.typ(), path))
    });
    let mut all = Vec::new();
    for (kind, path) in paths {
        all.push((kind, process_of(path)?));
    }
    let (_, pid) = *all
        .iter()
        .find(|(kind, _)| *kind == LinuxNamespaceType::Network)?;
    all.iter()
        .all(|(_, other)| *other == pid)
        .then(|| (pid, all.into_iter().map(|(kind, _)| kind).collect()))
}

/// The number in `/proc/NUMBER/ns/NAME`.
fn process_of(path: &Path) -> Option<u32> {
    let mut parts = path.strip_prefix("/proc").ok()?.iter();
    let pid = parts.next()?.to_str()?.parse().ok()?;
    let is_namespace = parts.next() == Some(OsStr::new("ns"));
    (is_namespace && parts.next().is_some() && parts.next().is_none()).then_some(pid)
}

/// The holder's side of a tie: lets a container in, and clears it away when it is over. `lock` says that it is not.
pub(super) async fn hold(
    packets: Packets,
    sandbox: Sandbox,
    premises: Premises,
    members: Members,
    id: String,
    lock: Vec<OwnedFd>,
) {
    let Some(member) = members.enter(&id, packets.peer()) else {
        let taken = Answer::Failed(format!("container {id} is in the sandbox already"));
        let _ = packets.send(&taken, &[]).await;
        return;
    };
    let joined = Answer::Joined {
        share: premises.share.clone(),
        bounds: premises.bounds,
    };
    let fds = [premises.namespace.as_fd()];
    if packets.send(&joined, &fds).await.is_err() {
        return;
    }
    tokio::select! {
        how = sandbox.ended() => {
            // A member that is gone has no use for it.
            let _ = packets.send(&Answer::SandboxEnded(how), &[]).await;
        }
        // It says that it leaves, or hangs up.
        _ = packets.receive::<Request>() => {
            member.clear(&sandbox).await;
            let namespace = premises.namespace.as_fd();
            if let Err(error) = share::remove_elsewhere(namespace, &premises.share, &id) {
                // It goes with the sandbox.
                eprintln!("caisson: {}", crate::error::message(&error));
            }
            drop((member, lock));
            let _ = packets.send(&Answer::Done, &[]).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn named(namespaces: Value) -> Option<(u32, usize)> {
        let spec = json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        super::named(&spec).map(|(pid, kinds)| (pid, kinds.len()))
    }

    #[test]
    fn who_names_another_containers_network_is_its_guest() {
        let network = json!({"type": "network", "path": "/proc/17/ns/net"});
        let ipc = |path: &str| json!({"type": "ipc", "path": path});
        assert_eq!(named(json!([network, {"type": "pid"}])), Some((17, 1)));
        assert_eq!(
            named(json!([network, ipc("/proc/17/ns/ipc")])),
            Some((17, 2))
        );
        // Of two containers, of none, and of one alone without its network.
        assert_eq!(named(json!([network, ipc("/proc/18/ns/ipc")])), None);
        assert_eq!(named(json!([network, ipc("/run/ns/ipc")])), None);
        assert_eq!(
            named(json!([{"type": "network"}, ipc("/proc/17/ns/ipc")])),
            None
        );
    }

    #[test]
    fn a_process_is_named_by_its_directory_in_proc_alone() {
        let process = |path: &str| process_of(Path::new(path));
        assert_eq!(process("/proc/42/ns/net"), Some(42));
        for path in [
            "/proc/self/ns/net",
            "/run/netns/x",
            "/proc/42/ns",
            "/proc/42/ns/net/x",
            "/x/proc/42/ns/net",
        ] {
            assert_eq!(process(path), None, "{path}");
        }
    }
}
