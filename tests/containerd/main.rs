//! caisson under containerd: `ctr` as a person uses it, on Debian's containerd.
//!
//! `RUNTIME=runc` runs the same tests on containerd's own shim, which proves them. They need containerd and ctr, which
//! the lab's image `engines` has: `make containerd`.

#![allow(clippy::panic, reason = "a failed expectation is how a test fails")]

mod daemon;
mod deaths;
mod pods;
mod tasks;
