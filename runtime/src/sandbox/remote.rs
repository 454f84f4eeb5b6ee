//! A sandbox that another process of this runtime holds: the same handle, whose questions travel to the holder.
//!
//! ```text
//!  member's monitor: Sandbox --Message--> task here --Question--> holder's control socket --> Sandbox --> Owner
//!                                           ^                            |
//!                                           +---- Reply, descriptors ----+        one connection for each question
//! ```
//!
//! Contract: [`attach`] gives a handle that means the holder's sandbox. The *tie* is the connection that stands for the
//! member: its end, however it comes about, is the member's end in the guest; the holder says over it why the virtual
//! machine ended. [`carry_out`] is the holder's side (`remote/holder.rs`).
//! The stream for a seccomp listener does not wait for the answer: it comes over a socket that is attached to the question.
//! Devices belong to the holder: what concerns interfaces and listening sockets is refused here.
//! Not here: who may join (`monitor/membership.rs`), the connections' frame (`control.rs`).

mod holder;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use caisson_vmm_spec::Cause;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

pub use self::holder::{Member, Members, carry_out};
use super::{
    CreateRequest, Event, ExecRequest, Exit, Refused, Reply as Answered, Sandbox, SandboxError,
    Started, Status, Step, Streams, Wanted, message::Message,
};
use crate::{
    agent::{AgentError, RefusalKind},
    control::{Answer, ControlError, Request, attached, connect, read_attached},
    disks::{About, Disk},
    huge_pages::HugePages,
    packet::{self, Packets},
    process_table::Table,
    sizing::{Needs, VmSize},
    stats::Stats,
    supervision::Handover,
    vmm::Ended,
};

/// How many questions may queue before askers wait.
const INBOX: usize = 64;

/// What a member asks the holder of its sandbox. What is long is in the attached file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Set the container up; attached: its specification.
    Create {
        /// The bundle's path.
        bundle: String,
        /// The streams of its init.
        wanted: Wanted,
        /// The size of shared memory, if it uses it.
        shared_memory_bytes: Option<u64>,
        /// It says when it is ready.
        notify: bool,
        /// Its init has a seccomp listener; attached: where the stream for that goes.
        seccomp: bool,
        /// Its disks; attached: their devices, behind the specification.
        disks: Vec<About>,
        /// Its huge pages.
        huge_pages: HugePages,
    },
    /// Let its init go on.
    Start,
    /// One more process; attached: its `process` object.
    Exec {
        /// Unique in its container.
        process_id: String,
        /// Its streams.
        wanted: Wanted,
        /// Even in a paused container.
        ignore_paused: bool,
        /// As for creation.
        seccomp: bool,
    },
    /// Wait for a process's end.
    Wait {
        /// The process.
        process_id: String,
    },
    /// Send a signal.
    Signal {
        /// The process.
        process_id: String,
        /// The number.
        signal: i32,
        /// To all processes of the container.
        all: bool,
    },
    /// A terminal's size.
    Resize {
        /// The process.
        process_id: String,
        /// Rows and columns.
        size: (u16, u16),
    },
    /// Freeze or thaw.
    Freeze(Event),
    /// The pids in the guest.
    Processes,
    /// The processes, described.
    Table,
    /// What the container uses.
    Stats,
    /// Wait for kills for want of memory beyond these.
    OutOfMemory {
        /// How many are known.
        seen: u64,
    },
    /// Change limits; attached: a `linux.resources` object.
    Update,
    /// What it may use changes.
    Fit {
        /// What is to be done.
        step: Step,
        /// What it may use then.
        needs: Needs,
    },
    /// Wait until the container says that it is ready.
    Ready,
    /// Where it is in its life.
    Status,
    /// Forget it.
    Delete,
}

/// What the holder answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
    /// A process is there; attached are its streams, in the order of [`Streams`].
    Started {
        /// Its pid in the guest.
        pid: u32,
    },
    /// A process has ended.
    Exited(Exit),
    /// Pids.
    Processes(Vec<u32>),
    /// Attached: a [`Table`] as JSON.
    Table,
    /// The numbers.
    Stats(Box<Stats>),
    /// Kills so far.
    Kills(u64),
    /// The status.
    Status(Status),
    /// The virtual machine's.
    Size(VmSize),
    /// Not in this state.
    Refused(Refused),
    /// The agent's words.
    Agent(String),
    /// The words of whatever else went wrong.
    Failed(String),
}

