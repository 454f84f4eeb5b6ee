//! What a container, or a sandbox that is held, needs before the guest hears of it: read, checked, mounted, split.

use std::path::Path;

use containerd_shim_protos::{api::CreateTaskRequest, types::mount::Mount};
use oci_spec::runtime::Spec;

use super::{bundle_path, held::Held};
use crate::{
    bundle::Bundle,
    cgroup::{HostCgroup, Site, Terms},
    config::Config,
    disks::{self, Disk},
    guest_spec::{self, HostFiles},
    huge_pages::HugePages,
    monitor::HostHooks,
    network::Connections,
    rootless::Rootless,
    sandbox::{Activation, CreateRequest, Sandbox, SandboxError},
    share::Share,
    shim::{
        container::Hooks,
        error::{TaskError, host},
        options::Options,
        pod::{self, Role},
        process::Process,
        rootfs::{self, Rootfs},
        stdio::{Files, Flowing, Paths},
        ticket::Ticket,
    },
    sizing::{Bounds, VmSize},
    state::{ContainerId, State, Status},
    supervision::{Handover, Supervisor},
    update::Limits,
    volumes::{self, Follower},
};

/// A container that is wanted, checked and with its root file system mounted.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) id: ContainerId,
    pub(super) bundle: Bundle,
    pub(super) role: Role,
    /// It runs nothing: it holds a pod's namespaces.
    pub(super) holds: bool,
    pub(super) rootfs: Rootfs,
    pub(super) paths: Paths,
    pub(super) hooks: Hooks,
    pub(super) config: Config,
    pub(super) cgroups: Terms,
}

/// A container's specification, split.
pub(super) struct Part {
    pub(super) guest: Spec,
    pub(super) files: HostFiles,
    pub(super) shared_memory_bytes: Option<u64>,
    /// Beyond loopback; a pod's members find it in the namespace that they join.
    pub(super) network: Connections,
    /// Open.
    pub(super) disks: Vec<Disk>,
    pub(super) huge_pages: HugePages,
}

/// Where a container is made.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) sandbox: &'a Sandbox,
    pub(super) share: &'a Share,
    pub(super) volumes: &'a Follower,
    pub(super) bounds: Bounds,
}

/// A container that the guest has created.
pub(super) struct Created {
    pub(super) flowing: Flowing,
    pub(super) guest_pid: u32,
}

impl Wanted {
    /// Reads and checks what is wanted, and mounts its root file system. Where a sandbox is held, it is for its members
    /// alone, whether their annotations say so or only the socket that they came by.
    pub(super) fn of(request: &CreateTaskRequest, held: Option<&Held>) -> Result<Self, TaskError> {
        if !request.checkpoint.is_empty() {
            return Err(TaskError::Unsupported("to restore a checkpoint"));
        }
        let options = Options::of(request.options.as_ref())?;
        let id = ContainerId::parse(&request.id)?;
        let path = bundle_path(request);
        let role = match (pod::role_of(&path)?, held) {
            (Role::Alone, Some(held)) => Role::Member {
                sandbox: held.id.clone(),
            },
            (role, _) => role,
        };
        let rootfs = Rootfs::mount(&request.rootfs, &path.join("rootfs"))?;
        let mut wanted = Self::load(id, &path, role, rootfs, &options)?;
        if let Some(held) = held {
            pod::furnish(&mut wanted.bundle.spec, &held.files);
        }
        wanted.paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        Ok(wanted)
    }

    /// The same for what holds a pod's namespaces.
    pub(super) fn of_sandbox(
        id: ContainerId,
        path: &Path,
        rootfs: &[Mount],
        options: &Options,
    ) -> Result<Self, TaskError> {
        let rootfs = Rootfs::mount(rootfs, &path.join("rootfs"))?;
        let mut wanted = Self::load(id, path, Role::Sandbox, rootfs, options)?;
        wanted.holds = true;
        Ok(wanted)
    }

