//! `run`.

use std::{
    io,
    os::fd::OwnedFd,
    os::unix::process::ExitStatusExt,
    process::{Child, ExitCode, ExitStatus},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Context, delete,
    launch::{LaunchError, Launched, launch},
    start,
    systemd::NotifySocket,
};
use crate::{
    cli::Run,
    error::CommandError,
    forwarded::Signals,
    monitor::{Report, runtime},
    packet::Packets,
    state::StateDir,
    watched::watch,
};

/// Creates and starts a container; in the foreground, follows it to its end and removes it.
pub(super) fn run(args: &Run, context: &Context) -> Result<ExitCode, CommandError> {
    if args.detach {
        let launched = launch(context, &args.launch, true, true)?;
        start::after_run(context, &launched.id)?;
        if let Some(socket) = NotifySocket::of_caller() {
            let dir = context.root.join(launched.id.as_str());
            let told = socket.pass_on(&dir, Some(launched.monitor.pid()));
            told.map_err(CommandError::Notify)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    foreground(args, context)
}

fn foreground(args: &Run, context: &Context) -> Result<ExitCode, CommandError> {
    let failed = |step| move |source| CommandError::Launch(LaunchError::Host { step, source });
    let runtime = runtime().map_err(failed("start an event loop"))?;
    // Caught before the container can tell anyone that it runs: no signal meant for it is lost.
    let mut signals = {
        let _inside = runtime.enter();
        Signals::catch().map_err(failed("catch signals"))?
    };
    let launched = launch(context, &args.launch, false, true)?;
    start::after_run(context, &launched.id)?;
    let Launched { id, monitor, raw } = launched;
    if let Some(socket) = NotifySocket::of_caller() {
        let dir = context.root.join(id.as_str());
        // Ends with the container, or with this process. That nobody hears it is no reason to end the container.
        std::thread::spawn(move || drop(socket.pass_on(&dir, None)));
    }
    let (mut child, socket) = monitor.into_parts();
    let status = runtime
        .block_on(follow(context, &child, socket, &mut signals))
        .and_then(|()| child.wait())
        .map_err(failed("wait for the container's monitor"))?;
    // The terminal is as it was before anything is said.
    drop(raw);
    if !args.keep {
        let dir = StateDir::open(&context.root, &id)?;
        delete::destroy(context, dir)?;
    }
    Ok(exit_code(status))
}

/// Passes signals on until the monitor has ended.
async fn follow(
    context: &Context,
    monitor: &Child,
    socket: OwnedFd,
    signals: &mut Signals,
) -> io::Result<()> {
    let reports = Packets::new(socket)?;
    let process = process_of(monitor)?;
    let mut listening = true;
    loop {
        tokio::select! {
            biased;
            report = reports.receive::<Report>(), if listening => match report {
                Ok(Some((Report::Lost(how), _))) => context.log.error(&how),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => listening = false,
            },
            number = signals.next() => pass_on(&process, number),
            ended = process.readable() => return ended.map(drop),
        }
    }
}

fn process_of(child: &Child) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    watch(pidfd_open(pid, PidfdFlags::empty())?, Interest::READABLE)
}

fn pass_on(process: &AsyncFd<OwnedFd>, number: i32) {
    if let Some(signal) = Signal::from_named_raw(number) {
        // A process that has just ended needs no signal.
        let _ = pidfd_send_signal(process.get_ref(), signal);
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(
        code.and_then(|code| u8::try_from(code).ok())
            .unwrap_or(u8::MAX),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitors_end_is_the_containers() {
        let same = |raw, code: u8| {
            assert_eq!(exit_code(ExitStatus::from_raw(raw)), ExitCode::from(code));
        };
        same(0, 0);
        same(255 << 8, 255);
        same(143 << 8, 143);
        same(9, 137);
    }
}
