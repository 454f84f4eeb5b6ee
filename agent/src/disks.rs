//! Disks that the host plugs in for containers: their drivers, and who has them.
//!
//! Contract: a disk has its driver from the first container that is given it to the last one's end; who takes a container away
//! hears of it when the driver is gone, also the second time. A driver reads the disk when it is bound, and writes it back
//! when it is unbound, so that happens on a thread of its own, one container's disks at a time: a slow one delays who waits
//! for a disk, and nobody else. A caller that goes away leaves the thread to its end; the machine's end waits for none.
//! Not here: nodes and rules (`plan/disks.rs`).

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use caisson_agent_api::Disk;
use tokio::sync::{OwnedMutexGuard, oneshot};

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

/// Who binds drivers: the kernel, and the test double.
pub(crate) trait Drivers: Send + Sync + 'static {
    /// Binds the driver if it is not; answers the disk's number, and whether the disk is another one than before.
    fn bind(&self, host: Number, device: u32) -> Result<(Number, bool), DiskError>;

    /// Takes the driver away, if it is there.
    fn unbind(&self, device: u32) -> io::Result<()>;
}

/// This kernel.
#[derive(Default)]
pub(crate) struct Kernel;

/// The disks of all containers.
#[derive(Default)]
pub(crate) struct Disks<D = Kernel> {
    shared: Arc<Shared<D>>,
    /// Held while drivers are bound and unbound, by the thread that does it.
    changing: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct Shared<D> {
    /// By device: the host's number, and the containers that have it. Nothing is waited for while it is held.
    held: Mutex<HashMap<u32, (Number, Vec<String>)>>,
    drivers: D,
}

impl<D: Drivers> Disks<D> {
    /// Gives a container its disks; answers the numbers that they have here. What is given goes with [`Disks::release`],
    /// also after an error.
    pub(crate) async fn give(&self, id: &str, disks: &[Disk]) -> Result<Vec<Placed>, DiskError> {
        if disks.is_empty() {
            return Ok(Vec::new());
        }
        let turn = Arc::clone(&self.changing).lock_owned().await;
        let (shared, id, disks) = (Arc::clone(&self.shared), id.to_owned(), disks.to_vec());
        aside(turn, move || shared.give(&id, &disks)).await
    }

    /// A container is gone: takes away the disks that nobody else has. An error is the first one; what could not be taken
    /// away is the container's until it can.
    pub(crate) async fn release(&self, id: &str) -> Result<(), DiskError> {
        let has = |(_, users): &(Number, Vec<String>)| users.iter().any(|user| user == id);
        if !self.shared.held().values().any(has) {
            return Ok(());
        }
        let turn = Arc::clone(&self.changing).lock_owned().await;
        let (shared, id) = (Arc::clone(&self.shared), id.to_owned());
        aside(turn, move || shared.release(&id)).await
    }
}

impl<D: Drivers> Shared<D> {
    fn give(&self, id: &str, disks: &[Disk]) -> Result<Vec<Placed>, DiskError> {
        let mut placed = Vec::new();
        for disk in disks {
            let device = disk.device;
            let host = Number {
                major: disk.major,
                minor: disk.minor,
            };
            let mut held = self.held();
            let (_, users) = held.entry(device).or_insert((host, Vec::new()));
            users.push(id.to_owned());
            drop(held);
            let (guest, is_new) = self.drivers.bind(host, device)?;
            if is_new {
                // Whoever else is known to have it had one that the host has taken out.
                self.held().insert(device, (host, vec![id.to_owned()]));
            }
            placed.push(Placed { host, guest });
        }
        Ok(placed)
    }

    fn release(&self, id: &str) -> Result<(), DiskError> {
        let mut idle = Vec::new();
        for (device, (host, users)) in self.held().iter_mut() {
            if users.iter().all(|user| user == id) {
                idle.push((*host, *device));
            } else {
                users.retain(|user| user != id);
            }
        }
        let mut result = Ok(());
        for (host, device) in idle {
            match self.drivers.unbind(device) {
                Ok(()) => drop(self.held().remove(&device)),
                Err(error) => {
                    result = result.and(Err(failed(host, device, "unbind the driver")(error)));
                }
            }
        }
        result
    }

