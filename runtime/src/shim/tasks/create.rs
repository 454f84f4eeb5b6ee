//! From a request to a created container: a virtual machine for the first of a sandbox, a place in it for the others.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use containerd_shim_protos::api::CreateTaskRequest;
use oci_spec::runtime::Spec;
use rustix::fs::{FlockOperation, flock};

use super::{KILL, Tasks, bundle_path};
use crate::{
    boot::Boot,
    bundle::Bundle,
    cgroup::{CgroupError, HostCgroup, Terms},
    config::Config,
    guest_spec::{self, HostFiles},
    monitor::HostHooks,
    network::{Connections, Following, Forwarding, Loopback, Network, follow_in_background},
    rootless::Rootless,
    sandbox::{Activation, CreateRequest, INIT, Sandbox, Step},
    share::Share,
    shim::{
        container::{Container, Hooks},
        error::{TaskError, host},
        options::Options,
        pod::{self, Role},
        process::Process,
        rootfs::{self, Rootfs},
        stdio::{Files, Flowing, Paths},
        ticket::Ticket,
    },
    sizing::{self, Bounds, Host, VmSize},
    state::{ContainerId, State, Status, timestamp},
    supervision::Supervisor,
    trace::{Trace, Who},
    update::Limits,
    volumes::{self, Follower},
};

/// A virtual machine and its host side.
#[derive(Debug)]
pub(crate) struct Pod {
    /// Its first container.
    pub(super) id: String,
    pub(super) sandbox: Sandbox,
    /// Unmounted when dropped.
    pub(super) share: Share,
    /// Its directory; `None` if there may be none (`rootless`).
    cgroup: Option<PathBuf>,
    /// systemd's unit for it, if systemd made it.
    unit: Option<String>,
    bounds: Bounds,
    role: Role,
    /// The pid in the guest of the first container's init, which holds the namespaces of a pod.
    holder: u32,
    /// The first container's bundle, locked: whoever gets the lock knows that this server is gone.
    _lock: File,
    /// Follows the host's network; parted from it when dropped.
    _network: Option<Following>,
    /// Leads connections to the network namespace's loopback addresses on the host into the guest.
    _loopback: Option<Forwarding>,
    /// Follows what the host changes in volumes.
    pub(super) volumes: Follower,
}

impl Pod {
    /// The cgroup, if it is this container's alone.
    pub(super) fn cgroup_of(&self, id: &str) -> Option<HostCgroup> {
        let is_its_own = self.role == Role::Alone && self.id == id;
        self.host_cgroup().filter(|_| is_its_own)
    }

    /// Removes what is left on the host of one that has been stopped.
    pub(super) fn remove(&self) -> Result<(), CgroupError> {
        self.host_cgroup().map_or(Ok(()), HostCgroup::remove)
    }

    pub(super) fn host_cgroup(&self) -> Option<HostCgroup> {
        let path = self.cgroup.clone()?;
        Some(HostCgroup::at(path, self.unit.clone()))
    }
}

/// A container that is wanted, checked and with its root file system mounted.
struct Wanted {
    id: ContainerId,
    bundle: Bundle,
    role: Role,
    rootfs: Rootfs,
    paths: Paths,
    hooks: Hooks,
    config: Config,
    cgroups: Terms,
}

/// A container's specification, split.
struct Part {
    guest: Spec,
    files: HostFiles,
    shared_memory_bytes: Option<u64>,
    /// Beyond loopback; a pod's members find it in the namespace that they join.
    network: Connections,
}

/// Where a container is made.
#[derive(Clone, Copy)]
struct Place<'a> {
    sandbox: &'a Sandbox,
    share: &'a Share,
    volumes: &'a Follower,
}

/// A container that the guest has created.
struct Created {
    flowing: Flowing,
    guest_pid: u32,
}

