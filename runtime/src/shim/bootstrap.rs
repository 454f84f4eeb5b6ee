//! `start`: a server for a new sandbox, or the address of the one that a pod has already.
//!
//! Contract: the answer is in the form that the calling containerd reads. Up to 1.7 that is the bare address; 2.0 to 2.2
//! say that they know version 3 of the task service (`MAX_SHIM_VERSION`) and read JSON; from 2.3 on parameters come as a
//! `BootstrapParams` message on standard input and the answer is a `BootstrapResult`. The server listens before the
//! answer is given: whoever has the address can connect. The bundle's file `address` holds it for a containerd that
//! restarts, and for `delete`.
//! The address is a function of containerd's own, the namespace and the sandbox, so that a pod's containers find it.
//! Not here: what the server does (`server.rs`).

use std::{
    env, fs, io,
    os::unix::{
        fs::DirBuilderExt,
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel},
    protobuf::{Enum, Message, well_known_types::any::Any},
};
use sha2::{Digest, Sha256};

use super::{
    args::Args,
    pod::{self, Role, RoleError},
};

/// The environment variable with containerd's ttrpc socket, to which events go.
pub(super) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// The environment variable with the newest version of the task service that containerd knows.
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";

/// The environment variable with the directory for sockets, if not [`SOCKETS`]: containerd 2.2's way to say so.
const SOCKET_DIRECTORY: &str = "SHIM_SOCKET_DIR";

/// Where containerd's shims have their sockets: short, because a socket's path has at most 107 bytes.
const SOCKETS: &str = "/run/containerd/s";

/// The file in a bundle that holds the server's address.
pub(super) const ADDRESS: &str = "address";

