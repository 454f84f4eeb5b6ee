//! What the kernel of the guest says about processes and about itself: texts of /proc, passed on as they are.
//!
//! Contract: nothing is judged here; the host parses these texts as hostile. What cannot be read is left out: a process
//! may end at any moment.

use caisson_agent_api::{ProcessText, TextFile};
use std::fs::File;
use std::io::Read;

/// As much of a command line as is passed on.
const MAX_COMMAND_BYTES: u64 = 4096;
/// As much of any other file; the kernel's are far smaller.
const MAX_TEXT_BYTES: u64 = 16 << 10;

fn read(path: &str, most: u64) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)
        .ok()?
        .take(most)
        .read_to_end(&mut text)
        .ok()?;
    Some(text)
}

/// A text under its name.
pub(crate) fn text_file(name: &str, text: Vec<u8>) -> TextFile {
    TextFile {
        name: name.to_owned(),
        text,
        ..TextFile::default()
    }
}

/// One process, unless it has ended.
pub(crate) fn process(pid: i32) -> Option<ProcessText> {
    let file = |name: &str, most| read(&format!("/proc/{pid}/{name}"), most);
    Some(ProcessText {
        pid,
        stat: file("stat", MAX_TEXT_BYTES)?,
        status: file("status", MAX_TEXT_BYTES)?,
        cmdline: file("cmdline", MAX_COMMAND_BYTES)?,
        ..ProcessText::default()
    })
}

/// The guest as a whole.
pub(crate) fn system() -> Vec<TextFile> {
    let file = |name: &str| {
        let text = read(&format!("/proc/{name}"), MAX_TEXT_BYTES)?;
        Some(text_file(name, text))
    };
    ["uptime", "stat", "meminfo"]
        .into_iter()
        .filter_map(file)
        .collect()
}
