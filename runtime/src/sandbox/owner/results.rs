//! What a call to the agent has brought back, and what that changes in the sandbox.
//!
//! Contract: a result is applied once, in the order of the inbox; whoever asked is answered after it has been. An agent
//! that is gone, contradicts itself or cannot kill ends the virtual machine.

use std::time::Duration;

use caisson_vmm_spec::Cause;

use super::{Owner, answer, ended, lost, tell};
use crate::{
    agent::AgentError,
    sandbox::{
        Exit, INIT, Reply, SandboxError, Started, Status, container::Container, message::Done,
    },
};

/// How long a virtual machine may live on after its agent has hung up; a panicking guest needs a moment to say so.
const AFTER_AGENT: Duration = Duration::from_secs(3);

impl Owner {
    pub(super) fn done(&mut self, done: Done) {
        match done {
            Done::Created { id, result, reply } => self.created(id, result, reply),
            Done::Changed {
                id,
                event,
                result,
                reply,
            } => {
                let result = result.map_err(SandboxError::Agent);
                if let (Ok(()), Some(container)) = (&result, self.containers.get_mut(&id)) {
                    container.advance(event);
                }
                self.finish(reply, result);
            }
            Done::Execed {
                id,
                process_id,
                result,
                reply,
            } => {
                match (&result, self.containers.get_mut(&id)) {
                    (Ok(_), _) => self.watch(id, process_id),
                    (Err(_), Some(container)) => container.forget(&process_id),
                    (Err(_), None) => {}
                }
                self.finish(reply, result);
            }
            Done::Ended {
                id,
                process_id,
                result,
            } => self.process_ended(&id, &process_id, result),
            Done::Deleted { id, result, reply } => {
                let result = result.map_err(SandboxError::Agent);
                if result.is_ok() {
                    self.containers.remove(&id);
                    return self.part(&id, reply, result);
                }
                self.finish(reply, result);
            }
            Done::Answered => {}
            Done::Doomed { id } => self.doomed(&id),
            Done::Unkillable => {
                self.end(
                    ended(Cause::HostError, "it did not answer and was killed"),
                    Duration::ZERO,
                );
            }
            Done::AgentGone => self.agent_gone(),
        }
    }

    fn created(
        &mut self,
        id: String,
        result: Result<Started, SandboxError>,
        reply: Reply<Started>,
    ) {
        match (&result, self.containers.get_mut(&id)) {
            (Ok(_), Some(container)) => {
                container.created();
                self.watch(id, INIT.to_owned());
            }
            _ => {
                self.containers.remove(&id);
                return self.part(&id, reply, result);
            }
        }
        self.finish(reply, result);
    }

    /// Waits for a process's end in a task of its own.
    fn watch(&self, id: String, process_id: String) {
        let agent = self.agent.clone();
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            let result = agent.wait(&id, &process_id).await;
            let done = Done::Ended {
                id,
                process_id,
                result,
            };
            tell(&outbox, done, None).await;
        });
    }

    fn process_ended(&mut self, id: &str, process_id: &str, result: Result<Exit, AgentError>) {
        let exit = match result {
            Ok(exit) => exit,
            Err(AgentError::Gone) => return self.agent_gone(),
            // An agent that no longer knows its own process cannot be trusted with the rest.
            Err(error) => {
                return self.end(ended(Cause::HostError, &error.to_string()), Duration::ZERO);
            }
        };
        if let Some(container) = self.containers.get_mut(id) {
            container.ended(process_id, exit);
        }
    }

    /// Answers who asked for a container that is gone, once the host has its disks back.
    fn part<T: Send + 'static>(
        &mut self,
        id: &str,
        reply: Reply<T>,
        result: Result<T, SandboxError>,
    ) {
        let leaving = self.disks.forget(id);
        if leaving.is_empty() || lost(&result) {
            return self.finish(reply, result);
        }
        tokio::spawn(async move {
            for gone in leaving {
                // Nothing is ever said.
                let _ = gone.await;
            }
            answer(reply, result);
        });
    }

    fn finish<T>(&mut self, reply: Reply<T>, result: Result<T, SandboxError>) {
        if lost(&result) {
            self.agent_gone()
        } else {
            answer(reply, result)
        }
    }

    /// A container that outlives `SIGKILL`, alone in its sandbox, takes the virtual machine along.
    fn doomed(&mut self, id: &str) {
        let lives = |container: &Container| container.status() != Status::Stopped;
        if self.containers.len() == 1 && self.containers.get(id).is_some_and(lives) {
            let why = ended(
                Cause::HostError,
                "its container did not die when it was killed",
            );
            self.end(why, Duration::ZERO);
        }
    }

    pub(super) fn agent_gone(&mut self) {
        self.end(ended(Cause::HostError, "its agent hung up"), AFTER_AGENT);
    }
}
