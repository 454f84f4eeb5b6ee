//! From an order to a created container: the steps of `create`, each undone if a later one fails.

mod error;
mod joining;
mod streams;

use std::{future::Future, os::fd::OwnedFd, sync::Arc};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::Mode;

use self::{
    joining::{Inside, Joining},
    streams::{Streams, caller_files, set_console_size, set_up, streams},
};
use super::{
    hooks::HostHooks,
    live::{Live, Record},
    membership::{self, Joined, Premises, Sharer},
    order::{Go, Order, Report},
};
use crate::{
    boot::Boot,
    bundle::{Bundle, Caller},
    cgroup::{HostCgroup, Site},
    config::Config,
    control::Listener,
    disks::{self, Disk},
    error::message,
    forwarded::Signals,
    guest_spec::{self, HostFiles},
    huge_pages::HugePages,
    identities::{self, Identities},
    log::Log,
    network::{Network, UserNetwork, resolver},
    packet::Packets,
    preserved, procfs,
    sandbox::{Activation, Booting, CreateRequest, Sandbox, Wanted},
    share::{self, Share},
    shm,
    sizing::{self, Bounds, Host, VmSize},
    state::{State, StateDir, Status},
    supervision::{Subject, Supervisor},
    trace::{Trace, Who},
    update::Limits,
    view::{self, View},
    vmm,
    volumes::{self, Complain, Follower},
};

pub(super) use error::CreateError;

/// An order that can be carried out, as far as can be seen without changing anything.
struct Checked {
    log: Option<Log>,
    config: Config,
    bundle: Bundle,
    /// The container whose sandbox is joined.
    joins: Option<Sharer>,
    /// Of an ordinary user's sandbox.
    identities: Option<Identities>,
    size: VmSize,
    bounds: Bounds,
    site: Site,
    disks: Vec<Disk>,
}

fn check(order: &Order) -> Result<Checked, CreateError> {
    let log = match &order.log {
        Some((path, format, debug)) => Some(Log::open(Some(path), format, *debug)?),
        None => None,
    };
    let config = Config::load()?;
    let bundle = Bundle::load_undecided(&order.bundle, &config)?;
    let config = config.with_annotations(bundle.spec.annotations().as_ref())?;
    let joins = Sharer::find(&bundle.spec, &order.root);
    if joins.is_none() {
        bundle.check_alone(config.user_network || order.cgroups.rootless.applies())?;
    } else {
        bundle.check_joining()?;
    }
    let identities = Identities::of_caller(&bundle.spec)?;
    if identities.is_some() {
        vmm::may_use_kvm()?;
    }
    bundle.check_terminal(Caller {
        detach: order.detach,
        console_socket: order.console_socket.is_some(),
    })?;
    let host_has = Host::detect();
    let size = sizing::size(&bundle.spec, bundle.vm.as_ref(), &config, host_has)?;
    Ok(Checked {
        log,
        disks: disks::open_all(&bundle.spec)?,
        bounds: Bounds::of(size, &bundle.spec, &config, host_has),
        site: Site::of(&bundle.spec, &order.id, order.cgroups)?,
        config,
        bundle,
        joins,
        identities,
        size,
    })
}

