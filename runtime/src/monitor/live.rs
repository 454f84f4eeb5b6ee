//! A created container's life, to its end: commands, signals, the last byte of output, the exit status.

use std::{
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard},
    task::JoinSet,
};

use super::{doors::Door, membership::Premises, order::Report, serve};
use crate::{
    cgroup::HostCgroup,
    control::Listener,
    forwarded::{Signals, WINDOW_CHANGE},
    log::Log,
    network::{self, Network, follow},
    packet::Packets,
    sandbox::{Exit, INIT, LOST, Sandbox, SandboxError, remote::Members},
    share::Share,
    state::{State, StateDir, Status},
    stdio::Progress,
    supervision::{Handover, Subject, SupervisionError, Supervisor},
    terminal,
    trace::Trace,
    update::Limits,
    view::View,
    volumes::Follower,
};

/// How long commands that are still being answered may take when the container has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// A container that has been created.
pub(super) struct Live {
    pub(super) sandbox: Sandbox,
    pub(super) record: Record,
    /// Parted from the host's interfaces when dropped; none if the sandbox is another monitor's.
    pub(super) network: Option<Network>,
    pub(super) listener: Listener,
    /// Standard output and standard error.
    pub(super) progress: [Option<Progress>; 2],
    /// Those descriptors from 3 upwards that the guest writes to.
    pub(super) preserved: Vec<Progress>,
    /// Those that listen.
    pub(super) doors: Vec<Door>,
    /// The terminal whose size the container's follows.
    pub(super) terminal: Option<OwnedFd>,
    pub(super) signals: Signals,
    /// What the host sees of the container's files; left before the share is unmounted.
    pub(super) view: View,
    /// Unmounted when dropped, after the sandbox is gone.
    pub(super) share: Share,
    pub(super) log: Option<Arc<Log>>,
    /// Ends when dropped.
    pub(super) volumes: Follower,
}

/// The container's state on disk and in memory; clones are the same record.
#[derive(Debug, Clone)]
pub(super) struct Record(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    dir: StateDir,
    /// Held for the write of one small file, never across an await.
    state: Mutex<State>,
    processes: AtomicU64,
    /// The processes that stand for running `exec`s; never locked across an await.
    stand_ins: Mutex<Vec<u32>>,
    premises: Premises,
    /// Of the sandbox, if it is this process's.
    members: Members,
    /// Held while they are changed in the guest and on the host.
    limits: AsyncMutex<Limits>,
    /// Of system calls; every process has a listener of its own.
    supervisor: Option<Supervisor>,
}

/// A process that stands for a running `exec`.
#[derive(Debug)]
pub(super) struct StandIn(Record, u32);

impl Drop for StandIn {
    fn drop(&mut self) {
        let mut all = self.0.stand_ins();
        if let Some(index) = all.iter().position(|&pid| pid == self.1) {
            all.swap_remove(index);
        }
    }
}

impl Record {
    pub(super) fn new(
        dir: StateDir,
        state: State,
        limits: Limits,
        premises: Premises,
        supervisor: Option<Supervisor>,
    ) -> Self {
        Self(Arc::new(Shared {
            dir,
            state: Mutex::new(state),
            processes: AtomicU64::new(0),
            stand_ins: Mutex::default(),
            premises,
            members: Members::default(),
            limits: AsyncMutex::new(limits),
            supervisor,
        }))
    }

    fn stand_ins(&self) -> MutexGuard<'_, Vec<u32>> {
        self.0
            .stand_ins
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up a process that stands for a running `exec`, until the value is dropped.
    pub(super) fn stand_in(&self, pid: u32) -> StandIn {
        self.stand_ins().push(pid);
        StandIn(self.clone(), pid)
    }

    /// The host's processes that stand for the container: this one, and those of running `exec`s.
    pub(super) fn host_processes(&self) -> Vec<u32> {
        let mut all = vec![std::process::id()];
        all.extend(self.stand_ins().iter());
        all.sort_unstable();
        all
    }

    /// Adds to the trace of the start, which may be lost.
    pub(super) fn continue_trace(&self, trace: &Trace) {
        let _ = trace.append(self.0.dir.path());
    }

    /// Has the system calls of one more process supervised, if the container's are; `pid` stands for it.
    pub(super) async fn supervise(&self, pid: u32) -> Result<Option<Handover>, SupervisionError> {
        let Some(supervisor) = &self.0.supervisor else {
            return Ok(None);
        };
        let (state, _) = self.resident();
        let subject = Subject {
            state: &state,
            status: Status::Running,
            pid,
        };
        supervisor.reach().await?.engage(subject).await.map(Some)
    }

    /// Where the sandbox is, for those who want to join it.
    pub(super) fn premises(&self) -> &Premises {
        &self.0.premises
    }

    /// The containers that have joined the sandbox.
    pub(super) fn members(&self) -> &Members {
        &self.0.members
    }

