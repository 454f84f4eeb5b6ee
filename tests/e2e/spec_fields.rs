//! Fields of `config.json` that the other files do not show: each is seen from inside the container, or refused by name.
//!
//! `docs/runtime-spec.md` names these tests, field by field. What runc 1.1 does not know yet runs on caisson alone.

use std::fs;
use std::os::unix::fs::MetadataExt;

use caisson_tests::{Bundle, Case, case};
use serde_json::{Value, json};

pub(crate) const TOO_NEW: &str = "runc 1.1 does not know these fields";

/// The container also gets a namespace of this kind.
pub(crate) fn with_namespace(spec: &mut Value, kind: &str) {
    let namespaces = spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("namespaces");
    namespaces.push(json!({"type": kind}));
}

/// A cgroup namespace of its own, and the hierarchy in it.
fn with_cgroup_mount(spec: &mut Value) {
    let mounts = spec["mounts"].as_array_mut().expect("mounts");
    mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
    let namespaces = spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("namespaces");
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    with_namespace(spec, "cgroup");
}

/// The container has a user namespace, whose root is user 100000.
pub(crate) fn mapped(bundle: Bundle) -> Bundle {
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    bundle.edit(|spec| {
        spec["linux"]["uidMappings"] = mappings.clone();
        spec["linux"]["gidMappings"] = mappings;
        with_namespace(spec, "user");
    })
}

#[test]
fn a_capability_that_nobody_knows_is_warned_of_and_left_out() {
    let case = Case::begin();
    let capabilities = json!(["CAP_KILL", "CAP_NO_SUCH_THING"]);
    let bundle = case
        .bundle()
        .script("grep CapBnd /proc/self/status; exec sleep 1000")
        .edit(|spec| {
            for set in ["bounding", "effective", "permitted"] {
                spec["process"]["capabilities"][set] = capabilities.clone();
            }
            spec["process"]["capabilities"]["ambient"] = json!([]);
            spec["process"]["capabilities"]["inheritable"] = json!([]);
        });
    let out = case.dir().join("out");
    let created = case
        .create_call(&bundle, "one")
        .stdout(fs::File::create(&out).expect("create"))
        .succeed();
    assert!(created.stderr.contains("CAP_NO_SUCH_THING"), "{created:?}");
    assert!(created.stderr.contains("level=warning"), "{created:?}");
    case.call(["start", "one"]).succeed();
    let exec = case.exec("one", "grep CapBnd /proc/self/status");
    assert_eq!(exec.text(), "CapBnd:\t0000000000000020\n", "{exec:?}");
    assert_eq!(fs::read_to_string(out).expect("read"), exec.text());
    case.delete("one");
}

#[test]
fn an_engines_own_apparmor_profile_is_left_to_the_virtual_machine_and_others_are_refused() {
    let Some(case) = Case::begin_with_vm("runc asks the host's AppArmor") else {
        return;
    };
    let with = |name: &str, profile: &str| {
        let bundle = case.bundle_in(name).args(["echo", "here"]);
        bundle.edit(|spec| spec["process"]["apparmorProfile"] = json!(profile))
    };
    let outcome = case.run(&with("docker", "docker-default"));
    assert_eq!(
        (outcome.status, outcome.text()),
        (0, "here\n"),
        "{outcome:?}"
    );
    assert!(
        outcome
            .stderr
            .contains("process.apparmorProfile is not applied"),
        "{outcome:?}"
    );
    let outcome = case.run(&with("own", "my-profile"));
    outcome.is_refusal("process.apparmorProfile \\\"my-profile\\\" is not supported");
    case.nothing_is_left();
}

#[test]
fn unknown_properties_are_ignored_as_the_specification_says() {
    let case = Case::begin();
    let bundle = case.bundle().args(["echo", "here"]).edit(|spec| {
        for place in ["", "/process", "/linux", "/root", "/process/user"] {
            spec.pointer_mut(place).expect(place)["org.example.unknown"] =
                json!({"of": ["any", "shape"]});
        }
    });
    let outcome = case.run(&bundle);
    assert_eq!(
        (outcome.status, outcome.text()),
        (0, "here\n"),
        "{outcome:?}"
    );
}

