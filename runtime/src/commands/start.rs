//! `start`.

use std::process::ExitCode;

use super::Context;
use crate::{
    cli::Start,
    control::{Control, Request},
    error::{self, CommandError},
    hooks,
    monitor::{HostHooks, hook_state},
    state::{ContainerId, StateDir, Status},
};

/// Lets a created container's program run.
pub(super) fn run(args: &Start, context: &Context) -> Result<ExitCode, CommandError> {
    let id = ContainerId::parse(&args.id)?;
    let dir = StateDir::open(&context.root, &id)?;
    match dir.state()?.status {
        Status::Created => {}
        Status::Stopped => {
            return Err(CommandError::Refused(
                "cannot start a container that has stopped".into(),
            ));
        }
        Status::Running => {
            return Err(CommandError::Refused(
                "cannot start an already running container".into(),
            ));
        }
        other => {
            let text = format!("cannot start a container in the {other} state");
            return Err(CommandError::Refused(text));
        }
    }
    Control::connect(dir.path())?.order(&Request::Start)?;
    after_start(context, &id)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the hooks of the moment after `start`. What fails in them is a warning: the container runs.
pub(super) fn after_start(context: &Context, id: &ContainerId) -> Result<(), CommandError> {
    let dir = StateDir::open(&context.root, id)?;
    let lists = HostHooks::load(dir.path()).map_err(|source| CommandError::Hooks {
        path: dir.path().to_owned(),
        source,
    })?;
    if lists.poststart.is_empty() {
        return Ok(());
    }
    let state = dir.state()?;
    let told = hook_state(&state, Status::Running);
    for failure in hooks::run_all("poststart", &lists.poststart, &told, &state.bundle) {
        context.log.warning(&error::message(&failure));
    }
    Ok(())
}