/// Creates the container, and starts it if that was ordered.
pub(super) async fn create(
    order: Order,
    fds: Vec<OwnedFd>,
    report: &Packets,
) -> Result<Live, CreateError> {
    let mut trace = order.trace.clone();
    trace.mark(Who::Holder, "start the monitor");
    let files = caller_files(fds)?;
    let Checked {
        log,
        config,
        bundle,
        joins,
        identities,
        size,
        bounds,
        site,
        disks,
    } = check(&order)?;
    trace.mark(Who::Holder, "check the bundle");
    // Nothing so far has left anything. The session's end is this process's own from here on.
    rustix::process::setsid().map_err(host("leave the caller's session"))?;
    let dir = StateDir::claim(&order.root, &order.id)?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    report.send(&Report::Claimed, &[]).await?;
    for warning in &bundle.warnings {
        report.send(&Report::Warning(warning.clone()), &[]).await?;
    }
    let mut state = State::creating(&order.id, &bundle);
    let cgroup = site.make(&bundle.spec, size, |note| {
        state.set_cgroup(note);
        dir.store(&state).map_err(CreateError::from)
    })?;
    // Both while this process is where its caller is.
    let user_network = match bundle.is_without_network() {
        true => Some(user_network(&config, report).await?),
        false => None,
    };
    if let Some(identities) = identities {
        take_on(identities, report).await?;
    }
    trace.mark(Who::Holder, "claim the name, make the cgroup");
    let hooks = HostHooks::of(&bundle.spec);
    hooks
        .store(dir.path())
        .map_err(|source| CreateError::Host {
            step: "keep the hooks",
            source,
        })?;

    let id = order.id.as_str();
    let mut spec = bundle.spec.clone();
    let shares_memory = joins
        .as_ref()
        .is_none_or(|sharer| sharer.shares(LinuxNamespaceType::Ipc));
    if !shares_memory {
        shm::localize(&mut spec);
    }
    let (mut guest, mut host_files) = guest_spec::split(id, &bundle.path, spec.clone());
    if bundle.is_without_network() {
        guest_spec::add_network(&mut guest);
    }
    let shared_memory_bytes = shares_memory
        .then(|| shm::share(&mut guest, &mut host_files))
        .flatten();
    let huge_pages = HugePages::take(&mut guest, &mut host_files);
    let supervisor = Supervisor::of(&spec, &bundle.path);
    let reached = match &supervisor {
        Some(supervisor) => Some(supervisor.reach().await?),
        None => None,
    };
    let signals = Signals::catch().map_err(|source| CreateError::Host {
        step: "catch signals",
        source,
    })?;
    let (share, mut network, birth) = match &joins {
        None => {
            let ground = Ground {
                id,
                dir: &dir,
                config: &config,
                bundle: &bundle,
                bounds,
                cgroup: cgroup.as_ref(),
                host_files: &host_files,
                disks: disks.len(),
            };
            let (share, network, booting) = ground.boot(user_network.flatten(), &mut trace)?;
            (share, Some(network), Birth::Boots(booting))
        }
        Some(sharer) => {
            let joining = sharer.join(&dir, id, &mut guest, &host_files);
            let (share, joined) = joining.await?;
            (share, None, Birth::Joined(joined))
        }
    };
    trace.mark(Who::Holder, birth.step());
    let (holder, bounds) = match &birth {
        Birth::Boots(_) => (dir.path().to_owned(), bounds),
        Birth::Joined(joined) => (joined.holder.clone(), joined.bounds),
    };
    let limits = Limits::new(&bundle.spec, bounds);
    let joined = match &birth {
        Birth::Boots(_) => None,
        Birth::Joined(joined) => Some(joined.sandbox.clone()),
    };
    let at_hand = async {
        // In a unit of systemd's it is already.
        let to_join = cgroup.as_ref().filter(|cgroup| cgroup.unit().is_none());
        let joining = to_join.map(Joining::begin).transpose()?;
        let streams = streams(files, &order, &guest, report).await?;
        set_console_size(&mut guest, streams.size);
        guest_spec::add_listen_fds(&mut guest, order.activated);
        if order.notify {
            guest_spec::add_notify_socket(&mut guest, id);
        }
        let request = request(&guest, &bundle, &streams, shared_memory_bytes, order.notify)?;
        let sandbox = match birth {
            Birth::Boots(booting) => {
                let ready = unless_abandoned(report, booting.ready()).await??;
                ready.note(&mut trace);
                ready.spawn(bounds)
            }
            Birth::Joined(joined) => joined.sandbox,
        };
        let inside = joining.map(Joining::finish).transpose()?;
        Ok::<_, CreateError>((streams, request, sandbox, inside))
    };
    let (streams, mut request, sandbox, inside) = match at_hand.await {
        Ok(at_hand) => at_hand,
        Err(error) => {
            // The holder clears away what there is, and says so.
            if let Some(sandbox) = joined {
                sandbox.stop().await;
            }
            return Err(error);
        }
    };
    drop(joined);
    (request.disks, request.huge_pages) = (disks, huge_pages);
    let log = log.map(|log| Arc::new(log.about(id, &membership::sandbox(&holder))));
    let following = Follower::new(&sandbox, complain(log.clone()));

    let created = async {
        if hooks.precede_creation() {
            report.send(&Report::Hooks, &[]).await?;
            go(report).await?;
        }
        if let Some(network) = &mut network {
            // Engines connect the namespace before, hooks just now.
            if let Some(change) = network.change()? {
                unless_abandoned(report, change.plug(&sandbox)).await??;
            }
            request.wanted.resolver = resolver::is_wanted(&spec);
            if request.wanted.resolver {
                network.keep_answers();
            }
            for complaint in network.complaints() {
                report.send(&Report::Warning(complaint), &[]).await?;
            }
            request.network = network.whole();
        }
        sandbox.admit(id, limits.needs()).await?;
        if let Some(reached) = reached {
            let subject = Subject {
                state: &state,
                status: Status::Creating,
                pid: state.pid,
            };
            request.seccomp = Some(reached.engage(subject).await?);
        }
        let found = match &joins {
            None => following.find(&share, id, &host_files),
            Some(_) => Vec::new(),
        };
        request.volumes = volumes::listings(&found);
        trace.mark(Who::Holder, "run hooks, connect the network");
        let set_up = set_up(&sandbox, id, request, streams);
        let flowing = unless_abandoned(report, set_up).await??;
        following.follow(id, found);
        trace.mark(Who::Machine, "set the container up");
        share.seal(id, &host_files)?;
        let listener = Listener::bind(dir.path())?;
        state.status = Status::Created;
        dir.store(&state)?;
        trace.mark(Who::Holder, "seal the files, write the state");
        if order.start {
            unless_abandoned(report, sandbox.start(id)).await??;
            trace.mark(Who::Machine, "start the program");
            state.status = Status::Running;
            dir.store(&state)?;
        }
        let processes = processes(&spec, &sandbox, id, log.as_deref());
        let view = View::enter(&share, id, &view::places(&spec, &host_files), processes)?;
        let premises = Premises {
            holder,
            guest_pid: flowing.guest_pid,
            bounds,
            share: share.path().to_owned(),
            namespace: view
                .sandbox_namespace()
                .map_err(|source| CreateError::Host {
                    step: "keep the sandbox's mount namespace",
                    source,
                })?,
        };
        report.send(&Report::Ready { pid: state.pid }, &[]).await?;
        trace.mark(Who::Holder, "report to the caller");
        Ok::<_, CreateError>((flowing, listener, view, premises))
    };
    match created.await {
        Ok((flowing, listener, view, premises)) => {
            drop((inside.map(Inside::stay), cgroup.map(HostCgroup::keep)));
            // A start that cannot be traced is a start.
            let _ = trace.append(dir.path());
            let record = Record::new(dir.keep(), state, limits, premises, supervisor);
            Ok(Live {
                sandbox,
                record,
                network,
                listener,
                progress: flowing.progress,
                preserved: flowing.preserved,
                doors: flowing.doors,
                terminal: flowing.terminal,
                signals,
                view,
                share,
                log,
                volumes: following,
            })
        }
        Err(error) => {
            sandbox.stop().await;
            Err(error)
        }
    }
}

