//! The client of one command: sends it to the lab's owner, passes streams and signals on, returns the exit status.
//!
//! Threads: this one takes output; one reads standard input, one waits for signals; both write whole frames under a
//! lock. When this process dies the owner sees the socket close and kills the command.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::frame::{self, Kind};
use crate::machine::{repository, shared_directories};
use crate::{CommandLine, LAB_FAILED};

/// Exit status of a command that took too long; `timeout(1)` has the same.
const TIMED_OUT: u8 = 124;

type Sender = Arc<Mutex<UnixStream>>;

/// Runs a command in the lab whose state is in `state`.
pub(crate) fn exec(state: &Path, line: CommandLine) -> io::Result<u8> {
    let socket = state.join("lab.sock");
    let mut lab = UnixStream::connect(&socket)
        .map_err(|e| io::Error::other(format!("not up ({}: {e})", socket.display())))?;
    let deadline = line
        .seconds
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let command = command(line)?;
    let sender = Arc::new(Mutex::new(lab.try_clone()?));
    forward_signals(&sender)?;
    send(&sender, Kind::Run, &serde_json::to_vec(&command)?)?;
    if command.stdin {
        forward_input(&sender);
    }
    loop {
        if let Some(end) = deadline {
            let left = end.saturating_duration_since(Instant::now());
            lab.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        }
        match frame::receive(&mut lab) {
            Ok((Kind::Stdout, bytes)) => show(&mut io::stdout().lock(), &bytes)?,
            Ok((Kind::Stderr, bytes)) => show(&mut io::stderr().lock(), &bytes)?,
            Ok((Kind::Exit, status)) => return Ok(status.first().copied().unwrap_or(LAB_FAILED)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                eprintln!("lab: timed out");
                return Ok(TIMED_OUT);
            }
            Err(error) => return Err(io::Error::other(format!("the lab went away ({error})"))),
        }
    }
}

/// The command with its directory and environment.
fn command(line: CommandLine) -> io::Result<frame::Command> {
    let current = std::env::current_dir()?;
    let is_shared = shared_directories()
        .iter()
        .any(|shared| current.starts_with(shared));
    let dir = line
        .dir
        .unwrap_or_else(|| if is_shared { current } else { "/".into() });
    let bin = line
        .bin
        .unwrap_or_else(|| repository().join("target/x86_64-unknown-linux-gnu/release"));
    let path = format!(
        "{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        std::path::absolute(bin)?.display()
    );
    let mut env = [
        ("PATH", path.as_str()),
        ("HOME", "/root"),
        ("CAISSON_LAB", "1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec();
    for setting in &line.env {
        let (name, value) = setting
            .split_once('=')
            .ok_or_else(|| io::Error::other(format!("-e {setting}: not NAME=VALUE")))?;
        env.push((name.to_owned(), value.to_owned()));
    }
    Ok(frame::Command {
        argv: line.argv,
        env,
        dir: dir.display().to_string(),
        stdin: line.stdin,
    })
}

fn send(lab: &Sender, kind: Kind, payload: &[u8]) -> io::Result<()> {
    frame::send(
        &mut *lab.lock().unwrap_or_else(PoisonError::into_inner),
        kind,
        payload,
    )
}

/// From now on the signals that would end this process go to the command.
fn forward_signals(lab: &Sender) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2])?;
    let lab = Arc::clone(lab);
    thread::spawn(move || {
        for signal in signals.forever() {
            let Ok(number) = u8::try_from(signal) else {
                continue;
            };
            if send(&lab, Kind::Signal, &[number]).is_err() {
                break;
            }
        }
    });
    Ok(())
}

fn forward_input(lab: &Sender) {
    let lab = Arc::clone(lab);
    thread::spawn(move || -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match io::stdin().read(&mut buffer)? {
                0 => return send(&lab, Kind::StdinEnd, &[]),
                length => send(&lab, Kind::Stdin, &buffer[..length])?,
            }
        }
    });
}

fn show(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
