//! What the end-to-end tests share: a [`Case`] (one test and its clean host), a [`Bundle`], calls of the runtime under
//! test and their [`Outcome`], terminals.
//!
//! The tests drive binaries as users do and know nothing of their insides. The runtime is named by the environment
//! variable `RUNTIME` (`caisson` by default); the same tests run on `runc` first, which proves the tests. They run as
//! root in the lab, or directly on a host with VMX or SVM.

#![allow(clippy::panic, reason = "a failed expectation is how a test fails")]

pub mod bundle;
pub mod call;
pub mod case;
pub mod cgroup;
pub mod host;
pub mod installed;
pub mod kernel;
pub mod killing;
pub mod loop_device;
pub mod mount;
pub mod published;
pub mod ruler;
pub mod stepping;
pub mod supervisor;
pub mod terminal;

pub use bundle::Bundle;
pub use call::{Call, Outcome, Running};
pub use case::Case;
pub use loop_device::Loop;
pub use mount::{HugePages, Tmpfs};
pub use published::Published;
pub use terminal::Terminal;
