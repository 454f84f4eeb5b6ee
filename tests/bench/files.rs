//! What operations on a container's files cost, in crun's container, in caisson's and under QEMU with virtiofsd: the
//! workloads `file-cost` and `io-cost`, a walk through a large tree, and `git status` in it. `bench files operations`,
//! `patterns` and `tree [DIRECTORIES]` print one of the three.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::subject::{Place, Subject, program_on_path};

/// Whose files are measured.
const SUBJECTS: [Subject; 3] = [Subject::Crun, Subject::Caisson, Subject::MicrovmShare];

/// How many files each operation of `file-cost` is done to.
const FILES: u64 = 200;

/// The tree's directories if nothing else is asked for, and the files in each.
const DIRECTORIES: u64 = 200;
const EACH: u64 = 100;

/// Lines of a workload, and when each arrived.
type Lines = Vec<(String, u64)>;

/// Prints the tables, or the one that is named.
pub(crate) fn report(place: &Place, wanted: &[String]) -> io::Result<()> {
    let root = place.dir.join("bundle/rootfs");
    for name in ["file-cost", "io-cost"] {
        fs::copy(program_on_path(name)?, root.join("bin").join(name))?;
    }
    let is_wanted = |table| wanted.first().is_none_or(|name| name == table);
    if is_wanted("operations") {
        operations(place, &root)?;
    }
    if is_wanted("patterns") {
        patterns(place, &root)?;
    }
    if is_wanted("tree") {
        let number = wanted.get(1).map(|number| number.parse());
        let directories = number.transpose().map_err(io::Error::other)?;
        tree(place, &root, directories.unwrap_or(DIRECTORIES))?;
    }
    Ok(())
}

/// One kind of operation after the other, on small files on a disk.
fn operations(place: &Place, root: &Path) -> io::Result<()> {
    // A run that was stopped leaves files.
    fs::remove_dir_all(root.join("tmp"))?;
    fs::create_dir(root.join("tmp"))?;
    let files = FILES.to_string();
    let columns = measure(place, &["file-cost", "--files", &files, "/tmp"], || Ok(()))?;
    heading("one file, thousand instructions");
    for row in 1..columns[0].len() {
        let cost = |lines: &Lines| (lines[row].1 - lines[row - 1].1) / FILES / 1000;
        print_row(&columns[0][row].0, columns.each_ref().map(cost));
    }
    Ok(())
}

/// Patterns on a large file, which the host has in memory: a disk's waits would be counted.
fn patterns(place: &Place, root: &Path) -> io::Result<()> {
    let data = root.join("data");
    fs::create_dir_all(&data)?;
    mount("tmpfs", &data, "tmpfs", MountFlags::empty(), None)?;
    // A file of its own for each: what another has just changed is asked for at each read.
    let columns = measure(place, &["io-cost", "/data/file"], || match fs::remove_file(
        data.join("file"),
    ) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    unmount(&data, UnmountFlags::DETACH)?;
    let columns = columns?;
    heading("one block of a 16 MiB file, thousand instructions");
    for row in 1..columns[0].len() {
        // The name, and the number of blocks.
        let (name, count) = columns[0][row].0.split_once(" | ").unwrap_or_default();
        let count: u64 = count.parse().map_err(io::Error::other)?;
        let cost = |lines: &Lines| (lines[row].1 - lines[row - 1].1) / count / 1000;
        print_row(name, columns.each_ref().map(cost));
    }
    Ok(())
}

/// Commands that look at all of a large tree, less what a command that does nothing costs.
fn tree(place: &Place, root: &Path, directories: u64) -> io::Result<()> {
    make_tree(root, directories)?;
    let files = directories * EACH;
    heading(&format!(
        "a tree of {files} files, thousand instructions for one"
    ));
    let git = ["/usr/bin/git", "-C", "/tree", "status", "--short"];
    let costs = |subject: Subject| -> io::Result<[u64; 2]> {
        // The first start reads programs from the disk.
        subject.whole(place, &["true"])?;
        let nothing = subject.whole(place, &["true"])?;
        let walk = subject.whole(place, &["du", "-s", "/tree"])?;
        // The first time git learns what the files look like from there.
        subject.lines(place, &git)?;
        let status = subject.whole(place, &git)?;
        Ok([walk, status].map(|all| all.saturating_sub(nothing) / files / 1000))
    };
    let [crun, caisson, microvm] = SUBJECTS.map(costs);
    let columns = [crun?, caisson?, microvm?];
    print_row("`du -s`", columns.map(|costs| costs[0]));
    print_row("`git status`", columns.map(|costs| costs[1]));
    Ok(())
}

/// The tree, committed, and git with the libraries that it needs.
fn make_tree(root: &Path, directories: u64) -> io::Result<()> {
    let tree = root.join("tree");
    if tree.join(".git").exists() {
        return Ok(());
    }
    for directory in 0..directories {
        let directory = tree.join(format!("directory-{directory}"));
        fs::create_dir_all(&directory)?;
        for file in 0..EACH {
            fs::write(
                directory.join(format!("file-{file}.txt")),
                format!("{file}\n"),
            )?;
        }
    }
    // Files beyond the threshold go into one pack, in place of a file for each.
    let script = "set -e; root=$1; cd $root/tree; export HOME=/root; git init -q; \
        git -c core.bigFileThreshold=1 add -A; git -c user.name=b -c user.email=b commit -qm all; \
        mkdir -p $root/usr/bin; cp /usr/bin/git $root/usr/bin/; \
        for library in $(ldd /usr/bin/git | grep -o '/[^ ]*'); do \
          mkdir -p $root$(dirname $library); cp -L $library $root$library; done";
    let status = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(root)
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("make the tree: {status}")))
    }
}

/// The lines of a workload for each subject, with what is done `before` each; all must have done the same.
fn measure(
    place: &Place,
    command: &[&str],
    before: impl Fn() -> io::Result<()>,
) -> io::Result<[Lines; 3]> {
    let lines = |subject: Subject| before().and_then(|()| subject.lines(place, command));
    let [crun, caisson, microvm] = SUBJECTS.map(lines);
    let columns = [crun?, caisson?, microvm?];
    let names =
        |lines: &Lines| -> Vec<String> { lines.iter().map(|line| line.0.clone()).collect() };
    let done = columns.each_ref().map(names);
    if done.iter().all(|names| *names == done[0]) {
        Ok(columns)
    } else {
        Err(io::Error::other(format!(
            "not the same operations: {done:?}"
        )))
    }
}

fn heading(what: &str) {
    println!("\n| {what} | crun | caisson | QEMU and virtiofsd |\n|---|---|---|---|");
}

fn print_row(name: &str, costs: [u64; 3]) {
    println!("| {name} | {} | {} | {} |", costs[0], costs[1], costs[2]);
}