/// A handle to the sandbox that the monitor with the state directory `holder` holds, for the container `id`, which has
/// been tied to it. Must be called inside a runtime.
pub fn attach(holder: PathBuf, id: String, tie: Packets) -> Sandbox {
    let (outbox, inbox) = mpsc::channel(INBOX);
    let (tell, ended) = watch::channel(None);
    tokio::spawn(async move {
        let how = serve(&holder, &id, &tie, inbox).await;
        tell.send_replace(Some(how));
    });
    Sandbox {
        inbox: outbox,
        ended,
        growth: None,
    }
}

/// Carries questions over until the member or the virtual machine has ended; answers why the latter is over for it.
async fn serve(
    holder: &std::path::Path,
    id: &str,
    tie: &Packets,
    mut inbox: mpsc::Receiver<Message>,
) -> Ended {
    loop {
        tokio::select! {
            biased;
            said = tie.receive::<Answer>() => return match said {
                Ok(Some((Answer::SandboxEnded(how), _))) => how,
                _ => ended(Cause::HostError, "the monitor that holds the sandbox is gone"),
            },
            message = inbox.recv() => match message {
                Some(Message::Stop) | None => {
                    // The answer, like the holder's end, says that nothing of the member is left.
                    if tie.send(&Request::Leave, &[]).await.is_ok() {
                        let _ = tie.receive::<Answer>().await;
                    }
                    return ended(Cause::PowerOff, "it was stopped");
                }
                Some(message) => {
                    let (holder, id) = (holder.to_owned(), id.to_owned());
                    tokio::spawn(async move { forward(&holder, &id, message).await });
                }
            }
        }
    }
}

fn ended(cause: Cause, message: &str) -> Ended {
    Ended {
        cause,
        message: message.to_owned(),
        console: Vec::new(),
    }
}

/// Puts one question to the holder and hands its answer on. A holder that hangs up is ending: its member's questions are
/// dropped unanswered, and the tie says why.
async fn forward(holder: &std::path::Path, id: &str, message: Message) {
    let ask = async |question, file| ask_with(holder, id, question, file, None, &[]).await;
    match message {
        Message::Create { request, reply, .. } => {
            let CreateRequest {
                spec,
                bundle,
                wanted,
                shared_memory_bytes,
                activation,
                network: _,
                seccomp,
                // They are the holder's to follow: a member's are plain bind mounts.
                volumes: _,
                holds: _,
                disks,
                huge_pages,
            } = *request;
            if !activation.listening.is_empty() {
                let _ = reply.send(Err(SandboxError::NotHere("take listening sockets over")));
                return;
            }
            let question = Question::Create {
                bundle,
                wanted,
                shared_memory_bytes,
                notify: activation.notify,
                seccomp: seccomp.is_some(),
                disks: disks.iter().map(|disk| disk.about).collect(),
                huge_pages,
            };
            let told = ask_with(holder, id, question, Some(spec), seccomp, &disks).await;
            answer(reply, told, |told| started(told, wanted));
        }
        Message::Exec { request, reply, .. } => {
            let ExecRequest {
                process_id,
                process,
                wanted,
                ignore_paused,
                seccomp,
            } = request;
            let question = Question::Exec {
                process_id,
                wanted,
                ignore_paused,
                seccomp: seccomp.is_some(),
            };
            let told = ask_with(holder, id, question, Some(process), seccomp, &[]).await;
            answer(reply, told, |told| started(told, wanted));
        }
        Message::Ready { reply, .. } => answer(reply, ask(Question::Ready, None).await, done),
        Message::Start { reply, .. } => answer(reply, ask(Question::Start, None).await, done),
        Message::Freeze { event, reply, .. } => {
            answer(reply, ask(Question::Freeze(event), None).await, done);
        }
        Message::Delete { reply, .. } => answer(reply, ask(Question::Delete, None).await, done),
        Message::Update {
            resources, reply, ..
        } => answer(reply, ask(Question::Update, Some(resources)).await, done),
        Message::Fit { step, needs, reply } => {
            let told = ask(Question::Fit { step, needs }, None).await;
            answer(reply, told, |told| match told {
                (Reply::Size(size), _) => Some(size),
                _ => None,
            });
        }
        Message::Signal {
            process_id,
            signal,
            all,
            reply,
            ..
        } => {
            let question = Question::Signal {
                process_id,
                signal,
                all,
            };
            answer(reply, ask(question, None).await, done);
        }
        Message::Resize {
            process_id,
            size,
            reply,
            ..
        } => {
            let question = Question::Resize { process_id, size };
            answer(reply, ask(question, None).await, done);
        }
        Message::Wait {
            process_id, reply, ..
        } => {
            let told = ask(Question::Wait { process_id }, None).await;
            answer(reply, told, |told| match told {
                (Reply::Exited(exit), _) => Some(exit),
                _ => None,
            });
        }
        Message::Processes { reply, .. } => {
            let told = ask(Question::Processes, None).await;
            answer(reply, told, |told| match told {
                (Reply::Processes(pids), _) => Some(pids),
                _ => None,
            });
        }
        Message::Table { reply, .. } => {
            answer(reply, ask(Question::Table, None).await, table);
        }
        Message::Stats { reply, .. } => {
            let told = ask(Question::Stats, None).await;
            answer(reply, told, |told| match told {
                (Reply::Stats(stats), _) => Some(*stats),
                _ => None,
            });
        }
        Message::OutOfMemory { seen, reply, .. } => {
            let told = ask(Question::OutOfMemory { seen }, None).await;
            answer(reply, told, |told| match told {
                (Reply::Kills(count), _) => Some(count),
                _ => None,
            });
        }
        Message::Status { reply, .. } => {
            let told = ask(Question::Status, None).await;
            answer(reply, told, |told| match told {
                (Reply::Status(status), _) => Some(status),
                _ => None,
            });
        }
        Message::Memory { reply, .. }
        | Message::Vcpus { reply, .. }
        | Message::FitGuest { reply, .. }
        | Message::Plug { reply, .. }
        | Message::Unplug { reply, .. }
        | Message::Connect { reply, .. }
        | Message::UpdateVolume { reply, .. }
        | Message::UpdateNetwork { reply, .. } => {
            // Whoever asked may be gone.
            let _ = reply.send(Err(SandboxError::NotHere("change devices")));
        }
        Message::Dial { reply, .. } => {
            let _ = reply.send(Err(SandboxError::NotHere("have the guest connect")));
        }
        Message::Stop | Message::Done(..) => {}
    }
}

