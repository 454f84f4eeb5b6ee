//! What is asked for one container: taken up if its state allows it, and passed on to the agent as a task.

use std::{future::Future, net::SocketAddr, os::fd::AsFd, sync::Arc};

use caisson_agent_api as api;
use caisson_vmm_spec::Request;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

use super::{Owner, answer, asked, owed::Asked, tell, vm_request};
use crate::{
    agent::AgentError,
    disks::{Disk, Number},
    sandbox::{
        AFTER_KILL, CreateRequest, Event, ExecRequest, Exit, INIT, KILL, Reply, SandboxError,
        Started,
        container::Container,
        disks::{Claim, Disks},
        message::Done,
        ports,
    },
    vmm::Vmm,
};

/// A disk that is on its way into the guest.
type Plugging = (Number, oneshot::Receiver<Result<u32, SandboxError>>);

/// Waits until the guest can look for these.
async fn plugged(disks: Vec<Plugging>) -> Result<Vec<api::Disk>, SandboxError> {
    let mut all = Vec::new();
    for (number, device) in disks {
        let device = device.await.map_err(|_| SandboxError::Disk {
            number,
            message: "nobody has plugged it in".to_owned(),
        })??;
        all.push(api::Disk {
            device,
            major: number.major,
            minor: number.minor,
            ..Default::default()
        });
    }
    Ok(all)
}

impl Owner {
    pub(super) fn update(&mut self, id: String, resources: Vec<u8>, reply: Reply<()>) {
        // As for a signal: there must be something that the limits hold for.
        if let Err(error) = self
            .container(&id)
            .and_then(|container| container.allows(Event::Signal))
        {
            return answer(reply, Err(error));
        }
        let agent = self.agent.clone();
        self.call(
            reply,
            async move { Ok(agent.update(&id, resources).await?) },
        );
    }

    pub(super) fn dial(&self, id: String, address: SocketAddr, reply: Reply<u32>) {
        let agent = self.agent.clone();
        self.call(reply, async move {
            let port = ports::random().map_err(SandboxError::Ports)?;
            agent.dial(&id, address, port).await?;
            Ok(port)
        });
    }

    pub(super) async fn create(
        &mut self,
        id: String,
        mut request: CreateRequest,
        reply: Reply<Started>,
        vmm: &Vmm,
    ) {
        if self.containers.contains_key(&id) {
            return answer(reply, Err(SandboxError::Exists("container")));
        }
        let seccomp = request.seccomp.take();
        let (ports, arriving) = match self.ports.open_all(request.wanted, seccomp) {
            Ok(open) => open,
            Err(error) => return answer(reply, Err(error)),
        };
        let disks = std::mem::take(&mut request.disks);
        let disks = match self.claim(&id, disks, vmm).await {
            Ok(disks) => disks,
            Err(error) => {
                self.disks.forget(&id);
                return answer(reply, Err(error));
            }
        };
        self.containers.insert(id.clone(), Container::new());
        let agent = self.agent.clone();
        self.task(async move {
            let result = async {
                let disks = plugged(disks).await?;
                let pid = agent.create(asked(&id, request, disks), &ports).await?;
                Ok(Started {
                    pid,
                    streams: arriving.connected().await?,
                })
            };
            Done::Created {
                result: result.await,
                id,
                reply,
            }
        });
    }

    /// Has a container's disks plugged in.
    async fn claim(
        &mut self,
        id: &str,
        disks: Vec<Disk>,
        vmm: &Vmm,
    ) -> Result<Vec<Plugging>, SandboxError> {
        let mut all = Vec::new();
        for Disk { about, file } in disks {
            let Claim { device, plug } = self.disks.claim(id, about)?;
            if let Some(slot) = plug {
                let request = Request::PlugDisk {
                    slot,
                    read_only: about.read_only,
                    serial: Disks::serial(about.number),
                };
                self.owed.ask(Asked::Place(slot), Instant::now());
                vm_request(vmm, &request, &[file.as_fd()]).await;
            }
            all.push((about.number, device));
        }
        Ok(all)
    }

