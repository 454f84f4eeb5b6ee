//! What each command of a container's life costs, from `fork` to its exit, on runtimes with runc's command line.

use std::io;
use std::process::Stdio;

use caisson_tests::ruler::{millions, now};

use crate::subject::{Place, Subject};

/// Name of the measured container.
const ID: &str = "steps";

/// Prints a row for each command, a column for each runtime.
pub(crate) fn report(place: &Place) -> io::Result<()> {
    let bundle = place.bundle(&["sleep", "1000"])?.display().to_string();
    let steps: [(&str, &[&str]); 5] = [
        ("`create`", &["create", "-b", &bundle, ID]),
        ("`start`", &["start", ID]),
        ("`exec` of `true`", &["exec", ID, "true"]),
        ("`state`", &["state", ID]),
        ("`delete --force`", &["delete", "--force", ID]),
    ];
    let subjects = [Subject::Crun, Subject::Runc, Subject::Caisson];
    let mut columns = Vec::new();
    for subject in subjects {
        // The first life warms the caches.
        life(place, subject, &steps)?;
        columns.push(life(place, subject, &steps)?);
    }
    println!("\n| command, M instructions | crun | runc | caisson |\n|---|---|---|---|");
    for (index, (name, _)) in steps.iter().enumerate() {
        let costs: Vec<_> = columns
            .iter()
            .map(|column| millions(column[index]))
            .collect();
        println!("| {name} | {} |", costs.join(" | "));
    }
    Ok(())
}

/// One life; what each of its commands cost, in nanoseconds.
fn life(place: &Place, subject: Subject, steps: &[(&str, &[&str])]) -> io::Result<Vec<u64>> {
    let cost = |(name, args): &(&str, &[&str])| {
        let mut command = subject.program(place);
        command
            .args(*args)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let start = now();
        let status = command.status()?;
        let cost = now() - start;
        if status.success() {
            Ok(cost)
        } else {
            let name = format!("{name} with {}: {status}", subject.name());
            Err(io::Error::other(name))
        }
    };
    let result: io::Result<_> = steps.iter().map(cost).collect();
    if result.is_err() {
        // Not to be in the way of the next.
        let mut command = subject.program(place);
        command.args(["delete", "--force", ID]).status()?;
    }
    result
}
