//! End-to-end tests of the command line: each of these would fail if a promise to users were broken.
//!
//! Run on `runc` (`RUNTIME=runc`) they prove themselves; a test that needs a virtual machine says why runc cannot take
//! it and is skipped there.

#![allow(clippy::panic, reason = "a failed expectation is how a test fails")]

mod agent_deaths;
mod bytes;
mod cycles;
mod disks;
mod files;
mod growth;
mod guest_ends;
mod host;
mod huge_pages;
mod isolation;
mod kills;
mod lifecycle;
mod members;
mod net;
mod network;
mod network_limits;
mod pausing;
mod processes;
mod refusals;
mod resources;
mod rootless;
mod rootless_kills;
mod signals;
mod spec_fields;
mod spec_hooks;
mod spec_mounts;
mod statuses;
mod stepped_kills;
mod supervision;
mod systemd;
mod terminals;
mod vhost_net;
mod volumes;
