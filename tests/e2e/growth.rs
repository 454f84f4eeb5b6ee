//! `update` to more than the virtual machine started with, and back.

use std::fs;
use std::thread::available_parallelism;

use caisson_tests::{Case, Outcome, case};
use serde_json::json;

/// A container that sleeps, with 64 MiB and half a CPU, and a file system in memory.
fn start(case: &Case) {
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["linux"]["cgroupsPath"] = "/caisson-test-growth".into();
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/memory", "type": "tmpfs", "source": "tmpfs", "options": ["size=1g"]}));
        spec["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20, "swap": 64 << 20},
            "cpu": {"quota": 50_000, "period": 100_000},
        });
    });
    case.start(&bundle, "one");
}

fn update(case: &Case, options: &[&str]) -> Outcome {
    case.call(["update"]).args(options).args(["one"]).finish()
}

#[track_caller]
fn memory(case: &Case, limit: &str) {
    let outcome = update(case, &["--memory", limit, "--memory-swap", limit]);
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
}

/// Whether a program that needs so much memory at once lives.
fn fits(case: &Case, mib: u32) -> bool {
    let script = format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1");
    case.exec("one", &script).status == 0
}

/// Memory of the guest that its kernel has, in KiB.
fn total_kib(case: &Case) -> u64 {
    let outcome = case.exec("one", "grep MemTotal /proc/meminfo");
    let number = outcome.text().split_whitespace().nth(1).map(str::parse);
    number.expect("MemTotal").expect("a number")
}

/// Memory of the virtual machine on the host, in KiB.
fn resident_kib() -> u64 {
    let vmm = case::processes_named("caisson-vmm");
    let status = fs::read_to_string(format!("/proc/{}/status", vmm[0].pid)).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.expect("VmRSS").parse().expect("a number")
}

#[test]
fn a_program_gets_the_memory_that_its_limit_was_raised_to() {
    let case = Case::begin();
    start(&case);
    assert!(!fits(&case, 200), "it has 64 MiB");
    memory(&case, "300m");
    assert!(fits(&case, 250));
    // A file in memory that is larger than the machine was.
    let file = "dd if=/dev/zero of=/memory/x bs=1M count=200 && rm /memory/x";
    assert_eq!(case.exec("one", file).status, 0);
    // Through the share, from and into memory that came later.
    let copy = "dd if=/bin/busybox of=/tmp/y bs=64k && md5sum < /bin/busybox && md5sum < /tmp/y";
    let copied = case.exec("one", copy);
    let sums: Vec<&str> = copied.text().lines().collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{copied:?}");
    memory(&case, "80m");
    assert!(!fits(&case, 200), "it has 80 MiB");
    memory(&case, "200m");
    assert!(fits(&case, 120));
    case.delete("one");
}

#[test]
fn memory_goes_back_to_the_host_when_the_limit_is_lowered() {
    let Some(case) = Case::begin_with_vm("runc has no machine that could shrink") else {
        return;
    };
    start(&case);
    let booted = total_kib(&case);
    let host = || {
        let text = fs::read_to_string("/sys/fs/cgroup/caisson-test-growth/memory.max");
        let text = text.expect("memory.max");
        text.trim().parse::<u64>().expect("a limit") >> 20
    };
    let before = host();
    memory(&case, "400m");
    assert_eq!(host() - before, 400 - 64);
    let grown = total_kib(&case);
    assert!(grown > booted + (300 << 10), "{booted} and {grown} KiB");
    let file = "dd if=/dev/zero of=/memory/x bs=1M count=300";
    assert_eq!(case.exec("one", file).status, 0);
    let full = resident_kib();
    assert!(full > 300 << 10, "{full} KiB");
    assert_eq!(case.exec("one", "rm /memory/x").status, 0);
    memory(&case, "64m");
    let (empty, total) = (resident_kib(), total_kib(&case));
    assert!(empty + (200 << 10) < full, "{full} and {empty} KiB");
    assert!(total < booted + (16 << 10), "{booted} and {total} KiB");
    assert_eq!(host(), before);
    case.delete("one");
}

#[test]
fn what_is_refused_after_the_machine_grew_lets_it_shrink_again() {
    let Some(case) = Case::begin_with_vm("runc has no machine that could grow") else {
        return;
    };
    start(&case);
    let booted = total_kib(&case);
    let host = || fs::read_to_string("/sys/fs/cgroup/caisson-test-growth/memory.max").ok();
    let before = host();
    // The guest is the last to be asked, and it refuses swap below memory.
    let options = ["--memory", "400m", "--memory-swap", "100m"];
    update(&case, &options).is_refusal("memory+swap limit should be >= memory limit");
    assert!(total_kib(&case) < booted + (16 << 10));
    assert_eq!(host(), before);
    assert!(!fits(&case, 200));
    case.delete("one");
}

#[test]
fn more_than_the_configuration_allows_is_refused_by_the_names_of_its_keys() {
    let Some(case) = Case::begin_with_vm("the host is runc's machine") else {
        return;
    };
    let bundle = case.bundle().args(["sleep", "1000"]);
    let config = case.configured("max_memory_mib", "300");
    case.create_call(&bundle, "one")
        .env("CAISSON_CONFIG", config)
        .succeed();
    case.call(["start", "one"]).succeed();
    update(&case, &["--memory", "301m"])
        .is_refusal("may have at most 314572800 bytes of memory (max_memory_mib)");
    update(&case, &["--cpu-quota", "100001"]).is_refusal("may have at most 1 vCPU(s) (max_vcpus)");
    memory(&case, "300m");
    let total = total_kib(&case);
    assert!((260 << 10..300 << 10).contains(&total), "{total} KiB");
    // No limit: the machine stays as it is.
    memory(&case, "-1");
    assert_eq!(total_kib(&case), total);
    case.delete("one");
}

#[test]
fn a_program_gets_the_cpus_that_its_quota_was_raised_to() {
    let Some(case) = Case::begin_with_vm("under runc a quota changes no number of CPUs") else {
        return;
    };
    if available_parallelism().map_or(1, usize::from) < 2 {
        println!("skipped: this host has one CPU");
        return;
    }
    let bundle = case.bundle().args(["sleep", "1000"]);
    let config = case.configured("max_vcpus", "2");
    case.create_call(&bundle, "one")
        .env("CAISSON_CONFIG", config)
        .succeed();
    case.call(["start", "one"]).succeed();
    let cpus = || case.exec("one", "nproc; taskset -p 1").text().to_owned();
    let quota = |quota: &str| {
        let outcome = update(&case, &["--cpu-period", "100000", "--cpu-quota", quota]);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    };
    let (one, two) = (
        "1\npid 1's current affinity mask: 1\n",
        "2\npid 1's current affinity mask: 3\n",
    );
    assert_eq!(cpus(), one);
    for _ in 0..2 {
        quota("150000");
        assert_eq!(cpus(), two);
        // Both work.
        let work =
            "taskset 1 true && taskset 2 sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done'";
        assert_eq!(case.exec("one", work).status, 0);
        quota("50000");
        assert_eq!(cpus(), one);
    }
    update(&case, &["--cpu-quota", "200001"]).is_refusal("may have at most 2 vCPU(s) (max_vcpus)");
    case.call(["pause", "one"]).succeed();
    quota("150000");
    case.call(["resume", "one"]).succeed();
    assert_eq!(cpus(), two);
    case.delete("one");
}
