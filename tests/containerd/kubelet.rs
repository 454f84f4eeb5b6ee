//! A node with containerd's CRI and a network, and pods on it made as the kubelet makes them.
//!
//! Dropping a [`Kubelet`] stops and removes its pods, so that only what the runtime leaves behind is left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use caisson_tests::Case;
use caisson_tests::case::runtime;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, DnsConfig, ExecSyncRequest, ExecSyncResponse, ImageSpec,
    ImageStatusRequest, KeyValue, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListPodSandboxRequest, Mount,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxStatusRequest,
    RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest,
};
use tonic::Status;

use crate::config;
use crate::cri::Cri;
use crate::daemon::{Daemon, IMAGE, PAUSE, begin, begin_within};

/// How long a call may take. The lab emulates its processor, and may be busy.
const CALL: Duration = Duration::from_secs(150);

/// How long a container may take to end.
const END: Duration = Duration::from_secs(120);

/// The slice in which systemd has all pods, where it makes their cgroups.
const PODS: &str = "kubepods.slice";

/// The pods' bridge on the host.
const BRIDGE: &str = "cni-test";

/// A node. Fields are dropped in order.
pub(crate) struct Kubelet<'c> {
    pub(crate) cri: Cri,
    daemon: Daemon<'c>,
    dir: PathBuf,
}

/// A running pod.
pub(crate) struct Pod<'k> {
    pub(crate) kubelet: &'k Kubelet<'k>,
    pub(crate) id: String,
    pub(crate) config: PodSandboxConfig,
}

/// A case in which the directories of CNI are there already.
pub(crate) fn begin_pods() -> Case {
    make_directories();
    begin()
}

/// The same for a case that does a lot.
pub(crate) fn begin_pods_within(limit: Duration) -> Case {
    make_directories();
    begin_within(limit)
}

fn make_directories() {
    for dir in [
        "/run/netns",
        "/var/run/netns",
        "/var/lib/cni/results",
        "/run/containerd/io.containerd.runtime.v2.task",
        "/run/containerd/runc/k8s.io",
    ] {
        fs::create_dir_all(dir).expect("directory");
    }
    if by_systemd() {
        // systemd keeps it after its first transient unit.
        fs::create_dir_all("/run/systemd/transient").expect("directory");
    }
}

/// Whether the kubelet's cgroup driver is systemd: its default. Else it is cgroupfs.
pub(crate) fn by_systemd() -> bool {
    std::env::var("CAISSON_TEST_CGROUPS").is_ok_and(|driver| driver == "systemd")
}

/// A pod's cgroup, as the kubelet names it to the CRI.
fn pod_group(name: &str) -> String {
    match by_systemd() {
        true => {
            let name = name.replace('-', "_");
            format!("/{PODS}/kubepods-besteffort.slice/kubepods-besteffort-pod{name}.slice")
        }
        false => format!("/pods/{name}"),
    }
}

fn systemctl(verb: &str, unit: &str) {
    let done = Command::new("systemctl").args([verb, unit]).status();
    assert!(done.expect("systemctl").success(), "{verb} {unit}");
}

impl<'c> Kubelet<'c> {
    /// Starts containerd with both runtimes as handlers and a bridge for pods.
    pub(crate) fn start(case: &'c Case) -> Self {
        let dir = case.dir().to_owned();
        fs::create_dir_all(dir.join("cni")).expect("directory");
        fs::write(dir.join("cni/10-test.conflist"), network(&dir)).expect("conflist");
        let cri = config::cri(&dir.join("cni"));
        let daemon = Daemon::configured(case, "k8s.io", "", &cri);
        let cri = Cri::connect(&daemon.socket(), CALL);
        let kubelet = Self { cri, daemon, dir };
        kubelet.wait_for_image(IMAGE);
        kubelet.wait_for_image(PAUSE);
        kubelet
    }

    /// The CRI hears of an import by containerd's events.
    fn wait_for_image(&self, name: &str) {
        let wanted = ImageStatusRequest {
            image: Some(image(name)),
            ..Default::default()
        };
        until(Duration::from_secs(30), "the CRI knows the image", || {
            let answer = self
                .cri
                .answer(self.cri.images().image_status(wanted.clone()));
            answer.expect("ImageStatus").image
        });
    }

