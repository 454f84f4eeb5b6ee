//! What passes between an interface and its tap: from which address, how many bytes and packets per second. In the words
//! of tc(8), so that it holds in the host's kernel, for the VMM's own data path and for vhost-net alike.
//!
//! ```text
//!  the guest sends     tap, ingress: from its MAC? [police packets] -> interface, egress: [tbf bytes] -> network
//!  the guest receives  interface, ingress: [police packets] -> tap, egress: [tbf bytes] -> guest
//! ```
//!
//! Contract: bytes are shaped by a token bucket with a queue (tbf), so a sender is slowed down before it loses anything;
//! the kernel's timer wakes the queue, nothing is polled. Packets are policed: what is too much is dropped. Pure: parts of
//! netlink messages out of numbers that the configuration has checked.
//! Spec: `linux/pkt_sched.h`, `linux/pkt_cls.h`, `linux/tc_act/*.h`.

use std::num::{NonZeroU32, NonZeroU64};

use caisson_agent_api::netlink::Builder;

use crate::config::Config;

/// `TCA_MATCHALL_ACT`: where a `matchall` filter has its actions.
pub(super) const MATCHALL_ACTIONS: u16 = 2;
/// `TCA_U32_ACT`.
pub(super) const U32_ACTIONS: u16 = 7;

const TCA_U32_SEL: u16 = 5;
/// `TC_U32_TERMINAL`.
const TERMINAL: u8 = 1;
/// Where a frame's source address is, counted from the network header.
const SOURCE_AT: i32 = -8;

/// Within an action.
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
/// `TCA_MIRRED_PARMS` and `TCA_GACT_PARMS`.
const TCA_PARMS: u16 = 2;
const TCA_POLICE_TBF: u16 = 1;
const TCA_POLICE_RESULT: u16 = 5;
const TCA_POLICE_PKTRATE64: u16 = 10;
const TCA_POLICE_PKTBURST64: u16 = 11;
/// `TCA_EGRESS_REDIR`.
const REDIRECT: u32 = 1;
/// `TC_ACT_*`: drop; taken; on to the next action.
const SHOT: u32 = 2;
const STOLEN: u32 = 4;
const PIPE: u32 = 3;

