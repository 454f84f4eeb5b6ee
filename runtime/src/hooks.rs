//! Hooks of the host's side: programs of the container's owner, run at fixed moments with the state on stdin.
//!
//! Contract: hooks of a list run one after the other, in the caller's namespaces and in the bundle's directory, with
//! exactly the environment that the specification gives them, or the caller's if it gives none (as runc).
//! `prestart`, `createRuntime` and `poststart`: the first failure ends the list and the container ([`run`]).
//! `poststop`: every hook runs, failures are warnings ([`run_all`]).
//! A hook that outlives its timeout is killed. Blocks its thread; nothing is polled for.
//! The hook's standard streams are memory files, so it can neither block on a full pipe nor keep the caller waiting
//! with a background process that holds one.
//! Not here: `createContainer` and `startContainer`, which belong into the container's namespaces: the agent runs them.
//! Spec: OCI runtime specification, config.md "POSIX-platform Hooks", runtime.md "Lifecycle".

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use oci_spec::runtime::{Hook, Hooks};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::{Errno, retry_on_intr},
    process::{Pid, PidfdFlags, pidfd_open},
};

/// How much of a failed hook's output an error quotes, in bytes for each stream.
const QUOTED_BYTES: u64 = 4096;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started or waited for.
    #[error("error running {list} hook #{index}: {step} {path}", path = path.display())]
    Start {
        /// Which list, as in `config.json`.
        list: &'static str,
        /// Its place in the list, from 0.
        index: usize,
        /// What was tried.
        step: &'static str,
        /// Its program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended, and not with 0.
    #[error(
        "error running {list} hook #{index}: {path}: {status}, stdout: {stdout}, stderr: {stderr}",
        path = path.display()
    )]
    Failed {
        /// Which list, as in `config.json`.
        list: &'static str,
        /// Its place in the list, from 0.
        index: usize,
        /// Its program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it said, shortened.
        stdout: String,
        /// What it complained about, shortened.
        stderr: String,
    },
    /// It was killed.
    #[error(
        "error running {list} hook #{index}: {path}: hook ran past specified timeout of {seconds}s",
        path = path.display()
    )]
    Timeout {
        /// Which list, as in `config.json`.
        list: &'static str,
        /// Its place in the list, from 0.
        index: usize,
        /// Its program.
        path: PathBuf,
        /// How long it was allowed to run.
        seconds: u64,
    },
}

/// Every list of hooks that a specification has, by its name in `config.json`.
pub fn lists(hooks: &Hooks) -> impl Iterator<Item = (&'static str, &[Hook])> {
    [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ]
    .into_iter()
    .filter_map(|(name, list)| Some((name, list.as_deref()?)))
}

/// Runs a list of hooks; the first failure is returned and the rest do not run. `state` is the OCI state as JSON.
pub fn run(
    list: &'static str,
    hooks: &[Hook],
    state: &[u8],
    bundle: &Path,
) -> Result<(), HookError> {
    hooks
        .iter()
        .enumerate()
        .try_for_each(|(index, hook)| run_one(list, index, hook, state, bundle))
}

/// Runs every hook of a list and returns what failed.
pub fn run_all(list: &'static str, hooks: &[Hook], state: &[u8], bundle: &Path) -> Vec<HookError> {
    let outcomes = hooks
        .iter()
        .enumerate()
        .map(|(index, hook)| run_one(list, index, hook, state, bundle));
    outcomes.filter_map(Result::err).collect()
}

fn run_one(
    list: &'static str,
    index: usize,
    hook: &Hook,
    state: &[u8],
    bundle: &Path,
) -> Result<(), HookError> {
    let path = hook.path();
    let failed = |step| {
        move |source| HookError::Start {
            list,
            index,
            step,
            path: path.clone(),
            source,
        }
    };
    let mut stdin = memory_file().map_err(failed("prepare"))?;
    stdin
        .write_all(state)
        .and_then(|()| stdin.rewind())
        .map_err(failed("prepare"))?;
    let mut stdout = memory_file().map_err(failed("prepare"))?;
    let mut stderr = memory_file().map_err(failed("prepare"))?;
    let mut child = command(hook, bundle)
        .stdin(Stdio::from(stdin))
        .stdout(stdout.try_clone().map_err(failed("prepare"))?)
        .stderr(stderr.try_clone().map_err(failed("prepare"))?)
        .spawn()
        .map_err(failed("start"))?;
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    match wait(&mut child, limit.map(Duration::from_secs)).map_err(failed("wait for"))? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(HookError::Failed {
            list,
            index,
            path: path.clone(),
            status,
            stdout: quote(&mut stdout),
            stderr: quote(&mut stderr),
        }),
        None => Err(HookError::Timeout {
            list,
            index,
            path: path.clone(),
            seconds: limit.unwrap_or_default(),
        }),
    }
}

