//! Supervisors of system calls: programs on the host that a seccomp profile names (`listenerPath`), and that answer the
//! notifications of a filter in the guest.
//!
//! ```text
//!  supervisor <--ioctls--> the host's FUSE <--device--> task here <--stream--> agent <--ioctls--> the guest's listener
//! ```
//!
//! A listener's descriptor belongs to one kernel. The supervisor gets a descriptor of a file that this process serves
//! instead, and that answers the same operations; the file's system has that one file, and is mounted nowhere.
//!
//! Contract: [`Supervisor::engage`] has everything ready before the guest is asked for the process, and the supervisor
//! gets its listener, with runc's message, when the guest has one, before a system call of the process needs an answer.
//! The file is served until the supervisor closes it or this process ends. What the guest says is checked (`session.rs`);
//! nonsense ends the stream to it, as its own end does: the supervisor sees POLLHUP and ENOENT, as with a filter that no
//! process has any more, and the guest's kernel answers ENOSYS to the processes.
//! Nothing of this happens for a profile without SCMP_ACT_NOTIFY.
//! Not here: which profiles are accepted (`bundle/seccomp.rs`), the guest's side (`supervision.rs` of the agent).

mod serve;
mod session;
mod wire;

use std::{
    io::{self, IoSlice, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use caisson_agent_api::supervision::ToGuest;
use oci_spec::runtime::{LinuxSeccompAction, SECCOMP_FD_NAME, Spec};
use rustix::{
    fs::{Mode, OFlags},
    mount::MountAttrFlags,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use serde_json::json;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
};

use crate::{
    bundle::OCI_VERSION,
    fuse::{self, FuseError},
    monitor::oci_state,
    state::{State, Status},
};

/// Where the guest's stream for a listener is handed in. Dropped: there will be no listener.
pub type Handover = oneshot::Sender<OwnedFd>;

/// Why there is no supervision. The words are runc's where it has them.
#[derive(Debug, thiserror::Error)]
pub enum SupervisionError {
    /// The supervisor is not there.
    #[error("failed to connect with seccomp agent specified in the seccomp profile")]
    Connect(#[source] io::Error),
    /// The host does not give the file system.
    #[error("make a file for the seccomp listener")]
    FileSystem(#[from] FuseError),
    /// Nor the file in it.
    #[error("make a file for the seccomp listener: {step}")]
    File {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> SupervisionError {
    move |error| SupervisionError::File {
        step,
        source: error.into(),
    }
}

/// Who answers the notifications of a container's processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supervisor {
    path: PathBuf,
    metadata: Option<String>,
}

/// A process whose filter is to be supervised.
#[derive(Debug)]
pub struct Subject<'a> {
    /// Its container.
    pub state: &'a State,
    /// What the container is doing.
    pub status: Status,
    /// What stands for the process on the host.
    pub pid: u32,
}

impl Supervisor {
    /// The one that a checked specification names, if it notifies.
    pub fn of(spec: &Spec, bundle: &Path) -> Option<Self> {
        let seccomp = spec.linux().as_ref()?.seccomp().as_ref()?;
        let rules = seccomp.syscalls().as_deref().unwrap_or_default();
        let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
        rules.iter().any(|rule| notifies(rule.action())).then(|| {
            let path = seccomp.listener_path().clone().unwrap_or_default();
            Self {
                path: bundle.join(path),
                metadata: seccomp.listener_metadata().clone(),
            }
        })
    }

    /// Reaches the supervisor. Must be called inside a runtime.
    pub async fn reach(&self) -> Result<Reached<'_>, SupervisionError> {
        let socket = tokio::net::UnixStream::connect(&self.path).await;
        let socket = socket.and_then(tokio::net::UnixStream::into_std);
        Ok(Reached {
            supervisor: self,
            socket: socket.map_err(SupervisionError::Connect)?,
        })
    }

    /// `ContainerProcessState` of the runtime specification.
    fn message(&self, subject: &Subject<'_>) -> serde_json::Value {
        let mut message = json!({
            "ociVersion": OCI_VERSION,
            "fds": [SECCOMP_FD_NAME],
            "pid": subject.pid,
            "state": oci_state(subject.state, subject.status),
        });
        if let (Some(metadata), Some(object)) = (&self.metadata, message.as_object_mut()) {
            object.insert("metadata".to_owned(), metadata.as_str().into());
        }
        message
    }
}

/// A supervisor that listens, connected.
#[derive(Debug)]
pub struct Reached<'a> {
    supervisor: &'a Supervisor,
    socket: UnixStream,
}

impl Reached<'_> {
    /// Makes its file, which it gets once the process has a listener. Must be called inside a runtime.
    pub async fn engage(self, subject: Subject<'_>) -> Result<Handover, SupervisionError> {
        let message = self.supervisor.message(&subject).to_string();
        let socket = self.socket;
        let (device, mount) = fuse::mount(wire::MODE, MountAttrFlags::empty())?;
        let (line, guest) = oneshot::channel();
        tokio::spawn(serve::serve(device, guest));
        // Opening and closing it are requests to the task.
        let file = spawn_blocking(move || {
            let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
            rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        });
        let file = joined(file).await.map_err(at("open it"))?;
        let (handover, coming) = oneshot::channel();
        tokio::spawn(async move {
            let stream = coming.await;
            joined(spawn_blocking(move || {
                let stream = UnixStream::from(stream.map_err(io::Error::other)?);
                send(&socket, message.as_bytes(), &file)?;
                drop(file);
                (&stream).write_all(&ToGuest::Go.encode())?;
                // The task ends with the file only.
                let _ = line.send(stream);
                Ok::<_, io::Error>(())
            }))
            .await
        });
        Ok(handover)
    }
}

/// What a blocking task brings back, which cannot have been cancelled.
async fn joined<T, E: Into<io::Error>>(task: JoinHandle<Result<T, E>>) -> io::Result<T> {
    task.await.map_err(io::Error::other)?.map_err(Into::into)
}

/// Sends the message with the file, as the one message of the connection.
fn send(socket: &UnixStream, message: &[u8], file: &OwnedFd) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&files));
    let parts = [IoSlice::new(message)];
    let flags = SendFlags::NOSIGNAL;
    rustix::io::retry_on_intr(|| sendmsg(socket, &parts, &mut control, flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ContainerId;

    fn spec(seccomp: serde_json::Value) -> Spec {
        serde_json::from_value(json!({"ociVersion": "1.0.2", "linux": {"seccomp": seccomp}}))
            .unwrap()
    }

    #[test]
    fn only_a_profile_that_notifies_has_a_supervisor() {
        let of = |action: &str| {
            let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "run/s",
                "listenerMetadata": "m", "syscalls": [{"names": ["mkdir"], "action": action}]});
            Supervisor::of(&spec(profile), Path::new("/b"))
        };
        assert_eq!(of("SCMP_ACT_ERRNO"), None);
        let supervisor = of("SCMP_ACT_NOTIFY").unwrap();
        assert_eq!(supervisor.path, Path::new("/b/run/s"));
        let plain = json!({"ociVersion": "1.0.2"});
        let plain = serde_json::from_value(plain).unwrap();
        assert_eq!(Supervisor::of(&plain, Path::new("/b")), None);
    }

    #[test]
    fn the_message_is_a_container_process_state() {
        let state = State {
            oci_version: "1.0.2".into(),
            id: ContainerId::parse("c1").unwrap(),
            pid: 7,
            status: Status::Creating,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: String::new(),
            annotations: None,
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        };
        let supervisor = Supervisor {
            path: "/s".into(),
            metadata: Some("m".to_owned()),
        };
        let subject = Subject {
            state: &state,
            status: Status::Running,
            pid: 8,
        };
        let message = supervisor.message(&subject);
        let parsed: oci_spec::runtime::ContainerProcessState =
            serde_json::from_value(message.clone()).unwrap();
        assert_eq!((*parsed.pid(), *parsed.state().pid()), (8, Some(7)));
        assert_eq!(parsed.metadata().as_deref(), Some("m"));
        assert_eq!(
            (&message["fds"], &message["state"]["status"]),
            (&json!(["seccompFd"]), &json!("running"))
        );
    }
}
