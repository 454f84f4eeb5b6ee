//! What a pod's security context and sysctls ask for, and what pods cannot do to each other.

use std::fs;
use std::path::Path;
use std::time::Duration;

use caisson_tests::case::runtime;
use k8s_cri::v1::{
    Capability, ContainerConfig, Int64Value, LinuxContainerResources,
    LinuxContainerSecurityContext, SecurityProfile, security_profile::ProfileType,
};

use crate::kubelet::{Kubelet, Pod, begin_pods, begin_pods_within, volume};

fn context(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.as_mut().expect("linux");
    linux.security_context.as_mut().expect("security context")
}

#[test]
fn user_groups_and_capabilities_are_those_asked_for() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let mut config = pod.container("main", "exec sleep 1000");
    let asked = context(&mut config);
    asked.run_as_user = Some(Int64Value { value: 1000 });
    asked.run_as_group = Some(Int64Value { value: 1001 });
    asked.supplemental_groups = vec![1002, 1003];
    asked.readonly_rootfs = true;
    asked.no_new_privs = true;
    asked.capabilities = Some(Capability {
        drop_capabilities: vec!["ALL".to_owned()],
        add_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
        ..Default::default()
    });
    let id = pod.run(config);
    assert_eq!(
        node.said(&id, "id -u; id -g; id -G"),
        "1000\n1001\n1001 1002 1003"
    );
    let status = node.said(&id, "grep -E '^(CapBnd|NoNewPrivs)' /proc/1/status");
    assert_eq!(
        status.split_whitespace().collect::<Vec<_>>(),
        ["CapBnd:", "0000000000000400", "NoNewPrivs:", "1"]
    );
    let refused = node.exec_sync(&id, "touch /tmp/x", 60).expect("ExecSync");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"));
    pod.end();
}

#[test]
fn seccomp_and_paths_of_proc_are_as_asked_for() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let profile = case.dir().join("profile.json");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}"#;
    fs::write(&profile, text).expect("profile");
    let localhost = SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: profile.to_string_lossy().into_owned(),
    };
    let default = SecurityProfile {
        profile_type: ProfileType::RuntimeDefault.into(),
        ..Default::default()
    };
    let mut config = pod.container("own", "exec sleep 1000");
    context(&mut config).seccomp = Some(localhost);
    context(&mut config).masked_paths = vec!["/proc/version".to_owned()];
    context(&mut config).readonly_paths = vec!["/proc/sys".to_owned()];
    let own = pod.run(config);
    // `procMount: Unmasked` is no list at all.
    let unmasked = pod.script("unmasked", "exec sleep 1000");
    let mut config = pod.container("default", "exec sleep 1000");
    context(&mut config).seccomp = Some(default);
    let default = pod.run(config);
    let refused = node.exec_sync(&own, "mkdir /tmp/x", 60).expect("ExecSync");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Operation not permitted"));
    node.said(&default, "mkdir /tmp/x");
    let filter = "grep -E '^Seccomp:' /proc/1/status | tr -d '\\t'";
    assert_eq!(node.said(&default, filter), "Seccomp:2");
    assert_eq!(node.said(&own, "cat /proc/version"), "");
    assert_ne!(node.said(&default, "cat /proc/version"), "");
    let name = "echo x > /proc/sys/kernel/domainname";
    let refused = node.exec_sync(&own, name, 60).expect("ExecSync");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"));
    let mounts = "grep -c ' /proc/' /proc/self/mounts || true";
    assert_eq!(node.said(&own, mounts), "2");
    assert_eq!(node.said(&unmasked, mounts), "0");
    node.said(&unmasked, name);
    // What it is for: a container in the container, whose own /proc may show no more than this one.
    let nested = "unshare -Urmpf mount -t proc proc /proc";
    node.said(&unmasked, nested);
    assert_ne!(
        node.exec_sync(&own, nested, 60)
            .expect("ExecSync")
            .exit_code,
        0
    );
    pod.end();
}

#[test]
fn a_pods_sysctls_and_size_hold() {
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let mut config = node.pod_config("one");
    let linux = config.linux.as_mut().expect("linux");
    let sysctls = [
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("net.core.somaxconn", "777"),
        ("kernel.shm_rmid_forced", "1"),
    ];
    linux.sysctls = sysctls
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    linux.resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 400 << 20,
        cpu_period: 100_000,
        cpu_quota: 100_000,
        ..Default::default()
    });
    let pod = node.run(config).expect("RunPodSandbox");
    let id = pod.script("main", "exec sleep 1000");
    for (name, value) in sysctls {
        let file = format!("cat /proc/sys/{}", name.replace('.', "/"));
        assert_eq!(node.said(&id, &file), value, "{name}");
    }
    if runtime() == "caisson" {
        let total = node.said(&id, "grep MemTotal /proc/meminfo | tr -dc 0-9");
        let mib = total.parse::<u32>().expect("a number") / 1024;
        assert!((400..470).contains(&mib), "{mib} MiB");
    }
    pod.end();
}

/// The host's Debian system beside the image's own, for its Python.
fn with_python(pod: &Pod<'_>, name: &str, scripts: &Path) -> ContainerConfig {
    let mut config = pod.container(name, "exec sleep 4242");
    let system = ["/usr", "/lib", "/lib64"].map(|dir| volume(Path::new(dir), dir, true));
    config.mounts = system.into();
    config.mounts.push(volume(scripts, "/scripts", true));
    context(&mut config).privileged = true;
    config
}

