//! A guest that is its own host: the agent as PID 1, and a child of it that plays the host over Unix sockets and checks
//! what containers get. It needs no VMM: any machine that boots the guest kernel will do, with a share (tag `caisson`)
//! that holds `spec.json` (of `runc spec`) and `rootfs` (with busybox). Results go to the kernel's log.
#![allow(
    clippy::unwrap_used,
    clippy::zombie_processes,
    reason = "a test: what fails is to be seen"
)]

mod basics;
mod files;
mod life;
mod rights;
mod streams;

use caisson_agent::socket::Dial;
use caisson_agent::{child, guest, kmsg, power, service};
use caisson_agent_api::{
    AgentClient, CONTROL_PORT, ContainerRequest, CreateContainerRequest, Empty, ExecProcessRequest,
    ProcessRequest, SHARE_MOUNT, SignalProcessRequest, Stdio, WaitProcessResponse,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

struct Local;

impl Dial for Local {
    fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(
            &socket,
            &SocketAddrUnix::new_abstract_name(format!("port-{port}").as_bytes())?,
        )?;
        Ok(socket)
    }
}

fn listen(port: u32) -> UnixListener {
    let address = SocketAddr::from_abstract_name(format!("port-{port}")).unwrap();
    let listener = StdListener::bind_addr(&address).unwrap();
    listener.set_nonblocking(true).unwrap();
    UnixListener::from_std(listener).unwrap()
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(child::COMMAND) => child::main(&args[2..]),
        Some("host") => return host(&args[2..]),
        _ => {}
    }
    std::panic::set_hook(Box::new(|panic| kmsg::emergency(&panic.to_string())));
    if let Err(e) = guest::prepare() {
        kmsg::emergency(&guest::line(&e));
        return;
    }
    let (wake, woken) = std::os::unix::net::UnixStream::pair().unwrap();
    let only: Vec<String> = std::env::var("only")
        .into_iter()
        .filter(|w| !w.is_empty())
        .collect();
    std::process::Command::new("/proc/self/exe")
        .arg("host")
        .args(only)
        .stdout(OwnedFd::from(wake))
        .spawn()
        .unwrap();
    io::Read::read_exact(&mut &woken, &mut [0]).unwrap();
    if let Err(e) = service::run(Local) {
        kmsg::emergency(&e);
    }
    power::off()
}

fn say(text: &str) {
    for line in text.lines() {
        kmsg::error(line);
    }
}

fn host(only: &[String]) {
    std::panic::set_hook(Box::new(|panic| kmsg::error(&panic.to_string())));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = listen(CONTROL_PORT);
        io::Write::write_all(&mut io::stdout(), b"x").unwrap();
        io::Write::flush(&mut io::stdout()).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let host = Host {
            agent: AgentClient::new(Client::new(Socket::new(stream))),
            next: Mutex::new(2000),
            failures: Mutex::new(0),
            only: only.to_vec(),
        };
        host.all().await;
        let failures = *host.failures.lock().unwrap();
        say(&format!(
            "SELFHOST {}",
            if failures == 0 { "PASSED" } else { "FAILED" }
        ));
        let _ = host.agent.shutdown(context(), &Empty::default()).await;
    });
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(20))
}

struct Host {
    agent: AgentClient,
    next: Mutex<u32>,
    failures: Mutex<u32>,
    only: Vec<String>,
}

/// What became of a process.
#[derive(Debug, Default)]
struct Outcome {
    error: String,
    code: u32,
    oom: bool,
    stdout: String,
    stderr: String,
    counts: (u64, u64),
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    if let (Some(target), Value::Object(patch)) = (target.as_object_mut(), patch) {
        for (key, value) in patch {
            match target.get_mut(key) {
                Some(known) if value.is_object() && known.is_object() => merge(known, value),
                _ => drop(target.insert(key.clone(), value.clone())),
            }
        }
    }
}

fn sh(script: &str) -> Value {
    json!({"process": {"args": ["/bin/sh", "-c", script]}})
}

