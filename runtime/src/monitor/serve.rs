//! One command's connection to the monitor.

use std::os::fd::{AsFd, BorrowedFd};

use caisson_vmm_spec::Cause;

use super::live::Record;
use crate::{
    control::{Answer, ControlError, Request, read_process},
    packet::Packets,
    sandbox::{
        Event, ExecRequest, Exit, INIT, LOST, Refused, Sandbox, SandboxError, Started, Streams,
        Wanted,
    },
    state::Status,
};

/// Answers a command, and follows an `exec` to its end.
pub(super) async fn connection(packets: Packets, sandbox: Sandbox, record: Record) {
    // A command that hangs up or cannot speak is not answered.
    let Ok(Some((request, fds))) = packets.receive::<Request>().await else {
        return;
    };
    let id = record.id();
    let done = match request {
        Request::Exec {
            terminal,
            preserved,
            ignore_paused,
        } => {
            let request = read_process(fds).map(|process| ExecRequest {
                process_id: record.next_process_id(),
                process,
                wanted: Wanted::all(terminal, preserved),
                ignore_paused,
            });
            return exec(packets, sandbox, &id, request).await;
        }
        Request::Start => sandbox.start(&id).await.map(|()| Some(Status::Running)),
        Request::Pause => sandbox.pause(&id).await.map(|()| Some(Status::Paused)),
        Request::Resume => sandbox.resume(&id).await.map(|()| Some(Status::Running)),
        Request::Signal { signal, all } => {
            sandbox.signal(&id, INIT, signal, all).await.map(|()| None)
        }
        Request::Resize { rows, columns } => sandbox
            .resize(&id, INIT, (rows, columns))
            .await
            .map(|()| None),
        Request::Processes => {
            let answer = match sandbox.processes(&id).await {
                Ok(pids) => Answer::Processes(pids),
                Err(error) => Answer::Failed(in_words(&error)),
            };
            return reply(&packets, &answer, &[]).await;
        }
    };
    let answer = match done.map(|status| status.map_or(Ok(()), |status| record.set(status))) {
        Ok(Ok(())) => Answer::Done,
        Ok(Err(error)) => Answer::Failed(crate::error::message(&error)),
        Err(error) => Answer::Failed(in_words(&error)),
    };
    reply(&packets, &answer, &[]).await;
}

async fn exec(
    packets: Packets,
    sandbox: Sandbox,
    id: &str,
    request: Result<ExecRequest, ControlError>,
) {
    let request = match request {
        Ok(request) => request,
        Err(error) => {
            return reply(
                &packets,
                &Answer::Failed(crate::error::message(&error)),
                &[],
            )
            .await;
        }
    };
    let process_id = request.process_id.clone();
    let Started { pid, streams } = match sandbox.exec(id, request).await {
        Ok(started) => started,
        Err(error) => {
            let words = match &error {
                SandboxError::Agent(_) => {
                    format!("unable to start container process: {}", in_words(&error))
                }
                _ => in_words(&error),
            };
            return reply(&packets, &Answer::Failed(words), &[]).await;
        }
    };
    reply(&packets, &Answer::Started { pid }, &borrowed(&streams)).await;
    // The command holds its own copies: with these gone, its end is the streams' end.
    drop(streams);
    let ended = sandbox.wait(id, &process_id);
    tokio::pin!(ended);
    let mut listening = true;
    let exit = loop {
        tokio::select! {
            exit = &mut ended => break exit,
            request = packets.receive::<Request>(), if listening => match request {
                Ok(Some((request, _))) => about_process(&sandbox, id, &process_id, request),
                // A command that is killed leaves its process running, as with runc.
                Ok(None) | Err(_) => listening = false,
            },
        }
    };
    let end = match exit {
        Ok(Exit {
            status,
            stdout_bytes,
            stderr_bytes,
            ..
        }) => Answer::Exited {
            status,
            stdout_bytes,
            stderr_bytes,
        },
        Err(SandboxError::Ended(how)) if how.cause != Cause::PowerOff => {
            Answer::Lost(format!("the virtual machine ended: {how}"))
        }
        // The container's end was the process's end too.
        Err(_) => Answer::Exited {
            status: LOST,
            stdout_bytes: u64::MAX,
            stderr_bytes: u64::MAX,
        },
    };
    reply(&packets, &end, &[]).await;
}

/// What an `exec` says about its own process; not answered.
fn about_process(sandbox: &Sandbox, id: &str, process_id: &str, request: Request) {
    let (sandbox, id, process_id) = (sandbox.clone(), id.to_owned(), process_id.to_owned());
    tokio::spawn(async move {
        // The process may have ended meanwhile.
        let _ = match request {
            Request::Signal { signal, .. } => sandbox.signal(&id, &process_id, signal, false).await,
            Request::Resize { rows, columns } => {
                sandbox.resize(&id, &process_id, (rows, columns)).await
            }
            _ => Ok(()),
        };
    });
}

/// The streams in the order that [`Answer::Started`] promises.
fn borrowed(streams: &Streams) -> Vec<BorrowedFd<'_>> {
    [&streams.stdin, &streams.stdout, &streams.stderr]
        .into_iter()
        .flatten()
        .chain(&streams.preserved)
        .map(AsFd::as_fd)
        .collect()
}

async fn reply(packets: &Packets, answer: &Answer, fds: &[BorrowedFd<'_>]) {
    // A command that was killed does not want its answer.
    let _ = packets.send(answer, fds).await;
}

/// A refusal in runc's words.
fn in_words(error: &SandboxError) -> String {
    let SandboxError::Refused(Refused { from, event }) = error else {
        return crate::error::message(error);
    };
    match (event, from) {
        (Event::Start, Status::Stopped) => "cannot start a container that has stopped".into(),
        (Event::Start, Status::Running) => "cannot start an already running container".into(),
        (Event::Start, from) => format!("cannot start a container in the {from} state"),
        (Event::Signal, _) => "container not running".into(),
        (Event::Exec, Status::Stopped) => "cannot exec in a stopped container".into(),
        (Event::Exec, Status::Paused) => {
            "cannot exec in a paused container (use --ignore-paused to override)".into()
        }
        (Event::Pause, _) => "container not running".into(),
        (Event::Resume, _) => "container not paused".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_in_runcs_words() {
        let words = |from, event| in_words(&SandboxError::Refused(Refused { from, event }));
        assert_eq!(
            words(Status::Stopped, Event::Start),
            "cannot start a container that has stopped"
        );
        assert_eq!(
            words(Status::Running, Event::Start),
            "cannot start an already running container"
        );
        assert_eq!(
            words(Status::Stopped, Event::Signal),
            "container not running"
        );
        assert_eq!(
            words(Status::Creating, Event::Start),
            "cannot start a container in the creating state"
        );
    }
}
