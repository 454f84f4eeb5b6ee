//! The container's network: its namespace stays on the host, its interfaces appear in the guest.
//!
//! | file | is |
//! |---|---|
//! | `namespace.rs` | the namespace, made or joined |
//! | `netlink.rs` | the kernel's answers about it, and its notices of changes |
//! | `view.rs` | what is in it, and how one view becomes another (pure) |
//! | `joint.rs`, `tap.rs` | an interface joined to a tap |
//! | `loopback.rs` | what connects to the namespace's loopback addresses is connected to the guest's |
//! | `bpf/` | programs of the kernel's for these two |
//! | `limits.rs` | what passes there, in tc's words (pure) |
//! | `resolver.rs` | questions about names that the guest asks Docker's resolver |
//! | `change.rs` | what a change on the host means for the virtual machine and the guest |
//! | `follow.rs` | the guest follows while the container lives |
//! | `traffic.rs` | what has passed, for whoever counts |
//! | `outside.rs`, `passt.rs` | without a namespace: a user-mode network that looks like the host's |
//!
//! Contract: interfaces that are there when the virtual machine starts are devices from its first instruction; those
//! that appear later (hooks, engines that connect a running container) take one of its spare devices. The guest gets
//! the same names, numbers, MAC addresses, MTUs, addresses, routes, permanent neighbours and rules.
//! Everything that is made on the host is undone when [`Network`] is dropped, and by [`clear`] if the owner was killed.
//! Not here: the devices (the VMM), what the guest does with the list (the agent).

mod bpf;
mod change;
mod follow;
mod joint;
mod limits;
mod loopback;
mod namespace;
mod netlink;
mod outside;
mod passt;
pub mod resolver;
mod tap;
mod traffic;
mod view;

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_agent_api::{self as api, netlink::Builder};
use caisson_vmm_spec::{MAX_NETWORKS, NetworkKind};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

pub use self::{
    change::Change,
    follow::{Askers, Follower, Following, follow, follow_in_background},
    limits::{Limits, Rate},
    loopback::{Forwarding, Loopback},
    passt::PasstError,
    traffic::{Namespace, Passed, Traffic},
};
use self::{
    joint::Joint,
    namespace::Place,
    netlink::{Notices, Socket},
    outside::Outside,
    passt::Passt,
    tap::Tap,
    view::{Difference, Interface, Listings, View},
};
use crate::{
    config::Config,
    slots::{Slots, device},
};
pub use caisson_agent_api::Network as Connections;

/// Name of the file in the state directory that says where something may have been left.
const RECORD: &str = "network.json";

/// The device of vhost-net; opening it loads the module.
const VHOST_NET: &str = "/dev/vhost-net";

/// Why a container's network is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace in the specification.
    #[error("join the network namespace {path}", path = path.display())]
    Join {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another virtual machine has the interfaces.
    #[error(
        "the network namespace {path} is another container's: two virtual machines cannot share interfaces",
        path = path.display()
    )]
    Taken {
        /// Its path.
        path: PathBuf,
    },
    /// There are not enough devices.
    #[error("network interface {name}: the virtual machine has no device left (spare_interfaces)")]
    Full {
        /// The interface.
        name: String,
    },
    /// One interface.
    #[error("connect network interface {name}")]
    Connect {
        /// The interface.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A kernel without such programs, or a caller who may not load them.
    #[error("names of the outside are not found: let the resolver's answers through")]
    Answers(#[source] io::Error),
    /// The user-mode network.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// A step on the host.
    #[error("{step}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn host(step: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Host { step, source }
}

/// A tap, or what stands in for one, and the MAC address of its interface.
#[derive(Debug)]
pub struct Plug {
    /// Which of the virtual machine's interfaces.
    pub slot: u8,
    /// The address.
    pub mac: [u8; 6],
    /// For the VMM.
    pub tap: OwnedFd,
    /// What that is.
    pub kind: NetworkKind,
    /// The host's kernel moves the packets.
    pub vhost: Option<OwnedFd>,
}

/// The interface in one of the virtual machine's slots.
#[derive(Debug)]
struct Occupant {
    index: u32,
    /// None for the user-mode network's.
    joint: Option<Joint>,
}

/// A network of the caller's own, in place of a namespace with interfaces.
#[derive(Debug)]
pub struct UserNetwork {
    outside: Outside,
    passt: Passt,
}

impl UserNetwork {
    /// One that looks like the network of the current namespace and leads into it; `None` if nothing leads out of that.
    pub fn start(config: &Config) -> Result<Option<Self>, NetworkError> {
        let outside = Outside::look().map_err(host("look at the host's network"))?;
        let Some(outside) = outside else {
            return Ok(None);
        };
        let passt = Passt::start(config, &outside)?;
        Ok(Some(Self { outside, passt }))
    }
}

/// What is in the file [`RECORD`].
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    place: Place,
    interfaces: Vec<u32>,
}

