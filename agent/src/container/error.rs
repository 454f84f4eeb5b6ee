//! Why a call on a container failed: each step's own error, and what its state does not allow.

use super::State;
use crate::cgroup::CgroupError;
use crate::disks::DiskError;
use crate::guest::GuestError;
use crate::huge_pages::HugePageError;
use crate::network::NetworkError;
use crate::plan::PlanError;
use crate::process::ProcessError;
use crate::volumes::VolumeError;
use std::io;

/// Why a call on a container failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    HugePages(#[from] HugePageError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("connect the standard streams")]
    Streams(#[source] io::Error),
    #[error("listen for the host")]
    Listening(#[source] io::Error),
    #[error("listen on the notify socket")]
    Notify(#[source] io::Error),
    #[error("cannot {action} a container that is {state}")]
    State { action: &'static str, state: State },
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    ExecPaused,
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    #[error("container with id exists: {0:?}")]
    ContainerExists(String),
    #[error("process {0:?} does not exist")]
    NoProcess(String),
    #[error("process with id exists: {0:?}")]
    ProcessExists(String),
    #[error("container id {0:?} is not valid")]
    BadId(String),
}
