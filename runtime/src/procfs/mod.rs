//! A /proc of a container for programs of the host: podman's `top` joins the mount namespace of the process in the pid
//! file and reads /proc there, where a container of other runtimes has its own.
//!
//! ```text
//!  podman top --/proc/1/stat--> the host's FUSE --device--> task here --sandbox's owner--> agent
//! ```
//!
//! Contract: read-only; what it shows is asked of the guest when the directory is listed, and again when a process is
//! looked up and the last answer is older than [`FRESH`]. The guest has [`PATIENCE`] for an answer, then the reader gets
//! EIO: no reader waits for longer, and the guest's texts are parsed before (`process_table.rs`). The task ends when the
//! mount is gone.
//! Only a container of podman's has it: nobody else looks there.
//! Not here: where it is mounted (`view.rs`), the files (`tree.rs`).

mod tree;
mod wire;

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use oci_spec::runtime::Spec;
use rustix::{io::Errno, mount::MountAttrFlags};
use tokio::io::unix::AsyncFd;

use crate::{
    fuse::{self, FuseError},
    process_table::Table,
    sandbox::Sandbox,
};
use tree::{Kind, Node};
use wire::{Ask, Request};

/// How long the guest may take to describe its processes.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long its description is taken for true.
const FRESH: Duration = Duration::from_secs(1);

/// What an engine writes of itself, and what podman writes.
const ENGINE: (&str, &str) = ("io.container.manager", "libpod");

/// Whether somebody may read the container's /proc from the host.
pub fn is_wanted(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations.is_some_and(|all| all.get(ENGINE.0).is_some_and(|engine| engine == ENGINE.1))
}

/// The container's /proc, mounted nowhere yet. Must be called inside a runtime.
pub fn mount(sandbox: Sandbox, id: &str) -> Result<OwnedFd, FuseError> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    let (device, mount) = fuse::mount(Kind::Directory.mode(), attributes)?;
    let served = Served {
        sandbox,
        id: id.to_owned(),
        table: Table::default(),
        asked: None,
    };
    tokio::spawn(served.serve(device));
    Ok(mount)
}

/// What is served.
struct Served {
    sandbox: Sandbox,
    id: String,
    /// The guest's last answer.
    table: Table,
    /// When it came.
    asked: Option<Instant>,
}

impl Served {
    async fn serve(mut self, device: AsyncFd<OwnedFd>) {
        while let Some(requests) = fuse::requests(&device, wire::parse).await {
            for Request { unique, ask } in requests {
                if ask == Ask::Forget {
                    continue;
                }
                let result = self.answer(ask).await;
                let reply = fuse::reply(unique, result.as_deref().map_err(|errno| *errno));
                // Who asked may have been killed, and nobody then wants the reply.
                let _ = rustix::io::write(&device, &reply);
            }
        }
    }

    async fn answer(&mut self, ask: Ask) -> Result<Vec<u8>, Errno> {
        let node = |number| Node::of(number).ok_or(Errno::NOENT);
        let text = |table: &Table, number| node(number)?.content(table).ok_or(Errno::NOENT);
        match ask {
            Ask::Init => Ok(fuse::init()),
            Ask::Lookup { directory, name } => {
                let directory = node(directory)?;
                if directory == Node::Root && self.asked.is_none_or(|at| at.elapsed() > FRESH) {
                    self.ask().await?;
                }
                let child = directory.child(&self.table, &name).ok_or(Errno::NOENT)?;
                let owner = child.owner(&self.table).ok_or(Errno::NOENT)?;
                Ok(wire::entry(child, owner))
            }
            Ask::Attributes(number) => {
                let node = node(number)?;
                let owner = node.owner(&self.table).ok_or(Errno::NOENT)?;
                Ok(wire::attributes(node, owner))
            }
            Ask::OpenDirectory(number) => {
                if node(number)? == Node::Root {
                    self.ask().await?;
                }
                Ok(fuse::open())
            }
            Ask::List(range) => {
                let entries = node(range.node)?.entries(&self.table);
                Ok(wire::list(&entries.ok_or(Errno::NOENT)?, range))
            }
            Ask::Open(_) => Ok(fuse::open()),
            Ask::Read(range) => Ok(wire::part(&text(&self.table, range.node)?, range).to_vec()),
            Ask::Follow(number) => text(&self.table, number).map(String::into_bytes),
            Ask::Release => Ok(Vec::new()),
            Ask::Forget => Err(Errno::INVAL),
            Ask::Refused(errno) => Err(errno),
        }
    }

    /// Has the guest describe its processes.
    async fn ask(&mut self) -> Result<(), Errno> {
        let answer = tokio::time::timeout(PATIENCE, self.sandbox.table(&self.id)).await;
        self.table = answer
            .map_err(|_| Errno::IO)?
            .map_err(|_| Errno::IO)?
            .inside();
        self.asked = Some(Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_podmans_containers_have_one() {
        let spec = |annotations| -> Spec {
            serde_json::from_value(json!({"ociVersion": "1.0.2", "annotations": annotations}))
                .unwrap()
        };
        assert!(is_wanted(&spec(json!({"io.container.manager": "libpod"}))));
        assert!(!is_wanted(&spec(json!({"io.container.manager": "cri-o"}))));
        assert!(!is_wanted(&spec(json!({}))));
    }
}
