//! The container that is being created: whoever asks for it meanwhile waits, and then hears what became of it.
//!
//! Contract: as containerd's own shim for runc. A containerd that is started anew asks every shim at once; one that
//! heard "no such container" of a creation that its predecessor asked for would take the pod for dead and never be able
//! to remove what then exists.
//! A container that is being deleted is there until the last word about it has been said: the hooks for its end, its event.
//! Not here: that there is one creation at a time (`Tasks::changing`).

use std::sync::Arc;

use tokio::sync::watch;

use super::Tasks;
use crate::shim::{container::Container, error::TaskError};

/// Which container is being created.
#[derive(Debug, Default)]
pub(super) struct Creating(watch::Sender<Option<String>>);

/// A creation; dropping it is its end, however it ended.
pub(super) struct Creation<'a>(&'a Creating);

/// How many containers are being deleted.
#[derive(Debug, Default)]
pub(super) struct Deleting(watch::Sender<usize>);

/// A deletion; dropping it is its end, however it ended.
pub(super) struct Deletion<'a>(&'a Deleting);

impl Creating {
    /// A creation begins.
    pub(super) fn begin(&self, id: &str) -> Creation<'_> {
        self.0.send_replace(Some(id.to_owned()));
        Creation(self)
    }

    /// Waits until this container is not being created, or not any more.
    pub(super) async fn end_of(&self, id: &str) {
        let mut creating = self.0.subscribe();
        // The sender lives as long as `self`.
        let _ = creating.wait_for(|it| it.as_deref() != Some(id)).await;
    }
}

impl Deleting {
    /// A deletion begins.
    pub(super) fn begin(&self) -> Deletion<'_> {
        self.0.send_modify(|count| *count += 1);
        Deletion(self)
    }

    /// Waits until nothing is being deleted.
    pub(super) async fn end(&self) {
        let mut deleting = self.0.subscribe();
        // The sender lives as long as `self`.
        let _ = deleting.wait_for(|count| *count == 0).await;
    }
}

impl Tasks {
    /// A containerd that is started anew looks for servers. One that its predecessor has not asked for anything yet, or has
    /// just had delete its last container, is nobody's: it says that there is nothing, and ends.
    pub(in crate::shim) async fn must_be_of_use(&self, id: &str) -> Result<(), TaskError> {
        self.deleting.end().await;
        self.creating.end_of(id).await;
        if self.held.get().is_some() || !self.containers().is_empty() {
            return Ok(());
        }
        self.shut_down();
        Err(TaskError::NoContainer(id.to_owned()))
    }

    /// A container; one that is being created is waited for.
    pub(super) async fn once_made(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.creating.end_of(id).await;
        self.container(id)
    }
}

impl Drop for Creation<'_> {
    fn drop(&mut self) {
        self.0.0.send_replace(None);
    }
}

impl Drop for Deletion<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    #[test]
    fn who_asks_for_a_container_waits_for_the_end_of_its_creation() {
        let creating = Creating::default();
        let mut context = Context::from_waker(Waker::noop());
        let creation = creating.begin("one");
        let mut one = pin!(creating.end_of("one"));
        assert_eq!(one.as_mut().poll(&mut context), Poll::Pending);
        let mut two = pin!(creating.end_of("two"));
        assert_eq!(two.as_mut().poll(&mut context), Poll::Ready(()));
        drop(creation);
        assert_eq!(one.as_mut().poll(&mut context), Poll::Ready(()));
        let mut after = pin!(creating.end_of("one"));
        assert_eq!(after.as_mut().poll(&mut context), Poll::Ready(()));
    }

    #[test]
    fn nothing_is_being_deleted_when_the_last_deletion_has_ended() {
        let deleting = Deleting::default();
        let mut context = Context::from_waker(Waker::noop());
        let (one, two) = (deleting.begin(), deleting.begin());
        let mut end = pin!(deleting.end());
        drop(one);
        assert_eq!(end.as_mut().poll(&mut context), Poll::Pending);
        drop(two);
        assert_eq!(end.as_mut().poll(&mut context), Poll::Ready(()));
    }
}
