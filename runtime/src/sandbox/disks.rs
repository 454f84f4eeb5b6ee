//! The disks of a sandbox: which block device of the host is in which place of the virtual machine, and for whom.
//!
//! ```text
//!  claim -> Plugging --plugged--> There --last user forgotten--> Idle --> Leaving --unplugged--> (gone, its place is free)
//!              +--refused--> (gone)
//! ```
//!
//! Contract: containers that are given the same device share one disk, so that they see what the others write. It stays
//! for as long as one of them exists. Every claim is answered.
//! Not here: the requests to the VMM (`owner.rs`), the drivers in the guest (the agent).

use tokio::sync::oneshot;

use super::{Reply, SandboxError};
use crate::{
    disks::{About, Number},
    slots::{Slots, device},
};

/// A disk.
#[derive(Debug)]
struct Held {
    slot: u8,
    about: About,
    /// The containers that have it.
    users: Vec<String>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The VMM has been asked for it; who waits.
    Plugging(Vec<Reply<u32>>),
    There,
    /// Nobody has it any more; who waits for it to be gone.
    Idle(Vec<oneshot::Sender<()>>),
    /// The VMM has been asked to take it out.
    Leaving {
        /// Dropped when it is gone.
        _told: Vec<oneshot::Sender<()>>,
    },
}

/// What a claim leads to.
#[derive(Debug)]
pub(super) struct Claim {
    /// Tells the guest's number for the device.
    pub(super) device: oneshot::Receiver<Result<u32, SandboxError>>,
    /// The place into which the disk is to be plugged, if it is not there yet.
    pub(super) plug: Option<u8>,
}

/// All disks.
#[derive(Debug)]
pub(super) struct Disks {
    slots: Slots,
    held: Vec<Held>,
}

impl Disks {
    pub(super) fn new(slots: Slots) -> Self {
        Self {
            slots,
            held: Vec::new(),
        }
    }

    /// A container is to have a disk.
    pub(super) fn claim(&mut self, id: &str, about: About) -> Result<Claim, SandboxError> {
        let (reply, device_told) = oneshot::channel();
        let is_it = |held: &&mut Held| held.about.number == about.number && held.stays();
        if let Some(held) = self.held.iter_mut().find(is_it) {
            if held.about.read_only && !about.read_only {
                return Err(SandboxError::ReadOnly(about.number));
            }
            held.users.push(id.to_owned());
            match &mut held.phase {
                Phase::Plugging(waiting) => waiting.push(reply),
                // Its receiver is here.
                _ => drop(reply.send(Ok(device(held.slot)))),
            }
            return Ok(Claim {
                device: device_told,
                plug: None,
            });
        }
        let slot = self.slots.take_last();
        let slot = slot.ok_or(SandboxError::NoSlot(about.number))?;
        self.held.push(Held {
            slot,
            about,
            users: vec![id.to_owned()],
            phase: Phase::Plugging(vec![reply]),
        });
        Ok(Claim {
            device: device_told,
            plug: Some(slot),
        })
    }

    /// The VMM has plugged a disk in.
    pub(super) fn plugged(&mut self, slot: u8) {
        if let Some(held) = self.held.iter_mut().find(|held| held.slot == slot) {
            let now = match held.users.is_empty() {
                true => Phase::Idle(Vec::new()),
                false => Phase::There,
            };
            let Phase::Plugging(waiting) = std::mem::replace(&mut held.phase, now) else {
                return;
            };
            for reply in waiting {
                drop(reply.send(Ok(device(slot))));
            }
        }
    }

    /// It could not.
    pub(super) fn refused(&mut self, slot: u8, message: &str) {
        for held in self.held.extract_if(.., |held| held.slot == slot) {
            self.slots.give_back(slot);
            let Phase::Plugging(waiting) = held.phase else {
                continue;
            };
            for reply in waiting {
                let number = held.about.number;
                let message = message.to_owned();
                drop(reply.send(Err(SandboxError::Disk { number, message })));
            }
        }
    }

