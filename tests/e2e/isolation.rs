//! What a container must not see, and the confinement that every process in it has.

use std::fs;

use caisson_tests::Case;
use serde_json::json;

fn host(path: &str) -> String {
    fs::read_to_string(path).expect(path).trim().to_owned()
}

#[test]
fn exec_runs_in_a_kernel_of_its_own() {
    let Some(case) = Case::begin_with_vm("a runc container runs on the host's kernel") else {
        return;
    };
    case.start(&case.bundle().args(["sleep", "1000"]), "one");
    let outcome = case.exec(
        "one",
        "cat /proc/sys/kernel/random/boot_id; cat /proc/version; grep -c . /proc/modules",
    );
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_ne!(lines[0], host("/proc/sys/kernel/random/boot_id"));
    assert_ne!(lines[1], host("/proc/version"));
    let again = case.exec("one", "cat /proc/sys/kernel/random/boot_id");
    assert_eq!(again.text().trim(), lines[0], "two execs, one machine");
    case.delete("one");
}

#[test]
fn two_containers_never_see_each_other() {
    let case = Case::begin();
    let (left, right) = (case.bundle_in("left"), case.bundle_in("right"));
    let (left, right) = (left.args(["sleep", "1111"]), right.args(["sleep", "2222"]));
    case.start(&left, "left");
    case.start(&right, "right");
    for (id, other, secret) in [("left", "2222", "l"), ("right", "1111", "r")] {
        let outcome = case.exec(
            id,
            &format!("echo {secret} > /root/secret; echo {secret} > /dev/shm/secret; ps -o args"),
        );
        assert_eq!(outcome.status, 0, "{outcome:?}");
        assert!(
            !outcome.text().contains(&format!("sleep {other}")),
            "{}",
            outcome.text()
        );
    }
    for (id, secret) in [("left", "l"), ("right", "r")] {
        assert_eq!(
            case.exec(id, "cat /root/secret /dev/shm/secret").text(),
            format!("{secret}\n{secret}\n")
        );
    }
    let boot_ids = ["left", "right"].map(|id| {
        case.exec(
            id,
            "cat /proc/sys/kernel/random/boot_id; readlink /proc/self/ns/pid",
        )
        .text()
        .to_owned()
    });
    assert_ne!(boot_ids[0], boot_ids[1]);
    case.call(["kill", "left", "KILL"]).succeed();
    case.wait("left");
    assert_eq!(case.exec("right", "echo alive").text(), "alive\n");
    assert_eq!(
        (case.status("left"), case.status("right")),
        ("stopped".into(), "running".into())
    );
    case.delete("left");
    assert_eq!(case.exec("right", "cat /root/secret").text(), "r\n");
    case.delete("right");
}

#[test]
fn init_and_exec_have_the_full_confinement_of_config_json() {
    let case = Case::begin();
    let confinement = "grep -E '^(Seccomp|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs):' /proc/self/status; \
                       mkdir /denied 2>&1; cat /proc/self/cgroup; ulimit -n; cat /proc/self/oom_score_adj";
    let bundle = case
        .bundle()
        .script(&format!("{confinement}; exec sleep 1000"));
    let bundle = bundle.edit(|spec| {
        let capabilities = &mut spec["process"]["capabilities"];
        for set in ["bounding", "effective", "inheritable", "permitted", "ambient"] {
            capabilities[set] = json!(["CAP_KILL", "CAP_NET_RAW"]);
        }
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 321, "soft": 321}]);
        spec["process"]["oomScoreAdj"] = json!(77);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42}],
        });
    });
    let path = case.dir().join("init.txt");
    let stdout = fs::File::create(&path).expect("create");
    case.create_call(&bundle, "one").stdout(stdout).succeed();
    case.call(["start", "one"]).succeed();
    let exec = case.exec("one", confinement).text().to_owned();
    let init = fs::read_to_string(path).expect("read");
    for (who, text) in [("init", &init), ("exec", &exec)] {
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("{who}: no {name} in {text}"))
                .trim()
        };
        assert_eq!(value("Seccomp:"), "2", "{who}");
        assert_eq!(value("NoNewPrivs:"), "1", "{who}");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(value(set), "0000000000002020", "{who} {set}");
        }
        assert!(
            text.contains("No message of desired type"),
            "{who}: mkdir gave {text}"
        );
        assert!(text.ends_with("321\n77\n"), "{who}: {text}");
    }
    let cgroup = |text: &str| {
        text.lines()
            .find(|line| line.starts_with("0::"))
            .map(str::to_owned)
    };
    assert_eq!(cgroup(&init), cgroup(&exec));
    case.delete("one");
}

#[test]
fn limits_of_config_json_hold_in_the_container() {
    let case = Case::begin();
    let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; \
                  sh -c 'for i in $(seq 30); do sleep 100 >/dev/null 2>&1 & done' 2>&1 | grep -c fork";
    let bundle = case.bundle().script(script).edit(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 134_217_728});
        spec["linux"]["resources"]["pids"] = json!({"limit": 20});
        spec["linux"]["resources"]["cpu"] = json!({"quota": 50_000, "period": 100_000});
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
        namespaces.push(json!({"type": "cgroup"}));
    });
    let outcome = case.run(&bundle);
    assert_eq!(
        outcome.text(),
        "134217728\n20\n50000 100000\n1\n",
        "{outcome:?}"
    );
}

#[test]
fn an_out_of_memory_kill_ends_the_program_with_137() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("tail /dev/zero; echo $?")
        .edit(|spec| {
            spec["linux"]["resources"]["memory"] = json!({"limit": 67_108_864, "swap": 67_108_864});
        });
    let outcome = case.run(&bundle);
    assert_eq!(outcome.text(), "137\n", "{outcome:?}");
}

#[test]
fn masked_and_read_only_paths_and_devices_are_as_config_json_says() {
    let case = Case::begin();
    let script = "cat /proc/kcore | wc -c; ls /proc/acpi 2>/dev/null | wc -l; echo 1 > /proc/sys/kernel/printk; \
                  ls -l /dev/null | cut -c1-10; head -c 5 /dev/zero | wc -c; mknod /root/mem c 1 1 2>&1; cat /root/mem 2>&1 | tail -1; \
                  stat -c %a /dev/shm; ls /dev/pts; readlink /dev/stdin; ls /sys/class | head -1 | wc -l";
    let outcome = case.run(&case.bundle().script(script));
    let lines: Vec<&str> = outcome.text().lines().map(str::trim).collect();
    assert_eq!(lines[..4], ["0", "0", "crw-rw-rw-", "5"], "{outcome:?}");
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
    assert!(
        lines.contains(&"1777") && lines.contains(&"/proc/self/fd/0"),
        "{outcome:?}"
    );
    assert!(
        outcome.text().contains("Operation not permitted"),
        "{outcome:?}"
    );
}

#[test]
fn the_container_has_loopback_and_nothing_else_without_a_network() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .script("ls /sys/class/net; ifconfig lo up; ping -c 1 -W 5 127.0.0.1 >/dev/null; echo $?");
    let bundle = bundle.edit(|spec| {
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(["CAP_NET_ADMIN", "CAP_NET_RAW"]);
        }
    });
    assert_eq!(case.run(&bundle).text(), "lo\n0\n");
}
