//! The monitor: the process that holds one sandbox for the command line, and stands for its container on the host.
//!
//! ```text
//!  caisson create --socket pair--> caisson monitor --spec, fds--> caisson-vmm
//!                   Order ->           |
//!                   <- Report          +-- control.sock <-- caisson start, exec, kill, ...
//! ```
//!
//! Contract: its pid is the one in the pid file, and it ends with the container's exit status. `create` and `run` start
//! it and hear of it over a socket pair; until it has reported [`Report::Ready`] it lives only as long as they do.
//! It holds the lock on the container's directory until its end.
//! Not here: the sandbox (`sandbox/`), hooks, pid files and removal, which are the commands' (`commands/`).

mod create;
mod doors;
mod hooks;
mod live;
mod membership;
mod order;
mod serve;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

use serde::de::DeserializeOwned;

pub use self::{
    hooks::{HostHooks, hook_state, oci_state},
    order::{Go, Order, Program, Report, StartError, Supervised, is_abandoned},
};
use crate::packet::{self, Packets};

/// The hidden command that starts a monitor.
pub const COMMAND: &str = "monitor";

/// Takes the socket that stands in for standard input, and puts `/dev/null` in its place. Sets the process's name too,
/// which is `exe` after being started by way of `/proc`, and closes whatever else the caller has left open.
pub(crate) fn inherited_socket() -> io::Result<OwnedFd> {
    crate::spawn::forget_inherited();
    rustix::thread::set_name(c"caisson")?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    let null = rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(socket)
}

/// A runtime with one thread: this one.
pub(crate) fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
}

/// What a process of this program has been left behind to do.
pub(crate) struct Task<O> {
    /// To whoever ordered it.
    pub(crate) socket: OwnedFd,
    pub(crate) order: O,
    /// What came with the order.
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) runtime: tokio::runtime::Runtime,
}

impl<O: DeserializeOwned> Task<O> {
    /// Takes the order from the inherited socket. Without one there is nobody who could be told.
    pub(crate) fn take() -> Option<Self> {
        let socket = inherited_socket().ok()?;
        let (order, fds) = packet::receive(socket.as_fd()).ok()??;
        let runtime = runtime().ok()?;
        Some(Self {
            socket,
            order,
            fds,
            runtime,
        })
    }
}

/// The whole life of a monitor.
pub fn main() -> ExitCode {
    let Some(task) = Task::<Order>::take() else {
        return ExitCode::FAILURE;
    };
    let Task {
        socket,
        order,
        fds,
        runtime,
    } = task;
    runtime.block_on(async {
        let Ok(report) = Packets::new(socket) else {
            return ExitCode::FAILURE;
        };
        match create::create(order, fds, &report).await {
            Ok(live) => live.serve(&report).await,
            Err(error) => {
                let message = crate::error::message(&error);
                // Whoever gave the order may be gone; then it has no use for the reason either.
                let _ = report.send(&Report::Failed(message), &[]).await;
                ExitCode::FAILURE
            }
        }
    })
}
