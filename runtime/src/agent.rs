//! The agent as seen from the host: one ttrpc connection on which the host is the client.
//!
//! Contract: every call has a deadline, except the one that waits for a process to end, which ends with the connection.
//! Answers are hostile: a message has at most 4 MiB (ttrpc's bound, checked before it is read), numbers are checked
//! into range here, and texts become one printable line.
//! Not here: streams and their ports (`sandbox/ports.rs`), what a broken connection means (`sandbox/owner.rs`).

use std::{
    collections::HashMap,
    future::Future,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use caisson_agent_api::{
    AgentClient, ContainerRequest, CreateContainerRequest, DescribeProcessesRequest,
    DescribeProcessesResponse, DialLoopbackRequest, ExecProcessRequest, FitMachineRequest,
    Listening, Network, ProcessRequest, ReadCgroupRequest, ResizeTerminalRequest,
    SignalProcessRequest, Stdio, UpdateContainerRequest, UpdateNetworkRequest, UpdateVolumeRequest,
    Volume, WaitOomRequest,
};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use ttrpc::{
    Code, Error,
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
};

use crate::text::one_line;

/// Setting up a container: mounts, cgroup, hooks of the container side.
const SET_UP: Duration = Duration::from_secs(120);
/// Anything else that does not wait for a program.
const CALL: Duration = Duration::from_secs(10);

/// Why the agent did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// It answered with an error; the text is its own.
    #[error("{message}")]
    Refused {
        /// What kind of error.
        kind: RefusalKind,
        /// What went wrong, in one line.
        message: String,
    },
    /// It did not answer in time.
    #[error("the guest did not answer a request to {call} within {seconds} seconds")]
    Silent {
        /// What it was asked.
        call: &'static str,
        /// How long it had.
        seconds: u64,
    },
    /// It answered with something impossible.
    #[error("the guest answered a request to {call} with nonsense")]
    Nonsense {
        /// What it was asked.
        call: &'static str,
    },
    /// The connection is gone: the virtual machine is ending.
    #[error("the guest is gone")]
    Gone,
}

/// The kinds of errors that the agent distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The specification is not accepted.
    Invalid,
    /// No such container or process.
    NotFound,
    /// It exists already.
    Exists,
    /// Not in this state.
    State,
    /// A step failed.
    Failed,
}

/// How a process ended, as the agent tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code; 128+n for signal n.
    pub status: u8,
    /// The kernel killed a process of the container for want of memory.
    pub oom_killed: bool,
    /// How much of standard output belongs to the process. See the proto file.
    pub stdout_bytes: u64,
    /// How much of standard error belongs to it.
    pub stderr_bytes: u64,
}

/// Host ports for a process's streams; zero is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamPorts {
    /// Standard input.
    pub stdin: u32,
    /// Standard output.
    pub stdout: u32,
    /// Standard error.
    pub stderr: u32,
    /// Of a container's init: questions for the host's resolver.
    pub resolver: u32,
    /// Notifications of its seccomp filter.
    pub seccomp: u32,
    /// Descriptors from 3 upwards.
    pub preserved: Vec<u32>,
}

/// What systemd gives a container beside its streams.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Activation {
    /// Those of the descriptors from 3 upwards that listen.
    pub listening: Vec<Listening>,
    /// A socket for sd_notify(3).
    pub notify: bool,
}

/// The connection.
#[derive(Clone)]
pub struct Agent(AgentClient);

impl Agent {
    /// Speaks over the connection that the agent dialled. Must be called inside a runtime.
    pub fn over(stream: UnixStream) -> Self {
        Self(AgentClient::new(Client::new(Socket::new(stream))))
    }

    /// Sets a container up to the point before `execve`; answers init's pid in the guest. The streams of the request are
    /// `ports`.
    pub async fn create(
        &self,
        mut request: CreateContainerRequest,
        ports: &StreamPorts,
    ) -> Result<u32, AgentError> {
        let call = "create the container";
        request.stdio = Some(stdio(ports)).into();
        request.preserved_ports.clone_from(&ports.preserved);
        let answer = answered(call, SET_UP, |context| {
            self.0.create_container(context, &request)
        });
        pid(call, answer.await?.pid)
    }

    /// Lets init go on; the answer comes after `execve`.
    pub async fn start(&self, id: &str) -> Result<(), AgentError> {
        let request = container(id);
        answered("start the container", SET_UP, |c| {
            self.0.start_container(c, &request)
        })
        .await
        .map(drop)
    }

    /// Removes a container whose processes have ended.
    pub async fn delete(&self, id: &str) -> Result<(), AgentError> {
        let request = container(id);
        answered("delete the container", CALL, |c| {
            self.0.delete_container(c, &request)
        })
        .await
        .map(drop)
    }

