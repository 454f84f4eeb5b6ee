//! What operations on a container's files cost: the workload `file-cost` in crun's container and in caisson's.
//!
//! In the guest the clock counts like the lab's: it is the host's, scaled.

use std::fs;
use std::io;

use crate::subject::{Place, Subject, program_on_path};

/// Prints the table.
pub(crate) fn report(place: &Place) -> io::Result<()> {
    let program = program_on_path("file-cost")?;
    fs::copy(program, place.dir.join("bundle/rootfs/bin/file-cost"))?;
    let measured = |subject: Subject| -> io::Result<Vec<(String, u64)>> {
        let text = subject.output(place, &["file-cost", "/tmp"])?;
        let parsed = text.lines().filter_map(|line| {
            let (name, cost) = line.split_once(' ')?;
            Some((name.to_owned(), cost.parse().ok()?))
        });
        Ok(parsed.collect())
    };
    let (crun, caisson) = (measured(Subject::Crun)?, measured(Subject::Caisson)?);
    println!("\n| one file | crun, thousand instructions | caisson |\n|---|---|---|");
    for ((name, host), (_, guest)) in crun.iter().zip(&caisson) {
        println!("| {name} | {} | {} |", host / 1000, guest / 1000);
    }
    Ok(())
}
