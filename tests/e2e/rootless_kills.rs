//! `kill -9` at any moment while an ordinary user's container is created: the runtime, its monitor, the virtual machine,
//! and the program that is its network. Nothing of it is left for anybody, and the user can clean up himself.

use caisson_tests::Case;
use caisson_tests::host::Snapshot;
use caisson_tests::killing::{Victim, kill_at_moments};

use crate::kills::truth;
use crate::rootless::{User, World};

const MOMENTS: u32 = 2;

fn kill_during_create(victim: Victim) {
    let Some(case) = Case::begin_with_vm("it has no passt") else {
        return;
    };
    let user = User::of(&case);
    let world = World::new(&case);
    let bundle = user.bundle().args(["sleep", "1000"]);
    let before = Snapshot::take();
    let create = || {
        let create = user.call(["create", "-b"]);
        create.args([bundle.dir()]).args(["one"])
    };
    let after = |context: &str| {
        truth(&case, "one", context);
        user.call(["delete", "--force", "one"]).succeed();
        let left = Snapshot::take().changes_since(&before);
        assert!(
            left.is_empty(),
            "{context}: left behind:\n{}",
            left.join("\n")
        );
    };
    kill_at_moments(victim, MOMENTS, || {}, create, after);
    drop(world);
    case.nothing_is_left();
}

#[test]
fn the_caller_is_killed() {
    kill_during_create(Victim::Caller);
}

#[test]
fn the_monitor_is_killed() {
    kill_during_create(Victim::Monitor);
}

#[test]
fn the_machine_is_killed() {
    kill_during_create(Victim::Vmm);
}

#[test]
fn the_network_is_killed() {
    kill_during_create(Victim::Network);
}
