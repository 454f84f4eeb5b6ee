//! Containers: their states, their processes, their cgroup.
//!
//! States: Creating is a claimed id only; Created (init parked) --start--> Running --pause--> Paused --resume--> Running;
//! any of them becomes Stopped when init ends. Only [`Container`]'s methods move them; the service calls those.

mod error;

use crate::cgroup::{Cgroup, HIERARCHY};
use crate::listening;
use crate::network::{self, Resolver};
use crate::notify::Notify;
use crate::plan::disks::Placed;
use crate::plan::namespaces::NamespacePlan;
use crate::plan::process::ProcessPlan;
use crate::plan::seccomp::Filter;
use crate::plan::{self, ChildPlan, PlanError};
use crate::process::{ControlSocket, Process, Surroundings, spawn};
use crate::reaper::Reaper;
use crate::socket::Dial;
use crate::stdio::{self, Dialed};
use crate::supervision::Line;
use crate::volumes::Volumes;
use caisson_agent_api::{CreateContainerRequest, ExecProcessRequest, Network, Stdio};
use oci_spec::runtime::{LinuxPersonality, LinuxResources, Process as ProcessSpec, Spec};
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};
use tokio::task::JoinSet;

pub(crate) use error::ContainerError;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    Running,
    Paused,
    Stopped,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// Calls that depend on the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Start,
    Exec { ignore_paused: bool },
    Pause,
    Resume,
}

/// Whether a call is allowed in a state, and the state after it.
fn next(state: State, call: Call) -> Result<State, ContainerError> {
    use Call::{Exec, Pause, Resume, Start};
    use State::{Created, Paused, Running};
    let refused = |action| Err(ContainerError::State { action, state });
    match (call, state) {
        (Start, Created) => Ok(Running),
        (Start, _) => refused("start"),
        (Exec { .. }, Created | Running)
        | (
            Exec {
                ignore_paused: true,
            },
            Paused,
        ) => Ok(state),
        (Exec { .. }, Paused) => Err(ContainerError::ExecPaused),
        (Exec { .. }, State::Stopped) => Err(ContainerError::ExecStopped),
        (Pause, Running | Created) => Ok(Paused),
        (Pause, _) => refused("pause"),
        (Resume, Paused) => Ok(Running),
        (Resume, _) => refused("resume"),
    }
}

/// Ended exec processes whose end can still be asked for.
const REMEMBERED_ENDS: usize = 256;

struct Changing {
    state: State,
    /// The parked init's socket, until it is started.
    parked: Option<ControlSocket>,
    /// `None` while a process is being made.
    processes: HashMap<String, Option<Arc<Process>>>,
    /// Exec process ids, oldest first.
    order: VecDeque<String>,
}

/// A container that has been created.
pub(crate) struct Container {
    id: String,
    cgroup: Arc<Cgroup>,
    namespaces: NamespacePlan,
    filter: Option<Filter>,
    personality: Option<LinuxPersonality>,
    notify: Option<Notify>,
    /// Serve the host's listening sockets until the container is removed.
    _doors: JoinSet<()>,
    pub(crate) init: Arc<Process>,
    // No await while it is held; no other lock is taken inside.
    changing: Mutex<Changing>,
    pub(crate) volumes: Volumes,
    /// For as long as the container is there.
    _resolver: Option<Resolver>,
}

/// What containers are made with.
pub(crate) struct Workshop {
    pub(crate) reaper: Reaper,
    pub(crate) dial: Box<dyn Dial>,
}

fn cgroup_name(id: &str) -> Result<String, ContainerError> {
    // The prefix keeps it apart from the control files, among which it lives.
    let bad = id.is_empty() || id.len() > 240 || id.contains(['/', '\0']);
    if bad {
        Err(ContainerError::BadId(id.to_owned()))
    } else {
        Ok(format!("caisson-{id}"))
    }
}

/// Everything of a container's plan.
struct Planned {
    child: ChildPlan,
    settings: Vec<crate::cgroup::Setting>,
    cgroup_owner: Option<u32>,
    devices: Option<Vec<u64>>,
    filter: Option<Filter>,
    personality: Option<LinuxPersonality>,
}