impl Tasks {
    /// Makes a container; a failure leaves nothing.
    pub(super) async fn made(
        &self,
        request: &CreateTaskRequest,
    ) -> Result<(Container, Flowing), TaskError> {
        let mut trace = Trace::default();
        trace.mark(Who::Command, "begin");
        let wanted = Wanted::of(request)?;
        trace.mark(Who::Holder, "mount the root, check the bundle");
        for warning in &wanted.bundle.warnings {
            self.log.warning_of(wanted.id.as_str(), warning);
        }
        let init = Process::new(INIT, wanted.paths.clone(), Vec::new());
        let there = self.pod().clone();
        let (pod, flowing) = match (&wanted.role, there) {
            (Role::Alone | Role::Sandbox, None) => {
                let (pod, flowing) = self.first(&wanted, &init, &mut trace).await?;
                let pod = Arc::new(pod);
                *self.pod() = Some(Arc::clone(&pod));
                (pod, flowing)
            }
            (Role::Member { sandbox }, Some(pod)) if pod.id == *sandbox => {
                let flowing = self.member(&wanted, &init, &pod).await?;
                (pod, flowing)
            }
            (Role::Member { sandbox }, _) => return Err(TaskError::OtherSandbox(sandbox.clone())),
            (_, Some(_)) => return Err(TaskError::OtherSandbox(wanted.id.to_string())),
        };
        trace.mark(Who::Machine, "set the container up");
        // A start that cannot be traced is a start.
        let _ = trace.append(Path::new(&request.bundle));
        let limits = Limits::new(&wanted.bundle.spec, pod.bounds);
        // A limit is no claim: a machine that cannot get so large is shared by those who are in it.
        for step in [Step::Grow, Step::Settle] {
            let _ = pod
                .sandbox
                .fit(wanted.id.as_str(), step, limits.needs())
                .await;
        }
        let container = Container::new(
            request.bundle.clone(),
            pod.sandbox.clone(),
            init,
            wanted.rootfs,
            wanted.hooks,
            limits,
        );
        Ok((container, flowing))
    }

    /// The first container of a sandbox, with the virtual machine.
    async fn first(
        &self,
        wanted: &Wanted,
        init: &Process,
        trace: &mut Trace,
    ) -> Result<(Pod, Flowing), TaskError> {
        let Wanted {
            bundle, config, id, ..
        } = wanted;
        let sized = match wanted.role {
            Role::Sandbox => pod::summed_up(&bundle.spec),
            _ => bundle.spec.clone(),
        };
        let host_has = Host::detect();
        let size = sizing::size(&sized, bundle.vm.as_ref(), config, host_has)?;
        let bounds = Bounds::of(size, config, host_has);
        let lock = locked(&bundle.path)?;
        let cgroup = wanted.cgroup(&sized, size)?;
        trace.mark(Who::Holder, "make the cgroup");
        let mut part = wanted.part();
        let share = Share::make(&bundle.path.join("share"))?;
        share.add(id.as_str(), &part.files)?;
        let (mut network, mut networks) = (None, Vec::new());
        if let Some(path) = bundle.network_path() {
            let network = network.insert(Network::beside(path, &bundle.path)?);
            networks = network.boot(config)?;
        }
        trace.mark(Who::Holder, "share the files, enter the network");
        let booting = Boot {
            dir: &bundle.path,
            config,
            vm: bundle.vm.as_ref(),
            bounds,
            memory_policy: bundle.memory_policy(),
            share: &share,
            cgroup: cgroup.as_ref(),
            networks,
            spare_networks: network.as_ref().map_or(0, Network::spare),
        }
        .start()?;
        if let Some(cgroup) = &cgroup {
            cgroup.leave()?;
        }
        let loopback = self.loopback(wanted, network.as_ref());
        let streams = wanted.paths.open(&self.namespace, id.as_str())?;
        trace.mark(Who::Holder, "start the VMM");
        let sandbox = booting.ready().await?.spawn(bounds);
        trace.mark(Who::Machine, "boot until the agent dials");
        part.network = network.as_ref().map(Network::whole).unwrap_or_default();
        let log = self.log.clone();
        let complain = move |id: &str, text: &str| log.warning_of(id, text);
        let volumes = Follower::new(&sandbox, Arc::new(complain));
        let place = Place {
            sandbox: &sandbox,
            share: &share,
            volumes: &volumes,
        };
        match wanted.set_up(init, place, part, streams).await {
            Ok(Created { flowing, guest_pid }) => {
                let follow = |network| follow_in_background(network, &sandbox, id.as_str());
                let following = network.map(follow);
                let serve = |loopback: Loopback| loopback.serve(&sandbox, id.as_str()).ok();
                let forwarding = loopback.and_then(serve);
                let pod = Pod {
                    id: id.to_string(),
                    sandbox,
                    share,
                    unit: cgroup
                        .as_ref()
                        .and_then(HostCgroup::unit)
                        .map(str::to_owned),
                    cgroup: cgroup.map(HostCgroup::keep),
                    bounds,
                    role: wanted.role.clone(),
                    holder: guest_pid,
                    _lock: lock,
                    _network: following,
                    _loopback: forwarding,
                    volumes,
                };
                Ok((pod, flowing))
            }
            Err(error) => {
                sandbox.stop().await;
                Err(error)
            }
        }
    }