/// A sandbox's network.
#[derive(Debug)]
pub struct Network {
    socket: Arc<Socket>,
    notices: Notices,
    /// What the virtual machine has, or is about to have.
    view: View,
    /// By place; those of [`Network::places`] that others took are empty here.
    slots: Vec<Option<Occupant>>,
    places: Slots,
    limits: Limits,
    /// Whether the host's kernel is to move packets.
    vhost: bool,
    /// Whether the namespace's own questions about names are answered on the host.
    keeps_answers: bool,
    /// The namespace, if it outlives this process.
    place: Option<Place>,
    /// Whether this process is in it.
    inside: bool,
    record: PathBuf,
    complaints: Vec<String>,
    /// Interfaces that are there and could not be connected.
    failed: Vec<u32>,
    /// Ended when dropped.
    user: Option<UserNetwork>,
}

impl Network {
    /// Gives the guest a user-mode network, besides what will be in the namespace.
    pub fn add_user_network(&mut self, user: UserNetwork) -> Result<(), NetworkError> {
        self.user = Some(user);
        self.view = self.look()?;
        Ok(())
    }

    /// Moves this process, which has one thread, into the container's namespace: that at `path`, or a new one.
    pub fn enter(path: Option<&Path>, state_dir: &Path) -> Result<Self, NetworkError> {
        let place = match path {
            Some(path) => Some(namespace::join(path).map_err(|source| NetworkError::Join {
                path: path.to_owned(),
                source,
            })?),
            None => {
                namespace::make().map_err(host("make a network namespace"))?;
                None
            }
        };
        let sockets = sockets().map_err(host("open netlink sockets"))?;
        let mut network = Self::over(sockets, place, state_dir);
        // A new one is empty.
        if let Some(path) = path {
            network.first_look(path)?;
        }
        Ok(network)
    }

    /// Moves this process, which has one thread, into the namespace at `path`, whose interfaces are another process's to
    /// connect.
    pub fn stand_in(path: &Path) -> Result<(), NetworkError> {
        let joined = namespace::join(path).map_err(|source| NetworkError::Join {
            path: path.to_owned(),
            source,
        });
        joined.map(drop)
    }

    /// The namespace at `path`, for a process that stays where it is.
    pub fn beside(path: &Path, state_dir: &Path) -> Result<Self, NetworkError> {
        let joined = |source| NetworkError::Join {
            path: path.to_owned(),
            source,
        };
        let place = Place::of(path).map_err(joined)?;
        let gone = || io::ErrorKind::NotFound.into();
        let sockets = place.visit(sockets).and_then(|made| made.ok_or_else(gone));
        let mut network = Self::over(sockets.map_err(joined)?, Some(place), state_dir);
        network.inside = false;
        network.first_look(path)?;
        Ok(network)
    }

    fn over((socket, notices): (Socket, Notices), place: Option<Place>, state_dir: &Path) -> Self {
        Self {
            socket: Arc::new(socket),
            notices,
            view: View::default(),
            slots: Vec::new(),
            places: Slots::default(),
            limits: Limits::default(),
            vhost: false,
            keeps_answers: false,
            place,
            inside: true,
            record: state_dir.join(RECORD),
            complaints: Vec::new(),
            failed: Vec::new(),
            user: None,
        }
    }

    fn first_look(&mut self, path: &Path) -> Result<(), NetworkError> {
        self.view = self.look()?;
        if self.view.taps.is_empty() {
            Ok(())
        } else {
            let path = path.to_owned();
            Err(NetworkError::Taken { path })
        }
    }

