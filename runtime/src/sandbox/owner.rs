//! The owner: the one task that holds a sandbox's virtual machine and its containers.
//!
//! Contract: everything that happens to a sandbox is a [`Message`] in its inbox or an event of the VMM, taken one at a
//! time. The owner never waits for the guest: a call to the agent runs as a task of its own, whose result comes back as
//! a message. A question that it cannot answer because the virtual machine ended is dropped unanswered; the handle then
//! tells the asker why (`Sandbox::ask`).
//! While all containers are paused and no call needs the guest, the vCPUs stand still (`Owner::balance`).
//! Not here: calls for one container (`owner/requests.rs`), what their results change (`owner/results.rs`), the table of states (`status.rs`), who waits for
//! what (`container.rs`), streams before they are connected (`ports.rs`).

mod owed;
mod requests;
mod results;

use std::{
    collections::HashMap,
    future::Future,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use caisson_agent_api::{self as api, CreateContainerRequest};
use caisson_vmm_spec::{Cause, Event as VmEvent, MiB, Request};
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    time::Instant,
};

use super::{
    CreateRequest, Event, Reply, Sandbox, SandboxError, Status,
    boot::LAST_BREATH,
    container::Container,
    disks::Disks,
    growth::Growth,
    inquiry,
    message::{Busy, Done, Message},
    ports::Ports,
};
use crate::{
    agent::{Agent, AgentError},
    network::Plug,
    sizing::Bounds,
    slots::Slots,
    text::one_line,
    vmm::{Ended, Vmm, VmmError},
};
use owed::{Asked, Owed};

/// How many requests may queue before askers wait.
const INBOX: usize = 64;

struct Owner {
    agent: Agent,
    ports: Ports,
    /// Who waits for the VMM to have changed the interface in a slot.
    plugging: HashMap<u8, Reply<()>>,
    disks: Disks,
    /// What the VMM is to answer.
    owed: Owed,
    /// Who waits for the VMM to have offered memory, or made vCPUs.
    machine: Option<Reply<()>>,
    /// Who waits for the guest to have so much memory beyond what it booted with; it has to run for that.
    following: Option<(MiB, oneshot::Sender<()>, Busy)>,
    containers: HashMap<String, Container>,
    outbox: mpsc::WeakSender<Message>,
    /// Cloned for every call that needs the guest to run.
    busy: Busy,
    /// The vCPUs have been told to stop.
    halted: bool,
    /// Why the owner itself is ending the virtual machine, and by when it must be gone.
    ending: Option<(Ended, Instant)>,
}

/// How an owner's service ended.
#[derive(Debug)]
enum Last {
    /// The VMM said why.
    Reported(Ended),
    /// The VMM hung up without a word.
    Closed,
    /// The last handle is gone.
    Unwanted,
    /// The virtual machine did not end in the time it was given.
    Late,
}

/// Why the virtual machine ended: what the VMM says, unless it only did what the owner wanted.
fn verdict(last: Last, wanted: Option<Ended>, observed: Ended) -> Ended {
    match (last, wanted) {
        (Last::Reported(said), None) => said,
        (Last::Reported(said), Some(_)) if said.cause != Cause::PowerOff => said,
        // It is being stopped anyway, and how exactly is of no interest.
        (Last::Closed, Some(why)) if why.cause == Cause::PowerOff => why,
        (Last::Closed, _) => observed,
        (Last::Unwanted, None) => ended(Cause::PowerOff, "its owner is gone"),
        (_, Some(why)) => why,
        // There is no deadline without a reason.
        (Last::Late, None) => observed,
    }
}

