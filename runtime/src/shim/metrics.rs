//! What a container uses, as containerd is told of it: the guest's numbers in the message of the host's cgroups.
//!
//! Contract: pure. The guest has cgroup v2 whatever the host has; containerd's collector on a host with cgroup v1 takes
//! nothing but the message of v1, as runc's shim gives it there. Numbers that the guest's kernel does not count are zero.

use containerd_shim_protos::protobuf::{MessageFull, well_known_types::any::Any};

use crate::stats::Stats;

mod v1;
mod v2;

/// The answer to `Stats`, on a host whose cgroups are v2 or not.
pub(super) fn metrics(stats: &Stats, on_v2: bool) -> Any {
    match on_v2 {
        true => any(&v2::message(stats)),
        false => any(&v1::message(stats)),
    }
}

fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        // A message of numbers always encodes.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_cgroups_choose_the_message() {
        let named = |on_v2| metrics(&Stats::default(), on_v2).type_url;
        assert_eq!(named(true), "io.containerd.cgroups.v2.Metrics");
        assert_eq!(named(false), "io.containerd.cgroups.v1.Metrics");
    }
}