    /// What the kubelet says of a pod.
    pub(crate) fn pod_config(&self, name: &str) -> PodSandboxConfig {
        let logs = self.dir.join("logs").join(name);
        fs::create_dir_all(&logs).expect("log directory");
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "tests".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.to_string_lossy().into_owned(),
            dns_config: Some(DnsConfig {
                servers: vec!["10.9.8.7".to_owned()],
                searches: vec!["tests.svc".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: pod_group(name),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs a pod with the runtime under test.
    pub(crate) fn run(&self, config: PodSandboxConfig) -> Result<Pod<'_>, Status> {
        Ok(Pod {
            kubelet: self,
            id: run(&self.cri, config.clone())?,
            config,
        })
    }

    /// `kill -9` of containerd, and a new one.
    pub(crate) fn restart_containerd(&mut self) {
        self.daemon.kill();
        self.daemon.restart();
        self.cri = Cri::connect(&self.daemon.socket(), CALL);
        // Its CRI answers later than containerd itself: first it looks for what runs.
        until(Duration::from_secs(60), "the CRI serves", || {
            let request = ListPodSandboxRequest::default();
            let pods = self.cri.runtime();
            let pods = async move { { pods }.list_pod_sandbox(request).await };
            self.cri.answer(pods).ok()
        });
    }

    /// A pod that runs already.
    pub(crate) fn again(&self, id: String, config: PodSandboxConfig) -> Pod<'_> {
        Pod {
            kubelet: self,
            id,
            config,
        }
    }

    /// Where containerd serves.
    pub(crate) fn socket(&self) -> PathBuf {
        self.daemon.socket()
    }

    /// Runs a pod with nothing special about it.
    pub(crate) fn pod(&self, name: &str) -> Pod<'_> {
        self.run(self.pod_config(name)).expect("RunPodSandbox")
    }

    /// What is true of a container.
    pub(crate) fn status(&self, container: &str) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let answer = self
            .cri
            .answer(self.cri.runtime().container_status(request));
        answer.expect("ContainerStatus").status.expect("a status")
    }

    /// Asks, as the kubelet does, until a container has ended.
    pub(crate) fn wait(&self, container: &str) -> ContainerStatus {
        until(END, "the container ends", || {
            let status = self.status(container);
            (status.state() == ContainerState::ContainerExited).then_some(status)
        })
    }

    /// Runs a program in a container and waits for it; `timeout` in seconds, 0: none.
    pub(crate) fn exec_sync(
        &self,
        container: &str,
        script: &str,
        timeout: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            timeout,
        };
        self.cri.answer(self.cri.runtime().exec_sync(request))
    }

    /// What a script says that succeeds.
    #[track_caller]
    pub(crate) fn said(&self, container: &str, script: &str) -> String {
        let answer = self.exec_sync(container, script, 120).expect("ExecSync");
        let stderr = String::from_utf8_lossy(&answer.stderr);
        assert_eq!(answer.exit_code, 0, "{script}: {stderr}");
        String::from_utf8_lossy(&answer.stdout).trim().to_owned()
    }

    /// Stops a container; `grace` in seconds.
    pub(crate) fn stop(&self, container: &str, grace: i64) {
        let request = StopContainerRequest {
            container_id: container.to_owned(),
            timeout: grace,
        };
        let answer = self.cri.answer(self.cri.runtime().stop_container(request));
        answer.expect("StopContainer");
    }

    /// Removes a container.
    pub(crate) fn remove(&self, container: &str) {
        let request = RemoveContainerRequest {
            container_id: container.to_owned(),
        };
        let answer = self
            .cri
            .answer(self.cri.runtime().remove_container(request));
        answer.expect("RemoveContainer");
    }
}

impl Drop for Kubelet<'_> {
    fn drop(&mut self) {
        let request = ListPodSandboxRequest::default();
        let pods = self
            .cri
            .answer(self.cri.runtime().list_pod_sandbox(request));
        for pod in pods.map(|pods| pods.items).unwrap_or_default() {
            if let Err(error) = end(&self.cri, &pod.id) {
                eprintln!("pod {}: {error}", pod.id);
            }
        }
        if by_systemd() {
            systemctl("stop", PODS);
        }
        for pod in fs::read_dir(group("/pods")).into_iter().flatten().flatten() {
            // Files of a cgroup are not entries to remove.
            let _ = fs::remove_dir(pod.path());
        }
        let _ = Command::new("ip").args(["link", "del", BRIDGE]).output();
    }
}

