//! caisson on the host: an OCI runtime whose containers each run in their own virtual machine.
//!
//! The binary `caisson` is a thin door to this library: `cli` says what was asked, `commands` does it.

pub mod agent;
pub mod boot;
pub mod bundle;
pub mod census;
pub mod cgroup;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod error;
pub mod exec;
pub mod forwarded;
pub mod guest_spec;
pub mod hooks;
pub mod id_mapping;
pub mod identities;
pub mod log;
pub mod memory_policy;
pub mod monitor;
pub mod network;
pub mod packet;
pub mod preserved;
pub mod process_table;
pub mod rootless;
pub mod sandbox;
pub mod share;
pub mod shim;
pub mod shm;
pub mod signals;
pub mod sizing;
mod spawn;
pub mod state;
pub mod stats;
pub mod stdio;
pub mod supervision;
pub mod terminal;
pub mod text;
pub mod trace;
pub mod update;
pub mod version;
pub mod view;
pub mod vmm;
pub mod volumes;
mod watched;
