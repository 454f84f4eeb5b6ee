//! `exec`.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
};

use oci_spec::runtime::{Capabilities, Capability, Process, Spec};
use serde::de::DeserializeOwned;

use super::{
    Context,
    launch::{LaunchError, write_pid_file},
    systemd::send_pidfd,
};
use crate::{
    bundle::{BundleError, Caller, capabilities},
    cli::Exec,
    control::{ControlError, attached},
    error::CommandError,
    exec::{self, ExecError, Order, Session, Stdio},
    forwarded::Signals,
    monitor::{Program, Report, Supervised, runtime},
    preserved::{self, PreservedError},
    state::{ContainerId, StateDir, StateError, Status},
    terminal::{self, Raw, TerminalError},
};

/// Why there was no process.
#[derive(Debug, thiserror::Error)]
pub enum ExecCommandError {
    /// The container's name or directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// What is asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Descriptors for the process.
    #[error(transparent)]
    Preserved(#[from] PreservedError),
    /// A file cannot be read.
    #[error("read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: serde_json::Error,
    },
    /// The caller's terminal.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    /// The combination of terminal, console socket and detaching.
    #[error(transparent)]
    Caller(#[from] BundleError),
    /// The process could not be started.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The process behind `--detach` could not be started, or its pid not be written.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A step on this side.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Runs one more process in a container.
pub(super) fn run(args: &Exec, context: &Context) -> Result<ExitCode, CommandError> {
    Ok(exec(args, context)?)
}

fn exec(args: &Exec, context: &Context) -> Result<ExitCode, ExecCommandError> {
    let id = ContainerId::parse(args.id())?;
    let dir = StateDir::open(&context.root, &id)?;
    let state = dir.state()?;
    match state.status {
        Status::Stopped => return Err(invalid("cannot exec in a stopped container")),
        Status::Paused if !args.ignore_paused => {
            return Err(invalid(
                "cannot exec in a paused container (use --ignore-paused to override)",
            ));
        }
        _ => {}
    }
    let preserved = preserved::take(0, args.preserve_fds)?;
    let mut process = match &args.process {
        Some(path) => read_json(path)?,
        None => {
            let spec = read_json::<Spec>(&state.bundle.join("config.json"))?;
            let (process, unknown) = from_command_line(args, spec)?;
            if !unknown.is_empty() {
                let names = unknown.join(" ");
                context.log.warning(&format!(
                    "ignoring unknown or unavailable capabilities: [{names}]"
                ));
            }
            process
        }
    };
    check(&process)?;
    let terminal = process.terminal().unwrap_or(false);
    crate::bundle::check_terminal(
        terminal,
        Caller {
            detach: args.detach,
            console_socket: args.console_socket.is_some(),
        },
    )?;
    let mut order = Order {
        dir: std::path::absolute(dir.path()).map_err(|source| ExecCommandError::Host {
            step: "find the state directory",
            source,
        })?,
        terminal,
        console_socket: args.console_socket.clone(),
        size: None,
        ignore_paused: args.ignore_paused,
    };
    if args.detach {
        detached(args, &order, &process, &id, preserved)
    } else {
        foreground(args, context, &mut order, &mut process, preserved)
    }
}

fn foreground(
    args: &Exec,
    context: &Context,
    order: &mut Order,
    process: &mut Process,
    preserved: Vec<OwnedFd>,
) -> Result<ExitCode, ExecCommandError> {
    let failed = |step| move |source| ExecCommandError::Host { step, source };
    let runtime = runtime().map_err(failed("start an event loop"))?;
    let _inside = runtime.enter();
    let signals = Signals::catch().map_err(failed("catch signals"))?;
    let raw = order.terminal.then(Raw::enter).transpose()?;
    if let Some(size) = raw.as_ref().and_then(Raw::size)
        && process.console_size().is_none()
    {
        process.set_console_size(terminal::console_size(size));
    }
    let twin = |fd: std::os::fd::BorrowedFd<'_>| {
        fd.try_clone_to_owned()
            .map_err(failed("share the standard streams"))
    };
    let caller = Stdio {
        stdin: twin(io::stdin().as_fd())?,
        stdout: twin(io::stdout().as_fd())?,
        stderr: twin(io::stderr().as_fd())?,
        preserved,
    };
    let session = Session::start(order, &json(process)?, caller)?;
    write_pid_file(args.pid_file.as_deref(), std::process::id())?;
    send_pidfd(args.pidfd_socket.as_deref(), std::process::id(), "setns")?;
    let (status, lost) = runtime.block_on(session.follow(signals));
    // The terminal is as it was before anything is said.
    drop(raw);
    if let Some(how) = lost {
        context.log.error(&how);
    }
    Ok(ExitCode::from(status))
}

fn detached(
    args: &Exec,
    order: &Order,
    process: &Process,
    id: &ContainerId,
    preserved: Vec<OwnedFd>,
) -> Result<ExitCode, ExecCommandError> {
    let file = attached(&json(process)?)
        .map_err(|source| ExecError::Control(ControlError::Process(source)))?;
    let streams = (io::stdin(), io::stdout(), io::stderr());
    let mut fds = vec![
        streams.0.as_fd(),
        streams.1.as_fd(),
        streams.2.as_fd(),
        file.as_fd(),
    ];
    fds.extend(preserved.iter().map(AsFd::as_fd));
    let program = Program {
        command: exec::COMMAND,
        subject: id.as_str(),
    };
    let follower = Supervised::start(program, order, &fds).map_err(LaunchError::Start)?;
    match follower.report::<Report>().map_err(LaunchError::Monitor)? {
        Some(Report::Ready { pid }) => {
            write_pid_file(args.pid_file.as_deref(), pid)?;
            send_pidfd(args.pidfd_socket.as_deref(), pid, "setns")?;
        }
        Some(Report::Failed(message)) => return Err(ExecCommandError::Invalid(message)),
        _ => return Err(LaunchError::Killed.into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// The container's own process object with what the command line changes, as runc builds it.
fn from_command_line(
    args: &Exec,
    mut spec: Spec,
) -> Result<(Process, Vec<String>), ExecCommandError> {
    if args.command().is_empty() {
        return Err(invalid("process args cannot be empty"));
    }
    let mut process = spec
        .process_mut()
        .take()
        .ok_or_else(|| invalid("process property must not be empty"))?;
    process.set_args(Some(args.command().to_vec()));
    process.set_terminal(Some(args.tty));
    process.set_console_size(None);
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(profile) = &args.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if let Some(label) = &args.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().cloned());
    process.set_env(Some(env));
    let unknown = add_capabilities(&mut process, &args.cap);
    let mut user = process.user().clone();
    if let Some(text) = &args.user {
        let (uid, gid) = parse_user(text)?;
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    if !args.additional_gids.is_empty() {
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(&args.additional_gids);
        user.set_additional_gids(Some(gids));
    }
    process.set_user(user);
    Ok((process, unknown))
}

/// Adds capabilities to all sets; answers the names that mean nothing, which runc ignores as well.
fn add_capabilities(process: &mut Process, names: &[String]) -> Vec<String> {
    let known = |name: &String| serde_json::from_value::<Capability>(name.clone().into()).ok();
    let added: Capabilities = names.iter().filter_map(known).collect();
    let unknown = names
        .iter()
        .filter(|name| known(name).is_none())
        .cloned()
        .collect();
    if added.is_empty() {
        return unknown;
    }
    let mut all = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(&added);
        Some(set)
    };
    let (bounding, effective) = (with(all.bounding()), with(all.effective()));
    let (inheritable, permitted) = (with(all.inheritable()), with(all.permitted()));
    let ambient = with(all.ambient());
    all.set_bounding(bounding)
        .set_effective(effective)
        .set_inheritable(inheritable);
    all.set_permitted(permitted).set_ambient(ambient);
    process.set_capabilities(Some(all));
    unknown
}

fn parse_user(text: &str) -> Result<(u32, Option<u32>), ExecCommandError> {
    let number = |text: &str, what| {
        text.parse()
            .map_err(|_| invalid(&format!("parsing {text} as int for {what} failed")))
    };
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number(uid, "uid")?, Some(number(gid, "gid")?))),
        None => Ok((number(text, "uid")?, None)),
    }
}

