//! What is in a network namespace, as far as a guest can have it too, and how one view becomes another: pure functions.
//!
//! Contract: a view holds every Ethernet interface except the taps of virtual machines, with the addresses, routes,
//! permanent neighbours and rules that belong to them or to none; what a kernel makes by itself (local and prefix routes,
//! the rules of its own, addresses of loopback) is left to the guest's kernel. Settings are kept as the kernel lists them, reduced to
//! what a request may say, so that none is lost for want of a name here.
//! Spec: rtnetlink(7), `linux/rtnetlink.h`, `linux/if_link.h`.

use std::collections::{BTreeMap, BTreeSet};

use caisson_agent_api::netlink::{self, Builder, attribute, attributes, u16_at, u32_at};

use super::netlink::NEW;

/// How the taps of virtual machines are called, in every namespace.
pub(super) const TAP_PREFIX: &str = "caisson";

/// The loopback interface's number, in every namespace.
const LOOPBACK: u32 = 1;

pub(super) const ARPHRD_ETHER: u16 = 1;
/// `linux/if_link.h`, the nested attributes of an interface's IPv6 configuration.
const IFLA_INET6_CONF: u16 = 2;
/// `linux/ipv6.h`, `DEVCONF_DISABLE_IPV6`: an index into the above.
const DISABLE_IPV6: usize = 26;

/// `linux/if_addr.h`
pub(super) const IFA_FLAGS: u16 = 8;
const IFA_RT_PRIORITY: u16 = 9;
/// `IFA_F_NODAD`: the host has looked for duplicates.
const NO_DUPLICATES: u32 = 0x2;
/// `IFA_F_NOPREFIXROUTE`, `IFA_F_MANAGETEMPADDR`, `IFA_F_HOMEADDRESS`: what may be asked for.
const ADDRESS_FLAGS: u32 = 0x200 | 0x100 | 0x10;

/// `RTNH_F_PERVASIVE`, `RTNH_F_ONLINK`: what may be asked for.
const ROUTE_FLAGS: u32 = 0x2 | 0x4;
/// `RTM_F_CLONED`: a cache entry.
const CLONED: u32 = 0x200;
/// `RTPROT_REDIRECT`, `RTPROT_KERNEL`, `RTPROT_RA`: routes that a kernel makes itself.
const KERNELS_ROUTES: [u8; 3] = [1, 2, 9];
/// What a route consists of (`RTA_*`).
const ROUTE_ATTRIBUTES: [u16; 14] = [
    libc::RTA_DST,
    libc::RTA_SRC,
    libc::RTA_OIF,
    libc::RTA_GATEWAY,
    libc::RTA_PRIORITY,
    libc::RTA_PREFSRC,
    libc::RTA_METRICS,
    libc::RTA_MULTIPATH,
    libc::RTA_FLOW,
    libc::RTA_TABLE,
    18, // RTA_VIA
    20, // RTA_PREF
    21, // RTA_ENCAP_TYPE
    22, // RTA_ENCAP
];

const NUD_PERMANENT: u16 = 0x80;
/// `linux/fib_rules.h`: `FRA_PROTOCOL`, and its value for a kernel's own rules.
const RULE_PROTOCOL: u16 = 21;
const RULES_OF_KERNEL: u8 = 2;

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) ipv6: bool,
}

/// An address, route, neighbour or rule: the order is that in which they can be made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Setting {
    /// `RTM_NEW...`
    kind: u16,
    /// Routes that need other routes come after them.
    rank: u8,
    /// Its place in the kernel's listing, where that matters.
    place: usize,
    /// The interface without which it is nothing.
    interface: Option<u32>,
    body: Vec<u8>,
}

/// What a namespace holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct View {
    pub(super) interfaces: BTreeMap<u32, Interface>,
    settings: BTreeSet<Setting>,
    /// Numbers of the taps of virtual machines.
    pub(super) taps: BTreeSet<u32>,
    /// Interfaces that no virtual machine can have: name and why.
    pub(super) strange: BTreeSet<(String, &'static str)>,
}

/// The kernel's listings.
#[derive(Debug, Default)]
pub(super) struct Listings {
    pub(super) links: Vec<Vec<u8>>,
    pub(super) addresses: Vec<Vec<u8>>,
    pub(super) routes: Vec<Vec<u8>>,
    pub(super) neighbours: Vec<Vec<u8>>,
    pub(super) rules: Vec<Vec<u8>>,
}

