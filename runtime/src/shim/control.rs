//! The shim's own door: the control socket in the sandbox's bundle, for `caisson list --all` and `caisson metrics --all`.
//!
//! Contract: it looks and changes nothing; what runs is containerd's to change. The socket is its owner's alone and goes
//! with the bundle.

use std::{os::fd::AsFd, path::Path, sync::Arc, time::Duration};

use super::{container::Container, logger::Logger, tasks::Tasks};
use crate::{
    census::{self, Household, Resident},
    control::{Answer, ControlError, Listener, Request},
    packet::Packets,
    state::Status,
};

/// How long the guest may take to count one container.
const PATIENCE: Duration = Duration::from_secs(2);

/// Listens in a bundle and answers until the runtime ends. Without the socket the sandbox is as good: it is not seen.
pub(super) fn serve(bundle: &Path, tasks: &Arc<Tasks>, log: &Logger) {
    match Listener::bind(bundle) {
        Ok(listener) => drop(tokio::spawn(answer_all(listener, Arc::clone(tasks)))),
        Err(error) => log.warning(&crate::error::message(&error)),
    }
}

async fn answer_all(listener: Listener, tasks: Arc<Tasks>) {
    // A socket that cannot accept any more is one that nobody reaches.
    while let Ok(packets) = listener.accept().await {
        let tasks = Arc::clone(&tasks);
        tokio::spawn(async move {
            // A question that is none, or an asker that is gone, has no answer.
            let _ = answer(&packets, &tasks).await;
        });
    }
}

async fn answer(packets: &Packets, tasks: &Tasks) -> Result<(), ControlError> {
    let Some((request, _)) = packets.receive::<Request>().await? else {
        return Ok(());
    };
    let Request::Census { count } = request else {
        let words = "containerd holds this container: ask it".to_owned();
        return Ok(packets.send(&Answer::Failed(words), &[]).await?);
    };
    let household = tasks.household(count).await;
    let file = census::file_of(&household).map_err(ControlError::Process)?;
    Ok(packets.send(&Answer::Census, &[file.as_fd()]).await?)
}

impl Tasks {
    /// Everyone in this sandbox.
    async fn household(&self, count: bool) -> Household {
        let Some((pod, cgroup)) = self.sandbox_on_host() else {
            return Household::default();
        };
        let mut residents = Vec::new();
        for container in self.all() {
            residents.push(resident(&container, &pod, count).await);
        }
        residents.sort_by(|a, b| a.state.id.cmp(&b.state.id));
        let host = cgroup
            .filter(|_| count)
            .and_then(|cgroup| cgroup.stats().ok());
        Household {
            residents,
            host: host.map(Box::new),
        }
    }
}

async fn resident(container: &Container, pod: &str, count: bool) -> Resident {
    let mut state = container.hooks().state.clone();
    state.status = match container.init.ended() {
        Some(_) => Status::Stopped,
        None => container
            .sandbox
            .status(&container.id)
            .await
            .unwrap_or(Status::Stopped),
    };
    let runs = matches!(state.status, Status::Running | Status::Paused);
    let guest = match count && runs {
        true => {
            let asked = container.sandbox.stats(&container.id);
            let answered = tokio::time::timeout(PATIENCE, asked).await;
            answered.ok().and_then(Result::ok).map(Box::new)
        }
        false => None,
    };
    Resident {
        state,
        pod: pod.to_owned(),
        guest,
    }
}
