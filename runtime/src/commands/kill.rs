//! `kill`.

use std::{process::ExitCode, time::Duration};

use super::{Context, delete};
use crate::{
    cli::Kill,
    control::{Control, ControlError, Request},
    error::CommandError,
    signals,
    state::{ContainerId, StateDir, Status},
};

/// How long the monitor may take to answer; it gives the guest less.
const PATIENCE: Duration = Duration::from_secs(20);

/// Sends a signal to a container's init, or to all its processes.
pub(super) fn run(args: &Kill, context: &Context) -> Result<ExitCode, CommandError> {
    let id = ContainerId::parse(&args.id)?;
    let signal = signals::parse(&args.signal)?;
    let dir = StateDir::open(&context.root, &id)?;
    let state = dir.state()?;
    if state.status == Status::Stopped {
        // As runc: nothing is left of all processes, so nothing is missed.
        return if args.all {
            Ok(ExitCode::SUCCESS)
        } else {
            Err(not_running())
        };
    }
    match send(&dir, signal, args.all) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(ControlError::Failed(text)) => Err(CommandError::Refused(text)),
        // It ended while it was being asked.
        Err(_) if !dir.is_alive()? => Err(not_running()),
        // A monitor that cannot be asked any more still dies, and the virtual machine with it.
        Err(_) if signal == rustix::process::Signal::KILL.as_raw() => {
            delete::kill_monitor(&dir, &state)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error.into()),
    }
}

fn send(dir: &StateDir, signal: i32, all: bool) -> Result<(), ControlError> {
    let control = Control::connect(dir.path())?;
    control.set_patience(PATIENCE)?;
    control.order(&Request::Signal { signal, all })
}

fn not_running() -> CommandError {
    CommandError::Refused("container not running".into())
}
