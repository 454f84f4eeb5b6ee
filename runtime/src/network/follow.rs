//! The guest follows the host's network for as long as the container lives.

use std::os::fd::AsFd;

use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::{Network, NetworkError, change::carry_out};
use crate::{error::message, sandbox::Sandbox, watched::watch};

/// How many commands may wait for a settled network at once.
const ASKERS: usize = 16;

/// For those who must know that the guest has all that was set on the host before; clones ask the same.
#[derive(Debug, Clone)]
pub struct Follower(mpsc::Sender<oneshot::Sender<()>>);

/// The other end, for [`follow`].
#[derive(Debug)]
pub struct Askers(mpsc::Receiver<oneshot::Sender<()>>);

impl Follower {
    /// A follower that nobody serves yet.
    pub fn new() -> (Self, Askers) {
        let (sender, receiver) = mpsc::channel(ASKERS);
        (Self(sender), Askers(receiver))
    }

    /// Waits until the guest has followed every change that was made before this call.
    pub async fn settled(&self) {
        let (reply, done) = oneshot::channel();
        // Without a follower the container is ending, and needs no network.
        if self.0.send(reply).await.is_ok() {
            let _ = done.await;
        }
    }
}

/// Follows changes until it is dropped, and then takes everything apart that was made on the host. What cannot be done
/// is told to `complain`.
pub async fn follow(
    mut network: Network,
    mut askers: Askers,
    sandbox: Sandbox,
    id: String,
    complain: impl Fn(&str),
) {
    let changes = match network.watch() {
        Ok(changes) => changes,
        Err(error) => {
            complain(&message(&error));
            return std::future::pending().await;
        }
    };
    loop {
        let asker = tokio::select! {
            ready = changes.readable() => {
                // What comes from here on makes it ready again.
                if let Ok(mut ready) = ready { ready.clear_ready() }
                None
            }
            asker = askers.0.recv() => asker,
        };
        match network.change() {
            Ok(Some(change)) => {
                for error in carry_out(&mut network, change, &sandbox, &id).await {
                    complain(&format!(
                        "the guest does not follow a change of the network: {}",
                        message(&error)
                    ));
                }
            }
            Ok(None) => {}
            Err(error) => complain(&message(&error)),
        }
        network.complaints().iter().for_each(|text| complain(text));
        if let Some(asker) = asker {
            // It may have gone.
            let _ = asker.send(());
        }
    }
}

/// A task that follows, until it is dropped.
#[derive(Debug)]
pub struct Following(JoinHandle<()>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// [`follow`] as a task of the current runtime, for a sandbox whose later commands do not wait for the network.
pub fn follow_in_background(network: Network, sandbox: &Sandbox, id: &str) -> Following {
    let (sandbox, id) = (sandbox.clone(), id.to_owned());
    let complain = |text: &str| eprintln!("caisson: {text}");
    Following(tokio::spawn(async move {
        let (_follower, askers) = Follower::new();
        follow(network, askers, sandbox, id, complain).await;
    }))
}

impl Network {
    fn watch(&self) -> Result<AsyncFd<std::os::fd::OwnedFd>, NetworkError> {
        let socket = self.notices.as_fd().try_clone_to_owned();
        socket
            .and_then(|socket| watch(socket, Interest::READABLE))
            .map_err(super::host("watch the network namespace"))
    }
}
