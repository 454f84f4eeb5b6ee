//! What a server does for containerd: containers are created, started, asked about, ended and deleted in one sandbox.
//!
//! Contract: one sandbox per server. Its first container (one outside Kubernetes, or a pod's sandbox) brings the virtual
//! machine; a pod's members join it; the virtual machine ends with the last container, unless the Sandbox API holds it
//! (`tasks/held.rs`). A creation that fails leaves nothing. Events are published in containerd's order: create, start, exit, delete; exec added, exec started, exit.
//! State changes are the owner's (`sandbox/`): here is only what containerd asks about after an end.
//! Not here: how containerd asks (`service.rs`), what happens unasked (`tasks/ends.rs`).

use std::{
    collections::HashMap,
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::SystemTime,
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed,
        TaskStart,
    },
    topics,
};
use tokio::{
    sync::{self, Notify, watch},
    time::timeout,
};

use super::{
    container::{Container, Hooks},
    error::TaskError,
    events::Publisher,
    logger::Logger,
    process::{Ended, Process, timestamp},
    stdio::Paths,
};
use crate::{
    agent::{AgentError, RefusalKind},
    cgroup::HostCgroup,
    sandbox::{AFTER_KILL, Event, ExecRequest, INIT, KILL, LOST, Refused, Sandbox, SandboxError},
    state::Status,
    stats::Stats,
    trace::{Trace, Who},
    update,
};

pub(super) mod create;
mod creating;
mod ends;
pub(super) mod held;
mod wanted;

use create::Pod;
use creating::{Creating, Deleting};
use held::Held;

/// All containers of a server.
#[derive(Debug)]
pub(super) struct Tasks {
    namespace: String,
    publisher: Publisher,
    pub(super) log: Logger,
    /// Held for a moment, never across an await; before `containers` where both are.
    pod: Mutex<Option<Arc<Pod>>>,
    /// The sandbox of the Sandbox API, once it has been ordered.
    held: OnceLock<Arc<Held>>,
    /// Held for a moment, never across an await.
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Held while a container is created or deleted: the first and the last bring and end the virtual machine. Whoever
    /// waits for the guest meanwhile is rid of it when the virtual machine is ended, for which this is not needed.
    changing: sync::Mutex<()>,
    /// The virtual machine of the Sandbox API's sandbox, from its boot on.
    machine: watch::Sender<Option<Sandbox>>,
    creating: Creating,
    deleting: Deleting,
    over: Notify,
}

/// A container or process as containerd is told of it.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) container: Arc<Container>,
    pub(super) process: Arc<Process>,
    pub(super) status: Status,
}

impl Tasks {
    /// None yet.
    pub(super) fn new(namespace: &str, publisher: Publisher, log: Logger) -> Self {
        Self {
            namespace: namespace.to_owned(),
            publisher,
            log,
            pod: Mutex::default(),
            held: OnceLock::new(),
            containers: Mutex::default(),
            changing: sync::Mutex::new(()),
            machine: watch::Sender::new(None),
            creating: Creating::default(),
            deleting: Deleting::default(),
            over: Notify::new(),
        }
    }

    /// The process that stands for every container of this server on the host: this one.
    pub(super) fn pid(&self) -> u32 {
        std::process::id()
    }

    /// Something has been asked: containerd is there.
    pub(super) fn heard(&self) {
        self.publisher.containerd_is_back();
    }

    /// Runs a request to its end, even if the caller hangs up meanwhile.
    pub(super) async fn run<T, F>(
        self: &Arc<Self>,
        request: impl FnOnce(Arc<Self>) -> F,
    ) -> Result<T, TaskError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, TaskError>> + Send + 'static,
    {
        self.heard();
        let running = tokio::spawn(request(Arc::clone(self)));
        // It does not end without an answer unless the runtime does.
        running.await.unwrap_or(Err(TaskError::Ending))
    }

    /// Waits until the server is not wanted any more.
    pub(super) async fn over(&self) {
        self.over.notified().await;
    }

    /// Ends the server, unless it still has containers or is held for more.
    pub(super) fn shut_down(&self) {
        if self.held.get().is_none() && self.containers().is_empty() {
            self.over.notify_one();
        }
    }

