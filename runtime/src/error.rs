//! The edge: every error of a command becomes one message and one exit status, here and nowhere else.
//!
//! Contract: the message is the chain of steps and causes joined by `: `, with runc's words in front where runc has
//! some (`caisson create failed: ...`). It is printed once, by `main`.
//! Not here: what can go wrong (each module's own enum), where the line goes (`log.rs`).

use std::{error, io, path::PathBuf, process::ExitCode};

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::{
    bundle::BundleError,
    cgroup::CgroupError,
    cli::Command,
    commands::{exec::ExecCommandError, launch::LaunchError, ps::PsError, update::UpdateError},
    config::ConfigError,
    control::ControlError,
    hooks::HookError,
    log::LogError,
    signals::SignalError,
    sizing::SizingError,
    state::StateError,
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
    /// A result could not be put into words.
    #[error("encode the result")]
    Json(#[source] serde_json::Error),
    /// There is no container.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// There is no further process in a container.
    #[error(transparent)]
    Exec(#[from] ExecCommandError),
    /// The container's monitor refused, failed or is gone.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The container is in the wrong state; runc's words.
    #[error("{0}")]
    Refused(String),
    /// The list of hooks cannot be read.
    #[error("read the hooks in {path}", path = path.display())]
    Hooks {
        /// The state directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A monitor cannot be killed.
    #[error("kill process {pid}")]
    Kill {
        /// Its pid.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// A process's end cannot be waited for.
    #[error("wait for the end of the holder of {path}", path = path.display())]
    Wait {
        /// The lock it holds.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
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
    /// `ps` cannot show processes.
    #[error(transparent)]
    Ps(#[from] PsError),
    /// `update` does not understand what is asked.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// systemd does not hear it.
    #[error("tell the notify socket")]
    Notify(#[source] io::Error),
    /// Not yet.
    #[error("{0} is not supported: the state of a virtual machine cannot be saved yet")]
    Checkpoint(&'static str),
    /// `check` found something missing and has said so.
    #[error("this host cannot run caisson")]
    HostUnfit,
}

/// How a command's failure is told: the words before the message, and the exit status. Both are runc's.
pub fn framing(command: &Command) -> (&'static str, ExitCode) {
    match command {
        Command::Create(_) => ("caisson create failed: ", ExitCode::FAILURE),
        Command::Run(_) => ("caisson run failed: ", ExitCode::FAILURE),
        // A caller must be able to tell it from the status of the command that it wanted to run.
        Command::Exec(_) => ("exec failed: ", ExitCode::from(255)),
        _ => ("", ExitCode::FAILURE),
    }
}

/// A command line that was not understood.
#[derive(Debug)]
pub struct Misuse {
    /// What is wrong with it, in runc's words.
    pub message: String,
    /// The command that it names, if it got that far.
    pub command: Option<String>,
    /// runc's exit status.
    pub status: ExitCode,
}

/// How many words each command takes, as runc says it.
const ARGUMENTS: &[(&str, &str)] = &[
    ("create", "exactly 1"),
    ("delete", "exactly 1"),
    ("events", "exactly 1"),
    ("exec", "a minimum of 1"),
    ("kill", "a minimum of 1"),
    ("pause", "exactly 1"),
    ("ps", "a minimum of 1"),
    ("resume", "exactly 1"),
    ("run", "exactly 1"),
    ("start", "exactly 1"),
    ("state", "exactly 1"),
    ("update", "exactly 1"),
];

/// Says what is wrong with a command line.
pub fn misuse(error: &clap::Error) -> Misuse {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        Some(ContextValue::Strings(all)) => all.first().map_or("", String::as_str),
        _ => "",
    };
    let command = command_of(error);
    let arguments = ARGUMENTS
        .iter()
        .find(|(name, _)| command.as_deref() == Some(name));
    let argument = context(ContextKind::InvalidArg);
    let flag = argument
        .split([' ', '='])
        .next()
        .unwrap_or_default()
        .trim_start_matches('-');
    let message = match (error.kind(), arguments) {
        (ErrorKind::UnknownArgument, _) if argument.starts_with('-') => {
            format!("flag provided but not defined: -{flag}")
        }
        (ErrorKind::UnknownArgument | ErrorKind::MissingRequiredArgument, Some((name, count))) => {
            format!("caisson: \"{name}\" requires {count} argument(s)")
        }
        (ErrorKind::InvalidSubcommand, _) => {
            format!(
                "No help topic for '{}'",
                context(ContextKind::InvalidSubcommand)
            )
        }
        (ErrorKind::InvalidValue, _) if context(ContextKind::InvalidValue).is_empty() => {
            format!("flag needs an argument: -{flag}")
        }
        _ => first_line(&error.to_string()),
    };
    let unknown = error.kind() == ErrorKind::InvalidSubcommand;
    let status = if unknown {
        ExitCode::from(3)
    } else {
        ExitCode::FAILURE
    };
    Misuse {
        message,
        command,
        status,
    }
}

/// The command in clap's usage line, `Usage: caisson state <container-id>`.
fn command_of(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::StyledStr(usage)) = error.get(ContextKind::Usage) else {
        return None;
    };
    let usage = usage.to_string();
    let word = usage.split_whitespace().nth(2)?;
    word.starts_with(|c: char| c.is_ascii_lowercase())
        .then(|| word.to_owned())
}

/// clap's message without its label and its hints.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
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

    #[test]
    fn command_lines_are_refused_in_runcs_words() {
        use clap::Parser;
        let refusal = |line: &str| {
            let error = crate::cli::Cli::try_parse_from(line.split_whitespace()).unwrap_err();
            misuse(&error)
        };
        for (line, wanted) in [
            ("caisson --foo", "flag provided but not defined: -foo"),
            (
                "caisson create --foo=3 x",
                "flag provided but not defined: -foo",
            ),
            ("caisson create -x c", "flag provided but not defined: -x"),
            ("caisson foo", "No help topic for 'foo'"),
            (
                "caisson state",
                "caisson: \"state\" requires exactly 1 argument(s)",
            ),
            ("caisson --root", "flag needs an argument: -root"),
            (
                "caisson state a b",
                "caisson: \"state\" requires exactly 1 argument(s)",
            ),
            (
                "caisson create --preserve-fds x c",
                "invalid value 'x' for '--preserve-fds <N>': invalid digit found in string",
            ),
        ] {
            assert_eq!(refusal(line).message, wanted, "{line}");
        }
        let unknown = refusal("caisson foo");
        assert_eq!((unknown.status, unknown.command), (ExitCode::from(3), None));
        let short = refusal("caisson --debug kill --all");
        assert_eq!(
            (short.status, short.command.as_deref()),
            (ExitCode::FAILURE, Some("kill"))
        );
        assert_eq!(
            short.message,
            "caisson: \"kill\" requires a minimum of 1 argument(s)"
        );
    }
}
