//! A table with the numbers that its processes have in the container, as a /proc of the container's own would show them.
//!
//! Contract: pure. A process whose numbers make no sense is left out, and so is one that has another one's number: the
//! result has each number once, none of them 0. Who is not in the container is 0 to those who are, as in the kernel.
//! Spec: proc(5), `NSpid` of `status`: a number for each PID namespace, from the reader's own to the process's.

use std::collections::{HashMap, HashSet};

use super::{Process, Table};

/// The kernel's own bound (`PID_MAX_LIMIT`).
const MAX_PID: u32 = 4 << 20;

/// Fields of `stat`, counted from the fourth, that are numbers of processes: parent, group, session, the terminal's
/// foreground group.
const PARENT: usize = 0;
const GROUP: usize = 1;
const SESSION: usize = 2;
const FOREGROUND: usize = 4;

impl Table {
    /// The same processes, as they see each other.
    #[must_use]
    pub(crate) fn inside(self) -> Self {
        let Self { processes, system } = self;
        // The container's first process is in no namespace below the container's own.
        let depths = processes
            .iter()
            .map(|process| process.levels("NSpid").len());
        let depth = depths.min().unwrap_or(0).saturating_sub(1);
        let own = |process: &Process| {
            let number = process.levels("NSpid").get(depth).copied();
            number.filter(|pid| (1..=MAX_PID).contains(pid))
        };
        let numbers: HashMap<u32, u32> = processes
            .iter()
            .filter_map(|process| Some((process.pid, own(process)?)))
            .collect();
        let mut taken = HashSet::new();
        let mut processes: Vec<Process> = processes
            .into_iter()
            .filter_map(|process| process.inside(depth, &numbers))
            .filter(|process| taken.insert(process.pid))
            .collect();
        processes.sort_unstable_by_key(|process| process.pid);
        Self { processes, system }
    }
}

impl Process {
    /// The numbers of a line of `status`; none if it has no such line.
    fn levels(&self, key: &str) -> Vec<u32> {
        let line = self.status.iter().find_map(|line| {
            let (name, numbers) = line.split_once(":\t")?;
            (name == key).then_some(numbers)
        });
        let words = line.unwrap_or_default().split_whitespace();
        words.map_while(|word| word.parse().ok()).collect()
    }

    fn inside(mut self, depth: usize, numbers: &HashMap<u32, u32>) -> Option<Self> {
        let of = |outside: Option<&i128>| {
            let outside = outside.and_then(|number| u32::try_from(*number).ok());
            let inside = outside.and_then(|pid| numbers.get(&pid));
            inside.copied().unwrap_or(0)
        };
        let at = |key: &str| self.levels(key).get(depth).copied().unwrap_or(0);
        let pid = *numbers.get(&self.pid)?;
        let (parent, group, session) = (of(self.numbers.get(PARENT)), at("NSpgid"), at("NSsid"));
        // -1: it has no terminal.
        let foreground = match self.numbers.get(FOREGROUND) {
            Some(-1) => -1,
            number => i128::from(of(number)),
        };
        for (field, value) in [
            (PARENT, parent.into()),
            (GROUP, group.into()),
            (SESSION, session.into()),
            (FOREGROUND, foreground),
        ] {
            *self.numbers.get_mut(field)? = value;
        }
        for line in &mut self.status {
            let Some((key, value)) = line.split_once(":\t") else {
                continue;
            };
            let new = match key {
                "Tgid" | "Pid" => pid.to_string(),
                "PPid" => parent.to_string(),
                "TracerPid" => of(value.parse().ok().as_ref()).to_string(),
                "NStgid" | "NSpid" | "NSpgid" | "NSsid" => {
                    let inner: Vec<&str> = value.split_whitespace().skip(depth).collect();
                    inner.join("\t")
                }
                _ => continue,
            };
            *line = format!("{key}:\t{new}");
        }
        self.pid = pid;
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process of these numbers outside; inside they are the second ones, of `NSpid`, `NSpgid` and `NSsid`.
    fn process(pid: u32, parent: i128, nspid: &str, others: [u32; 2]) -> Process {
        let mut numbers = vec![0; 49];
        numbers[PARENT] = parent;
        numbers[FOREGROUND] = -1;
        let [group, session] = others;
        Process {
            pid,
            name: "x".into(),
            state: 'S',
            numbers,
            owner: (0, 0),
            status: [
                format!("Tgid:\t{pid}"),
                format!("PPid:\t{parent}"),
                "TracerPid:\t70".into(),
                format!("NSpid:\t{nspid}"),
                format!("NSpgid:\t70\t{group}"),
                format!("NSsid:\t70\t{session}"),
                "Threads:\t1".into(),
            ]
            .into(),
            command: String::new(),
        }
    }

    fn table(processes: Vec<Process>) -> Table {
        Table {
            processes,
            ..Table::default()
        }
    }

    #[test]
    fn numbers_are_the_containers_own() {
        let inside = table(vec![
            process(75, 70, "75\t9\t2", [9, 1]),
            process(70, 60, "70\t1", [1, 1]),
        ])
        .inside();
        assert_eq!(inside.pids().collect::<Vec<_>>(), [1, 9]);
        let [init, child] = &inside.processes[..] else {
            panic!("two processes");
        };
        assert_eq!(init.numbers[..5], [0, 1, 1, 0, -1]);
        assert_eq!(child.numbers[..5], [1, 9, 1, 0, -1]);
        assert_eq!(
            child.status,
            [
                "Tgid:\t9",
                "PPid:\t1",
                "TracerPid:\t1",
                "NSpid:\t9\t2",
                "NSpgid:\t9",
                "NSsid:\t1",
                "Threads:\t1"
            ]
        );
    }

    #[test]
    fn processes_of_the_guests_own_namespace_keep_their_numbers() {
        let inside = table(vec![process(70, 60, "70", [0, 0])]).inside();
        assert_eq!(inside.pids().collect::<Vec<_>>(), [70]);
    }

    #[test]
    fn numbers_that_make_no_sense_are_left_out() {
        let inside = table(vec![
            process(70, 60, "70\t1", [1, 1]),
            process(71, 60, "71\t1", [1, 1]),
            process(72, 60, "72\t0", [1, 1]),
            process(73, 60, "73\t4194305", [1, 1]),
        ])
        .inside();
        assert_eq!(inside.pids().collect::<Vec<_>>(), [1]);
        let inside = table(vec![process(70, 60, "", [1, 1])]).inside();
        assert_eq!(inside.pids().count(), 0);
    }
}