fn with(mut spec: Value, patch: Value) -> Value {
    merge(&mut spec, &patch);
    spec
}

fn base() -> Value {
    let text = std::fs::read(format!("{SHARE_MOUNT}/spec.json")).unwrap();
    let mut spec: Value = serde_json::from_slice(&text).unwrap();
    merge(
        &mut spec,
        &json!({
        "root": {"path": format!("{SHARE_MOUNT}/rootfs"), "readonly": false},
        "process": {"terminal": false}, "hostname": "box"}),
    );
    spec
}

struct Streams {
    stdio: Stdio,
    listeners: Vec<UnixListener>,
}

struct Open {
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
}

impl Streams {
    async fn open(&self) -> Open {
        let mut streams = Vec::new();
        for l in &self.listeners {
            streams.push(l.accept().await.unwrap().0);
        }
        let stderr = (streams.len() > 2).then(|| streams.pop().unwrap());
        let stdout = streams.pop().unwrap();
        Open {
            stdin: streams.pop().unwrap(),
            stdout,
            stderr,
        }
    }
}

impl Host {
    fn streams(&self, terminal: bool) -> Streams {
        let port = || {
            let mut next = self.next.lock().unwrap();
            *next += 1;
            *next
        };
        let ports: Vec<u32> = (0..if terminal { 2 } else { 3 }).map(|_| port()).collect();
        let listeners = ports.iter().map(|p| listen(*p)).collect();
        let stdio = Stdio {
            stdin_port: ports[0],
            stdout_port: ports[1],
            stderr_port: ports.get(2).copied().unwrap_or(0),
            ..Stdio::default()
        };
        Streams { stdio, listeners }
    }