#[test]
fn scheduling_personality_names_and_clocks_are_the_containers_own() {
    let Some(case) = Case::begin_with_vm(TOO_NEW) else {
        return;
    };
    let script = "cut -d' ' -f19,41 /proc/self/stat; ionice -p $$; uname -m; cat /proc/sys/kernel/domainname; \
                  cut -d. -f1 /proc/uptime; exec sleep 1000";
    let bundle = case.bundle().script(script).edit(|spec| {
        spec["domainname"] = json!("example.org");
        spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
        spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000}});
        with_namespace(spec, "time");
    });
    let out = case.dir().join("out");
    let call = case.create_call(&bundle, "one");
    call.stdout(fs::File::create(&out).expect("create"))
        .succeed();
    case.call(["start", "one"]).succeed();
    let exec = case.exec("one", "uname -m; cut -d. -f1 /proc/uptime");
    case.delete("one");
    let text = fs::read_to_string(out).expect("read");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..4],
        ["5 3", "best-effort: prio 6", "i686", "example.org"],
        "{text}"
    );
    let uptime = |line: &str| line.parse::<u64>().expect("seconds");
    assert!((1_000_000..1_001_000).contains(&uptime(lines[4])), "{text}");
    let lines: Vec<&str> = exec.text().lines().collect();
    assert_eq!(lines[0], "i686", "{exec:?}");
    assert!(uptime(lines[1]) >= 1_000_000, "{exec:?}");
}

#[test]
fn a_further_process_has_a_scheduler_and_a_priority_of_its_own() {
    let Some(case) = Case::begin_with_vm(TOO_NEW) else {
        return;
    };
    let bundle = case.bundle().args(["sleep", "1000"]);
    let bundle = bundle.edit(|spec| {
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(["CAP_SYS_NICE", "CAP_KILL"]);
        }
    });
    case.start(&bundle, "one");
    let mine =
        "read -r line < /proc/$$/stat; set -- ${line#*) }; echo ${17} ${38} ${39}; ionice -p $$";
    let with = |scheduler: Value, class: &str, priority: u8| {
        let file = case.dir().join("process.json");
        let process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
            "args": ["sh", "-c", mine], "scheduler": scheduler,
            "ioPriority": {"class": class, "priority": priority}});
        fs::write(&file, process.to_string()).expect("write");
        let file = file.to_str().expect("text");
        case.call(["exec", "--process", file, "one"]).finish()
    };
    let reset = ["SCHED_RESET_ON_FORK"];
    let deadline = json!({"policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 100_000_000,
        "period": 100_000_000, "flags": reset});
    for (scheduler, class, priority, seen) in [
        (
            json!({"policy": "SCHED_FIFO", "priority": 10}),
            "IOPRIO_CLASS_RT",
            2,
            "0 10 1\nrealtime: prio 2\n",
        ),
        (
            json!({"policy": "SCHED_RR", "priority": 20}),
            "IOPRIO_CLASS_IDLE",
            0,
            "0 20 2\nidle\n",
        ),
        (
            json!({"policy": "SCHED_IDLE"}),
            "IOPRIO_CLASS_BE",
            1,
            "0 0 5\nbest-effort: prio 1\n",
        ),
        (
            json!({"policy": "SCHED_OTHER", "nice": -7}),
            "IOPRIO_CLASS_BE",
            7,
            "-7 0 0\nbest-effort: prio 7\n",
        ),
        (
            deadline,
            "IOPRIO_CLASS_BE",
            0,
            "0 0 6\nbest-effort: prio 0\n",
        ),
    ] {
        let outcome = with(scheduler, class, priority);
        assert_eq!(outcome.text(), seen, "{outcome:?}");
    }
    let outcome = with(
        json!({"policy": "SCHED_FIFO", "priority": 100}),
        "IOPRIO_CLASS_BE",
        0,
    );
    assert_ne!(outcome.status, 0, "{outcome:?}");
    assert!(outcome.stderr.contains("scheduler"), "{outcome:?}");
    case.delete("one");
}

#[test]
fn unified_settings_have_the_last_word() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("cd /sys/fs/cgroup; cat memory.high pids.max")
        .edit(|spec| {
            with_cgroup_mount(spec);
            spec["linux"]["resources"]["pids"] = json!({"limit": 20});
            spec["linux"]["resources"]["unified"] =
                json!({"memory.high": "134217728", "pids.max": "33"});
        });
    let outcome = case.run(&bundle);
    assert_eq!(outcome.text(), "134217728\n33\n", "{outcome:?}");
}

