//! What an idle container holds of the host's memory: resident (RSS) and proportional (PSS) sizes.

use std::fs;
use std::io;
use std::process::Command;

use serde_json::Value;

use crate::subject::Place;

/// Guest memory of the idle container, in MiB.
const GUEST_MIB: u32 = 128;

/// Sizes of a process in KiB.
#[derive(Debug, Default)]
struct Sizes {
    rss: u64,
    pss: u64,
    /// Resident part of the guest's memory: the mappings of exactly that size or its parts.
    guest: u64,
}

/// Starts an idle container, prints the sizes of its processes, and removes it.
pub(crate) fn report(place: &Place) -> io::Result<()> {
    place.configure(&format!("default_memory_mib = {GUEST_MIB}\n"))?;
    let bundle = place.bundle(&["sleep", "1000"])?;
    let call = |args: &[&str]| {
        let mut command = Command::new(place.dir.join("caisson"));
        command
            .env("CAISSON_CONFIG", place.dir.join("config.toml"))
            .args(args);
        command
    };
    let bundle = bundle.display().to_string();
    let status = call(&["run", "--detach", "-b", &bundle, "idle"]).status()?;
    if !status.success() {
        return Err(io::Error::other("caisson run --detach failed"));
    }
    let result = sizes_of_idle(&call);
    call(&["delete", "--force", "idle"]).status()?;
    place.configure("")?;
    result
}

fn sizes_of_idle(call: &dyn Fn(&[&str]) -> Command) -> io::Result<()> {
    let free = call(&["exec", "idle", "free", "-k"]).output()?;
    let state: Value = serde_json::from_slice(&call(&["state", "idle"]).output()?.stdout)?;
    let monitor = state["pid"]
        .as_u64()
        .ok_or_else(|| io::Error::other("state has no pid"))?;
    let vmm = child_of(monitor)?;
    let (monitor, vmm) = (sizes(monitor)?, sizes(vmm)?);
    println!("\n| idle, {GUEST_MIB} MiB guest | resident KiB | proportional KiB |\n|---|---|---|");
    println!("| monitor | {} | {} |", monitor.rss, monitor.pss);
    println!(
        "| VMM without guest memory | {} | {} |",
        vmm.rss - vmm.guest,
        vmm.pss.saturating_sub(vmm.guest)
    );
    println!(
        "| guest memory on the host | {} | {} |",
        vmm.guest, vmm.guest
    );
    println!(
        "\nin the guest: {}",
        used(&String::from_utf8_lossy(&free.stdout))
    );
    Ok(())
}

/// The process whose parent is `pid`.
fn child_of(pid: u64) -> io::Result<u64> {
    let file = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(&file)?;
    text.split_whitespace()
        .next()
        .and_then(|pid| pid.parse().ok())
        .ok_or_else(|| io::Error::other(format!("{file} is empty")))
}

/// Reads `/proc/PID/smaps`. Guest memory is the one huge private mapping.
fn sizes(pid: u64) -> io::Result<Sizes> {
    let mut sizes = Sizes::default();
    let mut mapping = 0;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let kib: u64 = value.parse().unwrap_or(0);
        match name {
            "Size:" => mapping = kib,
            "Rss:" => {
                sizes.rss += kib;
                if mapping >= u64::from(GUEST_MIB / 2) << 10 {
                    sizes.guest += kib;
                }
            }
            "Pss:" => sizes.pss += kib,
            _ => {}
        }
    }
    Ok(sizes)
}

/// `total` less `free` less `buff/cache` of `free -k`.
fn used(free: &str) -> String {
    let line = free
        .lines()
        .find(|line| line.starts_with("Mem:"))
        .unwrap_or_default();
    let numbers: Vec<&str> = line.split_whitespace().skip(1).collect();
    match numbers.as_slice() {
        [total, used, free, ..] => format!("{total} KiB of memory, {used} used, {free} free"),
        _ => "busybox free said nothing".to_owned(),
    }
}
