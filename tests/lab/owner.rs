//! The process that owns a lab: parent of QEMU and of the file servers, and switchboard of the commands.
//!
//! `lab up` starts it and returns when the guest has said hello on every port, or with the reason why it did not.
//! Each of its threads holds one virtio-serial port for ever and serves one client of `lab.sock` at a time: a port
//! never sees a connection end, so frames cannot be torn. A client that goes away has its command killed; the thread
//! takes the next client when that command is over.
//!
//! `lab down` kills the owner; its children die with it (parent-death signal). All of them hold the lock file open, so
//! taking that lock is the event that nothing is left.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal};

use crate::frame::{self, Kind};
use crate::image;
use crate::machine::{Machine, Shape};
use crate::mend::mend;

/// How long the lab may take to boot: 5 s of work, on a machine that may have other things to do.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Written to standard output by the owner when the lab is up.
const READY: &[u8] = b"ready";

/// Starts a lab and returns when it takes commands; does nothing if it is up.
pub(crate) fn up(state: &Path, shape: &Shape) -> io::Result<()> {
    fs::create_dir_all(state)?;
    if is_up(state)? {
        return Ok(());
    }
    image::image(shape.image)?;
    let mut owner = Command::new(std::env::current_exe()?)
        .arg("--state")
        .arg(state)
        .arg("own")
        .args(shape.arguments())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(state.join("owner.log"))?)
        .spawn()?;
    let Some(mut ready) = owner.stdout.take() else {
        return Ok(());
    };
    let limit = Timespec::try_from(BOOT_LIMIT).map_err(io::Error::other)?;
    let mut said = Vec::new();
    if poll(&mut [PollFd::new(&ready, PollFlags::IN)], Some(&limit))? > 0 {
        let mut buffer = [0; READY.len()];
        let length = ready.read(&mut buffer)?;
        said.extend_from_slice(&buffer[..length]);
    }
    if said == READY {
        return Ok(());
    }
    down(state)?;
    Err(io::Error::other(format!(
        "the lab did not boot:\n{}",
        last_words(state)
    )))
}

/// The ends of the logs of a lab that failed.
fn last_words(state: &Path) -> String {
    let tail = |name: &str| {
        let text = fs::read(state.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().rev().take(10).collect();
        lines
            .into_iter()
            .rev()
            .map(|line| format!("  {name}: {line}\n"))
            .collect::<String>()
    };
    ["console", "qemu.log", "owner.log"].map(tail).concat()
}

/// Whether a lab takes commands.
pub(crate) fn is_up(state: &Path) -> io::Result<bool> {
    Ok(
        lock(state, FlockOperation::NonBlockingLockExclusive)?.is_none()
            && UnixStream::connect(state.join("lab.sock")).is_ok(),
    )
}

/// Stops a lab; returns when all of its processes have ended.
pub(crate) fn down(state: &Path) -> io::Result<()> {
    if !state.exists() || lock(state, FlockOperation::NonBlockingLockExclusive)?.is_some() {
        return Ok(());
    }
    let pid = fs::read_to_string(state.join("pid"))?;
    if let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
    lock(state, FlockOperation::LockExclusive).map(|_| ())
}

/// The lock that every process of a lab holds; `None` if it is held and `operation` does not wait.
fn lock(state: &Path, operation: FlockOperation) -> io::Result<Option<File>> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(state.join("lock"))?;
    match flock(&file, operation) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The owner itself: starts the machine and serves until QEMU ends.
pub(crate) fn own(state: &Path, shape: &Shape) -> io::Result<()> {
    rustix::process::setsid()?;
    let lock = lock(state, FlockOperation::NonBlockingLockExclusive)?
        .ok_or_else(|| io::Error::other("another lab runs in this state directory"))?;
    rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty())?;
    fs::write(state.join("pid"), std::process::id().to_string())?;

    let Machine {
        mut qemu,
        ports,
        file_servers: _servers,
    } = Machine::start(state, shape)?;
    let socket = state.join("lab.sock");
    let _ = fs::remove_file(&socket);
    let clients = Arc::new(UnixListener::bind(socket)?);
    let (up, hellos) = mpsc::channel();
    let (count, pid) = (ports.len(), qemu.id());
    for port in ports {
        let (clients, up) = (Arc::clone(&clients), up.clone());
        thread::spawn(move || {
            if let Err(error) = serve(port, &clients, &up) {
                eprintln!("lab: {error}");
            }
        });
    }
    thread::spawn(move || {
        if hellos.iter().take(count).count() == count {
            if let Err(error) = mend(pid) {
                eprintln!("lab: QEMU is used as it is: {error}");
            }
            let _ = io::stdout()
                .write_all(READY)
                .and_then(|()| io::stdout().flush());
        }
    });
    let status = qemu.wait()?;
    Err(io::Error::other(format!("qemu ended: {status}")))
}

/// Serves clients on one port, one after the other.
fn serve(mut port: UnixStream, clients: &UnixListener, up: &mpsc::Sender<()>) -> io::Result<()> {
    while frame::receive(&mut port)?.0 != Kind::Hello {}
    let _ = up.send(());
    loop {
        let (mut client, _) = clients.accept()?;
        let Ok((Kind::Run, command)) = frame::receive(&mut client) else {
            continue;
        };
        frame::send(&mut port, Kind::Run, &command)?;
        let input = {
            let (client, port) = (client.try_clone()?, port.try_clone()?);
            thread::spawn(move || forward_input(client, port))
        };
        loop {
            let (kind, payload) = frame::receive(&mut port)?;
            // A client that is gone does not stop its command's output: the command is on its way to its end.
            let _ = frame::send(&mut client, kind, &payload);
            if kind == Kind::Exit {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = input.join();
    }
}

/// Passes a client's frames on until it closes; then kills its command, which is no harm if it has ended.
fn forward_input(mut client: UnixStream, mut port: UnixStream) -> io::Result<()> {
    while let Ok((kind, payload)) = frame::receive(&mut client) {
        if matches!(kind, Kind::Stdin | Kind::StdinEnd | Kind::Signal) {
            frame::send(&mut port, kind, &payload)?;
        }
    }
    let kill = u8::try_from(Signal::KILL.as_raw()).map_err(io::Error::other)?;
    frame::send(&mut port, Kind::Signal, &[kill])
}
