//! The states of a container and every step between them, as one pure table.
//!
//! ```text
//!  Creating --Created--> Created --Start--> Running <--Resume/Pause--> Paused
//!      |                    |                  |                          |
//!      +------Exited--------+------Exited------+---------Exited-----------+--> Stopped
//! ```
//! A container that was paused before its start is created again after `Resume`; `container.rs` remembers that.

use serde::{Deserialize, Serialize};

use crate::state::Status;
use Event::{Created, Delete, Exec, Exited, Pause, Resume, Signal, Start};

/// What happens to a container, or is asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The agent has set it up.
    Created,
    /// Let init go on.
    Start,
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Start one more process.
    Exec,
    /// Send a signal.
    Signal,
    /// Init has ended.
    Exited,
    /// Forget the container.
    Delete,
}

/// A step that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("cannot {event} a container that is {from}")]
pub struct Refused {
    /// Where the container is.
    pub from: Status,
    /// What was asked.
    pub event: Event,
}

/// The state after `event` in state `from`, or why there is none.
pub const fn after(from: Status, event: Event) -> Result<Status, Refused> {
    match (from, event) {
        (Status::Creating, Created) => Ok(Status::Created),
        (Status::Created, Start) | (Status::Paused, Resume) => Ok(Status::Running),
        // As runc: one that waits for its start can be paused too.
        (Status::Created | Status::Running, Pause) => Ok(Status::Paused),
        (Status::Creating | Status::Created | Status::Running | Status::Paused, Exited)
        | (Status::Stopped, Delete) => Ok(Status::Stopped),
        (Status::Created | Status::Running | Status::Paused, Exec | Signal) => Ok(from),
        (from, event) => Err(Refused { from, event }),
    }
}

impl std::fmt::Display for Event {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Created => "finish creating",
            Start => "start",
            Pause => "pause",
            Resume => "resume",
            Exec => "exec in",
            Signal => "signal",
            Exited => "end",
            Delete => "delete",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [Status; 5] = [
        Status::Creating,
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Stopped,
    ];
    const EVENTS: [Event; 8] = [Created, Start, Pause, Resume, Exec, Signal, Exited, Delete];

    #[test]
    fn every_pair_of_state_and_event_is_decided() {
        // One row per state, one letter per event: the state afterwards, or a dot where the step is refused.
        let expected = ["d.....s.", ".rp.dds.", "..p.rrs.", "...rpps.", ".......s"];
        for (from, row) in STATES.into_iter().zip(expected) {
            let decided: String = EVENTS
                .into_iter()
                .map(|event| match after(from, event) {
                    Ok(Status::Creating) => 'c',
                    Ok(Status::Created) => 'd',
                    Ok(Status::Running) => 'r',
                    Ok(Status::Paused) => 'p',
                    Ok(Status::Stopped) => 's',
                    Err(_) => '.',
                })
                .collect();
            assert_eq!(decided, row, "from {from}");
        }
    }

    #[test]
    fn a_refusal_says_what_was_asked_and_where_the_container_is() {
        assert_eq!(
            after(Status::Stopped, Start).unwrap_err().to_string(),
            "cannot start a container that is stopped"
        );
    }
}