const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`: the kernel computes the cost of a packet itself, without a table.
const LINKLAYER_ETHERNET: u8 = 1;

/// The kernel's unit of time for the burst of a policer, in nanoseconds.
const TICK_NANOS: u64 = 64;
const SECOND_NANOS: u64 = 1_000_000_000;
/// The part of a second that may wait, and that a policer lets through at once.
const PART_OF_SECOND: u64 = 10;
/// The fewest packets that a policer lets through at once.
const LEAST_PACKETS: u64 = 16;

/// The limits of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rate {
    /// Bytes per second, and how many at once.
    pub bytes: Option<(NonZeroU64, u32)>,
    /// Packets per second.
    pub packets: Option<NonZeroU32>,
}

/// What passes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Only frames from the interface's own address leave the guest.
    pub own_mac_only: bool,
    /// What the guest receives.
    pub receive: Rate,
    /// What it sends.
    pub send: Rate,
}

impl From<&Config> for Limits {
    fn from(config: &Config) -> Self {
        let rate = |bytes, burst, packets| Rate {
            bytes: NonZeroU64::new(bytes).map(|rate| (rate, burst)),
            packets: NonZeroU32::new(packets),
        };
        Self {
            own_mac_only: config.network_source_mac_filter,
            receive: rate(
                config.network_rx_bytes_per_second,
                config.network_rx_burst_bytes,
                config.network_rx_packets_per_second,
            ),
            send: rate(
                config.network_tx_bytes_per_second,
                config.network_tx_burst_bytes,
                config.network_tx_packets_per_second,
            ),
        }
    }
}

/// The actions of a filter that sends packets out at interface `to`, as far as `rate` has packets for it.
pub(super) fn redirection(actions: Builder, rate: Rate, to: u32) -> Builder {
    let mirred = [0, 0, STOLEN, 0, 0, REDIRECT, to]
        .map(u32::to_ne_bytes)
        .concat();
    let redirect = |actions: Builder, place| {
        action(actions, place, "mirred", |options| {
            options.attribute(TCA_PARMS, &mirred)
        })
    };
    match rate.packets {
        None => redirect(actions, 1),
        Some(packets) => {
            let policed = action(actions, 1, "police", |options| police(options, packets));
            redirect(policed, 2)
        }
    }
}

/// The actions of a filter that drops.
pub(super) fn dropping(actions: Builder) -> Builder {
    let gact = [0, 0, SHOT, 0, 0].map(u32::to_ne_bytes).concat();
    action(actions, 1, "gact", |options| {
        options.attribute(TCA_PARMS, &gact)
    })
}

fn action(
    actions: Builder,
    place: u16,
    kind: &str,
    options: impl FnOnce(Builder) -> Builder,
) -> Builder {
    actions.nested(place, |action| {
        action
            .text(TCA_ACT_KIND, kind)
            .nested(TCA_ACT_OPTIONS, options)
    })
}

/// The options of a policer.
fn police(options: Builder, packets: NonZeroU32) -> Builder {
    // `struct tc_police`: index, action, limit, burst, mtu, two rates (none), refcnt, bindcnt, capab.
    let mut parms = [0; 56];
    parms[4..8].copy_from_slice(&SHOT.to_ne_bytes());
    let rate = u64::from(packets.get());
    let nanos = (SECOND_NANOS / PART_OF_SECOND).max(LEAST_PACKETS * SECOND_NANOS / rate);
    options
        .attribute(TCA_POLICE_TBF, &parms)
        .attribute(TCA_POLICE_RESULT, &PIPE.to_ne_bytes())
        .attribute(TCA_POLICE_PKTRATE64, &rate.to_ne_bytes())
        .attribute(TCA_POLICE_PKTBURST64, &(nanos / TICK_NANOS).to_ne_bytes())
}

/// The options of a `u32` filter that knows frames from `mac`; its actions are to be added.
pub(super) fn from_mac(options: Builder, mac: [u8; 6]) -> Builder {
    let [a, b, c, d, e, f] = mac;
    // `struct tc_u32_sel`, then a `struct tc_u32_key` for the first four bytes and one for the last two.
    let mut selector = vec![TERMINAL, 0, 2, 0];
    selector.resize(16, 0);
    for (mask, value, at) in [
        ([0xff; 4], [a, b, c, d], SOURCE_AT),
        ([0xff, 0xff, 0, 0], [e, f, 0, 0], SOURCE_AT + 4),
    ] {
        selector.extend(mask);
        selector.extend(value);
        selector.extend(at.to_ne_bytes());
        selector.extend([0; 4]);
    }
    options.attribute(TCA_U32_SEL, &selector)
}

/// The options of the token bucket that a direction needs, if any.
pub(super) fn shaper(rate: Rate) -> Option<Builder> {
    let (bytes, burst) = rate.bytes?;
    let bytes = bytes.get();
    // At least one largest packet waits beside a burst.
    let queue = u64::from(burst) + (bytes / PART_OF_SECOND).max(64 << 10);
    // `struct tc_tbf_qopt`: two `struct tc_ratespec`, limit, buffer, mtu.
    let mut parms = [0; 36];
    parms[1] = LINKLAYER_ETHERNET;
    let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_ne_bytes();
    parms[8..12].copy_from_slice(&low(bytes));
    parms[24..28].copy_from_slice(&low(queue));
    let options = Builder::part()
        .attribute(TCA_TBF_PARMS, &parms)
        .attribute(TCA_TBF_BURST, &burst.to_ne_bytes());
    // The smaller field is full.
    Some(if bytes > u64::from(u32::MAX) {
        options.attribute(TCA_TBF_RATE64, &bytes.to_ne_bytes())
    } else {
        options
    })
}

#[cfg(test)]
mod tests {
    use caisson_agent_api::netlink::{attribute, u32_at};

    use super::*;

    fn rate(bytes: u64, packets: u32) -> Rate {
        Rate {
            bytes: NonZeroU64::new(bytes).map(|rate| (rate, 1 << 16)),
            packets: NonZeroU32::new(packets),
        }
    }

    fn u64_of(bytes: &[u8], kind: u16) -> u64 {
        u64::from_ne_bytes(attribute(bytes, kind).unwrap().try_into().unwrap())
    }

    #[test]
    fn without_limits_packets_are_only_redirected() {
        let actions = redirection(Builder::part(), Rate::default(), 9).into_part();
        let action = attribute(&actions, 1).unwrap();
        assert_eq!(attribute(action, TCA_ACT_KIND), Some(&b"mirred\0"[..]));
        let mirred = attribute(attribute(action, TCA_ACT_OPTIONS).unwrap(), TCA_PARMS);
        assert_eq!(u32_at(mirred.unwrap(), 24), Some(9));
        assert!(attribute(&actions, 2).is_none() && shaper(Rate::default()).is_none());
    }

    #[test]
    fn packets_are_policed_before_they_are_redirected() {
        let actions = redirection(Builder::part(), rate(0, 100), 9).into_part();
        let police = attribute(&actions, 1).unwrap();
        assert_eq!(attribute(police, TCA_ACT_KIND), Some(&b"police\0"[..]));
        let options = attribute(police, TCA_ACT_OPTIONS).unwrap();
        assert_eq!(u64_of(options, TCA_POLICE_PKTRATE64), 100);
        // 16 packets are 160 ms.
        assert_eq!(u64_of(options, TCA_POLICE_PKTBURST64), 160_000_000 / 64);
        let redirect = attribute(&actions, 2).unwrap();
        assert_eq!(attribute(redirect, TCA_ACT_KIND), Some(&b"mirred\0"[..]));
    }

    #[test]
    fn a_bucket_has_its_rate_burst_and_queue() {
        let options = shaper(rate(10_000_000, 0)).unwrap().into_part();
        let parms = attribute(&options, TCA_TBF_PARMS).unwrap();
        assert_eq!(u32_at(parms, 8), Some(10_000_000));
        assert_eq!(u32_at(parms, 24), Some((1 << 16) + 1_000_000));
        let burst = attribute(&options, TCA_TBF_BURST).unwrap();
        assert_eq!(u32_at(burst, 0), Some(1 << 16));
        assert!(attribute(&options, TCA_TBF_RATE64).is_none());
        let fast = shaper(rate(10_000_000_000, 0)).unwrap().into_part();
        assert_eq!(u64_of(&fast, TCA_TBF_RATE64), 10_000_000_000);
    }

    #[test]
    fn a_source_address_is_matched_whole_where_it_is_in_a_frame() {
        let options = from_mac(Builder::part(), [2, 3, 4, 5, 6, 7]).into_part();
        let selector = attribute(&options, TCA_U32_SEL).unwrap();
        assert_eq!((selector.len(), selector[2]), (16 + 2 * 16, 2));
        let key = |n: usize| &selector[16 + 16 * n..32 + 16 * n];
        assert_eq!(key(0)[..8], [255, 255, 255, 255, 2, 3, 4, 5]);
        assert_eq!(key(1)[..8], [255, 255, 0, 0, 6, 7, 0, 0]);
        assert_eq!(key(0)[8..12], (-8_i32).to_ne_bytes());
        assert_eq!(key(1)[8..12], (-4_i32).to_ne_bytes());
    }
}