/// What leads from one view to another.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) gone: Vec<u32>,
    pub(super) appeared: Vec<u32>,
    /// Interfaces whose MTU is another now.
    pub(super) resized: Vec<u32>,
    /// Interfaces whose MAC address is another now.
    pub(super) readdressed: Vec<u32>,
    /// For the guest's kernel, in order.
    pub(super) requests: Vec<u8>,
    /// Below `/proc/sys/net`, before the requests.
    pub(super) sysctls: Vec<(String, String)>,
}

impl View {
    /// Reads the listings.
    pub(super) fn of(listings: &Listings) -> Self {
        let mut view = Self::default();
        for body in bodies(&listings.links) {
            view.link(body);
        }
        let known = |index: &u32| *index == LOOPBACK || view.interfaces.contains_key(index);
        let addresses = bodies(&listings.addresses).filter_map(address);
        let routes = bodies(&listings.routes).filter_map(route);
        let neighbours = bodies(&listings.neighbours).filter_map(neighbour);
        let rules = bodies(&listings.rules).filter_map(rule);
        let settings = addresses.chain(routes).chain(neighbours).chain(rules);
        let settings = settings.filter(|setting| setting.interface.as_ref().is_none_or(known));
        let ordered = settings.enumerate().map(|(place, setting)| Setting {
            // The first address of an interface is its primary one.
            place: if setting.kind == libc::RTM_NEWADDR {
                place
            } else {
                0
            },
            ..setting
        });
        view.settings = ordered.collect();
        view
    }

    fn link(&mut self, body: &[u8]) {
        let (Some(index), Some(flags)) = (u32_at(body, 4), u32_at(body, 8)) else {
            return;
        };
        let rest = body.get(16..).unwrap_or_default();
        let name = attribute(rest, libc::IFLA_IFNAME).unwrap_or_default();
        let name = String::from_utf8_lossy(name)
            .trim_end_matches('\0')
            .to_owned();
        let number = |kind| attribute(rest, kind).and_then(|value| u32_at(value, 0));
        let is_up = flags & libc::IFF_UP.unsigned_abs() != 0;
        if index == LOOPBACK || flags & libc::IFF_LOOPBACK.unsigned_abs() != 0 {
            return;
        }
        if is_tap(&name) {
            self.taps.insert(index);
            return;
        }
        let mac = attribute(rest, libc::IFLA_ADDRESS).and_then(|mac| mac.try_into().ok());
        let (true, Some(mac)) = (u16_at(body, 2) == Some(ARPHRD_ETHER), mac) else {
            // Those that every namespace has once their module is loaded are down.
            if is_up {
                self.strange.insert((name, "it is not Ethernet"));
            }
            return;
        };
        if number(libc::IFLA_MASTER).is_some() {
            self.strange
                .insert((name, "it is part of another interface"));
            return;
        }
        let lower = number(libc::IFLA_LINK).filter(|lower| *lower != 0 && *lower != index);
        if lower.is_some() && attribute(rest, libc::IFLA_LINK_NETNSID).is_none() {
            self.strange
                .insert((name, "it is on top of another interface of its namespace"));
            return;
        }
        let mtu = number(libc::IFLA_MTU).unwrap_or(1500);
        let interface = Interface {
            name,
            mac,
            mtu,
            up: is_up,
            ipv6: !ipv6_is_disabled(rest),
        };
        self.interfaces.insert(index, interface);
    }

    /// Takes an interface out, with all that belongs to it.
    pub(super) fn forget(&mut self, index: u32) -> Option<Interface> {
        self.settings
            .retain(|setting| setting.interface != Some(index));
        self.interfaces.remove(&index)
    }

    /// How this view becomes `next`.
    pub(super) fn difference(&self, next: &Self) -> Difference {
        let mut difference = Difference::default();
        let same = |index: &u32| {
            let both = (self.interfaces.get(index), next.interfaces.get(index));
            matches!(both, (Some(_), Some(_)))
        };
        let missing_in = |all: &BTreeMap<u32, Interface>| -> Vec<u32> {
            all.keys().copied().filter(|index| !same(index)).collect()
        };
        difference.gone = missing_in(&self.interfaces);
        difference.appeared = missing_in(&next.interfaces);
        let gone: BTreeSet<u32> = difference.gone.iter().copied().collect();
        // In the opposite order of their making. What belongs to an interface goes with it.
        let unmade: Vec<&Setting> = self.settings.difference(&next.settings).collect();
        for setting in unmade.into_iter().rev() {
            let goes_along = setting.interface.is_some_and(|index| gone.contains(&index));
            let is_elsewhere = next.settings.iter().any(|other| other.body == setting.body);
            if !goes_along && !is_elsewhere {
                difference.requests.extend(setting.removal());
            }
        }
        let made: Vec<&Setting> = next.settings.difference(&self.settings).collect();
        let (addresses, others): (Vec<_>, Vec<_>) = made
            .into_iter()
            .partition(|setting| setting.kind == libc::RTM_NEWADDR);
        let mut up = Vec::new();
        for (index, interface) in &next.interfaces {
            let before = self.interfaces.get(index);
            difference.follow(*index, before, interface);
            if interface.up && before.is_none_or(|before| !before.up) {
                up.extend(set_link(*index, true, |link| link));
            }
        }
        addresses
            .iter()
            .for_each(|setting| difference.requests.extend(setting.making()));
        difference.requests.extend(up);
        others
            .iter()
            .for_each(|setting| difference.requests.extend(setting.making()));
        difference
    }
}