/// The file in a bundle with the runtime's options, for a sandbox of the Sandbox API: they come with `start` alone.
pub(super) const OPTIONS: &str = "options";

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub(super) enum BootstrapError {
    #[error("the bootstrap parameters are for {0}")]
    OtherParams(String),
    #[error("{step} {path}", path = path.display())]
    Path {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Role(#[from] RoleError),
    #[error("sandbox {0} is not running")]
    NoSandbox(String),
    #[error("a shim for {0} is running already")]
    Running(String),
    #[error("start the server")]
    Spawn(#[source] io::Error),
}

/// How containerd wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    Address,
    Json,
    Protobuf,
}

/// What containerd says beyond the command line.
#[derive(Debug, PartialEq)]
struct Call {
    reply: Reply,
    /// containerd's socket for events, if not in the environment.
    ttrpc_address: Option<String>,
    grpc_address: String,
    /// Where sockets go.
    sockets: PathBuf,
    /// Say more in the log.
    debug: bool,
    /// The runtime's options, if containerd has any.
    options: Option<Any>,
}

/// What the environment says.
#[derive(Debug, Default)]
struct Environment {
    newest: Option<String>,
    sockets: Option<String>,
}

impl Environment {
    fn read() -> Self {
        Self {
            newest: env::var(MAX_SHIM_VERSION).ok(),
            sockets: env::var(SOCKET_DIRECTORY)
                .ok()
                .filter(|dir| !dir.is_empty()),
        }
    }

    fn sockets(&self) -> PathBuf {
        self.sockets.as_deref().unwrap_or(SOCKETS).into()
    }
}

/// Answers with the address of a server for the container whose bundle is the working directory.
pub(super) fn start(args: &Args, input: &[u8]) -> Result<Vec<u8>, BootstrapError> {
    let call = call(args, input, &Environment::read())?;
    let bundle = Path::new("");
    let role = pod::role_at_start(bundle)?;
    let group = match &role {
        Role::Alone | Role::Sandbox => &args.id,
        Role::Member { sandbox } => sandbox,
    };
    let socket = call
        .sockets
        .join(socket_name(&call.grpc_address, &args.namespace, group));
    let address = format!("unix://{}", socket.display());
    if let Role::Member { sandbox } = &role {
        if UnixStream::connect(&socket).is_err() {
            return Err(BootstrapError::NoSandbox(sandbox.clone()));
        }
    } else {
        // The task service is told them again.
        if let Some(options) = &call.options
            && !bundle.join("config.json").exists()
        {
            let path = bundle.join(OPTIONS);
            // A message that was read is written.
            let bytes = options.write_to_bytes().unwrap_or_default();
            at("write", &path, fs::write(&path, bytes))?;
        }
        let listener = listen(&socket, &args.id)?;
        if let Err(error) = spawn(args, &call, &socket, listener) {
            // The error is the one to report.
            let _ = fs::remove_file(&socket);
            return Err(error);
        }
    }
    write_aside(&bundle.join(ADDRESS), &address)?;
    Ok(encode(call.reply, &address))
}

fn call(args: &Args, input: &[u8], said: &Environment) -> Result<Call, BootstrapError> {
    if let Some(params) = params(args, input)? {
        return Ok(Call {
            // An open enumeration: what is more talkative than `debug` is a smaller number.
            debug: args.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
            reply: Reply::Protobuf,
            ttrpc_address: Some(params.containerd_ttrpc_address).filter(|a| !a.is_empty()),
            grpc_address: params.containerd_grpc_address,
            options: runtime_options(
                params
                    .extensions
                    .into_iter()
                    .flat_map(|e| e.value.into_option()),
            ),
            sockets: params
                .socket_dir
                .filter(|dir| !dir.is_empty())
                .map_or_else(|| said.sockets(), PathBuf::from),
        });
    }
    let newest = said.newest.as_deref();
    let knows_v3 = newest.and_then(|version| version.parse::<u32>().ok()) >= Some(3);
    Ok(Call {
        debug: args.debug,
        reply: if knows_v3 {
            Reply::Json
        } else {
            Reply::Address
        },
        ttrpc_address: None,
        grpc_address: args.address.clone(),
        sockets: said.sockets(),
        options: runtime_options(Any::parse_from_bytes(input)),
    })
}

/// The first that is a runtime's; the others are for others.
fn runtime_options(all: impl IntoIterator<Item = Any>) -> Option<Any> {
    all.into_iter()
        .find(|any| any.type_url.ends_with(".Options"))
}

/// Tells the parameters of containerd 2.3 from the runtime options that its predecessors write: these are an `Any`,
/// whose two fields have the same numbers as the parameters' first two, and nothing else.
fn params(args: &Args, input: &[u8]) -> Result<Option<BootstrapParams>, BootstrapError> {
    if input.is_empty() {
        return Ok(None);
    }
    // Options need not be valid as parameters: their second field is bytes.
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    if params.instance_id == args.id && params.namespace == args.namespace {
        return Ok(Some(params));
    }
    let names_only = BootstrapParams {
        instance_id: params.instance_id.clone(),
        namespace: params.namespace.clone(),
        ..Default::default()
    };
    if params == names_only {
        return Ok(None);
    }
    Err(BootstrapError::OtherParams(params.instance_id))
}

/// As containerd's own shims name their sockets.
fn socket_name(grpc_address: &str, namespace: &str, group: &str) -> String {
    let digest = Sha256::digest(format!("{grpc_address}/{namespace}/{group}"));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Listens at `socket`. One that nobody listens at any more is replaced.
fn listen(socket: &Path, id: &str) -> Result<UnixListener, BootstrapError> {
    if let Some(dir) = socket.parent() {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir);
        at("make the directory", dir, made)?;
    }
    match UnixListener::bind(socket) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                return Err(BootstrapError::Running(id.to_owned()));
            }
            at("remove", socket, fs::remove_file(socket))?;
            at("listen at", socket, UnixListener::bind(socket))
        }
        bound => at("listen at", socket, bound),
    }
}

/// Starts this program anew as the server. Its standard input is the socket; its log is the bundle's.
fn spawn(
    args: &Args,
    call: &Call,
    socket: &Path,
    listener: UnixListener,
) -> Result<(), BootstrapError> {
    // By its own path where it still has one: the kernel names a process after the file it was started from.
    let program = env::current_exe().map_err(BootstrapError::Spawn)?;
    let program = if program.exists() {
        program
    } else {
        "/proc/self/exe".into()
    };
    let mut command = Command::new(program);
    command
        .arg0("containerd-shim-caisson-v2")
        .args([
            "-namespace",
            &args.namespace,
            "-id",
            &args.id,
            "-address",
            &call.grpc_address,
        ])
        .arg("-socket")
        .arg(socket);
    if call.debug {
        command.arg("-debug");
    }
    if let Some(address) = &call.ttrpc_address {
        command.env(TTRPC_ADDRESS, address);
    }
    let child = command
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(BootstrapError::Spawn)?;
    // containerd goes last when memory runs out. A host that does not let us say so runs it all the same.
    let _ = yield_to_containerd(child.id());
    Ok(())
}

