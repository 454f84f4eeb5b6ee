//! A sandbox: one virtual machine and the containers in it, held by one task.
//!
//! ```text
//!  Booting::start --VMM runs--> Booting --agent dials--> Ready --spawn--> Sandbox (a handle) + Owner (the task)
//! ```
//!
//! Contract: [`Sandbox`] is the only way to a sandbox's containers, for every door (command line, shim). Its calls may
//! run concurrently and be cancelled; each ends when the guest answers, when its deadline passes, or when the virtual
//! machine ends, and then says why it did. The virtual machine ends with the last handle.
//! Not here: what a bundle says, the shared directory's contents, state on disk, who the caller is.

mod boot;
mod container;
mod disks;
mod growth;
mod inquiry;
mod message;
mod owner;
mod ports;
pub mod remote;
mod status;

use std::{net::SocketAddr, os::fd::OwnedFd, sync::Arc, time::Duration};

use caisson_agent_api::{Network, Volume};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    time::timeout,
};

pub use self::{
    boot::{BootError, Booting, Ready},
    growth::Step,
    status::{Event, Refused, after},
};
pub use crate::agent::{Activation, Exit};
use crate::{
    agent::AgentError,
    control::ControlError,
    disks::{Disk, Number},
    huge_pages::HugePages,
    network::Plug,
    process_table::{Table, TableError},
    sizing::{Needs, VmSize},
    state::Status,
    stats::{Stats, StatsError},
    supervision::Handover,
    vmm::{Ended, VmmError},
};
use growth::Growth;
use message::Message;

/// The process id of a container's init.
pub const INIT: &str = "";

/// The exit status of everything in a sandbox whose virtual machine ended first.
pub const LOST: u8 = 137;

/// How long a container may take to die of `SIGKILL`.
pub const AFTER_KILL: Duration = Duration::from_secs(10);

/// The signal that cannot be caught.
pub const KILL: i32 = rustix::process::Signal::KILL.as_raw();

