//! A pod that no container brings: its sandbox is created, started and stopped by containerd's Sandbox API.
//!
//! Contract: there is at most one in a server, and then every container is a member of it. Its virtual machine lives from
//! the start to the stop, however many containers come and go; a process in the guest that runs no program holds the
//! namespaces that they share. To containerd that process *is* the sandbox: the sandbox's end is its end, with the status
//! 0 after a stop and [`LOST`] if the virtual machine ended by itself.
//! A stop may come at any time and any number of times; what it finds running it kills, and no guest can hold it up.
//! The pod's own files are in a tmpfs as large as they need: what a container writes to them does not fill the host's.
//! Not here: how the API is spoken (`sandboxes.rs`), what its orders mean (`order.rs`).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use caisson_vmm_spec::Cause;
use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    sandbox_api::CreateSandboxRequest,
    types::mount::Mount,
};

use tokio::{sync::MutexGuard, time::timeout};

use super::{Tasks, create::Pod, wanted::Wanted};
use crate::{
    sandbox::{INIT, KILL, LOST, Sandbox, SandboxError},
    shim::{
        bootstrap::OPTIONS,
        error::{TaskError, host},
        options::Options,
        order::{self, Description},
        process::{Ended, Process},
        rootfs::Rootfs,
        stdio::Paths,
    },
    state::ContainerId,
    stats::Stats,
    trace::{Trace, Who},
};

/// How long containers that are killed may take to end, if a stop does not say.
const PATIENCE: Duration = Duration::from_secs(10);

/// The directory of the pod's own files in the bundle.
const FILES: &str = "files";

/// How much containers may make of them beyond what they say at first.
const FILES_GROW_BYTES: usize = 1 << 20;

/// A sandbox that has been ordered.
#[derive(Debug)]
pub(in crate::shim) struct Held {
    pub(in crate::shim) id: String,
    /// Its files and its specification, for as long as it is there.
    pub(super) wanted: Wanted,
    /// Stands for the sandbox: started and ended with it.
    pub(in crate::shim) init: Process,
    pub(in crate::shim) started: OnceLock<SystemTime>,
    /// Files of the pod's containers that the engine leaves to the sandbox: where, and from where on the host.
    pub(super) files: Vec<(&'static str, PathBuf)>,
    /// What these are in.
    _mounted: Option<Rootfs>,
}

impl Held {
    fn of(request: &CreateSandboxRequest) -> Result<Self, TaskError> {
        let id = ContainerId::parse(&request.sandbox_id)?;
        let bundle = Path::new(&request.bundle_path);
        let description = order::description(request.options.as_ref())?;
        let has_spec = bundle.join("config.json").exists();
        let (mut files, mut mounted) = (Vec::new(), None);
        // A specification that came with the order counts, unless the kubelet's own words did.
        if description.is_some() || !has_spec {
            let description = description.unwrap_or_default();
            let (id, network) = (id.as_str(), request.netns_path.as_str());
            let spec = description.specification(id, network, &request.annotations)?;
            let write = || fs::write(bundle.join("config.json"), spec.to_string());
            write().map_err(host("write the sandbox's specification"))?;
            let texts = texts(&description).map_err(host("read the host's files for the pod"))?;
            let dir = bundle.join(FILES);
            mounted = Some(Rootfs::mount(&[room_for(&texts)], &dir)?);
            files = furnish(&dir, texts).map_err(host("write the pod's files"))?;
        }
        let options = runtime_options(bundle).map_err(host("read the runtime's options"))?;
        let options = Options::of(options.as_ref())?;
        let rootfs = match request.rootfs.as_slice() {
            [] => vec![nothing()],
            mounts => mounts.to_vec(),
        };
        Ok(Self {
            wanted: Wanted::of_sandbox(id.clone(), bundle, &rootfs, &options)?,
            id: id.to_string(),
            init: Process::new(INIT, Paths::default(), Vec::new()),
            started: OnceLock::new(),
            files,
            _mounted: mounted,
        })
    }