/// The container's /proc for the engine, if it looks for one. Without it, it sees none: no reason not to run.
fn processes(spec: &Spec, sandbox: &Sandbox, id: &str, log: Option<&Log>) -> Option<OwnedFd> {
    if !procfs::is_wanted(spec) {
        return None;
    }
    let mount = procfs::mount(sandbox.clone(), id).map_err(|error| {
        let text = format!("no /proc for the engine: {}", message(&error));
        log.iter().for_each(|log| log.warning(&text));
    });
    mount.ok()
}

/// Writes to the container's log, if it has one.
fn complain(log: Option<Arc<Log>>) -> Complain {
    Arc::new(move |_, text| log.iter().for_each(|log| log.warning(text)))
}

/// What a sandbox of the container's own stands on.
struct Ground<'a> {
    id: &'a str,
    dir: &'a StateDir,
    config: &'a Config,
    bundle: &'a Bundle,
    bounds: Bounds,
    cgroup: Option<&'a HostCgroup>,
    host_files: &'a HostFiles,
    /// How many it brings.
    disks: usize,
}

impl Ground<'_> {
    /// Starts its virtual machine. This process, which has one thread, is in the container's network namespace afterwards.
    fn boot(
        &self,
        user_network: Option<UserNetwork>,
        trace: &mut Trace,
    ) -> Result<(Share, Network, Booting), CreateError> {
        share::enter_private_namespace()?;
        let mut network = Network::enter(self.bundle.network_path(), self.dir.path())?;
        if let Some(user_network) = user_network {
            network.add_user_network(user_network)?;
        }
        let networks = network.boot(self.config, self.disks)?;
        trace.mark(Who::Holder, "split the bundle, enter the network");
        let share = Share::make(&self.dir.path().join("share"))?;
        share.add(self.id, self.host_files)?;
        trace.mark(Who::Holder, "share the files");
        let boot = Boot {
            dir: self.dir.path(),
            config: self.config,
            vm: self.bundle.vm.as_ref(),
            bounds: self.bounds,
            memory_policy: self.bundle.memory_policy(),
            share: &share,
            cgroup: self.cgroup,
            networks,
            slots: network.places(),
        };
        let booting = boot.start()?;
        Ok((share, network, booting))
    }
}

