//! The edge: every error of a command becomes one message and one exit status, here and nowhere else.
//!
//! Contract: the message is the chain of steps and causes joined by `: `, with runc's words in front where runc has
//! some (`caisson create failed: ...`). It is printed once, by `main`.
//! Not here: what can go wrong (each module's own enum), where the line goes (`log.rs`).

use std::{error, io};

use crate::{
    bundle::BundleError, cgroup::CgroupError, config::ConfigError, hooks::HookError, log::LogError,
    signals::SignalError, sizing::SizingError, state::StateError,
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The host's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The bundle or the command line that goes with it.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The size of the virtual machine.
    #[error(transparent)]
    Sizing(#[from] SizingError),
    /// The state directory, or a container's state forbids it.
    #[error(transparent)]
    State(#[from] StateError),
    /// The host's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A hook of the host's side.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A signal that cannot be meant.
    #[error(transparent)]
    Signal(#[from] SignalError),
    /// The log file.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A command line that means nothing.
    #[error("{0}")]
    Usage(String),
    /// `spec` found a file.
    #[error("File config.json exists. Remove it first")]
    SpecExists,
    /// A file or standard output could not be written.
    #[error("write {what}")]
    Write {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// `check` found something missing and has said so.
    #[error("this host cannot run caisson")]
    HostUnfit,
}

/// The whole chain of an error on one line: each step, then what caused it.
pub fn message(error: &dyn error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_step_and_cause_once() {
        let error = CommandError::Config(ConfigError::Read {
            path: "/c".into(),
            source: io::Error::from_raw_os_error(13),
        });
        assert_eq!(
            message(&error),
            "read the configuration file /c: Permission denied (os error 13)"
        );
    }
}