impl Difference {
    /// Whether there is none.
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What has changed about an interface itself, but for being set up.
    fn follow(&mut self, index: u32, before: Option<&Interface>, now: &Interface) {
        let ipv6 = before.is_none_or(|before| before.ipv6);
        if ipv6 != now.ipv6 {
            let file = format!("ipv6/conf/{}/disable_ipv6", now.name);
            let value = if now.ipv6 { "0" } else { "1" };
            self.sysctls.push((file, value.to_owned()));
        }
        let Some(before) = before else { return };
        if before.up && !now.up {
            self.requests.extend(set_link(index, false, |link| link));
        }
        if before.name != now.name {
            let rename = |link: Builder| link.text(libc::IFLA_IFNAME, &now.name);
            self.requests
                .extend(set_link(index, now.up && before.up, rename));
        }
        if before.mac != now.mac {
            self.readdressed.push(index);
            let change = |link: Builder| link.attribute(libc::IFLA_ADDRESS, &now.mac);
            self.requests
                .extend(set_link(index, now.up && before.up, change));
        }
        if before.mtu != now.mtu {
            self.resized.push(index);
            let change = |link: Builder| link.attribute(libc::IFLA_MTU, &now.mtu.to_ne_bytes());
            self.requests
                .extend(set_link(index, now.up && before.up, change));
        }
    }
}

impl Setting {
    fn making(&self) -> Vec<u8> {
        Builder::new(self.kind, NEW, &self.body).finish()
    }

    fn removal(&self) -> Vec<u8> {
        // RTM_DEL... follows RTM_NEW... for every kind.
        Builder::new(self.kind + 1, 0, &self.body).finish()
    }
}

/// Whether an interface of this name is a virtual machine's tap.
fn is_tap(name: &str) -> bool {
    name.strip_prefix(TAP_PREFIX)
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn set_link(index: u32, up: bool, more: impl FnOnce(Builder) -> Builder) -> Vec<u8> {
    let mut body = [0; 16];
    let flag = libc::IFF_UP.unsigned_abs();
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&(if up { flag } else { 0 }).to_ne_bytes());
    body[12..16].copy_from_slice(&flag.to_ne_bytes());
    more(Builder::new(libc::RTM_NEWLINK, 0, &body)).finish()
}

fn bodies(listing: &[Vec<u8>]) -> impl Iterator<Item = &[u8]> {
    listing
        .iter()
        .flat_map(|message| netlink::messages(message))
        .map(|message| message.body)
}

fn ipv6_is_disabled(link: &[u8]) -> bool {
    let value = attribute(link, libc::IFLA_AF_SPEC)
        .and_then(|families| attribute(families, libc::AF_INET6.unsigned_abs().try_into().ok()?))
        .and_then(|ipv6| attribute(ipv6, IFLA_INET6_CONF))
        .and_then(|values| u32_at(values, DISABLE_IPV6 * 4));
    value.is_some_and(|value| value != 0)
}

/// The fixed part, followed by those attributes that `keep` wants.
fn reduced(fixed: &[u8], rest: &[u8], keep: impl Fn(u16) -> bool) -> Vec<u8> {
    // A builder without a header of its own: what it adds behind the fixed part is all that is wanted.
    let start = Builder::new(0, 0, fixed);
    let kept = attributes(rest).filter(|(kind, _)| keep(*kind));
    let whole = kept.fold(start, |message, (kind, value)| {
        message.attribute(kind, value)
    });
    whole.finish().split_off(HEADER_BYTES)
}

/// Bytes of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

