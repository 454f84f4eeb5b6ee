//! `kill -9` at moments of a step that is not there before it: evenly spread over its own duration, measured before.
//!
//! Who is killed is looked up at the moment; a moment at which the victim does not exist yet is no hit, and at least one
//! hit per step is demanded. For victims that are there before the step, `stepping.rs` counts instead.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{Call, call, case, host};

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Victim {
    /// The runtime's own process, as the user started it.
    Caller,
    /// The process that stays: the monitor (with runc, the container's init).
    Monitor,
    /// The virtual machine.
    Vmm,
    /// The network of an ordinary user's container.
    Network,
}

impl Victim {
    /// Its process, if it exists now. Only this case's runtime runs on the machine.
    pub fn find(self, caller: Pid) -> Option<Pid> {
        let named = |name: &str| {
            case::processes_named(name)
                .into_iter()
                .map(|process| process.pid)
        };
        let pid = match self {
            Self::Caller => return Some(caller),
            Self::Vmm => named("caisson-vmm").next(),
            Self::Network => named("passt.avx2").chain(named("passt")).next(),
            Self::Monitor => host::processes()
                .into_iter()
                .find(|process| {
                    process.pid != caller.as_raw_nonzero().get() && process.name == "caisson"
                })
                .map(|process| process.pid),
        };
        pid.and_then(Pid::from_raw)
    }
}

/// Kills `victim` at so many evenly spread moments of `step`, each time after `before` and followed by the checks `after`,
/// which are told what happened.
///
/// # Panics
///
/// If the victim was never there.
pub fn kill_at_moments(
    victim: Victim,
    moments: u32,
    before: impl Fn(),
    step: impl Fn() -> Call,
    after: impl Fn(&str),
) {
    before();
    let began = Instant::now();
    step().finish();
    let duration = began.elapsed();
    after("without a kill");
    let mut hits = 0;
    for moment in 0..moments {
        before();
        let running = step().start();
        let at = duration * (2 * moment + 1) / (2 * moments);
        running.ends_within(at);
        let context = format!("{victim:?} killed after {at:?} of {duration:?}");
        if let Some(pid) = victim.find(running.pid()) {
            hits += u32::from(kill_process(pid, Signal::KILL).is_ok());
            call::wait_for_exit(pid, Duration::from_secs(10));
        }
        running.finish();
        after(&context);
    }
    assert!(hits > 0, "no {victim:?} was there to be killed");
}
