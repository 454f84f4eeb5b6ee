//! `kill -9` while a scope comes and goes: afterwards `delete` leaves neither scope nor cgroup.

use caisson_tests::{
    Case,
    killing::{Victim, kill_at_moments},
};

use super::{create_call, is_gone, make_directories, sleeper};

/// Moments per step.
const MOMENTS: u32 = 5;

const UNIT: &str = "e2e-stricken.scope";

#[derive(Clone, Copy, PartialEq)]
enum Step {
    Create,
    Delete,
}

fn kill_during(victim: Victim, step: Step) {
    make_directories();
    let Some(case) = Case::begin_with_vm("a killed runc leaves its scope") else {
        return;
    };
    let bundle = sleeper(&case, ":e2e:stricken");
    let create = || create_call(&case, &bundle);
    let before = || {
        if step == Step::Delete {
            create().succeed();
        }
    };
    let act = || match step {
        Step::Create => create(),
        Step::Delete => case.call(["delete", "--force", "one"]),
    };
    kill_at_moments(victim, MOMENTS, before, act, |context| {
        println!("{context}");
        case.delete("one");
        is_gone(&case, UNIT);
        case.nothing_is_left();
    });
}

macro_rules! kill_tests {
    ($($name:ident: $victim:ident, $step:ident;)*) => {$(
        #[test]
        fn $name() {
            kill_during(Victim::$victim, Step::$step);
        }
    )*};
}

kill_tests! {
    the_caller_is_killed_while_it_comes: Caller, Create;
    the_monitor_is_killed_while_it_comes: Monitor, Create;
    the_machine_is_killed_while_it_comes: Vmm, Create;
    the_caller_is_killed_while_it_goes: Caller, Delete;
    the_monitor_is_killed_while_it_goes: Monitor, Delete;
}