    fn load(
        id: ContainerId,
        path: &Path,
        role: Role,
        rootfs: Rootfs,
        options: &Options,
    ) -> Result<Self, TaskError> {
        let config = match &options.config {
            Some(file) => Config::load_from(file)?,
            None => Config::load()?,
        };
        let bundle = match role {
            Role::Member { .. } => Bundle::load_member(path, &config)?,
            Role::Alone | Role::Sandbox => Bundle::load(path, &config)?,
        };
        let config = config.with_annotations(bundle.spec.annotations().as_ref())?;
        let hooks = Hooks {
            lists: HostHooks::of(&bundle.spec),
            state: State::creating(&id, &bundle),
            supervisor: Supervisor::of(&bundle.spec, path),
        };
        Ok(Self {
            id,
            role,
            holds: false,
            rootfs,
            paths: Paths::default(),
            hooks,
            config,
            cgroups: Terms {
                systemd: options.wants_systemd(bundle.cgroups_path()),
                rootless: Rootless::Auto,
            },
            bundle,
        })
    }

    /// Splits its specification, and opens its disks; in a pod, shared memory is the guest's.
    pub(super) fn part(&self) -> Result<Part, TaskError> {
        let spec = self.bundle.spec.clone();
        let (mut guest, mut files) = guest_spec::split(self.id.as_str(), &self.bundle.path, spec);
        let shared_memory_bytes = match self.role {
            Role::Alone => None,
            Role::Sandbox | Role::Member { .. } => {
                pod::share_memory(&mut guest, &mut files, rootfs::size_of)
            }
        };
        let huge_pages = HugePages::take(&mut guest, &mut files);
        Ok(Part {
            guest,
            files,
            huge_pages,
            shared_memory_bytes,
            network: Connections::default(),
            disks: disks::open_all(&self.bundle.spec)?,
        })
    }

    /// Makes the sandbox's cgroup, and leaves word of it for whoever has to clean up after this server.
    pub(super) fn cgroup(
        &self,
        sized: &Spec,
        size: VmSize,
    ) -> Result<Option<HostCgroup>, TaskError> {
        let left = host("leave word for a later delete");
        self.hooks.lists.store(&self.bundle.path).map_err(&left)?;
        let site = Site::of(sized, &self.id, self.cgroups)?;
        site.make(sized, size, |note| {
            let ticket = Ticket {
                pid: std::process::id(),
                cgroup: note.path,
                unit: note.unit,
                intended: note.intended,
            };
            ticket.store(&self.bundle.path).map_err(&left)
        })
    }

    /// Runs the hooks that come first, and reaches the supervisor.
    async fn prepared(&self) -> Result<Option<Handover>, TaskError> {
        self.hooks.before_creation().await?;
        let Some(supervisor) = &self.hooks.supervisor else {
            return Ok(None);
        };
        let subject = self.hooks.subject(Status::Creating);
        Ok(Some(supervisor.reach().await?.engage(subject).await?))
    }

    /// The container in the guest, its streams flowing.
    pub(super) async fn set_up(
        &self,
        init: &Process,
        Place {
            sandbox,
            share,
            volumes,
            bounds,
        }: Place<'_>,
        Part {
            guest,
            files,
            shared_memory_bytes,
            network,
            disks,
            huge_pages,
        }: Part,
        mut streams: Files,
    ) -> Result<Created, TaskError> {
        let id = self.id.as_str();
        // Hooks and supervisors may take their time, but not that of a sandbox which is being stopped.
        let seccomp = tokio::select! {
            prepared = self.prepared() => prepared?,
            how = sandbox.ended() => return Err(SandboxError::Ended(how).into()),
        };
        let limits = Limits::new(&self.bundle.spec, bounds);
        sandbox.admit(id, limits.needs()).await?;
        let found = volumes.find(share, id, &files);
        let request = CreateRequest {
            spec: serde_json::to_vec(&guest).map_err(TaskError::Spec)?,
            bundle: self.bundle.path.to_string_lossy().into_owned(),
            wanted: streams.wanted(self.paths.terminal),
            network,
            shared_memory_bytes,
            activation: Activation::default(),
            seccomp,
            volumes: volumes::listings(&found),
            holds: self.holds,
            disks,
            huge_pages,
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
                // It must not stay in a sandbox that lives on.
                sandbox.destroy(id).await;
                volumes.forget(id);
                Err(error)
            }
        }
    }
}
