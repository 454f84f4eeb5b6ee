//! Containers that join another container's namespaces, as an engine's pods do: with caisson they share its machine.
//!
//! And `kill -9` at any moment of a member's life: what is left of it goes, and the others live on, if their machine does.

use std::time::{Duration, Instant};

use caisson_tests::{Bundle, Call, Case, call, case, host};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::kills::truth_then_nothing;

/// Moments per step.
const MOMENTS: u32 = 3;

/// A container that lasts, with a web server on its loopback; its bundle, to start it again.
pub(crate) fn start_holder(case: &Case) -> Bundle {
    let bundle = case.bundle_in("holder").script(
        "mkdir -p /dev/shm/w; echo a page >/dev/shm/w/page; exec httpd -f -p 8000 -h /dev/shm/w",
    );
    case.start(&bundle, "holder");
    bundle
}

/// A bundle in the namespaces of the container `holder`.
fn member(case: &Case) -> Bundle {
    join(case.bundle_in("member"), case.pid("holder"))
}

/// Names the namespaces of the holder's process.
pub(crate) fn join(bundle: Bundle, holder: Pid) -> Bundle {
    let pid = holder.as_raw_nonzero();
    bundle.edit(|spec| {
        let list = spec["linux"]["namespaces"].as_array_mut();
        for namespace in list.expect("namespaces") {
            let path = match namespace["type"].as_str() {
                Some("network") => format!("/proc/{pid}/ns/net"),
                Some(name @ ("ipc" | "uts" | "pid")) => format!("/proc/{pid}/ns/{name}"),
                _ => continue,
            };
            namespace["path"] = Value::from(path);
        }
        // A host name belongs to whoever made the namespace.
        spec.as_object_mut().map(|spec| spec.remove("hostname"));
    })
}

#[test]
fn a_member_has_the_holders_network_and_its_own_files() {
    let case = Case::begin();
    start_holder(&case);
    let script = "until wget -qO- http://127.0.0.1:8000/page; do sleep 1; done; ps | grep -c http[d]; cat /own";
    let outcome = case.run(&member(&case).script(script).file("own", "mine\n"));
    assert_eq!(outcome.text(), "a page\n1\nmine\n", "{outcome:?}");
    assert_ne!(case.exec("holder", "cat /own").status, 0);
    assert_eq!(case.exec("holder", "echo here").text(), "here\n");
    case.delete("holder");
    case.nothing_is_left();
}

#[test]
fn the_holders_end_is_the_members_end() {
    let Some(case) = Case::begin_with_vm("runc's members share no machine") else {
        return;
    };
    start_holder(&case);
    case.start(&member(&case).args(["sleep", "1000"]), "member");
    case.delete("holder");
    case.wait("member");
    assert_eq!(case.status("member"), "stopped");
    case.call(["delete", "member"]).succeed();
    case.nothing_is_left();
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    /// The runtime's own process, as the user started it.
    Caller,
    /// The process that stands for the member.
    Monitor,
    /// The process that stands for the holder, and has the machine.
    Holder,
    /// The virtual machine.
    Vmm,
}

impl Victim {
    /// Its process, if it exists now.
    fn find(self, caller: Pid, holder: Pid) -> Option<Pid> {
        let mut processes = host::processes().into_iter();
        match self {
            Self::Caller => Some(caller),
            Self::Holder => Some(holder),
            Self::Vmm => {
                let machine = case::processes_named("caisson-vmm").into_iter().next()?;
                Pid::from_raw(machine.pid)
            }
            Self::Monitor => processes
                .find(|process| {
                    let known = [caller, holder].map(|pid| pid.as_raw_nonzero().get());
                    process.name == "caisson" && !known.contains(&process.pid)
                })
                .and_then(|process| Pid::from_raw(process.pid)),
        }
    }

    /// Whether the holder lives on.
    fn spares_the_holder(self) -> bool {
        matches!(self, Self::Caller | Self::Monitor)
    }
}

/// A step of a member's life.
#[derive(Clone, Copy, Debug)]
enum Step {
    Create,
    Start,
    Exec,
    Delete,
}

impl Step {
    /// Brings a new member to where the step begins.
    fn prepare(self, case: &Case, bundle: &Bundle) {
        match self {
            Self::Create => {}
            Self::Start => drop(case.create_call(bundle, "member").succeed()),
            Self::Exec | Self::Delete => case.start(bundle, "member"),
        }
    }

    fn call(self, case: &Case, bundle: &Bundle) -> Call {
        match self {
            Self::Create => case.create_call(bundle, "member"),
            Self::Start => case.call(["start", "member"]),
            Self::Exec => case.call(["exec", "member", "true"]),
            Self::Delete => case.call(["delete", "--force", "member"]),
        }
    }
}

/// The names of the holder's processes, which a member's are among: also of one that has not been started yet.
fn names(case: &Case) -> String {
    let script = "cat /proc/[0-9]*/comm";
    case.exec("holder", script).text().to_owned()
}

/// Kills `victim` at evenly spread moments of `step`.
fn kill_during(victim: Victim, step: Step) {
    let Some(case) = Case::begin_with_vm("runc has no such processes") else {
        return;
    };
    let lasting = start_holder(&case);
    let mut bundle = member(&case).args(["sleep", "1000"]);
    step.prepare(&case, &bundle);
    let began = Instant::now();
    step.call(&case, &bundle).succeed();
    let duration = began.elapsed();
    case.delete("member");
    let alone = names(&case);
    let mut hits = 0;
    for moment in 0..MOMENTS {
        step.prepare(&case, &bundle);
        let holder = case.pid("holder");
        let running = step.call(&case, &bundle).start();
        running.ends_within(duration * moment / MOMENTS);
        if let Some(pid) = victim.find(running.pid(), holder) {
            hits += u32::from(kill_process(pid, Signal::KILL).is_ok());
            call::wait_for_exit(pid, Duration::from_secs(10));
        }
        running.finish();
        let context = format!("{victim:?} killed at {moment}/{MOMENTS} of {duration:?}");
        case.delete("member");
        if victim.spares_the_holder() {
            assert_eq!(names(&case), alone, "{context}");
            // Its name, its files and its place in the guest are free again.
            case.create(&bundle, "member");
            case.delete("member");
            assert_eq!(names(&case), alone, "{context}, created once more");
        } else {
            truth_then_nothing(&case, "holder", &context);
            case.start(&lasting, "holder");
            bundle = join(bundle, case.pid("holder"));
        }
    }
    case.delete("holder");
    case.nothing_is_left();
    assert!(hits > 0, "no {victim:?} was there to be killed");
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
    a_caller_is_killed_while_it_creates: Caller, Create;
    a_monitor_is_killed_while_it_is_created: Monitor, Create;
    the_holder_is_killed_while_a_member_is_created: Holder, Create;
    the_machine_is_killed_while_a_member_is_created: Vmm, Create;
    a_monitor_is_killed_while_it_is_started: Monitor, Start;
    a_monitor_is_killed_while_it_executes: Monitor, Exec;
    the_holder_is_killed_while_a_member_is_deleted: Holder, Delete;
    a_caller_is_killed_while_it_deletes: Caller, Delete;
}