    /// Starts one more process; answers its pid in the guest. In a paused container that is when it is resumed.
    pub async fn exec(
        &self,
        id: &str,
        process_id: &str,
        process: Vec<u8>,
        ports: &StreamPorts,
        ignore_paused: bool,
    ) -> Result<u32, AgentError> {
        let call = "start a process";
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            process_id: process_id.to_owned(),
            process,
            stdio: Some(stdio(ports)).into(),
            preserved_ports: ports.preserved.clone(),
            ignore_paused,
            ..Default::default()
        };
        let deadline = if ignore_paused {
            Duration::ZERO
        } else {
            SET_UP
        };
        let answer = answered(call, deadline, |context| {
            self.0.exec_process(context, &request)
        });
        pid(call, answer.await?.pid)
    }

    /// Waits for a process to end, however long that takes. An empty process id is init.
    pub async fn wait(&self, id: &str, process_id: &str) -> Result<Exit, AgentError> {
        let call = "wait for a process";
        let request = ProcessRequest {
            container_id: id.to_owned(),
            process_id: process_id.to_owned(),
            ..Default::default()
        };
        let answer = answered(call, Duration::ZERO, |c| self.0.wait_process(c, &request)).await?;
        Ok(Exit {
            status: u8::try_from(answer.exit_status).map_err(|_| AgentError::Nonsense { call })?,
            oom_killed: answer.oom_killed,
            stdout_bytes: answer.stdout_bytes,
            stderr_bytes: answer.stderr_bytes,
        })
    }

    /// Sends a signal to a process, or to every process of the container.
    pub async fn signal(
        &self,
        id: &str,
        process_id: &str,
        signal: i32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            process_id: process_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        answered("send a signal", CALL, |c| {
            self.0.signal_process(c, &request)
        })
        .await
        .map(drop)
    }

    /// Tells a terminal its size.
    pub async fn resize(
        &self,
        id: &str,
        process_id: &str,
        (rows, columns): (u16, u16),
    ) -> Result<(), AgentError> {
        let request = ResizeTerminalRequest {
            container_id: id.to_owned(),
            process_id: process_id.to_owned(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        answered("resize the terminal", CALL, |c| {
            self.0.resize_terminal(c, &request)
        })
        .await
        .map(drop)
    }

    /// The pids of the container's processes, in the guest.
    pub async fn processes(&self, id: &str) -> Result<Vec<u32>, AgentError> {
        let call = "list processes";
        let request = container(id);
        let answer = answered(call, CALL, |c| self.0.list_processes(c, &request)).await?;
        answer
            .pids
            .into_iter()
            .map(|number| pid(call, number))
            .collect()
    }

    /// Changes the container's limits to those of a `linux.resources` object that are not zero.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources,
            ..Default::default()
        };
        answered("update the container", CALL, |c| {
            self.0.update_container(c, &request)
        })
        .await
        .map(drop)
    }

    /// Has the guest use the memory of a device, if there is one, and run on so many CPUs.
    pub async fn fit(&self, memory_device: Option<u32>, cpus: u8) -> Result<(), AgentError> {
        let request = FitMachineRequest {
            memory_device: memory_device.unwrap_or(0),
            cpus: cpus.into(),
            ..Default::default()
        };
        answered("follow its machine's size", CALL, |c| {
            self.0.fit_machine(c, &request)
        })
        .await
        .map(drop)
    }

    /// Has the container's network follow a change.
    pub async fn update_network(&self, id: &str, network: Network) -> Result<(), AgentError> {
        let request = UpdateNetworkRequest {
            container_id: id.to_owned(),
            network: Some(network).into(),
            ..Default::default()
        };
        answered("update the network", CALL, |c| {
            self.0.update_network(c, &request)
        })
        .await
        .map(drop)
    }

    /// Connects to an address of the container's loopback interface; the connection then waits at a vsock port of the guest.
    pub async fn dial(
        &self,
        id: &str,
        address: SocketAddr,
        vsock_port: u32,
    ) -> Result<(), AgentError> {
        let request = DialLoopbackRequest {
            container_id: id.to_owned(),
            address: match address.ip() {
                IpAddr::V4(v4) => v4.octets().into(),
                IpAddr::V6(v6) => v6.octets().into(),
            },
            port: address.port().into(),
            vsock_port,
            ..Default::default()
        };
        answered("connect to the container", CALL, |c| {
            self.0.dial_loopback(c, &request)
        })
        .await
        .map(drop)
    }

    /// Has one of the container's volumes follow a change.
    pub async fn update_volume(&self, id: &str, volume: Volume) -> Result<(), AgentError> {
        let request = UpdateVolumeRequest {
            container_id: id.to_owned(),
            volume: Some(volume).into(),
            ..Default::default()
        };
        answered("update a volume", CALL, |c| {
            self.0.update_volume(c, &request)
        })
        .await
        .map(drop)
    }

    /// Control files of the container's cgroup by name. Their texts are hostile.
    pub async fn cgroup_files(
        &self,
        id: &str,
        names: &[&str],
    ) -> Result<HashMap<String, String>, AgentError> {
        let request = ReadCgroupRequest {
            container_id: id.to_owned(),
            files: names.iter().map(|&name| name.to_owned()).collect(),
            ..Default::default()
        };
        let answer = answered("read statistics", CALL, |c| self.0.read_cgroup(c, &request)).await?;
        let text = |text: Vec<u8>| String::from_utf8_lossy(&text).into_owned();
        let files = answer.files.into_iter();
        Ok(files.map(|file| (file.name, text(file.text))).collect())
    }

    /// Waits until more than `seen` processes of the container were killed for want of memory; answers how many.
    pub async fn out_of_memory(&self, id: &str, seen: u64) -> Result<u64, AgentError> {
        let call = "watch the container's memory";
        let request = WaitOomRequest {
            container_id: id.to_owned(),
            seen,
            ..Default::default()
        };
        let answer = answered(call, Duration::ZERO, |c| self.0.wait_oom(c, &request)).await?;
        // Otherwise a guest could make its owner ask for ever.
        if answer.count > seen {
            Ok(answer.count)
        } else {
            Err(AgentError::Nonsense { call })
        }
    }

    /// Waits until the container says that it is ready, however long that takes.
    pub async fn ready(&self, id: &str) -> Result<(), AgentError> {
        let request = container(id);
        let call = "wait for the container";
        let answer = answered(call, Duration::ZERO, |c| self.0.wait_ready(c, &request));
        answer.await.map(drop)
    }

    /// What the guest's /proc says about these processes and about the guest. The texts are hostile.
    pub async fn describe(&self, pids: &[u32]) -> Result<DescribeProcessesResponse, AgentError> {
        let request = DescribeProcessesRequest {
            pids: pids
                .iter()
                .filter_map(|&pid| i32::try_from(pid).ok())
                .collect(),
            ..Default::default()
        };
        answered("describe processes", CALL, |c| {
            self.0.describe_processes(c, &request)
        })
        .await
    }

    /// Freezes the container.
    pub async fn pause(&self, id: &str) -> Result<(), AgentError> {
        let request = container(id);
        answered("pause the container", CALL, |c| {
            self.0.pause_container(c, &request)
        })
        .await
        .map(drop)
    }

    /// Lets it go on.
    pub async fn resume(&self, id: &str) -> Result<(), AgentError> {
        let request = container(id);
        answered("resume the container", CALL, |c| {
            self.0.resume_container(c, &request)
        })
        .await
        .map(drop)
    }
}