type Told = (Reply, Vec<OwnedFd>);

/// `None`: the holder hung up.
async fn ask_with(
    holder: &std::path::Path,
    id: &str,
    question: Question,
    file: Option<Vec<u8>>,
    seccomp: Option<Handover>,
    disks: &[Disk],
) -> Result<Option<Told>, ControlError> {
    let Ok(packets) = connect(holder) else {
        return Ok(None);
    };
    let file = file.map(|bytes| attached(&bytes)).transpose();
    let file = file.map_err(ControlError::Process)?;
    let id = id.to_owned();
    let way = seccomp.map(awaited).transpose();
    let way = way.map_err(ControlError::Process)?;
    let fds = file.iter().map(AsFd::as_fd);
    let fds = fds.chain(way.iter().map(AsFd::as_fd));
    let disks = disks.iter().map(|disk| disk.file.as_fd());
    let fds: Vec<BorrowedFd<'_>> = fds.chain(disks).collect();
    packets
        .send(&Request::Member { id, question }, &fds)
        .await?;
    match packets.receive::<Answer>().await {
        Ok(Some((Answer::Member(reply), fds))) => Ok(Some((reply, fds))),
        Ok(Some(_)) => Err(ControlError::Unexpected),
        Ok(None) | Err(_) => Ok(None),
    }
}

/// A socket over which a stream comes that is then handed in.
fn awaited(handover: Handover) -> io::Result<OwnedFd> {
    let (ours, theirs) = packet::pair()?;
    let ours = Packets::new(ours)?;
    tokio::spawn(async move {
        // Without a stream there is no listener.
        if let Ok(Some(((), fds))) = ours.receive::<()>().await
            && let Some(stream) = fds.into_iter().next()
        {
            let _ = handover.send(stream);
        }
    });
    Ok(theirs)
}

/// Answers with what `take` makes of the reply; nobody is answered by a holder that hung up.
fn answer<T>(
    reply: Answered<T>,
    told: Result<Option<Told>, ControlError>,
    take: impl FnOnce(Told) -> Option<T>,
) {
    let result = match told {
        Ok(None) => return,
        Err(error) => Err(SandboxError::Holder(error)),
        Ok(Some((Reply::Refused(refused), _))) => Err(refused.into()),
        Ok(Some((Reply::Failed(words), _))) => Err(SandboxError::Told(words)),
        Ok(Some((Reply::Agent(message), _))) => Err(SandboxError::Agent(AgentError::Refused {
            kind: RefusalKind::Failed,
            message,
        })),
        Ok(Some(told)) => take(told).ok_or(SandboxError::Holder(ControlError::Unexpected)),
    };
    // Whoever asked may be gone.
    let _ = reply.send(result);
}

