//! Pods under the CRI: their containers' lives, from `RunPodSandbox` to `RemovePodSandbox`.

use std::fs;
use std::time::Duration;

use caisson_tests::case::{processes_named, runtime};
use k8s_cri::v1::{
    ContainerState, ContainerStatsRequest, LinuxContainerResources, ListPodSandboxStatsRequest,
    NamespaceMode, ReopenContainerLogRequest, UpdateContainerResourcesRequest,
};

use crate::kubelet::{Kubelet, begin_pods, until, volume};

/// How long a container may take to say something.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn a_pod_runs_an_init_container_and_three_more() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("web");
    let shared = case.dir().join("shared");
    fs::create_dir(&shared).expect("emptyDir");
    let mut init = pod.container("init", "echo prepared > /shared/x; echo done");
    init.mounts = vec![volume(&shared, "/shared", false)];
    let init = pod.run(init);
    let ended = node.wait(&init);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"));
    assert_eq!(pod.log("init"), ["stdout F done"]);
    let ids = ["a", "b", "c"].map(|name| {
        let server = match name {
            "a" => "httpd -p 127.0.0.1:8080 -h /shared;",
            _ => "",
        };
        let script = format!("{server} echo {name} is up; exec sleep 1000");
        let mut config = pod.container(name, &script);
        config.mounts = vec![volume(&shared, "/shared", false)];
        pod.run(config)
    });
    for id in &ids {
        assert_eq!(node.said(id, "cat /shared/x"), "prepared");
        assert_eq!(node.said(id, "hostname"), "web");
        assert_eq!(node.status(id).state(), ContainerState::ContainerRunning);
        assert!(
            node.said(id, "cat /etc/resolv.conf")
                .contains("nameserver 10.9.8.7")
        );
    }
    let [a, b, c] = &ids;
    // One network: the loopback interface and the address are every container's.
    let fetch = "until wget -q -O - http://127.0.0.1:8080/x; do sleep 0.1; done";
    assert_eq!(node.said(b, fetch), "prepared");
    let address = pod.address();
    for id in &ids {
        assert!(node.said(id, "ip addr").contains(&address), "{address}");
    }
    for kind in ["ipc", "uts", "net"] {
        let link = format!("readlink /proc/self/ns/{kind}");
        assert_eq!(node.said(a, &link), node.said(c, &link), "{kind}");
    }
    assert_ne!(
        node.said(a, "readlink /proc/self/ns/pid"),
        node.said(c, "readlink /proc/self/ns/pid")
    );
    if runtime() == "caisson" {
        assert_eq!(processes_named("caisson-vmm").len(), 1);
    }
    pod.end();
}

#[test]
fn exec_sync_answers_and_keeps_its_time_limit() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script("main", "exec sleep 1000");
    let answer = node.exec_sync(&id, "echo out; echo err >&2; exit 3", 60);
    let answer = answer.expect("ExecSync");
    assert_eq!(answer.exit_code, 3);
    assert_eq!(
        (&answer.stdout[..], &answer.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    let late = node
        .exec_sync(&id, "exec sleep 777", 2)
        .expect_err("a limit");
    assert!(late.message().contains("timeout"), "{late}");
    assert!(!node.said(&id, "ps").contains("sleep 777"));
    let missing = node.exec_sync(&id, "exec /no/such", 60).expect("ExecSync");
    assert_eq!(missing.exit_code, 127);
    pod.end();
}

#[test]
fn logs_go_on_in_a_new_file_after_rotation() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script(
        "main",
        "trap 'echo second >&2' USR1; echo first; while :; do sleep 0.1; done",
    );
    until(SOON, "the first line", || {
        (!pod.log("main").is_empty()).then_some(())
    });
    let old = pod.log_file("main").with_extension("1");
    fs::rename(pod.log_file("main"), &old).expect("rename");
    let reopen = ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    node.cri
        .answer(node.cri.runtime().reopen_container_log(reopen))
        .expect("ReopenContainerLog");
    node.said(&id, "kill -USR1 1");
    until(SOON, "the second line", || {
        (!pod.log("main").is_empty()).then_some(())
    });
    assert_eq!(pod.log("main"), ["stderr F second"]);
    assert!(
        fs::read_to_string(old)
            .expect("old log")
            .ends_with("stdout F first\n")
    );
    pod.end();
}

#[test]
fn stats_count_a_containers_work() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script("main", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; head -c 9000000 /dev/zero > /dev/shm/x; echo done; exec sleep 1000");
    until(SOON, "its work is done", || {
        (!pod.log("main").is_empty()).then_some(())
    });
    let request = ContainerStatsRequest {
        container_id: id.clone(),
    };
    let stats = node.cri.answer(node.cri.runtime().container_stats(request));
    let stats = stats.expect("ContainerStats").stats.expect("stats");
    let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds);
    assert!(
        cpu.as_ref().is_some_and(|cpu| cpu.value > 1_000_000),
        "{cpu:?}"
    );
    let memory = stats.memory.and_then(|memory| memory.working_set_bytes);
    assert!(
        memory
            .as_ref()
            .is_some_and(|memory| memory.value > 8_000_000),
        "{memory:?}"
    );
    let request = ListPodSandboxStatsRequest::default();
    let pods = node
        .cri
        .answer(node.cri.runtime().list_pod_sandbox_stats(request));
    let pods = pods.expect("ListPodSandboxStats").stats;
    let linux = pods
        .into_iter()
        .next()
        .and_then(|pod| pod.linux)
        .expect("stats of Linux");
    assert_eq!(linux.containers.len(), 1);
    let memory = linux.memory.and_then(|memory| memory.usage_bytes);
    assert!(
        memory
            .as_ref()
            .is_some_and(|memory| memory.value > 8_000_000),
        "{memory:?}"
    );
    let network = linux.network.and_then(|network| network.default_interface);
    assert_eq!(network.expect("an interface").name, "eth0");
    pod.end();
}

