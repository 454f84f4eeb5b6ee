//! The container's standard streams: what stands for them on the caller's side, and how they flow once the guest has them.

use std::os::fd::OwnedFd;

use oci_spec::runtime::Spec;

use super::{CreateError, go};
use crate::{
    monitor::{
        doors::Door,
        order::{Order, Report},
    },
    network::resolver,
    packet::Packets,
    preserved,
    sandbox::{CreateRequest, Sandbox, Started},
    stdio::{self, Progress},
    terminal::{self, Size},
};

/// The caller's descriptors, as attached to the order.
#[derive(Debug)]
pub(super) struct CallerFiles {
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
    /// From 3 upwards.
    pub(super) preserved: Vec<OwnedFd>,
}

/// Where the container's standard streams go.
pub(super) struct Streams {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    pub(super) preserved: Vec<OwnedFd>,
    /// The terminal whose size the container's follows.
    pub(super) terminal: Option<OwnedFd>,
    pub(super) size: Option<Size>,
}

/// What is left to follow of streams that flow.
pub(super) struct Flowing {
    /// Init, in the guest.
    pub(super) guest_pid: u32,
    pub(super) terminal: Option<OwnedFd>,
    /// Standard output and standard error.
    pub(super) progress: [Option<Progress>; 2],
    /// Those descriptors from 3 upwards that the guest writes to.
    pub(super) preserved: Vec<Progress>,
    /// Those that listen.
    pub(super) doors: Vec<Door>,
}

/// The container in the guest, its streams flowing.
pub(super) async fn set_up(
    sandbox: &Sandbox,
    id: &str,
    request: CreateRequest,
    streams: Streams,
) -> Result<Flowing, CreateError> {
    let listening = request.activation.listening.clone();
    let Started {
        pid: guest_pid,
        streams: guest_ends,
    } = sandbox.create(id, request).await?;
    let failed = |source| CreateError::Host {
        step: "pass the standard streams on",
        source,
    };
    if let Some(questions) = guest_ends.resolver {
        // What goes wrong there is a question without an answer.
        tokio::spawn(resolver::relay(questions));
    }
    if let Some(stdin) = guest_ends.stdin {
        stdio::input(streams.stdin, stdin).map_err(failed)?;
    }
    let output = |from: Option<OwnedFd>, to| from.map(|from| stdio::output(from, to)).transpose();
    let stdout = output(guest_ends.stdout, streams.stdout).map_err(failed)?;
    let stderr = output(guest_ends.stderr, streams.stderr).map_err(failed)?;
    let (mut ours, mut theirs, mut doors) = (Vec::new(), Vec::new(), Vec::new());
    for ((socket, stream), index) in streams
        .preserved
        .into_iter()
        .zip(guest_ends.preserved)
        .zip(0..)
    {
        match listening.iter().find(|listening| listening.index == index) {
            Some(listening) => doors.push(Door {
                socket,
                port: listening.vsock_port,
            }),
            None => {
                ours.push(socket);
                theirs.push(stream);
            }
        }
    }
    let preserved = preserved::join(ours, theirs).map_err(|source| CreateError::Host {
        step: "pass the preserved descriptors on",
        source,
    })?;
    Ok(Flowing {
        guest_pid,
        terminal: streams.terminal,
        progress: [stdout, stderr],
        preserved,
        doors,
    })
}

/// Decides what stands for the container's terminal, and gets hold of it.
pub(super) async fn streams(
    files: CallerFiles,
    order: &Order,
    guest: &Spec,
    report: &Packets,
) -> Result<Streams, CreateError> {
    let CallerFiles {
        stdin,
        stdout,
        stderr,
        preserved,
    } = files;
    let process = guest.process().as_ref();
    if !process
        .and_then(|process| process.terminal())
        .unwrap_or(false)
    {
        return Ok(Streams {
            stdin,
            stdout,
            stderr,
            preserved,
            terminal: None,
            size: None,
        });
    }
    let twin = |fd: &OwnedFd| {
        fd.try_clone().map_err(|source| CreateError::Host {
            step: "share the terminal",
            source,
        })
    };
    let asked = process
        .and_then(|process| process.console_size())
        .and_then(|size| {
            Some((
                u16::try_from(size.height()).ok()?,
                u16::try_from(size.width()).ok()?,
            ))
        });
    if let Some(socket) = &order.console_socket {
        let slave = terminal::behind_console_socket(socket, asked)?;
        let (stdin, stdout) = (twin(&slave)?, twin(&slave)?);
        return Ok(Streams {
            stdin,
            stdout,
            stderr,
            preserved,
            size: asked,
            terminal: Some(slave),
        });
    }
    report.send(&Report::Terminal, &[]).await?;
    let size = go(report).await?.size;
    let terminal = [&stdout, &stdin, &stderr]
        .into_iter()
        .find(|fd| rustix::termios::isatty(fd));
    // Without any terminal among them the size cannot change either; any descriptor will do.
    let terminal = Some(twin(terminal.unwrap_or(&stderr))?);
    Ok(Streams {
        stdin,
        stdout,
        stderr,
        preserved,
        terminal,
        size: asked.or(size),
    })
}

pub(super) fn set_console_size(guest: &mut Spec, size: Option<Size>) {
    if let (Some(size), Some(process)) = (size, guest.process_mut()) {
        process.set_console_size(terminal::console_size(size));
    }
}

pub(super) fn caller_files(fds: Vec<OwnedFd>) -> Result<CallerFiles, CreateError> {
    let mut fds = fds.into_iter();
    let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(CreateError::Abandoned);
    };
    Ok(CallerFiles {
        stdin,
        stdout,
        stderr,
        preserved: fds.collect(),
    })
}
