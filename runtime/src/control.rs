//! The conversation between the command line and a sandbox's monitor, over a socket in the container's state directory.
//!
//! Contract: one connection per command. Most commands are one [`Request`] and one [`Answer`]. `exec` goes on:
//! [`Answer::Started`] brings the streams' descriptors, so that the monitor is not in the way of the bytes; then
//! [`Request::Signal`] and [`Request::Resize`] on that connection concern the new process and are not answered, and
//! [`Answer::Exited`] comes at its end. The state directory is its owner's alone: who can connect may do everything.
//! Not here: what the requests do (`monitor/serve.rs`).

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    packet::{self, PacketError, Packets},
    sandbox::remote::{Question, Reply},
    sizing::Bounds,
    stats::Stats,
    vmm::Ended,
    watched::watch,
};

/// Name of the socket in the state directory.
pub(crate) const SOCKET: &str = "control.sock";

/// The largest `process` object, in bytes; what the agent's protocol can carry.
const MAX_PROCESS_BYTES: u64 = 3 << 20;

/// What a command asks of the monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Let init go on.
    Start,
    /// Start one more process; its `process` object is the attached file.
    Exec {
        /// It has a terminal.
        terminal: bool,
        /// How many descriptors from 3 upwards.
        preserved: u32,
        /// Even in a paused container.
        ignore_paused: bool,
    },
    /// Send a signal to init; on a connection of `exec`, to its process.
    Signal {
        /// Its number.
        signal: i32,
        /// To every process of the container.
        all: bool,
    },
    /// The size of the terminal of an `exec`.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Tell the host's pids that stand for the container: the monitor's, and those of running `exec`s.
    Processes,
    /// Describe the container's processes in the guest.
    Table,
    /// Tell what the container uses.
    Stats,
    /// Tell of every container that lives here ([`crate::census`]).
    Census {
        /// And what they use.
        count: bool,
    },
    /// Say that the connection watches for kills for want of memory; then tell each of them, to the container's end.
    Watch,
    /// Answer when the container says that it is ready (sd_notify(3)).
    Ready,
    /// Change limits.
    Update {
        /// A `linux.resources` object as JSON.
        resources: String,
    },
    /// Say who holds the sandbox, and what the container's namespaces are called there.
    Premises,
    /// Take one more container into the sandbox that this monitor holds. The connection stands for the container;
    /// attached is a file that is held open until nothing of it is left.
    Join {
        /// Its name.
        id: String,
    },
    /// On a connection of `Join`: the container is over; answered when nothing of it is left.
    Leave,
    /// A question about a container that has joined.
    Member {
        /// Its name.
        id: String,
        /// The question.
        question: Question,
    },
}

/// What the monitor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// The process runs; attached are stdin, stdout, stderr (without a terminal) and the preserved descriptors.
    Started {
        /// Its pid in the guest.
        pid: u32,
    },
    /// The process has ended.
    Exited {
        /// Exit status.
        status: u8,
        /// Bytes of standard output that are its own.
        stdout_bytes: u64,
        /// Bytes of standard error that are its own.
        stderr_bytes: u64,
    },
    /// The virtual machine is lost, and the process with it: why.
    Lost(String),
    /// The pids.
    Processes(Vec<u32>),
    /// The [`crate::process_table::Table`], as JSON in the attached file.
    Table,
    /// A [`crate::census::Household`], as JSON in the attached file.
    Census,
    /// The numbers.
    Stats {
        /// By the guest's count.
        guest: Box<Stats>,
        /// Of the whole sandbox, by the host's; `None`: the host has no cgroup for it.
        host: Option<Box<Stats>>,
    },
    /// The kernel has killed a process of the container for want of memory.
    OutOfMemory,
    /// Of the container.
    Premises {
        /// The state directory of the monitor that holds the sandbox.
        holder: PathBuf,
        /// The pid of the container's init in the guest.
        guest_pid: u32,
    },
    /// The container may come in; attached is the sandbox's mount namespace.
    Joined {
        /// The shared directory, in that namespace.
        share: PathBuf,
        /// How large the virtual machine is, and may become.
        bounds: Bounds,
    },
    /// To a container that has joined: the virtual machine is over.
    SandboxEnded(Ended),
    /// To its question.
    Member(Reply),
    /// It is not done.
    Failed(String),
}