/// Starts the owner.
pub(super) fn spawn(vmm: Vmm, agent: Agent, slots: Slots, bounds: Bounds) -> Sandbox {
    let (outbox, inbox) = mpsc::channel(INBOX);
    let (tell, ended) = watch::channel(None);
    let owner = Owner {
        agent,
        ports: Ports::default(),
        plugging: HashMap::new(),
        disks: Disks::new(slots),
        owed: Owed::default(),
        machine: None,
        following: None,
        containers: HashMap::new(),
        outbox: outbox.downgrade(),
        busy: Busy::default(),
        halted: false,
        ending: None,
    };
    tokio::spawn(async move {
        let how = owner.run(vmm, inbox).await;
        tell.send_replace(Some(how));
    });
    Sandbox {
        inbox: outbox,
        ended,
        growth: Some(Arc::new(Mutex::new(Growth::new(bounds)))),
    }
}

impl Owner {
    /// Serves until the virtual machine has ended.
    async fn run(mut self, mut vmm: Vmm, mut inbox: mpsc::Receiver<Message>) -> Ended {
        let last = loop {
            let deadline = self.ending.as_ref().map(|(_, deadline)| *deadline);
            tokio::select! {
                biased;
                event = vmm.event() => match event {
                    Ok(Some((VmEvent::Accepted { port, .. }, Some(stream)))) => {
                        self.ports.arrive(port, stream);
                    }
                    Ok(Some((event @ (VmEvent::Plugged { slot } | VmEvent::Unplugged { slot }
                            | VmEvent::Refused { slot, .. }), _))) => {
                        self.place_changed(slot, event);
                        self.unplug_idle(&vmm).await;
                    }
                    Ok(Some((VmEvent::Ended { cause, message, console }, _))) => {
                        break Last::Reported(Ended::reported(cause, &message, &console));
                    }
                    Ok(Some((event, _))) => {
                        self.machine_changed(event);
                        self.balance(&vmm).await;
                    }
                    // A VMM that speaks nonsense is as good as one that is gone.
                    Ok(None) | Err(_) => break Last::Closed,
                },
                message = inbox.recv() => match message {
                    Some(message) => {
                        self.handle(message, &vmm).await;
                        self.unplug_idle(&vmm).await;
                        self.balance(&vmm).await;
                    }
                    None => break Last::Unwanted,
                },
                () = until(deadline) => break Last::Late,
                () = until(self.owed.deadline()) => {
                    self.owed.give_up();
                    self.end(ended(Cause::HostError, "the VMM does not answer"), LAST_BREATH);
                }
            }
        };
        // Nobody is answered from here on; the handles learn the cause.
        inbox.close();
        self.containers.clear();
        if matches!(last, Last::Unwanted | Last::Late) {
            vmm.kill();
        }
        let observed = vmm.end(LAST_BREATH).await;
        verdict(last, self.ending.take().map(|(why, _)| why), observed)
    }