    /// A new tap in the namespace.
    fn tap(&self) -> io::Result<Tap> {
        match &self.place {
            Some(place) if !self.inside => place
                .visit(Tap::make)?
                .ok_or_else(|| io::ErrorKind::NotFound.into()),
            _ => Tap::make(),
        }
    }

    /// Takes over what connects to the namespace's loopback addresses on the host.
    pub fn loopback(&self) -> Result<Loopback, NetworkError> {
        let opened = match &self.place {
            Some(place) if !self.inside => place
                .visit(Loopback::open)
                .and_then(|opened| opened.ok_or_else(|| io::ErrorKind::NotFound.into())),
            _ => Loopback::open(),
        };
        opened.map_err(host(
            "lead the loopback interface's connections into the guest",
        ))
    }

    /// Joins the interfaces that are there, and has as many places as they need, so many disks, and those to spare that
    /// the host's configuration says. Its limits hold for these interfaces and later ones.
    pub fn boot(&mut self, config: &Config, disks: usize) -> Result<Vec<Plug>, NetworkError> {
        self.limits = Limits::from(config);
        self.vhost = config.vhost_net;
        let spare = usize::from(config.spare_interfaces) + disks;
        let all: Vec<u32> = self.view.interfaces.keys().copied().collect();
        self.places = Slots::new(all.len() + spare);
        self.slots.resize_with(MAX_NETWORKS, || None);
        let view = self.view.clone();
        self.connect(&view, &all)
    }

    /// The virtual machine's places for interfaces and disks, as many as [`Network::boot`] wanted.
    pub fn places(&self) -> Slots {
        self.places.clone()
    }

    /// Leaves to the host's stack what answers a resolver that asks from the namespace, as Docker's does. A host that
    /// cannot is complained of.
    pub fn keep_answers(&mut self) {
        self.keeps_answers = true;
        let occupants = self.slots.iter().flatten();
        let mut joints = occupants.filter_map(|occupant| occupant.joint.as_ref());
        if let Err(source) = joints.try_for_each(Joint::keep_answers) {
            self.complain(&NetworkError::Answers(source));
        }
    }

    /// All that the guest needs for the interfaces so far.
    pub fn whole(&self) -> api::Network {
        self.guest(View::default().difference(&self.view), &self.view)
    }

    /// What could not be done as it is on the host, since this was asked last.
    pub fn complaints(&mut self) -> Vec<String> {
        std::mem::take(&mut self.complaints)
    }

    /// Joins interfaces to new taps.
    fn connect(&mut self, view: &View, indexes: &[u32]) -> Result<Vec<Plug>, NetworkError> {
        let interfaces = indexes
            .iter()
            .filter_map(|index| Some((*index, view.interfaces.get(index)?)));
        let plugs = interfaces
            .map(|(index, interface)| self.connect_one(index, interface))
            .collect::<Result<_, _>>()?;
        self.keep_record()
            .map_err(host("write down what is connected"))?;
        Ok(plugs)
    }

    /// Joins an interface to a new tap, in the first free slot.
    fn connect_one(&mut self, index: u32, interface: &Interface) -> Result<Plug, NetworkError> {
        let slot = self.places.take_first();
        let slot = slot.ok_or_else(|| NetworkError::Full {
            name: interface.name.clone(),
        })?;
        let made = self.join_up(index, interface);
        let (joint, tap, kind) = made.inspect_err(|_| self.places.give_back(slot))?;
        let vhost = (self.vhost && kind == NetworkKind::Tap).then(open_vhost);
        self.slots[usize::from(slot)] = Some(Occupant { index, joint });
        Ok(Plug {
            slot,
            mac: interface.mac,
            tap,
            kind,
            vhost: vhost.flatten(),
        })
    }

    fn join_up(
        &mut self,
        index: u32,
        interface: &Interface,
    ) -> Result<(Option<Joint>, OwnedFd, NetworkKind), NetworkError> {
        if let Some(user) = self.user.as_mut().filter(|it| it.outside.index == index) {
            let socket = user.passt.socket(&user.outside)?;
            return Ok((None, socket, NetworkKind::Stream));
        }
        let made = self
            .tap()
            .and_then(|tap| Joint::make(&self.socket, index, interface, tap, self.limits));
        let (joint, tap) = made.map_err(|source| NetworkError::Connect {
            name: interface.name.clone(),
            source,
        })?;
        if self.keeps_answers
            && let Err(source) = joint.keep_answers()
        {
            self.complain(&NetworkError::Answers(source));
        }
        Ok((Some(joint), tap, NetworkKind::Tap))
    }

