//! What a user-mode network shows of the host's: the address and the way out of the interface that has the default route,
//! for each family. Pure, but for the listing.
//!
//! Contract: the interface that the guest gets has the name and the number of the host's, with one address and one default
//! route of each family that has a way out, and MAC addresses of its own. The rest of the host's addresses and routes are
//! the host's: whatever passt is asked for, the host's own kernel routes.
//! Spec: rtnetlink(7); passt(1), `--address`, `--gateway`: it takes the first default route too.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use caisson_agent_api::netlink::{self, Builder, attribute, u32_at};

use super::{
    netlink::Socket,
    view::{ARPHRD_ETHER, IFA_FLAGS, Listings},
};

/// The guest's MAC address: nobody but passt sees it.
pub(super) const GUEST_MAC: [u8; 6] = [0x02, 0xca, 0x15, 0x50, 0x00, 0x01];
/// passt takes packets of any size that IP allows, and cuts them itself.
const MTU: u32 = 65_520;

/// `IFA_F_TEMPORARY` (of IPv6; `IFA_F_SECONDARY` of IPv4), `IFA_F_DEPRECATED`, `IFA_F_TENTATIVE`: not for long.
const FLEETING: u32 = 0x01 | 0x20 | 0x40;
/// `RTPROT_STATIC`
const STATIC: u8 = 4;
/// `RTNH_F_ONLINK`: a gateway need not be within the address's prefix.
const ON_LINK: u32 = 4;

/// An address of the host and its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
    pub(super) gateway: Option<IpAddr>,
    index: u32,
}

/// The host's connection to the world; there is at least one way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outside {
    name: String,
    pub(super) index: u32,
    pub(super) v4: Option<Way>,
    pub(super) v6: Option<Way>,
}

impl Outside {
    /// That of the current network namespace; `None` if no default route leads out of it.
    pub(super) fn look() -> io::Result<Option<Self>> {
        let socket = Socket::open()?;
        Ok(Self::of(&Listings {
            links: socket.list(Builder::new(libc::RTM_GETLINK, 0, &[0; 16]))?,
            addresses: socket.list(Builder::new(libc::RTM_GETADDR, 0, &[0; 8]))?,
            routes: socket.list(Builder::new(libc::RTM_GETROUTE, 0, &[0; 12]))?,
            ..Listings::default()
        }))
    }

    fn of(listings: &Listings) -> Option<Self> {
        let v4 = way(listings, libc::AF_INET);
        let v6 = way(listings, libc::AF_INET6);
        let index = v4.or(v6)?.index;
        let name = bodies(&listings.links).find_map(|body| {
            let name = attribute(body.get(16..)?, libc::IFLA_IFNAME)?;
            (u32_at(body, 4)? == index).then_some(name)
        })?;
        Some(Self {
            name: String::from_utf8_lossy(name)
                .trim_end_matches('\0')
                .to_owned(),
            index,
            v4,
            v6,
        })
    }

    /// The ways there are.
    pub(super) fn ways(&self) -> impl Iterator<Item = Way> {
        self.v4.into_iter().chain(self.v6)
    }

    /// The guest's interface, as if it were in a namespace of the host.
    pub(super) fn listings(&self) -> Listings {
        let mut link = [0; 16];
        link[2..4].copy_from_slice(&ARPHRD_ETHER.to_ne_bytes());
        link[4..8].copy_from_slice(&self.index.to_ne_bytes());
        link[8..12].copy_from_slice(&libc::IFF_UP.unsigned_abs().to_ne_bytes());
        let link = Builder::new(libc::RTM_NEWLINK, 0, &link)
            .text(libc::IFLA_IFNAME, &self.name)
            .attribute(libc::IFLA_ADDRESS, &GUEST_MAC)
            .attribute(libc::IFLA_MTU, &MTU.to_ne_bytes());
        Listings {
            links: vec![link.finish()],
            addresses: self.ways().map(|way| way.address(self.index)).collect(),
            routes: self.ways().map(|way| way.route(self.index)).collect(),
            ..Listings::default()
        }
    }
}