fn plan(
    request: &CreateContainerRequest,
    preserved: u32,
    disks: &[Placed],
) -> Result<Planned, ContainerError> {
    let mut spec: Spec = plan::parse(&request.spec)?;
    plan::disks::translate(&mut spec, disks);
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|l| l.resources().as_ref());
    let filter = linux
        .and_then(|l| l.seccomp().as_ref())
        .map(plan::seccomp::compile)
        .transpose()?;
    let personality = linux.and_then(|l| l.personality().clone());
    let process = spec
        .process()
        .as_ref()
        .ok_or(PlanError::Missing { field: "process" })?;
    let process = plan::process::plan(process, filter.clone(), personality.as_ref(), preserved)?;
    let rules = resources
        .and_then(|r| r.devices().as_deref())
        .unwrap_or_default();
    let devices = crate::devices::compile(rules)?;
    let settings = resources.map_or(Ok(Vec::new()), plan::resources::plan)?;
    let container = plan::container(&spec, &request.bundle)?;
    let cgroup_owner = plan::namespaces::cgroup_owner(&spec, &container.mounts);
    let child = ChildPlan {
        container_id: request.container_id.clone(),
        cgroup: Path::new(HIERARCHY).join(cgroup_name(&request.container_id)?),
        namespaces: plan::namespaces::plan(&spec)?,
        awaits_network: network::is_needed(&request.network),
        holds: request.holds,
        container: Some(container),
        process,
    };
    Ok(Planned {
        child,
        settings,
        cgroup_owner,
        devices,
        filter,
        personality,
    })
}

/// The stream for a process's seccomp listener.
fn line(workshop: &Workshop, stdio: &Stdio) -> Result<Option<Line>, ContainerError> {
    let dial = |port| workshop.dial.connect(port).map(Line::new);
    let line = (stdio.seccomp_port != 0).then(|| dial(stdio.seccomp_port));
    line.transpose().map_err(ContainerError::Streams)
}

/// A container without one is one whose questions about names are not answered.
fn resolver(workshop: &Workshop, stdio: &Stdio, process: &Process) -> Option<Resolver> {
    if stdio.resolver_port == 0 {
        return None;
    }
    let begun = workshop
        .dial
        .connect(stdio.resolver_port)
        .map_err(ContainerError::Streams)
        .and_then(|host| Ok(Resolver::begin(host, process.resident())?));
    begun
        .inspect_err(|error| crate::kmsg::error(&crate::error_line(error)))
        .ok()
}

impl Container {
    /// Sets a container up as far as its parked init. What fails leaves nothing.
    pub(crate) async fn create(
        workshop: &Workshop,
        request: &CreateContainerRequest,
        disks: &[Placed],
    ) -> Result<Self, ContainerError> {
        let ports = &request.preserved_ports;
        let preserved = u32::try_from(ports.len()).unwrap_or(u32::MAX);
        let Planned {
            mut child,
            settings,
            cgroup_owner,
            devices,
            filter,
            personality,
        } = plan(request, preserved, disks)?;
        let none = Stdio::default();
        let stdio = request.stdio.as_ref().unwrap_or(&none);
        let dialed =
            Dialed::begin(workshop.dial.as_ref(), stdio, ports).map_err(ContainerError::Streams)?;
        let (mut child_ends, our_ends) =
            stdio::make(dialed, child.process.terminal).map_err(ContainerError::Streams)?;
        let id = &request.container_id;
        let doors = listening::open(id, &request.listening, &mut child_ends.preserved)
            .map_err(ContainerError::Listening)?;
        let notify = request.notify.then(|| Notify::open(id)).transpose();
        let notify = notify.map_err(ContainerError::Notify)?;
        let line = line(workshop, stdio)?;
        let name = cgroup_name(&request.container_id)?;
        let volumes = match &mut child.container {
            Some(plan) => Volumes::make(id, &name, &request.volumes, plan)?,
            None => Volumes::default(),
        };
        let cgroup = Cgroup::create(Path::new(HIERARCHY), &name, &settings, devices.as_deref())
            .map(Arc::new)?;
        let around = Surroundings {
            reaper: &workshop.reaper,
            cgroup: Arc::clone(&cgroup),
            init: None,
            network: &request.network,
            line,
        };
        if let Some(uid) = cgroup_owner
            && let Err(error) = cgroup.delegate(uid)
        {
            cgroup.remove().await?;
            return Err(error.into());
        }
        match spawn(&child, around, child_ends, our_ends).await {
            Ok((process, parked)) => Ok(Self {
                _resolver: resolver(workshop, stdio, &process),
                id: request.container_id.clone(),
                cgroup,
                namespaces: child.namespaces,
                filter,
                personality,
                notify,
                _doors: doors,
                init: Arc::new(process),
                changing: Mutex::new(Changing {
                    state: State::Created,
                    parked,
                    processes: HashMap::new(),
                    order: VecDeque::new(),
                }),
                volumes,
            }),
            Err(error) => {
                if let Err(left) = cgroup.remove().await {
                    crate::kmsg::error(&crate::error_line(&left));
                }
                Err(error.into())
            }
        }
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.init.end().is_some() {
            changing.state = State::Stopped;
        }
        changing
    }

