//! One process of a container: making it, its streams, its end.
//!
//! Contract: [`spawn`] returns a process that is parked (a container's init) or running (any other); whatever it fails
//! at, no process and no descriptor is left. The end of a process is told once, with what it had written by then, to any
//! number of waiters.

use crate::cgroup::Cgroup;
use crate::child::{self, FromChild, MAX_MESSAGE_BYTES};
use crate::network::{self, NetworkError, Resident};
use crate::plan::ChildPlan;
use crate::reaper::Reaper;
use crate::stdio::{ChildEnds, OurEnds, Streams};
use crate::supervision::Line;
use caisson_agent_api::Network;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd, write};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal,
};
use rustix::termios::{Winsize, tcsetwinsize};
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

/// A step of making a process that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    /// The child could not be made.
    #[error("{step}")]
    Spawn {
        step: &'static str,
        source: io::Error,
    },
    /// A step in the child failed.
    #[error("{0}")]
    Child(String),
    /// The network could not be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The child ended without a word: killed, most likely for want of memory.
    #[error("the process ended before it was ready{}", .0.map_or(String::new(), |c| format!(" (exit status {c})")))]
    Died(Option<u32>),
    /// It has ended.
    #[error("process already finished")]
    Finished,
    /// It has no terminal.
    #[error("the process has no terminal")]
    NoTerminal,
    /// The kernel did not take the signal.
    #[error("signal {signal}")]
    Signal { signal: i32, source: io::Error },
    /// The terminal did not take the size.
    #[error("resize the terminal")]
    Resize(#[source] io::Error),
    /// No such signal.
    #[error("{0} is no signal")]
    NoSignal(i32),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) code: u32,
    pub(crate) oom_killed: bool,
    pub(crate) stdout_bytes: u64,
    pub(crate) stderr_bytes: u64,
}

/// A process of a container.
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Names this process and no later one with the same number.
    pidfd: OwnedFd,
    end: watch::Receiver<Option<End>>,
    terminal: Terminal,
}

/// The terminal's master side, as long as the process runs. No await while it is locked.
type Terminal = Arc<Mutex<Option<Arc<AsyncFd<OwnedFd>>>>>;

/// The agent's end of the child's control socket.
pub(crate) struct ControlSocket(AsyncFd<OwnedFd>);

/// What a child said, or that it closed the socket.
enum Heard {
    Message(FromChild, Option<OwnedFd>),
    Closed,
}

impl ControlSocket {
    async fn hear(&self) -> io::Result<Heard> {
        let mut text = vec![0; MAX_MESSAGE_BYTES];
        let (n, fd) = self
            .0
            .async_io(Interest::READABLE, |socket| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let flags = RecvFlags::CMSG_CLOEXEC;
                let got = recvmsg(
                    socket,
                    &mut [IoSliceMut::new(&mut text)],
                    &mut ancillary,
                    flags,
                )?;
                let fd = ancillary.drain().find_map(|m| match m {
                    RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                    _ => None,
                });
                Ok((got.bytes, fd))
            })
            .await?;
        if n == 0 {
            return Ok(Heard::Closed);
        }
        Ok(Heard::Message(serde_json::from_slice(&text[..n])?, fd))
    }

    /// Lets a parked init go on; returns when its program has been executed.
    pub(crate) async fn release(self, process: &Process) -> Result<(), ProcessError> {
        let failed = |step| move |source| ProcessError::Spawn { step, source };
        match write(self.0.get_ref(), &[1]) {
            Ok(_) => {}
            Err(Errno::PIPE) => {
                return Err(ProcessError::Died(process.ended().await.map(|e| e.code)));
            }
            Err(e) => return Err(failed("release the process")(e.into())),
        }
        match self.hear().await {
            Ok(Heard::Closed) => Ok(()),
            Ok(Heard::Message(FromChild::Failed(text), _)) => Err(ProcessError::Child(text)),
            Ok(Heard::Message(..)) => Err(ProcessError::Child("unexpected message".to_owned())),
            // The socket was reset: the process died with our byte unread.
            Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => {
                Err(ProcessError::Died(process.ended().await.map(|e| e.code)))
            }
            Err(e) => Err(failed("listen to the child")(e)),
        }
    }
}

impl Process {
    /// Waits for the end.
    pub(crate) async fn ended(&self) -> Option<End> {
        let mut end = self.end.clone();
        // The sender goes only after it has told.
        end.wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|end| *end)
    }

    /// The end, if it has come.
    pub(crate) fn end(&self) -> Option<End> {
        *self.end.borrow()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), ProcessError> {
        if self.end().is_some() {
            return Err(ProcessError::Finished);
        }
        let number = signal_number(signal)?;
        match pidfd_send_signal(&self.pidfd, number) {
            Err(Errno::SRCH) => Err(ProcessError::Finished),
            other => other.map_err(|e| ProcessError::Signal {
                signal,
                source: e.into(),
            }),
        }
    }

    /// Tells the terminal its new size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<(), ProcessError> {
        let terminal = self
            .terminal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let terminal = terminal.ok_or(ProcessError::NoTerminal)?;
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(terminal.get_ref(), size).map_err(|e| ProcessError::Resize(e.into()))
    }

    /// The process as one that is in the container's network namespace.
    pub(crate) fn resident(&self) -> Resident<'_> {
        Resident {
            pid: self.pid,
            pidfd: self.pidfd(),
        }
    }

    /// The pidfd, to join the namespaces of.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// A signal by its number, real-time ones included.
