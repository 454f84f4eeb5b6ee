//! What a change on the host means for the virtual machine and the guest: found out, and carried out.
//!
//! Contract: what cannot be done of a change is complained of, and the rest of it is done. An interface that cannot be
//! joined or plugged in is as if it had not appeared: it leaves its place, the guest is not told of it, and it is not
//! tried again while it is there. A place is free again when the VMM has unplugged what was in it.

use caisson_agent_api as api;

use super::{Difference, Interface, Network, NetworkError, Plug, View, device, host};
use crate::{
    sandbox::{Sandbox, SandboxError},
    slots::Slots,
};

/// What a change on the host means for the virtual machine, in this order: what is plugged in, what the agent is told
/// ([`Network::told`]), what is unplugged.
#[derive(Debug)]
pub struct Change {
    plugs: Vec<Plug>,
    /// What the guest has so far.
    before: View,
    /// They are given back when they are free again.
    unplugs: Vec<u8>,
    places: Slots,
}

impl Network {
    /// What has changed since the last look, if anything.
    pub fn change(&mut self) -> Result<Option<Change>, NetworkError> {
        if !self.notices.take() {
            return Ok(None);
        }
        let mut next = self.look()?;
        self.failed
            .retain(|index| next.interfaces.contains_key(index));
        for index in &self.failed {
            next.forget(*index);
        }
        let difference = self.within_slots(&mut next);
        if difference.is_none() {
            self.view = next;
            return Ok(None);
        }
        self.adapt(&difference, &next);
        let plugs = self.connect_more(&mut next, &difference.appeared);
        // Only now: what has just come is plugged in before these are unplugged.
        let unplugs = self.part_from(&difference.gone);
        if let Err(source) = self.keep_record() {
            let step = "write down what is connected";
            self.complain(&NetworkError::Host { step, source });
        }
        Ok(Some(Change {
            plugs,
            before: std::mem::replace(&mut self.view, next),
            unplugs,
            places: self.places.clone(),
        }))
    }

    /// Has taps follow their interfaces. One that does not is complained of, and the guest follows all the same.
    fn adapt(&mut self, difference: &Difference, next: &View) {
        let mut failed = Vec::new();
        for occupant in self.slots.iter().flatten() {
            let index = &occupant.index;
            let (Some(joint), Some(now)) = (&occupant.joint, next.interfaces.get(index)) else {
                continue;
            };
            if difference.resized.contains(index)
                && let Err(error) = joint.resize(now.mtu)
            {
                failed.push(host("set a tap's MTU")(error));
            }
            if difference.readdressed.contains(index)
                && let Err(error) = joint.readdress(now.mac)
            {
                failed.push(host("let an interface's new address through")(error));
            }
        }
        failed.iter().for_each(|error| self.complain(error));
    }

    /// Joins interfaces that have appeared. Those that cannot be are complained of and taken from `next`.
    fn connect_more(&mut self, next: &mut View, appeared: &[u32]) -> Vec<Plug> {
        let mut plugs = Vec::new();
        for index in appeared {
            let Some(interface) = next.interfaces.get(index) else {
                continue;
            };
            match self.connect_one(*index, interface) {
                Ok(plug) => plugs.push(plug),
                Err(error) => {
                    self.complain(&error);
                    next.forget(*index);
                    self.failed.push(*index);
                }
            }
        }
        plugs
    }

    /// Parts from interfaces; answers the places that are to be unplugged.
    fn part_from(&mut self, gone: &[u32]) -> Vec<u8> {
        let mut unplugs = Vec::new();
        for (slot, place) in (0..).zip(&mut self.slots) {
            if place.take_if(|it| gone.contains(&it.index)).is_some() {
                unplugs.push(slot);
            }
        }
        unplugs
    }

    /// What the agent is told of a change, after its plugs; `failed` were not plugged in, and are as if they had not
    /// appeared.
    fn told(&mut self, change: &Change, failed: &[u8]) -> api::Network {
        for slot in failed {
            if let Some(place) = self.slots.get_mut(usize::from(*slot))
                && let Some(occupant) = place.take()
            {
                self.view.forget(occupant.index);
                self.failed.push(occupant.index);
                self.places.give_back(*slot);
            }
        }
        let difference = change.before.difference(&self.view);
        let mut guest = self.guest(difference, &self.view);
        guest.gone = change.unplugs.iter().map(|slot| device(*slot)).collect();
        guest
    }

