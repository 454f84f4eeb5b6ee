//! A container as containerd knows it: its bundle, its processes, what is still to be done for it on the host.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
};

use tokio::sync;

use super::{error::TaskError, process::Process, rootfs::Rootfs};
use crate::{
    error::message,
    hooks::{self, HookError},
    monitor::{HostHooks, hook_state},
    sandbox::Sandbox,
    state::{State, Status},
    supervision::{Subject, Supervisor},
    update::Limits,
};

/// One container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) id: String,
    /// As containerd names it.
    pub(super) bundle: String,
    /// The sandbox that it lives in.
    pub(super) sandbox: Sandbox,
    pub(super) init: Arc<Process>,
    /// Held for a moment, never across an await.
    execs: Mutex<HashMap<String, Arc<Process>>>,
    rootfs: Mutex<Option<Rootfs>>,
    hooks: Hooks,
    /// Held while they are changed.
    pub(super) limits: sync::Mutex<Limits>,
    /// containerd has been told that memory ran out.
    pub(super) told_of_oom: AtomicBool,
}

/// A container's hooks on the host, the supervisor of its system calls, and what they are told.
#[derive(Debug, Clone)]
pub(super) struct Hooks {
    pub(super) lists: HostHooks,
    pub(super) state: State,
    pub(super) supervisor: Option<Supervisor>,
}

impl Container {
    pub(super) fn new(
        bundle: String,
        sandbox: Sandbox,
        init: Process,
        rootfs: Rootfs,
        hooks: Hooks,
        limits: Limits,
    ) -> Self {
        Self {
            id: hooks.state.id.as_str().to_owned(),
            bundle,
            sandbox,
            init: Arc::new(init),
            execs: Mutex::default(),
            rootfs: Mutex::new(Some(rootfs)),
            hooks,
            limits: sync::Mutex::new(limits),
            told_of_oom: AtomicBool::new(false),
        }
    }

    /// A process by its id; the empty one is init.
    pub(super) fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let execs = self.execs();
        let process = execs.get(exec_id).cloned();
        process.ok_or_else(|| TaskError::NoProcess(exec_id.to_owned()))
    }

    /// Adds a process that is not started yet.
    pub(super) fn add(&self, process: Process) -> Result<(), TaskError> {
        match self.execs().entry(process.id.clone()) {
            Entry::Occupied(taken) => Err(TaskError::Exists(format!("process {}", taken.key()))),
            Entry::Vacant(free) => {
                free.insert(Arc::new(process));
                Ok(())
            }
        }
    }

    /// Forgets a process.
    pub(super) fn remove(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Unmounts the root file system.
    pub(super) fn unmount(&self) {
        drop(
            self.rootfs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }

    pub(super) fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hooks {
    /// What a supervisor is told of a process. This one stands for all.
    pub(super) fn subject(&self, status: Status) -> Subject<'_> {
        Subject {
            state: &self.state,
            status,
            pid: std::process::id(),
        }
    }

    /// Those that must run before the container is created.
    pub(super) async fn before_creation(&self) -> Result<(), HookError> {
        self.run("prestart", &self.lists.prestart, Status::Creating)
            .await?;
        self.run(
            "createRuntime",
            &self.lists.create_runtime,
            Status::Creating,
        )
        .await
    }

    /// Those that run once it runs.
    pub(super) async fn after_start(&self) -> Result<(), HookError> {
        self.run("poststart", &self.lists.poststart, Status::Running)
            .await
    }

    /// Those that run when it is gone; answers their failures in words.
    pub(super) fn after_deletion(&self) -> Vec<String> {
        let told = hook_state(&self.state, Status::Stopped);
        let failures = hooks::run_all("poststop", &self.lists.poststop, &told, &self.state.bundle);
        failures.iter().map(|failure| message(failure)).collect()
    }

    /// A hook blocks its thread.
    async fn run(
        &self,
        list: &'static str,
        hooks: &[oci_spec::runtime::Hook],
        status: Status,
    ) -> Result<(), HookError> {
        if hooks.is_empty() {
            return Ok(());
        }
        let told = hook_state(&self.state, status);
        let (hooks, bundle): (Vec<_>, PathBuf) = (hooks.to_vec(), self.state.bundle.clone());
        let running = tokio::task::spawn_blocking(move || hooks::run(list, &hooks, &told, &bundle));
        // A panic ends the process.
        running.await.unwrap_or(Ok(()))
    }
}
