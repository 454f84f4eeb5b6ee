//! `kill -9` in the middle of what the kubelet asks for: whoever dies, at whatever moment, the kubelet can clean up and
//! begin anew.
//!
//! A first pod takes every step unharmed, which measures the steps. Then each step is hit at a moment of its own
//! duration, always in a new pod of the same name: that pods still work is shown by the pods that come after. Who is
//! killed is looked up at the moment; where the victim is not there yet or any more, nobody is killed.
//! `CAISSON_TEST_KILL_MOMENTS` asks for more moments per step.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use caisson_tests::Case;
use caisson_tests::call::wait_for_exit;
use caisson_tests::case::{processes_named, runtime};
use caisson_tests::host::{Process, Snapshot};
use k8s_cri::v1::{
    LinuxContainerResources, ListContainersRequest, ListPodSandboxRequest, PodSandboxConfig,
    RemoveContainerRequest, RemovePodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use rustix::process::{Pid, Signal, kill_process};
use tonic::Status;

use crate::daemon::shims;
use crate::kubelet::{self, Kubelet, begin_pods_within};

/// How long a case may take for each pod that it makes.
const POD: Duration = Duration::from_secs(180);

/// How often the kubelet asks again before this test gives up; it itself never does.
const TRIES: u32 = 8;

/// How long it waits in between.
const PAUSE: Duration = Duration::from_secs(1);

/// How long the last process of a pod may outlive the pod.
const LAST: Duration = Duration::from_secs(20);

/// What the container runs: it ends when it is asked to.
const SCRIPT: &str = "trap 'exit 0' TERM; sleep 1000 & wait";

/// What the kubelet asks for in the life of a pod.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    ExecSync,
    UpdateContainerResources,
    StopContainer,
    StopPodSandbox,
    RemovePodSandbox,
}

impl Step {
    const ALL: [Self; 8] = [
        Self::RunPodSandbox,
        Self::CreateContainer,
        Self::StartContainer,
        Self::ExecSync,
        Self::UpdateContainerResources,
        Self::StopContainer,
        Self::StopPodSandbox,
        Self::RemovePodSandbox,
    ];

    /// The steps without which this one has nothing to work on. To stop or to remove a pod that runs is more work, and
    /// more to be killed in, than to do so with one whose containers have been stopped.
    fn needs(self) -> &'static [Self] {
        let makers = &Self::ALL[..3];
        &makers[..makers.len().min(self as usize)]
    }

    /// The eighth of a step's share of time at which it is hit: spread over the steps, so that few moments are of many kinds.
    fn eighth(self) -> u32 {
        (3 * self as u32 + 5) % 8
    }
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    /// The shim: the server, and the call that starts or deletes it.
    Shim,
    /// The virtual machine.
    Vmm,
    /// containerd, which is started again.
    Containerd,
}

impl Victim {
    fn find(self) -> Vec<Process> {
        match self {
            Self::Shim => shims(),
            Self::Vmm => processes_named("caisson-vmm"),
            Self::Containerd => processes_named("containerd"),
        }
    }

    /// Kills who is there now; true if there was one.
    fn kill(self) -> bool {
        let found = self.find();
        let pids = found
            .iter()
            .filter_map(|process| Pid::from_raw(process.pid));
        let pids: Vec<Pid> = pids
            .filter(|pid| kill_process(*pid, Signal::KILL).is_ok())
            .collect();
        for pid in &pids {
            wait_for_exit(*pid, LAST);
        }
        !pids.is_empty()
    }
}

/// A pod with one container, as far as they exist.
struct Life<'k> {
    node: &'k Kubelet<'k>,
    config: PodSandboxConfig,
    pod: String,
    container: String,
}

impl<'k> Life<'k> {
    fn new(node: &'k Kubelet<'k>) -> Self {
        Self {
            node,
            config: node.pod_config("one"),
            pod: String::new(),
            container: String::new(),
        }
    }

    fn take(&mut self, step: Step) -> Result<(), Status> {
        let cri = &self.node.cri;
        let container_id = self.container.clone();
        let pod_sandbox_id = self.pod.clone();
        match step {
            Step::RunPodSandbox => self.pod = kubelet::run(cri, self.config.clone())?,
            Step::CreateContainer => {
                let pod = self.node.again(pod_sandbox_id, self.config.clone());
                let container = pod.container("main", SCRIPT);
                self.container = kubelet::create_in(cri, &pod.id, &self.config, container)?;
            }
            Step::StartContainer => {
                let request = StartContainerRequest { container_id };
                cri.answer(cri.runtime().start_container(request))?;
            }
            Step::ExecSync => {
                let answer = self.node.exec_sync(&container_id, "echo there", 100)?;
                assert_eq!((answer.exit_code, &*answer.stdout), (0, &b"there\n"[..]));
            }
            Step::UpdateContainerResources => {
                let linux = LinuxContainerResources {
                    memory_limit_in_bytes: 96 << 20,
                    cpu_period: 100_000,
                    cpu_quota: 80_000,
                    ..Default::default()
                };
                let request = UpdateContainerResourcesRequest {
                    container_id,
                    linux: Some(linux),
                    ..Default::default()
                };
                cri.answer(cri.runtime().update_container_resources(request))?;
            }
            Step::StopContainer => {
                let request = StopContainerRequest {
                    container_id,
                    timeout: 30,
                };
                cri.answer(cri.runtime().stop_container(request))?;
            }
            Step::StopPodSandbox => {
                let request = StopPodSandboxRequest { pod_sandbox_id };
                cri.answer(cri.runtime().stop_pod_sandbox(request))?;
            }
            Step::RemovePodSandbox => {
                let request = RemovePodSandboxRequest { pod_sandbox_id };
                cri.answer(cri.runtime().remove_pod_sandbox(request))?;
            }
        }
        Ok(())
    }
}

