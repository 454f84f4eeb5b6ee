//! `pause` and `resume`.

use std::{process::ExitCode, time::Duration};

use super::{Context, ask};
use crate::{
    cli::OneContainer,
    control::Request,
    error::CommandError,
    state::{ContainerId, StateDir, Status},
};

/// How long the monitor may take to answer; it gives the guest less.
const PATIENCE: Duration = Duration::from_secs(20);

/// Freezes all processes of a container.
pub(super) fn pause(args: &OneContainer, context: &Context) -> Result<ExitCode, CommandError> {
    let is_allowed = |status| matches!(status, Status::Created | Status::Running);
    change(
        args,
        context,
        &Request::Pause,
        is_allowed,
        "container not running",
    )
}

/// Lets them go on.
pub(super) fn resume(args: &OneContainer, context: &Context) -> Result<ExitCode, CommandError> {
    let is_allowed = |status| status == Status::Paused;
    change(
        args,
        context,
        &Request::Resume,
        is_allowed,
        "container not paused",
    )
}

/// Orders a change in the states that `is_allowed`; `otherwise` are runc's words in the others.
fn change(
    args: &OneContainer,
    context: &Context,
    request: &Request,
    is_allowed: impl Fn(Status) -> bool,
    otherwise: &'static str,
) -> Result<ExitCode, CommandError> {
    let dir = StateDir::open(&context.root, &ContainerId::parse(&args.id)?)?;
    if !is_allowed(dir.state()?.status) {
        return Err(CommandError::Refused(otherwise.into()));
    }
    ask(&dir, otherwise, PATIENCE, |control| control.order(request))?;
    Ok(ExitCode::SUCCESS)
}