fn address(body: &[u8]) -> Option<Setting> {
    let (fixed, rest) = body.split_at_checked(8)?;
    let index = u32_at(fixed, 4)?;
    let value = attribute(rest, libc::IFA_LOCAL).or_else(|| attribute(rest, libc::IFA_ADDRESS))?;
    if index == LOOPBACK && is_loopbacks_own(value) {
        return None;
    }
    let flags = attribute(rest, IFA_FLAGS).and_then(|flags| u32_at(flags, 0))?;
    let is_ipv6 = i32::from(fixed[0]) == libc::AF_INET6;
    let mut asked = flags & ADDRESS_FLAGS;
    if is_ipv6 {
        asked |= NO_DUPLICATES;
    }
    let fixed = [&fixed[..2], &[0], &fixed[3..]].concat();
    let kept = [
        libc::IFA_ADDRESS,
        libc::IFA_LOCAL,
        libc::IFA_LABEL,
        libc::IFA_BROADCAST,
        libc::IFA_ANYCAST,
        IFA_RT_PRIORITY,
    ];
    let mut body = reduced(&fixed, rest, |kind| kept.contains(&kind));
    let flags = Builder::new(0, 0, &[]).attribute(IFA_FLAGS, &asked.to_ne_bytes());
    body.extend(flags.finish().split_off(HEADER_BYTES));
    Some(setting(libc::RTM_NEWADDR, 0, Some(index), body))
}

fn is_loopbacks_own(address: &[u8]) -> bool {
    let ipv6 = std::net::Ipv6Addr::LOCALHOST.octets();
    address == [127, 0, 0, 1] || address == ipv6
}

fn route(body: &[u8]) -> Option<Setting> {
    let (fixed, rest) = body.split_at_checked(12)?;
    let (protocol, flags) = (fixed[5], u32_at(fixed, 8)?);
    if KERNELS_ROUTES.contains(&protocol) || flags & CLONED != 0 {
        return None;
    }
    let interface = attribute(rest, libc::RTA_OIF).and_then(|index| u32_at(index, 0));
    let through = [libc::RTA_GATEWAY, libc::RTA_MULTIPATH, 18];
    let needs_others = through
        .into_iter()
        .any(|kind| attribute(rest, kind).is_some());
    let fixed = [&fixed[..8], &(flags & ROUTE_FLAGS).to_ne_bytes()].concat();
    let body = reduced(&fixed, rest, |kind| ROUTE_ATTRIBUTES.contains(&kind));
    Some(setting(
        libc::RTM_NEWROUTE,
        u8::from(needs_others),
        interface,
        body,
    ))
}

fn neighbour(body: &[u8]) -> Option<Setting> {
    let (fixed, rest) = body.split_at_checked(12)?;
    let family = i32::from(fixed[0]);
    let is_ip = family == libc::AF_INET || family == libc::AF_INET6;
    if !is_ip || u16_at(fixed, 8)? & NUD_PERMANENT == 0 {
        return None;
    }
    let index = u32_at(fixed, 4)?;
    let kept = [libc::NDA_DST, libc::NDA_LLADDR];
    let body = reduced(fixed, rest, |kind| kept.contains(&kind));
    Some(setting(libc::RTM_NEWNEIGH, 0, Some(index), body))
}

fn rule(body: &[u8]) -> Option<Setting> {
    let (fixed, rest) = body.split_at_checked(12)?;
    let family = i32::from(fixed[0]);
    let is_ip = family == libc::AF_INET || family == libc::AF_INET6;
    let protocol = attribute(rest, RULE_PROTOCOL).and_then(|value| value.first().copied());
    if !is_ip || protocol == Some(RULES_OF_KERNEL) {
        return None;
    }
    let body = reduced(fixed, rest, |_| true);
    Some(setting(libc::RTM_NEWRULE, 0, None, body))
}