/// Every step once, unharmed: how long each takes.
fn measure(node: &Kubelet<'_>) -> Vec<(Step, Duration)> {
    let mut life = Life::new(node);
    let timed = |step| {
        let began = Instant::now();
        let taken = life.take(step);
        taken.unwrap_or_else(|error| panic!("{step:?} without a kill: {error}"));
        (step, began.elapsed())
    };
    Step::ALL.into_iter().map(timed).collect()
}

/// Takes a step in a new pod and kills the victim at a moment of it: whether it was there, and what went wrong.
fn hit(node: &Kubelet<'_>, victim: Victim, step: Step, moment: Duration) -> (bool, Vec<String>) {
    let mut life = Life::new(node);
    for before in step.needs() {
        if let Err(error) = life.take(*before) {
            return (false, vec![format!("{before:?} of the new pod: {error}")]);
        }
    }
    let (killed, answer) = thread::scope(|scope| {
        let killer = scope.spawn(move || {
            thread::sleep(moment);
            victim.kill()
        });
        let answer = life.take(step);
        (killer.join().expect("the killer"), answer)
    });
    let wrong = match answer {
        Err(error) if !killed || error.code() == tonic::Code::Cancelled => Some(error.to_string()),
        _ => None,
    };
    (killed, wrong.into_iter().collect())
}

/// What the kubelet does with pods that it does not want: containers first, all of it again until all of it works.
fn clean_up(node: &Kubelet<'_>) -> Result<(), Status> {
    let mut tries = 1;
    loop {
        match clean_up_once(node) {
            Err(error) if tries < TRIES => eprintln!("try {tries}: {error}"),
            done => return done,
        }
        tries += 1;
        thread::sleep(PAUSE);
    }
}

fn clean_up_once(node: &Kubelet<'_>) -> Result<(), Status> {
    let cri = &node.cri;
    let request = ListContainersRequest::default();
    let containers = cri.answer(cri.runtime().list_containers(request))?;
    let containers: Vec<_> = containers.containers.into_iter().map(|it| it.id).collect();
    let request = ListPodSandboxRequest::default();
    let pods = cri.answer(cri.runtime().list_pod_sandbox(request))?;
    let pods: Vec<_> = pods.items.into_iter().map(|it| it.id).collect();
    for container_id in containers.clone() {
        let request = StopContainerRequest {
            container_id,
            timeout: 1,
        };
        cri.answer(cri.runtime().stop_container(request))?;
    }
    for pod_sandbox_id in pods.clone() {
        let request = StopPodSandboxRequest { pod_sandbox_id };
        cri.answer(cri.runtime().stop_pod_sandbox(request))?;
    }
    for container_id in containers {
        let request = RemoveContainerRequest { container_id };
        cri.answer(cri.runtime().remove_container(request))?;
    }
    for pod_sandbox_id in pods {
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        cri.answer(cri.runtime().remove_pod_sandbox(request))?;
    }
    Ok(())
}

