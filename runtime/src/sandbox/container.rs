//! A container as its owner sees it: where it is in its life, its processes, and who waits for their ends.

use std::collections::HashMap;

use tokio::sync::oneshot;

use super::{Event, Exit, INIT, Refused, Reply, SandboxError, Status, after};

/// One container.
#[derive(Debug)]
pub(super) struct Container {
    status: Status,
    /// Its program has been let go on.
    started: bool,
    /// Init under [`INIT`], and what `exec` started.
    processes: HashMap<String, Process>,
}

/// A process: still running for as long as it has no exit.
#[derive(Debug, Default)]
struct Process {
    exit: Option<Exit>,
    waiting: Vec<Reply<Exit>>,
    /// Dropped at its end.
    held: Vec<oneshot::Sender<()>>,
}

impl Container {
    /// One that the agent has been asked to create.
    pub(super) fn new() -> Self {
        Self {
            status: Status::Creating,
            started: false,
            processes: HashMap::new(),
        }
    }

    pub(super) fn status(&self) -> Status {
        self.status
    }

    /// Whether `event` may happen now.
    pub(super) fn allows(&self, event: Event) -> Result<(), SandboxError> {
        Ok(after(self.status, event).map(drop)?)
    }

    /// `event` has happened. What the table does not have changes nothing: a container that has ended stays ended.
    pub(super) fn advance(&mut self, event: Event) {
        if let Ok(status) = after(self.status, event) {
            self.started |= event == Event::Start;
            self.status = match event {
                Event::Resume if !self.started => Status::Created,
                _ => status,
            };
        }
    }

    /// The agent has created it.
    pub(super) fn created(&mut self) {
        self.advance(Event::Created);
        self.processes.insert(INIT.to_owned(), Process::default());
    }

    /// Takes up a further process that the agent is asked to start.
    pub(super) fn add(
        &mut self,
        process_id: &str,
        ignore_paused: bool,
    ) -> Result<(), SandboxError> {
        self.allows(Event::Exec)?;
        if self.status == Status::Paused && !ignore_paused {
            return Err(Refused {
                from: Status::Paused,
                event: Event::Exec,
            }
            .into());
        }
        if process_id == INIT || self.processes.contains_key(process_id) {
            return Err(SandboxError::Exists("process"));
        }
        self.processes
            .insert(process_id.to_owned(), Process::default());
        Ok(())
    }

    /// Forgets a process that was not started.
    pub(super) fn forget(&mut self, process_id: &str) {
        self.processes.remove(process_id);
    }

    /// Answers now or at the process's end. An exec'd process is forgotten once its end has been told.
    pub(super) fn wait(&mut self, process_id: &str, reply: Reply<Exit>) {
        let Some(process) = self.processes.get_mut(process_id) else {
            drop(reply.send(Err(SandboxError::NotFound("process"))));
            return;
        };
        match process.exit {
            None => process.waiting.push(reply),
            Some(exit) => {
                if reply.send(Ok(exit)).is_ok() && process_id != INIT {
                    self.processes.remove(process_id);
                }
            }
        }
    }

    /// Keeps `held` until a process has ended. This is not to be told of the end.
    pub(super) fn hold(&mut self, process_id: &str, held: oneshot::Sender<()>) {
        if let Some(process) = self.processes.get_mut(process_id)
            && process.exit.is_none()
        {
            process.held.retain(|held| !held.is_closed());
            process.held.push(held);
        }
    }