    async fn create(&self, id: &str, spec: &Value, streams: &Streams) -> Result<i32, String> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: serde_json::to_vec(&with(base(), spec.clone())).unwrap(),
            stdio: Some(streams.stdio.clone()).into(),
            bundle: "/bundle".to_owned(),
            ..Default::default()
        };
        self.agent
            .create_container(context(), &request)
            .await
            .map(|r| r.pid)
            .map_err(text)
    }

    async fn wait(&self, id: &str, process: &str) -> WaitProcessResponse {
        let request = ProcessRequest {
            container_id: id.to_owned(),
            process_id: process.to_owned(),
            ..Default::default()
        };
        self.agent.wait_process(context(), &request).await.unwrap()
    }

    fn named(id: &str) -> ContainerRequest {
        ContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        }
    }

    async fn start(&self, id: &str) -> Result<(), String> {
        self.agent
            .start_container(context(), &Self::named(id))
            .await
            .map(drop)
            .map_err(text)
    }

    async fn delete(&self, id: &str) -> Result<(), String> {
        self.agent
            .delete_container(context(), &Self::named(id))
            .await
            .map(drop)
            .map_err(text)
    }

    async fn kill(&self, id: &str, process: &str, signal: i32, all: bool) -> Result<(), String> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            process_id: process.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.agent
            .signal_process(context(), &request)
            .await
            .map(drop)
            .map_err(text)
    }

    /// A whole life.
    async fn run(&self, spec: &Value, input: &[u8]) -> Outcome {
        let terminal = spec["process"]["terminal"] == json!(true);
        let streams = self.streams(terminal);
        let mut out = Outcome::default();
        if let Err(error) = self.create("c", spec, &streams).await {
            out.error = error;
            return out;
        }
        let open = streams.open().await;
        if let Err(error) = self.start("c").await {
            out.error = error;
        }
        self.collect("c", "", open, input, &mut out).await;
        if let Err(e) = self.delete("c").await {
            out.error += &format!("delete: {e}");
        }
        out
    }

    async fn collect(&self, id: &str, process: &str, open: Open, input: &[u8], out: &mut Outcome) {
        let Open {
            mut stdin,
            mut stdout,
            stderr,
        } = open;
        let send = async {
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        };
        let receive = async {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).await.unwrap();
            bytes
        };
        let receive_errors = async {
            let mut bytes = Vec::new();
            if let Some(mut stderr) = stderr {
                stderr.read_to_end(&mut bytes).await.unwrap();
            }
            bytes
        };
        let (end, (), o, e) = tokio::join!(self.wait(id, process), send, receive, receive_errors);
        out.code = end.exit_status;
        out.oom = end.oom_killed;
        out.counts = (end.stdout_bytes, end.stderr_bytes);
        if out.counts != (o.len() as u64, e.len() as u64) {
            out.error += &format!("counts {:?} for {} and {}", out.counts, o.len(), e.len());
        }
        out.stdout = String::from_utf8_lossy(&o).trim_end().to_owned();
        out.stderr = String::from_utf8_lossy(&e).trim_end().to_owned();
    }

    async fn exec(&self, id: &str, name: &str, process: &Value, input: &[u8]) -> Outcome {
        let terminal = process["terminal"] == json!(true);
        let streams = self.streams(terminal);
        let mut out = Outcome::default();
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            process_id: name.to_owned(),
            process: serde_json::to_vec(&with(base()["process"].clone(), process.clone())).unwrap(),
            stdio: Some(streams.stdio.clone()).into(),
            ..Default::default()
        };
        match self.agent.exec_process(context(), &request).await {
            Err(e) => out.error = text(e),
            Ok(_) => {
                self.collect(id, name, streams.open().await, input, &mut out)
                    .await
            }
        }
        out
    }

    fn check(&self, name: &str, good: bool, seen: &dyn std::fmt::Debug) {
        if good {
            say(&format!("ok   {name}"));
        } else {
            *self.failures.lock().unwrap() += 1;
            say(&format!("FAIL {name}: {seen:?}"));
        }
    }

    /// Runs a script in a container and expects its output.
    async fn expect(&self, name: &str, spec: Value, want: &str) {
        let out = self.run(&spec, b"").await;
        self.check(name, out.stdout == want && out.error.is_empty(), &out);
    }

    /// Expects an error that contains the words.
    async fn refuse(&self, name: &str, spec: Value, want: &str) {
        let out = self.run(&spec, b"").await;
        self.check(name, out.error.contains(want), &out);
    }

    async fn all(&self) {
        if self.only.is_empty() || self.only[0] == "reader" {
            self.reader_goes_away().await;
        }
        if self.only == ["true"] {
            for _ in 0..8 {
                self.timed().await;
            }
        }
        if self.only.is_empty() || self.only[0] == "basics" {
            self.basics().await;
        }
        if self.only.is_empty() || self.only[0] == "files" {
            self.files().await;
        }
        if self.only.is_empty() || self.only[0] == "rights" {
            self.rights().await;
        }
        if self.only.is_empty() || self.only[0] == "cgroups" {
            self.cgroups().await;
        }
        if self.only.is_empty() || self.only[0] == "life" {
            self.life().await;
        }
        if self.only.is_empty() || self.only[0] == "terminal" {
            self.terminal().await;
        }
        let left: Vec<_> = std::fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .flatten()
            .map(|e| e.file_name().into_string().unwrap())
            .filter(|n| n.starts_with("caisson-"))
            .collect();
        self.check("no cgroup is left", left.is_empty(), &left);
    }

    /// The life of `true`, step by step: the kernel's time stamps are the measure.
    async fn timed(&self) {
        let spec = json!({"process": {"args": ["/bin/true"]}});
        let streams = self.streams(false);
        say("create");
        let pid = self.create("c", &spec, &streams).await;
        if pid.is_err() {
            self.check("create", false, &pid);
            return;
        }
        say("start");
        let open = streams.open().await;
        let e = self.start("c").await;
        say("wait");
        let mut out = Outcome::default();
        self.collect("c", "", open, b"", &mut out).await;
        say("delete");
        let d = self.delete("c").await;
        self.check(
            "true",
            pid.is_ok() && e.is_ok() && d.is_ok() && out.error.is_empty(),
            &out,
        );
    }
}

fn text(e: ttrpc::Error) -> String {
    match e {
        ttrpc::Error::RpcStatus(s) => s.message,
        other => other.to_string(),
    }
}
