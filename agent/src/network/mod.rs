//! The container's network as the host has it: its devices found, named and moved, its addresses and routes set.
//!
//! | file | is |
//! |---|---|
//! | `device.rs` | virtio devices that appear and go: the kernel's driver is bound and unbound by hand |
//! | `loopback.rs` | connections of the host to the container's loopback interface |
//! | `resolver.rs` | questions about names that the host answers |
//! | `socket.rs` | rtnetlink(7) requests and their answers |
//!
//! Contract: [`apply`] carries out one [`Network`] of the host, in order, and ends at the first step that fails. It runs
//! in the agent's one thread, which is in the container's network namespace for a moment, to open a socket there.
//! Not here: which interfaces and addresses there are (the host copies its own), loopback (`child.rs`).

mod device;
mod loopback;
mod resolver;
mod socket;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path};

use caisson_agent_api::netlink::Builder;
use caisson_agent_api::{Interface, Network};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces,
};
use socket::Socket;

pub(crate) use loopback::Loopback;
pub(crate) use resolver::Resolver;

/// `IFLA_NEW_IFINDEX`, linux/if_link.h.
const IFLA_NEW_IFINDEX: u16 = 49;
/// `struct ifinfomsg` up to its index.
const IFINFO_BYTES: usize = 16;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("network device {device}: {step}")]
    Device {
        device: u32,
        step: &'static str,
        source: io::Error,
    },
    #[error("network interface {name:?}")]
    Interface { name: String, source: io::Error },
    #[error("network request {number} of type {kind}")]
    Request {
        /// Counted from 0.
        number: usize,
        kind: u16,
        source: io::Error,
    },
    #[error("connect to port {port} of the loopback interface")]
    Dial { port: u32, source: io::Error },
    #[error("write network sysctl {file:?}")]
    Sysctl { file: String, source: io::Error },
    #[error("{step}")]
    Namespace {
        step: &'static str,
        source: io::Error,
    },
}

/// A process in the container's network namespace.
#[derive(Clone, Copy)]
pub(crate) struct Resident<'a> {
    pub(crate) pid: i32,
    pub(crate) pidfd: BorrowedFd<'a>,
}

/// Whether there is anything to be done.
pub(crate) fn is_needed(network: &Network) -> bool {
    !(network.gone.is_empty()
        && network.appeared.is_empty()
        && network.requests.is_empty()
        && network.sysctls.is_empty())
}

/// Makes the container's network follow the host's.
pub(crate) fn apply(network: &Network, resident: Resident<'_>) -> Result<(), NetworkError> {
    for &device in &network.gone {
        device::unbind(device)?;
    }
    if !network.appeared.is_empty() {
        let outside = Socket::open().map_err(at("open a netlink socket"))?;
        for interface in &network.appeared {
            hand_over(interface, &outside, resident.pid)?;
        }
    }
    if !network.sysctls.is_empty() {
        inside(resident, || write_sysctls(network))??;
    }
    if !network.requests.is_empty() {
        let socket = inside(resident, Socket::open)?.map_err(at("open a netlink socket"))?;
        socket.carry_out(&network.requests)?;
    }
    Ok(())
}

fn at(step: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Namespace { step, source }
}

/// Gives a device to the container's namespace, under the name and number that it has on the host.
fn hand_over(interface: &Interface, outside: &Socket, pid: i32) -> Result<(), NetworkError> {
    let found = device::interface_of(interface.device)?;
    let failed = |source| NetworkError::Interface {
        name: interface.name.clone(),
        source,
    };
    let mut link = vec![0; IFINFO_BYTES];
    link[4..8].copy_from_slice(&found.to_ne_bytes());
    let request = Builder::new(libc::RTM_NEWLINK, 0, &link)
        .attribute(libc::IFLA_NET_NS_PID, &pid.to_ne_bytes())
        .text(libc::IFLA_IFNAME, &interface.name)
        .attribute(IFLA_NEW_IFINDEX, &interface.index.to_ne_bytes())
        .attribute(libc::IFLA_ADDRESS, &interface.address)
        .attribute(libc::IFLA_MTU, &interface.mtu.to_ne_bytes());
    outside.request(request).map_err(failed)
}

/// Does something while this thread is in the container's network namespace.
fn inside<T>(resident: Resident<'_>, act: impl FnOnce() -> T) -> Result<T, NetworkError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let home = openat(CWD, "/proc/self/ns/net", flags, Mode::empty())
        .map_err(|errno| at("open the guest's network namespace")(errno.into()))?;
    move_into_thread_name_spaces(resident.pidfd, ThreadNameSpaceType::NETWORK)
        .map_err(|errno| at("enter the container's network namespace")(errno.into()))?;
    let done = act();
    move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| at("leave the container's network namespace")(errno.into()))?;
    Ok(done)
}

/// In the container's namespace: `/proc/sys/net` shows that of whoever looks.
fn write_sysctls(network: &Network) -> Result<(), NetworkError> {
    for sysctl in &network.sysctls {
        let file = Path::new(&sysctl.file);
        let below = file
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let written = if below {
            fs::write(Path::new("/proc/sys/net").join(file), &sysctl.value)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        };
        written.map_err(|source| NetworkError::Sysctl {
            file: sysctl.file.clone(),
            source,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_agent_api::Sysctl;

    #[test]
    fn loopback_alone_needs_nothing() {
        assert!(!is_needed(&Network::default()));
        assert!(is_needed(&Network {
            gone: vec![3],
            ..Network::default()
        }));
    }

    #[test]
    fn a_sysctl_outside_of_the_network_is_refused() {
        for file in ["../kernel/core_pattern", "/etc/passwd", "ipv4/../../kernel"] {
            let network = Network {
                sysctls: vec![Sysctl {
                    file: file.to_owned(),
                    value: "1".to_owned(),
                    ..Sysctl::default()
                }],
                ..Network::default()
            };
            let error = write_sysctls(&network).unwrap_err();
            assert!(matches!(error, NetworkError::Sysctl { source, .. }
                if source.kind() == io::ErrorKind::InvalidInput));
        }
    }
}
