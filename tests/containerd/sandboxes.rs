//! containerd's Sandbox API, which containerd 1.7 and later call where a runtime's `sandboxer` is `shim`: played by a
//! driver, because Debian's containerd does not know it. A pod then has no pause container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use caisson_tests::Case;
use caisson_tests::case::processes_named;
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ShutdownRequest,
    StartRequest, StartResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::ttrpc;
use k8s_cri::v1;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::bootstrap::{options, skipped};
use crate::driver::{Driver, Form, begin, program};
use crate::kubelet::until;

/// How long a container may take to do something.
const LIMIT: Duration = Duration::from_secs(60);

/// The sandbox's name.
const POD: &str = "pod";

type Answer<T> = Result<T, ttrpc::Error>;

/// A network namespace on the host, as the CNI's plugins leave it.
struct Network(PathBuf);

impl Network {
    fn make(case: &Case) -> Self {
        let file = case.dir().join("net");
        fs::write(&file, "").expect("a file to mount it on");
        let kept = format!("--net={}", file.display());
        let made = Command::new("unshare").args([&kept, "true"]).status();
        assert!(made.expect("unshare").success());
        Self(file)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A bundle as containerd makes it for a sandbox: without a specification.
fn bundle(case: &Case) -> PathBuf {
    let dir = case.dir().join("sandbox");
    fs::create_dir_all(dir.join("rootfs")).expect("bundle");
    dir
}

/// The kubelet's description of a pod whose containers share a PID namespace.
fn description() -> Any {
    let config = v1::PodSandboxConfig {
        hostname: "the-pod".to_owned(),
        dns_config: Some(v1::DnsConfig {
            servers: vec!["10.9.8.7".to_owned()],
            ..Default::default()
        }),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: "/pods".to_owned(),
            sysctls: [("kernel.msgmax".to_owned(), "12345".to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Any {
        type_url: "runtime.v1.PodSandboxConfig".to_owned(),
        value: prost::Message::encode_to_vec(&config),
        ..Default::default()
    }
}

fn create_sandbox(driver: &Driver<'_>, dir: &Path, network: &Network) -> Answer<()> {
    let order = CreateSandboxRequest {
        sandbox_id: POD.to_owned(),
        bundle_path: dir.to_string_lossy().into_owned(),
        options: Some(description()).into(),
        netns_path: network.0.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let created = driver.sandbox::<CreateSandboxResponse>("CreateSandbox", &order);
    created.map(drop)
}

/// A shim whose sandbox is created, not started.
fn with_sandbox<'a>(
    case: &'a Case,
    dir: &'a Path,
    network: &Network,
    form: Form,
    options: Option<&Any>,
) -> Driver<'a> {
    let mut driver = Driver::new(case, dir, POD, form);
    driver.start(options);
    create_sandbox(&driver, dir, network).expect("created");
    driver
}

fn start_sandbox(driver: &Driver<'_>) -> Answer<StartSandboxResponse> {
    let wanted = StartSandboxRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    driver.sandbox("StartSandbox", &wanted)
}

fn ping(driver: &Driver<'_>) -> Answer<PingResponse> {
    let wanted = PingRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    driver.sandbox("PingSandbox", &wanted)
}

fn status(driver: &Driver<'_>) -> SandboxStatusResponse {
    let wanted = SandboxStatusRequest {
        sandbox_id: POD.to_owned(),
        verbose: true,
        ..Default::default()
    };
    driver.sandbox("SandboxStatus", &wanted).expect("a status")
}

fn wait(driver: &Driver<'_>) -> WaitSandboxResponse {
    let wanted = WaitSandboxRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    driver.sandbox("WaitSandbox", &wanted).expect("its end")
}

fn stop(driver: &Driver<'_>) {
    let wanted = StopSandboxRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    let stopped = driver.sandbox::<StopSandboxResponse>("StopSandbox", &wanted);
    stopped.expect("a stop");
}

fn shut_down(driver: &Driver<'_>) {
    let wanted = ShutdownSandboxRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    let ended = driver.sandbox::<ShutdownSandboxResponse>("ShutdownSandbox", &wanted);
    ended.expect("an end");
}

/// A container of the pod, created and started; its output goes to the case's file of its name.
fn container(case: &Case, driver: &Driver<'_>, id: &str, annotated: bool, script: &str) {
    let bundle = case.bundle_in(id).script(script).edit(|spec| {
        let joined = ["pid", "ipc", "uts", "network"]
            .map(|kind| json!({"type": kind, "path": format!("/proc/1/ns/{kind}")}));
        let mut namespaces = vec![json!({"type": "mount"})];
        namespaces.extend(joined);
        spec["linux"]["namespaces"] = json!(namespaces);
        spec.as_object_mut().expect("object").remove("hostname");
        if annotated {
            spec["annotations"] = json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": POD,
            });
        }
    });
    let request = CreateTaskRequest {
        id: id.to_owned(),
        bundle: bundle.dir().to_string_lossy().into_owned(),
        stdout: format!("file://{}", said(case, id).display()),
        ..Default::default()
    };
    let _: CreateTaskResponse = driver.task("Create", &request);
    let wanted = StartRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let _: StartResponse = driver.task("Start", &wanted);
}

fn said(case: &Case, id: &str) -> PathBuf {
    case.dir().join(format!("{id}.out"))
}

fn exit_of(driver: &Driver<'_>, id: &str) -> u32 {
    let wanted = WaitRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    driver.task::<WaitResponse>("Wait", &wanted).exit_status
}

fn delete(driver: &Driver<'_>, id: &str) {
    let wanted = DeleteRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let _: DeleteResponse = driver.task("Delete", &wanted);
}

fn metrics(driver: &Driver<'_>) -> Metrics {
    let wanted = SandboxMetricsRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    let answer = driver.sandbox::<SandboxMetricsResponse>("SandboxMetrics", &wanted);
    let metric = answer.expect("metrics").metrics.unwrap_or_default();
    assert_eq!(metric.id, POD);
    Metrics::parse_from_bytes(&metric.data.value).expect("cgroup v2's message")
}

fn platform(driver: &Driver<'_>) -> (String, String) {
    let wanted = PlatformRequest {
        sandbox_id: POD.to_owned(),
        ..Default::default()
    };
    let answer = driver.sandbox::<PlatformResponse>("Platform", &wanted);
    let platform = answer.expect("a platform").platform.unwrap_or_default();
    (platform.os, platform.architecture)
}

fn kill(name: &str) {
    let all = processes_named(name);
    assert_eq!(all.len(), 1, "{all:?}");
    for process in all {
        let pid = Pid::from_raw(process.pid).expect("pid");
        kill_process(pid, Signal::KILL).expect("kill");
    }
}

/// What shows in which namespaces a container is, and what it shares.
const LOOK: &str = "hostname; cat /proc/sys/kernel/msgmax; grep nameserver /etc/resolv.conf; \
    for kind in ipc uts pid net; do readlink /proc/self/ns/$kind; done";

#[test]
fn a_sandbox_holds_its_containers_together_until_it_is_stopped() {
    if skipped() {
        return;
    }
    let case = begin();
    let network = Network::make(&case);
    let dir = bundle(&case);
    let driver = with_sandbox(&case, &dir, &network, Form::Json, Some(&options(false)));
    assert_eq!(platform(&driver), ("linux".to_owned(), "amd64".to_owned()));
    assert_eq!(status(&driver).state, "SANDBOX_NOTREADY");
    assert!(ping(&driver).is_err(), "it is not started yet");
    let started = start_sandbox(&driver).expect("started");
    assert!(started.pid > 0 && started.created_at.seconds > 0);
    assert!(start_sandbox(&driver).is_err(), "it runs already");
    assert_eq!(status(&driver).state, "SANDBOX_READY");
    ping(&driver).expect("alive");

    let stays = format!("{LOOK}; echo shared > /dev/shm/word; exec sleep 1000");
    container(&case, &driver, "one", true, &stays);
    // What loses its parent here is the sandbox's to reap.
    let goes = format!(
        "until [ -e /dev/shm/word ]; do usleep 1000; done; {LOOK}; cat /dev/shm/word; \
         sh -c 'usleep 10000 & echo'; usleep 300000; \
         cat /proc/[0-9]*/status | grep -c 'State:.Z'; exit 3"
    );
    container(&case, &driver, "two", false, &goes);
    assert_eq!(exit_of(&driver, "two"), 3);
    delete(&driver, "two");
    let read = |id| fs::read_to_string(said(&case, id)).expect("output");
    let (one, two) = (read("one"), read("two"));
    assert!(
        one.starts_with("the-pod\n12345\nnameserver 10.9.8.7\nipc:["),
        "{one}"
    );
    assert_eq!(two, format!("{one}shared\n\n0\n"));

    let wanted = ShutdownRequest {
        id: "two".to_owned(),
        ..Default::default()
    };
    let _: Empty = driver.task("Shutdown", &wanted);
    ping(&driver).expect("a container's end is not the pod's");
    assert!(metrics(&driver).memory.usage > 0);
    assert_eq!(processes_named("caisson-vmm").len(), 1);
    stop(&driver);
    assert_eq!(processes_named("caisson-vmm").len(), 0);
    assert_eq!(wait(&driver).exit_status, 0);
    let after = status(&driver);
    assert_eq!(after.state, "SANDBOX_NOTREADY");
    assert!(after.exited_at.seconds >= after.created_at.seconds);
    assert_eq!(exit_of(&driver, "one"), 137);
    delete(&driver, "one");
    stop(&driver);
    shut_down(&driver);
    let topics: Vec<_> = (0..8).map(|_| driver.topic()).collect();
    let (create, start) = ("/tasks/create", "/tasks/start");
    let (exit, gone) = ("/tasks/exit", "/tasks/delete");
    assert_eq!(
        topics,
        [create, start, create, start, exit, gone, exit, gone]
    );
    drop(driver);
    fs::remove_dir(dir.join("rootfs")).expect("nothing is left in the root file system");
}

#[test]
fn a_sandbox_whose_virtual_machine_is_killed_has_ended_with_137() {
    if skipped() {
        return;
    }
    let case = begin();
    let network = Network::make(&case);
    let dir = bundle(&case);
    let driver = with_sandbox(&case, &dir, &network, Form::Message, None);
    let again = create_sandbox(&driver, &dir, &network);
    assert!(again.is_err(), "a shim has one sandbox");
    start_sandbox(&driver).expect("started");
    container(&case, &driver, "one", true, "exec sleep 1000");
    kill("caisson-vmm");
    assert_eq!(wait(&driver).exit_status, 137);
    assert_eq!(exit_of(&driver, "one"), 137);
    assert_eq!(status(&driver).state, "SANDBOX_NOTREADY");
    assert!(ping(&driver).is_err());
    stop(&driver);
    // The container is not deleted: the server ends all the same.
    shut_down(&driver);
}

#[test]
fn a_sandbox_whose_shim_is_killed_leaves_nothing_once_it_is_deleted() {
    if skipped() {
        return;
    }
    let case = begin();
    let network = Network::make(&case);
    let dir = bundle(&case);
    let driver = with_sandbox(&case, &dir, &network, Form::Json, None);
    start_sandbox(&driver).expect("started");
    // Files that the sandbox gives its containers take up so much of the host and no more, whatever they write.
    let fill = "for file in hosts resolv.conf hostname; do \
        dd if=/dev/zero of=/etc/$file bs=65536 count=128 2>/dev/null || echo full; done; \
        exec sleep 1000";
    container(&case, &driver, "one", true, fill);
    let full =
        || fs::read_to_string(said(&case, "one")).is_ok_and(|said| said == "full\nfull\nfull\n");
    until(LIMIT, "the files are full", || full().then_some(()));
    kill(program());
    let outcome = driver.call_delete();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let told = DeleteResponse::parse_from_bytes(&outcome.stdout).expect("a message");
    assert_eq!(told.exit_status, 137);
    assert_eq!(processes_named("caisson-vmm").len(), 0);
}
