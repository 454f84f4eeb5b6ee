//! From a request to a created container: a virtual machine for the first of a sandbox, a place in it for the others.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim_protos::api::CreateTaskRequest;
use rustix::fs::{FlockOperation, flock};

use super::{
    Tasks,
    wanted::{Created, Place, Wanted},
};
use crate::{
    boot::Boot,
    cgroup::{CgroupError, HostCgroup},
    guest_spec,
    network::{Following, Forwarding, Loopback, Network, follow_in_background},
    sandbox::{INIT, Sandbox, Step},
    share::Share,
    shim::{
        container::Container,
        error::{TaskError, host},
        pod::{self, Role},
        process::Process,
        stdio::Flowing,
    },
    sizing::{self, Bounds, Host},
    slots::Slots,
    trace::{Trace, Who},
    update::Limits,
    volumes::Follower,
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

    /// Lets the cgroup hold the machine with a member's huge pages, which the sandbox's limit does not count.
    async fn make_room(&self, wanted: &Wanted) {
        let needs = Limits::new(&wanted.bundle.spec, self.bounds).needs();
        if needs.huge_bytes > 0
            && let Some(cgroup) = self.host_cgroup()
            && let Ok(size) = self
                .sandbox
                .fit(wanted.id.as_str(), Step::Look, needs)
                .await
        {
            // If it does not get larger the machine has what it had, and whoever uses more ends.
            let _ = cgroup.make_room(size);
        }
    }

    pub(super) fn host_cgroup(&self) -> Option<HostCgroup> {
        let path = self.cgroup.clone()?;
        Some(HostCgroup::at(path, self.unit.clone()))
    }
}

impl Tasks {
    /// Makes a container; a failure leaves nothing.
    pub(super) async fn made(
        &self,
        request: &CreateTaskRequest,
    ) -> Result<(Container, Flowing), TaskError> {
        let mut trace = Trace::default();
        trace.mark(Who::Command, "begin");
        let held = self.held.get().map(Arc::as_ref);
        let wanted = Wanted::of(request, held)?;
        trace.mark(Who::Holder, "mount the root, check the bundle");
        for warning in &wanted.bundle.warnings {
            self.log.warning_of(wanted.id.as_str(), warning);
        }
        let init = Process::new(INIT, wanted.paths.clone(), Vec::new());
        let there = self.pod().clone();
        let (pod, flowing) = match (&wanted.role, there) {
            (Role::Alone | Role::Sandbox, None) if held.is_none() => {
                let (pod, flowing) = self.first(&wanted, &init, &mut trace).await?;
                let pod = Arc::new(pod);
                *self.pod() = Some(Arc::clone(&pod));
                (pod, flowing)
            }
            (Role::Member { sandbox }, Some(pod)) if pod.id == *sandbox => {
                let flowing = self.member(&wanted, &init, &pod).await?;
                (pod, flowing)
            }
            (Role::Member { sandbox }, None) if held.is_some_and(|held| held.id == *sandbox) => {
                return Err(TaskError::NotRunning(sandbox.clone()));
            }
            (Role::Member { sandbox }, _) => return Err(TaskError::OtherSandbox(sandbox.clone())),
            _ => return Err(TaskError::OtherSandbox(wanted.id.to_string())),
        };
        trace.mark(Who::Machine, "set the container up");
        // A start that cannot be traced is a start.
        let _ = trace.append(Path::new(&request.bundle));
        let limits = Limits::new(&wanted.bundle.spec, pod.bounds);
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
    pub(super) async fn first(
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
        let bounds = Bounds::of(size, &sized, config, host_has);
        let lock = locked(&bundle.path)?;
        let cgroup = wanted.cgroup(&sized, size)?;
        trace.mark(Who::Holder, "make the cgroup");
        let mut part = wanted.part()?;
        let share = Share::make(&bundle.path.join("share"))?;
        share.add(id.as_str(), &part.files)?;
        let (mut network, mut networks) = (None, Vec::new());
        let mut slots = Slots::new(part.disks.len());
        if let Some(path) = bundle.network_path() {
            let network = network.insert(Network::beside(path, &bundle.path)?);
            networks = network.boot(config, part.disks.len())?;
            slots = network.places();
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
            slots,
        }
        .start()?;
        if let Some(cgroup) = &cgroup {
            cgroup.leave()?;
        }
        let loopback = self.loopback(wanted, network.as_ref());
        let streams = wanted.paths.open(&self.namespace, id.as_str())?;
        trace.mark(Who::Holder, "start the VMM");
        let ready = booting.ready().await?;
        ready.note(trace);
        let sandbox = ready.spawn(bounds);
        if wanted.holds {
            self.machine.send_replace(Some(sandbox.clone()));
        }
        part.network = network.as_ref().map(Network::whole).unwrap_or_default();
        let log = self.log.clone();
        let complain = move |id: &str, text: &str| log.warning_of(id, text);
        let volumes = Follower::new(&sandbox, Arc::new(complain));
        let place = Place {
            sandbox: &sandbox,
            share: &share,
            volumes: &volumes,
            bounds,
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
                self.machine.send_replace(None);
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
        let mut part = wanted.part()?;
        guest_spec::join_namespaces(&mut part.guest, &pod::joins(&bundle.spec), pod.holder);
        let shared = pod.share.add(id.as_str(), &part.files);
        let created = async {
            shared?;
            pod.make_room(wanted).await;
            let streams = wanted.paths.open(&self.namespace, id.as_str())?;
            let place = Place {
                sandbox: &pod.sandbox,
                share: &pod.share,
                volumes: &pod.volumes,
                bounds: pod.bounds,
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

/// Takes the lock on a bundle that tells others whether its server lives.
fn locked(bundle: &Path) -> Result<File, TaskError> {
    let failed = host("lock the bundle");
    let dir = File::open(bundle).map_err(&failed)?;
    flock(&dir, FlockOperation::NonBlockingLockExclusive).map_err(|errno| failed(errno.into()))?;
    Ok(dir)
}