    /// A process has ended: tells everyone who waits.
    pub(super) fn ended(&mut self, process_id: &str, exit: Exit) {
        if process_id == INIT {
            self.advance(Event::Exited);
        }
        let Some(process) = self.processes.get_mut(process_id) else {
            return;
        };
        process.exit = Some(exit);
        process.held.clear();
        let mut told = false;
        for waiting in process.waiting.drain(..) {
            told |= waiting.send(Ok(exit)).is_ok();
        }
        if told && process_id != INIT {
            self.processes.remove(process_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;

    fn exit(status: u8) -> Exit {
        Exit {
            status,
            oom_killed: false,
            stdout_bytes: 0,
            stderr_bytes: 0,
        }
    }

    fn running() -> Container {
        let mut container = Container::new();
        container.created();
        container.advance(Event::Start);
        container
    }

    #[test]
    fn everyone_who_waits_is_told_and_init_stays_known() {
        let mut container = running();
        let (first, mut first_told) = oneshot::channel();
        let (second, mut second_told) = oneshot::channel();
        container.wait(INIT, first);
        container.wait(INIT, second);
        assert!(matches!(first_told.try_recv(), Err(TryRecvError::Empty)));
        container.ended(INIT, exit(7));
        assert_eq!(first_told.try_recv().unwrap().unwrap().status, 7);
        assert_eq!(second_told.try_recv().unwrap().unwrap().status, 7);
        let (late, mut late_told) = oneshot::channel();
        container.wait(INIT, late);
        assert_eq!(late_told.try_recv().unwrap().unwrap().status, 7);
        assert_eq!(container.status(), Status::Stopped);
    }

    #[test]
    fn what_a_process_holds_goes_with_it_and_tells_nobody() {
        let mut container = running();
        container.add("e1", false).unwrap();
        let held = |container: &mut Container| {
            let (held, end) = oneshot::channel();
            container.hold("e1", held);
            end
        };
        drop(held(&mut container));
        let mut end = held(&mut container);
        assert_eq!(end.try_recv(), Err(TryRecvError::Empty));
        container.ended("e1", exit(3));
        assert_eq!(end.try_recv(), Err(TryRecvError::Closed));
        assert_eq!(held(&mut container).try_recv(), Err(TryRecvError::Closed));
        let (reply, mut told) = oneshot::channel();
        container.wait("e1", reply);
        assert_eq!(told.try_recv().unwrap().unwrap().status, 3);
    }

    #[test]
    fn an_ended_process_is_kept_until_someone_has_been_told() {
        let mut container = running();
        container.add("e1", false).unwrap();
        let (gone, asker) = oneshot::channel();
        drop(asker);
        container.wait("e1", gone);
        container.ended("e1", exit(3));
        let (reply, mut told) = oneshot::channel();
        container.wait("e1", reply);
        assert_eq!(told.try_recv().unwrap().unwrap().status, 3);
        let (reply, mut told) = oneshot::channel();
        container.wait("e1", reply);
        assert!(matches!(
            told.try_recv().unwrap(),
            Err(SandboxError::NotFound(_))
        ));
    }

    #[test]
    fn a_process_needs_a_name_of_its_own_and_a_running_container() {
        let mut container = running();
        container.add("e1", false).unwrap();
        assert!(matches!(
            container.add("e1", false),
            Err(SandboxError::Exists(_))
        ));
        assert!(matches!(
            container.add(INIT, false),
            Err(SandboxError::Exists(_))
        ));
        container.advance(Event::Pause);
        assert!(container.add("e2", false).is_err());
        container.add("e2", true).unwrap();
        container.ended(INIT, exit(0));
        assert!(container.add("e3", true).is_err());
    }

    #[test]
    fn a_container_that_was_paused_before_its_start_waits_for_it_afterwards() {
        let mut container = Container::new();
        container.created();
        container.advance(Event::Pause);
        assert_eq!(container.status(), Status::Paused);
        container.advance(Event::Resume);
        assert_eq!(container.status(), Status::Created);
        container.advance(Event::Start);
        container.advance(Event::Pause);
        container.advance(Event::Resume);
        assert_eq!(container.status(), Status::Running);
    }

    #[test]
    fn a_start_that_is_confirmed_after_the_end_does_not_revive() {
        let mut container = Container::new();
        container.created();
        container.ended(INIT, exit(0));
        container.advance(Event::Start);
        assert_eq!(container.status(), Status::Stopped);
    }
}
