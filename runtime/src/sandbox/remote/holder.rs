//! The holder's side of a member's questions.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{Question, Reply};
use crate::{
    agent::Activation,
    control::{Answer, ControlError, attached, read_attached},
    disks::{About, Disk},
    packet::Packets,
    sandbox::{CreateRequest, Event, ExecRequest, Sandbox, SandboxError, Started, Streams},
    supervision::Handover,
};

/// Carries a member's question out and answers it.
pub async fn carry_out(
    packets: &Packets,
    sandbox: &Sandbox,
    id: &str,
    question: Question,
    mut fds: Vec<OwnedFd>,
) {
    let mut streams = Streams::default();
    let mut file = None;
    let done = match question {
        Question::Create {
            bundle,
            wanted,
            shared_memory_bytes,
            notify,
            seccomp,
            disks: about,
            huge_pages,
        } => match split_off(&mut fds, &about)
            .and_then(|disks| Ok((attachments(&mut fds, seccomp)?, disks)))
        {
            Ok(((spec, seccomp), disks)) => {
                let request = CreateRequest {
                    spec,
                    bundle,
                    wanted,
                    network: Default::default(),
                    shared_memory_bytes,
                    activation: Activation {
                        listening: Vec::new(),
                        notify,
                    },
                    seccomp,
                    volumes: Vec::new(),
                    holds: false,
                    disks,
                    huge_pages,
                };
                keep(&mut streams, sandbox.create(id, request).await)
            }
            Err(error) => Err(error),
        },
        Question::Exec {
            process_id,
            wanted,
            ignore_paused,
            seccomp,
        } => match attachments(&mut fds, seccomp) {
            Ok((process, seccomp)) => {
                let request = ExecRequest {
                    process_id,
                    process,
                    wanted,
                    ignore_paused,
                    seccomp,
                };
                keep(&mut streams, sandbox.exec(id, request).await)
            }
            Err(error) => Err(error),
        },
        Question::Ready => sandbox.ready(id).await.map(|()| Reply::Done),
        Question::Start => sandbox.start(id).await.map(|()| Reply::Done),
        Question::Wait { process_id } => sandbox.wait(id, &process_id).await.map(Reply::Exited),
        Question::Signal {
            process_id,
            signal,
            all,
        } => {
            let sent = sandbox.signal(id, &process_id, signal, all).await;
            sent.map(|()| Reply::Done)
        }
        Question::Resize { process_id, size } => {
            let done = sandbox.resize(id, &process_id, size).await;
            done.map(|()| Reply::Done)
        }
        Question::Freeze(Event::Resume) => sandbox.resume(id).await.map(|()| Reply::Done),
        Question::Freeze(_) => sandbox.pause(id).await.map(|()| Reply::Done),
        Question::Processes => sandbox.processes(id).await.map(Reply::Processes),
        Question::Table => match sandbox.table(id).await {
            Ok(table) => serde_json::to_vec(&table)
                .map_err(io::Error::from)
                .and_then(|json| attached(&json))
                .map(|json| {
                    file = Some(json);
                    Reply::Table
                })
                .map_err(|error| SandboxError::Holder(ControlError::Process(error))),
            Err(error) => Err(error),
        },
        Question::Stats => {
            let stats = sandbox.stats(id).await;
            stats.map(|stats| Reply::Stats(Box::new(stats)))
        }
        Question::OutOfMemory { seen } => sandbox.out_of_memory(id, seen).await.map(Reply::Kills),
        Question::Update => match file_of(fds) {
            Ok(resources) => sandbox.update(id, resources).await.map(|()| Reply::Done),
            Err(error) => Err(error),
        },
        Question::Fit { step, needs } => sandbox.fit(id, step, needs).await.map(Reply::Size),
        Question::Status => sandbox.status(id).await.map(Reply::Status),
        Question::Delete => sandbox.delete(id).await.map(|()| Reply::Done),
    };
    let reply = match done {
        Ok(reply) => reply,
        // Unanswered: the member learns it over its tie.
        Err(SandboxError::Ended(_)) => return,
        Err(SandboxError::Refused(refused)) => Reply::Refused(refused),
        Err(SandboxError::Agent(error)) => Reply::Agent(crate::error::message(&error)),
        Err(error) => Reply::Failed(crate::error::message(&error)),
    };
    let plain = [
        &streams.stdin,
        &streams.stdout,
        &streams.stderr,
        &streams.resolver,
    ];
    let fds: Vec<BorrowedFd<'_>> = plain
        .into_iter()
        .flatten()
        .chain(&streams.preserved)
        .map(AsFd::as_fd)
        .chain(file.iter().map(AsFd::as_fd))
        .collect();
    // A member that was killed does not want its answer.
    let _ = packets.send(&Answer::Member(reply), &fds).await;
}

/// What comes with a process: its description, and where the stream for its listener goes.
pub(super) fn attachments(
    fds: &mut Vec<OwnedFd>,
    seccomp: bool,
) -> Result<(Vec<u8>, Option<Handover>), SandboxError> {
    let handover = seccomp.then(|| passed_on(fds)).transpose()?;
    Ok((file_of(std::mem::take(fds))?, handover))
}

/// The devices of disks, which are the last that were attached.
fn split_off(fds: &mut Vec<OwnedFd>, about: &[About]) -> Result<Vec<Disk>, SandboxError> {
    let first = fds.len().checked_sub(about.len());
    let first = first.ok_or(SandboxError::Holder(ControlError::Unexpected))?;
    let disks = about.iter().zip(fds.split_off(first));
    let disk = |(about, file): (&About, OwnedFd)| Disk {
        about: *about,
        file,
    };
    Ok(disks.map(disk).collect())
}

fn file_of(fds: Vec<OwnedFd>) -> Result<Vec<u8>, SandboxError> {
    read_attached(fds).map_err(SandboxError::Holder)
}

fn keep(
    streams: &mut Streams,
    started: Result<Started, SandboxError>,
) -> Result<Reply, SandboxError> {
    let Started { pid, streams: new } = started?;
    *streams = new;
    Ok(Reply::Started { pid })
}

/// The holder's end of the way that the stream for a listener takes.
fn passed_on(fds: &mut Vec<OwnedFd>) -> Result<Handover, SandboxError> {
    let nothing = || SandboxError::Holder(ControlError::Unexpected);
    let way = fds.pop().filter(|_| !fds.is_empty()).ok_or_else(nothing)?;
    let way = Packets::new(way)
        .map_err(ControlError::Process)
        .map_err(SandboxError::Holder)?;
    let (handover, stream) = tokio::sync::oneshot::channel::<OwnedFd>();
    tokio::spawn(async move {
        if let Ok(stream) = stream.await {
            // A member that has been killed does not take it.
            let _ = way.send(&(), &[stream.as_fd()]).await;
        }
    });
    Ok(handover)
}