#[test]
fn a_vm_section_that_the_host_allows_chooses_kernel_and_size() {
    let Some(case) = Case::begin_with_vm("runc ignores the vm section") else {
        return;
    };
    // The machine's own files, under other names.
    let configuration = case::configuration();
    let configured = |key: &str| -> String {
        let mut values = configuration
            .lines()
            .filter_map(|line| line.split_once(" = "));
        let (_, value) = values.find(|&(name, _)| name == key).expect(key);
        serde_json::from_str(value).expect("a string")
    };
    let copied = |key: &str| {
        let copy = case.dir().join(key);
        fs::copy(configured(key), &copy).expect("copy");
        copy
    };
    let (kernel, initrd) = (copied("kernel"), copied("initramfs"));
    case.configure(
        "allow_vm_section = true\nmax_vcpus = 2\nkernel = \"/nowhere\"\ninitramfs = \"/nowhere\"\n",
    );
    let script = "grep -o section=1 /proc/cmdline; nproc; awk '/^MemTotal/ {print ($2 > 150000 && $2 < 200000)}' /proc/meminfo";
    let bundle = case.bundle().script(script).edit(|spec| {
        let parameters = [configured("kernel_params"), "section=1".to_owned()];
        spec["vm"] = json!({
            "kernel": {"path": kernel, "initrd": initrd, "parameters": parameters},
            "hwConfig": {"vcpus": 2, "memory": 192 << 20},
        });
    });
    let outcome = case.run(&bundle);
    assert_eq!(outcome.text(), "section=1\n2\n1\n", "{outcome:?}");
}

#[test]
fn a_user_namespace_maps_identities_on_the_shared_files() {
    let case = Case::begin();
    let script = "cat /proc/self/uid_map | tr -s ' '; id -u; id -g; touch /made; stat -c '%u %g' /made /bin/busybox";
    let bundle = mapped(case.bundle().script(script));
    let own = case.program("chown").args(["-R", "100000:100000"]);
    own.args([bundle.rootfs("")]).succeed();
    let outcome = case.run(&bundle);
    let lines: Vec<&str> = outcome.text().lines().map(str::trim).collect();
    assert_eq!(
        lines,
        ["0 100000 65536", "0", "0", "0 0", "0 0"],
        "{outcome:?}"
    );
    let made = fs::metadata(bundle.rootfs("made")).expect("made");
    assert_eq!((made.uid(), made.gid()), (100_000, 100_000));
}

#[test]
fn devices_are_made_as_listed_and_opened_as_allowed() {
    let case = Case::begin();
    let script = "stat -c '%a %u %g %t:%T' /dev/mine; echo x > /dev/mine && echo open; (echo x > /dev/denied) 2>&1";
    let bundle = case.bundle().script(script).edit(|spec| {
        let node = |path, minor| json!({"path": path, "type": "c", "major": 1, "minor": minor, "fileMode": 0o640, "uid": 7, "gid": 8});
        spec["linux"]["devices"] = json!([node("/dev/mine", 3), node("/dev/denied", 11)]);
        spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
        let capabilities = &mut spec["process"]["capabilities"];
        for set in ["bounding", "effective", "permitted"] {
            capabilities[set] = json!(["CAP_DAC_OVERRIDE"]);
        }
    });
    let outcome = case.run(&bundle);
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(lines[..2], ["640 7 8 1:3", "open"], "{outcome:?}");
    assert!(lines[2].contains("Operation not permitted"), "{outcome:?}");
}

#[test]
fn sysctls_of_the_containers_namespaces_are_set_and_others_refused() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("cat /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax")
        .edit(|spec| {
            spec["linux"]["sysctl"] = json!({"net.core.somaxconn": "777", "kernel.msgmax": "4242"});
        });
    let outcome = case.run(&bundle);
    assert_eq!(outcome.text(), "777\n4242\n", "{outcome:?}");
    let bundle = bundle.edit(|spec| spec["linux"]["sysctl"] = json!({"vm.swappiness": "1"}));
    case.run(&bundle)
        .is_refusal("is not in a separate kernel namespace");
    case.nothing_is_left();
}

