//! An interface joined to a tap: what comes into one goes out of the other, by tc(8)'s redirection.
//!
//! ```text
//!  network <- interface <- ingress of the tap: redirect   <- the guest sends
//!  network -> interface -> ingress: redirect -> tap       -> the guest receives
//! ```
//!
//! Contract: the host's own stack sees none of the guest's packets, in either direction, and of others only what
//! [`Joint::keep_answers`] says. A [`Joint`] that is dropped
//! takes the filter off the interface, and the queueing discipline if it was made for it; the tap goes with its last
//! descriptor, and its filters with it. After a crash [`clear`] does the same for what is left.
//! What the host's configuration lets through ([`Limits`]) holds here, in the host's kernel, whoever moves the packets
//! between tap and guest.
//! Spec: `linux/pkt_sched.h`, `linux/pkt_cls.h`, `linux/tc_act/tc_mirred.h`.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use caisson_agent_api::netlink::{Builder, attribute, messages, u32_at};

use super::{
    bpf,
    limits::{self, Limits},
    netlink::{NEW, Socket},
    tap::Tap,
    traffic,
    view::Interface,
};

/// `TC_H_INGRESS`, and the handle of the discipline there.
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`: also understood by a plain ingress discipline.
const INGRESS_FILTERS: u32 = 0xffff_fff2;
/// `TC_H_ROOT`: where what goes out is queued.
const EGRESS: u32 = 0xffff_ffff;
/// The handle of our queue there, by which it is known.
const EGRESS_HANDLE: u32 = 0xca15_0000;
/// The filters' priority: by it they are known as ours. Others' filters that come first may take packets.
const PRIORITY: u32 = 0xca15;
/// Comes before that: what stays on the host.
const FIRST_PRIORITY: u32 = PRIORITY - 1;
/// Comes after it: what none of the others has taken.
const LAST_PRIORITY: u32 = PRIORITY + 1;
/// `ETH_P_ALL` in network order.
const ALL_PROTOCOLS: u32 = 0x0300;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
/// `TCA_BPF_FLAG_ACT_DIRECT`: the program's answer is what is done.
const PROGRAM_DECIDES: u32 = 1;
/// What tc(8) shows.
const PROGRAM_NAME: &str = "caisson";

/// `IFF_NOARP`: nobody on the host speaks through a tap.
const NO_ARP: u32 = 0x80;
/// `linux/if_link.h`: `IFLA_INET6_ADDR_GEN_MODE` and its value for no address.
const INET6_ADDR_GEN_MODE: u16 = 8;
const NO_ADDRESS: u8 = 1;

/// A tap joined to an interface. Must not outlive its use: dropping it parts them.
#[derive(Debug)]
pub(super) struct Joint {
    socket: Arc<Socket>,
    interface: u32,
    tap: u32,
    limits: Limits,
    /// Whether the discipline on the interface is ours.
    owns_ingress: bool,
}

impl Joint {
    /// Joins a tap to the interface. The descriptor is for the VMM.
    pub(super) fn make(
        socket: &Arc<Socket>,
        index: u32,
        interface: &Interface,
        tap: Tap,
        limits: Limits,
    ) -> io::Result<(Self, OwnedFd)> {
        let Tap {
            file,
            index: tap_index,
        } = tap;
        socket.request(named(quiet_tap(tap_index, interface.mtu), &interface.name))?;
        socket.request(tap_up(tap_index))?;
        socket.request(ingress(libc::RTM_NEWQDISC, NEW, tap_index))?;
        let owns_ingress = match socket.request(ingress(libc::RTM_NEWQDISC, NEW, index)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            other => other.map(|()| true)?,
        };
        let joint = Self {
            socket: Arc::clone(socket),
            interface: index,
            tap: tap_index,
            limits,
            owns_ingress,
        };
        if !owns_ingress {
            // Left by one that was killed, or none.
            let _ = unfilter(socket, index);
        }
        joint.shape()?;
        joint.lead_out(interface.mac)?;
        socket.request(
            redirect(index, |options| {
                options.nested(limits::MATCHALL_ACTIONS, |actions| {
                    limits::redirection(actions, limits.receive, tap_index)
                })
            })
            .text(TCA_KIND, "matchall"),
        )?;
        Ok((joint, file))
    }

    /// Leaves answers to questions that are asked from the namespace itself to the host's stack (`bpf/answers.rs`).
    pub(super) fn keep_answers(&self) -> io::Result<()> {
        let program = bpf::answers(self.tap)?;
        self.socket
            .request(answers_filter(self.interface, program.as_fd()))
    }

    /// Queues what is too much.
    fn shape(&self) -> io::Result<()> {
        if let Some(options) = limits::shaper(self.limits.receive) {
            self.socket.request(queue(self.tap, options))?;
        }
        if let Some(options) = limits::shaper(self.limits.send) {
            // Left by one that was killed, or none. Another's is in our way, and is said to be.
            let _ = self.socket.request(no_queue(self.interface));
            self.socket.request(queue(self.interface, options))?;
        }
        Ok(())
    }

    /// Has what the guest sends go out of the interface; only what comes from `mac`, if that is asked for.
    fn lead_out(&self, mac: [u8; 6]) -> io::Result<()> {
        let actions = |actions| limits::redirection(actions, self.limits.send, self.interface);
        if !self.limits.own_mac_only {
            let all = redirect(self.tap, |options| {
                options.nested(limits::MATCHALL_ACTIONS, actions)
            });
            return self.socket.request(all.text(TCA_KIND, "matchall"));
        }
        let rest = filter_head(
            libc::RTM_NEWTFILTER,
            NEW,
            self.tap,
            LAST_PRIORITY << 16 | ALL_PROTOCOLS,
        );
        self.socket.request(
            rest.text(TCA_KIND, "matchall")
                .nested(TCA_OPTIONS, |options| {
                    options.nested(limits::MATCHALL_ACTIONS, limits::dropping)
                }),
        )?;
        self.socket.request(self.pass_from(mac))
    }

    fn pass_from(&self, mac: [u8; 6]) -> Builder {
        let options = |options| {
            limits::from_mac(options, mac).nested(limits::U32_ACTIONS, |actions| {
                limits::redirection(actions, self.limits.send, self.interface)
            })
        };
        redirect(self.tap, options).text(TCA_KIND, "u32")
    }

    /// The interface's address is another now. In between nothing passes.
    pub(super) fn readdress(&self, mac: [u8; 6]) -> io::Result<()> {
        if !self.limits.own_mac_only {
            return Ok(());
        }
        self.socket
            .request(filter(libc::RTM_DELTFILTER, 0, self.tap))?;
        self.socket.request(self.pass_from(mac))
    }

    /// Lets the tap take packets as large as the interface's.
    pub(super) fn resize(&self, mtu: u32) -> io::Result<()> {
        self.socket.request(quiet_tap(self.tap, mtu))
    }
}

impl Drop for Joint {
    fn drop(&mut self) {
        // An interface that is gone has taken everything along.
        if self.limits.send.bytes.is_some() {
            let _ = self.socket.request(no_queue(self.interface));
        }
        let _ = if self.owns_ingress {
            self.socket
                .request(ingress(libc::RTM_DELQDISC, 0, self.interface))
        } else {
            unfilter(&self.socket, self.interface)
        };
    }
}

/// Removes what a killed owner has left on an interface: our queue, our filter, and the discipline if there is no other
/// filter.
pub(super) fn clear(socket: &Socket, interface: u32) -> io::Result<()> {
    // There is none, or another's, without a limit.
    let _ = socket.request(no_queue(interface));
    let filters = socket.list(filter_head(libc::RTM_GETTFILTER, 0, interface, 0))?;
    let all = filters.iter().flat_map(|datagram| messages(datagram));
    let ours = |info: u32| [FIRST_PRIORITY, PRIORITY].contains(&(info >> 16));
    let infos: Vec<u32> = all.filter_map(|message| u32_at(message.body, 16)).collect();
    if !infos.iter().any(|info| ours(*info)) {
        return Ok(());
    }
    if infos.iter().all(|info| ours(*info)) && is_plain_ingress(socket, interface)? {
        socket.request(ingress(libc::RTM_DELQDISC, 0, interface))
    } else {
        unfilter(socket, interface)
    }
}

/// Removes our filters from an interface.
fn unfilter(socket: &Socket, interface: u32) -> io::Result<()> {
    // Most have none of these.
    let _ = socket.request(first_filter(libc::RTM_DELTFILTER, 0, interface));
    socket.request(filter(libc::RTM_DELTFILTER, 0, interface))
}

fn is_plain_ingress(socket: &Socket, interface: u32) -> io::Result<bool> {
    let listed = socket.list(Builder::new(
        libc::RTM_GETQDISC,
        0,
        &head(interface, 0, 0, 0),
    ))?;
    Ok(listed
        .iter()
        .flat_map(|datagram| messages(datagram))
        .any(|message| {
            let kind = message
                .body
                .get(20..)
                .and_then(|rest| attribute(rest, TCA_KIND));
            u32_at(message.body, 4) == Some(interface) && kind == Some(b"ingress\0")
        }))
}

/// Sets a tap's MTU, and that the host's kernel gives it no address when it is set up.
fn quiet_tap(index: u32, mtu: u32) -> Builder {
    // A number below 128.
    let ipv6 = u16::try_from(libc::AF_INET6).unwrap_or_default();
    Builder::new(libc::RTM_NEWLINK, 0, &link(index, 0))
        .attribute(libc::IFLA_MTU, &mtu.to_ne_bytes())
        .nested(libc::IFLA_AF_SPEC, |families| {
            families.nested(ipv6, |ipv6| {
                ipv6.attribute(INET6_ADDR_GEN_MODE, &[NO_ADDRESS])
            })
        })
}

/// Says whose tap it is: to people, and to those who count ([`super::traffic`]).
fn named(tap: Builder, interface: &str) -> Builder {
    tap.attribute(traffic::IFLA_IFALIAS, interface.as_bytes())
}

fn tap_up(index: u32) -> Builder {
    let flags = libc::IFF_UP.unsigned_abs() | NO_ARP;
    Builder::new(libc::RTM_NEWLINK, 0, &link(index, flags))
}

/// `struct ifinfomsg` that sets flags.
fn link(index: u32, flags: u32) -> [u8; 16] {
    let mut body = [0; 16];
    for (place, value) in [(4, index), (8, flags), (12, flags)] {
        body[place..place + 4].copy_from_slice(&value.to_ne_bytes());
    }
    body
}

/// `struct tcmsg`.
fn head(interface: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut body = [0; 20];
    for (place, value) in [(4, interface), (8, handle), (12, parent), (16, info)] {
        body[place..place + 4].copy_from_slice(&value.to_ne_bytes());
    }
    body
}

fn ingress(kind: u16, flags: u16, interface: u32) -> Builder {
    let message = Builder::new(kind, flags, &head(interface, INGRESS_HANDLE, INGRESS, 0));
    if kind == libc::RTM_NEWQDISC {
        message.text(TCA_KIND, "ingress")
    } else {
        message
    }
}

fn filter_head(kind: u16, flags: u16, interface: u32, info: u32) -> Builder {
    Builder::new(kind, flags, &head(interface, 0, INGRESS_FILTERS, info))
}

fn filter(kind: u16, flags: u16, interface: u32) -> Builder {
    filter_head(kind, flags, interface, PRIORITY << 16 | ALL_PROTOCOLS)
}

fn first_filter(kind: u16, flags: u16, interface: u32) -> Builder {
    let info = FIRST_PRIORITY << 16 | ALL_PROTOCOLS;
    filter_head(kind, flags, interface, info)
}

/// What comes in at `interface` is shown to a program first.
fn answers_filter(interface: u32, program: BorrowedFd<'_>) -> Builder {
    first_filter(libc::RTM_NEWTFILTER, NEW, interface)
        .text(TCA_KIND, "bpf")
        .nested(TCA_OPTIONS, |options| {
            options
                .attribute(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes())
                .text(TCA_BPF_NAME, PROGRAM_NAME)
                .attribute(TCA_BPF_FLAGS, &PROGRAM_DECIDES.to_ne_bytes())
        })
}

/// What comes in at `from` is dealt with by what is in `options`; the kind of filter is to be added.
fn redirect(from: u32, options: impl FnOnce(Builder) -> Builder) -> Builder {
    filter(libc::RTM_NEWTFILTER, NEW, from).nested(TCA_OPTIONS, options)
}

/// What goes out of `interface` goes through the token bucket that `options` describes.
fn queue(interface: u32, options: Builder) -> Builder {
    let head = head(interface, EGRESS_HANDLE, EGRESS, 0);
    Builder::new(libc::RTM_NEWQDISC, NEW, &head)
        .text(TCA_KIND, "tbf")
        .nested(TCA_OPTIONS, |_| options)
}

/// Removes our queue; another's handle is another.
fn no_queue(interface: u32) -> Builder {
    let head = head(interface, EGRESS_HANDLE, EGRESS, 0);
    Builder::new(libc::RTM_DELQDISC, 0, &head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_known_by_its_priority() {
        let actions = |options: Builder| {
            options.nested(limits::MATCHALL_ACTIONS, |actions| {
                limits::redirection(actions, limits::Rate::default(), 9)
            })
        };
        let message = redirect(7, actions).finish();
        let message = messages(&message).next().unwrap();
        assert_eq!(u32_at(message.body, 4), Some(7));
        assert_eq!(
            u32_at(message.body, 16).map(|info| info >> 16),
            Some(PRIORITY)
        );
        let options = attribute(&message.body[20..], TCA_OPTIONS).unwrap();
        assert!(attribute(options, limits::MATCHALL_ACTIONS).is_some());
    }

    #[test]
    fn the_program_sees_a_packet_before_the_redirection() {
        let file = std::io::pipe().unwrap().0;
        let message = answers_filter(7, file.as_fd()).finish();
        let message = messages(&message).next().unwrap();
        let priority = u32_at(message.body, 16).map(|info| info >> 16);
        assert!(priority.is_some_and(|priority| priority < PRIORITY));
        let options = attribute(&message.body[20..], TCA_OPTIONS).unwrap();
        let number = file.as_raw_fd().to_ne_bytes();
        assert_eq!(attribute(options, TCA_BPF_FD), Some(&number[..]));
        let remove = first_filter(libc::RTM_DELTFILTER, 0, 7).finish();
        let remove = messages(&remove).next().unwrap();
        assert_eq!(remove.body[..20], message.body[..20]);
    }

    #[test]
    fn a_queue_is_known_by_its_handle() {
        let make = queue(7, Builder::part()).finish();
        let make = messages(&make).next().unwrap();
        let unmake = no_queue(7).finish();
        let unmake = messages(&unmake).next().unwrap();
        assert_eq!(make.body[..20], unmake.body[..20]);
        assert_eq!(u32_at(make.body, 8), Some(EGRESS_HANDLE));
    }
}
