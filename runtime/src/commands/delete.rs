//! `delete`, and the removal of what a container leaves behind: the same for every way to its end.

use std::process::ExitCode;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::Context;
use crate::{
    boot::{VM_LOCK, wait_for_vmm},
    cli::Delete,
    error::{self, CommandError},
    hooks,
    monitor::{HostHooks, Supervised, hook_state},
    state::{ContainerId, State, StateDir, StateError, Status},
};

/// Removes a container; by force also one that runs, and one that does not exist.
pub(super) fn run(args: &Delete, context: &Context) -> Result<ExitCode, CommandError> {
    let dir = match ContainerId::parse(&args.id).and_then(|id| StateDir::open(&context.root, &id)) {
        Err(StateError::NotFound) if args.force => return Ok(ExitCode::SUCCESS),
        other => other?,
    };
    let state = dir.state()?;
    match state.status {
        Status::Stopped => {}
        Status::Created => kill_monitor(&dir, &state)?,
        _ if args.force => kill_monitor(&dir, &state)?,
        status => {
            let id = &args.id;
            let text = format!("cannot delete container {id} that is not stopped: {status}");
            return Err(CommandError::Refused(text));
        }
    }
    destroy(context, dir)?;
    Ok(ExitCode::SUCCESS)
}

/// Kills a container's monitor, which takes the virtual machine along.
pub(super) fn kill_monitor(dir: &StateDir, state: &State) -> Result<(), CommandError> {
    let failed = |source| CommandError::Kill {
        pid: state.pid,
        source,
    };
    let Some(pid) = i32::try_from(state.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(errno) => return Err(failed(errno.into())),
    };
    // The lock is held by the process that wrote its pid: held now, the descriptor is that process and no other.
    if !dir.is_alive()? {
        return Ok(());
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Removes everything of a container that has ended or is just ending.
pub(super) fn destroy(context: &Context, dir: StateDir) -> Result<(), CommandError> {
    dir.wait_until_dead()?;
    wait_for_vmm(dir.path()).map_err(|source| CommandError::Wait {
        path: dir.path().join(VM_LOCK),
        source,
    })?;
    let state = dir.state()?;
    // Hooks that cannot be read must not keep a container from being removed.
    let lists = HostHooks::load(dir.path()).unwrap_or_default();
    state.cgroup_note().clear()?;
    let network = crate::network::clear(dir.path());
    dir.remove()?;
    if let Err(error) = network {
        // Nobody else's business: the namespace is its maker's, and he removes it.
        let text = format!("clear the network namespace: {error}");
        context.log.warning(&text);
    }
    if !lists.poststop.is_empty() {
        let told = hook_state(&state, Status::Stopped);
        for failure in hooks::run_all("poststop", &lists.poststop, &told, &state.bundle) {
            context.log.warning(&error::message(&failure));
        }
    }
    Ok(())
}

/// Ends a monitor that is not wanted any more, and removes what its container (if it got that far) has left.
pub(super) fn end_monitor(context: &Context, monitor: Supervised, id: Option<&ContainerId>) {
    if let Some(dir) = id.and_then(|id| StateDir::open(&context.root, id).ok())
        && let Ok(state) = dir.state()
        && !matches!(state.status, Status::Creating | Status::Stopped)
    {
        // One that is still creating ends by itself and in good order when its caller hangs up.
        let _ = kill_monitor(&dir, &state);
    }
    // The error that led here is the one to report.
    let _ = monitor.abandon();
    if let Some(dir) = id.and_then(|id| StateDir::open(&context.root, id).ok()) {
        let _ = destroy(context, dir);
    }
}