fn done((reply, _): Told) -> Option<()> {
    (reply == Reply::Done).then_some(())
}

fn table((reply, fds): Told) -> Option<Table> {
    let bytes = read_attached(fds).ok().filter(|_| reply == Reply::Table)?;
    serde_json::from_slice(&bytes).ok()
}

/// Takes the streams apart that came attached; all that were wanted must be there.
fn started((reply, fds): Told, wanted: Wanted) -> Option<Started> {
    let Reply::Started { pid } = reply else {
        return None;
    };
    let mut fds = fds.into_iter();
    let mut next = |wanted: bool| match wanted {
        true => fds.next().map(Some),
        false => Some(None),
    };
    let mut streams = Streams {
        stdin: next(wanted.stdin)?,
        stdout: next(wanted.stdout)?,
        stderr: next(wanted.stderr)?,
        resolver: next(wanted.resolver)?,
        preserved: Vec::new(),
    };
    streams.preserved.extend(fds);
    let preserved = u32::try_from(streams.preserved.len()).ok()?;
    (preserved == wanted.preserved).then_some(Started { pid, streams })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(count: usize) -> Vec<OwnedFd> {
        let one = |_| crate::packet::pair().unwrap().0;
        (0..count).map(one).collect()
    }

    #[test]
    fn streams_are_told_apart_by_what_was_wanted() {
        let wanted = Wanted::all(true, 2);
        let started = |count| super::started((Reply::Started { pid: 7 }, streams(count)), wanted);
        let process = started(4).unwrap();
        assert_eq!(process.pid, 7);
        assert!(process.streams.stdin.is_some() && process.streams.stdout.is_some());
        assert!(process.streams.stderr.is_none());
        assert_eq!(process.streams.preserved.len(), 2);
        assert!(started(3).is_none() && started(5).is_none() && started(1).is_none());
        assert!(super::started((Reply::Done, streams(4)), wanted).is_none());
    }

    #[tokio::test]
    async fn a_member_hears_why_the_virtual_machine_ended() {
        let (member, holder) = crate::packet::pair().unwrap();
        let holder = Packets::new(holder).unwrap();
        let tie = Packets::new(member).unwrap();
        let sandbox = attach("/nonexistent".into(), "m".into(), tie);
        let why = ended(Cause::GuestPanic, "the guest panicked");
        let said = Answer::SandboxEnded(why.clone());
        holder.send(&said, &[]).await.unwrap();
        assert_eq!(sandbox.ended().await, why);
        // A question that nobody answers any more says the same.
        let error = sandbox.start("m").await.unwrap_err();
        assert!(error.to_string().contains("the guest panicked"), "{error}");
    }

    #[tokio::test]
    async fn the_stream_of_a_listener_takes_a_way_of_its_own() {
        let (handover, stream) = tokio::sync::oneshot::channel();
        let file: OwnedFd = attached(b"process").unwrap().into();
        let mut fds = vec![file, awaited(handover).unwrap()];
        let (process, passed) = holder::attachments(&mut fds, true).unwrap();
        assert_eq!(process, b"process");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        passed.unwrap().send(theirs.into()).unwrap();
        let arrived = std::os::unix::net::UnixStream::from(stream.await.unwrap());
        std::io::Write::write_all(&mut &arrived, b"x").unwrap();
        std::io::Read::read_exact(&mut &ours, &mut [0]).unwrap();
        // One of a holder that refuses is dropped.
        let (handover, stream) = tokio::sync::oneshot::channel::<OwnedFd>();
        drop(awaited(handover).unwrap());
        assert!(stream.await.is_err());
        assert!(holder::attachments(&mut streams(1), true).is_err());
    }

    #[tokio::test]
    async fn who_stops_leaves_and_waits_for_the_answer() {
        let (member, holder) = crate::packet::pair().unwrap();
        let holder = Packets::new(holder).unwrap();
        let tie = Packets::new(member).unwrap();
        let sandbox = attach("/nonexistent".into(), "m".into(), tie);
        let left = async {
            let (request, _) = holder.receive::<Request>().await.unwrap().unwrap();
            assert_eq!(request, Request::Leave);
            holder.send(&Answer::Done, &[]).await.unwrap();
        };
        let (how, ()) = tokio::join!(sandbox.stop(), left);
        assert_eq!(how.cause, Cause::PowerOff);
    }
}
