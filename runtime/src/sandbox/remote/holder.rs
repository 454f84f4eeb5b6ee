//! The holder's side: who has joined, and what they ask.
//!
//! Contract: a container is created only for a member whose tie holds, and its creation is over, with its answer sent,
//! before [`Member::clear`] looks for it: whatever is created is somebody's, or is taken away again.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync;

use super::{Question, Reply};
use crate::{
    agent::Activation,
    control::{Answer, ControlError, attached, read_attached},
    disks::{About, Disk},
    packet::Packets,
    sandbox::{CreateRequest, Event, ExecRequest, Sandbox, SandboxError, Started, Streams},
    supervision::Handover,
};

/// The containers that have joined a sandbox of this process; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Members(
    /// Held for a moment, never across an await.
    Arc<Mutex<HashMap<String, Arc<Tie>>>>,
);

#[derive(Debug)]
struct Tie {
    /// The member's monitor.
    process: Option<u32>,
    /// Held while it is created in the guest, and until it has been told. Whether the tie has ended.
    is_over: sync::Mutex<bool>,
}

/// A member, until it is dropped.
#[derive(Debug)]
pub struct Member {
    id: String,
    tie: Arc<Tie>,
    all: Members,
}

impl Members {
    /// Takes a member up, whose monitor is `process`; none if there is one of that name.
    pub fn enter(&self, id: &str, process: Option<u32>) -> Option<Member> {
        let tie = Tie {
            process,
            is_over: sync::Mutex::new(false),
        };
        match self.lock().entry(id.to_owned()) {
            Entry::Occupied(_) => None,
            Entry::Vacant(free) => Some(Member {
                id: id.to_owned(),
                tie: Arc::clone(free.insert(Arc::new(tie))),
                all: self.clone(),
            }),
        }
    }

