//! From an order to a created container: the steps of `create`, each undone if a later one fails.

use std::{
    fs,
    future::Future,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    thread::{self, JoinHandle},
    time::SystemTime,
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::Mode;

use super::{
    doors::Door,
    hooks::HostHooks,
    live::{Live, Record},
    membership::{Joined, Premises, Sharer},
    order::{Go, Order, Report},
};
use crate::{
    boot::{Boot, StartError},
    bundle::{Bundle, BundleError, Caller},
    cgroup::{self, CgroupError, HostCgroup},
    config::{AnnotationError, Config, ConfigError},
    control::{ControlError, Listener},
    forwarded::Signals,
    guest_spec,
    identities::{self, Identities, IdentityError},
    log::{Log, LogError},
    network::{Network, NetworkError, UserNetwork, resolver},
    packet::{PacketError, Packets},
    preserved,
    sandbox::{
        Activation, BootError, Booting, CreateRequest, Sandbox, SandboxError, Started, Step, Wanted,
    },
    share::{self, Share, ShareError},
    shm,
    sizing::{self, Bounds, Host, SizingError},
    state::{State, StateDir, StateError, Status, timestamp},
    stdio::{self, Progress},
    terminal::{self, Size, TerminalError},
    trace::Who,
    update::Limits,
    view::{self, View, ViewError},
    vmm::{self, VmmError},
};

/// Why a container was not created.
#[derive(Debug, thiserror::Error)]
pub(super) enum CreateError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Sizing(#[from] SizingError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("start the virtual machine")]
    Kvm(#[from] VmmError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    View(#[from] ViewError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("unable to start container process")]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("write the guest's specification")]
    Spec(#[source] serde_json::Error),
    #[error("report to the caller")]
    Report(#[from] PacketError),
    #[error("{step}")]
    Host {
        step: &'static str,
        source: io::Error,
    },
    #[error("the caller is gone")]
    Abandoned,
}

/// The caller's descriptors, as attached to the order.
#[derive(Debug)]
pub(super) struct CallerFiles {
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
    /// From 3 upwards.
    pub(super) preserved: Vec<OwnedFd>,
}

/// Where the container's standard streams go.
struct Streams {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    preserved: Vec<OwnedFd>,
    /// The terminal whose size the container's follows.
    terminal: Option<OwnedFd>,
    size: Option<Size>,
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
    let caller = Caller {
        detach: order.detach,
        console_socket: order.console_socket.is_some(),
    };
    bundle.check_terminal(caller)?;
    let host_has = Host::detect();
    let size = sizing::size(&bundle.spec, bundle.vm.as_ref(), &config, host_has)?;
    let bounds = Bounds::of(size, &config, host_has);
    trace.mark(Who::Holder, "check the bundle");
    // Nothing so far has left anything. The session's end is this process's own from here on.
    rustix::process::setsid().map_err(host("leave the caller's session"))?;
    let dir = StateDir::claim(&order.root, &order.id)?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    report.send(&Report::Claimed, &[]).await?;
    for warning in &bundle.warnings {
        report.send(&Report::Warning(warning.clone()), &[]).await?;
    }
    let mut state = first_state(&order, &bundle);
    dir.store(&state)?;
    let cgroup = HostCgroup::make(&bundle.spec, &order.id, size, order.cgroups)?;
    if let Some(cgroup) = &cgroup {
        state.cgroup = Some(cgroup.path().to_owned());
        state.systemd_unit = cgroup.unit().map(str::to_owned);
        dir.store(&state)?;
    }
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
    let signals = Signals::catch().map_err(|source| CreateError::Host {
        step: "catch signals",
        source,
    })?;
    let (share, mut network, birth) = match &joins {
        None => {
            share::enter_private_namespace()?;
            let mut network = Network::enter(bundle.network_path(), dir.path())?;
            if let Some(user_network) = user_network.flatten() {
                network.add_user_network(user_network)?;
            }
            let networks = network.boot(&config)?;
            trace.mark(Who::Holder, "split the bundle, enter the network");
            let share = Share::make(&dir.path().join("share"))?;
            share.add(id, &host_files)?;
            trace.mark(Who::Holder, "share the files");
            let booting = Boot {
                dir: dir.path(),
                config: &config,
                vm: bundle.vm.as_ref(),
                bounds,
                memory_policy: bundle.memory_policy(),
                share: &share,
                cgroup: cgroup.as_ref(),
                networks,
                spare_networks: network.spare(),
            };
            let birth = Birth::Boots(booting.start()?);
            (share, Some(network), birth)
        }
        Some(sharer) => {
            let (share, joined) = sharer.join(id, &mut guest, &host_files)?;
            (share, None, Birth::Joined(joined))
        }
    };
    trace.mark(Who::Holder, birth.step());
    let (holder, bounds) = match &birth {
        Birth::Boots(_) => (dir.path().to_owned(), bounds),
        Birth::Joined(joined) => (joined.holder.clone(), joined.bounds),
    };
    let limits = Limits::new(&bundle.spec, bounds);
    // In a unit of systemd's it is already.
    let to_join = cgroup.as_ref().filter(|cgroup| cgroup.unit().is_none());
    let joining = to_join.map(Joining::begin).transpose()?;
    let streams = streams(files, &order, &guest, report).await?;
    set_console_size(&mut guest, streams.size);
    guest_spec::add_listen_fds(&mut guest, order.activated);
    if order.notify {
        guest_spec::add_notify_socket(&mut guest, id);
    }
    let listening = preserved::listening(&streams.preserved);
    let listening = listening.map_err(|source| CreateError::Host {
        step: "examine the listening sockets",
        source,
    })?;
    let mut request = CreateRequest {
        spec: serde_json::to_vec(&guest).map_err(CreateError::Spec)?,
        bundle: bundle.path.to_string_lossy().into_owned(),
        wanted: Wanted::all(
            streams.terminal.is_some(),
            // As many as a packet carries at most.
            u32::try_from(streams.preserved.len()).unwrap_or(0),
        ),
        network: Default::default(),
        shared_memory_bytes,
        activation: Activation {
            listening,
            notify: order.notify,
        },
    };
    let sandbox = match birth {
        Birth::Boots(booting) => unless_abandoned(report, booting.ready())
            .await??
            .spawn(bounds),
        Birth::Joined(joined) => joined.sandbox,
    };
    trace.mark(Who::Machine, "boot until the agent dials");
    let inside = joining.map(Joining::finish).transpose()?;

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
            for complaint in network.complaints() {
                report.send(&Report::Warning(complaint), &[]).await?;
            }
            request.network = network.whole();
            request.wanted.resolver = resolver::is_wanted(&spec);
        }
        // A limit is no claim: a machine that cannot get so large is shared by those who are in it.
        for step in [Step::Grow, Step::Settle] {
            let _ = sandbox.fit(id, step, limits.needs()).await;
        }
        trace.mark(Who::Holder, "run hooks, connect the network");
        let set_up = set_up(&sandbox, id, request, streams);
        let flowing = unless_abandoned(report, set_up).await??;
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
        let view = View::enter(&share, id, &view::places(&spec, &host_files))?;
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
            let record = Record::new(dir.keep(), state, limits, premises);
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
            })
        }
        Err(error) => {
            sandbox.stop().await;
            Err(error)
        }
    }
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

