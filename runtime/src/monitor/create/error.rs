//! Why a container was not created.

use std::io;

use crate::{
    boot::StartError,
    bundle::BundleError,
    cgroup::CgroupError,
    config::{AnnotationError, ConfigError},
    control::ControlError,
    disks::DiskError,
    identities::IdentityError,
    log::LogError,
    network::NetworkError,
    packet::PacketError,
    sandbox::{BootError, SandboxError},
    share::ShareError,
    sizing::SizingError,
    state::StateError,
    supervision::SupervisionError,
    terminal::TerminalError,
    view::ViewError,
    vmm::VmmError,
};

/// Why a container was not created.
#[derive(Debug, thiserror::Error)]
pub(in crate::monitor) enum CreateError {
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
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("start the virtual machine")]
    Kvm(#[from] VmmError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    View(#[from] ViewError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Supervision(#[from] SupervisionError),
    #[error("unable to start container process")]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("write the guest's specification")]
    Spec(#[source] serde_json::Error),
    #[error("report to the caller")]
    Report(#[from] PacketError),
    #[error("{step}")]
    Host {
        step: &'static str,
        source: io::Error,
    },
    #[error("the caller is gone")]
    Abandoned,
}