    /// Where port-forward to a pod arrives. A host whose kernel does not have what it takes runs pods without.
    fn loopback(&self, wanted: &Wanted, network: Option<&Network>) -> Option<Loopback> {
        let network = network.filter(|_| wanted.role == Role::Sandbox)?;
        let failed = |error| {
            let text = format!(
                "port-forward does not reach the pod: {}",
                crate::error::message(&error)
            );
            self.log.warning_of(wanted.id.as_str(), &text);
        };
        network.loopback().map_err(failed).ok()
    }

    /// One more container of a pod.
    async fn member(
        &self,
        wanted: &Wanted,
        init: &Process,
        pod: &Pod,
    ) -> Result<Flowing, TaskError> {
        let Wanted { bundle, id, .. } = wanted;
        bundle.check_joining()?;
        let mut part = wanted.part();
        pod::join(&mut part.guest, &pod::joins(&bundle.spec), pod.holder);
        let shared = pod.share.add(id.as_str(), &part.files);
        let created = async {
            shared?;
            let streams = wanted.paths.open(&self.namespace, id.as_str())?;
            let place = Place {
                sandbox: &pod.sandbox,
                share: &pod.share,
                volumes: &pod.volumes,
            };
            wanted.set_up(init, place, part, streams).await
        };
        match created.await {
            Ok(Created { flowing, .. }) => Ok(flowing),
            Err(error) => {
                // The error that led here is the one to report.
                let _ = pod.share.remove(id.as_str());
                Err(error)
            }
        }
    }
}