fn setting(kind: u16, rank: u8, interface: Option<u32>, body: Vec<u8>) -> Setting {
    Setting {
        kind,
        rank,
        place: 0,
        interface,
        body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, more: impl FnOnce(Builder) -> Builder) -> Vec<u8> {
        let mut body = [0; 16];
        body[2..4].copy_from_slice(&ARPHRD_ETHER.to_ne_bytes());
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..12].copy_from_slice(&libc::IFF_UP.unsigned_abs().to_ne_bytes());
        let link = Builder::new(libc::RTM_NEWLINK, 0, &body)
            .text(libc::IFLA_IFNAME, name)
            .attribute(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 7])
            .attribute(libc::IFLA_MTU, &1400_u32.to_ne_bytes());
        more(link).finish()
    }

    fn plain(index: u32, name: &str) -> Vec<u8> {
        link(index, name, |link| link)
    }

    fn address(index: u32, last: u8) -> Vec<u8> {
        let mut body = [2, 24, 0x80, 0, 0, 0, 0, 0];
        body[4..].copy_from_slice(&index.to_ne_bytes());
        Builder::new(libc::RTM_NEWADDR, 0, &body)
            .attribute(libc::IFA_LOCAL, &[10, 0, 0, last])
            .attribute(libc::IFA_CACHEINFO, &[0xff; 16])
            .attribute(IFA_FLAGS, &0x80_u32.to_ne_bytes())
            .finish()
    }

    fn route(protocol: u8, gateway: bool, index: u32) -> Vec<u8> {
        let body = [2, 0, 0, 0, 254, protocol, 0, 1, 0, 0, 0, 0];
        let mut route = Builder::new(libc::RTM_NEWROUTE, 0, &body);
        if gateway {
            route = route.attribute(libc::RTA_GATEWAY, &[10, 0, 0, 1]);
        }
        route
            .attribute(libc::RTA_OIF, &index.to_ne_bytes())
            .attribute(libc::RTA_CACHEINFO, &[9; 32])
            .finish()
    }

    fn kinds(requests: &[u8]) -> Vec<u16> {
        netlink::messages(requests).map(|one| one.kind).collect()
    }

    #[test]
    fn what_cannot_be_a_guests_interface_is_left_out() {
        let inside_bridge = link(5, "p0", |link| {
            link.attribute(libc::IFLA_MASTER, &9_u32.to_ne_bytes())
        });
        let stacked = link(6, "eth0.5", |link| {
            link.attribute(libc::IFLA_LINK, &2_u32.to_ne_bytes())
        });
        let veth = link(7, "net1", |link| {
            link.attribute(libc::IFLA_LINK, &2_u32.to_ne_bytes())
                .attribute(libc::IFLA_LINK_NETNSID, &[0; 4])
        });
        let view = View::of(&Listings {
            links: vec![
                plain(1, "lo"),
                plain(2, "eth0"),
                plain(3, "caisson0"),
                plain(4, "caissonette"),
                inside_bridge,
                stacked,
                veth,
            ],
            ..Listings::default()
        });
        assert_eq!(
            view.interfaces.keys().copied().collect::<Vec<_>>(),
            [2, 4, 7]
        );
        assert_eq!((view.taps.len(), view.strange.len()), (1, 2));
        let eth0 = &view.interfaces[&2];
        assert_eq!((eth0.mtu, eth0.up, eth0.ipv6), (1400, true, true));
    }

    #[test]
    fn a_network_is_made_in_an_order_that_works() {
        let view = View::of(&Listings {
            links: vec![plain(2, "eth0")],
            addresses: vec![address(2, 9), address(2, 3), address(8, 1)],
            // Through a gateway, the kernel's own, of an interface that is not there, direct.
            routes: vec![
                route(3, true, 2),
                route(2, false, 2),
                route(3, false, 8),
                route(3, false, 2),
            ],
            ..Listings::default()
        });
        let difference = View::default().difference(&view);
        assert_eq!(
            (difference.appeared.clone(), difference.gone.len()),
            (vec![2], 0)
        );
        let [add, up, route] = [libc::RTM_NEWADDR, libc::RTM_NEWLINK, libc::RTM_NEWROUTE];
        assert_eq!(kinds(&difference.requests), [add, add, up, route, route]);
        let messages: Vec<_> = netlink::messages(&difference.requests).collect();
        let local = attribute(&messages[0].body[8..], libc::IFA_LOCAL);
        assert_eq!(
            local,
            Some(&[10, 0, 0, 9][..]),
            "the primary address comes first"
        );
        assert!(attribute(&messages[0].body[8..], libc::IFA_CACHEINFO).is_none());
        let gateway = |at: usize| attribute(&messages[at].body[12..], libc::RTA_GATEWAY).is_some();
        assert!(!gateway(3) && gateway(4), "the direct route comes first");
    }

    #[test]
    fn only_what_changed_is_told() {
        let before = Listings {
            links: vec![plain(2, "eth0"), plain(3, "net1")],
            addresses: vec![address(2, 9), address(3, 4)],
            ..Listings::default()
        };
        let after = Listings {
            links: vec![plain(2, "eth0")],
            addresses: vec![address(2, 10)],
            ..Listings::default()
        };
        let (before, after) = (View::of(&before), View::of(&after));
        assert!(before.difference(&before).is_none());
        let difference = before.difference(&after);
        // The address of the interface that is gone goes with it.
        assert_eq!(difference.gone, [3]);
        assert_eq!(
            kinds(&difference.requests),
            [libc::RTM_DELADDR, libc::RTM_NEWADDR]
        );
    }
}