impl Pod<'_> {
    /// What the kubelet says of a container that runs a script.
    pub(crate) fn container(&self, name: &str, script: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(image(IMAGE)),
            command: vec!["/bin/sh".to_owned()],
            args: vec!["-c".to_owned(), script.to_owned()],
            envs: vec![KeyValue {
                key: "POD".to_owned(),
                value: self.config.hostname.clone(),
            }],
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Creates and starts a container; what starts it says why not.
    pub(crate) fn try_run(&self, config: ContainerConfig) -> Result<String, Status> {
        run_in(&self.kubelet.cri, &self.id, &self.config, config)
    }

    /// Creates and starts a container.
    #[track_caller]
    pub(crate) fn run(&self, config: ContainerConfig) -> String {
        self.try_run(config).expect("StartContainer")
    }

    /// Creates and starts a container that runs a script.
    #[track_caller]
    pub(crate) fn script(&self, name: &str, script: &str) -> String {
        self.run(self.container(name, script))
    }

    /// A container's log.
    pub(crate) fn log_file(&self, name: &str) -> PathBuf {
        Path::new(&self.config.log_directory).join(format!("{name}.log"))
    }

    /// The lines of a container's log: stream and text.
    pub(crate) fn log(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.log_file(name)).expect("log");
        text.lines().map(logged).collect()
    }

    /// Its address.
    pub(crate) fn address(&self) -> String {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let cri = &self.kubelet.cri;
        let answer = cri.answer(cri.runtime().pod_sandbox_status(request));
        let status = answer.expect("PodSandboxStatus").status.expect("a status");
        status.network.expect("a network").ip
    }

    /// The path of its network namespace on the host.
    pub(crate) fn network_namespace(&self) -> PathBuf {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
        };
        let cri = &self.kubelet.cri;
        let answer = cri.answer(cri.runtime().pod_sandbox_status(request));
        let info = answer.expect("PodSandboxStatus").info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
        let all = info["runtimeSpec"]["linux"]["namespaces"].as_array();
        let network = all.expect("namespaces").iter();
        let network = network.filter(|namespace| namespace["type"] == "network");
        let paths: Vec<_> = network.filter_map(|it| it["path"].as_str()).collect();
        paths.first().expect("a network namespace").into()
    }

    /// Stops and removes it.
    pub(crate) fn end(self) {
        let ended = end(&self.kubelet.cri, &self.id);
        ended.expect("StopPodSandbox, RemovePodSandbox");
    }
}

/// Runs a pod with the runtime under test and answers with its name.
pub(crate) fn run(cri: &Cri, config: PodSandboxConfig) -> Result<String, Status> {
    let parent = config.linux.as_ref().map(|linux| &linux.cgroup_parent);
    let parent = parent.expect("cgroup_parent");
    match by_systemd() {
        true => systemctl("start", parent.rsplit('/').next().unwrap_or_default()),
        false => fs::create_dir_all(group(parent)).expect("cgroup"),
    }
    let request = RunPodSandboxRequest {
        config: Some(config),
        runtime_handler: runtime(),
    };
    let ran = cri.answer(cri.runtime().run_pod_sandbox(request))?;
    Ok(ran.pod_sandbox_id)
}

/// Creates a container in a pod and answers with its name.
pub(crate) fn create_in(
    cri: &Cri,
    pod: &str,
    sandbox: &PodSandboxConfig,
    config: ContainerConfig,
) -> Result<String, Status> {
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(sandbox.clone()),
    };
    let created = cri.answer(cri.runtime().create_container(request))?;
    Ok(created.container_id)
}

/// Creates and starts a container in a pod and answers with its name.
pub(crate) fn run_in(
    cri: &Cri,
    pod: &str,
    sandbox: &PodSandboxConfig,
    config: ContainerConfig,
) -> Result<String, Status> {
    let container_id = create_in(cri, pod, sandbox, config)?;
    let request = StartContainerRequest {
        container_id: container_id.clone(),
    };
    cri.answer(cri.runtime().start_container(request))?;
    Ok(container_id)
}

/// Stops and removes a pod.
pub(crate) fn end(cri: &Cri, pod: &str) -> Result<(), Status> {
    let pod_sandbox_id = pod.to_owned();
    let request = StopPodSandboxRequest { pod_sandbox_id };
    cri.answer(cri.runtime().stop_pod_sandbox(request))?;
    let pod_sandbox_id = pod.to_owned();
    let request = RemovePodSandboxRequest { pod_sandbox_id };
    cri.answer(cri.runtime().remove_pod_sandbox(request))?;
    Ok(())
}

/// A line of a log without its time: `stdout F text`.
fn logged(line: &str) -> String {
    line.split_once(' ')
        .map_or(line, |(_, rest)| rest)
        .to_owned()
}

/// A volume.
pub(crate) fn volume(host: &Path, container: &str, readonly: bool) -> Mount {
    Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: container.to_owned(),
        readonly,
        ..Default::default()
    }
}

/// Asks every tenth of a second until there is an answer: the CRI has no other way.
#[track_caller]
pub(crate) fn until<T>(limit: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The namespaces of a pod and of its containers, as the kubelet asks for them.
pub(crate) fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    }
}

fn image(name: &str) -> ImageSpec {
    ImageSpec {
        image: name.to_owned(),
        ..Default::default()
    }
}

/// The directory of a cgroup.
pub(crate) fn group(path: &str) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'))
}

/// A bridge on which pods reach each other.
fn network(dir: &Path) -> String {
    serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "test",
        "plugins": [{
            "type": "bridge", "bridge": BRIDGE, "isGateway": true,
            "ipam": {
                "type": "host-local", "dataDir": dir.join("leases"),
                "ranges": [[{"subnet": "10.88.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    })
    .to_string()
}
