//! One more process in a running container, from the caller's side: asked for, its bytes passed on, its end awaited.
//!
//! Contract: the process that runs a [`Session`] stands for the one in the guest: it passes signals and the terminal's
//! size on and ends with its exit status. In the foreground that is `caisson exec` itself; with `--detach` a process of
//! this program that `exec` leaves behind, whose pid is in the pid file.
//! Not here: what the process is (`commands/exec.rs`), starting it (the monitor).

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    control::{Answer, Control, ControlError, Request, read_attached},
    forwarded::{Signals, WINDOW_CHANGE},
    monitor::{Report, Task},
    packet::{self, Packets},
    preserved,
    stdio::{self, Progress},
    terminal::{self, Size, TerminalError},
};

/// The hidden command behind `exec --detach`.
pub const COMMAND: &str = "exec-monitor";

/// Exit status of a process whose end nobody heard of.
const LOST: u8 = 137;

/// Why nobody heard of it.
const MONITOR_GONE: &str = "the container's monitor was killed";

/// How long the last bytes of preserved descriptors may take after the process's end. Their end need not come: other
/// processes of the container may hold copies.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// Why a process could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The monitor did not start it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// There is no terminal for it.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    /// A step on the host failed.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What is asked for. Attached when sent to the hidden command: the caller's stdin, stdout and stderr, the `process`
/// object as a file, the preserved descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// The container's state directory.
    pub dir: PathBuf,
    /// The process has a terminal.
    pub terminal: bool,
    /// Where the terminal's master goes.
    pub console_socket: Option<PathBuf>,
    /// The terminal's size, if the process object names one.
    pub size: Option<Size>,
    /// Even in a paused container.
    pub ignore_paused: bool,
}

/// The caller's descriptors for the process.
#[derive(Debug)]
pub struct Stdio {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
    /// Descriptors from 3 upwards.
    pub preserved: Vec<OwnedFd>,
}

/// A process that runs in the guest.
#[derive(Debug)]
pub struct Session {
    control: Packets,
    progress: [Option<Progress>; 2],
    /// Those descriptors from 3 upwards that the guest writes to.
    preserved: Vec<Progress>,
    terminal: Option<OwnedFd>,
    /// The terminal is this process's controlling one: the slave of a pair made for it.
    controls_terminal: bool,
}

impl Session {
    /// Has the process started and its bytes flowing. Must be called inside a runtime.
    pub fn start(order: &Order, process: &[u8], caller: Stdio) -> Result<Self, ExecError> {
        let (caller, terminal) = with_terminal(order, caller)?;
        let control = Control::connect(&order.dir)?;
        let request = Request::Exec {
            terminal: order.terminal,
            // As many as a packet carries at most.
            preserved: u32::try_from(caller.preserved.len()).unwrap_or(0),
            ignore_paused: order.ignore_paused,
        };
        let (socket, _pid, fds) = control.exec(&request, process)?;
        let mut fds = fds.into_iter();
        let failed = |source| ExecError::Host {
            step: "pass the standard streams on",
            source,
        };
        if let Some(stdin) = fds.next() {
            stdio::input(caller.stdin, stdin).map_err(failed)?;
        }
        let output =
            |from: Option<OwnedFd>, to| from.map(|from| stdio::output(from, to)).transpose();
        let stdout = output(fds.next(), caller.stdout).map_err(failed)?;
        let stderr = if order.terminal { None } else { fds.next() };
        let stderr = output(stderr, caller.stderr).map_err(failed)?;
        let preserved =
            preserved::join(caller.preserved, fds.collect()).map_err(|source| ExecError::Host {
                step: "pass the preserved descriptors on",
                source,
            })?;
        let control = Packets::new(socket).map_err(failed)?;
        Ok(Self {
            control,
            progress: [stdout, stderr],
            preserved,
            terminal,
            controls_terminal: order.console_socket.is_some(),
        })
    }

