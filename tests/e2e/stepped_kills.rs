//! `kill -9` before one system call after the other while something is given to a machine that runs, or taken from it:
//! a disk and a volume of a pod's member, a volume's new version, an interface.
//!
//! A step is taken once unharmed, which counts the victim's stops (`caisson_tests::stepping`). Then it is killed at
//! evenly spread ones of them, each time in a step that is new. Afterwards the host is as before; whoever is not part of
//! what died lives on.

use caisson_tests::host::Snapshot;
use caisson_tests::stepping::{self, Victim};
use caisson_tests::{Bundle, Call, Case, Loop, Published, Running, case};
use rustix::process::Pid;

use crate::kills::{truth, truth_then_nothing};
use crate::members::{join, start_holder};
use crate::net::Net;

/// Stops at which the victim is killed, in each step.
const MOMENTS: u32 = 2;

const NOTICES: &str = env!("CARGO_BIN_EXE_notices");

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    /// The runtime's own process, as the user started it.
    Caller,
    /// The process that has the machine.
    Monitor,
    /// The virtual machine.
    Vmm,
}

impl Who {
    fn find(self, monitor: Pid) -> Victim {
        match self {
            Self::Caller => Victim::Caller,
            Self::Monitor => Victim::Process(monitor),
            Self::Vmm => {
                let machine = case::processes_named("caisson-vmm").into_iter().next();
                let pid = machine.and_then(|process| Pid::from_raw(process.pid));
                Victim::Process(pid.expect("a virtual machine"))
            }
        }
    }
}

/// Takes a step over and over: first it is counted, then the victim is killed in it. `take` takes it once with a kill at
/// the stop it is told, and checks what there is to be checked; it answers what happened to the victim.
fn kill_at_stops(who: Who, mut take: impl FnMut(Option<u32>, &str) -> stepping::Taken) {
    let whole = take(None, "without a kill").stops;
    assert!(whole >= 2 * MOMENTS, "{who:?} has only {whole} stops");
    let mut hits = 0;
    for moment in 0..MOMENTS {
        let at = whole * (2 * moment + 1) / (2 * MOMENTS);
        let context = format!("{who:?} killed at stop {at} of {whole}");
        hits += u32::from(take(Some(at), &context).killed);
    }
    // The number of stops is not quite the same each time.
    assert!(hits + 1 >= MOMENTS, "{who:?} was killed only {hits} times");
}

/// What a member of a pod is given before it runs, and loses with its end.
#[derive(Clone, Copy, PartialEq)]
enum Member {
    Comes,
    Goes,
}

/// In a pod, whose member with a disk and a volume comes or goes.
fn kill_with_a_member(who: Who, step: Member) {
    let Some(case) = Case::begin_with_vm("runc has no machine") else {
        return;
    };
    let mut volume = Published::make(&case.dir().join("config"));
    volume.write(&[("key", "value")]);
    let before = Snapshot::take();
    let lasting = start_holder(&case);
    let mut beside_holder = Snapshot::take();
    let mut number = 0;
    kill_at_stops(who, |at, context| {
        number += 1;
        let disk = Loop::attach(&case, &format!("disk-{number}"));
        let source = volume.dir().display().to_string();
        let bundle = case
            .bundle_in(&format!("member-{number}"))
            .mount(&source, "/config", &["rbind", "ro", "rprivate"])
            .args(["sleep", "1000"]);
        let bundle = join(disk.give(bundle, "/dev/xvda", "rwm"), case.pid("holder"));
        let call = match step {
            Member::Comes => case.create_call(&bundle, "member"),
            Member::Goes => {
                case.start(&bundle, "member");
                case.call(["delete", "--force", "member"])
            }
        };
        let taken = take(who, &case, "holder", at, call);
        case.delete("member");
        if taken.killed && who != Who::Caller {
            case.wait("holder");
            assert_eq!(case.status("holder"), "stopped", "{context}");
            case.delete("holder");
            is_as(&before, context);
            case.start(&lasting, "holder");
            beside_holder = Snapshot::take();
        } else {
            is_as(&beside_holder, context);
            assert_eq!(
                case.exec("holder", "echo here").text(),
                "here\n",
                "{context}"
            );
        }
        let detach = case.program("losetup").args(["-d"]);
        detach.args([disk.device()]).succeed();
        assert!(!disk.is_in_use(), "{context}: the disk is still open");
        taken
    });
    case.delete("holder");
    is_as(&before, "at the end");
}

