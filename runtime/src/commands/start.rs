//! `start`.

use std::process::ExitCode;

use oci_spec::runtime::Hook;

use super::{Context, delete, systemd::NotifySocket};
use crate::{
    cli::Start,
    control::{Control, Request},
    error::CommandError,
    hooks,
    monitor::{HostHooks, hook_state},
    state::{ContainerId, State, StateDir, StateError, Status},
};

/// Lets a created container's program run.
pub(super) fn run(args: &Start, context: &Context) -> Result<ExitCode, CommandError> {
    let id = ContainerId::parse(&args.id)?;
    let dir = StateDir::open(&context.root, &id)?;
    let state = dir.state()?;
    match state.status {
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
    // Read before the order: a short-lived container may be deleted before the answer is here.
    let hooks = poststart_hooks(&dir)?;
    Control::connect(dir.path())?.order(&Request::Start)?;
    let path = dir.path().to_owned();
    after_start(context, dir, &state, &hooks)?;
    if let Some(socket) = NotifySocket::of_caller() {
        let told = socket.pass_on(&path, Some(state.pid));
        told.map_err(CommandError::Notify)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The same after `run`, which orders the start with the creation.
pub(super) fn after_run(context: &Context, id: &ContainerId) -> Result<(), CommandError> {
    let dir = match StateDir::open(&context.root, id) {
        // Its end was quicker, and somebody has deleted it.
        Err(StateError::NotFound) => return Ok(()),
        other => other?,
    };
    let (state, hooks) = (dir.state()?, poststart_hooks(&dir)?);
    after_start(context, dir, &state, &hooks)
}

fn poststart_hooks(dir: &StateDir) -> Result<Vec<Hook>, CommandError> {
    let lists = HostHooks::load(dir.path()).map_err(|source| CommandError::Hooks {
        path: dir.path().to_owned(),
        source,
    })?;
    Ok(lists.poststart)
}

/// Runs the hooks of the moment after `start`. The first that fails is the end of the container.
fn after_start(
    context: &Context,
    dir: StateDir,
    state: &State,
    hooks: &[Hook],
) -> Result<(), CommandError> {
    let told = hook_state(state, Status::Running);
    let Err(failure) = hooks::run("poststart", hooks, &told, &state.bundle) else {
        return Ok(());
    };
    delete::kill_monitor(&dir, state)?;
    delete::destroy(context, dir)?;
    Err(failure.into())
}
