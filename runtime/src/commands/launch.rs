//! What `create` and `run` have in common: a monitor is started, and listened to until its container is ready.

use std::{
    fs, io,
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use super::{
    Context, delete,
    systemd::{self, NotifySocket},
};
use crate::{
    cgroup,
    cli::Launch,
    hooks::{self, HookError},
    identities::{self, IdentityError},
    monitor::{self, HostHooks, Order, Program, Report, StartError, Supervised, hook_state},
    packet::PacketError,
    preserved::{self, PreservedError},
    state::{ContainerId, StateDir, StateError, Status},
    terminal::{Raw, TerminalError},
    trace::{Trace, Who},
};

/// Why there is no container.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Its name or directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Descriptors for the container.
    #[error(transparent)]
    Preserved(#[from] PreservedError),
    /// A hook of the host's side.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The users and groups of an ordinary user's container.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The hooks cannot be read back.
    #[error("read the hooks")]
    Hooks(#[source] io::Error),
    /// The caller's terminal.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    /// The monitor cannot be started.
    #[error("start the container's monitor")]
    Start(#[from] StartError),
    /// The monitor cannot be spoken to.
    #[error("listen to the container's monitor")]
    Monitor(#[from] PacketError),
    /// What the monitor says.
    #[error("{0}")]
    Failed(String),
    /// It said nothing.
    #[error("the container's monitor was killed")]
    Killed,
    /// The pid file.
    #[error("write the pid file {path}", path = path.display())]
    PidFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket for a descriptor of the container's process.
    #[error("send a pidfd to {path}", path = path.display())]
    PidfdSocket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A step on this side.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A container whose monitor is ready.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) id: ContainerId,
    pub(super) monitor: Supervised,
    /// The caller's terminal, in raw mode, if it is the container's.
    pub(super) raw: Option<Raw>,
}

/// Starts a monitor and waits until its container is created, or started if `start` is set.
pub(super) fn launch(
    context: &Context,
    args: &Launch,
    detach: bool,
    start: bool,
) -> Result<Launched, LaunchError> {
    let id = ContainerId::parse(&args.id)?;
    let activated = preserved::activated();
    let preserved = preserved::take(activated, args.preserve_fds)?;
    let mut trace = Trace::of_process(Who::Command);
    trace.mark(Who::Command, "understand the command line");
    let order = Order {
        trace,
        id: id.clone(),
        root: absolute(&context.root)?,
        bundle: args.bundle.clone().unwrap_or_else(|| PathBuf::from(".")),
        console_socket: args.console_socket.clone(),
        detach,
        start,
        cgroups: cgroup::Terms {
            systemd: context.global.systemd_cgroup,
            rootless: context.global.rootless,
        },
        activated,
        notify: NotifySocket::of_caller().is_some(),
        log: context.global.log.clone().map(|path| {
            (
                path,
                context.global.log_format.clone(),
                context.global.debug,
            )
        }),
    };
    let streams = (io::stdin(), io::stdout(), io::stderr());
    let mut fds = vec![streams.0.as_fd(), streams.1.as_fd(), streams.2.as_fd()];
    fds.extend(preserved.iter().map(AsFd::as_fd));
    let program = Program {
        command: monitor::COMMAND,
        subject: id.as_str(),
    };
    let monitor = Supervised::start(program, &order, &fds)?;
    // Only the monitor's copies count from here on.
    drop(preserved);
    let mut claimed = false;
    let outcome = listen(context, &order, &monitor, &mut claimed).and_then(|raw| {
        write_pid_file(args.pid_file.as_deref(), monitor.pid())?;
        systemd::send_pidfd(args.pidfd_socket.as_deref(), monitor.pid(), "standard")?;
        Ok(raw)
    });
    match outcome {
        Ok(raw) => Ok(Launched { id, monitor, raw }),
        Err(error) => {
            delete::end_monitor(context, monitor, claimed.then_some(&id));
            Err(error)
        }
    }
}

/// Follows the monitor's reports until it is ready.
fn listen(
    context: &Context,
    order: &Order,
    monitor: &Supervised,
    claimed: &mut bool,
) -> Result<Option<Raw>, LaunchError> {
    let mut raw = None;
    loop {
        match monitor.report::<Report>()? {
            Some(Report::Claimed) => *claimed = true,
            Some(Report::Warning(text)) => context.log.warning(&text),
            Some(Report::Identities(identities)) => {
                identities::map_others(&identities, monitor.pid())?;
                monitor.go(None)?;
            }
            Some(Report::Terminal) => {
                let terminal = Raw::enter()?;
                monitor.go(terminal.size())?;
                raw = Some(terminal);
            }
            Some(Report::Hooks) => {
                run_hooks(order)?;
                monitor.go(None)?;
            }
            Some(Report::Ready { .. }) => return Ok(raw),
            Some(Report::Failed(message) | Report::Lost(message)) => {
                return Err(LaunchError::Failed(message));
            }
            None => return Err(LaunchError::Killed),
        }
    }
}

fn run_hooks(order: &Order) -> Result<(), LaunchError> {
    let dir = StateDir::open(&order.root, &order.id)?;
    let state = dir.state()?;
    let told = hook_state(&state, Status::Creating);
    let lists = HostHooks::load(dir.path()).map_err(LaunchError::Hooks)?;
    hooks::run("prestart", &lists.prestart, &told, &state.bundle)?;
    hooks::run("createRuntime", &lists.create_runtime, &told, &state.bundle)?;
    Ok(())
}

/// Writes a pid file as runc does: beside it first, then renamed, so that who waits for it never reads half of it.
pub(super) fn write_pid_file(path: Option<&Path>, pid: u32) -> Result<(), LaunchError> {
    let Some(path) = path else { return Ok(()) };
    let failed = |source| LaunchError::PidFile {
        path: path.to_owned(),
        source,
    };
    let name = path
        .file_name()
        .ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let beside = path.with_file_name(hidden);
    let written = fs::File::create(&beside)
        .and_then(|mut file| file.write_all(pid.to_string().as_bytes()))
        .and_then(|()| fs::rename(&beside, path));
    written.map_err(failed)
}

fn absolute(path: &Path) -> Result<PathBuf, LaunchError> {
    std::path::absolute(path).map_err(|source| LaunchError::Host {
        step: "find the root directory",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_holds_the_number_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        write_pid_file(Some(&path), 4711).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "4711");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_pid_file_that_cannot_be_written_is_named() {
        let error = write_pid_file(Some(Path::new("/nonexistent/pid")), 1).unwrap_err();
        assert_eq!(error.to_string(), "write the pid file /nonexistent/pid");
    }
}