/// Makes the server die before containerd when memory runs out: one point above containerd's own score.
fn yield_to_containerd(server: u32) -> io::Result<()> {
    let parent = std::os::unix::process::parent_id();
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))?;
    let score = score.trim().parse::<i32>().unwrap_or(0);
    fs::write(
        format!("/proc/{server}/oom_score_adj"),
        score.saturating_add(1).min(1000).to_string(),
    )
}

/// A file that others read is never there in part.
fn write_aside(path: &Path, text: &str) -> Result<(), BootstrapError> {
    let aside = path.with_file_name(format!(".{ADDRESS}"));
    at("write", &aside, fs::write(&aside, text))?;
    at("rename", path, fs::rename(&aside, path))
}

fn encode(reply: Reply, address: &str) -> Vec<u8> {
    match reply {
        Reply::Address => address.as_bytes().to_vec(),
        Reply::Json => serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"})
            .to_string()
            .into_bytes(),
        Reply::Protobuf => {
            let result = BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            };
            // A message of texts always encodes.
            result.write_to_bytes().unwrap_or_default()
        }
    }
}

fn at<T>(step: &'static str, path: &Path, result: io::Result<T>) -> Result<T, BootstrapError> {
    result.map_err(|source| BootstrapError::Path {
        step,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args {
            id: "c1".into(),
            namespace: "k8s.io".into(),
            address: "/run/containerd/containerd.sock".into(),
            ..Default::default()
        }
    }

    #[test]
    fn every_containerd_is_answered_in_its_own_form() {
        let said = |newest: Option<&str>| Environment {
            newest: newest.map(str::to_owned),
            sockets: None,
        };
        let reply = |input: &[u8], newest| call(&args(), input, &said(newest)).unwrap().reply;
        assert_eq!(reply(b"", None), Reply::Address, "1.6");
        assert_eq!(reply(b"", Some("2")), Reply::Address, "1.7");
        assert_eq!(reply(b"", Some("3")), Reply::Json, "2.0");
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: vec![10, 1, 0xff],
            ..Default::default()
        };
        assert_eq!(
            reply(&options.write_to_bytes().unwrap(), None),
            Reply::Address
        );
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "unix:///t".into(),
            socket_dir: Some("/s".into()),
            log_level: LogLevel::LOG_LEVEL_TRACE.into(),
            ..Default::default()
        };
        let called = call(&args(), &params.write_to_bytes().unwrap(), &said(Some("3"))).unwrap();
        assert!(called.debug);
        assert_eq!(called.reply, Reply::Protobuf);
        assert_eq!(called.ttrpc_address.as_deref(), Some("unix:///t"));
        assert_eq!(called.sockets, Path::new("/s"));
    }

    #[test]
    fn parameters_for_somebody_else_are_refused() {
        let params = BootstrapParams {
            instance_id: "c2".into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.0".into(),
            ..Default::default()
        };
        let bytes = params.write_to_bytes().unwrap();
        assert!(call(&args(), &bytes, &Environment::default()).is_err());
    }

    #[test]
    fn containerd_may_choose_the_sockets_directory() {
        let said = Environment {
            newest: Some("3".into()),
            sockets: Some("/run/other/s".into()),
        };
        let called = call(&args(), b"", &said).unwrap();
        assert_eq!(called.sockets, Path::new("/run/other/s"));
        assert!(!called.debug);
    }

    #[test]
    fn answers_are_what_containerd_parses() {
        assert_eq!(encode(Reply::Address, "unix:///a"), b"unix:///a");
        let json: serde_json::Value =
            serde_json::from_slice(&encode(Reply::Json, "unix:///a")).unwrap();
        assert_eq!(json["version"], 3);
        assert_eq!(json["address"], "unix:///a");
        assert_eq!(json["protocol"], "ttrpc");
        let result =
            BootstrapResult::parse_from_bytes(&encode(Reply::Protobuf, "unix:///a")).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///a"));
    }

    #[test]
    fn a_socket_that_nobody_serves_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s/x");
        drop(listen(&socket, "c1").unwrap());
        let served = listen(&socket, "c1").unwrap();
        assert!(matches!(
            listen(&socket, "c1"),
            Err(BootstrapError::Running(_))
        ));
        drop(served);
    }

    #[test]
    fn sockets_of_different_sandboxes_differ_and_have_short_names() {
        let name = |ns, id| socket_name("/run/containerd/containerd.sock", ns, id);
        assert_eq!(name("default", "a").len(), 64);
        assert_ne!(name("default", "a"), name("k8s.io", "a"));
        assert_ne!(name("default", "a"), name("default", "b"));
    }
}
