//! What reaches the owner of a sandbox: requests of its handles, and what its own tasks bring back.

use std::{net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use caisson_agent_api::{Network, Volume};
use caisson_vmm_spec::MiB;
use tokio::sync::oneshot;

use super::{CreateRequest, Event, ExecRequest, Exit, Reply, SandboxError, Started, Status, Step};
use crate::{
    agent::AgentError,
    network::Plug,
    process_table::Table,
    sizing::{Needs, VmSize},
    stats::Stats,
};

/// Held by a task for as long as it needs the guest to run.
pub(super) type Busy = Arc<()>;

/// What the owner is told.
#[derive(Debug)]
pub(super) enum Message {
    Create {
        id: String,
        request: Box<CreateRequest>,
        reply: Reply<Started>,
    },
    Start {
        id: String,
        reply: Reply<()>,
    },
    Exec {
        id: String,
        request: ExecRequest,
        reply: Reply<Started>,
    },
    Wait {
        id: String,
        process_id: String,
        reply: Reply<Exit>,
    },
    Signal {
        id: String,
        process_id: String,
        signal: i32,
        all: bool,
        reply: Reply<()>,
    },
    Resize {
        id: String,
        process_id: String,
        size: (u16, u16),
        reply: Reply<()>,
    },
    Freeze {
        id: String,
        event: Event,
        reply: Reply<()>,
    },
    Memory {
        extra: MiB,
        /// Told when the guest has as much.
        followed: oneshot::Sender<()>,
        reply: Reply<()>,
    },
    Vcpus {
        count: u8,
        reply: Reply<()>,
    },
    FitGuest {
        memory_device: Option<u32>,
        cpus: u8,
        reply: Reply<()>,
    },
    /// Of a sandbox that another process holds.
    Fit {
        step: Step,
        needs: Needs,
        reply: Reply<VmSize>,
    },
    Plug {
        plug: Plug,
        reply: Reply<()>,
    },
    Unplug {
        slot: u8,
        reply: Reply<()>,
    },
    UpdateNetwork {
        id: String,
        network: Network,
        reply: Reply<()>,
    },
    UpdateVolume {
        id: String,
        volume: Volume,
        reply: Reply<()>,
    },
    Processes {
        id: String,
        reply: Reply<Vec<u32>>,
    },
    Table {
        id: String,
        reply: Reply<Table>,
    },
    Stats {
        id: String,
        reply: Reply<Stats>,
    },
    OutOfMemory {
        id: String,
        seen: u64,
        reply: Reply<u64>,
    },
    Ready {
        id: String,
        reply: Reply<()>,
    },
    Dial {
        id: String,
        address: SocketAddr,
        reply: Reply<u32>,
    },
    Connect {
        port: u32,
        socket: OwnedFd,
        reply: Reply<()>,
    },
    Update {
        id: String,
        resources: Vec<u8>,
        reply: Reply<()>,
    },
    Status {
        id: String,
        reply: Reply<Status>,
    },
    Delete {
        id: String,
        reply: Reply<()>,
    },
    Stop,
    /// With what kept the guest running meanwhile, if it had to run.
    Done(Done, Option<Busy>),
}

/// What a task that called the agent brings back.
#[derive(Debug)]
pub(super) enum Done {
    Created {
        id: String,
        result: Result<Started, SandboxError>,
        reply: Reply<Started>,
    },
    Changed {
        id: String,
        event: Event,
        result: Result<(), AgentError>,
        reply: Reply<()>,
    },
    Execed {
        id: String,
        process_id: String,
        result: Result<Started, SandboxError>,
        reply: Reply<Started>,
    },
    Ended {
        id: String,
        process_id: String,
        result: Result<Exit, AgentError>,
    },
    Deleted {
        id: String,
        result: Result<(), AgentError>,
        reply: Reply<()>,
    },
    /// The asker has its answer.
    Answered,
    /// Init has been told to die, and has had the time for it.
    Doomed {
        id: String,
    },
    /// The guest does not answer to `SIGKILL`.
    Unkillable,
    AgentGone,
}
