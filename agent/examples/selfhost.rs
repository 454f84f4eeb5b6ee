//! A guest that is its own host: the agent as PID 1, and a child of it that plays the host over Unix sockets and checks
//! what containers get. It needs no VMM: any machine that boots the guest kernel will do, with a share (tag `caisson`)
//! that holds `spec.json` (of `runc spec`) and `rootfs` (with busybox). Results go to the kernel's log.
//!
//! Developers run it under QEMU: see the end of this file.
#![allow(
    clippy::unwrap_used,
    clippy::zombie_processes,
    reason = "a test: what fails is to be seen"
)]

use caisson_agent::socket::Dial;
use caisson_agent::{child, guest, kmsg, power, service};
use caisson_agent_api::{
    AgentClient, CONTROL_PORT, ContainerRequest, CreateContainerRequest, Empty, ExecProcessRequest,
    ProcessRequest, ResizeTerminalRequest, SHARE_MOUNT, SignalProcessRequest, Stdio,
    WaitProcessResponse,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};
use std::collections::HashMap;
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

    async fn basics(&self) {
        self.expect("hello", sh("echo hello"), "hello").await;
        let out = self.run(&sh("echo err >&2; exit 42"), b"").await;
        self.check(
            "exit code and stderr",
            out.code == 42 && out.stderr == "err",
            &out,
        );
        let out = self.run(&sh("kill -9 $$"), b"").await;
        self.check("init cannot kill itself with KILL", out.code == 0, &out);
        let out = self
            .run(&sh("wc -c; echo done"), &vec![b'x'; 1 << 20])
            .await;
        self.check("stdin and its end", out.stdout == "1048576\ndone", &out);
        let out = self.run(&sh("cat"), &vec![b'y'; 64 << 20]).await;
        self.check(
            "64 MiB each way",
            out.stdout.len() == 64 << 20 && out.error.is_empty(),
            &(out.code, out.error, out.counts),
        );
        self.expect("pids", sh("echo $$; ls /proc | grep -c '^[0-9]'"), "1\n3")
            .await;
        self.expect("hostname", sh("hostname"), "box").await;
        self.expect(
            "stdout can be opened again",
            sh("echo a > /dev/stdout; echo b > /proc/self/fd/1"),
            "a\nb",
        )
        .await;
        self.expect("environment", with(json!({"process": {"args": ["/bin/env"], "env": ["PATH=/bin", "B=2", "A=1", "B=3"]}}), json!({})), "PATH=/bin\nB=3\nA=1\nHOME=/root").await;
        self.refuse(
            "not in path",
            json!({"process": {"args": ["foo"]}}),
            r#"exec: "foo": executable file not found in $PATH"#,
        )
        .await;
        self.refuse(
            "no such file",
            json!({"process": {"args": ["/x"]}}),
            r#"exec: "/x": stat /x: no such file or directory"#,
        )
        .await;
        self.refuse(
            "not executable",
            json!({"process": {"args": ["/etc/passwd"]}}),
            r#"exec: "/etc/passwd": permission denied"#,
        )
        .await;
        self.refuse(
            "bad format",
            json!({"process": {"args": ["/bin/garbage"]}}),
            "exec /bin/garbage: exec format error",
        )
        .await;
        self.expect(
            "cwd is made",
            with(sh("pwd"), json!({"process": {"cwd": "/made/for/me"}})),
            "/made/for/me",
        )
        .await;
        self.expect(
            "signals are default",
            sh("grep -E 'SigBlk|SigIgn' /proc/self/status | cut -f2"),
            "0000000000000000\n0000000000000000",
        )
        .await;
        self.expect("descriptors", sh("ls /proc/self/fd"), "0\n1\n2\n3")
            .await;
    }

    async fn files(&self) {
        self.expect("devices", sh("ls -l /dev | awk '{print $1,$NF}' | sort"), "crw-rw-rw- full\ncrw-rw-rw- null\ncrw-rw-rw- random\ncrw-rw-rw- tty\ncrw-rw-rw- urandom\ncrw-rw-rw- zero\ndrwxr-xr-x pts\ndrwxrwxrwt mqueue\ndrwxrwxrwt shm\nlrwxrwxrwx /proc/self/fd\nlrwxrwxrwx /proc/self/fd/0\nlrwxrwxrwx /proc/self/fd/1\nlrwxrwxrwx /proc/self/fd/2\nlrwxrwxrwx pts/ptmx\ntotal 0").await;
        self.expect(
            "read-only root",
            with(
                sh("touch /x 2>&1; touch /dev/x && echo dev"),
                json!({"root": {"readonly": true}}),
            ),
            "touch: /x: Read-only file system\ndev",
        )
        .await;
        self.expect("masked and read-only paths", with(sh("wc -c < /etc/passwd; ls /home | wc -l; touch /root/x 2>&1; echo 1 2>/dev/null > /proc/sys/kernel/domainname || echo ro"), json!({"linux": {"maskedPaths": ["/etc/passwd", "/home", "/none"], "readonlyPaths": ["/root", "/proc/sys", "/none"]}})), "0\n0\ntouch: /root/x: Read-only file system\nro").await;
        let mounts = base()["mounts"].as_array().unwrap().clone();
        let plus = |extra: Value| {
            let mut all = mounts.clone();
            all.extend(extra.as_array().unwrap().iter().cloned());
            json!({"mounts": all})
        };
        let source = format!("{SHARE_MOUNT}/volume");
        let _ = std::fs::create_dir_all(&source);
        std::fs::write(format!("{source}/f"), "data").unwrap();
        self.expect("bind mounts", with(sh("cat /vol/deep/f; echo; touch /vol/deep/g 2>&1; cat /single; echo; grep -E ' /vol/deep ' /proc/self/mountinfo | cut -d' ' -f6"), plus(json!([
            {"destination": "/vol/deep", "type": "none", "source": source, "options": ["rbind", "ro", "nosuid", "nodev"]},
            {"destination": "/single", "type": "bind", "source": format!("{source}/f"), "options": ["bind"]}]))),
            "data\ntouch: /vol/deep/g: Read-only file system\ndata\nro,nosuid,nodev,relatime").await;
        self.expect("links in the image stay inside", with(sh("cat /out/f"), plus(json!([
            {"destination": "/escape/out", "type": "bind", "source": source, "options": ["bind"]}]))), "data").await;
        self.expect("tmpfs with copy", with(sh("stat -c '%a %u' /tree/file; cat /tree/sub/file; readlink /tree/link; df -T /tree | tail -1 | awk '{print $2}'"), plus(json!([
            {"destination": "/tree", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m", "nodev"]}]))), "640 7\nsub\nfile\ntmpfs").await;
        self.expect("tmpfs options", with(sh("stat -c %a /run1; grep ' /run1 ' /proc/self/mountinfo | grep -o 'size=[0-9k]*'; touch /run1/x 2>&1"), plus(json!([
            {"destination": "/run1", "type": "tmpfs", "source": "tmpfs", "options": ["ro", "size=64k", "mode=700"]}]))), "700\nsize=64k\ntouch: /run1/x: Read-only file system").await;
        self.expect("propagation", with(sh("grep -E ' / / | /vol ' /proc/self/mountinfo | grep -o 'shared' | wc -l"), with(plus(json!([
            {"destination": "/vol", "type": "bind", "source": source, "options": ["bind", "rshared"]}])), json!({"linux": {"rootfsPropagation": "shared"}}))), "1").await;
        self.expect("recursive read-only", with(sh("touch /vol/x 2>&1"), plus(json!([
            {"destination": "/vol", "type": "bind", "source": source, "options": ["rbind", "rro"]}]))), "touch: /vol/x: Read-only file system").await;
        self.refuse("missing source", plus(json!([{"destination": "/v", "type": "bind", "source": "/nope", "options": ["bind"]}])), "no such file or directory").await;
        self.refuse(
            "mount inside proc",
            plus(json!([{"destination": "/proc/sys", "type": "tmpfs", "source": "tmpfs"}])),
            "inside /proc",
        )
        .await;
        self.expect("cgroup mount", with(sh("cat /proc/self/cgroup; mkdir /sys/fs/cgroup/x 2>/dev/null || echo ro; ls /sys/fs/cgroup/cgroup.procs"), json!({"linux": {"namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"cgroup"},{"type":"network"}]}})), "0::/\nro\n/sys/fs/cgroup/cgroup.procs").await;
        self.expect("further devices", with(sh("stat -c '%t:%T %a %u:%g' /dev/fuse /dev/pipe"), json!({"linux": {"devices": [
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 1, "gid": 2},
            {"path": "/dev/pipe", "type": "p", "major": 0, "minor": 0}]}})), "a:e5 666 1:2\n0:0 666 0:0").await;
        self.expect(
            "loopback",
            sh("ip addr show lo | grep -o 'inet 127.0.0.1/8'"),
            "inet 127.0.0.1/8",
        )
        .await;
        self.expect("sysctls", with(sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced"), json!({"linux": {"sysctl": {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}}})), "1\n1").await;
        self.expect(
            "domainname",
            with(
                sh("cat /proc/sys/kernel/domainname"),
                json!({"domainname": "dom"}),
            ),
            "dom",
        )
        .await;
        let hook =
            json!([{"path": "/bin/hook", "args": ["hook", "arg"], "env": ["X=1", "PATH=/bin"]}]);
        self.expect(
            "startContainer hook",
            with(
                sh("cat /tmp/hook; rm /tmp/hook"),
                json!({"hooks": {"startContainer": hook}}),
            ),
            "arg 1 created /bundle",
        )
        .await;
        self.refuse(
            "failing hook",
            with(
                sh("true"),
                json!({"hooks": {"startContainer": [{"path": "/bin/false"}]}}),
            ),
            "error running hook #0: exit status 1",
        )
        .await;
        self.refuse("hook timeout", with(sh("true"), json!({"hooks": {"startContainer": [{"path": "/bin/sleep", "args": ["sleep", "9"], "timeout": 1}]}})), "ran past specified timeout").await;
        self.expect("user namespace", with(sh("id -u; cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null && ls -ld /proc/1 | awk '{print $3}'; stat -c %u /dev/null"), json!({"linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"},{"type":"user"},{"type":"cgroup"}],
            "uidMappings": [{"containerID":0,"hostID":0,"size":1000}], "gidMappings": [{"containerID":0,"hostID":0,"size":1000}]}})), "0\n 0 0 1000\nroot\n0").await;
        self.expect("time namespace", with(sh("cut -d. -f1 /proc/uptime | awk '{print ($1 > 86400)}'"), json!({"linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"},{"type":"time"}],
            "timeOffsets": {"boottime": {"secs": 100_000}}}})), "1").await;
    }

    async fn rights(&self) {
        let status = |what: &str| {
            sh(&format!(
                "grep -E '^({what})' /proc/self/status | cut -f2 | tr '\\t\\n' '  '"
            ))
        };
        let caps = |all: &[&str]| json!({"process": {"capabilities": {"bounding": all, "effective": all, "permitted": all, "inheritable": [], "ambient": []}}});
        self.expect(
            "capabilities",
            with(status("Cap"), caps(&["CAP_KILL", "CAP_CHOWN"])),
            "0000000000000000 0000000000000021 0000000000000021 0000000000000021 0000000000000000",
        )
        .await;
        let user = json!({"process": {"user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 63}}});
        self.expect(
            "user",
            with(
                sh("id -u; id -g; id -G; umask; echo $HOME; echo again > /dev/stdout"),
                user.clone(),
            ),
            "1000\n1001\n1001 5 6\n0077\n/home/user\nagain",
        )
        .await;
        let ambient = json!({"process": {"capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}}});
        self.expect(
            "ambient capabilities",
            with(with(status("Cap"), user), ambient),
            "0000000000000020 0000000000000020 0000000000000020 0000000000000020 0000000000000020",
        )
        .await;
        let filter = json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}}});
        for nnp in [true, false] {
            let set = json!({"process": {"noNewPrivileges": nnp}});
            self.expect(&format!("seccomp, no_new_privs {nnp}"), with(with(sh("mkdir /tmp/d 2>&1; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status | cut -f2"), filter.clone()), set), &format!("mkdir: can't create directory '/tmp/d': Function not implemented\n{}\n2", u8::from(nnp))).await;
        }
        self.expect("rlimits", with(sh("ulimit -n; ulimit -Hn; ulimit -c"), json!({"process": {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]}})), "77\n99\n0").await;
        self.expect("oom score and priorities", with(sh("cat /proc/self/oom_score_adj; cut -d' ' -f19 /proc/self/stat; ionice -p $$"), json!({"process": {"oomScoreAdj": 321, "scheduler": {"policy": "SCHED_BATCH", "nice": 7}, "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3}}})), "321\n7\nbest-effort: prio 3").await;
        self.expect(
            "personality",
            with(
                sh("uname -m"),
                json!({"linux": {"personality": {"domain": "LINUX32"}}}),
            ),
            "i686",
        )
        .await;
        self.expect("device rules", with(sh("mknod /tmp/kmsg c 1 11; cat /tmp/kmsg 2>&1 | head -c 60; rm /tmp/kmsg; echo; head -c 3 /dev/zero | wc -c"), with(caps(&["CAP_MKNOD"]), json!({"linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}}}))), "cat: can't open '/tmp/kmsg': Operation not permitted\n\n3").await;
        self.refuse("unmapped user", with(sh("true"), json!({"process": {"user": {"uid": 5000, "gid": 0}}, "linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"user"},{"type":"uts"},{"type":"ipc"},{"type":"network"}],
            "uidMappings": [{"containerID":0,"hostID":0,"size":1000}], "gidMappings": [{"containerID":0,"hostID":0,"size":1000}]}})), "cannot set uid to unmapped user").await;
    }

    async fn cgroups(&self) {
        let out = self.run(&with(sh("x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo survived"), json!({"linux": {"resources": {"memory": {"limit": 20_000_000, "swap": 20_000_000}}}})), b"").await;
        self.check(
            "out of memory is told apart",
            out.oom && out.code == 137,
            &out,
        );
        let view = json!({"linux": {"namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"cgroup"},{"type":"network"}],
            "resources": {"pids": {"limit": 12}, "cpu": {"shares": 2048, "quota": 50000, "period": 100_000, "cpus": "0"}, "memory": {"limit": 67_108_864, "reservation": 1_048_576}, "unified": {"memory.high": "50331648"}}}});
        self.expect("limits", with(sh("cd /sys/fs/cgroup; cat pids.max cpu.weight cpu.max cpuset.cpus memory.max memory.low memory.high"), view), "12\n79\n50000 100000\n0\n67108864\n1048576\n50331648").await;
        self.refuse(
            "unknown controller",
            with(
                sh("true"),
                json!({"linux": {"resources": {"unified": {"nothing.max": "1"}}}}),
            ),
            "controller is not available",
        )
        .await;
        let out = self
            .run(
                &with(
                    sh("for i in 1 2 3 4 5 6 7 8; do sleep 5 & done 2>&1; wait"),
                    json!({"linux": {"resources": {"pids": {"limit": 4}}}}),
                ),
                b"",
            )
            .await;
        self.check(
            "pids limit",
            out.code != 0 || out.stdout.contains("fork"),
            &out,
        );
    }

    async fn life(&self) {
        let streams = self.streams(false);
        let pid = self.create("l", &with(sh("trap 'echo term; exit 7' TERM; echo up; while :; do sleep 0.1; done"), json!({"process": {"noNewPrivileges": true, "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": [], "ambient": []}},
            "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}}})), &streams).await;
        self.check("created", pid.is_ok(), &pid);
        let Open {
            stdin,
            mut stdout,
            stderr,
        } = streams.open().await;
        let again = self.create("l", &sh("true"), &self.streams(false)).await;
        self.check(
            "an id in use is refused",
            again
                .as_ref()
                .is_err_and(|e| e.contains("container with id exists")),
            &again,
        );
        let e = self.delete("l").await;
        self.check("a created container is not deleted", e.is_err(), &e);
        let e = self.start("l").await;
        self.check("started", e.is_ok(), &e);
        let mut line = [0; 3];
        stdout.read_exact(&mut line).await.unwrap();
        let e = self.start("l").await;
        self.check(
            "start twice is refused",
            e.as_ref()
                .is_err_and(|e| e.contains("cannot start a container that is running")),
            &e,
        );
        let confined = json!({"noNewPrivileges": true, "args": ["/bin/sh", "-c", "echo $$; hostname; mkdir /tmp/d 2>&1; grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status | cut -f2; cat /proc/self/cgroup; ls -l /proc/self/ns /proc/1/ns | awk '/ns:|->/{print $NF}' | sort | uniq -c | awk '{print $1}' | sort -u"],
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": [], "ambient": []}});
        let out = self.exec("l", "e1", &confined, b"").await;
        let lines: Vec<&str> = out.stdout.lines().collect();
        self.check(
            "exec is confined",
            lines.get(1) == Some(&"box")
                && lines.get(2).is_some_and(|l| l.contains("not implemented"))
                && lines.get(3..6) == Some(&["0000000000000020", "1", "2"]),
            &out,
        );
        self.check(
            "exec is in the cgroup",
            lines.get(6) == Some(&"0::/caisson-l"),
            &out,
        );
        self.check(
            "exec shares all namespaces",
            lines.get(7..) == Some(&["1", "2", "4"]),
            &out,
        );
        let out = self
            .exec("l", "e2", &json!({"args": ["cat"]}), b"through")
            .await;
        self.check(
            "exec with input",
            out.stdout == "through" && out.code == 0,
            &out,
        );
        let out = self.exec("l", "e3", &json!({"args": ["nope"]}), b"").await;
        self.check(
            "exec of nothing",
            out.error
                .ends_with(r#"exec: "nope": executable file not found in $PATH"#)
                && out.error.starts_with("exec"),
            &out,
        );
        let process = json!({"args": ["/bin/sh", "-c", "sleep 60 & echo started; exit 3"]});
        let out = self.exec("l", "e4", &process, b"");
        // The background child keeps the stream open: the count tells the host when it has everything.
        let counted = tokio::time::timeout(Duration::from_secs(3), out).await;
        self.check(
            "a background child holds the stream",
            counted.is_err(),
            &counted,
        );
        let end = self.wait("l", "e4").await;
        self.check(
            "its end and count are told",
            end.exit_status == 3 && end.stdout_bytes == 8,
            &end,
        );
        let named = Self::named("l");
        let listed = self
            .agent
            .list_processes(context(), &named)
            .await
            .map(|l| l.pids);
        self.check(
            "processes are listed",
            listed
                .as_ref()
                .is_ok_and(|l| l.contains(pid.as_ref().unwrap()) && l.len() >= 2),
            &listed,
        );
        let paused = self
            .agent
            .pause_container(context(), &named)
            .await
            .map(drop)
            .map_err(text);
        self.check("paused", paused.is_ok(), &paused);
        let out = self.exec("l", "e5", &json!({"args": ["true"]}), b"").await;
        self.check(
            "no exec in a paused container",
            out.error.contains("cannot exec in a paused container"),
            &out,
        );
        let resumed = self
            .agent
            .resume_container(context(), &named)
            .await
            .map(drop)
            .map_err(text);
        self.check("resumed", resumed.is_ok(), &resumed);
        let e = self.kill("l", "", 15, false).await;
        self.check("signalled", e.is_ok(), &e);
        let end = self.wait("l", "").await;
        self.check(
            "the trap ran",
            end.exit_status == 7 && end.stdout_bytes == 8,
            &end,
        );
        let e = self.kill("l", "", 15, false).await;
        self.check(
            "no signal for the dead",
            e.as_ref()
                .is_err_and(|e| e.contains("process already finished")),
            &e,
        );
        let out = self.exec("l", "e6", &json!({"args": ["true"]}), b"").await;
        self.check(
            "no exec in a stopped container",
            out.error.contains("cannot exec in a stopped container"),
            &out,
        );
        drop((stdin, stdout, stderr));
        let e = self.delete("l").await;
        self.check("deleted", e.is_ok(), &e);
        let e = self.delete("l").await;
        self.check("deleting again is fine", e.is_ok(), &e);
        let streams = self.streams(false);
        let _ = self.create("k", &sh("sleep 100"), &streams).await;
        say("created k");
        let open = streams.open().await;
        let e = self.kill("k", "", 9, false).await;
        say("killed k");
        let end = self.wait("k", "").await;
        self.check(
            "a created container can be killed",
            e.is_ok() && end.exit_status == 137,
            &(e, end),
        );
        let e = self.start("k").await;
        self.check(
            "and not be started then",
            e.as_ref().is_err_and(|e| e.contains("stopped")),
            &e,
        );
        drop(open);
        let e = self.delete("k").await;
        self.check("and be deleted", e.is_ok(), &e);
        self.namespaced().await;
        self.preserved().await;
        for round in 0..5 {
            let out = self.run(&sh("echo x"), b"").await;
            if out.stdout != "x" {
                self.check(&format!("round {round}"), false, &out);
            }
        }
        self.check("5 rounds", true, &());
        self.many().await;
    }

    /// A further process in a container with every kind of namespace, and the end of one without a PID namespace.
    async fn namespaced(&self) {
        let mounts: Vec<Value> = base()["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .cloned()
            .map(|mut m| {
                if m["type"] == "cgroup" {
                    m["options"] = json!(["rw", "nosuid", "noexec", "nodev"]);
                }
                m
            })
            .collect();
        let spec = with(
            sh("mkdir /sys/fs/cgroup/mine && echo delegated; while :; do sleep 0.1; done"),
            json!({"mounts": mounts, "linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"},{"type":"user"},{"type":"cgroup"},{"type":"time"}],
            "timeOffsets": {"boottime": {"secs": 100_000}},
            "uidMappings": [{"containerID":0,"hostID":5000,"size":1000}], "gidMappings": [{"containerID":0,"hostID":5000,"size":1000}]}}),
        );
        let streams = self.streams(false);
        let created = self.create("n", &spec, &streams).await;
        self.check("all namespaces", created.is_ok(), &created);
        if created.is_err() {
            return;
        }
        let mut open = streams.open().await;
        let _ = self.start("n").await;
        let mut line = [0; 10];
        open.stdout.read_exact(&mut line).await.unwrap();
        self.check("the cgroup is delegated", &line == b"delegated\n", &line);
        let process = json!({"args": ["/bin/sh", "-c", "id -u; tr -s ' ' < /proc/self/uid_map; cat /proc/self/cgroup; cut -d. -f1 /proc/uptime | awk '{print ($1 > 86400)}'; ls -l /proc/self/ns /proc/1/ns | awk '/->/{print $NF}' | sort | uniq -c | awk '{print $1}' | sort -u"]});
        let out = self.exec("n", "x", &process, b"").await;
        self.check(
            "exec into all namespaces",
            out.stdout == "0\n 0 5000 1000\n0::/\n1\n2\n4",
            &out,
        );
        let tty = json!({"terminal": true, "user": {"uid": 3, "gid": 4}, "args": ["/bin/sh", "-c", "stat -c %u $(tty); echo x > /dev/tty"]});
        let out = self.exec("n", "t", &tty, b"").await;
        self.check(
            "a terminal of another user",
            out.stdout.replace('\r', "") == "3\nx",
            &out,
        );
        let _ = self.kill("n", "", 9, false).await;
        self.wait("n", "").await;
        let e = self.delete("n").await;
        self.check("its cgroups go", e.is_ok(), &e);
        let spec = with(
            sh("sleep 1000 & echo left"),
            json!({"linux": {"namespaces": [{"type":"mount"},{"type":"uts"},{"type":"ipc"}]}}),
        );
        let out = self.run(&spec, b"");
        let out = tokio::time::timeout(Duration::from_secs(30), out).await;
        self.check(
            "no PID namespace, and all end with init",
            out.as_ref().is_ok_and(|o| o.stdout == "left"),
            &out,
        );
    }

    /// A reader that goes away is noticed by the writer.
    async fn reader_goes_away(&self) {
        let streams = self.streams(false);
        let script = sh("trap '' PIPE; while echo y; do :; done 2>/dev/null; exit 8");
        let created = self.create("r", &script, &streams).await;
        self.check("a flood", created.is_ok(), &created);
        let mut open = streams.open().await;
        let _ = self.start("r").await;
        let mut first = [0; 2];
        let got = open.stdout.read_exact(&mut first).await;
        drop(open.stdout);
        let end = tokio::time::timeout(Duration::from_secs(15), self.wait("r", "")).await;
        let code = end.as_ref().map(|e| e.exit_status);
        self.check(
            "its reader goes away",
            got.is_ok() && &first == b"y\n" && code == Ok(8),
            &(got, code),
        );
        let _ = self.kill("r", "", 9, false).await;
        self.wait("r", "").await;
        let _ = self.delete("r").await;
    }

    /// Descriptors from 3 upwards go both ways.
    async fn preserved(&self) {
        let (streams, extra) = (self.streams(false), self.streams(false));
        let request = CreateContainerRequest {
            container_id: "p".to_owned(),
            spec: serde_json::to_vec(&with(
                base(),
                sh("ls /proc/self/fd | tr '\\n' ' '; read line <&3; echo got $line >&4"),
            ))
            .unwrap(),
            stdio: Some(streams.stdio.clone()).into(),
            preserved_ports: vec![extra.stdio.stdin_port, extra.stdio.stdout_port],
            ..Default::default()
        };
        let created = self
            .agent
            .create_container(context(), &request)
            .await
            .map_err(text);
        self.check("preserved descriptors", created.is_ok(), &created);
        let mut open = streams.open().await;
        let mut three = extra.listeners[0].accept().await.unwrap().0;
        let mut four = extra.listeners[1].accept().await.unwrap().0;
        let _ = self.start("p").await;
        three.write_all(b"words\n").await.unwrap();
        let mut got = String::new();
        four.read_to_string(&mut got).await.unwrap();
        let mut seen = String::new();
        open.stdout.read_to_string(&mut seen).await.unwrap();
        self.wait("p", "").await;
        self.check(
            "go both ways",
            got == "got words\n" && seen == "0 1 2 3 4 5 ",
            &(got, seen),
        );
        let _ = self.delete("p").await;
    }

    async fn many(&self) {
        let ids: Vec<String> = (0..8).map(|n| format!("m{n}")).collect();
        let mut running = HashMap::new();
        for id in &ids {
            let streams = self.streams(false);
            let e = self.create(id, &sh("echo $$; sleep 1"), &streams).await;
            if e.is_err() {
                self.check("many", false, &e);
            }
            running.insert(id, streams.open().await);
        }
        for id in &ids {
            let _ = self.start(id).await;
        }
        let mut codes = 0;
        for id in &ids {
            codes += self.wait(id, "").await.exit_status;
            let _ = self.delete(id).await;
        }
        self.check("eight containers at once", codes == 0, &codes);
    }

    async fn terminal(&self) {
        let tty =
            json!({"process": {"terminal": true, "consoleSize": {"height": 33, "width": 111}}});
        let out = self.run(&with(sh("tty; stty size; test -c /dev/console && echo console; ls -l /proc/self/fd/0 | awk '{print $NF}'"), tty.clone()), b"").await;
        self.check(
            "terminal",
            out.stdout.replace('\r', "") == "/dev/pts/0\n33 111\nconsole\n/dev/pts/0",
            &out,
        );
        let streams = self.streams(true);
        let _ = self
            .create(
                "t",
                &with(
                    sh("trap 'stty size' WINCH; echo up; until read line; do :; done; echo got $line; exit 5"),
                    tty,
                ),
                &streams,
            )
            .await;
        let mut open = streams.open().await;
        let _ = self.start("t").await;
        let mut up = [0; 4];
        open.stdout.read_exact(&mut up).await.unwrap();
        let resize = ResizeTerminalRequest {
            container_id: "t".into(),
            rows: 5,
            columns: 6,
            ..Default::default()
        };
        let resized = self
            .agent
            .resize_terminal(context(), &resize)
            .await
            .map(drop)
            .map_err(text);
        self.check("resized", resized.is_ok(), &resized);
        let exec = self.exec("t", "x", &json!({"terminal": true, "args": ["/bin/sh", "-c", "tty; stty size < /dev/pts/0"]}), b"").await;
        self.check(
            "exec with a terminal",
            exec.stdout.replace('\r', "") == "/dev/pts/1\n5 6",
            &exec,
        );
        open.stdin.write_all(b"words\n").await.unwrap();
        let end = self.wait("t", "").await;
        let mut rest = String::new();
        open.stdout.read_to_string(&mut rest).await.unwrap();
        self.check(
            "a line through the terminal",
            end.exit_status == 5 && rest.contains("got words") && rest.contains("5 6"),
            &(rest, end),
        );
        let _ = self.delete("t").await;
    }
}

fn text(e: ttrpc::Error) -> String {
    match e {
        ttrpc::Error::RpcStatus(s) => s.message,
        other => other.to_string(),
    }
}
