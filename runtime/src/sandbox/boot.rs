//! From a started VMM to a sandbox that takes requests: phases that consume each other.
//!
//! The agent's connection on [`CONTROL_PORT`] is the ready event. Nothing is retried and nothing is polled; how long the
//! guest may take is the VMM's to watch, because only it knows when the guest began to run.

use std::{os::fd::OwnedFd, time::Duration};

use caisson_agent_api::CONTROL_PORT;
use caisson_vmm_spec::{BootTimes, Event};
use tokio::net::UnixStream;

use super::{Sandbox, owner};
use crate::{
    agent::Agent,
    sizing::Bounds,
    slots::Slots,
    trace::{Trace, Who},
    vmm::{Ended, Machine, Vmm, VmmError},
};

/// How long a VMM that has closed its socket may take to end.
pub(super) const LAST_BREATH: Duration = Duration::from_secs(2);

/// Why a sandbox did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The VMM could not be started or spoken to.
    #[error("start the virtual machine")]
    Vmm(#[from] VmmError),
    /// The virtual machine ended before its agent was ready.
    #[error("start the virtual machine: {0}")]
    Ended(Ended),
    /// The agent's connection cannot be used.
    #[error("take the agent's connection")]
    Connection(#[source] std::io::Error),
}

/// A guest that is on its way up.
#[derive(Debug)]
pub struct Booting {
    vmm: Vmm,
    slots: Slots,
}

/// A guest whose agent has dialled.
pub struct Ready {
    vmm: Vmm,
    agent: Agent,
    slots: Slots,
    times: BootTimes,
}

impl Booting {
    /// Starts the virtual machine. Must be called inside a runtime.
    pub fn start(machine: Machine<'_>) -> Result<Self, BootError> {
        Ok(Self {
            slots: machine.slots.clone(),
            vmm: Vmm::start(machine)?,
        })
    }

    /// Waits for the agent.
    pub async fn ready(self) -> Result<Ready, BootError> {
        loop {
            match self.vmm.event().await? {
                Some((
                    Event::Accepted {
                        port: CONTROL_PORT,
                        boot,
                    },
                    Some(stream),
                )) => {
                    let agent = connection(stream).map_err(BootError::Connection)?;
                    return Ok(Ready {
                        vmm: self.vmm,
                        agent,
                        slots: self.slots,
                        times: boot.unwrap_or_default(),
                    });
                }
                Some((
                    Event::Ended {
                        cause,
                        message,
                        console,
                    },
                    _,
                )) => {
                    self.vmm.end(LAST_BREATH).await;
                    return Err(BootError::Ended(Ended::reported(cause, &message, &console)));
                }
                // Connections to other ports are closed by dropping them.
                Some(_) => {}
                None => return Err(BootError::Ended(self.vmm.end(LAST_BREATH).await)),
            }
        }
    }
}

impl Ready {
    /// Notes the steps of the boot, the last of which has just ended.
    pub fn note(&self, trace: &mut Trace) {
        let BootTimes {
            began_ns,
            entered_ns,
            drivers_ns,
            mounted_ns,
        } = self.times;
        let inner = [
            ("load the VMM", began_ns),
            ("build the machine", entered_ns),
            ("kernel, up to its drivers", drivers_ns),
            ("kernel, up to the agent's mounts", mounted_ns),
        ];
        trace.mark_between(Who::Machine, &inner, "agent, until it dials");
    }

    /// Hands the virtual machine to its owner, a task of the current runtime.
    pub fn spawn(self, bounds: Bounds) -> Sandbox {
        owner::spawn(self.vmm, self.agent, self.slots, bounds)
    }
}

fn connection(stream: OwnedFd) -> std::io::Result<Agent> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    Ok(Agent::over(UnixStream::from_std(stream)?))
}
