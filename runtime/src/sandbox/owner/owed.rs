//! What the VMM has been asked and has not answered.
//!
//! Contract: pure. An answer comes within [`PATIENCE`], or the VMM has lost its way and the sandbox ends. A disk's leaving is
//! not in here: what was written to it is written back first, which takes as long as the host's storage takes.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

/// How long an answer may take. Longer than the VMM waits for room to send it.
const PATIENCE: Duration = Duration::from_secs(30);

/// A question of which there is one at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Asked {
    /// For memory or vCPUs.
    Machine,
    /// To fill or empty that place.
    Place(u8),
}

/// By when each of them is to be answered.
#[derive(Debug, Default)]
pub(super) struct Owed(HashMap<Asked, Instant>);

impl Owed {
    /// It is asked.
    pub(super) fn ask(&mut self, asked: Asked, now: Instant) {
        self.0.insert(asked, now + PATIENCE);
    }

    /// It is answered, if it was asked.
    pub(super) fn answered(&mut self, asked: Asked) {
        self.0.remove(&asked);
    }

    /// When the first of them is late.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.0.values().min().copied()
    }

    /// Nothing is waited for any more.
    pub(super) fn give_up(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_question_is_the_first_to_be_late() {
        let (mut owed, now) = (Owed::default(), Instant::now());
        assert_eq!(owed.deadline(), None);
        owed.ask(Asked::Place(1), now);
        owed.ask(Asked::Machine, now + PATIENCE);
        assert_eq!(owed.deadline(), Some(now + PATIENCE));
        owed.answered(Asked::Place(1));
        owed.answered(Asked::Place(2));
        assert_eq!(owed.deadline(), Some(now + 2 * PATIENCE));
        owed.give_up();
        assert_eq!(owed.deadline(), None);
    }
}