/// What is left to follow of streams that flow.
struct Flowing {
    /// Init, in the guest.
    guest_pid: u32,
    terminal: Option<OwnedFd>,
    /// Standard output and standard error.
    progress: [Option<Progress>; 2],
    /// Those descriptors from 3 upwards that the guest writes to.
    preserved: Vec<Progress>,
    /// Those that listen.
    doors: Vec<Door>,
}

/// The container in the guest, its streams flowing.
async fn set_up(
    sandbox: &Sandbox,
    id: &str,
    request: CreateRequest,
    streams: Streams,
) -> Result<Flowing, CreateError> {
    let listening = request.activation.listening.clone();
    let Started {
        pid: guest_pid,
        streams: guest_ends,
    } = sandbox.create(id, request).await?;
    let failed = |source| CreateError::Host {
        step: "pass the standard streams on",
        source,
    };
    if let Some(questions) = guest_ends.resolver {
        // What goes wrong there is a question without an answer.
        tokio::spawn(resolver::relay(questions));
    }
    if let Some(stdin) = guest_ends.stdin {
        stdio::input(streams.stdin, stdin).map_err(failed)?;
    }
    let output = |from: Option<OwnedFd>, to| from.map(|from| stdio::output(from, to)).transpose();
    let stdout = output(guest_ends.stdout, streams.stdout).map_err(failed)?;
    let stderr = output(guest_ends.stderr, streams.stderr).map_err(failed)?;
    let (mut ours, mut theirs, mut doors) = (Vec::new(), Vec::new(), Vec::new());
    for ((socket, stream), index) in streams
        .preserved
        .into_iter()
        .zip(guest_ends.preserved)
        .zip(0..)
    {
        match listening.iter().find(|listening| listening.index == index) {
            Some(listening) => doors.push(Door {
                socket,
                port: listening.vsock_port,
            }),
            None => {
                ours.push(socket);
                theirs.push(stream);
            }
        }
    }
    let preserved = preserved::join(ours, theirs).map_err(|source| CreateError::Host {
        step: "pass the preserved descriptors on",
        source,
    })?;
    Ok(Flowing {
        guest_pid,
        terminal: streams.terminal,
        progress: [stdout, stderr],
        preserved,
        doors,
    })
}

