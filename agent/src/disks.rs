//! Disks that the host plugs in for containers: their drivers, and who has them.
//!
//! Contract: a disk has its driver from the first container that is given it to the last one's end. A driver reads the
//! disk when it is bound, so that happens on a thread of its own, one disk at a time: a slow one delays who waits for a disk,
//! and nobody else.
//! Not here: nodes and rules (`plan/disks.rs`).

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use caisson_agent_api::Disk;

use crate::plan::disks::{Number, Placed};
use crate::virtio;

/// A disk that cannot be had, or taken away.
#[derive(Debug, thiserror::Error)]
#[error("disk for block device {host} (device {device}): {step}")]
pub(crate) struct DiskError {
    host: Number,
    device: u32,
    step: &'static str,
    source: io::Error,
}

/// The disks of all containers.
#[derive(Default)]
pub(crate) struct Disks {
    /// By device: the host's number, and the containers that have it. No await while it is held.
    held: Mutex<HashMap<u32, (Number, Vec<String>)>>,
    /// Held while drivers are bound and unbound.
    changing: tokio::sync::Mutex<()>,
}

impl Disks {
    /// Gives a container its disks; answers the numbers that they have here. What is given goes with [`Disks::release`],
    /// also after an error.
    pub(crate) async fn give(&self, id: &str, disks: &[Disk]) -> Result<Vec<Placed>, DiskError> {
        let mut placed = Vec::new();
        if disks.is_empty() {
            return Ok(placed);
        }
        let _turn = self.changing.lock().await;
        for disk in disks {
            let host = Number {
                major: disk.major,
                minor: disk.minor,
            };
            let device = disk.device;
            {
                let mut held = self.held();
                let (_, users) = held.entry(device).or_insert((host, Vec::new()));
                users.push(id.to_owned());
            }
            let guest = aside(move || bound(host, device)).await?;
            placed.push(Placed { host, guest });
        }
        Ok(placed)
    }

    /// A container is gone: takes away the disks that nobody else has.
    pub(crate) async fn release(&self, id: &str) -> Result<(), DiskError> {
        let has = |(_, users): &(Number, Vec<String>)| users.iter().any(|user| user == id);
        if !self.held().values().any(has) {
            return Ok(());
        }
        let _turn = self.changing.lock().await;
        let mut idle = Vec::new();
        self.held().retain(|device, (host, users)| {
            users.retain(|user| user != id);
            if users.is_empty() {
                idle.push((*host, *device));
            }
            !users.is_empty()
        });
        for (host, device) in idle {
            let step = "unbind the driver";
            aside(move || virtio::unbind(device).map_err(failed(host, device, step))).await?;
        }
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, HashMap<u32, (Number, Vec<String>)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what may take long on another thread.
async fn aside<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, DiskError> {
    match tokio::task::spawn_blocking(act).await {
        Ok(done) => done,
        // It panics nowhere, and the runtime ends with the agent.
        Err(error) => Err(DiskError {
            host: Number { major: 0, minor: 0 },
            device: 0,
            step: "run a thread",
            source: io::Error::other(error),
        }),
    }
}

fn failed(host: Number, device: u32, step: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError {
        host,
        device,
        step,
        source,
    }
}

/// Binds the driver if it is not; answers the disk's number.
fn bound(host: Number, device: u32) -> Result<Number, DiskError> {
    let failed = |step| failed(host, device, step);
    virtio::bind(device).map_err(failed("bind the driver"))?;
    let disk = virtio::made(device, "block").map_err(failed("find the disk"))?;
    let text = fs::read_to_string(disk.join("dev")).map_err(failed("read its number"))?;
    number(&text)
        .ok_or(io::ErrorKind::InvalidData.into())
        .map_err(failed("read its number"))
}

/// As the kernel writes it: `254:0`.
fn number(text: &str) -> Option<Number> {
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(Number {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disks_number_is_read_as_the_kernel_writes_it() {
        let (major, minor) = (254, 16);
        assert_eq!(number("254:16\n"), Some(Number { major, minor }));
        assert_eq!([number("254"), number("254:x"), number("")], [None; 3]);
    }
}