    /// How the virtual machine's view becomes `next`, from which those interfaces are taken that find no free slot.
    fn within_slots(&mut self, next: &mut View) -> Difference {
        let difference = self.view.difference(next);
        let free = self.places.free();
        if difference.appeared.len() <= free {
            return difference;
        }
        for index in difference.appeared.iter().skip(free) {
            if let Some(Interface { name, .. }) = next.forget(*index) {
                self.complain(&NetworkError::Full { name });
            }
        }
        self.view.difference(next)
    }
}

/// Has the virtual machine and its agent follow: all of it that can be done. Answers what could not.
pub(super) async fn carry_out(
    network: &mut Network,
    mut change: Change,
    sandbox: &Sandbox,
    id: &str,
) -> Vec<SandboxError> {
    let (mut failed, mut errors) = (Vec::new(), Vec::new());
    for plug in std::mem::take(&mut change.plugs) {
        let slot = plug.slot;
        if let Err(error) = sandbox.plug(plug).await {
            failed.push(slot);
            errors.push(error);
        }
    }
    let guest = network.told(&change, &failed);
    if guest != api::Network::default() {
        errors.extend(sandbox.update_network(id, guest).await.err());
    }
    errors.extend(change.unplug(sandbox).await);
    errors
}

impl Change {
    /// A place that could not be unplugged stays taken.
    async fn unplug(&mut self, sandbox: &Sandbox) -> Vec<SandboxError> {
        let mut errors = Vec::new();
        for slot in std::mem::take(&mut self.unplugs) {
            match sandbox.unplug(slot).await {
                Ok(()) => self.places.give_back(slot),
                Err(error) => errors.push(error),
            }
        }
        errors
    }

    /// The virtual machine's part, before there is a container whose agent could be told.
    pub async fn plug(mut self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        let errors = self.unplug(sandbox).await;
        for plug in self.plugs {
            sandbox.plug(plug).await?;
        }
        errors.into_iter().next().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use caisson_vmm_spec::MAX_NETWORKS;

    use super::*;
    use crate::network::{Occupant, sockets};

    /// A network over sockets of this process's own namespace, whose interfaces are never joined.
    fn network(dir: &Path, places: usize) -> Network {
        let mut network = Network::over(sockets().unwrap(), None, dir);
        network.places = Slots::new(places);
        network.slots.resize_with(MAX_NETWORKS, || None);
        network
    }

    fn occupy(network: &mut Network, index: u32) -> u8 {
        let slot = network.places.take_first().unwrap();
        network.slots[usize::from(slot)] = Some(Occupant { index, joint: None });
        let interface = Interface {
            name: format!("eth{index}"),
            mac: [2; 6],
            mtu: 1500,
            up: true,
            ipv6: true,
        };
        network.view.interfaces.insert(index, interface);
        slot
    }

    fn change(network: &Network, unplugs: Vec<u8>) -> Change {
        Change {
            plugs: Vec::new(),
            before: View::default(),
            unplugs,
            places: network.places(),
        }
    }

    #[test]
    fn an_interface_that_cannot_be_plugged_in_leaves_its_place_and_is_not_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let mut network = network(dir.path(), 2);
        let (first, second) = (occupy(&mut network, 7), occupy(&mut network, 8));
        let change = change(&network, Vec::new());
        let guest = network.told(&change, &[first]);
        let told: Vec<u32> = guest.appeared.iter().map(|it| it.device).collect();
        assert_eq!(told, [device(second)]);
        assert_eq!(network.places.take_first(), Some(first));
        assert!(!network.view.interfaces.contains_key(&7));
        assert_eq!(network.failed, [7]);
    }

    #[test]
    fn a_place_is_not_free_before_it_has_been_unplugged() {
        let dir = tempfile::tempdir().unwrap();
        let mut network = network(dir.path(), 1);
        let slot = occupy(&mut network, 7);
        assert_eq!(network.part_from(&[7]), [slot]);
        assert_eq!(network.places.free(), 0);
        let change = change(&network, vec![slot]);
        let guest = network.told(&change, &[]);
        assert_eq!(guest.gone, [device(slot)]);
        assert_eq!(network.places.free(), 0);
    }
}