/// What the guest is asked for; its network, disks and huge pages are added later.
fn request(
    guest: &Spec,
    bundle: &Bundle,
    streams: &Streams,
    shared_memory_bytes: Option<u64>,
    notify: bool,
) -> Result<CreateRequest, CreateError> {
    let listening = preserved::listening(&streams.preserved);
    let listening = listening.map_err(|source| CreateError::Host {
        step: "examine the listening sockets",
        source,
    })?;
    Ok(CreateRequest {
        spec: serde_json::to_vec(guest).map_err(CreateError::Spec)?,
        bundle: bundle.path.to_string_lossy().into_owned(),
        wanted: Wanted::all(
            streams.terminal.is_some(),
            // As many as a packet carries at most.
            u32::try_from(streams.preserved.len()).unwrap_or(0),
        ),
        network: Default::default(),
        shared_memory_bytes,
        activation: Activation { listening, notify },
        seccomp: None,
        volumes: Vec::new(),
        holds: false,
        disks: Vec::new(),
        huge_pages: HugePages::default(),
    })
}

/// The network of a container that is to have the caller's.
async fn user_network(
    config: &Config,
    report: &Packets,
) -> Result<Option<UserNetwork>, CreateError> {
    let started = UserNetwork::start(config)?;
    if started.is_none() {
        let text = "the container has loopback only: no default route leads out of this host";
        report.send(&Report::Warning(text.to_owned()), &[]).await?;
    }
    Ok(started)
}

/// Moves this process, which has one thread, into the user namespace of an ordinary user's sandbox.
async fn take_on(identities: Identities, report: &Packets) -> Result<(), CreateError> {
    if identities.enter()? {
        report.send(&Report::Identities(identities), &[]).await?;
        go(report).await?;
    }
    Ok(identities::keep_rights()?)
}

/// Where a container's sandbox comes from.
enum Birth {
    /// It is its own, and boots.
    Boots(Booting),
    /// It is another container's.
    Joined(Joined),
}

impl Birth {
    /// What has been done for it.
    const fn step(&self) -> &'static str {
        match self {
            Self::Boots(_) => "start the VMM",
            Self::Joined(_) => "join the sandbox",
        }
    }
}

/// Waits for the caller's word.
async fn go(report: &Packets) -> Result<Go, CreateError> {
    report
        .receive::<Go>()
        .await?
        .map(|(go, _)| go)
        .ok_or(CreateError::Abandoned)
}

/// A step of the guest's, unless the caller hangs up meanwhile.
async fn unless_abandoned<T>(
    report: &Packets,
    step: impl Future<Output = T>,
) -> Result<T, CreateError> {
    tokio::select! {
        biased;
        done = step => Ok(done),
        _ = report.receive::<Go>() => Err(CreateError::Abandoned),
    }
}

fn host(step: &'static str) -> impl Fn(rustix::io::Errno) -> CreateError {
    move |errno| CreateError::Host {
        step,
        source: errno.into(),
    }
}
