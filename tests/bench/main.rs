//! `bench`: what a container costs, beside runc, crun and QEMU's microvm, counted in instructions.
//!
//! Runs inside the lab with `--icount`: there one nanosecond of `CLOCK_MONOTONIC` is one instruction executed by anybody
//! (this program, the kernel, the VMM, the guest), so a difference of two clock readings is a count and repeats exactly.
//! Each subject runs the same bundle (busybox `true`). Three separate passes, so that no measurement is inside another:
//! the clock alone; VM exits, by a histogram on `kvm:kvm_exit`; phases, by the rare trace events that part them.
//! Prints tables and fails nothing; `bench files`, `bench network` and `bench steps` print only that of operations on files,
//! of packets or of single commands; `bench cold [RUNS]` prints caisson's cold starts one by one, with the exits of each.
//! Not here: the lab (`tests/lab`), judging the figures (the README's reader).

mod files;
mod idle;
mod network;
mod steps;
mod subject;
mod trace;
mod virtiofs;

use std::collections::BTreeMap;
use std::io;
use std::process::ExitCode;

use caisson_tests::ruler::{Trace, millions};
use subject::Subject;
use trace::Marks;

/// Runs before the counted one: page cache, dentries, the file server's handles.
const WARM_UPS: u32 = 2;

/// Runs of `bench cold`.
const COLD_RUNS: u32 = 10;

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> io::Result<()> {
    let place = subject::Place::prepare()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("files") => return files::report(&place, &arguments[1..]),
        Some("network") => return network::report(&place, &Trace::open()?),
        Some("steps") => return steps::report(&place),
        Some("cold") => return cold(&place, arguments.get(1)),
        _ => {}
    }
    let trace = Trace::open()?;
    if std::env::var_os("LAB_ICOUNT").is_none() {
        println!("(not counting instructions: the figures are nanoseconds of an emulated machine)");
    }
    println!("| busybox `true`, cold | M instructions | VM exits |");
    println!("|---|---|---|");
    for subject in Subject::all() {
        if let Err(error) = row(subject, &place, &trace) {
            println!("| {} | failed: {error} | |", subject.name());
        }
    }
    phases(&place, &trace)?;
    steps::report(&place)?;
    idle::report(&place)?;
    files::report(&place, &[])?;
    network::report(&place, &trace)
}

/// Prints each of some cold starts of caisson: one that differs from the others shows by what.
fn cold(place: &subject::Place, runs: Option<&String>) -> io::Result<()> {
    let runs: u32 = runs.map_or(Ok(COLD_RUNS), |runs| runs.parse().map_err(io::Error::other))?;
    let trace = Trace::open()?;
    for number in 1..=runs {
        let mut nanos = 0;
        let reasons = trace.exits_by_reason(|| {
            nanos = Subject::Caisson.run(place, &[])?.nanos();
            Ok(())
        })?;
        let exits: u64 = reasons.values().sum();
        println!(
            "start {number}: {} M, {exits} exits: {}",
            millions(nanos),
            listed(&reasons)
        );
    }
    Ok(())
}

/// Exits by reason, on one line.
fn listed(reasons: &BTreeMap<String, u64>) -> String {
    let list: Vec<String> = reasons
        .iter()
        .map(|(name, n)| format!("{name} {n}"))
        .collect();
    list.join(", ")
}

/// Runs a subject and prints its row of the table.
fn row(subject: Subject, place: &subject::Place, trace: &Trace) -> io::Result<()> {
    for _ in 0..WARM_UPS {
        subject.run(place, &[])?;
    }
    let run = subject.run(place, &[])?;
    let exits: u64 = trace
        .exits_by_reason(|| subject.run(place, &[]).map(drop))?
        .values()
        .sum();
    println!(
        "| {} | {} | {exits} |",
        subject.name(),
        millions(run.nanos())
    );
    Ok(())
}

/// Prints where caisson's instructions and exits go.
fn phases(place: &subject::Place, trace: &Trace) -> io::Result<()> {
    let entry = place.kernel_entry()?;
    let marks = Marks::of(trace, entry, || {
        Subject::Caisson.run(place, &["echo", "on"])
    })?;
    println!("\n| phase of `caisson run` (busybox `echo`) | M instructions |\n|---|---|");
    for (name, nanos) in marks.phases() {
        println!("| {name} | {} |", millions(nanos));
    }
    let reasons: BTreeMap<String, u64> =
        trace.exits_by_reason(|| Subject::Caisson.run(place, &[]).map(drop))?;
    println!("\nVM exits by reason: {}", listed(&reasons));
    Ok(())
}
