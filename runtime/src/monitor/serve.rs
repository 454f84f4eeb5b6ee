//! One command's connection to the monitor.

use std::os::fd::{AsFd, BorrowedFd};

use caisson_vmm_spec::Cause;

use super::{
    live::Record,
    membership::{self, Premises},
};
use crate::{
    census::{self, Household, Resident},
    control::{Answer, ControlError, Request, attached, read_attached},
    error,
    network::Follower,
    packet::Packets,
    process_table::Table,
    sandbox::{
        Event, ExecRequest, Exit, INIT, LOST, Refused, Sandbox, SandboxError, Started, Step,
        Streams, Wanted,
        remote::{self, Question},
    },
    state::Status,
    trace::{Trace, Who},
    update::{self, ApplyError},
};

/// The most kills that are told at once, whatever the guest counts.
const MOST_KILLS: u64 = 1000;

/// Answers a command, and follows an `exec` to its end.
pub(super) async fn connection(
    packets: Packets,
    sandbox: Sandbox,
    record: Record,
    network: Follower,
) {
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
            let request = read_attached(fds).map(|process| ExecRequest {
                process_id: record.next_process_id(),
                process,
                wanted: Wanted::all(terminal, preserved),
                ignore_paused,
                seccomp: None,
            });
            return exec(packets, sandbox, &record, request).await;
        }
        Request::Start => {
            // Engines connect a created container's namespace, then start it.
            network.settled().await;
            let mut trace = Trace::default();
            trace.mark(Who::Waiting, "wait for start");
            let started = sandbox.start(&id).await;
            if started.is_ok() {
                trace.mark(Who::Machine, "start the program");
                record.continue_trace(&trace);
            }
            started.map(|()| Some(Status::Running))
        }
        Request::Pause => sandbox.pause(&id).await.map(|()| Some(Status::Paused)),
        // Created, if it has not been started yet.
        Request::Resume => match sandbox.resume(&id).await {
            Ok(()) => sandbox.status(&id).await.map(Some),
            Err(error) => Err(error),
        },
        Request::Signal { signal, all } => {
            sandbox.signal(&id, INIT, signal, all).await.map(|()| None)
        }
        Request::Resize { rows, columns } => sandbox
            .resize(&id, INIT, (rows, columns))
            .await
            .map(|()| None),
        Request::Processes => {
            return reply(&packets, &Answer::Processes(record.host_processes()), &[]).await;
        }
        Request::Table => return table(&packets, sandbox.table(&id).await).await,
        Request::Stats => {
            let answer = match sandbox.stats(&id).await {
                Ok(guest) => Answer::Stats {
                    guest: Box::new(guest),
                    host: record
                        .cgroup()
                        .and_then(|cgroup| cgroup.stats().ok().map(Box::new)),
                },
                Err(error) => Answer::Failed(in_words(&error)),
            };
            return reply(&packets, &answer, &[]).await;
        }
        Request::Census { count } => return census(&packets, &sandbox, &record, count).await,
        Request::Ready => sandbox.ready(&id).await.map(|()| None),
        Request::Watch => return watch(&packets, &sandbox, &id).await,
        Request::Premises => {
            let Premises {
                holder, guest_pid, ..
            } = record.premises().clone();
            return reply(&packets, &Answer::Premises { holder, guest_pid }, &[]).await;
        }
        Request::Join { id } => {
            let (premises, members) = (record.premises().clone(), record.members().clone());
            return membership::hold(packets, sandbox, premises, members, id, fds).await;
        }
        // Said on a connection of `Join` alone.
        Request::Leave => return,
        Request::Member { id, question } => {
            make_room(&sandbox, &record, &id, &question).await;
            let members = record.members();
            return remote::carry_out(&packets, &sandbox, members, &id, question, fds).await;
        }
        Request::Update { resources } => {
            let answer = match update(&sandbox, &record, &id, &resources).await {
                Ok(()) => Answer::Done,
                Err(words) => Answer::Failed(words),
            };
            return reply(&packets, &answer, &[]).await;
        }
    };
    let answer = match done.map(|status| status.map_or(Ok(()), |status| record.set(status))) {
        Ok(Ok(())) => Answer::Done,
        Ok(Err(error)) => Answer::Failed(error::message(&error)),
        Err(error) => Answer::Failed(in_words(&error)),
    };
    reply(&packets, &answer, &[]).await;
}

