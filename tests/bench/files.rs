//! What operations on a container's files cost: the workload `file-cost` in crun's container and in caisson's.

use std::fs;
use std::io;

use crate::subject::{Place, Subject, program_on_path};

/// How many files each operation is done to.
const FILES: u64 = 200;

/// Prints the table.
pub(crate) fn report(place: &Place) -> io::Result<()> {
    let program = program_on_path("file-cost")?;
    fs::copy(program, place.dir.join("bundle/rootfs/bin/file-cost"))?;
    let files = FILES.to_string();
    let measured =
        |subject: Subject| subject.lines(place, &["file-cost", "--files", &files, "/tmp"]);
    let (crun, caisson) = (measured(Subject::Crun)?, measured(Subject::Caisson)?);
    println!("\n| one file | crun, thousand instructions | caisson |\n|---|---|---|");
    for (host, guest) in crun.windows(2).zip(caisson.windows(2)) {
        let cost = |pair: &[(String, u64)]| (pair[1].1 - pair[0].1) / FILES / 1000;
        println!("| {} | {} | {} |", host[1].0, cost(host), cost(guest));
    }
    Ok(())
}