/// Why the monitor could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Its socket cannot be reached.
    #[error("reach the container's monitor at {path}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The conversation broke.
    #[error("speak with the container's monitor")]
    Packet(#[from] PacketError),
    /// It hung up.
    #[error("the container's monitor ended")]
    HungUp,
    /// Its answer does not belong to the question.
    #[error("the container's monitor gave an unexpected answer")]
    Unexpected,
    /// It refused or failed.
    #[error("{0}")]
    Failed(String),
    /// The process object cannot be handed over.
    #[error("hand over the process")]
    Process(#[source] io::Error),
}

/// The command line's end: blocking.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Control {
    /// Connects to the monitor of the container whose state directory is `dir`.
    pub fn connect(dir: &Path) -> Result<Self, ControlError> {
        let connected = socket(dir, SocketFlags::CLOEXEC).and_then(|(socket, address, _dir)| {
            rustix::net::connect(&socket, &address)?;
            Ok(socket)
        });
        connected.map(Self).map_err(|source| ControlError::Connect {
            path: dir.join(SOCKET),
            source,
        })
    }

    /// Gives up on an answer after this long.
    pub fn set_patience(&self, patience: Duration) -> Result<(), ControlError> {
        rustix::net::sockopt::set_socket_timeout(
            &self.0,
            rustix::net::sockopt::Timeout::Recv,
            Some(patience),
        )
        .map_err(|errno| {
            PacketError::Socket {
                step: "receive",
                source: errno.into(),
            }
            .into()
        })
    }

    /// Asks and waits for the answer with its descriptors; a refusal is an error.
    pub fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), ControlError> {
        packet::send(self.0.as_fd(), request, fds)?;
        match packet::receive(self.0.as_fd())? {
            Some((Answer::Failed(message), _)) => Err(ControlError::Failed(message)),
            Some(answer) => Ok(answer),
            None => Err(ControlError::HungUp),
        }
    }

    /// Asks for something that is simply done.
    pub fn order(&self, request: &Request) -> Result<(), ControlError> {
        match self.ask(request, &[])? {
            (Answer::Done, _) => Ok(()),
            _ => Err(ControlError::Unexpected),
        }
    }

    /// Asks to be let into the monitor's sandbox. The first of the answers is the tie, the last is the sandbox's mount
    /// namespace. `lock` is open there until nothing of the container is left.
    pub fn join(
        self,
        id: &str,
        lock: BorrowedFd<'_>,
    ) -> Result<(OwnedFd, PathBuf, Bounds, OwnedFd), ControlError> {
        let id = id.to_owned();
        match self.ask(&Request::Join { id }, &[lock])? {
            (Answer::Joined { share, bounds }, fds) => {
                let namespace = fds.into_iter().next();
                Ok((
                    self.0,
                    share,
                    bounds,
                    namespace.ok_or(ControlError::Unexpected)?,
                ))
            }
            _ => Err(ControlError::Unexpected),
        }
    }

    /// Begins to watch; [`Watch::next`] then tells what happens.
    pub fn watch(self) -> Result<Watch, ControlError> {
        self.order(&Request::Watch)?;
        Ok(Watch(self.0))
    }

    /// Asks for a process; the connection then belongs to it.
    pub fn exec(
        self,
        request: &Request,
        process: &[u8],
    ) -> Result<(OwnedFd, u32, Vec<OwnedFd>), ControlError> {
        let file = attached(process).map_err(ControlError::Process)?;
        match self.ask(request, &[file.as_fd()])? {
            (Answer::Started { pid }, fds) => Ok((self.0, pid, fds)),
            _ => Err(ControlError::Unexpected),
        }
    }
}

