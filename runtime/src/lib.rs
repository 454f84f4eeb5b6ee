//! caisson on the host: an OCI runtime whose containers each run in their own virtual machine.
//!
//! The binary `caisson` is a thin door to this library: `cli` says what was asked, `commands` does it.

pub mod bundle;
pub mod cgroup;
pub mod cli;
pub mod commands;
pub mod config;
pub mod error;
pub mod hooks;
pub mod log;
pub mod signals;
pub mod sizing;
pub mod state;
