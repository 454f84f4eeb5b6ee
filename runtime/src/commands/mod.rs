//! One function for each command: what was asked in, an exit status or an error out.
//!
//! Contract: a command prints its result on standard output and nothing else; errors and warnings go to the log.
//! Commands that only look (`list`, `metrics`, `state`, `spec`, `features`, `check`) start no thread and no event loop.

use std::{
    env,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use crate::{
    cli::{Command, Global},
    control::{Control, ControlError},
    error::CommandError,
    log::Log,
    rootless,
    state::StateDir,
};

mod check;
mod create;
mod delete;
mod events;
pub(crate) mod exec;
mod features;
mod freeze;
mod kill;
mod kvm_api;
pub(crate) mod launch;
mod list;
mod metrics;
pub(crate) mod ps;
mod run;
mod scrape;
mod spec;
mod start;
mod state;
mod systemd;
mod trace;
pub(crate) mod update;

/// What every command is given.
#[derive(Debug)]
pub struct Context {
    /// Holds a directory for each container.
    pub root: PathBuf,
    /// Where messages go.
    pub log: Log,
    /// As given.
    pub global: Global,
}

impl Context {
    /// Resolves the global options.
    pub fn new(global: Global, log: Log) -> Self {
        let runtime_dir = env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
        let root = match (&global.root, runtime_dir) {
            (Some(root), _) => root.clone(),
            (None, Some(dir)) if rootless::keeps_state_of_its_own() => {
                PathBuf::from(dir).join("caisson")
            }
            (None, _) => PathBuf::from("/run/caisson"),
        };
        Self { root, log, global }
    }
}

/// Carries out a command.
pub fn dispatch(command: Command, context: &Context) -> Result<ExitCode, CommandError> {
    match command {
        Command::Create(args) => create::run(&args, context),
        Command::Delete(args) => delete::run(&args, context),
        Command::Exec(args) => exec::run(&args, context),
        Command::Kill(args) => kill::run(&args, context),
        Command::Run(args) => run::run(&args, context),
        Command::Start(args) => start::run(&args, context),
        Command::List(args) => list::list(&args, context),
        Command::Spec(args) => spec::spec(&args),
        Command::State(args) => state::state(&args, context),
        Command::Pause(args) => freeze::pause(&args, context),
        Command::Resume(args) => freeze::resume(&args, context),
        Command::Ps(args) => ps::run(&args, context),
        Command::Events(args) => events::run(&args, context),
        Command::Metrics(args) => metrics::metrics(&args, context),
        Command::Trace(args) => trace::trace(&args, context),
        Command::Update(args) => update::run(&args, context),
        Command::Checkpoint(_) => Err(CommandError::Checkpoint("checkpoint")),
        Command::Restore(_) => Err(CommandError::Checkpoint("restore")),
        Command::Features => features::features(),
        Command::Check => check::check(context),
    }
}

/// Asks a container's monitor. One that has ended is a refusal in the words of `otherwise`.
fn ask<T>(
    dir: &StateDir,
    otherwise: &str,
    patience: Duration,
    question: impl FnOnce(Control) -> Result<T, ControlError>,
) -> Result<T, CommandError> {
    let answer = Control::connect(dir.path()).and_then(|control| {
        control.set_patience(patience)?;
        question(control)
    });
    match answer {
        Ok(answer) => Ok(answer),
        Err(ControlError::Failed(words)) => Err(CommandError::Refused(words)),
        // It ended while it was being asked.
        Err(_) if !dir.is_alive()? => Err(CommandError::Refused(otherwise.to_owned())),
        Err(error) => Err(error.into()),
    }
}

/// Writes a command's result to standard output, whole.
fn print(text: &str) -> Result<ExitCode, CommandError> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|source| CommandError::Write {
            what: "standard output".into(),
            source,
        })?;
    Ok(ExitCode::SUCCESS)
}
