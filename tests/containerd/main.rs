//! caisson under containerd: `ctr` as a person uses it and the CRI as the kubelet does, on Debian's containerd.
//!
//! `RUNTIME=runc` runs the same tests on containerd's own shim, which proves them. They need containerd and ctr, which
//! the lab's image `systemd` has (1.6), `trixie` (1.7) and `sid` (2.x): `make containerd IMAGE=...`. With
//! `CAISSON_TEST_SANDBOXER=shim` containerd 2.x has caisson make the pods' sandboxes by the Sandbox API. With `CAISSON_TEST_CGROUPS=systemd`
//! the kubelet's cgroup driver is systemd, else cgroupfs.

#![allow(clippy::panic, reason = "a failed expectation is how a test fails")]

mod bootstrap;
mod census;
mod config;
mod cri;
mod cri_costs;
mod cri_deaths;
mod cri_devices;
mod cri_kills;
mod cri_many;
mod cri_overhead;
mod cri_pods;
mod cri_ports;
mod cri_security;
mod cri_streams;
mod cri_systemd;
mod cri_volumes;
mod daemon;
mod deaths;
mod driver;
mod kubelet;
mod pods;
mod sandboxes;
mod streaming;
mod tasks;
mod user_namespaces;
