//! containerd's part in the life of a shim, in every form that it has had: what Debian's containerd 1.6 does not do.
//!
//! A [`Driver`] starts a shim as containerd does (`start` in the bundle, with flags, environment and standard input),
//! reads the answer as that containerd reads it, speaks ttrpc with the server and takes its events.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use caisson_tests::call::wait_for_exit;
use caisson_tests::case::runtime;
use caisson_tests::{Case, Outcome};
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_sync::{Events, create_events};
use containerd_shim_protos::ttrpc::{self, Client, Server, TtrpcContext};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use serde_json::Value;

use crate::daemon::shims;

/// containerd's namespace.
const NAMESPACE: &str = "default";

/// How long a call or an event may take.
const LIMIT: Duration = Duration::from_secs(120);

/// How long a shim may take to end.
const LAST: Duration = Duration::from_secs(20);

/// How a containerd starts a shim and reads its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Up to 1.7: the runtime's options on standard input, a bare address as the answer.
    Address,
    /// 2.0 to 2.2: the same input, JSON as the answer.
    Json,
    /// From 2.3 on: a message in, a message out.
    Message,
}

/// containerd for one bundle.
pub(crate) struct Driver<'c> {
    case: &'c Case,
    /// The bundle.
    dir: &'c Path,
    form: Form,
    id: String,
    client: Option<Client>,
    /// Both ends of the FIFO for the shim's log.
    _log: OwnedFd,
}

/// Where all shims of this process send their events, from before the first case to the end: a server of ttrpc's holds
/// its socket for longer than it says.
struct Inbox {
    address: String,
    topics: Mutex<mpsc::Receiver<String>>,
    _server: Server,
}

static INBOX: OnceLock<Inbox> = OnceLock::new();

struct Topics(Mutex<mpsc::Sender<String>>);

impl Events for Topics {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let topic = request.envelope.unwrap_or_default().topic;
        if let Ok(sender) = self.0.lock() {
            let _ = sender.send(topic);
        }
        Ok(Empty::default())
    }
}

impl Inbox {
    fn open() -> Self {
        let dir = std::env::temp_dir();
        let path = dir.join(format!("caisson-tests-{}.sock", std::process::id()));
        let address = format!("unix://{}", path.display());
        let (sender, topics) = mpsc::channel();
        let events = create_events(Arc::new(Topics(Mutex::new(sender))));
        let server = Server::new().bind(&address).expect("bind");
        let mut server = server.register_service(events);
        server.start().expect("serve events");
        Self {
            address,
            topics: Mutex::new(topics),
            _server: server,
        }
    }

    fn topics(&self) -> MutexGuard<'_, mpsc::Receiver<String>> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn inbox() -> &'static Inbox {
    INBOX.get_or_init(Inbox::open)
}

/// A case in which this process listens for events already.
pub(crate) fn begin() -> Case {
    inbox();
    fs::create_dir_all(sockets()).expect("directory");
    crate::daemon::begin()
}

impl<'c> Driver<'c> {
    /// containerd listens for events; no shim yet.
    pub(crate) fn new(case: &'c Case, dir: &'c Path, id: &str, form: Form) -> Self {
        // What another case has not waited for is not this one's.
        while inbox().topics().try_recv().is_ok() {}
        let fifo = dir.join("log");
        if !fifo.exists() {
            let made = rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RWXU);
            made.expect("FIFO");
        }
        let log = rustix::fs::open(&fifo, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        Self {
            case,
            dir,
            form,
            id: id.to_owned(),
            client: None,
            _log: log.expect("open the FIFO"),
        }
    }

    /// `start` with the runtime's options.
    pub(crate) fn call_start(&self, options: Option<&Any>) -> Outcome {
        let dir = self.case.dir();
        let grpc = dir.join("containerd.sock");
        let input = dir.join("input");
        fs::write(&input, self.input(options, &grpc)).expect("input");
        let call = self
            .case
            .program(program())
            .args(["-namespace", NAMESPACE, "-id", &self.id, "-address"])
            .args([grpc.as_os_str()])
            .args(["-publish-binary", "/usr/bin/containerd", "start"])
            .dir(self.dir)
            .stdin(fs::File::open(input).expect("input"))
            .env("GRPC_ADDRESS", &grpc)
            .env("NAMESPACE", NAMESPACE);
        let call = match self.form {
            Form::Address => call.env("MAX_SHIM_VERSION", "2"),
            Form::Json => call
                .env("MAX_SHIM_VERSION", "3")
                .env("SHIM_SOCKET_DIR", sockets()),
            Form::Message => return call.env("MAX_SHIM_VERSION", "3").finish(),
        };
        call.env("TTRPC_ADDRESS", &inbox().address).finish()
    }

