//! `bench`: what a container costs, beside runc, crun and QEMU's microvm, counted in instructions.
//!
//! Runs inside the lab with `--icount`: there one nanosecond of `CLOCK_MONOTONIC` is one instruction executed by anybody
//! (this program, the kernel, the VMM, the guest), so a difference of two clock readings is a count and repeats exactly.
//! Each subject runs the same bundle (busybox `true`). Three separate passes, so that no measurement is inside another:
//! the clock alone; VM exits, by a histogram on `kvm:kvm_exit`; phases, by the rare trace events that part them.
//! Prints tables and fails nothing; `bench files`, `bench network` and `bench steps` print only that of operations on files,
//! of packets or of single commands.
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

use subject::Subject;

/// Runs before the counted one: page cache, dentries, the file server's handles.
const WARM_UPS: u32 = 2;

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
    match std::env::args().nth(1).as_deref() {
        Some("files") => return files::report(&place),
        Some("network") => return network::report(&place, &trace::Trace::open()?),
        Some("steps") => return steps::report(&place),
        _ => {}
    }
    let trace = trace::Trace::open()?;
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
    files::report(&place)?;
    network::report(&place, &trace)
}

/// Runs a subject and prints its row of the table.
fn row(subject: Subject, place: &subject::Place, trace: &trace::Trace) -> io::Result<()> {
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
fn phases(place: &subject::Place, trace: &trace::Trace) -> io::Result<()> {
    let entry = place.kernel_entry()?;
    let marks = trace.marks(entry, || Subject::Caisson.run(place, &["echo", "on"]))?;
    println!("\n| phase of `caisson run` (busybox `echo`) | M instructions |\n|---|---|");
    for (name, nanos) in marks.phases() {
        println!("| {name} | {} |", millions(nanos));
    }
    let reasons: BTreeMap<String, u64> =
        trace.exits_by_reason(|| Subject::Caisson.run(place, &[]).map(drop))?;
    let list: Vec<String> = reasons
        .iter()
        .map(|(name, n)| format!("{name} {n}"))
        .collect();
    println!("\nVM exits by reason: {}", list.join(", "));
    Ok(())
}

/// Millions with one digit.
fn millions(count: u64) -> String {
    let tenths = count / 100_000;
    format!("{}.{}", tenths / 10, tenths % 10)
}