    async fn handle(&mut self, message: Message, vmm: &Vmm) {
        match message {
            Message::Create { id, request, reply } => {
                self.create(id, *request, reply, vmm).await;
            }
            Message::Start { id, reply } => {
                let agent = self.agent.clone();
                let call = {
                    let id = id.clone();
                    async move { agent.start(&id).await }
                };
                self.change(id, Event::Start, call, reply);
            }
            Message::Freeze { id, event, reply } => {
                let agent = self.agent.clone();
                let call = {
                    let id = id.clone();
                    async move {
                        if event == Event::Pause {
                            agent.pause(&id).await
                        } else {
                            agent.resume(&id).await
                        }
                    }
                };
                self.change(id, event, call, reply);
            }
            Message::Exec { id, request, reply } => self.exec(id, request, reply),
            Message::Wait {
                id,
                process_id,
                reply,
            } => self.wait(&id, &process_id, reply),
            Message::Signal {
                id,
                process_id,
                signal,
                all,
                reply,
            } => {
                self.signal(id, process_id, signal, all, reply);
            }
            Message::Resize {
                id,
                process_id,
                size,
                reply,
            } => {
                let agent = self.agent.clone();
                self.call(reply, async move {
                    Ok(agent.resize(&id, &process_id, size).await?)
                });
            }
            Message::Processes { id, reply } => {
                let agent = self.agent.clone();
                self.call(reply, async move { Ok(agent.processes(&id).await?) });
            }
            Message::Table { id, reply } => {
                let agent = self.agent.clone();
                self.call(reply, async move { inquiry::table(&agent, &id).await });
            }
            Message::Stats { id, reply } => {
                let agent = self.agent.clone();
                self.call(reply, async move { inquiry::stats(&agent, &id).await });
            }
            Message::OutOfMemory { id, seen, reply } => {
                let agent = self.agent.clone();
                self.observe(
                    reply,
                    async move { Ok(agent.out_of_memory(&id, seen).await?) },
                );
            }
            Message::Ready { id, reply } => {
                let agent = self.agent.clone();
                self.observe(reply, async move { Ok(agent.ready(&id).await?) });
            }
            Message::Dial { id, address, reply } => self.dial(id, address, reply),
            Message::Connect {
                port,
                socket,
                reply,
            } => {
                let sent = tokio::time::timeout(LAST_BREATH, vmm.connect(port, socket)).await;
                let sent = sent.unwrap_or_else(|late| {
                    let (step, source) = ("speak with the VMM", late.into());
                    Err(VmmError::Host { step, source })
                });
                answer(reply, sent.map_err(Into::into));
            }
            Message::Update {
                id,
                resources,
                reply,
            } => self.update(id, resources, reply),
            Message::Memory {
                extra,
                followed,
                reply,
            } => {
                self.machine = Some(reply);
                self.following = Some((extra, followed, Arc::clone(&self.busy)));
                self.owed.ask(Asked::Machine, Instant::now());
                vm_request(vmm, &Request::Memory { extra }, &[]).await;
            }
            Message::Vcpus { count, reply } => {
                self.machine = Some(reply);
                self.owed.ask(Asked::Machine, Instant::now());
                vm_request(vmm, &Request::Vcpus { count }, &[]).await;
            }
            Message::FitGuest {
                memory_device,
                cpus,
                reply,
            } => {
                let agent = self.agent.clone();
                self.call(
                    reply,
                    async move { Ok(agent.fit(memory_device, cpus).await?) },
                );
            }
            Message::Fit { reply, .. } => {
                answer(reply, Err(SandboxError::NotHere("be asked of its owner")));
            }
            Message::Plug { plug, reply } => {
                let Plug { slot, mac, .. } = plug;
                self.plugging.insert(slot, reply);
                self.owed.ask(Asked::Place(slot), Instant::now());
                let fds = [Some(&plug.tap), plug.vhost.as_ref()];
                let fds: Vec<_> = fds.into_iter().flatten().map(AsFd::as_fd).collect();
                vm_request(vmm, &Request::Plug { slot, mac }, &fds).await;
            }
            Message::Unplug { slot, reply } => {
                self.plugging.insert(slot, reply);
                self.owed.ask(Asked::Place(slot), Instant::now());
                vm_request(vmm, &Request::Unplug { slot }, &[]).await;
            }
            Message::UpdateNetwork { id, network, reply } => {
                let agent = self.agent.clone();
                self.call(reply, async move {
                    Ok(agent.update_network(&id, network).await?)
                });
            }
            Message::UpdateVolume { id, volume, reply } => {
                let agent = self.agent.clone();
                self.call(
                    reply,
                    async move { Ok(agent.update_volume(&id, volume).await?) },
                );
            }
            Message::Status { id, reply } => {
                let status = self.container(&id).map(Container::status);
                answer(reply, status);
            }
            Message::Delete { id, reply } => self.delete(id, reply),
            Message::Stop => {
                self.end(ended(Cause::PowerOff, "it was stopped"), LAST_BREATH);
                vm_request(vmm, &Request::Stop, &[]).await;
            }
            Message::Done(done, busy) => {
                drop(busy);
                self.done(done);
            }
        }
    }