/// Holds what the neighbour looks for: an abstract socket, a vsock port, System V shared memory.
const HOLD: &str = r#"
import ctypes, os, socket
held = []
s = socket.socket(socket.AF_UNIX); s.bind('\0secret'); s.listen(); held.append(s)
try:
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.bind((0xffffffff, 5000)); s.listen(); held.append(s)
except OSError as error:
    print('no vsock:', error)
print('shm', ctypes.CDLL(None).shmget(0x5ec4e7, 4096, 0o1666))
print('held', flush=True)
if os.fork() == 0:
    for stream in range(3):
        os.close(stream)
    while True:
        held[-1].accept()[0].sendall(b'secret')
"#;

/// Says what it could reach.
const REACH: &str = r#"
import ctypes, os, socket
try:
    s = socket.socket(socket.AF_UNIX); s.connect('\0secret'); print('REACHED abstract socket')
except ConnectionRefusedError:
    print('no abstract socket')
for cid in range(8):
    try:
        s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.settimeout(2); s.connect((cid, 5000))
        # The host's own end takes a stray connection and closes it.
        if s.recv(6): print('REACHED vsock', cid)
    except OSError:
        pass
if ctypes.CDLL(None).shmget(0x5ec4e7, 4096, 0) >= 0:
    print('REACHED shared memory')
print('done')
"#;

#[test]
fn a_pod_reaches_another_by_the_network_alone() {
    if runtime() == "runc" {
        println!(
            "skipped on runc: its pods share virtual sockets, and a privileged one remounts the machine's cgroups"
        );
        return;
    }
    // Python starts slowly from a share on an emulated processor.
    let case = begin_pods_within(Duration::from_secs(900));
    let node = Kubelet::start(&case);
    let scripts = case.dir().join("scripts");
    fs::create_dir(&scripts).expect("directory");
    fs::write(scripts.join("hold"), HOLD).expect("script");
    fs::write(scripts.join("reach"), REACH).expect("script");
    let [a, b] = ["a", "b"].map(|name| {
        let mut config = node.pod_config(name);
        let linux = config.linux.as_mut().expect("linux");
        let context = linux.security_context.as_mut();
        context.expect("security context").privileged = true;
        node.run(config).expect("RunPodSandbox")
    });
    let hider = b.run(with_python(&b, "hider", &scripts));
    let seeker = a.run(with_python(&a, "seeker", &scripts));
    node.said(
        &hider,
        "echo secret > /secret-file; echo secret > /dev/shm/secret-file",
    );
    node.said(
        &hider,
        "mkdir /www; echo by network > /www/x; httpd -p 8080 -h /www",
    );
    let held = node.said(&hider, "/usr/bin/python3 /scripts/hold 2>&1");
    assert!(held.ends_with("held"), "{held}");
    // The test itself: in its own pod, everything that is hidden is found.
    let found = node.said(
        &hider,
        "find / -xdev -name secret-file; ls /dev/shm; /usr/bin/python3 /scripts/reach",
    );
    assert!(
        found.contains("/secret-file") && found.contains("REACHED abstract socket"),
        "{found}"
    );
    assert!(found.contains("REACHED shared memory"), "{found}");
    let fetch = format!("wget -q -O - http://{}:8080/x", b.address());
    assert_eq!(node.said(&seeker, &fetch), "by network");
    let reached = node.said(&seeker, "/usr/bin/python3 /scripts/reach");
    assert!(
        reached.ends_with("done") && !reached.contains("REACHED"),
        "{reached}"
    );
    assert_eq!(
        node.said(&seeker, "ls /dev/shm; ps | grep -c '[h]ttpd' || true"),
        "0"
    );
    // The devices of the guest, and the share that all of its containers' files are on, mounted once more.
    assert_eq!(node.said(&seeker, "ls /sys/class/block"), "");
    let share = "mkdir /again; mount -t virtiofs caisson /again; ls /again; find /again -maxdepth 3 -name secret-file";
    let seen = node.exec_sync(&seeker, share, 60).expect("ExecSync");
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    assert!(
        !seen.contains("secret-file") && !seen.contains(&hider),
        "{seen}"
    );
    for path in ["/proc/1/root", "/sys/kernel/debug", "/run"] {
        let script = format!("find {path} -xdev -maxdepth 4 -name secret-file 2>/dev/null || true");
        assert_eq!(node.said(&seeker, &script), "", "{path}");
    }
    a.end();
    b.end();
}

#[test]
fn a_pods_annotations_do_what_the_host_allows() {
    if runtime() == "runc" {
        println!("skipped on runc: these annotations are not for it");
        return;
    }
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let annotated = |name: &str| {
        let mut config = node.pod_config(name);
        let wanted = ("io.caisson.default_memory_mib".to_owned(), "333".to_owned());
        // The other one is somebody else's, and not passed on.
        let others = ("example.com/io.caisson.kernel".to_owned(), "/x".to_owned());
        config.annotations = [wanted, others].into();
        node.run(config)
    };
    let refused = annotated("one").err().expect("a refusal");
    let told = "annotation io.caisson.default_memory_mib is not allowed here";
    assert!(refused.message().contains(told), "{refused}");
    case.configure("allowed_annotations = [\"default_memory_mib\"]\n");
    let pod = annotated("two").expect("RunPodSandbox");
    let id = pod.script("main", "exec sleep 1000");
    let total = node.said(&id, "grep MemTotal /proc/meminfo | tr -dc 0-9");
    let mib = total.parse::<u32>().expect("a number") / 1024;
    assert!((290..=333).contains(&mib), "{mib} MiB");
    pod.end();
}