/// What differs on the host from before, but for containerd itself and what is `known`; what ends after its pod has some
/// time.
fn leftovers(case: &Case, before: &Snapshot, known: &[String]) -> Vec<String> {
    let end = Instant::now() + LAST;
    loop {
        let mut left = Snapshot::take().changes_since(before);
        left.extend(run_files(case));
        left.retain(|line| !is_containerd(line) && !known.contains(line));
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Removes what runc and its shim leave themselves, so that it is not blamed on what comes after. A shim that is killed
/// leaves its socket, and the cgroup of a pod that it was about to make. A containerd that dies while its shim has runc
/// make a container takes that runc with it: cgroup and state are nobody's until a containerd is started once more. What
/// caisson's shim has been asked for it does to the end, and its `delete` knows all of it.
fn forgive_runc(victim: Victim, step: Step, left: &mut Vec<String>) {
    let makes = matches!(step, Step::RunPodSandbox | Step::StartContainer);
    let forgiven: &[&str] = match victim {
        _ if runtime() != "runc" => return,
        Victim::Shim if makes => &["file /run/containerd/s/", "cgroup /sys/fs/cgroup/pods/one/"],
        Victim::Shim => &["file /run/containerd/s/"],
        Victim::Containerd if makes => &[
            "cgroup /sys/fs/cgroup/pods/one/",
            "file /run/containerd/runc/k8s.io/",
            "/io.containerd.runtime.v2.task/k8s.io/",
        ],
        Victim::Containerd | Victim::Vmm => return,
    };
    left.retain(|line| {
        let is_forgiven = |part: &&str| line.contains(*part);
        if !line.starts_with("+ ") || !forgiven.iter().any(is_forgiven) {
            return true;
        }
        let path = line.split(' ').next_back().unwrap_or_default();
        // The files of a cgroup are not entries to remove; what a directory took with it is gone already.
        let _ = fs::remove_dir(path);
        let _ = fs::remove_dir_all(path);
        let _ = fs::remove_file(path);
        false
    });
}

fn is_containerd(line: &str) -> bool {
    let process = line.get(2..).and_then(|line| line.strip_prefix("process "));
    let command = process.and_then(|process| process.split_once(' '));
    command.is_some_and(|(_, command)| command.starts_with("containerd --config "))
}

/// What containerd and the network's plugins keep of pods below the case's own directory.
fn run_files(case: &Case) -> Vec<String> {
    let entries = |dir: &str| {
        let found = fs::read_dir(case.dir().join(dir)).into_iter().flatten();
        found.flatten().map(|entry| entry.path())
    };
    let log = fs::read_to_string(case.dir().join("containerd.log")).unwrap_or_default();
    let bundles = entries("state/io.containerd.runtime.v2.task/k8s.io");
    let mut found: Vec<_> = bundles
        .filter(|path| !was_cut_short(&log, path))
        .chain(entries("state/io.containerd.grpc.v1.cri/containers"))
        .chain(entries("state/io.containerd.grpc.v1.cri/sandboxes"))
        .collect();
    let is_address = |name: &str| name.parse::<std::net::Ipv4Addr>().is_ok();
    found.extend(entries("leases/test").filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(is_address)
    }));
    let lines = found.into_iter();
    lines.map(|path| format!("+ {}", path.display())).collect()
}

/// containerd 1.6 gives the call that cleans up after a shim five seconds, and then up until it is started once more. The
/// lab needs longer where the host is busy.
fn was_cut_short(log: &str, bundle: &Path) -> bool {
    let id = bundle.file_name().and_then(|name| name.to_str());
    let is_its = |line: &str| {
        let words = [
            "failed to clean up after shim disconnected",
            "signal: killed",
        ];
        words.iter().all(|words| line.contains(words)) && id.is_some_and(|id| line.contains(id))
    };
    log.lines().any(is_its)
}

/// Moments per step.
fn moments() -> u32 {
    let asked = std::env::var("CAISSON_TEST_KILL_MOMENTS").ok();
    asked.map_or(1, |number| {
        number.parse().expect("CAISSON_TEST_KILL_MOMENTS")
    })
}

fn kill_at_every_step(victim: Victim) {
    let moments = moments();
    let case = begin_pods_within(POD * (moments * 8 + 4));
    let mut node = Kubelet::start(&case);
    let steps = measure(&node);
    println!("unharmed: {steps:?}");
    // A shim has answered before it ends.
    for shim in shims() {
        Pid::from_raw(shim.pid).map(|pid| wait_for_exit(pid, LAST));
    }
    let before = Snapshot::take();
    // Each fault is told once.
    let mut known: Vec<String> = Vec::new();
    let (mut hits, mut wrong) = (0, Vec::new());
    for (step, duration) in steps {
        for moment in 0..moments {
            let began = Instant::now();
            let at = duration * (8 * moment + step.eighth()) / (8 * moments);
            let context = format!("{victim:?} killed {at:?} into {step:?}, {duration:?} long");
            let (killed, mut faults) = hit(&node, victim, step, at);
            hits += u32::from(killed);
            if killed && victim == Victim::Containerd {
                node.restart_containerd();
            }
            if let Err(error) = clean_up(&node) {
                faults.push(format!("after {TRIES} tries: {error}"));
            }
            let mut left = leftovers(&case, &before, &known);
            known.extend(left.clone());
            forgive_runc(victim, step, &mut left);
            faults.extend(left);
            println!("{context}: hit: {killed}, in all {:?}", began.elapsed());
            if !faults.is_empty() {
                println!("{}", faults.join("\n"));
                wrong.push(format!("{context}:\n{}", faults.join("\n")));
            }
        }
    }
    measure(&node);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(hits >= moments * 4, "only {hits} times was one there");
}

#[test]
fn the_shim_is_killed() {
    kill_at_every_step(Victim::Shim);
}

#[test]
fn the_machine_is_killed() {
    if runtime() == "runc" {
        println!("skipped on runc: it has no machine");
        return;
    }
    kill_at_every_step(Victim::Vmm);
}

#[test]
fn containerd_is_killed() {
    kill_at_every_step(Victim::Containerd);
}