    /// The limits, for whoever changes them.
    pub(super) async fn limits(&self) -> AsyncMutexGuard<'_, Limits> {
        self.0.limits.lock().await
    }

    /// The container's state as last recorded, and the container that brought its virtual machine.
    pub(super) fn resident(&self) -> (State, String) {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let holder = self.0.premises.holder.file_name();
        let pod = holder.map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        (state.clone(), pod)
    }

    /// The sandbox's cgroup on the host.
    pub(super) fn cgroup(&self) -> Option<HostCgroup> {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let path = state.cgroup.clone()?;
        Some(HostCgroup::at(path, state.systemd_unit.clone()))
    }

    pub(super) fn id(&self) -> String {
        self.0
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .id
            .as_str()
            .to_owned()
    }

    /// A name for one more process.
    pub(super) fn next_process_id(&self) -> String {
        format!("exec-{}", self.0.processes.fetch_add(1, Ordering::Relaxed))
    }

    /// Writes a new status. Once stopped, a container stays so.
    pub(super) fn set(&self, status: Status) -> Result<(), crate::state::StateError> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.status == Status::Stopped || state.status == status {
            return Ok(());
        }
        state.status = status;
        if status == Status::Stopped {
            state.pid = 0;
        }
        self.0.dir.store(&state)
    }
}

impl Live {
    /// Serves until the container has ended and all its output has been passed on; answers its exit status.
    pub(super) async fn serve(self, report: &Packets) -> ExitCode {
        let Self {
            sandbox,
            record,
            network,
            listener,
            progress,
            preserved,
            doors,
            terminal,
            mut signals,
            view,
            share,
            log,
            volumes,
        } = self;
        let id = record.id();
        let mut answering = JoinSet::new();
        let (follower, askers) = network::Follower::new();
        let complain = |text: &str| {
            if let Some(log) = &log {
                log.warning(text);
            }
        };
        let (follower_of, id_of) = (sandbox.clone(), id.clone());
        let mut following = Box::pin(async move {
            match network {
                Some(network) => follow(network, askers, follower_of, id_of, complain).await,
                // Who waits for it need not wait: the holder follows.
                None => {
                    drop(askers);
                    std::future::pending().await
                }
            }
        });
        let mut open = JoinSet::new();
        for door in doors {
            open.spawn(door.serve(sandbox.clone(), log.clone()));
        }
        let end = end_of(&sandbox, &id, progress, preserved);
        tokio::pin!(end);
        let (status, lost) = loop {
            tokio::select! {
                ended = &mut end => break ended,
                accepted = listener.accept() => if let Ok(connection) = accepted {
                    let (sandbox, record) = (sandbox.clone(), record.clone());
                    answering.spawn(serve::connection(connection, sandbox, record, follower.clone()));
                },
                number = signals.next() => {
                    let size = terminal.as_ref().and_then(|fd| terminal::size(fd.as_fd()));
                    tokio::spawn(pass_on(sandbox.clone(), id.clone(), number, size));
                }
                Some(_) = answering.join_next() => {}
                // Never ends by itself.
                () = &mut following => {}
            }
        };
        if let Some(how) = lost {
            if let Some(log) = &log {
                log.error(&how);
            }
            // `create` has gone long ago; `run` in the foreground is there.
            let _ = report.send(&Report::Lost(how), &[]).await;
        }
        // What comes now stays with whoever else listens.
        drop(open);
        let stored = record.set(Status::Stopped);
        sandbox.stop().await;
        // Commands that wait for processes of this container learn now that there are none left.
        let _ = tokio::time::timeout(LAST_ANSWERS, async {
            while answering.join_next().await.is_some() {}
        })
        .await;
        drop((following, volumes));
        drop(view);
        drop(share);
        if let Some(terminal) = &terminal {
            terminal::release(terminal.as_fd());
        }
        if let (Err(error), Some(log)) = (stored, &log) {
            log.error(&crate::error::message(&error));
        }
        ExitCode::from(status)
    }
}

/// Waits for init's end and for its last byte of output.
async fn end_of(
    sandbox: &Sandbox,
    id: &str,
    [stdout, stderr]: [Option<Progress>; 2],
    preserved: Vec<Progress>,
) -> (u8, Option<String>) {
    let (exit, lost) = match sandbox.wait(id, INIT).await {
        Ok(exit) => (exit, None),
        Err(error) => {
            let all = Exit {
                status: LOST,
                oom_killed: false,
                stdout_bytes: u64::MAX,
                stderr_bytes: u64::MAX,
            };
            let how = match error {
                SandboxError::Ended(how) => format!("the virtual machine ended: {how}"),
                other => crate::error::message(&other),
            };
            (all, Some(how))
        }
    };
    for (stream, bytes) in [(stdout, exit.stdout_bytes), (stderr, exit.stderr_bytes)] {
        if let Some(mut stream) = stream {
            stream.reached(bytes).await;
        }
    }
    // With init end all processes of the container, and with them the last copies of these.
    for mut stream in preserved {
        stream.reached(u64::MAX).await;
    }
    (exit.status, lost)
}

/// A changed window resizes the container's terminal, which signals whoever reads from it; the rest goes to init.
async fn pass_on(sandbox: Sandbox, id: String, number: i32, size: Option<terminal::Size>) {
    // A signal that the container can no longer take is like one sent to a process that has just ended.
    let _ = match size {
        Some(size) if number == WINDOW_CHANGE => sandbox.resize(&id, INIT, size).await,
        _ => sandbox.signal(&id, INIT, number, false).await,
    };
}