    /// Starts the container's program.
    pub(crate) async fn start(&self) -> Result<(), ContainerError> {
        let parked = {
            let mut changing = self.changing();
            changing.state = next(changing.state, Call::Start)?;
            changing.parked.take()
        };
        let parked = parked.ok_or(ContainerError::State {
            action: "start",
            state: State::Running,
        })?;
        Ok(parked.release(&self.init).await?)
    }

    /// Starts a further process.
    pub(crate) async fn exec(
        &self,
        workshop: &Workshop,
        request: &ExecProcessRequest,
    ) -> Result<i32, ContainerError> {
        next(
            self.changing().state,
            Call::Exec {
                ignore_paused: request.ignore_paused,
            },
        )?;
        let spec: ProcessSpec =
            serde_json::from_slice(&request.process).map_err(PlanError::Parse)?;
        let ports = &request.preserved_ports;
        let preserved = u32::try_from(ports.len()).unwrap_or(u32::MAX);
        let process = plan::process::plan(
            &spec,
            self.filter.clone(),
            self.personality.as_ref(),
            preserved,
        )?;
        let child = self.exec_plan(process);
        let claim = self.claim(&request.process_id)?;
        let none = Stdio::default();
        let stdio = request.stdio.as_ref().unwrap_or(&none);
        let dialed =
            Dialed::begin(workshop.dial.as_ref(), stdio, ports).map_err(ContainerError::Streams)?;
        let (child_ends, our_ends) =
            stdio::make(dialed, child.process.terminal).map_err(ContainerError::Streams)?;
        let around = Surroundings {
            reaper: &workshop.reaper,
            cgroup: Arc::clone(&self.cgroup),
            init: Some(self.init.pidfd()),
            network: &Network::default(),
            line: line(workshop, stdio)?,
        };
        let (process, _) = spawn(&child, around, child_ends, our_ends).await?;
        let pid = process.pid;
        claim.keep(Arc::new(process));
        Ok(pid)
    }

    fn exec_plan(&self, process: ProcessPlan) -> ChildPlan {
        ChildPlan {
            container_id: self.id.clone(),
            cgroup: self.cgroup.path().to_owned(),
            namespaces: self.namespaces.for_exec(),
            awaits_network: false,
            holds: false,
            container: None,
            process,
        }
    }

