//! The agent's service: calls of the host, translated to and from [`crate::container`].
//!
//! Contract: as in `agent/api/proto/agent.proto`. The connection is the sandbox's life line: when the host closes it,
//! [`serve`] returns and the guest is powered off.
//! Here errors become RPC codes, and nowhere else.

use crate::container::{Container, ContainerError, Workshop};
use crate::disks::Disks;
use crate::error_line;
use crate::guest::{self, GuestError};
use crate::huge_pages::HugePages;
use crate::machine;
use crate::network::Loopback;
use crate::process::ProcessError;
use crate::reaper::Reaper;
use crate::socket::{Dial, Socket};
use crate::volumes::VolumeError;
use async_trait::async_trait;
use caisson_agent_api::{
    Agent, CONTROL_PORT, ContainerRequest, CreateContainerRequest, CreateContainerResponse,
    DescribeProcessesRequest, DescribeProcessesResponse, DialLoopbackRequest, Empty,
    ExecProcessRequest, ExecProcessResponse, FitMachineRequest, ListProcessesResponse,
    ProcessRequest, ReadCgroupRequest, ReadCgroupResponse, ResizeTerminalRequest,
    SignalProcessRequest, TextFile, UpdateContainerRequest, UpdateNetworkRequest,
    UpdateVolumeRequest, WaitOomRequest, WaitOomResponse, WaitProcessResponse, create_agent,
};
use futures_util::stream;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use ttrpc::Code;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

/// `None` while a container is being created.
type Containers = HashMap<String, Option<Arc<Container>>>;

struct Service {
    workshop: Workshop,
    // No await while it is held.
    containers: Mutex<Containers>,
    /// Whether the containers' shared memory is mounted. No await while it is held.
    shares_memory: Mutex<bool>,
    loopback: Loopback,
    /// Whether the directory of volumes is mounted. No await while it is held.
    holds_volumes: Mutex<bool>,
    disks: Disks,
    huge_pages: HugePages,
    shutdown: Arc<Notify>,
}

fn code(error: &ContainerError) -> Code {
    match error {
        ContainerError::Plan(_) | ContainerError::BadId(_) => Code::INVALID_ARGUMENT,
        ContainerError::Process(ProcessError::NoSignal(_))
        | ContainerError::Volume(VolumeError::Name(_)) => Code::INVALID_ARGUMENT,
        ContainerError::NoContainer(_)
        | ContainerError::NoProcess(_)
        | ContainerError::Volume(VolumeError::Unknown(_)) => Code::NOT_FOUND,
        ContainerError::ContainerExists(_) | ContainerError::ProcessExists(_) => {
            Code::ALREADY_EXISTS
        }
        ContainerError::State { .. }
        | ContainerError::ExecPaused
        | ContainerError::ExecStopped
        | ContainerError::Process(ProcessError::Finished | ProcessError::NoTerminal) => {
            Code::FAILED_PRECONDITION
        }
        ContainerError::Cgroup(_)
        | ContainerError::Network(_)
        | ContainerError::Disk(_)
        | ContainerError::HugePages(_)
        | ContainerError::Process(_)
        | ContainerError::Guest(_)
        | ContainerError::Volume(VolumeError::Step { .. })
        | ContainerError::Streams(_)
        | ContainerError::Listening(_)
        | ContainerError::Notify(_) => Code::INTERNAL,
    }
}

fn status(error: ContainerError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(&error), error_line(&error)))
}

/// An id that is being created; it is free again unless it is kept.
struct Claim<'a> {
    service: &'a Service,
    id: String,
}

impl Claim<'_> {
    fn keep(self, container: Arc<Container>) {
        self.service
            .containers()
            .insert(self.id.clone(), Some(container));
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut containers = self.service.containers();
        if containers.get(&self.id).is_some_and(Option::is_none) {
            containers.remove(&self.id);
        }
    }
}