    pub(super) fn exec(&mut self, id: String, request: ExecRequest, reply: Reply<Started>) {
        let ExecRequest {
            process_id,
            process,
            wanted,
            ignore_paused,
            seccomp,
        } = request;
        let taken_up = self
            .containers
            .get_mut(&id)
            .ok_or(SandboxError::NotFound("container"))
            .and_then(|container| container.add(&process_id, ignore_paused));
        let open = taken_up.and_then(|()| self.ports.open_all(wanted, seccomp));
        let (ports, arriving) = match open {
            Ok(open) => open,
            Err(error) => return answer(reply, Err(error)),
        };
        let agent = self.agent.clone();
        self.task(async move {
            let result = async {
                let pid = agent
                    .exec(&id, &process_id, process, &ports, ignore_paused)
                    .await?;
                Ok(Started {
                    pid,
                    streams: arriving.connected().await?,
                })
            };
            Done::Execed {
                result: result.await,
                id,
                process_id,
                reply,
            }
        });
    }

    pub(super) fn wait(&mut self, id: &str, process_id: &str, reply: Reply<Exit>) {
        match self.containers.get_mut(id) {
            Some(container) => container.wait(process_id, reply),
            None => answer(reply, Err(SandboxError::NotFound("container"))),
        }
    }

    pub(super) fn signal(
        &mut self,
        id: String,
        process_id: String,
        signal: i32,
        all: bool,
        reply: Reply<()>,
    ) {
        if let Err(error) = self
            .container(&id)
            .and_then(|container| container.allows(Event::Signal))
        {
            return answer(reply, Err(error));
        }
        // Number 0 asks whether there is somebody to signal; see kill(2).
        if signal == 0 {
            return answer(reply, Ok(()));
        }
        let agent = self.agent.clone();
        let outbox = self.outbox.clone();
        let deadly = signal == KILL;
        // Nobody dies where nothing runs.
        let dying = deadly.then(|| Arc::clone(&self.busy));
        let ended = self.end_of(&id, &process_id);
        self.call(reply, async move {
            match agent.signal(&id, &process_id, signal, all).await {
                Err(AgentError::Silent { .. } | AgentError::Nonsense { .. }) if deadly => {
                    // The guest does not even kill: nothing in it is worth keeping.
                    tell(&outbox, Done::Unkillable, None).await;
                    Ok(())
                }
                Ok(()) if deadly => {
                    tokio::spawn(async move {
                        let done = match timeout(AFTER_KILL, ended).await {
                            Err(_) if process_id == INIT => Done::Doomed { id },
                            _ => Done::Answered,
                        };
                        tell(&outbox, done, dying).await;
                    });
                    Ok(())
                }
                other => Ok(other?),
            }
        });
    }

    /// Ends with a process.
    fn end_of(&mut self, id: &str, process_id: &str) -> oneshot::Receiver<()> {
        let (told, end) = oneshot::channel();
        if let Some(container) = self.containers.get_mut(id) {
            container.hold(process_id, told);
        }
        end
    }

    pub(super) fn delete(&mut self, id: String, reply: Reply<()>) {
        if let Err(error) = self
            .container(&id)
            .and_then(|container| container.allows(Event::Delete))
        {
            return answer(reply, Err(error));
        }
        let agent = self.agent.clone();
        self.task(async move {
            let result = agent.delete(&id).await;
            Done::Deleted { id, result, reply }
        });
    }

    /// A call that moves a container from one state to another once the agent has agreed.
    pub(super) fn change(
        &mut self,
        id: String,
        event: Event,
        call: impl Future<Output = Result<(), AgentError>> + Send + 'static,
        reply: Reply<()>,
    ) {
        match self
            .container(&id)
            .and_then(|container| container.allows(event))
        {
            Ok(_) => self.task(async move {
                Done::Changed {
                    id,
                    event,
                    result: call.await,
                    reply,
                }
            }),
            Err(error) => answer(reply, Err(error)),
        }
    }
}