#[test]
fn what_a_machine_cannot_give_is_refused_by_name() {
    let Some(case) = Case::begin_with_vm("runc can, or does not know them") else {
        return;
    };
    let idmapped =
        json!([{"destination": "/m", "type": "tmpfs", "source": "m", "options": ["idmap"]}]);
    let net = json!([{"type": "network"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]);
    for (pointer, field, value, words) in [
        (
            "/linux",
            "intelRdt",
            json!({"closID": "x"}),
            "linux.intelRdt",
        ),
        (
            "/linux",
            "netDevices",
            json!({"eth0": {}}),
            "linux.netDevices",
        ),
        ("/linux", "namespaces", net, "a path for the ipc namespace"),
        (
            "/linux/resources",
            "network",
            json!({"classID": 7}),
            "linux.resources.network",
        ),
        (
            "/linux/resources",
            "rdma",
            json!({"mlx5_1": {"hcaHandles": 3}}),
            "linux.resources.rdma",
        ),
        ("", "mounts", idmapped, "id-mapped mounts"),
    ] {
        let bundle = case.bundle_in(words.rsplit(['.', ' ']).next().unwrap_or(words));
        let bundle = bundle.edit(|spec| spec.pointer_mut(pointer).expect(pointer)[field] = value);
        let outcome = case.run(&bundle);
        outcome.is_refusal(words);
        assert!(outcome.stderr.contains("supported"), "{outcome:?}");
        case.nothing_is_left();
    }
}

#[test]
fn further_processes_run_on_the_processors_of_the_guest_that_are_named() {
    let Some(case) = Case::begin_with_vm(TOO_NEW) else {
        return;
    };
    // A machine has no more processors than its host.
    let last = if std::thread::available_parallelism().is_ok_and(|all| all.get() > 1) {
        1
    } else {
        0
    };
    let all = if last == 0 { "0" } else { "0-1" };
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["process"]["execCPUAffinity"] = json!({"initial": "0", "final": last.to_string()});
        spec["linux"]["resources"]["cpu"] = json!({"quota": 200_000, "period": 100_000});
    });
    case.start(&bundle, "one");
    let mine = "grep Cpus_allowed_list /proc/self/status";
    let line = |processors: &str| format!("Cpus_allowed_list:\t{processors}\n");
    assert_eq!(case.exec("one", mine).text(), line(&last.to_string()));
    // It is not for the container's first process.
    let first = case.exec("one", "grep Cpus_allowed_list /proc/1/status");
    assert_eq!(first.text(), line(all));
    let with = |affinity: Value| {
        let file = case.dir().join("process.json");
        let process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
            "args": ["sh", "-c", mine], "execCPUAffinity": affinity});
        fs::write(&file, process.to_string()).expect("write");
        let file = file.to_str().expect("text");
        case.call(["exec", "--process", file, "one"]).finish()
    };
    assert_eq!(with(json!({"initial": "0"})).text(), line("0"));
    assert_eq!(with(json!({"final": "0-1"})).text(), line(all));
    for (affinity, words) in [
        (
            json!({"initial": "7"}),
            "error setting initial CPU affinity",
        ),
        (json!({"final": "7,9"}), "error setting final CPU affinity"),
        (json!({"final": "1-0"}), "execCPUAffinity"),
    ] {
        let outcome = with(affinity);
        assert_ne!(outcome.status, 0, "{outcome:?}");
        assert!(outcome.stderr.contains(words), "{outcome:?}");
    }
    case.delete("one");
}

#[test]
fn a_memory_policy_is_that_of_the_machines_memory() {
    let Some(case) = Case::begin_with_vm(TOO_NEW) else {
        return;
    };
    let with = |name: &str, policy: Value| {
        let bundle = case.bundle_in(name).args(["sleep", "1000"]);
        bundle.edit(|spec| spec["linux"]["memoryPolicy"] = policy)
    };
    let policy = json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]});
    case.start(&with("bind", policy), "one");
    let machine = &case::processes_named("caisson-vmm")[0];
    let maps = fs::read_to_string(format!("/proc/{}/numa_maps", machine.pid)).expect("numa_maps");
    // Guest memory: by far the largest there is.
    let pages = |line: &str| -> u64 {
        let field = line.split(' ').find_map(|word| word.strip_prefix("anon="));
        field.and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    let memory = maps.lines().max_by_key(|line| pages(line)).expect("a line");
    assert!(memory.contains(" bind=static:0 "), "{memory}");
    case.delete("one");
    let nowhere = with("nowhere", json!({"mode": "MPOL_BIND", "nodes": "76-77"}));
    let outcome = case.run(&nowhere);
    outcome.is_refusal("error setting memory policy");
    case.nothing_is_left();
    let outcome = case.run(&with("odd", json!({"mode": "MPOL_BIND", "nodes": "3-1"})));
    outcome.is_refusal("linux.memoryPolicy: invalid range: 3-1");
}