impl Service {
    fn containers(&self) -> MutexGuard<'_, Containers> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let found = self.containers().get(id).cloned().flatten();
        found.ok_or_else(|| ContainerError::NoContainer(id.to_owned()))
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<i32, ContainerError> {
        let id = request.container_id.clone();
        if self.containers().contains_key(&id) {
            return Err(ContainerError::ContainerExists(id));
        }
        self.containers().insert(id.clone(), None);
        let claim = Claim { service: self, id };
        once(&self.shares_memory, request.shared_memory_bytes > 0, || {
            guest::share_memory(request.shared_memory_bytes)
        })?;
        once(
            &self.holds_volumes,
            !request.volumes.is_empty(),
            guest::hold_volumes,
        )?;
        let made = async {
            self.huge_pages.give(&claim.id, &request.huge_pages).await?;
            let disks = self.disks.give(&claim.id, &request.disks).await?;
            Container::create(&self.workshop, &request, &disks).await
        };
        let container = match made.await {
            Ok(container) => container,
            Err(error) => {
                if let Err(left) = self.disks.release(&claim.id).await {
                    crate::kmsg::error(&error_line(&left));
                }
                if let Err(left) = self.huge_pages.release(&claim.id).await {
                    crate::kmsg::error(&error_line(&left));
                }
                return Err(error);
            }
        };
        let pid = container.init.pid;
        claim.keep(Arc::new(container));
        Ok(pid)
    }

    async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let Ok(container) = self.container(id) else {
            return Ok(());
        };
        container.remove().await?;
        self.disks.release(id).await?;
        self.huge_pages.release(id).await?;
        self.containers().remove(id);
        Ok(())
    }

    async fn wait(&self, request: &ProcessRequest) -> Result<WaitProcessResponse, ContainerError> {
        let process = self
            .container(&request.container_id)?
            .process(&request.process_id)?;
        let end = process.ended().await.ok_or(ProcessError::Finished)?;
        Ok(WaitProcessResponse {
            exit_status: end.code,
            oom_killed: end.oom_killed,
            stdout_bytes: end.stdout_bytes,
            stderr_bytes: end.stderr_bytes,
            ..WaitProcessResponse::default()
        })
    }

    async fn signal(&self, request: &SignalProcessRequest) -> Result<(), ContainerError> {
        let container = self.container(&request.container_id)?;
        if request.all {
            return container.signal_all(request.signal).await;
        }
        Ok(container
            .process(&request.process_id)?
            .signal(request.signal)?)
    }

    fn resize(&self, request: &ResizeTerminalRequest) -> Result<(), ContainerError> {
        let process = self
            .container(&request.container_id)?
            .process(&request.process_id)?;
        let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        Ok(process.resize(clamp(request.rows), clamp(request.columns))?)
    }
}

/// Does something that is wanted, unless it has been done.
fn once(
    done: &Mutex<bool>,
    wanted: bool,
    step: impl FnOnce() -> Result<(), GuestError>,
) -> Result<(), GuestError> {
    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
    if wanted && !*done {
        step()?;
        *done = true;
    }
    Ok(())
}

fn empty(result: Result<(), ContainerError>) -> ttrpc::Result<Empty> {
    result.map(|()| Empty::default()).map_err(status)
}