pub(crate) fn signal_number(number: i32) -> Result<Signal, ProcessError> {
    Signal::from_named_raw(number)
        .or_else(|| {
            (32..=64)
                .contains(&number)
                .then(|| crate::sys::real_time_signal(number))
        })
        .ok_or(ProcessError::NoSignal(number))
}

/// Everything that [`spawn`] needs besides the plan.
pub(crate) struct Surroundings<'a> {
    pub(crate) reaper: &'a Reaper,
    pub(crate) cgroup: Arc<Cgroup>,
    /// The process whose namespaces the new one joins; `None` if it is a container's first.
    pub(crate) init: Option<BorrowedFd<'a>>,
    /// For a process that waits for it (`ChildPlan::awaits_network`).
    pub(crate) network: &'a Network,
    /// For a process whose seccomp filter has a listener.
    pub(crate) line: Option<Line>,
}

/// Makes a process. The control socket comes back if it is parked.
pub(crate) async fn spawn(
    plan: &ChildPlan,
    mut around: Surroundings<'_>,
    child_ends: ChildEnds,
    our_ends: OurEnds,
) -> Result<(Process, Option<ControlSocket>), ProcessError> {
    let failed = |step| move |source| ProcessError::Spawn { step, source };
    let birth = around.reaper.birth();
    let control = execute(plan, around.init, child_ends).map_err(failed("execute the child"))?;
    let mut newborn = Newborn {
        pid: None,
        end: None,
        terminal: None,
    };
    let mut awaits_network = false;
    let mut listener = None;
    let ready = loop {
        match control
            .hear()
            .await
            .map_err(failed("listen to the child"))?
        {
            Heard::Message(FromChild::Pid(pid), _) => {
                newborn.pid = Some(pid);
                newborn.end = Some(birth.claim(pid));
            }
            Heard::Message(FromChild::Terminal, fd) => newborn.terminal = fd,
            Heard::Message(FromChild::Network, _) => awaits_network = true,
            Heard::Message(FromChild::Listener(number), _) => listener = Some(number),
            Heard::Message(FromChild::Ready, _) => break true,
            Heard::Message(FromChild::Failed(text), _) => {
                newborn.gone().await;
                return Err(ProcessError::Child(text));
            }
            // The socket closes at execve, and at death.
            Heard::Closed if around.init.is_some() && newborn.pid.is_some() => break false,
            Heard::Closed => return Err(ProcessError::Died(newborn.gone().await)),
        }
        // Its number comes from the first process, and may come after this wish of the second.
        if let (true, Some(pid)) = (awaits_network, newborn.pid) {
            awaits_network = false;
            if let Err(error) = connect(pid, around.network) {
                // It waits on its socket, and ends with that.
                drop(control);
                newborn.gone().await;
                return Err(error);
            }
            write(control.0.get_ref(), &[1])
                .map_err(|e| failed("go on with the network")(e.into()))?;
        }
        if let (Some(number), Some(pid)) = (listener, newborn.pid) {
            listener = None;
            if let Err(source) = supervise(pid, number, around.line.take()).await {
                drop(control);
                newborn.gone().await;
                return Err(failed("hand over the seccomp listener")(source));
            }
            write(control.0.get_ref(), &[1])
                .map_err(|e| failed("go on under the seccomp filter")(e.into()))?;
        }
    };
    let process = newborn
        .grow_up(around.cgroup, our_ends, plan.container.is_some())
        .await?;
    Ok((process, ready.then_some(control)))
}

/// Gives a process that has just been born the network it waits for.
fn connect(pid: i32, network: &Network) -> Result<(), ProcessError> {
    let number = Pid::from_raw(pid).ok_or(ProcessError::Died(None))?;
    let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|_| ProcessError::Died(None))?;
    let resident = Resident {
        pid,
        pidfd: pidfd.as_fd(),
    };
    Ok(network::apply(network, resident)?)
}