    /// The VMM has done what was asked for one of its places, or cannot.
    fn place_changed(&mut self, slot: u8, event: VmEvent) {
        self.owed.answered(Asked::Place(slot));
        let network = self.plugging.remove(&slot);
        match (event, network) {
            (VmEvent::Refused { message, .. }, Some(reply)) => {
                let message = one_line(&message, 1024);
                answer(reply, Err(SandboxError::Plug(message)));
            }
            (_, Some(reply)) => answer(reply, Ok(())),
            (VmEvent::Plugged { .. }, None) => self.disks.plugged(slot),
            (VmEvent::Refused { message, .. }, None) => {
                self.disks.refused(slot, &one_line(&message, 1024));
            }
            (_, None) => self.disks.unplugged(slot),
        }
    }

    /// Takes out the disks that nobody has any more.
    async fn unplug_idle(&mut self, vmm: &Vmm) {
        for slot in self.disks.idle() {
            vm_request(vmm, &Request::Unplug { slot }, &[]).await;
        }
    }

    /// The VMM has done what was asked for the machine's size, or the guest has followed.
    fn machine_changed(&mut self, event: VmEvent) {
        let result = match event {
            VmEvent::Asked | VmEvent::Vcpus { .. } => Ok(()),
            VmEvent::Failed { message } => Err(SandboxError::Growth(one_line(&message, 1024))),
            VmEvent::Memory { extra } => {
                if let Some((_, followed, _)) =
                    self.following.take_if(|(asked, ..)| *asked == extra)
                {
                    // Who waited may have given up.
                    let _ = followed.send(());
                }
                return;
            }
            _ => return,
        };
        self.owed.answered(Asked::Machine);
        if let Some(reply) = self.machine.take() {
            answer(reply, result);
        }
    }

    /// Stops the vCPUs while nothing in the guest can go on, and only then.
    async fn balance(&mut self, vmm: &Vmm) {
        let is_busy = Arc::strong_count(&self.busy) > 1;
        let halt = !is_busy && can_halt(self.containers.values().map(Container::status));
        if halt == self.halted {
            return;
        }
        self.halted = halt;
        let request = if halt {
            Request::Pause
        } else {
            Request::Resume
        };
        let sent = tokio::time::timeout(LAST_BREATH, vmm.request(&request, &[])).await;
        if !matches!(sent, Ok(Ok(()))) {
            // It is gone, which its socket will say, or hung.
            let why = ended(Cause::HostError, "the VMM does not listen");
            self.end(why, LAST_BREATH);
        }
    }

    /// A call whose result concerns nobody but the asker.
    fn call<T: Send + 'static>(
        &self,
        reply: Reply<T>,
        call: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
    ) {
        let busy = Some(Arc::clone(&self.busy));
        self.ask(reply, call, busy);
    }

    /// The same for a call that waits for something to happen, for which the guest need not run.
    fn observe<T: Send + 'static>(
        &self,
        reply: Reply<T>,
        call: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
    ) {
        self.ask(reply, call, None);
    }

    fn ask<T: Send + 'static>(
        &self,
        mut reply: Reply<T>,
        call: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
        busy: Option<Busy>,
    ) {
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            let result = tokio::select! {
                biased;
                result = call => result,
                // What only observes need not go on for nobody.
                () = reply.closed(), if busy.is_none() => Err(SandboxError::NotFound("asker")),
            };
            let done = if lost(&result) {
                Done::AgentGone
            } else {
                answer(reply, result);
                Done::Answered
            };
            tell(&outbox, done, busy).await;
        });
    }

    /// A call whose result comes back to the owner.
    fn task(&self, call: impl Future<Output = Done> + Send + 'static) {
        let outbox = self.outbox.clone();
        let busy = Some(Arc::clone(&self.busy));
        tokio::spawn(async move { tell(&outbox, call.await, busy).await });
    }

    /// Has the virtual machine end within `patience`; the first reason counts, and the shortest patience.
    fn end(&mut self, why: Ended, patience: Duration) {
        let deadline = Instant::now() + patience;
        match &mut self.ending {
            Some((_, earlier)) => *earlier = deadline.min(*earlier),
            None => self.ending = Some((why, deadline)),
        }
    }

    fn container(&self, id: &str) -> Result<&Container, SandboxError> {
        self.containers
            .get(id)
            .ok_or(SandboxError::NotFound("container"))
    }
}