    fn claim(&self, id: &str) -> Result<ProcessClaim<'_>, ContainerError> {
        let mut changing = self.changing();
        let free = match changing.processes.get(id) {
            None => true,
            Some(known) => known.as_ref().is_some_and(|p| p.end().is_some()),
        };
        if id.is_empty() || !free {
            return Err(ContainerError::ProcessExists(id.to_owned()));
        }
        changing.processes.insert(id.to_owned(), None);
        Ok(ProcessClaim {
            container: self,
            id: id.to_owned(),
        })
    }

    /// A process of the container; the empty id is its init.
    pub(crate) fn process(&self, id: &str) -> Result<Arc<Process>, ContainerError> {
        if id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let found = self.changing().processes.get(id).cloned().flatten();
        found.ok_or_else(|| ContainerError::NoProcess(id.to_owned()))
    }

    /// Signals every process of the container.
    pub(crate) async fn signal_all(&self, signal: i32) -> Result<(), ContainerError> {
        let number = crate::process::signal_number(signal)?;
        if signal == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        // Nothing may be born between the listing and the signal.
        let was_paused = self.changing().state == State::Paused;
        self.cgroup.freeze(true).await?;
        let listed = self.cgroup.processes();
        for pid in listed
            .iter()
            .flatten()
            .filter_map(|p| rustix::process::Pid::from_raw(*p))
        {
            // A process that has ended meanwhile needs no signal.
            let _ = rustix::process::kill_process(pid, number);
        }
        if !was_paused {
            self.cgroup.freeze(false).await?;
        }
        listed.map(drop).map_err(Into::into)
    }

    /// Freezes the container.
    pub(crate) async fn pause(&self) -> Result<(), ContainerError> {
        let state = next(self.changing().state, Call::Pause)?;
        self.cgroup.freeze(true).await?;
        self.changing().state = state;
        Ok(())
    }

    /// Lets a frozen container go on.
    pub(crate) async fn resume(&self) -> Result<(), ContainerError> {
        let mut state = next(self.changing().state, Call::Resume)?;
        self.cgroup.freeze(false).await?;
        let mut changing = self.changing();
        if changing.parked.is_some() {
            state = State::Created;
        }
        changing.state = state;
        Ok(())
    }

    /// Changes limits; a quota or a period that comes alone keeps its companion.
    pub(crate) fn update(&self, resources: &[u8]) -> Result<(), ContainerError> {
        let state = self.changing().state;
        if state == State::Stopped {
            return Err(ContainerError::State {
                action: "update",
                state,
            });
        }
        let resources: LinuxResources =
            serde_json::from_slice(resources).map_err(PlanError::Parse)?;
        let bandwidth = self.cgroup.text("cpu.max").unwrap_or_default();
        let bandwidth = String::from_utf8_lossy(&bandwidth).into_owned();
        let settings = plan::resources::change(&resources, &bandwidth)?;
        Ok(self.cgroup.update(&settings)?)
    }

    /// Waits until the container has said that it is ready, or has ended.
    pub(crate) async fn ready(&self) -> Result<(), ContainerError> {
        let Some(notify) = &self.notify else {
            return Err(ContainerError::Notify(io::ErrorKind::NotFound.into()));
        };
        tokio::select! {
            biased;
            ready = notify.ready() => ready.map_err(ContainerError::Notify),
            _ = self.init.ended() => Err(ContainerError::State {
                action: "wait for",
                state: State::Stopped,
            }),
        }
    }

    /// Waits for the next kill for want of memory, or for the container's end.
    pub(crate) async fn oom_kills_beyond(&self, seen: u64) -> Result<u64, ContainerError> {
        let stopped = || ContainerError::State {
            action: "watch",
            state: State::Stopped,
        };
        tokio::select! {
            biased;
            count = self.cgroup.oom_kills_beyond(seen) => Ok(count?),
            _ = self.init.ended() => Err(stopped()),
        }
    }

    /// The container's cgroup.
    pub(crate) fn cgroup(&self) -> &Arc<Cgroup> {
        &self.cgroup
    }

    /// Makes the container's network follow the host's. One that has ended needs none.
    pub(crate) fn update_network(&self, network: &Network) -> Result<(), ContainerError> {
        if self.changing().state == State::Stopped {
            return Ok(());
        }
        Ok(network::apply(network, self.init.resident())?)
    }

    /// All processes.
    pub(crate) fn processes(&self) -> Result<Vec<i32>, ContainerError> {
        if self.changing().state == State::Stopped {
            return Ok(Vec::new());
        }
        Ok(self.cgroup.processes()?)
    }

    /// Removes what is left of an ended container.
    pub(crate) async fn remove(&self) -> Result<(), ContainerError> {
        let state = self.changing().state;
        if state != State::Stopped {
            return Err(ContainerError::State {
                action: "delete",
                state,
            });
        }
        Ok(self.cgroup.remove().await?)
    }
}

/// The id of a process that is being made; it is free again unless it is kept.
struct ProcessClaim<'a> {
    container: &'a Container,
    id: String,
}

impl ProcessClaim<'_> {
    /// The process exists. Of those that have ended, the oldest is forgotten when there are many.
    fn keep(self, process: Arc<Process>) {
        let mut changing = self.container.changing();
        let Changing {
            processes, order, ..
        } = &mut *changing;
        order.retain(|known| *known != self.id);
        order.push_back(self.id.clone());
        processes.insert(self.id.clone(), Some(process));
        let ended = |id: &String| {
            processes
                .get(id)
                .is_some_and(|p| p.as_ref().is_some_and(|p| p.end().is_some()))
        };
        if order.len() > REMEMBERED_ENDS
            && let Some(oldest) = order.iter().position(ended)
            && let Some(id) = order.remove(oldest)
        {
            processes.remove(&id);
        }
    }
}

impl Drop for ProcessClaim<'_> {
    fn drop(&mut self) {
        let mut changing = self.container.changing();
        if changing
            .processes
            .get(&self.id)
            .is_some_and(Option::is_none)
        {
            changing.processes.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_allowed_in_its_states_only() {
        use State::{Created, Paused, Running, Stopped};
        let all = [Created, Running, Paused, Stopped];
        let after = |call| all.map(|state| next(state, call).ok());
        assert_eq!(after(Call::Start), [Some(Running), None, None, None]);
        assert_eq!(after(Call::Pause), [Some(Paused), Some(Paused), None, None]);
        assert_eq!(after(Call::Resume), [None, None, Some(Running), None]);
        let exec = |ignore_paused| after(Call::Exec { ignore_paused });
        assert_eq!(exec(false), [Some(Created), Some(Running), None, None]);
        assert_eq!(
            exec(true),
            [Some(Created), Some(Running), Some(Paused), None]
        );
    }

    #[test]
    fn ids_cannot_leave_the_hierarchy() {
        assert_eq!(cgroup_name("a.b").unwrap(), "caisson-a.b");
        for id in ["", "a/b", "../x"] {
            assert!(cgroup_name(id).is_err(), "{id:?}");
        }
    }
}