impl Way {
    fn address(self, index: u32) -> Vec<u8> {
        let mut body = [family(self.address), self.prefix, 0, 0, 0, 0, 0, 0];
        body[4..].copy_from_slice(&index.to_ne_bytes());
        let octets = octets(self.address);
        Builder::new(libc::RTM_NEWADDR, 0, &body)
            .attribute(libc::IFA_LOCAL, &octets)
            .attribute(libc::IFA_ADDRESS, &octets)
            .attribute(IFA_FLAGS, &[0; 4])
            .finish()
    }

    fn route(self, index: u32) -> Vec<u8> {
        let mut body = [0; 12];
        body[0] = family(self.address);
        body[4] = libc::RT_TABLE_MAIN;
        body[5] = STATIC;
        body[7] = libc::RTN_UNICAST;
        if self.gateway.is_some() {
            body[8..].copy_from_slice(&ON_LINK.to_ne_bytes());
        } else if self.address.is_ipv4() {
            body[6] = libc::RT_SCOPE_LINK;
        }
        let route = Builder::new(libc::RTM_NEWROUTE, 0, &body)
            .attribute(libc::RTA_OIF, &index.to_ne_bytes());
        match self.gateway {
            Some(gateway) => route.attribute(libc::RTA_GATEWAY, &octets(gateway)),
            None => route,
        }
        .finish()
    }
}

/// The first default route of a family whose interface has an address, in the kernel's order: the nearest one.
fn way(listings: &Listings, family: i32) -> Option<Way> {
    let routes = bodies(&listings.routes).filter_map(|body| {
        let (fixed, rest) = body.split_at_checked(12)?;
        let is_default = i32::from(fixed[0]) == family
            && fixed[1] == 0
            && fixed[4] == libc::RT_TABLE_MAIN
            && fixed[7] == libc::RTN_UNICAST;
        let index = u32_at(attribute(rest, libc::RTA_OIF)?, 0)?;
        let gateway = attribute(rest, libc::RTA_GATEWAY).and_then(ip);
        is_default.then_some((index, gateway))
    });
    routes.into_iter().find_map(|(index, gateway)| {
        let (address, prefix) = address(listings, family, index)?;
        Some(Way {
            address,
            prefix,
            gateway,
            index,
        })
    })
}

/// An interface's first address that is there to stay; else its first.
fn address(listings: &Listings, family: i32, index: u32) -> Option<(IpAddr, u8)> {
    let all = || {
        bodies(&listings.addresses).filter_map(|body| {
            let (fixed, rest) = body.split_at_checked(8)?;
            let is_it = i32::from(fixed[0]) == family
                && u32_at(fixed, 4)? == index
                && fixed[3] == libc::RT_SCOPE_UNIVERSE;
            let value =
                attribute(rest, libc::IFA_LOCAL).or_else(|| attribute(rest, libc::IFA_ADDRESS))?;
            let flags = attribute(rest, IFA_FLAGS).and_then(|flags| u32_at(flags, 0));
            let address = (ip(value)?, fixed[1]);
            is_it.then_some((address, flags.unwrap_or(0)))
        })
    };
    let stays = all().find(|(_, flags)| flags & FLEETING == 0);
    stays.or_else(|| all().next()).map(|(address, _)| address)
}

fn bodies(listing: &[Vec<u8>]) -> impl Iterator<Item = &[u8]> {
    listing
        .iter()
        .flat_map(|message| netlink::messages(message))
        .map(|message| message.body)
}