/// Asks the VMM. If it no longer listens it is gone or hung: its end is noticed elsewhere.
async fn vm_request(vmm: &Vmm, request: &Request, fds: &[BorrowedFd<'_>]) {
    let _ = tokio::time::timeout(LAST_BREATH, vmm.request(request, fds)).await;
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Whether nothing in a guest with these containers can go on.
fn can_halt(containers: impl Iterator<Item = Status>) -> bool {
    let mut paused = false;
    for status in containers {
        match status {
            Status::Paused => paused = true,
            Status::Stopped => {}
            Status::Creating | Status::Created | Status::Running => return false,
        }
    }
    paused
}

async fn tell(outbox: &mpsc::WeakSender<Message>, done: Done, busy: Option<Busy>) {
    if let Some(outbox) = outbox.upgrade() {
        // Fails only if the owner has ended, and then nobody needs to know.
        let _ = outbox.send(Message::Done(done, busy)).await;
    }
}

/// What the agent is asked for a container; its streams come later.
fn asked(id: &str, request: CreateRequest, disks: Vec<api::Disk>) -> CreateContainerRequest {
    CreateContainerRequest {
        disks,
        container_id: id.to_owned(),
        spec: request.spec,
        bundle: request.bundle,
        network: Some(request.network).into(),
        shared_memory_bytes: request.shared_memory_bytes.unwrap_or(0),
        listening: request.activation.listening,
        notify: request.activation.notify,
        volumes: request.volumes,
        holds: request.holds,
        huge_pages: request.huge_pages.asked().into(),
        ..Default::default()
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, SandboxError>) {
    // An asker that went away does not want the answer.
    drop(reply.send(result));
}

fn lost<T>(result: &Result<T, SandboxError>) -> bool {
    matches!(result, Err(SandboxError::Agent(AgentError::Gone)))
}

fn ended(cause: Cause, message: &str) -> Ended {
    Ended {
        cause,
        message: message.to_owned(),
        console: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_stands_still_only_while_all_that_lives_in_it_is_paused() {
        use Status::{Created, Creating, Paused, Running, Stopped};
        let halts = |all: &[Status]| can_halt(all.iter().copied());
        assert!(halts(&[Paused]) && halts(&[Paused, Stopped, Paused]));
        for all in [
            &[][..],
            &[Stopped],
            &[Paused, Running],
            &[Paused, Created],
            &[Creating, Paused],
        ] {
            assert!(!halts(all), "{all:?}");
        }
    }

    #[test]
    fn the_best_known_reason_for_the_end_is_told() {
        let panic = || ended(Cause::GuestPanic, "panic");
        let stopped = || ended(Cause::PowerOff, "it was stopped");
        let hung_up = || ended(Cause::HostError, "its agent hung up");
        let tell =
            |last, wanted| verdict(last, wanted, ended(Cause::HostError, "signal: 9")).message;
        assert_eq!(tell(Last::Reported(panic()), None), "panic");
        assert_eq!(tell(Last::Reported(panic()), Some(hung_up())), "panic");
        assert_eq!(
            tell(
                Last::Reported(ended(Cause::PowerOff, "off")),
                Some(hung_up())
            ),
            "its agent hung up"
        );
        assert_eq!(tell(Last::Closed, None), "signal: 9");
        assert_eq!(tell(Last::Closed, Some(hung_up())), "signal: 9");
        assert_eq!(tell(Last::Closed, Some(stopped())), "it was stopped");
        assert_eq!(tell(Last::Late, Some(hung_up())), "its agent hung up");
        assert_eq!(tell(Last::Unwanted, None), "its owner is gone");
    }
}