    fn input(&self, options: Option<&Any>, grpc: &Path) -> Vec<u8> {
        let bytes = |any: &Any| any.write_to_bytes().expect("options");
        if self.form != Form::Message {
            return options.map(bytes).unwrap_or_default();
        }
        let params = BootstrapParams {
            instance_id: self.id.clone(),
            namespace: NAMESPACE.to_owned(),
            containerd_version: "2.3.0".to_owned(),
            containerd_ttrpc_address: inbox().address.clone(),
            containerd_grpc_address: grpc.to_string_lossy().into_owned(),
            socket_dir: Some(sockets().to_string_lossy().into_owned()),
            ..Default::default()
        };
        params.write_to_bytes().expect("parameters")
    }

    /// `delete`, as containerd calls it for a shim that is gone.
    pub(crate) fn call_delete(&self) -> Outcome {
        let grpc = self.case.dir().join("containerd.sock");
        self.case
            .program(program())
            .args(["-namespace", NAMESPACE, "-id", &self.id, "-address"])
            .args([grpc.as_os_str()])
            .args(["-publish-binary", "/usr/bin/containerd", "-bundle"])
            .args([self.dir.as_os_str(), "delete".as_ref()])
            .dir(self.dir)
            .finish()
    }

    /// The address in an answer, read as this containerd reads it.
    pub(crate) fn address(&self, answer: &[u8]) -> String {
        let (version, address, protocol) = match self.form {
            Form::Address => return String::from_utf8(answer.to_vec()).expect("text"),
            Form::Json => {
                let answer: Value = serde_json::from_slice(answer).expect("JSON");
                let text = |key: &str| answer[key].as_str().expect("text").to_owned();
                (
                    answer["version"].as_i64(),
                    text("address"),
                    text("protocol"),
                )
            }
            Form::Message => {
                let answer = BootstrapResult::parse_from_bytes(answer).expect("a message");
                (Some(answer.version.into()), answer.address, answer.protocol)
            }
        };
        assert_eq!((version, protocol.as_str()), (Some(3), "ttrpc"));
        let sockets = format!("unix://{}/", sockets().display());
        assert!(address.starts_with(&sockets), "{address}");
        address
    }

    /// Starts the shim and connects; answers with its address.
    pub(crate) fn start(&mut self, options: Option<&Any>) -> String {
        let outcome = self.call_start(options);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        let address = self.address(&outcome.stdout);
        self.client = Some(Client::connect(&address).expect("connect to the shim"));
        address
    }

    /// A call of the task service, under the name that this containerd has for it.
    pub(crate) fn task<A: Message>(&self, method: &str, question: &impl Message) -> A {
        let service = match self.form {
            Form::Address => "containerd.task.v2.Task",
            Form::Json | Form::Message => "containerd.task.v3.Task",
        };
        let answer = self.call(service, method, question);
        answer.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// A call of the sandbox service.
    pub(crate) fn sandbox<A: Message>(
        &self,
        method: &str,
        question: &impl Message,
    ) -> Result<A, ttrpc::Error> {
        self.call("containerd.runtime.sandbox.v1.Sandbox", method, question)
    }

    fn call<A: Message>(
        &self,
        service: &str,
        method: &str,
        question: &impl Message,
    ) -> Result<A, ttrpc::Error> {
        let request = ttrpc::Request {
            service: service.to_owned(),
            method: method.to_owned(),
            timeout_nano: i64::try_from(LIMIT.as_nanos()).expect("a time"),
            payload: question.write_to_bytes().expect("a question"),
            ..Default::default()
        };
        let answer = self.client.as_ref().expect("a shim").request(request)?;
        Ok(A::parse_from_bytes(&answer.payload).expect("an answer"))
    }

    /// The topic of the next event.
    pub(crate) fn topic(&self) -> String {
        let topics = inbox().topics();
        topics.recv_timeout(LIMIT).expect("an event")
    }
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        self.client = None;
        for shim in shims() {
            Pid::from_raw(shim.pid).map(|pid| wait_for_exit(pid, LAST));
        }
    }
}

/// Where sockets go if a containerd says so. A case's own directory would be too long a path for a socket.
fn sockets() -> PathBuf {
    std::env::temp_dir().join(format!("s-{}", std::process::id()))
}

/// The shim of the runtime under test.
pub(crate) fn program() -> &'static str {
    match runtime().as_str() {
        "runc" => "containerd-shim-runc-v2",
        _ => "containerd-shim-caisson-v2",
    }
}