#[async_trait]
impl Agent for Service {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let pid = self.create(request).await.map_err(status)?;
        Ok(CreateContainerResponse {
            pid,
            ..CreateContainerResponse::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        empty(container.start().await)
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        empty(self.delete(&request.container_id).await)
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let container = self.container(&request.container_id).map_err(status)?;
        let pid = container
            .exec(&self.workshop, &request)
            .await
            .map_err(status)?;
        Ok(ExecProcessResponse {
            pid,
            ..ExecProcessResponse::default()
        })
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        self.wait(&request).await.map_err(status)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        empty(self.signal(&request).await)
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        empty(self.resize(&request))
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let container = self.container(&request.container_id).map_err(status)?;
        let pids = container.processes().map_err(status)?;
        Ok(ListProcessesResponse {
            pids,
            ..ListProcessesResponse::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        empty(container.pause().await)
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        empty(container.resume().await)
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        empty(container.update(&request.resources))
    }

    async fn read_cgroup(
        &self,
        _: &TtrpcContext,
        request: ReadCgroupRequest,
    ) -> ttrpc::Result<ReadCgroupResponse> {
        let container = self.container(&request.container_id).map_err(status)?;
        let read = |name: String| {
            let text = container.cgroup().text(&name)?;
            Some(crate::inspect::text_file(&name, text))
        };
        let files: Vec<TextFile> = request.files.into_iter().filter_map(read).collect();
        Ok(ReadCgroupResponse {
            files,
            ..ReadCgroupResponse::default()
        })
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        request: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let container = self.container(&request.container_id).map_err(status)?;
        let count = container
            .oom_kills_beyond(request.seen)
            .await
            .map_err(status)?;
        Ok(WaitOomResponse {
            count,
            ..WaitOomResponse::default()
        })
    }

    async fn wait_ready(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        empty(container.ready().await)
    }

    async fn describe_processes(
        &self,
        _: &TtrpcContext,
        request: DescribeProcessesRequest,
    ) -> ttrpc::Result<DescribeProcessesResponse> {
        Ok(DescribeProcessesResponse {
            processes: request
                .pids
                .iter()
                .filter_map(|pid| crate::inspect::process(*pid))
                .collect(),
            system: crate::inspect::system(),
            ..DescribeProcessesResponse::default()
        })
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        empty(container.update_network(&request.network))
    }

    async fn dial_loopback(
        &self,
        _: &TtrpcContext,
        request: DialLoopbackRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        let dialled = self.loopback.dial(container.init.resident(), &request);
        empty(dialled.await.map_err(ContainerError::from))
    }

    async fn update_volume(
        &self,
        _: &TtrpcContext,
        request: UpdateVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id).map_err(status)?;
        let followed = container.volumes.follow(&request.volume);
        empty(followed.map_err(ContainerError::from))
    }

    async fn fit_machine(
        &self,
        _: &TtrpcContext,
        request: FitMachineRequest,
    ) -> ttrpc::Result<Empty> {
        let followed = || {
            machine::run_on(request.cpus.max(1))?;
            match request.memory_device {
                0 => Ok(()),
                device => machine::use_memory(device),
            }
        };
        let failed = |error: machine::MachineError| {
            ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, error_line(&error)))
        };
        followed().map(|()| Empty::default()).map_err(failed)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.shutdown.notify_one();
        Ok(Empty::default())
    }
}

/// Dials the host and serves it until it says goodbye; returns then, or with what went wrong as one line.
pub fn run(dial: impl Dial) -> Result<(), String> {
    let line = |step: &str| {
        let step = step.to_owned();
        move |e: io::Error| format!("{step}: {e}")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(line("start the runtime"))?;
    runtime.block_on(async {
        let connecting = dial.connect(CONTROL_PORT).map_err(line("dial the host"))?;
        let socket = Socket::connected(connecting)
            .await
            .map_err(line("dial the host"))?;
        serve(socket, dial).await.map_err(|e| format!("serve: {e}"))
    })
}

/// Serves one control connection until the host closes it or asks for shutdown.
async fn serve(mut control: Socket, dial: impl Dial) -> ttrpc::Result<()> {
    let mut closed = control.on_close();
    let shutdown = Arc::new(Notify::new());
    let reaper = Reaper::default();
    let reaping = tokio::spawn(reaper.clone().run());
    let service = Service {
        workshop: Workshop {
            reaper,
            dial: Box::new(dial),
        },
        containers: Mutex::default(),
        shares_memory: Mutex::default(),
        loopback: Loopback::default(),
        holds_volumes: Mutex::default(),
        disks: Disks::default(),
        huge_pages: HugePages::default(),
        shutdown: Arc::clone(&shutdown),
    };
    let connection = stream::once(async { Ok::<_, io::Error>(control) });
    let mut server = Server::new()
        .register_service(create_agent(Arc::new(service)))
        .add_listener(Listener::new(connection));
    server.start().await?;
    tokio::select! {
        _ = closed.wait_for(|closed| *closed) => {}
        () = shutdown.notified() => {}
    }
    reaping.abort();
    Ok(())
}
