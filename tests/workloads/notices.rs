//! `notices`: prints what inotify(7) tells of files and directories, one event a line: what happened and to which name.
//!
//! The first line is `ready`: from then on nothing is missed. The name of a directory ends in a slash; an event of the
//! watched file itself has none. Ends with status 0 after the line that `--until` names.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};

/// What is watched for, and the word for it.
const EVENTS: &[(WatchFlags, ReadFlags, &str)] = &[
    (WatchFlags::CREATE, ReadFlags::CREATE, "create"),
    (WatchFlags::DELETE, ReadFlags::DELETE, "delete"),
    (WatchFlags::MOVED_FROM, ReadFlags::MOVED_FROM, "moved-from"),
    (WatchFlags::MOVED_TO, ReadFlags::MOVED_TO, "moved-to"),
    (WatchFlags::DELETE_SELF, ReadFlags::DELETE_SELF, "deleted"),
];

#[derive(Parser)]
#[command(name = "notices", about = "Prints what inotify tells")]
struct Cli {
    /// End with status 0 after this line.
    #[arg(long, value_name = "LINE")]
    until: Option<String>,
    /// What to watch.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
}

fn main() -> ExitCode {
    match print(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("notices: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(cli: &Cli) -> io::Result<()> {
    let notices = inotify::init(CreateFlags::CLOEXEC)?;
    let all = EVENTS
        .iter()
        .fold(WatchFlags::empty(), |all, (flag, ..)| all.union(*flag));
    for path in &cli.paths {
        inotify::add_watch(&notices, path, all)?;
    }
    line("ready")?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(notices, &mut buffer);
    loop {
        let event = reader.next()?;
        let name = event.file_name().unwrap_or_default().to_string_lossy();
        let happened = EVENTS
            .iter()
            .filter(|(_, flag, _)| event.events().contains(*flag));
        for (.., word) in happened {
            let slash = match event.events().contains(ReadFlags::ISDIR) {
                true => "/",
                false => "",
            };
            let text = format!("{word} {name}{slash}");
            line(&text)?;
            if cli.until.as_ref() == Some(&text) {
                return Ok(());
            }
        }
    }
}

fn line(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}
