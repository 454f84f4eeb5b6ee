//! What a command and the monitor (or the process behind `exec --detach`) say to each other at the start.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    cgroup::Terms,
    identities::Identities,
    packet::{self, PacketError},
    state::ContainerId,
    terminal::Size,
    trace::Trace,
};

/// What `create` and `run` want. Attached: the caller's stdin, stdout and stderr, then the preserved descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// The container's name.
    pub id: ContainerId,
    /// Holds a directory for each container.
    pub root: PathBuf,
    /// The bundle, as given.
    pub bundle: PathBuf,
    /// Where the terminal's master goes.
    pub console_socket: Option<PathBuf>,
    /// The caller goes away before the container ends.
    pub detach: bool,
    /// Start the container as well.
    pub start: bool,
    /// How the host's cgroup is made.
    pub cgroups: Terms,
    /// How many of the descriptors systemd has passed.
    #[serde(default)]
    pub activated: u32,
    /// The container can say that it is ready.
    #[serde(default)]
    pub notify: bool,
    /// The start so far.
    #[serde(default)]
    pub trace: Trace,
    /// Where messages go once the caller is gone: file, format, debug.
    pub log: Option<(PathBuf, String, bool)>,
}

/// What the monitor tells its caller, in this order; each of the first five may be missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The container's directory is made: from now on the caller has something to remove if the monitor is killed.
    Claimed,
    /// Something was not done as asked.
    Warning(String),
    /// The monitor is in a user namespace of its own: map these there, then answer with [`Go`].
    Identities(Identities),
    /// The container's terminal is the caller's: answer with [`Go`] when it is in raw mode.
    Terminal,
    /// The virtual machine is up. Run `prestart` and `createRuntime`, then answer with [`Go`].
    Hooks,
    /// The container is created, or started if that was ordered.
    Ready {
        /// The process that stands for it.
        pid: u32,
    },
    /// It is not; nothing is left.
    Failed(String),
    /// After [`Report::Ready`]: the virtual machine is lost, and the container with it.
    Lost(String),
}

/// "Go on", with the terminal's size if that was the question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Go {
    /// Rows and columns.
    pub size: Option<Size>,
}

/// This program again, as one of its hidden commands.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// The hidden command.
    pub command: &'a str,
    /// For those who look at the list of processes.
    pub subject: &'a str,
}

/// Why this program could not be started anew.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The host refused.
    #[error("start this program once more")]
    Spawn(#[source] io::Error),
    /// It does not take its order.
    #[error(transparent)]
    Order(#[from] PacketError),
}

/// A process of this program that was given an order and reports.
#[derive(Debug)]
pub struct Supervised {
    child: Child,
    socket: OwnedFd,
}

impl Supervised {
    /// Starts this program anew with an order. It inherits nothing but the attached descriptors.
    pub fn start(
        program: Program<'_>,
        order: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Self, StartError> {
        let failed = StartError::Spawn;
        let (ours, theirs) = packet::pair().map_err(failed)?;
        let child = Command::new("/proc/self/exe")
            .arg0("caisson")
            .args([program.command, program.subject])
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let supervised = Self {
            child,
            socket: ours,
        };
        packet::send(supervised.socket.as_fd(), order, fds)?;
        Ok(supervised)
    }

    /// The next report; `None` when the process is gone.
    pub fn report<T: DeserializeOwned>(&self) -> Result<Option<T>, PacketError> {
        match packet::receive(self.socket.as_fd()) {
            Ok(report) => Ok(report.map(|(report, _)| report)),
            Err(error) if is_abandoned(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Answers a report.
    pub fn go(&self, size: Option<Size>) -> Result<(), PacketError> {
        packet::send(self.socket.as_fd(), &Go { size }, &[])
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Hangs up, which ends a process that is not ready yet, and waits for its end.
    pub fn abandon(self) -> io::Result<ExitStatus> {
        let Self { mut child, socket } = self;
        drop(socket);
        child.wait()
    }

    /// The parts, for a caller that stays.
    pub fn into_parts(self) -> (Child, OwnedFd) {
        (self.child, self.socket)
    }
}

/// Whether an error means that the other side was killed.
pub fn is_abandoned(error: &PacketError) -> bool {
    matches!(error, PacketError::Socket { source, .. }
        if matches!(source.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe))
}