fn command(hook: &Hook, bundle: &Path) -> Command {
    let mut command = Command::new(hook.path());
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((name, args)) = args.split_first() {
        command.arg0(name).args(args);
    }
    if let Some(env) = hook.env() {
        command
            .env_clear()
            .envs(env.iter().filter_map(|pair| pair.split_once('=')));
    }
    // The hook that undoes what another did must run even if the bundle is gone.
    if bundle.is_dir() {
        command.current_dir(bundle);
    }
    command
}

/// How the child ended, or `None` if it had to be killed because its time was over.
fn wait(child: &mut Child, limit: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    if let Some(limit) = limit {
        let pid = Pid::from_child(child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let timeout = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
        let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
        if retry_on_intr(|| poll(&mut watched, Some(&timeout)))? == 0 {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
    }
    child.wait().map(Some)
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?))
}

fn quote(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // What cannot be read back is not worth a second error.
    drop(
        file.rewind()
            .and_then(|()| file.take(QUOTED_BYTES).read_to_end(&mut bytes)),
    );
    String::from_utf8_lossy(&bytes).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(json: &str) -> Hook {
        serde_json::from_str(json).unwrap()
    }

    fn shell(script: &str) -> Hook {
        let args = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        hook(&args.to_string())
    }

    #[test]
    fn a_hook_reads_the_state_and_fails_with_its_output() {
        let hooks = [shell("cat; echo bad >&2; exit 3")];
        let error = run("createRuntime", &hooks, b"{\"id\":\"c\"}", Path::new("/")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running createRuntime hook #0: /bin/sh: exit status: 3, stdout: {\"id\":\"c\"}, stderr: bad"
        );
    }

    #[test]
    fn the_first_failure_ends_a_fatal_list() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let hooks = [shell("exit 1"), shell(&format!("touch {}", mark.display()))];
        run("prestart", &hooks, b"{}", Path::new("/")).unwrap_err();
        assert!(!mark.exists());
        let failures = run_all("poststop", &hooks, b"{}", Path::new("/"));
        assert_eq!(failures.len(), 1);
        assert!(mark.exists());
    }

    #[test]
    fn the_environment_is_the_hooks_own() {
        let listed = r#"{"path":"/bin/sh","args":["sh","-c","test \"$A$HOME$CARGO\" = b=c"],"env":["A=b=c"]}"#;
        run("prestart", &[hook(listed)], b"", Path::new("/")).unwrap();
    }

    #[test]
    fn without_an_environment_a_hook_gets_the_callers() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "test -n \"$PATH\" && test \"$(pwd -P)\" = {}",
            dir.path().canonicalize().unwrap().display()
        );
        run("prestart", &[shell(&script)], b"", dir.path()).unwrap();
        run(
            "prestart",
            &[shell("exit 0")],
            b"",
            &dir.path().join("gone"),
        )
        .unwrap();
    }

    #[test]
    fn a_hook_past_its_timeout_is_killed() {
        let mut child = command(&shell("kill -STOP $$"), Path::new("/"))
            .spawn()
            .unwrap();
        assert_eq!(
            wait(&mut child, Some(Duration::from_millis(1))).unwrap(),
            None
        );
        assert!(
            child
                .try_wait()
                .unwrap()
                .is_some_and(|status| !status.success())
        );
        let error = HookError::Timeout {
            list: "prestart",
            index: 1,
            path: "/h".into(),
            seconds: 1,
        };
        assert_eq!(
            error.to_string(),
            "error running prestart hook #1: /h: hook ran past specified timeout of 1s"
        );
    }

    #[test]
    fn a_hook_within_its_timeout_is_waited_for() {
        let mut child = command(&shell("exit 7"), Path::new("/")).spawn().unwrap();
        let status = wait(&mut child, Some(Duration::from_secs(600))).unwrap();
        assert_eq!(status.and_then(|status| status.code()), Some(7));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(
            "prestart",
            &[hook(r#"{"path":"/nope"}"#)],
            b"",
            Path::new("/"),
        )
        .unwrap_err();
        assert_eq!(
            crate::error::message(&error),
            "error running prestart hook #0: start /nope: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_background_process_that_keeps_the_streams_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        let script = format!("mkfifo {0}; (read x < {0}) & exit 0", fifo.display());
        run("prestart", &[shell(&script)], b"{}", Path::new("/")).unwrap();
        // Lets the background process go.
        drop(
            std::fs::OpenOptions::new()
                .write(true)
                .read(true)
                .open(&fifo)
                .unwrap(),
        );
    }

    #[test]
    fn every_list_has_its_name_in_config_json() {
        let names = [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ];
        let json: serde_json::Map<_, _> = names
            .iter()
            .map(|name| {
                (
                    (*name).to_owned(),
                    serde_json::json!([{"path": format!("/{name}")}]),
                )
            })
            .collect();
        let hooks: Hooks = serde_json::from_value(json.into()).unwrap();
        for (name, list) in lists(&hooks) {
            assert_eq!(list[0].path(), &PathBuf::from(format!("/{name}")));
        }
        assert_eq!(lists(&hooks).count(), names.len());
    }
}