    /// Ends the virtual machine, and with it all that run.
    pub(super) async fn stop(&self) {
        if let Some(held) = self.held.get() {
            // It knows itself by its name.
            let _ = self.stop_sandbox(&held.id, None).await;
            return;
        }
        let pod = self.pod().clone();
        if let Some(pod) = pod {
            pod.sandbox.stop().await;
            self.clean_up(pod).await;
        }
    }

    /// Creates a container.
    pub(super) async fn create(
        self: &Arc<Self>,
        request: CreateTaskRequest,
    ) -> Result<u32, TaskError> {
        let _only_one = self.changing.lock().await;
        if self.containers().contains_key(&request.id) {
            return Err(TaskError::Exists(format!("container {}", request.id)));
        }
        let _asked_for_meanwhile = self.creating.begin(&request.id);
        let (container, flowing) = self.made(&request).await?;
        let container = Arc::new(container);
        self.containers()
            .insert(container.id.clone(), Arc::clone(&container));
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            })
            .into(),
            pid: self.pid(),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
        let init = Arc::clone(&container.init);
        self.watch_memory(Arc::clone(&container));
        self.watch(container, init, flowing);
        Ok(self.pid())
    }

    /// Lets a container's init go on, or starts a process that has been added.
    pub(super) async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, TaskError> {
        let container = self.once_made(id).await?;
        let process = container.process(exec_id)?;
        let _told_before_its_end = process.gate.lock().await;
        if process.ended().is_some() {
            return Err(TaskError::Finished);
        }
        if exec_id.is_empty() {
            self.start_init(&container).await?;
        } else {
            self.start_exec(&container, &process).await?;
        }
        Ok(self.pid())
    }

    async fn start_init(&self, container: &Container) -> Result<(), TaskError> {
        let mut trace = Trace::default();
        trace.mark(Who::Waiting, "wait for start");
        container.sandbox.start(&container.id).await?;
        trace.mark(Who::Machine, "start the program");
        // It may be lost.
        let _ = trace.append(Path::new(&container.bundle));
        container.init.set_started();
        if let Err(error) = container.hooks().after_start().await {
            // As runc: such a container must not run. If it cannot be killed its sandbox is ending.
            let _ = container
                .sandbox
                .signal(&container.id, INIT, KILL, true)
                .await;
            return Err(error.into());
        }
        let event = TaskStart {
            container_id: container.id.clone(),
            pid: self.pid(),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_START_EVENT_TOPIC, &event);
        Ok(())
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<(), TaskError> {
        if process.is_started() {
            return Err(TaskError::Running(format!("process {}", process.id)));
        }
        let mut files = process.paths.open(&self.namespace, &container.id)?;
        let request = ExecRequest {
            process_id: process.id.clone(),
            process: process.spec.clone(),
            wanted: files.wanted(process.paths.terminal),
            ignore_paused: false,
            seccomp: match &container.hooks().supervisor {
                Some(supervisor) => {
                    let subject = container.hooks().subject(Status::Running);
                    Some(supervisor.reach().await?.engage(subject).await?)
                }
                None => None,
            },
        };
        let started = container.sandbox.exec(&container.id, request).await?;
        process.set_started();
        process.hold_input(files.keeper.take());
        let flowing = files.flow(started.streams)?;
        let event = TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: process.id.clone(),
            pid: self.pid(),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        self.watch(Arc::clone(container), Arc::clone(process), flowing);
        Ok(())
    }

    /// Adds a process to a container.
    pub(super) fn exec(
        &self,
        id: &str,
        exec_id: &str,
        paths: Paths,
        spec: Vec<u8>,
    ) -> Result<(), TaskError> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Err(TaskError::Nonsense("an exec without a name"));
        }
        container.add(Process::new(exec_id, paths, spec))?;
        let event = TaskExecAdded {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Sends a signal.
    pub(super) async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let container = self.once_made(id).await?;
        let process = container.process(exec_id)?;
        if process.ended().is_some() {
            return Err(TaskError::Finished);
        }
        if !exec_id.is_empty() && !process.is_started() {
            return Err(TaskError::NoProcess(exec_id.to_owned()));
        }
        let signal =
            i32::try_from(signal).map_err(|_| TaskError::Nonsense("the signal's number"))?;
        container
            .sandbox
            .signal(id, exec_id, signal, all)
            .await
            .map_err(|error| {
                if is_gone(&error) {
                    TaskError::Finished
                } else {
                    error.into()
                }
            })
    }

    /// Freezes or thaws a container.
    pub(super) async fn freeze(&self, id: &str, event: Event) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let container_id = id.to_owned();
        if event == Event::Pause {
            container.sandbox.pause(id).await?;
            let event = TaskPaused {
                container_id,
                ..Default::default()
            };
            self.publisher
                .publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        } else {
            container.sandbox.resume(id).await?;
            let event = TaskResumed {
                container_id,
                ..Default::default()
            };
            self.publisher
                .publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// Tells a process's terminal its size.
    pub(super) async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        [rows, columns]: [u32; 2],
    ) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let size = (u16::try_from(rows), u16::try_from(columns));
        let (Ok(rows), Ok(columns)) = size else {
            return Err(TaskError::Nonsense("the terminal's size"));
        };
        if process.ended().is_some() {
            return Err(TaskError::Finished);
        }
        Ok(container
            .sandbox
            .resize(id, exec_id, (rows, columns))
            .await?)
    }

    /// Ends a process's input.
    pub(super) fn close_input(&self, id: &str, exec_id: &str) -> Result<(), TaskError> {
        self.container(id)?.process(exec_id)?.close_input();
        Ok(())
    }

    /// The guest's pids of a container's processes.
    pub(super) async fn pids(&self, id: &str) -> Result<Vec<u32>, TaskError> {
        Ok(self.once_made(id).await?.sandbox.processes(id).await?)
    }

    /// What a container uses, by the guest's count.
    pub(super) async fn stats(&self, id: &str) -> Result<Stats, TaskError> {
        Ok(self.container(id)?.sandbox.stats(id).await?)
    }

    /// Changes a container's limits: a `linux.resources` object. All or nothing. The sandbox's cgroup follows where the
    /// sandbox is this container's alone; a pod's is its engine's.
    pub(super) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let resources =
            std::str::from_utf8(resources).map_err(|_| TaskError::Nonsense("the resources"))?;
        let mut limits = container.limits.lock().await;
        let cgroup = self.pod().as_ref().and_then(|pod| pod.cgroup_of(id));
        let sandbox = &container.sandbox;
        Ok(update::apply(&mut limits, sandbox, id, cgroup.as_ref(), resources).await?)
    }

    /// Waits for a process's end.
    pub(super) async fn wait(&self, id: &str, exec_id: &str) -> Result<Ended, TaskError> {
        let process = self.once_made(id).await?.process(exec_id)?;
        Ok(process.wait().await)
    }

    /// What is true of a process.
    pub(super) async fn report(&self, id: &str, exec_id: &str) -> Result<Report, TaskError> {
        let container = self.once_made(id).await?;
        let process = container.process(exec_id)?;
        let status = if process.ended().is_some() {
            Status::Stopped
        } else if !exec_id.is_empty() && !process.is_started() {
            Status::Created
        } else {
            match container.sandbox.status(id).await {
                // Its init has ended, and its output is still on the way: containerd hears of the end together with it.
                Ok(Status::Stopped) => Status::Running,
                Ok(status) => status,
                Err(SandboxError::Ended(_) | SandboxError::NotFound(_)) => Status::Running,
                Err(error) => return Err(error.into()),
            }
        };
        Ok(Report {
            container,
            process,
            status,
        })
    }

    /// Forgets a process that is not running.
    pub(super) async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<Ended, TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let ended = match process.ended() {
            Some(ended) => ended,
            None if !process.is_started() => never_started(),
            None => return Err(TaskError::Running(format!("process {exec_id}"))),
        };
        container.remove(exec_id);
        Ok(ended)
    }

    /// Removes a container that does not run, and with the last one the virtual machine.
    pub(super) async fn delete(&self, id: &str) -> Result<Ended, TaskError> {
        let _to_the_last_word = self.deleting.begin();
        let only_one = self.changing.lock().await;
        let container = self.container(id)?;
        if container.init.ended().is_none() {
            match container.sandbox.status(id).await {
                Ok(Status::Running | Status::Paused) => {
                    return Err(TaskError::Running(format!("container {id}")));
                }
                // One that was never started goes with its init.
                Ok(Status::Created) => {
                    let _ = container.sandbox.signal(id, INIT, KILL, true).await;
                }
                _ => {}
            }
        }
        let mut ended = timeout(AFTER_KILL, container.init.wait()).await.ok();
        let pod = self.pod().clone();
        let is_last = self.held.get().is_none() && self.containers().len() == 1;
        if ended.is_none() && !is_last {
            return Err(TaskError::Running(format!("container {id}")));
        }
        if let Some(pod) = pod {
            if is_last {
                pod.sandbox.stop().await;
                container.unmount();
                self.clean_up(pod).await;
            } else {
                match pod.sandbox.delete(id).await {
                    Ok(()) | Err(SandboxError::NotFound(_) | SandboxError::Ended(_)) => {}
                    Err(error) => return Err(error.into()),
                }
                pod.volumes.forget(id);
                pod.share.remove(id)?;
                container.unmount();
            }
        }
        if ended.is_none() {
            // With the virtual machine, if nobody else keeps its end from being told.
            ended = timeout(AFTER_KILL, container.init.wait()).await.ok();
        }
        let ended = ended.unwrap_or_else(lost);
        self.containers().remove(id);
        // Hooks are free to take their time.
        drop(only_one);
        self.run_last_hooks(id, container.hooks()).await;
        let event = TaskDelete {
            container_id: id.to_owned(),
            pid: self.pid(),
            exit_status: ended.status.into(),
            exited_at: Some(timestamp(ended.at)).into(),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok(ended)
    }

    /// The hooks that undo what others did.
    async fn run_last_hooks(&self, id: &str, hooks: &Hooks) {
        if hooks.lists.poststop.is_empty() {
            return;
        }
        let hooks = hooks.clone();
        let failures = tokio::task::spawn_blocking(move || hooks.after_deletion()).await;
        for failure in failures.unwrap_or_default() {
            self.log.warning_of(id, &failure);
        }
    }

    /// Removes what a stopped virtual machine leaves on the host.
    async fn clean_up(&self, pod: Arc<Pod>) {
        drop((self.pod().take(), self.machine.send_replace(None)));
        let removed = tokio::task::spawn_blocking(move || pod.remove()).await;
        if let Ok(Err(error)) = removed {
            self.log.error(&crate::error::message(&error));
        }
    }

    /// All containers, in no order.
    pub(super) fn all(&self) -> Vec<Arc<Container>> {
        self.containers().values().cloned().collect()
    }

    /// The container that brought the virtual machine, and the cgroup that holds it.
    pub(super) fn sandbox_on_host(&self) -> Option<(String, Option<HostCgroup>)> {
        let pod = self.pod();
        pod.as_ref().map(|pod| (pod.id.clone(), pod.host_cgroup()))
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let container = self.containers().get(id).cloned();
        container.ok_or_else(|| TaskError::NoContainer(id.to_owned()))
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn pod(&self) -> MutexGuard<'_, Option<Arc<Pod>>> {
        self.pod.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an error means that there is nobody to signal any more.
fn is_gone(error: &SandboxError) -> bool {
    matches!(
        error,
        SandboxError::NotFound(_)
            | SandboxError::Ended(_)
            | SandboxError::Refused(Refused {
                from: Status::Stopped,
                ..
            })
            | SandboxError::Agent(AgentError::Refused {
                kind: RefusalKind::NotFound,
                ..
            })
    )
}

/// What containerd is told of a process that was added, never started, and is deleted.
fn never_started() -> Ended {
    Ended {
        status: 0,
        at: SystemTime::now(),
    }
}

/// What containerd is told of a process that ended with its virtual machine.
fn lost() -> Ended {
    Ended {
        status: LOST,
        at: SystemTime::now(),
    }
}

/// The bundle's path as the host has it.
fn bundle_path(request: &CreateTaskRequest) -> PathBuf {
    Path::new(&request.bundle).to_path_buf()
}