#[test]
fn limits_change_while_a_container_runs() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let mut config = pod.container("main", "exec sleep 1000");
    let limits = |mib: i64, quota| LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        cpu_period: 100_000,
        cpu_quota: quota,
        ..Default::default()
    };
    config.linux.as_mut().expect("linux").resources = Some(limits(64, 50_000));
    let id = pod.run(config);
    let now = || node.said(&id, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max");
    assert_eq!(now(), format!("{}\n50000 100000", 64 << 20));
    let change = |linux| {
        let request = UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(linux),
            ..Default::default()
        };
        let changed = node
            .cri
            .answer(node.cri.runtime().update_container_resources(request));
        changed.expect("UpdateContainerResources");
    };
    change(limits(96, 80_000));
    assert_eq!(now(), format!("{}\n80000 100000", 96 << 20));
    // More than a pod's machine has at first.
    change(limits(400, 80_000));
    node.said(&id, "dd if=/dev/zero of=/dev/null bs=300M count=1");
    pod.end();
}

#[test]
fn a_container_without_memory_left_is_oom_killed() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let other = pod.script("other", "exec sleep 1000");
    let mut config = pod.container("main", "exec tail /dev/zero");
    config.linux.as_mut().expect("linux").resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let id = pod.run(config);
    let ended = node.wait(&id);
    assert_eq!(ended.exit_code, 137);
    // The event of the kill and that of the end come over two streams.
    until(SOON, "the reason is known", || {
        (node.status(&id).reason == "OOMKilled").then_some(())
    });
    assert_eq!(node.said(&other, "echo alive"), "alive");
    pod.end();
}

#[test]
fn a_container_that_ended_is_started_anew_in_its_pod() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    for attempt in 0..3 {
        let mut config = pod.container("main", &format!("echo attempt {attempt}; exit {attempt}"));
        config.metadata.as_mut().expect("metadata").attempt = attempt;
        let id = pod.run(config);
        let ended = node.wait(&id);
        assert_eq!(ended.exit_code, i32::try_from(attempt).expect("small"));
        assert_eq!(
            ended.reason,
            if attempt == 0 { "Completed" } else { "Error" }
        );
        node.remove(&id);
    }
    let id = pod.script("main", "exec sleep 1000");
    assert_eq!(node.said(&id, "echo there"), "there");
    pod.end();
}

#[test]
fn stop_gives_a_container_its_grace() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let kind = pod.script(
        "kind",
        "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done",
    );
    let deaf = pod.script("deaf", "trap '' TERM; echo up; while :; do sleep 0.1; done");
    for name in ["kind", "deaf"] {
        until(SOON, "the container is up", || {
            (!pod.log(name).is_empty()).then_some(())
        });
    }
    node.stop(&kind, 60);
    assert_eq!(node.status(&kind).exit_code, 4);
    assert_eq!(pod.log("kind"), ["stdout F up", "stdout F bye"]);
    node.stop(&deaf, 1);
    assert_eq!(node.status(&deaf).exit_code, 137);
    pod.end();
}

#[test]
fn a_missing_program_is_an_error_of_start() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let mut config = pod.container("main", "");
    config.command = vec!["/no/such".to_owned()];
    let error = pod.try_run(config).expect_err("no such program");
    assert!(
        error.message().contains("no such file or directory"),
        "{error}"
    );
    pod.end();
}

#[test]
fn a_pod_may_share_its_processes() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let mut config = node.pod_config("one");
    let linux = config
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut());
    let options = linux.and_then(|context| context.namespace_options.as_mut());
    options.expect("options").pid = NamespaceMode::Pod.into();
    let pod = node.run(config).expect("RunPodSandbox");
    let ids = ["a", "b"].map(|name| {
        let mut config = pod.container(
            name,
            &format!("exec sleep 100{name}0").replace(['a', 'b'], "1"),
        );
        let linux = config
            .linux
            .as_mut()
            .and_then(|linux| linux.security_context.as_mut());
        let options = linux.and_then(|context| context.namespace_options.as_mut());
        options.expect("options").pid = NamespaceMode::Pod.into();
        pod.run(config)
    });
    let [a, b] = ids
        .each_ref()
        .map(|id| node.said(id, "readlink /proc/self/ns/pid"));
    assert_eq!(a, b);
    assert!(node.said(&ids[0], "ps").contains("sleep 1000000"));
    pod.end();
}

#[test]
fn the_hosts_network_is_refused_with_the_reason() {
    if runtime() == "runc" {
        println!("skipped on runc: it has the host's network");
        return;
    }
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let mut config = node.pod_config("one");
    let linux = config
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut());
    let options = linux.and_then(|context| context.namespace_options.as_mut());
    options.expect("options").network = NamespaceMode::Node.into();
    let refused = node.run(config).err().expect("a refusal");
    assert!(refused.message().contains("host networking"), "{refused}");
}