/// Takes the listener of the seccomp filter that a process has just loaded, and has it attended to by the host.
async fn supervise(pid: i32, number: i32, line: Option<Line>) -> io::Result<()> {
    let none = || io::Error::other("the host does not listen");
    let process = Pid::from_raw(pid).ok_or_else(none)?;
    let pidfd = pidfd_open(process, PidfdFlags::empty())?;
    let listener = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())?;
    let attached = match line {
        Some(line) => line.attach(listener).await,
        None => Err(none()),
    };
    attached.inspect_err(|_| {
        // Its own end might take a system call that waits.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    })
}

/// A process between its first word and its place among the container's processes.
struct Newborn {
    pid: Option<i32>,
    end: Option<oneshot::Receiver<u32>>,
    terminal: Option<OwnedFd>,
}

impl Newborn {
    /// Waits for the end of a process that is ending.
    async fn gone(self) -> Option<u32> {
        self.end?.await.ok()
    }

    async fn grow_up(
        self,
        cgroup: Arc<Cgroup>,
        our_ends: OurEnds,
        is_init: bool,
    ) -> Result<Process, ProcessError> {
        let failed = |step| move |source| ProcessError::Spawn { step, source };
        let (Some(pid), Some(end)) = (self.pid, self.end) else {
            return Err(ProcessError::Died(None));
        };
        let number = Pid::from_raw(pid).ok_or(ProcessError::Died(None))?;
        let pidfd = match pidfd_open(number, PidfdFlags::empty()) {
            // An exec that has ended and been reaped already: its end is known, its name is not needed.
            Err(Errno::SRCH) => pidfd_open(rustix::process::getpid(), PidfdFlags::empty()),
            other => other,
        };
        let pidfd = pidfd.map_err(|e| failed("open the process")(e.into()))?;
        let streams = match our_ends.join(self.terminal).await {
            Ok(streams) => streams,
            Err(source) => {
                // The host is not there to take its output: the process must not run on unseen.
                let _ = rustix::process::kill_process(number, Signal::KILL);
                let _ = end.await;
                return Err(failed("connect the standard streams")(source));
            }
        };
        let terminal: Terminal = Arc::new(Mutex::new(streams.terminal.clone()));
        let (sender, receiver) = watch::channel(None);
        let attended = Attended {
            streams,
            cgroup,
            is_init,
            terminal: Arc::clone(&terminal),
        };
        tokio::spawn(attended.until(end, sender));
        Ok(Process {
            pid,
            pidfd,
            end: receiver,
            terminal,
        })
    }
}

/// What is to be settled when a process ends.
struct Attended {
    streams: Streams,
    cgroup: Arc<Cgroup>,
    is_init: bool,
    terminal: Terminal,
}

impl Attended {
    /// Waits for the end and tells it.
    async fn until(mut self, end: oneshot::Receiver<u32>, told: watch::Sender<Option<End>>) {
        let Ok(code) = end.await else { return };
        if self.is_init
            && let Err(e) = self.cgroup.kill()
        {
            // With a PID namespace of its own the kernel has killed the others; without one this does (as in runc).
            crate::kmsg::error(&crate::error_line(&e));
        }
        self.streams.settle().await;
        let (stdout_bytes, stderr_bytes) = self.streams.written();
        let oom_killed = self.cgroup.had_oom_kill();
        // The terminal lives on only as long as output is passed on.
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = None;
        told.send_replace(Some(End {
            code,
            oom_killed,
            stdout_bytes,
            stderr_bytes,
        }));
    }
}

/// Executes this binary as a child with its descriptors.
fn execute(
    plan: &ChildPlan,
    init: Option<BorrowedFd<'_>>,
    ends: ChildEnds,
) -> io::Result<ControlSocket> {
    let mut file = std::fs::File::from(memfd_create("plan", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(plan)?)?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let init = init.map(|fd| fd.try_clone_to_owned()).transpose()?;
    let mut args = Vec::new();
    let inherited = [
        Some(file.as_fd()),
        Some(theirs.as_fd()),
        init.as_ref().map(AsFd::as_fd),
    ];
    let preserved = ends.preserved.iter().map(|fd| Some(fd.as_fd()));
    for fd in inherited.into_iter().chain(preserved) {
        match fd {
            None => args.push("-".to_owned()),
            Some(fd) => {
                // This process has one thread and executes nothing else before these descriptors are closed.
                fcntl_setfd(fd, FdFlags::empty())?;
                args.push(fd.as_raw_fd().to_string());
            }
        }
    }
    let [stdin, stdout, stderr] = ends
        .streams
        .map(|fd| fd.map_or_else(Stdio::null, Stdio::from));
    // The reaper collects it: it is no different from any other child of PID 1.
    Command::new("/proc/self/exe")
        .arg(child::COMMAND)
        .args(args)
        .env_clear()
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()?;
    drop(theirs);
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok(ControlSocket(crate::sys::watch(ours, Interest::READABLE)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_number() {
        assert_eq!(signal_number(15).unwrap(), Signal::TERM);
        assert_eq!(signal_number(34).unwrap().as_raw(), 34);
        for number in [0, -1, 65] {
            assert!(signal_number(number).is_err(), "{number}");
        }
    }
}
