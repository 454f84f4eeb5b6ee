//! What has passed between a namespace's interfaces and its virtual machine, by the count of the host's kernel.
//!
//! Contract: the taps count, whoever moves the packets (the VMM, vhost-net), so nothing is counted twice and nothing is added
//! to a packet's way. A tap says in its alias which interface it is joined to. What the host keeps to itself is not counted.
//! Not here: a user-mode network, which has no tap.
//! Spec: `linux/if_link.h`, `struct rtnl_link_stats64`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use caisson_agent_api::netlink::{Builder, attribute, messages};

use super::{RECORD, Record, namespace::Place, netlink::Socket, view::TAP_PREFIX};

/// Names the interface that a tap is joined to.
pub(super) const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;

// `struct rtnl_link_stats64`: places of its fields. What a tap receives is what the guest sends.
const RX_PACKETS: usize = 0;
const TX_PACKETS: usize = 1;
const RX_BYTES: usize = 2;
const TX_BYTES: usize = 3;
const RX_DROPPED: usize = 6;
const TX_DROPPED: usize = 7;

/// One direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// With Ethernet headers.
    pub bytes: u64,
    /// Packets; a segment that is cut up later is one.
    pub packets: u64,
    /// Packets that did not pass.
    pub dropped: u64,
}

/// An interface of the guest's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Its name.
    pub interface: String,
    /// To the guest.
    pub received: Passed,
    /// From the guest.
    pub sent: Passed,
}

/// The network namespace of a sandbox, as another process finds it.
#[derive(Debug)]
pub struct Namespace {
    path: PathBuf,
    inode: u64,
}

impl Namespace {
    /// That of the process that holds the sandbox, whose directory this is: what is written down there, else its own.
    pub fn of(holder: u32, state_dir: &Path) -> io::Result<Self> {
        let record = fs::read(state_dir.join(RECORD)).ok();
        let record = record.and_then(|text| serde_json::from_slice::<Record>(&text).ok());
        let own = || PathBuf::from(format!("/proc/{holder}/ns/net"));
        let path = record.map_or_else(own, |record| record.place.path().to_owned());
        let inode = File::open(&path)?.metadata()?.ino();
        Ok(Self { path, inode })
    }

    /// Tells it from others: containers may share one.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// What has passed, by the order of the taps. Nothing, if it is gone.
    pub fn traffic(&self) -> io::Result<Vec<Traffic>> {
        let list = || Socket::open()?.list(Builder::new(libc::RTM_GETLINK, 0, &[0; 16]));
        let listed = Place::of(&self.path)?.visit(list)?.unwrap_or_default();
        let all = listed.iter().flat_map(|datagram| messages(datagram));
        Ok(all.filter_map(|message| counted(message.body)).collect())
    }
}

/// The numbers of one link, if it is a tap that is joined to an interface.
fn counted(link: &[u8]) -> Option<Traffic> {
    let attributes = link.get(16..)?;
    let name = attribute(attributes, libc::IFLA_IFNAME)?;
    if !name.starts_with(TAP_PREFIX.as_bytes()) {
        return None;
    }
    let interface = attribute(attributes, IFLA_IFALIAS)?;
    let stats = attribute(attributes, IFLA_STATS64)?;
    let field = |place: usize| {
        let bytes = stats.get(8 * place..8 * place + 8)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    };
    let passed = |bytes, packets, dropped| {
        Some(Passed {
            bytes: field(bytes)?,
            packets: field(packets)?,
            dropped: field(dropped)?,
        })
    };
    Some(Traffic {
        interface: String::from_utf8_lossy(interface)
            .trim_end_matches('\0')
            .to_owned(),
        received: passed(TX_BYTES, TX_PACKETS, TX_DROPPED)?,
        sent: passed(RX_BYTES, RX_PACKETS, RX_DROPPED)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, alias: Option<&str>) -> Vec<u8> {
        let fields: Vec<u8> = (1..=24_u64).flat_map(u64::to_ne_bytes).collect();
        let link = Builder::part()
            .text(libc::IFLA_IFNAME, name)
            .attribute(IFLA_STATS64, &fields);
        let link = match alias {
            Some(alias) => link.text(IFLA_IFALIAS, alias),
            None => link,
        };
        [vec![0; 16], link.into_part()].concat()
    }

    #[test]
    fn what_a_tap_receives_is_what_its_interface_sends() {
        let passed = |bytes, packets, dropped| Passed {
            bytes,
            packets,
            dropped,
        };
        let expected = Traffic {
            interface: "eth0".into(),
            received: passed(4, 2, 8),
            sent: passed(3, 1, 7),
        };
        assert_eq!(counted(&link("caisson0", Some("eth0"))), Some(expected));
    }

    #[test]
    fn what_is_no_joined_tap_is_not_counted() {
        assert_eq!(counted(&link("eth0", Some("eth0"))), None);
        assert_eq!(counted(&link("caisson0", None)), None);
        assert_eq!(counted(&[0; 20]), None);
    }

    #[test]
    fn a_namespace_is_found_by_its_holder() {
        // This process's own: nobody else's is looked into.
        let dir = tempfile::tempdir().unwrap();
        let namespace = Namespace::of(std::process::id(), dir.path()).unwrap();
        let own = File::open("/proc/self/ns/net").unwrap();
        assert_eq!(namespace.inode(), own.metadata().unwrap().ino());
        assert!(Namespace::of(0, dir.path()).is_err());
    }
}