fn check(process: &Process) -> Result<(), ExecCommandError> {
    if process.cwd().as_os_str().is_empty() {
        return Err(invalid("Cwd property must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid("Cwd must be an absolute path"));
    }
    if process.args().as_deref().unwrap_or_default().is_empty() {
        return Err(invalid("args must not be empty"));
    }
    Ok(())
}

fn read_json<T: DeserializeOwned>(path: &std::path::Path) -> Result<T, ExecCommandError> {
    let bytes = fs::read(path).map_err(|source| ExecCommandError::Read {
        path: path.to_owned(),
        source,
    })?;
    // What is unknown was told of at create.
    let parsed = capabilities::forgive(&bytes, |text| serde_json::from_slice(text));
    let parsed = parsed.map_err(|source| ExecCommandError::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(parsed.0)
}

fn json(process: &Process) -> Result<Vec<u8>, ExecCommandError> {
    serde_json::to_vec(process).map_err(|error| ExecCommandError::Host {
        step: "write the process",
        source: error.into(),
    })
}

fn invalid(text: &str) -> ExecCommandError {
    ExecCommandError::Invalid(text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::{Value, json};

    use super::*;
    use crate::cli::{Cli, Command};

    fn built(words: &str) -> Result<Value, String> {
        let Some(Command::Exec(args)) = Cli::parse_from(words.split_whitespace()).command else {
            panic!("not exec");
        };
        let spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": true,
                "consoleSize": {"height": 1, "width": 2},
                "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
                "args": ["sh"],
                "env": ["A=1"],
                "cwd": "/w",
                "capabilities": {"bounding": ["CAP_KILL"]},
            },
        }))
        .unwrap();
        let (process, unknown) =
            from_command_line(&args, spec).map_err(|error| error.to_string())?;
        assert_eq!(
            unknown.len(),
            args.cap.iter().filter(|name| name.contains("NOPE")).count()
        );
        Ok(serde_json::to_value(process).unwrap())
    }

    #[test]
    fn the_containers_process_is_the_default() {
        let process = built("caisson exec c ls -l").unwrap();
        assert_eq!(process["args"], json!(["ls", "-l"]));
        assert_eq!(process["terminal"], false);
        assert_eq!(process["cwd"], "/w");
        assert_eq!(process["env"], json!(["A=1"]));
        assert_eq!(process["user"]["uid"], 1);
        assert_eq!(process["capabilities"]["bounding"], json!(["CAP_KILL"]));
        assert!(process.get("consoleSize").is_none());
    }

    #[test]
    fn the_command_line_changes_it() {
        let process = built(
            "caisson exec -t -e B=2 --user 7:8 -g 9 --cwd /x --no-new-privs --cap CAP_NET_RAW --cap CAP_NOPE c sh",
        )
        .unwrap();
        assert_eq!(process["terminal"], true);
        assert_eq!(process["env"], json!(["A=1", "B=2"]));
        assert_eq!(process["user"]["uid"], 7);
        assert_eq!(process["user"]["gid"], 8);
        assert_eq!(process["user"]["additionalGids"], json!([3, 9]));
        assert_eq!(process["cwd"], "/x");
        assert_eq!(process["noNewPrivileges"], true);
        assert_eq!(process["capabilities"]["ambient"], json!(["CAP_NET_RAW"]));
        let bounding = process["capabilities"]["bounding"].as_array().unwrap();
        assert_eq!(bounding.len(), 2);
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(
            built("caisson exec c").unwrap_err(),
            "process args cannot be empty"
        );
        assert_eq!(
            built("caisson exec -u root c ls").unwrap_err(),
            "parsing root as int for uid failed"
        );
    }

    #[test]
    fn a_process_needs_arguments_and_an_absolute_directory() {
        let process = |value| serde_json::from_value::<Process>(value).unwrap();
        let message = |value| check(&process(value)).unwrap_err().to_string();
        let user = json!({"uid": 0, "gid": 0});
        assert_eq!(
            message(json!({"user": user, "cwd": "x", "args": ["a"]})),
            "Cwd must be an absolute path"
        );
        assert_eq!(
            message(json!({"user": user, "cwd": "/", "args": []})),
            "args must not be empty"
        );
    }
}