    /// `config.json`, as it is carried out.
    pub(in crate::shim) fn spec(&self) -> &oci_spec::runtime::Spec {
        &self.wanted.bundle.spec
    }
}

/// An empty root file system: nothing runs in it.
fn nothing() -> Mount {
    Mount {
        type_: "tmpfs".to_owned(),
        source: "tmpfs".to_owned(),
        options: vec!["mode=755".to_owned(), "size=64k".to_owned()],
        ..Default::default()
    }
}

/// What containerd's own sandboxer writes for a pod: where it is in a container, and what it says.
fn texts(pod: &Description) -> io::Result<Vec<(&'static str, Vec<u8>)>> {
    let mut texts = Vec::new();
    if !pod.hostname.is_empty() {
        let text = format!("{}\n", pod.hostname);
        texts.push(("/etc/hostname", text.into_bytes()));
    }
    for (place, text) in [
        ("/etc/hosts", None),
        ("/etc/resolv.conf", pod.resolv_conf()),
    ] {
        match text.map_or_else(|| fs::read(place), |text| Ok(text.into_bytes())) {
            Ok(text) => texts.push((place, text)),
            // A host without the file has pods without it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(texts)
}

/// A file system for these, in which containers may write.
fn room_for(texts: &[(&str, Vec<u8>)]) -> Mount {
    let bytes = texts.iter().map(|(_, text)| text.len()).sum::<usize>() + FILES_GROW_BYTES;
    let size = format!("size={bytes}");
    let options = ["mode=755", "nosuid", "nodev", "noexec", &size];
    Mount {
        type_: "tmpfs".to_owned(),
        source: "tmpfs".to_owned(),
        options: options.map(str::to_owned).to_vec(),
        ..Default::default()
    }
}

fn furnish(
    dir: &Path,
    texts: Vec<(&'static str, Vec<u8>)>,
) -> io::Result<Vec<(&'static str, PathBuf)>> {
    let write = |(place, text): (&'static str, Vec<u8>)| {
        let path = dir.join(Path::new(place).file_name().unwrap_or_default());
        fs::write(&path, text)?;
        Ok((place, path))
    };
    texts.into_iter().map(write).collect()
}

/// What `start` was told of containerd's configuration: the API itself does not say.
fn runtime_options(bundle: &Path) -> io::Result<Option<Any>> {
    match fs::read(bundle.join(OPTIONS)) {
        Ok(bytes) => Ok(Some(Any::parse_from_bytes(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Tasks {
    /// The sandbox that the API holds here.
    pub(in crate::shim) fn sandbox(&self, id: &str) -> Result<Arc<Held>, TaskError> {
        let held = self.held.get().filter(|held| held.id == id);
        held.cloned()
            .ok_or_else(|| TaskError::NoSandbox(id.to_owned()))
    }

    /// Takes an order, and checks all of it that can be checked without a virtual machine.
    pub(in crate::shim) async fn create_sandbox(
        &self,
        request: CreateSandboxRequest,
    ) -> Result<(), TaskError> {
        let _only_one = self.changing.lock().await;
        if self.held.get().is_some() || self.pod().is_some() {
            return Err(TaskError::Exists(format!("sandbox {}", request.sandbox_id)));
        }
        let held = Arc::new(Held::of(&request)?);
        for warning in &held.wanted.bundle.warnings {
            self.log.warning(warning);
        }
        // Empty, as the lock says.
        let _ = self.held.set(held);
        Ok(())
    }

    /// Brings the virtual machine and the namespaces; answers since when they are there.
    pub(in crate::shim) async fn start_sandbox(
        self: &Arc<Self>,
        id: &str,
    ) -> Result<SystemTime, TaskError> {
        let _only_one = self.changing.lock().await;
        let held = self.sandbox(id)?;
        if held.init.ended().is_some() {
            return Err(TaskError::NotRunning(id.to_owned()));
        }
        if held.init.is_started() {
            return Err(TaskError::Running(format!("sandbox {id}")));
        }
        let mut trace = Trace::default();
        trace.mark(Who::Command, "begin");
        let (pod, _) = self.first(&held.wanted, &held.init, &mut trace).await?;
        trace.mark(Who::Machine, "set the pod's namespaces up");
        // A start that cannot be traced is a start.
        let _ = trace.append(&held.wanted.bundle.path);
        let pod = Arc::new(pod);
        *self.pod() = Some(Arc::clone(&pod));
        held.init.set_started();
        let since = *held.started.get_or_init(SystemTime::now);
        self.watch_sandbox(held, pod);
        Ok(since)
    }

    /// Tells of the virtual machine's end when nothing of it is left on the host.
    fn watch_sandbox(self: &Arc<Self>, held: Arc<Held>, pod: Arc<Pod>) {
        let tasks = Arc::clone(self);
        tokio::spawn(async move {
            let why = pod.sandbox.ended().await;
            let at = SystemTime::now();
            let status = match why.cause {
                Cause::PowerOff => 0,
                _ => {
                    tasks
                        .log
                        .error(&crate::error::message(&SandboxError::Ended(why)));
                    LOST
                }
            };
            tasks.clean_up(pod).await;
            tasks.run_last_hooks(&held.id, &held.wanted.hooks).await;
            held.init.end(Ended { status, at });
        });
    }

    /// Ends everything in the sandbox, then the virtual machine.
    pub(in crate::shim) async fn stop_sandbox(
        &self,
        id: &str,
        patience: Option<Duration>,
    ) -> Result<(), TaskError> {
        let patience = patience.unwrap_or(PATIENCE);
        let _only_one = self.alone(patience).await;
        let held = self.sandbox(id)?;
        if !held.init.is_started() {
            if held.init.ended().is_none() {
                let at = SystemTime::now();
                held.init.end(Ended { status: 0, at });
            }
            return Ok(());
        }
        let pod = self.pod().clone();
        if let Some(pod) = pod {
            self.kill_members(&pod, patience).await;
            pod.sandbox.stop().await;
        }
        held.init.wait().await;
        Ok(())
    }

    /// Waits until nobody else changes anything; whoever has not come to an end within `patience` waits for the guest,
    /// and loses it.
    async fn alone(&self, patience: Duration) -> MutexGuard<'_, ()> {
        if let Ok(only_one) = timeout(patience, self.changing.lock()).await {
            return only_one;
        }
        tokio::select! {
            only_one = self.changing.lock() => return only_one,
            // It may still have to boot, for which there is a deadline.
            sandbox = self.booted() => if let Some(sandbox) = sandbox {
                sandbox.stop().await;
            }
        }
        self.changing.lock().await
    }

    async fn booted(&self) -> Option<Sandbox> {
        let mut machine = self.machine.subscribe();
        // The sender is `self`'s.
        machine.wait_for(Option::is_some).await.ok()?.clone()
    }

    /// So that their last output is passed on and they end with a status of their own.
    async fn kill_members(&self, pod: &Pod, patience: Duration) {
        let mut living = self.all();
        living.retain(|container| container.init.ended().is_none());
        for container in &living {
            // One that has just ended, or whose machine has, needs none.
            let _ = pod.sandbox.signal(&container.id, INIT, KILL, true).await;
        }
        let ends = async {
            for container in &living {
                container.init.wait().await;
            }
        };
        // Those that do not end in time end with the machine.
        let _ = timeout(patience, ends).await;
    }

    /// Ends the server, and first the sandbox if there still is one.
    pub(in crate::shim) async fn shut_sandbox_down(&self, id: &str) -> Result<(), TaskError> {
        if self.held.get().is_none() {
            // Its creation failed.
            self.shut_down();
            return Ok(());
        }
        self.stop_sandbox(id, None).await?;
        self.over.notify_one();
        Ok(())
    }

    /// Whether the sandbox is there.
    pub(in crate::shim) fn ping_sandbox(&self, id: &str) -> Result<(), TaskError> {
        let held = self.sandbox(id)?;
        if held.init.is_started() && held.init.ended().is_none() {
            return Ok(());
        }
        Err(TaskError::NotRunning(id.to_owned()))
    }

    /// What the sandbox uses of the host, by its cgroup.
    pub(in crate::shim) fn sandbox_stats(&self, id: &str) -> Result<Stats, TaskError> {
        self.ping_sandbox(id)?;
        let (_, cgroup) = self
            .sandbox_on_host()
            .ok_or_else(|| TaskError::NotRunning(id.to_owned()))?;
        let cgroup = cgroup.ok_or(TaskError::Unsupported("to count without a cgroup"))?;
        Ok(cgroup.stats().map_err(SandboxError::from)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_files_have_room_for_what_they_say_and_a_little_more() {
        let mut pod = Description::default();
        pod.hostname = "pod".to_owned();
        let texts = texts(&pod).unwrap();
        assert_eq!(texts[0], ("/etc/hostname", b"pod\n".to_vec()));
        let large = vec![("/etc/hosts", vec![b'#'; 3 << 20])];
        let room = room_for(&large);
        assert_eq!(room.type_, "tmpfs");
        assert_eq!(room.options.last().unwrap(), "size=4194304");
        let dir = tempfile::tempdir().unwrap();
        let files = furnish(dir.path(), texts).unwrap();
        assert_eq!(files[0], ("/etc/hostname", dir.path().join("hostname")));
        assert_eq!(fs::read_to_string(&files[0].1).unwrap(), "pod\n");
    }
}