/// Takes one step of a program's.
fn take(who: Who, case: &Case, id: &str, at: Option<u32>, call: Call) -> stepping::Taken {
    let start = || match who {
        Who::Caller => call.held().start(),
        Who::Monitor | Who::Vmm => call.start(),
    };
    take_with(who, case, id, at, start)
}

fn take_with(
    who: Who,
    case: &Case,
    id: &str,
    at: Option<u32>,
    start: impl FnOnce() -> Running,
) -> stepping::Taken {
    let victim = who.find(case.pid(id));
    let (running, taken) = stepping::step(&victim, at, start);
    let outcome = running.finish();
    // A victim that has died may be noticed or not by whoever asked.
    assert!(taken.killed || outcome.status == 0, "{outcome:?}");
    taken
}

#[track_caller]
fn is_as(before: &Snapshot, context: &str) {
    let left = Snapshot::take().changes_since(before);
    assert!(
        left.is_empty(),
        "{context}: left behind:\n{}",
        left.join("\n")
    );
}

/// A container whose program hears that a volume has a new version, and says so in a file.
fn listener(bundle: Bundle, volume: &Published) -> Bundle {
    let script = "notices --until 'create end' /config >/heard & \
        until grep -q ready /heard; do sleep 0.1; done; touch /ready; wait; touch /told; exec sleep 1000";
    let source = volume.dir().display().to_string();
    bundle
        .program(NOTICES)
        .mount(&source, "/config", &["rbind", "ro", "rprivate"])
        .script(script)
}

fn kill_while_a_volume_changes(who: Who) {
    let Some(case) = Case::begin_with_vm("runc has no machine") else {
        return;
    };
    let mut number = 0;
    kill_at_stops(who, |at, context| {
        number += 1;
        let mut volume = Published::make(&case.dir().join(format!("config-{number}")));
        volume.write(&[("key", "one")]);
        let bundle = listener(case.bundle_in(&format!("bundle-{number}")), &volume);
        case.start(&bundle, "one");
        case.wait_for_file(&bundle.rootfs("ready"));
        let taken = take_with(who, &case, "one", at, || {
            volume.write(&[("key", "two"), ("end", "")]);
            let wait = "until [ -e /told ]; do sleep 0.1; done";
            case.call(["exec", "one", "/bin/sh", "-c", wait]).start()
        });
        truth_then_nothing(&case, "one", context);
        taken
    });
}

fn kill_while_an_interface_comes(who: Who) {
    let Some(case) = Case::begin_with_vm("runc has no machine") else {
        return;
    };
    let mut number = 0;
    kill_at_stops(who, |at, context| {
        number += 1;
        let mut net = Net::new(&case, &format!("net-{number}"));
        let bundle = net.bundle(case.bundle_in(&format!("bundle-{number}")));
        case.start(&bundle.args(["sleep", "1000"]), "one");
        let taken = take_with(who, &case, "one", at, || {
            net.connected("late0", "eth7", 7);
            let wait =
                "until ip addr show eth7 2>/dev/null | grep -q 10.77.7.2; do sleep 0.1; done";
            case.call(["exec", "one", "/bin/sh", "-c", wait]).start()
        });
        truth(&case, "one", context);
        case.delete("one");
        let inside = net.inside("ip -o link");
        assert!(!inside.contains("caisson"), "{context}: {inside}");
        drop(net);
        case.nothing_is_left();
        taken
    });
}

macro_rules! kill_tests {
    ($($name:ident: $step:expr, $who:ident;)*) => {$(
        #[test]
        fn $name() {
            let step = $step;
            step(Who::$who);
        }
    )*};
}

kill_tests! {
    the_caller_is_killed_while_a_member_gets_a_disk: |who| kill_with_a_member(who, Member::Comes), Caller;
    the_holder_is_killed_while_a_member_gets_a_disk: |who| kill_with_a_member(who, Member::Comes), Monitor;
    the_machine_is_killed_while_a_member_gets_a_disk: |who| kill_with_a_member(who, Member::Comes), Vmm;
    the_caller_is_killed_while_a_member_loses_its_disk: |who| kill_with_a_member(who, Member::Goes), Caller;
    the_holder_is_killed_while_a_member_loses_its_disk: |who| kill_with_a_member(who, Member::Goes), Monitor;
    the_machine_is_killed_while_a_member_loses_its_disk: |who| kill_with_a_member(who, Member::Goes), Vmm;
    the_monitor_is_killed_while_a_volume_changes: kill_while_a_volume_changes, Monitor;
    the_monitor_is_killed_while_an_interface_comes: kill_while_an_interface_comes, Monitor;
    the_machine_is_killed_while_an_interface_comes: kill_while_an_interface_comes, Vmm;
}