    /// The member of whose name and process a question is.
    fn find(&self, id: &str, process: Option<u32>) -> Option<Arc<Tie>> {
        let tie = self.lock().get(id).cloned();
        tie.filter(|tie| tie.process == process)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Tie>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    /// Removes it from the guest, also if it is just being created there. From here on it is created no more.
    pub async fn clear(&self, sandbox: &Sandbox) {
        *self.tie.is_over.lock().await = true;
        sandbox.destroy(&self.id).await;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.all.lock().remove(&self.id);
    }
}

/// Carries a member's question out and answers it.
pub async fn carry_out(
    packets: &Packets,
    sandbox: &Sandbox,
    members: &Members,
    id: &str,
    question: Question,
    fds: Vec<OwnedFd>,
) {
    let tie = members.find(id, packets.peer());
    // A member that was killed does not want its answers, but for one.
    let Some(tie) = tie else {
        send(packets, stranger(), &[]).await;
        return;
    };
    if !matches!(question, Question::Create { .. }) {
        answer(packets, sandbox, id, question, fds).await;
        return;
    }
    let is_over = tie.is_over.lock().await;
    if *is_over {
        send(packets, stranger(), &[]).await;
    } else if !answer(packets, sandbox, id, question, fds).await {
        // It is nobody's, if it is there.
        sandbox.destroy(id).await;
    }
}

fn stranger() -> Reply {
    Reply::Failed(SandboxError::NotFound("container").to_string())
}

/// Whether it has been sent.
async fn send(packets: &Packets, reply: Reply, fds: &[BorrowedFd<'_>]) -> bool {
    packets.send(&Answer::Member(reply), fds).await.is_ok()
}

/// Whether the member has its answer.
async fn answer(
    packets: &Packets,
    sandbox: &Sandbox,
    id: &str,
    question: Question,
    mut fds: Vec<OwnedFd>,
) -> bool {
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
        Err(SandboxError::Ended(_)) => return false,
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
    send(packets, reply, &fds).await
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

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::sandbox::{Exit, message::Message};

    /// A sandbox, and what reaches its owner.
    fn sandbox() -> (Sandbox, mpsc::Receiver<Message>) {
        let (inbox, messages) = mpsc::channel(8);
        let ended = watch::channel(None).1;
        let sandbox = Sandbox {
            inbox,
            ended,
            growth: None,
        };
        (sandbox, messages)
    }

    /// Plays the owner until it is asked no more; answers what it was asked.
    async fn play(mut messages: mpsc::Receiver<Message>) -> Vec<&'static str> {
        let mut asked = Vec::new();
        while let Some(message) = messages.recv().await {
            asked.push(match message {
                Message::Create { reply, .. } => {
                    tokio::task::yield_now().await;
                    let streams = Streams::default();
                    let _ = reply.send(Ok(Started { pid: 7, streams }));
                    "create"
                }
                Message::Signal { reply, .. } => {
                    let _ = reply.send(Ok(()));
                    "signal"
                }
                Message::Wait { reply, .. } => {
                    let exit = Exit {
                        status: 137,
                        oom_killed: false,
                        stdout_bytes: 0,
                        stderr_bytes: 0,
                    };
                    let _ = reply.send(Ok(exit));
                    "wait"
                }
                Message::Delete { reply, .. } => {
                    let _ = reply.send(Ok(()));
                    "delete"
                }
                _ => "other",
            });
        }
        asked
    }

    fn create() -> (Question, Vec<OwnedFd>) {
        let question = Question::Create {
            bundle: "/b".to_owned(),
            wanted: Default::default(),
            shared_memory_bytes: None,
            notify: false,
            seccomp: false,
            disks: Vec::new(),
            huge_pages: Default::default(),
        };
        (question, vec![attached(b"{}").unwrap().into()])
    }

    /// This process is the member, too.
    fn packets() -> (Packets, Packets) {
        let (ours, theirs) = crate::packet::pair().unwrap();
        (Packets::new(ours).unwrap(), Packets::new(theirs).unwrap())
    }

    #[tokio::test]
    async fn what_is_created_for_nobody_is_taken_away_again() {
        let (sandbox, messages) = sandbox();
        let members = Members::default();
        let (ours, theirs) = packets();
        let _member = members.enter("m", ours.peer()).unwrap();
        drop(theirs);
        let carried_out = async move {
            let (question, fds) = create();
            carry_out(&ours, &sandbox, &members, "m", question, fds).await;
            drop(sandbox);
        };
        let (asked, ()) = tokio::join!(play(messages), carried_out);
        assert_eq!(asked, ["create", "signal", "wait", "delete"]);
    }

    #[tokio::test]
    async fn a_member_is_cleared_away_after_its_creation_and_not_created_afterwards() {
        let (sandbox, messages) = sandbox();
        let members = Members::default();
        let (ours, theirs) = packets();
        let member = members.enter("m", ours.peer()).unwrap();
        let carried_out = async move {
            let (question, fds) = create();
            let creating = carry_out(&ours, &sandbox, &members, "m", question, fds);
            tokio::join!(creating, member.clear(&sandbox));
            assert!(matches!(
                theirs.receive().await.unwrap().unwrap().0,
                Answer::Member(Reply::Started { pid: 7 })
            ));
            let (question, fds) = create();
            carry_out(&ours, &sandbox, &members, "m", question, fds).await;
            assert!(matches!(
                theirs.receive().await.unwrap().unwrap().0,
                Answer::Member(Reply::Failed(_))
            ));
        };
        let (asked, ()) = tokio::join!(play(messages), carried_out);
        assert_eq!(asked, ["create", "signal", "wait", "delete"]);
    }

    #[tokio::test]
    async fn a_question_is_carried_out_for_the_members_own_process_alone() {
        let (sandbox, messages) = sandbox();
        let members = Members::default();
        let (ours, theirs) = packets();
        let member = members.enter("m", Some(u32::MAX)).unwrap();
        assert!(members.enter("m", None).is_none());
        let carried_out = async move {
            for id in ["m", "other"] {
                carry_out(&ours, &sandbox, &members, id, Question::Delete, Vec::new()).await;
                let (answer, _) = theirs.receive::<Answer>().await.unwrap().unwrap();
                let words = "no such container".to_owned();
                assert_eq!(answer, Answer::Member(Reply::Failed(words)));
            }
            drop(member);
            assert!(members.enter("m", None).is_some());
        };
        let (asked, ()) = tokio::join!(play(messages), carried_out);
        assert!(asked.is_empty(), "{asked:?}");
    }
}