impl Wanted {
    /// Reads and checks what is wanted, and mounts its root file system.
    fn of(request: &CreateTaskRequest) -> Result<Self, TaskError> {
        if !request.checkpoint.is_empty() {
            return Err(TaskError::Unsupported("to restore a checkpoint"));
        }
        let options = Options::of(request.options.as_ref())?;
        let id = ContainerId::parse(&request.id)?;
        let path = bundle_path(request);
        let role = pod::role_of(&path)?;
        let rootfs = Rootfs::mount(&request.rootfs, &path.join("rootfs"))?;
        let config = match &options.config {
            Some(file) => Config::load_from(file)?,
            None => Config::load()?,
        };
        let bundle = match role {
            Role::Member { .. } => Bundle::load_member(&path, &config)?,
            Role::Alone | Role::Sandbox => Bundle::load(&path, &config)?,
        };
        let config = config.with_annotations(bundle.spec.annotations().as_ref())?;
        let hooks = Hooks {
            lists: HostHooks::of(&bundle.spec),
            state: first_state(&id, &bundle),
            supervisor: Supervisor::of(&bundle.spec, &path),
        };
        Ok(Self {
            id,
            role,
            rootfs,
            paths: Paths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            },
            hooks,
            config,
            cgroups: Terms {
                systemd: options.wants_systemd(bundle.cgroups_path()),
                rootless: Rootless::Auto,
            },
            bundle,
        })
    }

    /// Splits its specification; in a pod, shared memory is the guest's.
    fn part(&self) -> Part {
        let spec = self.bundle.spec.clone();
        let (mut guest, mut files) = guest_spec::split(self.id.as_str(), &self.bundle.path, spec);
        let shared_memory_bytes = match self.role {
            Role::Alone => None,
            Role::Sandbox | Role::Member { .. } => {
                pod::share_memory(&mut guest, &mut files, rootfs::size_of)
            }
        };
        Part {
            guest,
            files,
            shared_memory_bytes,
            network: Connections::default(),
        }
    }

    /// Makes the sandbox's cgroup, and leaves word of it for whoever has to clean up after this server.
    fn cgroup(&self, sized: &Spec, size: VmSize) -> Result<Option<HostCgroup>, TaskError> {
        let left = host("leave word for a later delete");
        let store = |cgroup: Option<&HostCgroup>| {
            Ticket {
                pid: std::process::id(),
                cgroup: cgroup.map(|cgroup| cgroup.path().to_owned()),
                unit: cgroup.and_then(HostCgroup::unit).map(str::to_owned),
            }
            .store(&self.bundle.path)
        };
        self.hooks.lists.store(&self.bundle.path).map_err(&left)?;
        store(None).map_err(&left)?;
        let cgroup = HostCgroup::make(sized, &self.id, size, self.cgroups)?;
        store(cgroup.as_ref()).map_err(&left)?;
        Ok(cgroup)
    }

    /// The container in the guest, its streams flowing.
    async fn set_up(
        &self,
        init: &Process,
        Place {
            sandbox,
            share,
            volumes,
        }: Place<'_>,
        Part {
            guest,
            files,
            shared_memory_bytes,
            network,
        }: Part,
        mut streams: Files,
    ) -> Result<Created, TaskError> {
        self.hooks.before_creation().await?;
        let id = self.id.as_str();
        let found = volumes.find(share, id, &files);
        let request = CreateRequest {
            spec: serde_json::to_vec(&guest).map_err(TaskError::Spec)?,
            bundle: self.bundle.path.to_string_lossy().into_owned(),
            wanted: streams.wanted(self.paths.terminal),
            network,
            shared_memory_bytes,
            activation: Activation::default(),
            seccomp: match &self.hooks.supervisor {
                Some(supervisor) => {
                    let subject = self.hooks.subject(Status::Creating);
                    Some(supervisor.reach().await?.engage(subject).await?)
                }
                None => None,
            },
            volumes: volumes::listings(&found),
        };
        let started = sandbox.create(id, request).await?;
        volumes.follow(id, found);
        init.hold_input(streams.keeper.take());
        let ready = streams
            .flow(started.streams)
            .map_err(TaskError::from)
            .and_then(|flowing| Ok((flowing, share.seal(id, &files)?)));
        match ready {
            Ok((flowing, ())) => Ok(Created {
                flowing,
                guest_pid: started.pid,
            }),
            Err(error) => {
                // It must not stay in a sandbox that lives on. What fails here fails because the sandbox is ending.
                let _ = sandbox.signal(id, INIT, KILL, true).await;
                let _ = sandbox.wait(id, INIT).await;
                let _ = sandbox.delete(id).await;
                volumes.forget(id);
                Err(error)
            }
        }
    }
}

/// Takes the lock on a bundle that tells others whether its server lives.
fn locked(bundle: &Path) -> Result<File, TaskError> {
    let failed = host("lock the bundle");
    let dir = File::open(bundle).map_err(&failed)?;
    flock(&dir, FlockOperation::NonBlockingLockExclusive).map_err(|errno| failed(errno.into()))?;
    Ok(dir)
}

fn first_state(id: &ContainerId, bundle: &Bundle) -> State {
    State {
        oci_version: bundle.spec.version().clone(),
        id: id.clone(),
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
