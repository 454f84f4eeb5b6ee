//! One function for each command: what was asked in, an exit status or an error out.
//!
//! Contract: a command prints its result on standard output and nothing else; errors and warnings go to the log.
//! Commands that only look (`list`, `state`, `spec`, `features`, `check`) start no thread and no event loop.

use std::{env, path::PathBuf, process::ExitCode};

use crate::{
    cli::{Command, Global, Rootless},
    error::CommandError,
    log::Log,
};

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
        let root = global
            .root
            .clone()
            .unwrap_or_else(|| default_root(rootless(&global)));
        Self { root, log, global }
    }
}

/// Carries out a command.
pub fn dispatch(command: Command, context: &Context) -> Result<ExitCode, CommandError> {
    let _ = context;
    match command {
        Command::Create(_)
        | Command::Delete(_)
        | Command::Exec(_)
        | Command::Kill(_)
        | Command::Run(_)
        | Command::Start(_)
        | Command::Monitor(_) => Err(CommandError::Usage("not built yet".into())),
        Command::List(_)
        | Command::Spec(_)
        | Command::State(_)
        | Command::Features
        | Command::Check => Ok(ExitCode::SUCCESS),
    }
}

fn rootless(global: &Global) -> bool {
    match global.rootless {
        Rootless::True => true,
        Rootless::False => false,
        Rootless::Auto => !rustix::process::geteuid().is_root(),
    }
}

fn default_root(rootless: bool) -> PathBuf {
    let runtime_dir = env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    match (rootless, runtime_dir) {
        (true, Some(dir)) => PathBuf::from(dir).join("caisson"),
        _ => PathBuf::from("/run/caisson"),
    }
}
