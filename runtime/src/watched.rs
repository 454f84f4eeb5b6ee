//! Descriptors that tokio watches: the one place that promises it what it asks for.

#![allow(
    unsafe_code,
    reason = "AsyncFd asks for a promise about the descriptor it watches"
)]

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Has the current runtime watch a descriptor. Must be called inside a runtime.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped, which `AsyncFd` does after it has
    // stopped watching; nothing else can close it or put another file in its place.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
