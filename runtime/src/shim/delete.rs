//! `delete`: removes what a server has left that was killed, or that containerd could not reach.
//!
//! Contract: afterwards the server, its VMM, their cgroup and the socket are gone and the hooks for the end have run;
//! nothing else is touched, so it can be asked any number of times. A member of a pod has nothing of its own.

use std::{
    env, fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::SystemTime,
};

use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{args::Args, bootstrap::ADDRESS, container::Hooks, process::timestamp, ticket::Ticket};
use crate::{
    boot::wait_for_vmm,
    cgroup::{CgroupError, Note},
    monitor::HostHooks,
    sandbox::LOST,
    state::{ContainerId, State, StateError, Status},
};

/// Why something may be left.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeleteError {
    #[error("{step} {path}", path = path.display())]
    Path {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Id(#[from] StateError),
}

/// Removes what is left of the container in a bundle; answers what containerd shall believe of its end.
pub(super) fn delete(args: &Args) -> Result<Vec<u8>, DeleteError> {
    let bundle = match args.bundle.as_os_str().is_empty() {
        true => at("find", Path::new("."), env::current_dir())?,
        false => args.bundle.clone(),
    };
    let ticket = at("read the traces in", &bundle, Ticket::load(&bundle))?;
    let pid = ticket.as_ref().map_or(0, |ticket| ticket.pid);
    if let Some(ticket) = ticket {
        at(
            "end the server of",
            &bundle,
            end_server(&bundle, ticket.pid),
        )?;
        let note = Note {
            path: ticket.cgroup,
            unit: ticket.unit,
            intended: ticket.intended,
        };
        note.clear()?;
        at("wait for the VMM of", &bundle, wait_for_vmm(&bundle))?;
        run_hooks(args, &bundle)?;
        remove_socket(&bundle);
    }
    let answer = DeleteResponse {
        pid,
        exit_status: LOST.into(),
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    // A message of numbers always encodes.
    Ok(answer.write_to_bytes().unwrap_or_default())
}

/// Kills a server that still holds its bundle's lock, and waits until it is gone.
fn end_server(bundle: &Path, pid: u32) -> io::Result<()> {
    let dir = fs::File::open(bundle)?;
    let process = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(()),
        Err(Errno::WOULDBLOCK) => {}
        Err(errno) => return Err(errno.into()),
    }
    // The lock is held by the process that wrote its pid, and was when the descriptor was opened.
    if let Some(process) = process {
        match pidfd_send_signal(&process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::io::retry_on_intr(|| flock(&dir, FlockOperation::LockExclusive))?;
    Ok(())
}

/// The hooks that undo what others did; their failures have nobody who could be told.
fn run_hooks(args: &Args, bundle: &Path) -> Result<(), DeleteError> {
    let lists = HostHooks::load(bundle).unwrap_or_default();
    if lists.poststop.is_empty() {
        return Ok(());
    }
    let hooks = Hooks {
        lists,
        supervisor: None,
        state: State {
            oci_version: crate::bundle::OCI_VERSION.to_owned(),
            id: ContainerId::parse(&args.id)?,
            pid: 0,
            status: Status::Stopped,
            bundle: bundle.to_owned(),
            rootfs: bundle.join("rootfs"),
            created: String::new(),
            annotations: None,
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        },
    };
    hooks.after_deletion();
    Ok(())
}

/// Removes the server's socket, if really nobody listens at it.
fn remove_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join(ADDRESS)) else {
        return;
    };
    let socket = address.trim().trim_start_matches("unix://");
    if UnixStream::connect(socket).is_err() {
        // Already gone is as good.
        let _ = fs::remove_file(socket);
    }
}

fn at<T>(step: &'static str, path: &Path, result: io::Result<T>) -> Result<T, DeleteError> {
    result.map_err(|source| DeleteError::Path {
        step,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn args(bundle: &Path) -> Args {
        Args {
            id: "c1".into(),
            bundle: bundle.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_bundle_without_traces_has_ended_as_if_killed() {
        let dir = tempfile::tempdir().unwrap();
        let answer = DeleteResponse::parse_from_bytes(&delete(&args(dir.path())).unwrap()).unwrap();
        assert_eq!(answer.exit_status, 137);
        assert!(answer.exited_at.seconds > 0);
    }

    #[test]
    fn traces_are_removed_however_often_it_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        drop(UnixListener::bind(&socket).unwrap());
        fs::write(
            dir.path().join(ADDRESS),
            format!("unix://{}", socket.display()),
        )
        .unwrap();
        let ticket = Ticket {
            pid: 1,
            cgroup: Some("/sys/fs/cgroup/no/such".into()),
            unit: None,
            intended: false,
        };
        ticket.store(dir.path()).unwrap();
        for _ in 0..2 {
            delete(&args(dir.path())).unwrap();
            assert!(!socket.exists());
        }
    }
}