/// Tells of the container.
async fn census(packets: &Packets, sandbox: &Sandbox, record: &Record, count: bool) {
    let (state, pod) = record.resident();
    let runs = matches!(state.status, Status::Running | Status::Paused);
    let guest = match count && runs {
        true => sandbox.stats(state.id.as_str()).await.ok().map(Box::new),
        false => None,
    };
    let cgroup = record.cgroup().filter(|_| count);
    let household = Household {
        residents: vec![Resident { state, pod, guest }],
        host: cgroup.and_then(|cgroup| cgroup.stats().ok().map(Box::new)),
    };
    match census::file_of(&household) {
        Ok(file) => reply(packets, &Answer::Census, &[file.as_fd()]).await,
        Err(error) => reply(packets, &Answer::Failed(error::message(&error)), &[]).await,
    }
}

async fn table(packets: &Packets, table: Result<Table, SandboxError>) {
    let failed = |error: &dyn std::error::Error| Answer::Failed(error::message(error));
    let file = match table {
        Ok(table) => serde_json::to_vec(&table)
            .map_err(std::io::Error::from)
            .and_then(|json| attached(&json)),
        Err(error) => return reply(packets, &Answer::Failed(in_words(&error)), &[]).await,
    };
    match file {
        Ok(file) => reply(packets, &Answer::Table, &[file.as_fd()]).await,
        Err(error) => reply(packets, &failed(&error), &[]).await,
    }
}

/// Tells each kill for want of memory from now on, until the container ends or the command hangs up.
async fn watch(packets: &Packets, sandbox: &Sandbox, id: &str) {
    let mut seen = match sandbox.stats(id).await {
        Ok(stats) => stats.memory.oom_kills,
        Err(error) => return reply(packets, &Answer::Failed(in_words(&error)), &[]).await,
    };
    reply(packets, &Answer::Done, &[]).await;
    loop {
        let count = tokio::select! {
            count = sandbox.out_of_memory(id, seen) => count,
            _ = packets.receive::<Request>() => return,
        };
        let Ok(count) = count else { return };
        for _ in 0..count.saturating_sub(seen).min(MOST_KILLS) {
            if packets.send(&Answer::OutOfMemory, &[]).await.is_err() {
                return;
            }
        }
        seen = count;
    }
}

/// Changes limits on the host and in the guest.
async fn update(
    sandbox: &Sandbox,
    record: &Record,
    id: &str,
    resources: &str,
) -> Result<(), String> {
    let mut limits = record.limits().await;
    let cgroup = record.cgroup();
    let applied = update::apply(&mut limits, sandbox, id, cgroup.as_ref(), resources).await;
    applied.map_err(|error| match error {
        ApplyError::Sandbox(error) => in_words(&error),
        error => error::message(&error),
    })
}

/// Lets the cgroup that holds the machine hold it when it has grown for a member.
async fn make_room(sandbox: &Sandbox, record: &Record, id: &str, question: &Question) {
    if let Question::Fit {
        step: Step::Grow,
        needs,
    } = question
        && let Some(cgroup) = record.cgroup()
        && let Ok(size) = sandbox.fit(id, Step::Look, *needs).await
    {
        // If it does not get larger the machine has what it had, and whoever uses more ends.
        let _ = cgroup.make_room(size);
    }
}

async fn exec(
    packets: Packets,
    sandbox: Sandbox,
    record: &Record,
    request: Result<ExecRequest, ControlError>,
) {
    let id = &record.id();
    let mut request = match request {
        Ok(request) => request,
        Err(error) => {
            return reply(&packets, &Answer::Failed(error::message(&error)), &[]).await;
        }
    };
    let process_id = request.process_id.clone();
    match record.supervise(packets.peer().unwrap_or(0)).await {
        Ok(seccomp) => request.seccomp = seccomp,
        Err(error) => return reply(&packets, &Answer::Failed(error::message(&error)), &[]).await,
    }
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
    let _stand_in = packets.peer().map(|pid| record.stand_in(pid));
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
        return error::message(error);
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