    fn held(&self) -> MutexGuard<'_, HashMap<u32, (Number, Vec<String>)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what may take long on another thread, which keeps the turn until it is done.
async fn aside<T: Send + 'static>(
    turn: OwnedMutexGuard<()>,
    act: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, DiskError> {
    let nobody = Number { major: 0, minor: 0 };
    let (done, told) = oneshot::channel();
    thread::Builder::new()
        .name("disks".to_owned())
        .spawn(move || {
            let result = act();
            drop(turn);
            // Its asker may be gone.
            drop(done.send(result));
        })
        // A guest whose processes are too many has no thread either.
        .map_err(failed(nobody, 0, "start a thread"))?;
    let lost = |_| failed(nobody, 0, "wait for a thread")(io::ErrorKind::BrokenPipe.into());
    told.await.map_err(lost)?
}

fn failed(host: Number, device: u32, step: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError {
        host,
        device,
        step,
        source,
    }
}

impl Drivers for Kernel {
    fn bind(&self, host: Number, device: u32) -> Result<(Number, bool), DiskError> {
        let failed = |step| failed(host, device, step);
        let is_new = virtio::bind(device).map_err(failed("bind the driver"))?;
        let disk = virtio::made(device, "block").map_err(failed("find the disk"))?;
        let text = fs::read_to_string(disk.join("dev")).map_err(failed("read its number"))?;
        let guest = number(&text)
            .ok_or(io::ErrorKind::InvalidData.into())
            .map_err(failed("read its number"))?;
        Ok((guest, is_new))
    }

    fn unbind(&self, device: u32) -> io::Result<()> {
        virtio::unbind(device)
    }
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

    /// Binds what is asked for; unbinding fails while `stuck` names the device.
    #[derive(Default)]
    struct Double {
        stuck: Mutex<Option<u32>>,
        /// Devices that the host has replaced behind their drivers' backs.
        replaced: Mutex<Vec<u32>>,
        unbound: Mutex<Vec<u32>>,
    }

    impl Drivers for Double {
        fn bind(&self, _: Number, device: u32) -> Result<(Number, bool), DiskError> {
            let is_new = self.replaced.lock().unwrap().contains(&device);
            let (major, minor) = (254, device * 16);
            Ok((Number { major, minor }, is_new))
        }

        fn unbind(&self, device: u32) -> io::Result<()> {
            if *self.stuck.lock().unwrap() == Some(device) {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            self.unbound.lock().unwrap().push(device);
            Ok(())
        }
    }

    fn disk(device: u32) -> Disk {
        Disk {
            device,
            major: 7,
            minor: device,
            ..Disk::default()
        }
    }

    fn unbound(disks: &Disks<Double>) -> Vec<u32> {
        let mut all = std::mem::take(&mut *disks.shared.drivers.unbound.lock().unwrap());
        all.sort_unstable();
        all
    }

    #[tokio::test]
    async fn a_disk_stays_for_its_last_container_and_one_that_does_not_go_is_asked_again() {
        let disks = Disks::<Double>::default();
        let placed = disks.give("a", &[disk(1), disk(2), disk(3)]).await.unwrap();
        assert_eq!(placed[2].guest.minor, 48);
        disks.give("b", &[disk(2)]).await.unwrap();
        *disks.shared.drivers.stuck.lock().unwrap() = Some(1);
        let error = disks.release("a").await.unwrap_err();
        assert!(error.to_string().contains("7:1"), "{error}");
        assert_eq!(unbound(&disks), [3]);
        *disks.shared.drivers.stuck.lock().unwrap() = None;
        disks.release("a").await.unwrap();
        assert_eq!(unbound(&disks), [1]);
        disks.release("a").await.unwrap();
        disks.release("b").await.unwrap();
        assert_eq!(unbound(&disks), [2]);
    }

    #[tokio::test]
    async fn a_second_release_answers_after_the_first() {
        let disks = Disks::<Double>::default();
        disks.give("a", &[disk(1)]).await.unwrap();
        let turn = Arc::clone(&disks.changing).lock_owned().await;
        let both = async { tokio::join!(disks.release("a"), disks.release("a")) };
        tokio::pin!(both);
        tokio::select! {
            biased;
            _ = &mut both => panic!("one did not wait for its turn"),
            () = std::future::ready(()) => {}
        }
        drop(turn);
        let (first, second) = both.await;
        first.and(second).unwrap();
        assert_eq!(unbound(&disks), [1]);
    }

    #[tokio::test]
    async fn who_had_a_disk_that_the_host_took_out_does_not_hold_the_next_one() {
        let disks = Disks::<Double>::default();
        disks.give("given up", &[disk(1)]).await.unwrap();
        disks.shared.drivers.replaced.lock().unwrap().push(1);
        disks.give("b", &[disk(1)]).await.unwrap();
        disks.release("given up").await.unwrap();
        assert_eq!(unbound(&disks), [0; 0]);
        disks.release("b").await.unwrap();
        assert_eq!(unbound(&disks), [1]);
    }
}
