//! Hooks that run in the container's namespaces: createContainer and startContainer.
//!
//! Contract: run one after the other with the container's state as JSON on standard input; the first that fails, by exit
//! status, signal or timeout, is the error. A createContainer hook's path is one **of the guest**, which holds nothing
//! but what the runtime shared into it; a startContainer hook's path is one of the container.
//! Spec: OCI config.md "POSIX-platform Hooks", runtime.md "State".

use super::{ChildError, Context};
use crate::plan::{ChildPlan, ContainerPlan, HookPlan};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};

/// How much of a failed hook's output goes into the error.
const OUTPUT_BYTES: u64 = 2048;

/// The container's state as hooks get it.
pub(super) fn state(plan: &ChildPlan, container: &ContainerPlan, status: &str) -> String {
    serde_json::json!({
        "ociVersion": "1.0.2",
        "id": plan.container_id,
        "status": status,
        "pid": super::own_pid(),
        "bundle": container.bundle,
        "annotations": container.annotations,
    })
    .to_string()
}

/// Runs all hooks of a kind.
pub(super) fn run(hooks: &[HookPlan], state: &str) -> Result<(), ChildError> {
    for (index, hook) in hooks.iter().enumerate() {
        let mut stdout = memory_file().step(|| "memfd".to_owned())?;
        let mut stderr = memory_file().step(|| "memfd".to_owned())?;
        let reason = match run_one(hook, state, &stdout, &stderr) {
            Ok(None) => continue,
            Ok(Some(reason)) => reason,
            Err(e) => format!("fork/exec {}: {e}", hook.path.display()),
        };
        let (stdout, stderr) = (text(&mut stdout), text(&mut stderr));
        return Err(ChildError::Hook {
            index,
            reason,
            stdout,
            stderr,
        });
    }
    Ok(())
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?))
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = file
        .rewind()
        .and_then(|()| file.take(OUTPUT_BYTES).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs one hook; `Some` says why it failed.
fn run_one(
    hook: &HookPlan,
    state: &str,
    stdout: &File,
    stderr: &File,
) -> io::Result<Option<String>> {
    let mut input = memory_file()?;
    input.write_all(state.as_bytes())?;
    input.rewind()?;
    let mut command = Command::new(&hook.path);
    if let Some((name, rest)) = hook.args.split_first() {
        command.arg0(name).args(rest);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|v| v.split_once('=')));
    command
        .stdin(input)
        .stdout(Stdio::from(stdout.try_clone()?))
        .stderr(stderr.try_clone()?);
    let mut child = command.spawn()?;
    if let Some(seconds) = hook.timeout {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(pid.ok_or(io::ErrorKind::NotFound)?, PidfdFlags::empty())?;
        let limit = Timespec {
            tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))?;
        if ended == 0 {
            child.kill()?;
            child.wait()?;
            return Ok(Some(format!(
                "hook ran past specified timeout of {seconds}s"
            )));
        }
    }
    Ok(failure(child.wait()?))
}

fn failure(status: ExitStatus) -> Option<String> {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(format!("exit status {code}")),
        (None, signal) => Some(format!("signal: {}", signal.unwrap_or(0))),
    }
}