    /// Writes down for [`clear`] what would be left if this process were killed.
    fn keep_record(&self) -> io::Result<()> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        let occupants = self.slots.iter().flatten();
        let record = Record {
            place: place.clone(),
            interfaces: occupants.map(|occupant| occupant.index).collect(),
        };
        fs::write(&self.record, serde_json::to_vec(&record)?)
    }

    /// A difference in the words of the agent's contract; `next` is what it leads to.
    fn guest(&self, difference: Difference, next: &View) -> api::Network {
        let appeared = difference.appeared.iter().filter_map(|index| {
            let interface = next.interfaces.get(index)?;
            let is_here = |slot: &Option<Occupant>| {
                slot.as_ref()
                    .is_some_and(|occupant| occupant.index == *index)
            };
            let slot = u8::try_from(self.slots.iter().position(is_here)?).ok()?;
            Some(api::Interface {
                device: device(slot),
                index: *index,
                name: interface.name.clone(),
                address: interface.mac.to_vec(),
                mtu: interface.mtu,
                ..Default::default()
            })
        });
        let sysctl = |(file, value)| api::Sysctl {
            file,
            value,
            ..Default::default()
        };
        api::Network {
            appeared: appeared.collect(),
            requests: difference.requests,
            sysctls: difference.sysctls.into_iter().map(sysctl).collect(),
            ..Default::default()
        }
    }

    /// What is in the namespace now.
    fn look(&mut self) -> Result<View, NetworkError> {
        let list = |what: u16, body: &[u8]| {
            self.socket
                .list(Builder::new(what, 0, body))
                .map_err(host("look at the network namespace"))
        };
        let mut listings = Listings {
            links: list(libc::RTM_GETLINK, &[0; 16])?,
            addresses: list(libc::RTM_GETADDR, &[0; 8])?,
            routes: list(libc::RTM_GETROUTE, &[0; 12])?,
            neighbours: list(libc::RTM_GETNEIGH, &[0; 12])?,
            rules: list(libc::RTM_GETRULE, &[0; 12])?,
        };
        if let Some(user) = &self.user {
            let more = user.outside.listings();
            listings.links.extend(more.links);
            listings.addresses.extend(more.addresses);
            listings.routes.extend(more.routes);
        }
        let view = View::of(&listings);
        let complaint = |(name, why): &(String, &'static str)| {
            format!("network interface {name} does not appear in the guest: {why}")
        };
        let new = view.strange.difference(&self.view.strange);
        self.complaints.extend(new.map(complaint));
        Ok(view)
    }

    fn complain(&mut self, error: &NetworkError) {
        self.complaints.push(crate::error::message(error));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.slots.clear();
        // Then `clear` finds nothing.
        let _ = fs::remove_file(&self.record);
    }
}

/// A device of vhost-net's, where this host has it and lets us open it; else the VMM moves the packets.
fn open_vhost() -> Option<OwnedFd> {
    rustix::fs::open(VHOST_NET, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok()
}

fn sockets() -> io::Result<(Socket, Notices)> {
    Ok((Socket::open()?, Notices::open()?))
}

/// Removes what an owner that was killed has left in a namespace that is not its own. Its virtual machine has ended.
pub fn clear(state_dir: &Path) -> io::Result<()> {
    let record: Record = match fs::read(state_dir.join(RECORD)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => serde_json::from_slice(&other?)?,
    };
    let Record { place, interfaces } = record;
    place.visit(|| {
        let socket = Socket::open()?;
        let links = socket.list(Builder::new(libc::RTM_GETLINK, 0, &[0; 16]))?;
        let view = View::of(&Listings {
            links,
            ..Listings::default()
        });
        // With a tap there the interfaces are another's by now.
        let mut left = interfaces
            .iter()
            .filter(|index| view.interfaces.contains_key(index));
        if view.taps.is_empty() {
            left.try_for_each(|index| joint::clear(&socket, *index))
        } else {
            Ok(())
        }
    })?;
    Ok(())
}
