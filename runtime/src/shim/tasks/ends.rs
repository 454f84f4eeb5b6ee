//! What containerd is told unasked: that a process has ended, that the kernel killed one for want of memory.
//!
//! Contract: an end is told once, after the process's last output has been passed on, and after its start has been told;
//! with the virtual machine every process in it ends, with the status [`LOST`].
//! Not here: what containerd asks about an end afterwards (`process.rs`).

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    events::task::{TaskExit, TaskOOM},
    topics,
};

use super::Tasks;
use crate::{
    sandbox::{INIT, LOST, Sandbox},
    shim::{
        container::Container,
        process::{Ended, Process, timestamp},
        stdio::Flowing,
    },
};

/// How long the last output of a process that has ended may take to reach a reader that is slow.
const LAST_OUTPUT: Duration = Duration::from_secs(5);

impl Tasks {
    /// Tells of a process's end when its last output has been passed on.
    pub(super) fn watch(
        self: &Arc<Self>,
        container: Arc<Container>,
        process: Arc<Process>,
        mut flowing: Flowing,
    ) {
        let tasks = Arc::clone(self);
        tokio::spawn(async move {
            let ending = exit_of(&container.sandbox, &container.id, &process.id).await;
            let at = SystemTime::now();
            // A reader that does not read must not keep the end from being told.
            let _ = tokio::time::timeout(LAST_OUTPUT, flowing.reached(ending.output)).await;
            let _after_its_start = process.gate.lock().await;
            if let Some(why) = ending.lost {
                tasks.log.error_of(&container.id, &why);
            }
            if ending.oom_killed && !container.told_of_oom.load(Ordering::Relaxed) {
                tasks.tell_of_oom(&container);
            }
            let ended = Ended {
                status: ending.status,
                at,
            };
            let id = match process.id.as_str() {
                INIT => &container.id,
                exec => exec,
            };
            let event = TaskExit {
                container_id: container.id.clone(),
                id: id.to_owned(),
                pid: tasks.pid(),
                exit_status: ended.status.into(),
                exited_at: Some(timestamp(at)).into(),
                ..Default::default()
            };
            tasks
                .publisher
                .publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
            process.end(ended);
        });
    }

    /// Tells of every process that the kernel kills for want of memory, as it happens.
    pub(super) fn watch_memory(self: &Arc<Self>, container: Arc<Container>) {
        let tasks = Arc::clone(self);
        tokio::spawn(async move {
            let mut seen = 0;
            while let Ok(count) = container.sandbox.out_of_memory(&container.id, seen).await {
                seen = count;
                if container.init.ended().is_none() {
                    tasks.tell_of_oom(&container);
                }
            }
        });
    }

    fn tell_of_oom(&self, container: &Container) {
        container.told_of_oom.store(true, Ordering::Relaxed);
        let event = TaskOOM {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
    }
}

/// A process's end as the guest tells it, or as it must be when the guest is gone.
struct Ending {
    status: u8,
    oom_killed: bool,
    /// Bytes of standard output and standard error.
    output: [u64; 2],
    lost: Option<String>,
}

async fn exit_of(sandbox: &Sandbox, id: &str, process_id: &str) -> Ending {
    match sandbox.wait(id, process_id).await {
        Ok(exit) => Ending {
            status: exit.status,
            oom_killed: exit.oom_killed,
            output: [exit.stdout_bytes, exit.stderr_bytes],
            lost: None,
        },
        Err(error) => Ending {
            status: LOST,
            oom_killed: false,
            output: [u64::MAX; 2],
            lost: Some(crate::error::message(&error)),
        },
    }
}