/// A connection that watches.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// Waits for a kill for want of memory: true. The container's end is false.
    pub fn next(&self) -> Result<bool, ControlError> {
        match packet::receive::<Answer>(self.0.as_fd())? {
            Some((Answer::OutOfMemory, _)) => Ok(true),
            Some(_) => Err(ControlError::Unexpected),
            None => Ok(false),
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A connection to the monitor whose state directory is `dir`, for one question of a monitor's; see [`Control`] for the
/// command line's. Must be called inside a runtime.
pub(crate) fn connect(dir: &Path) -> Result<Packets, ControlError> {
    let Control(socket) = Control::connect(dir)?;
    Packets::new(socket).map_err(|source| ControlError::Connect {
        path: dir.join(SOCKET),
        source,
    })
}

/// The monitor's end: where commands connect.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens in a state directory. Must be called inside a runtime.
    pub fn bind(dir: &Path) -> Result<Self, ControlError> {
        let listening = socket(dir, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).and_then(
            |(socket, address, _dir)| {
                rustix::net::bind(&socket, &address)?;
                rustix::net::listen(&socket, 64)?;
                watch(socket, Interest::READABLE)
            },
        );
        listening.map(Self).map_err(|source| ControlError::Connect {
            path: dir.join(SOCKET),
            source,
        })
    }

    /// The next command.
    pub async fn accept(&self) -> io::Result<Packets> {
        let accepted = self
            .0
            .async_io(Interest::READABLE, |socket| {
                Ok(rustix::net::accept_with(socket, SocketFlags::CLOEXEC)?)
            })
            .await?;
        Packets::new(accepted)
    }
}

/// Reads what came in the attached file, such as the `process` object of [`Request::Exec`].
pub fn read_attached(fds: Vec<OwnedFd>) -> Result<Vec<u8>, ControlError> {
    let file = fds.into_iter().next().ok_or(ControlError::Unexpected)?;
    let mut bytes = Vec::new();
    File::from(file)
        .take(MAX_PROCESS_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(ControlError::Process)?;
    if bytes.len() as u64 > MAX_PROCESS_BYTES {
        return Err(ControlError::Process(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}

/// A file to attach.
pub(crate) fn attached(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("attached", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

/// A socket and its address. The address goes through the open directory, because a socket's address has at most 107
/// bytes and a state directory's path may be longer.
fn socket(dir: &Path, flags: SocketFlags) -> io::Result<(OwnedFd, SocketAddrUnix, OwnedFd)> {
    let dir_flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, dir_flags, Mode::empty())?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok((socket, address, dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_without_a_monitor_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Control::connect(dir.path()).unwrap_err();
        assert!(error.to_string().ends_with("/control.sock"), "{error}");
    }

    #[tokio::test]
    async fn a_command_reaches_the_monitor_however_long_the_path_is() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let listener = Listener::bind(&deep).unwrap();
        let command = std::thread::spawn(move || {
            let control = Control::connect(&deep).unwrap();
            control.exec(
                &Request::Exec {
                    terminal: false,
                    preserved: 0,
                    ignore_paused: true,
                },
                b"{\"args\":[]}",
            )
        });
        let connection = listener.accept().await.unwrap();
        let (request, fds) = connection.receive::<Request>().await.unwrap().unwrap();
        assert!(matches!(
            request,
            Request::Exec {
                ignore_paused: true,
                ..
            }
        ));
        assert_eq!(read_attached(fds).unwrap(), b"{\"args\":[]}");
        let stream = tempfile::tempfile().unwrap();
        connection
            .send(&Answer::Started { pid: 7 }, &[stream.as_fd()])
            .await
            .unwrap();
        let (_, pid, fds) = command.join().unwrap().unwrap();
        assert_eq!((pid, fds.len()), (7, 1));
    }

    #[tokio::test]
    async fn a_refusal_is_an_error_in_the_monitors_words() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(dir.path()).unwrap();
        let path = dir.path().to_owned();
        let command =
            std::thread::spawn(move || Control::connect(&path).unwrap().order(&Request::Start));
        let connection = listener.accept().await.unwrap();
        connection.receive::<Request>().await.unwrap().unwrap();
        connection
            .send(&Answer::Failed("no".into()), &[])
            .await
            .unwrap();
        assert_eq!(command.join().unwrap().unwrap_err().to_string(), "no");
    }

    #[test]
    fn a_process_that_is_too_large_is_refused() {
        let limit = usize::try_from(MAX_PROCESS_BYTES).unwrap();
        let file = |length| vec![attached(&vec![b'x'; length]).unwrap().into()];
        assert_eq!(read_attached(file(limit)).unwrap().len(), limit);
        assert!(read_attached(file(limit + 1)).is_err());
        assert!(matches!(
            read_attached(Vec::new()),
            Err(ControlError::Unexpected)
        ));
    }
}