/// Why a sandbox did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The agent refused or failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Not in this state.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// No such container or process here.
    #[error("no such {0}")]
    NotFound(&'static str),
    /// The name is taken.
    #[error("this {0} exists already")]
    Exists(&'static str),
    /// The virtual machine is over.
    #[error("the virtual machine has ended: {0}")]
    Ended(Ended),
    /// The VMM cannot be spoken to.
    #[error("the virtual machine does not answer")]
    Vmm(#[from] VmmError),
    /// The virtual machine cannot get larger: the host's words.
    #[error("grow the virtual machine: {0}")]
    Growth(String),
    /// It is offered memory and does not take it.
    #[error("grow the virtual machine: the guest did not take {0} MiB of memory")]
    NotTaken(u32),
    /// More huge pages than fit into it.
    #[error(
        "reserve huge pages: the virtual machine would need {needed} MiB of memory and may have {most} (max_memory_mib)"
    )]
    HugePages {
        /// With all pages, in MiB.
        needed: u32,
        /// At most, in MiB.
        most: u32,
    },
    /// The VMM cannot use a network interface: its words.
    #[error("plug a network interface in: {0}")]
    Plug(String),
    /// Nowhere to put a disk.
    #[error("block device {0}: the virtual machine has no device left (spare_interfaces)")]
    NoSlot(Number),
    /// Another container of the sandbox has the disk, and may only read it.
    #[error(
        "block device {0} is read-only in this virtual machine, for another container, and cannot be written"
    )]
    ReadOnly(Number),
    /// The VMM cannot use a disk: its words.
    #[error("block device {number}: {message}")]
    Disk {
        /// The host's device.
        number: Number,
        /// One line.
        message: String,
    },
    /// The agent answered, but did not connect a stream first.
    #[error("the guest did not connect the standard streams")]
    Streams,
    /// The guest's numbers are none.
    #[error(transparent)]
    Stats(#[from] StatsError),
    /// The guest's list of processes is none.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The host refused something.
    #[error("open ports for the standard streams")]
    Ports(#[source] std::io::Error),
    /// Another process holds the sandbox, and could not do it: its words.
    #[error("{0}")]
    Told(String),
    /// Another process holds the sandbox, and this is not done for others.
    #[error("a container in another container's virtual machine cannot {0}")]
    NotHere(&'static str),
    /// Another process holds the sandbox, and cannot be asked.
    #[error("ask the holder of the sandbox")]
    Holder(#[source] ControlError),
}

/// Which streams a process wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// Standard output; with a terminal, the terminal.
    pub stdout: bool,
    /// Standard error; not with a terminal.
    pub stderr: bool,
    /// Of a container's init: questions about names that the host answers ([`crate::network::resolver`]).
    pub resolver: bool,
    /// How many descriptors from 3 upwards.
    pub preserved: u32,
}

impl Wanted {
    /// All three streams, or the two directions of a terminal.
    pub const fn all(terminal: bool, preserved: u32) -> Self {
        Self {
            stdin: true,
            stdout: true,
            stderr: !terminal,
            resolver: false,
            preserved,
        }
    }
}

/// The host's ends of a process's streams: connected, blocking stream sockets.
#[derive(Debug, Default)]
pub struct Streams {
    /// Written by the host; shut down for end of file.
    pub stdin: Option<OwnedFd>,
    /// Read by the host.
    pub stdout: Option<OwnedFd>,
    /// Read by the host.
    pub stderr: Option<OwnedFd>,
    /// Both directions.
    pub resolver: Option<OwnedFd>,
    /// Descriptors from 3 upwards, both directions.
    pub preserved: Vec<OwnedFd>,
}

/// A new process.
#[derive(Debug)]
pub struct Started {
    /// Its pid in the guest.
    pub pid: u32,
    /// Its streams.
    pub streams: Streams,
}

/// A container for a sandbox.
#[derive(Debug)]
pub struct CreateRequest {
    /// `config.json` as the guest applies it.
    pub spec: Vec<u8>,
    /// The bundle's path on the host, which hooks in the guest are told.
    pub bundle: String,
    /// The streams of its init.
    pub wanted: Wanted,
    /// Its network, beyond loopback.
    pub network: Network,
    /// The size of the memory that the sandbox's containers share, if it uses it. The first one decides.
    pub shared_memory_bytes: Option<u64>,
    /// What systemd gives it.
    pub activation: Activation,
    /// Where the stream for its init's seccomp listener goes, if that has one. It is there before the answer.
    pub seccomp: Option<Handover>,
    /// Those of its bind mounts that change as the kubelet's do.
    pub volumes: Vec<Volume>,
    /// Its huge pages.
    pub huge_pages: HugePages,
    /// Its init runs no program and is never started: it holds namespaces for the sandbox's other containers.
    pub holds: bool,
    /// Block devices of the host.
    pub disks: Vec<Disk>,
}

/// One more process for a container.
#[derive(Debug)]
pub struct ExecRequest {
    /// Unique in its container; not empty.
    pub process_id: String,
    /// The process object of `config.json`, complete.
    pub process: Vec<u8>,
    /// Its streams.
    pub wanted: Wanted,
    /// Even in a paused container.
    pub ignore_paused: bool,
    /// Where the stream for its seccomp listener goes, if it has one. It is there before the answer.
    pub seccomp: Option<Handover>,
}

type Reply<T> = oneshot::Sender<Result<T, SandboxError>>;

/// A handle to a running sandbox; clones are the same sandbox.
#[derive(Debug, Clone)]
pub struct Sandbox {
    inbox: mpsc::Sender<Message>,
    ended: watch::Receiver<Option<Ended>>,
    /// Held while the machine changes. None: another process holds the sandbox.
    growth: Option<Arc<Mutex<Growth>>>,
}

impl Sandbox {
    /// Has the virtual machine follow what a container may use; answers how large it is afterwards ([`Step::Look`]: would be
    /// on the way, at most).
    pub async fn fit(&self, id: &str, step: Step, needs: Needs) -> Result<VmSize, SandboxError> {
        if let Some(growth) = &self.growth {
            return growth.lock().await.fit(self, id, step, needs).await;
        }
        // The handle is one container's.
        self.ask(|reply| Message::Fit { step, needs, reply }).await
    }

    /// Makes room for a container that is to be created. Only huge pages must have it: a limit is no claim, and a machine
    /// that cannot get so large is shared by those who are in it.
    pub async fn admit(&self, id: &str, needs: Needs) -> Result<(), SandboxError> {
        for step in [Step::Grow, Step::Settle] {
            let fitted = self.fit(id, step, needs).await;
            if needs.huge_bytes > 0 {
                fitted?;
            }
        }
        Ok(())
    }

    /// Sets a container up as far as its parked init.
    pub async fn create(&self, id: &str, request: CreateRequest) -> Result<Started, SandboxError> {
        let name = id.to_owned();
        let ask = |reply| Message::Create {
            id: name,
            request: Box::new(request),
            reply,
        };
        let created = self.ask(ask).await;
        if let (Err(_), Some(growth)) = (&created, &self.growth) {
            growth.lock().await.forget(id);
        }
        created
    }

    /// Lets a container's init go on; answers after its `execve`.
    pub async fn start(&self, id: &str) -> Result<(), SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Start { id, reply }).await
    }

    /// Starts one more process; answers after its `execve`.
    pub async fn exec(&self, id: &str, request: ExecRequest) -> Result<Started, SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Exec { id, request, reply }).await
    }

    /// Waits until a process has ended. An exec'd process is forgotten once that has been told.
    pub async fn wait(&self, id: &str, process_id: &str) -> Result<Exit, SandboxError> {
        let (id, process_id) = (id.to_owned(), process_id.to_owned());
        self.ask(|reply| Message::Wait {
            id,
            process_id,
            reply,
        })
        .await
    }

    /// Sends a signal to a process or to all processes of its container. `SIGKILL` always works: if the guest does not
    /// answer, its virtual machine is ended.
    pub async fn signal(
        &self,
        id: &str,
        process_id: &str,
        signal: i32,
        all: bool,
    ) -> Result<(), SandboxError> {
        let (id, process_id) = (id.to_owned(), process_id.to_owned());
        self.ask(|reply| Message::Signal {
            id,
            process_id,
            signal,
            all,
            reply,
        })
        .await
    }

    /// Tells a process's terminal its size, as (rows, columns).
    pub async fn resize(
        &self,
        id: &str,
        process_id: &str,
        size: (u16, u16),
    ) -> Result<(), SandboxError> {
        let (id, process_id) = (id.to_owned(), process_id.to_owned());
        self.ask(|reply| Message::Resize {
            id,
            process_id,
            size,
            reply,
        })
        .await
    }

    /// Freezes a container.
    pub async fn pause(&self, id: &str) -> Result<(), SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Freeze {
            id,
            event: Event::Pause,
            reply,
        })
        .await
    }

    /// Lets a frozen container go on.
    pub async fn resume(&self, id: &str) -> Result<(), SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Freeze {
            id,
            event: Event::Resume,
            reply,
        })
        .await
    }

    /// Plugs a tap into a free slot for network interfaces; answers when the guest may look for it.
    pub async fn plug(&self, plug: Plug) -> Result<(), SandboxError> {
        self.ask(|reply| Message::Plug { plug, reply }).await
    }

    /// Takes a network interface away from the guest.
    pub async fn unplug(&self, slot: u8) -> Result<(), SandboxError> {
        self.ask(|reply| Message::Unplug { slot, reply }).await
    }

    /// Has a container's network follow a change.
    pub async fn update_network(&self, id: &str, network: Network) -> Result<(), SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::UpdateNetwork { id, network, reply })
            .await
    }

    /// Has one of a container's volumes follow a change.
    pub async fn update_volume(&self, id: &str, volume: Volume) -> Result<(), SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::UpdateVolume { id, volume, reply })
            .await
    }

    /// The pids of a container's processes, in the guest.
    pub async fn processes(&self, id: &str) -> Result<Vec<u32>, SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Processes { id, reply }).await
    }

    /// A container's processes as the guest's /proc describes them.
    pub async fn table(&self, id: &str) -> Result<Table, SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Table { id, reply }).await
    }

    /// What a container uses, by the guest's count.
    pub async fn stats(&self, id: &str) -> Result<Stats, SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Stats { id, reply }).await
    }

    /// Waits until more than `seen` processes of a container were killed for want of memory; answers how many. An error
    /// once the container has ended.
    pub async fn out_of_memory(&self, id: &str, seen: u64) -> Result<u64, SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::OutOfMemory { id, seen, reply })
            .await
    }

    /// Waits until a container says that it is ready (sd_notify(3)). An error once it has ended.
    pub async fn ready(&self, id: &str) -> Result<(), SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Ready { id, reply }).await
    }

    /// Hands a connected stream socket in, to a vsock port on which the guest listens.
    pub async fn connect(&self, port: u32, socket: OwnedFd) -> Result<(), SandboxError> {
        self.ask(|reply| Message::Connect {
            port,
            socket,
            reply,
        })
        .await
    }

    /// Has the guest connect to an address of a container's loopback interface; answers the vsock port at which that
    /// connection waits for [`Sandbox::connect`].
    pub async fn dial(&self, id: &str, address: SocketAddr) -> Result<u32, SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Dial { id, address, reply }).await
    }

    /// Changes a container's limits in the guest: `resources` is a `linux.resources` object without what concerns the
    /// host. All or nothing.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Update {
            id,
            resources,
            reply,
        })
        .await
    }

    /// Where a container is in its life.
    pub async fn status(&self, id: &str) -> Result<Status, SandboxError> {
        let id = id.to_owned();
        self.ask(|reply| Message::Status { id, reply }).await
    }

    /// Removes a stopped container from the guest.
    pub async fn delete(&self, id: &str) -> Result<(), SandboxError> {
        let name = id.to_owned();
        self.ask(|reply| Message::Delete { id: name, reply })
            .await?;
        if let Some(growth) = &self.growth {
            growth.lock().await.forget(id);
        }
        Ok(())
    }

    /// Kills a container, wherever it is in its life, and removes it from the guest. Answers when it is gone, or when it
    /// has had its time to die.
    pub async fn destroy(&self, id: &str) {
        // Each step may find that there is nothing to do; then the next one finds out, too.
        if self.signal(id, INIT, KILL, true).await.is_ok() {
            let _ = timeout(AFTER_KILL, self.wait(id, INIT)).await;
        }
        let _ = self.delete(id).await;
    }

    /// Ends the virtual machine and answers when its process is gone.
    pub async fn stop(&self) -> Ended {
        // If the owner has ended already there is nobody to tell.
        let _ = self.inbox.send(Message::Stop).await;
        self.ended().await
    }

    /// Waits until the virtual machine has ended, for whatever reason.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended
            .wait_for(Option::is_some)
            .await
            .map(|ended| ended.clone())
        {
            Ok(Some(ended)) => ended,
            // The owner always says why before it ends; without it the runtime is being torn down.
            Ok(None) | Err(_) => Ended {
                cause: caisson_vmm_spec::Cause::HostError,
                message: "the owner of the sandbox is gone".to_owned(),
                console: Vec::new(),
            },
        }
    }

    /// One question to the owner. No answer means that the virtual machine ended.
    async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, SandboxError> {
        let (reply, answer) = oneshot::channel();
        if self.inbox.send(message(reply)).await.is_ok()
            && let Ok(answer) = answer.await
        {
            return answer;
        }
        Err(SandboxError::Ended(self.ended().await))
    }
}