    /// Follows the process to its end and its last byte of output; answers its exit status, and why the virtual machine
    /// ended if that was the reason.
    pub async fn follow(self, mut signals: Signals) -> (u8, Option<String>) {
        let Self {
            control,
            progress,
            preserved,
            terminal,
            controls_terminal,
        } = self;
        let (status, ends, lost) = loop {
            tokio::select! {
                answer = control.receive::<Answer>() => match answer {
                    Ok(Some((Answer::Exited { status, stdout_bytes, stderr_bytes }, _))) => {
                        break (status, [stdout_bytes, stderr_bytes], None);
                    }
                    Ok(Some((Answer::Lost(how), _))) => break (LOST, [u64::MAX; 2], Some(how)),
                    Ok(Some(_)) => {}
                    // The monitor is gone, and the container with it.
                    Ok(None) | Err(_) => break (LOST, [u64::MAX; 2], Some(MONITOR_GONE.to_owned())),
                },
                number = signals.next() => {
                    // If the monitor is gone, its hang-up is next.
                    let _ = control.send(&about(number, terminal.as_ref()), &[]).await;
                }
            }
        };
        for (stream, bytes) in progress.into_iter().zip(ends) {
            if let Some(mut stream) = stream {
                stream.reached(bytes).await;
            }
        }
        let _ = tokio::time::timeout(LAST_BYTES, async {
            for mut stream in preserved {
                stream.reached(u64::MAX).await;
            }
        })
        .await;
        if let Some(terminal) = terminal.filter(|_| controls_terminal) {
            terminal::release(terminal.as_fd());
        }
        (status, lost)
    }
}

fn about(number: i32, terminal: Option<&OwnedFd>) -> Request {
    match terminal.and_then(|terminal| terminal::size(terminal.as_fd())) {
        Some((rows, columns)) if number == WINDOW_CHANGE => Request::Resize { rows, columns },
        _ => Request::Signal {
            signal: number,
            all: false,
        },
    }
}

/// Puts the slave of a new pair in place of the streams if there is a console socket.
fn with_terminal(order: &Order, caller: Stdio) -> Result<(Stdio, Option<OwnedFd>), ExecError> {
    let twin = |fd: &OwnedFd| {
        fd.try_clone().map_err(|source| ExecError::Host {
            step: "share the terminal",
            source,
        })
    };
    if !order.terminal {
        return Ok((caller, None));
    }
    let Some(socket) = &order.console_socket else {
        let streams = [&caller.stdout, &caller.stdin, &caller.stderr];
        let terminal = streams.into_iter().find(|fd| rustix::termios::isatty(fd));
        let terminal = terminal.map(twin).transpose()?;
        return Ok((caller, terminal));
    };
    let slave = terminal::behind_console_socket(socket, order.size)?;
    let streams = Stdio {
        stdin: twin(&slave)?,
        stdout: twin(&slave)?,
        stderr: caller.stderr,
        preserved: caller.preserved,
    };
    Ok((streams, Some(slave)))
}

/// The whole life of the process behind `exec --detach`.
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
        let (report, followed) = match begin(&order, fds) {
            Ok((session, signals)) => (
                Report::Ready {
                    pid: std::process::id(),
                },
                Some(session.follow(signals)),
            ),
            Err(error) => (Report::Failed(crate::error::message(&error)), None),
        };
        // A caller that was killed has left its process running.
        let _ = packet::send(socket.as_fd(), &report, &[]);
        drop(socket);
        match followed {
            Some(followed) => ExitCode::from(followed.await.0),
            None => ExitCode::FAILURE,
        }
    })
}

fn begin(order: &Order, fds: Vec<OwnedFd>) -> Result<(Session, Signals), ExecError> {
    let host = |step| move |source| ExecError::Host { step, source };
    rustix::process::setsid().map_err(|errno| host("leave the caller's session")(errno.into()))?;
    let mut fds = fds.into_iter();
    let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(ControlError::Unexpected.into());
    };
    let process = read_attached(fds.next().into_iter().collect())?;
    let signals = Signals::catch().map_err(host("catch signals"))?;
    let session = Session::start(
        order,
        &process,
        Stdio {
            stdin,
            stdout,
            stderr,
            preserved: fds.collect(),
        },
    )?;
    Ok((session, signals))
}