    /// A container is gone, and no driver uses what it alone had. Each of the answers ends when such a disk is gone, too.
    pub(super) fn forget(&mut self, id: &str) -> Vec<oneshot::Receiver<()>> {
        let mut leaving = Vec::new();
        for held in &mut self.held {
            held.users.retain(|user| user != id);
            if held.users.is_empty() && matches!(held.phase, Phase::There) {
                let (told, gone) = oneshot::channel();
                held.phase = Phase::Idle(vec![told]);
                leaving.push(gone);
            }
        }
        leaving
    }

    /// The places of disks that nobody has any more, to be unplugged now.
    pub(super) fn idle(&mut self) -> Vec<u8> {
        let mut slots = Vec::new();
        for held in &mut self.held {
            if let Phase::Idle(told) = &mut held.phase {
                let _told = std::mem::take(told);
                held.phase = Phase::Leaving { _told };
                slots.push(held.slot);
            }
        }
        slots
    }

    /// The VMM has taken a disk out.
    pub(super) fn unplugged(&mut self, slot: u8) {
        for gone in self.held.extract_if(.., |held| held.slot == slot) {
            self.slots.give_back(gone.slot);
        }
    }

    /// How a disk calls itself in the guest.
    pub(super) fn serial(number: Number) -> String {
        format!("host-{number}")
    }
}

impl Held {
    fn stays(&self) -> bool {
        matches!(self.phase, Phase::Plugging(_) | Phase::There)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot::error::TryRecvError;

    fn about(minor: u32, read_only: bool) -> About {
        About {
            number: Number { major: 7, minor },
            read_only,
        }
    }

    fn told(claim: &mut Claim) -> Option<Result<u32, String>> {
        let told = claim.device.try_recv().ok()?;
        Some(told.map_err(|error| error.to_string()))
    }

    #[test]
    fn containers_with_the_same_device_share_a_disk_for_as_long_as_one_is_there() {
        let mut disks = Disks::new(Slots::new(2));
        let mut first = disks.claim("a", about(0, false)).unwrap();
        let mut second = disks.claim("b", about(0, true)).unwrap();
        assert_eq!((first.plug, second.plug), (Some(1), None));
        assert_eq!(told(&mut first), None);
        disks.plugged(1);
        let device = Some(Ok(device(1)));
        assert_eq!(
            (told(&mut first), told(&mut second)),
            (device.clone(), device.clone())
        );
        assert_eq!(
            told(&mut disks.claim("c", about(0, false)).unwrap()),
            device
        );
        for user in ["a", "c"] {
            assert!(disks.forget(user).is_empty() && disks.idle().is_empty());
        }
        let mut gone = disks.forget("b");
        assert_eq!(disks.idle(), [1]);
        assert!(disks.idle().is_empty());
        // One that comes now finds another place.
        assert_eq!(disks.claim("d", about(0, false)).unwrap().plug, Some(0));
        assert_eq!(gone[0].try_recv(), Err(TryRecvError::Empty));
        disks.unplugged(1);
        assert_eq!(gone[0].try_recv(), Err(TryRecvError::Closed));
        assert_eq!(disks.claim("e", about(1, false)).unwrap().plug, Some(1));
    }

    #[test]
    fn a_disk_that_cannot_be_had_leaves_its_place() {
        let mut disks = Disks::new(Slots::new(1));
        let mut claim = disks.claim("a", about(0, true)).unwrap();
        let full = disks.claim("a", about(1, true)).unwrap_err();
        assert!(
            full.to_string()
                .contains("7:1: the virtual machine has no device left"),
            "{full}"
        );
        disks.refused(0, "no thread");
        assert!(told(&mut claim).unwrap().unwrap_err().contains("no thread"));
        assert_eq!(disks.claim("a", about(1, true)).unwrap().plug, Some(0));
        // Not even if its users went while it was on its way.
        disks.forget("a");
        assert!(disks.idle().is_empty());
        disks.plugged(0);
        assert_eq!(disks.idle(), [0]);
    }

    #[test]
    fn a_disk_that_is_read_only_for_one_is_not_written_by_another() {
        let mut disks = Disks::new(Slots::new(1));
        disks.claim("a", about(0, true)).unwrap();
        let error = disks.claim("b", about(0, false)).unwrap_err();
        assert!(error.to_string().contains("read-only"), "{error}");
    }
}
