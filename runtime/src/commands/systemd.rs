//! What systemd and others are told about a container's process: that it is ready (sd_notify(3)), and its pidfd.
//!
//! As runc: a caller with `NOTIFY_SOCKET` gets `READY=1` when the container has said so on a socket of its own, and then
//! the pid to watch. The socket of `--pidfd-socket` is sent a descriptor of the process that stands for the container.

use std::{
    env, io,
    io::IoSlice,
    mem::MaybeUninit,
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::launch::LaunchError;
use crate::control::{Control, Request};

/// The caller's notify socket.
#[derive(Debug, Clone)]
pub(super) struct NotifySocket(PathBuf);

impl NotifySocket {
    /// The one in the environment.
    pub(super) fn of_caller() -> Option<Self> {
        let path = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty())?;
        Some(Self(path.into()))
    }

    /// Blocks until the container in this state directory is ready, and says so; with the pid that is to be watched, if
    /// the caller is not that process's parent. A container that ends, or was made without a socket, says nothing.
    pub(super) fn pass_on(&self, dir: &Path, pid: Option<u32>) -> io::Result<()> {
        let ready = Control::connect(dir).and_then(|control| control.order(&Request::Ready));
        if ready.is_err() {
            return Ok(());
        }
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address(&self.0)?)?;
        socket.send(b"READY=1\n")?;
        if let Some(pid) = pid {
            socket.send(format!("MAINPID={pid}\n").as_bytes())?;
        }
        Ok(())
    }
}

/// A path, or after an `@` a name in the abstract namespace.
fn address(path: &Path) -> io::Result<SocketAddr> {
    match path.as_os_str().as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(path),
    }
}

/// Sends a descriptor of a process to the socket, if there is one. `kind` is what runc calls such a process.
pub(super) fn send_pidfd(socket: Option<&Path>, pid: u32, kind: &str) -> Result<(), LaunchError> {
    let Some(path) = socket else { return Ok(()) };
    send(path, pid, kind).map_err(|source| LaunchError::PidfdSocket {
        path: path.to_owned(),
        source,
    })
}

fn send(path: &Path, pid: u32, kind: &str) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(pid.ok_or(io::ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
    let stream = UnixStream::connect(path)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [process.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        &stream,
        &[IoSlice::new(kind.as_bytes())],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notify_sockets_have_paths_or_abstract_names() {
        let named = address(Path::new("@systemd/notify")).unwrap();
        assert_eq!(named.as_abstract_name(), Some(b"systemd/notify".as_slice()));
        let path = Path::new("/run/systemd/notify");
        assert_eq!(address(path).unwrap().as_pathname(), Some(path));
    }
}
