//! What a pod costs the host beside its containers, and that its RuntimeClass says so.
//!
//! Contract: measured are the shim and the VMM without the guest's memory, by their proportional set sizes, and what the
//! guest's kernel and agent take of the guest's memory. The figures are printed (`--nocapture`).

use std::fs;
use std::path::Path;

use caisson_tests::case::{processes_named, runtime};

use crate::daemon::shims;
use crate::kubelet::{Kubelet, begin_pods};

/// What a machine has beyond its containers' limits: `memory_overhead_mib` of the configuration.
const IN_GUEST_MIB: u64 = 64;

/// The guest's memory is a mapping of its own; nothing else of the VMM is nearly as large.
const GUEST_MAPPING_KIB: u64 = 32 << 10;

/// A process's proportional set size but for the guest's memory, in KiB.
pub(crate) fn own_pss(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let mut size = 0;
    let mut sum = 0;
    for line in text.lines() {
        let kib = || line.split_whitespace().nth(1)?.parse::<u64>().ok();
        match line.split(':').next() {
            Some("Size") => size = kib().expect("a size"),
            Some("Pss") if size < GUEST_MAPPING_KIB => sum += kib().expect("a size"),
            _ => {}
        }
    }
    sum
}

/// Processor time that a process has used, in hundredths of a second.
fn ticks(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields = text.rsplit(')').next().expect("fields");
    let fields = fields.split_whitespace();
    fields
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().expect("ticks"))
        .sum()
}

/// A field of the RuntimeClass's overhead.
fn declared(field: &str, unit: &str) -> u64 {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("repository");
    let text = fs::read_to_string(root.join("runtime/deploy/runtimeclass.yaml")).expect("manifest");
    let value = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(field));
    let number = value.and_then(|value| value.trim().strip_suffix(unit));
    number.expect("a number").parse().expect("a number")
}

#[test]
fn a_pod_costs_no_more_than_declared() {
    if runtime() == "runc" {
        println!("skipped on runc: its pods have no virtual machine");
        return;
    }
    let case = begin_pods();
    let node = Kubelet::start(&case);
    let pod = node.pod("one");
    let id = pod.script("main", "exec sleep 1000");
    // A further process has been there, as with a probe.
    node.said(&id, "true");
    let (shim, vmm) = (shims()[0].pid, processes_named("caisson-vmm")[0].pid);
    let (shim_kib, vmm_kib) = (own_pss(shim), own_pss(vmm));
    let meminfo = node.said(&id, "cat /proc/meminfo");
    let field = |name: &str| -> u64 {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next());
        kib.expect(name).parse().expect("a number")
    };
    // What the kernel set aside before it counted belongs to it, too.
    let configured_kib = 256 << 10;
    let guest_kib = configured_kib - field("MemFree:") - field("Cached:") - field("Buffers:");
    let before = ticks(shim) + ticks(vmm);
    node.said(&id, "sleep 10");
    let idle = ticks(shim) + ticks(vmm) - before;
    let (memory, cpu) = (declared("memory:", "Mi"), declared("cpu:", "m"));
    println!(
        "| shim, KiB | VMM, KiB | guest's kernel, agent and two idle programs, KiB | ticks in 10 s |"
    );
    println!("| {shim_kib} | {vmm_kib} | {guest_kib} | {idle} |");
    println!("declared: {memory} MiB, {cpu} thousandths of a processor");
    assert!(
        guest_kib <= IN_GUEST_MIB << 10,
        "in the guest: {guest_kib} KiB"
    );
    let on_host = shim_kib + vmm_kib;
    assert!(
        on_host <= (memory - IN_GUEST_MIB) << 10,
        "on the host: {on_host} KiB"
    );
    pod.end();
}