fn ip(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(octets)
        .ok()
        .map(|v6| Ipv6Addr::from(v6).into())
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // 2 and 10.
    u8::try_from(family).unwrap_or(0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::network::view::View;

    /// What is seen of a host with these addresses and gateways.
    pub(in crate::network) fn seen(name: &str, index: u32, ways: &[(&str, &str)]) -> Outside {
        let ways: Vec<_> = ways
            .iter()
            .map(|(address, gateway)| (*address, 24, Some(*gateway)))
            .collect();
        Outside::of(&host(name, index, &ways)).unwrap()
    }

    fn host(name: &str, index: u32, ways: &[(&str, u8, Option<&str>)]) -> Listings {
        let way = |(address, prefix, gateway): &(&str, u8, Option<&str>)| Way {
            address: address.parse().unwrap(),
            prefix: *prefix,
            gateway: gateway.map(|text| text.parse().unwrap()),
            index,
        };
        let ways: Vec<Way> = ways.iter().map(way).collect();
        let outside = Outside {
            name: name.to_owned(),
            index,
            v4: None,
            v6: None,
        };
        Listings {
            addresses: ways.iter().map(|way| way.address(index)).collect(),
            routes: ways.iter().map(|way| way.route(index)).collect(),
            ..outside.listings()
        }
    }

    fn also(mut one: Listings, other: Listings) -> Listings {
        one.links.extend(other.links);
        one.addresses.extend(other.addresses);
        one.routes.extend(other.routes);
        one
    }

    #[test]
    fn each_family_has_the_address_of_its_own_default_route() {
        let listings = also(
            host("lan0", 2, &[("192.0.2.7", 24, Some("192.0.2.1"))]),
            host("six0", 3, &[("2001:db8::7", 64, Some("fe80::1"))]),
        );
        let outside = Outside::of(&listings).unwrap();
        assert_eq!((outside.name.as_str(), outside.index), ("lan0", 2));
        let seen: Vec<String> = outside
            .ways()
            .map(|way| format!("{}/{} {:?}", way.address, way.prefix, way.gateway))
            .collect();
        assert_eq!(
            seen,
            [
                "192.0.2.7/24 Some(192.0.2.1)",
                "2001:db8::7/64 Some(fe80::1)"
            ]
        );
    }

    #[test]
    fn the_first_default_route_with_an_address_counts() {
        let mut bare = host("bare0", 2, &[("198.51.100.1", 24, Some("198.51.100.2"))]);
        bare.addresses.clear();
        let listings = also(
            bare,
            host(
                "lan0",
                5,
                &[("192.0.2.7", 32, None), ("192.0.2.8", 32, None)],
            ),
        );
        let outside = Outside::of(&listings).unwrap();
        let way = outside.v4.unwrap();
        assert_eq!(
            (way.address.to_string(), way.gateway),
            ("192.0.2.7".into(), None)
        );
        assert_eq!((outside.index, outside.v6), (5, None));
    }

    #[test]
    fn without_a_default_route_there_is_no_outside() {
        let mut listings = host("lan0", 2, &[("192.0.2.7", 24, Some("192.0.2.1"))]);
        listings.routes.clear();
        assert_eq!(Outside::of(&listings), None);
        assert_eq!(Outside::of(&Listings::default()), None);
    }

    #[test]
    fn the_guest_gets_one_interface_with_what_was_found() {
        let ways = [
            ("192.0.2.7", 24, Some("192.0.2.1")),
            ("2001:db8::7", 64, Some("fe80::1")),
        ];
        let outside = Outside::of(&host("lan0", 2, &ways)).unwrap();
        let view = View::of(&outside.listings());
        let interface = &view.interfaces[&2];
        assert_eq!((interface.name.as_str(), interface.mtu), ("lan0", MTU));
        assert!(interface.up && interface.ipv6 && interface.mac == GUEST_MAC);
        let made = View::default().difference(&view).requests;
        let kinds: Vec<u16> = netlink::messages(&made)
            .map(|message| message.kind)
            .collect();
        let (address, link, route) = (libc::RTM_NEWADDR, libc::RTM_NEWLINK, libc::RTM_NEWROUTE);
        assert_eq!(kinds, [address, address, link, route, route]);
    }
}