/// One call with its deadline (zero: none), its errors told apart.
async fn answered<T, F>(
    call: &'static str,
    deadline: Duration,
    send: impl FnOnce(Context) -> F,
) -> Result<T, AgentError>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    if deadline.is_zero() {
        return send(context::with_timeout(0)).await.map_err(refusal);
    }
    // The connection's own deadline cannot be told from other errors by type, and closes it on a slow write.
    match tokio::time::timeout(deadline, send(context::with_timeout(0))).await {
        Ok(answer) => answer.map_err(refusal),
        Err(_) => Err(AgentError::Silent {
            call,
            seconds: deadline.as_secs(),
        }),
    }
}

fn refusal(error: Error) -> AgentError {
    let Error::RpcStatus(status) = error else {
        return AgentError::Gone;
    };
    let kind = match status.code() {
        Code::INVALID_ARGUMENT => RefusalKind::Invalid,
        Code::NOT_FOUND => RefusalKind::NotFound,
        Code::ALREADY_EXISTS => RefusalKind::Exists,
        Code::FAILED_PRECONDITION => RefusalKind::State,
        _ => RefusalKind::Failed,
    };
    AgentError::Refused {
        kind,
        message: one_line(status.message(), 2048),
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

fn stdio(ports: &StreamPorts) -> Stdio {
    Stdio {
        stdin_port: ports.stdin,
        stdout_port: ports.stdout,
        stderr_port: ports.stderr,
        resolver_port: ports.resolver,
        seccomp_port: ports.seccomp,
        ..Default::default()
    }
}

fn pid(call: &'static str, number: i32) -> Result<u32, AgentError> {
    match u32::try_from(number) {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(AgentError::Nonsense { call }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_error_is_one_printable_line() {
        let status = ttrpc::get_status(Code::INVALID_ARGUMENT, "no\nsuch \x1b[1mthing");
        assert_eq!(
            refusal(Error::RpcStatus(status)),
            AgentError::Refused {
                kind: RefusalKind::Invalid,
                message: "no such \\u{1b}[1mthing".to_owned()
            }
        );
    }

    #[test]
    fn a_lost_connection_is_no_answer() {
        assert_eq!(refusal(Error::RemoteClosed), AgentError::Gone);
        assert_eq!(
            refusal(Error::Socket("socket disconnected".into())),
            AgentError::Gone
        );
    }

    #[test]
    fn impossible_pids_are_refused() {
        assert_eq!(pid("x", 1), Ok(1));
        for number in [0, -1, i32::MIN] {
            assert_eq!(pid("x", number), Err(AgentError::Nonsense { call: "x" }));
        }
    }
}