/// Decides what stands for the container's terminal, and gets hold of it.
async fn streams(
    files: CallerFiles,
    order: &Order,
    guest: &Spec,
    report: &Packets,
) -> Result<Streams, CreateError> {
    let CallerFiles {
        stdin,
        stdout,
        stderr,
        preserved,
    } = files;
    let process = guest.process().as_ref();
    if !process
        .and_then(|process| process.terminal())
        .unwrap_or(false)
    {
        return Ok(Streams {
            stdin,
            stdout,
            stderr,
            preserved,
            terminal: None,
            size: None,
        });
    }
    let twin = |fd: &OwnedFd| {
        fd.try_clone().map_err(|source| CreateError::Host {
            step: "share the terminal",
            source,
        })
    };
    let asked = process
        .and_then(|process| process.console_size())
        .and_then(|size| {
            Some((
                u16::try_from(size.height()).ok()?,
                u16::try_from(size.width()).ok()?,
            ))
        });
    if let Some(socket) = &order.console_socket {
        let slave = terminal::behind_console_socket(socket, asked)?;
        let (stdin, stdout) = (twin(&slave)?, twin(&slave)?);
        return Ok(Streams {
            stdin,
            stdout,
            stderr,
            preserved,
            size: asked,
            terminal: Some(slave),
        });
    }
    report.send(&Report::Terminal, &[]).await?;
    let size = go(report).await?.size;
    let terminal = [&stdout, &stdin, &stderr]
        .into_iter()
        .find(|fd| rustix::termios::isatty(fd));
    // Without any terminal among them the size cannot change either; any descriptor will do.
    let terminal = Some(twin(terminal.unwrap_or(&stderr))?);
    Ok(Streams {
        stdin,
        stdout,
        stderr,
        preserved,
        terminal,
        size: asked.or(size),
    })
}

fn set_console_size(guest: &mut Spec, size: Option<Size>) {
    if let (Some(size), Some(process)) = (size, guest.process_mut()) {
        process.set_console_size(terminal::console_size(size));
    }
}

/// This process on its way into the sandbox's cgroup. Moving a process costs the kernel a grace period of 10 ms and
/// more, which passes while the guest boots.
struct Joining(Option<JoinHandle<Result<(), CgroupError>>>, Inside);

/// This process in the sandbox's cgroup; dropping it goes back, so that the cgroup can be removed.
struct Inside {
    /// The files that lead there.
    before: Vec<PathBuf>,
}

impl Joining {
    fn begin(cgroup: &HostCgroup) -> Result<Self, CreateError> {
        let before = cgroup::way_back();
        let cgroup = HostCgroup::at(cgroup.path().to_owned(), None);
        let thread = thread::Builder::new()
            .name("cgroup".to_owned())
            .stack_size(64 << 10);
        let thread = thread
            .spawn(move || cgroup.join())
            .map_err(|source| CreateError::Host {
                step: "start a thread",
                source,
            })?;
        Ok(Self(Some(thread), Inside { before }))
    }

    /// Waits for the end of the move, if it is not long over.
    fn finish(mut self) -> Result<Inside, CreateError> {
        self.wait()?;
        let before = std::mem::take(&mut self.1.before);
        Ok(Inside { before })
    }

    fn wait(&mut self) -> Result<(), CgroupError> {
        match self.0.take().map(JoinHandle::join) {
            Some(Ok(joined)) => joined,
            // A panic ends the process.
            None | Some(Err(_)) => Ok(()),
        }
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        // The error that led here is the one to report; then the guard inside goes back.
        let _ = self.wait();
    }
}

impl Inside {
    fn stay(mut self) {
        self.before.clear();
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        for procs in &self.before {
            // Then the cgroup stays for `delete --force`.
            let _ = fs::write(procs, "0");
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

fn caller_files(fds: Vec<OwnedFd>) -> Result<CallerFiles, CreateError> {
    let mut fds = fds.into_iter();
    let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(CreateError::Abandoned);
    };
    Ok(CallerFiles {
        stdin,
        stdout,
        stderr,
        preserved: fds.collect(),
    })
}

fn first_state(order: &Order, bundle: &Bundle) -> State {
    State {
        oci_version: bundle.spec.version().clone(),
        id: order.id.clone(),
        pid: std::process::id(),
        status: Status::Creating,
        bundle: bundle.path.clone(),
        rootfs: bundle.rootfs.clone(),
        created: timestamp(SystemTime::now()),
        annotations: bundle.spec.annotations().clone(),
        cgroup: None,
        systemd_unit: None,
    }
}

fn host(step: &'static str) -> impl Fn(rustix::io::Errno) -> CreateError {
    move |errno| CreateError::Host {
        step,
        source: errno.into(),
    }
}
