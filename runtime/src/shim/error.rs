//! The edge: every error of a task call becomes one ttrpc status, here and nowhere else.
//!
//! Contract: the message is the chain of steps and causes joined by `: `. The code tells containerd what it must know to
//! go on: that something is not there (any more), is there already, or is in the wrong state.

use std::io;

use containerd_shim_protos::ttrpc::{self, Code, get_status};

use super::{
    options::OptionsError, order::OrderError, pod::RoleError, rootfs::RootfsError,
    stdio::StdioError,
};
use crate::{
    agent::{AgentError, RefusalKind},
    boot::StartError,
    bundle::BundleError,
    cgroup::CgroupError,
    config::{AnnotationError, ConfigError},
    disks::DiskError,
    hooks::HookError,
    network::NetworkError,
    sandbox::{BootError, SandboxError},
    share::ShareError,
    sizing::SizingError,
    state::StateError,
    supervision::SupervisionError,
    update::ApplyError,
};

/// Why a task call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TaskError {
    #[error("no such container {0}")]
    NoContainer(String),
    #[error("no such process {0}")]
    NoProcess(String),
    #[error("process already finished")]
    Finished,
    #[error("{0} exists already")]
    Exists(String),
    #[error("{0} is still running")]
    Running(String),
    #[error("{0} is not a request that this shim can understand")]
    Nonsense(&'static str),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("no such sandbox {0}")]
    NoSandbox(String),
    #[error("sandbox {0} is not running")]
    NotRunning(String),
    #[error("this shim serves another sandbox than {0}")]
    OtherSandbox(String),
    #[error(transparent)]
    Id(#[from] StateError),
    #[error(transparent)]
    Order(#[from] OrderError),
    #[error(transparent)]
    Role(#[from] RoleError),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Sizing(#[from] SizingError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Supervision(#[from] SupervisionError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Update(#[from] ApplyError),
    #[error("write the guest's specification")]
    Spec(#[source] serde_json::Error),
    #[error("{step}")]
    Host {
        step: &'static str,
        source: io::Error,
    },
    #[error("the server is ending")]
    Ending,
}

/// A step on the host that failed.
pub(super) fn host(step: &'static str) -> impl Fn(io::Error) -> TaskError {
    move |source| TaskError::Host { step, source }
}

impl TaskError {
    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess(_) | Self::NoSandbox(_) | Self::Finished => {
                Code::NOT_FOUND
            }
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Running(_) | Self::NotRunning(_) => Code::FAILED_PRECONDITION,
            Self::Nonsense(_) | Self::OtherSandbox(_) | Self::Id(_) | Self::Role(_) => {
                Code::INVALID_ARGUMENT
            }
            Self::Order(_)
            | Self::Bundle(_)
            | Self::Sizing(_)
            | Self::Update(ApplyError::Update(_)) => Code::INVALID_ARGUMENT,
            Self::Update(ApplyError::Sandbox(error)) => sandbox_code(error),
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Ending => Code::UNAVAILABLE,
            Self::Sandbox(error) => sandbox_code(error),
            _ => Code::UNKNOWN,
        }
    }
}

fn sandbox_code(error: &SandboxError) -> Code {
    match error {
        SandboxError::Refused(_) => Code::FAILED_PRECONDITION,
        SandboxError::NotFound(_) => Code::NOT_FOUND,
        SandboxError::Exists(_) => Code::ALREADY_EXISTS,
        SandboxError::Agent(AgentError::Refused { kind, .. }) => match kind {
            RefusalKind::Invalid => Code::INVALID_ARGUMENT,
            RefusalKind::NotFound => Code::NOT_FOUND,
            RefusalKind::Exists => Code::ALREADY_EXISTS,
            RefusalKind::State => Code::FAILED_PRECONDITION,
            RefusalKind::Failed => Code::UNKNOWN,
        },
        SandboxError::Agent(_)
        | SandboxError::Ended(_)
        | SandboxError::Vmm(_)
        | SandboxError::Stats(_)
        | SandboxError::Table(_)
        | SandboxError::Growth(_)
        | SandboxError::NotTaken(_)
        | SandboxError::HugePages { .. }
        | SandboxError::Plug(_)
        | SandboxError::NoSlot(_)
        | SandboxError::ReadOnly(_)
        | SandboxError::Disk { .. }
        | SandboxError::Streams
        | SandboxError::Ports(_)
        | SandboxError::Told(_)
        | SandboxError::NotHere(_)
        | SandboxError::Holder(_) => Code::UNKNOWN,
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(get_status(error.code(), crate::error::message(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sandbox::{Event, Refused},
        state::Status,
    };

    fn status(error: TaskError) -> (Code, String) {
        match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => unreachable!("{other}"),
        }
    }

    #[test]
    fn containerd_learns_what_it_must_know_to_go_on() {
        assert_eq!(status(TaskError::Finished).0, Code::NOT_FOUND);
        assert_eq!(
            status(TaskError::Exists("c".into())).0,
            Code::ALREADY_EXISTS
        );
        assert_eq!(
            status(TaskError::Unsupported("checkpoint")).0,
            Code::UNIMPLEMENTED
        );
        let refused = Refused {
            from: Status::Stopped,
            event: Event::Start,
        };
        let (code, message) = status(SandboxError::from(refused).into());
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert_eq!(message, "cannot start a container that is stopped");
    }

    #[test]
    fn a_message_names_step_and_cause() {
        let error = host("open the log")(io::Error::from_raw_os_error(2));
        assert_eq!(
            status(error).1,
            "open the log: No such file or directory (os error 2)"
        );
    }
}
