//! The processes of a container as the guest's /proc describes them, and the same as a /proc for the host's `ps`.
//!
//! Contract: the guest's texts are parsed into numbers and plain names here ([`Table::add`]); what is laid out for `ps`
//! ([`Table::lay_out`]) is written anew from those, so that no byte of the guest's reaches a program of the host
//! unchecked. Processes that were not asked for are refused.
//! Not here: the mount namespace in which that directory stands for /proc (`commands/ps.rs`), the same with the numbers
//! that processes have in their container (`process_table/inside.rs`).
//! Spec: proc(5).

mod inside;

use std::{
    cmp::Reverse,
    fs, io,
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
};

use caisson_agent_api::{DescribeProcessesResponse, ProcessText, TextFile};
use serde::{Deserialize, Serialize};

/// Fields of `stat` after the state: 49 in Linux 6.12, 34 at the least that `ps` looks at.
const STAT_FIELDS: std::ops::RangeInclusive<usize> = 34..=64;
/// The longest name of a process, in bytes.
const MAX_NAME_BYTES: usize = 64;
/// Lines of `status` that are passed on: those with numbers.
const STATUS: &[&str] = &[
    "Tgid",
    "Pid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "FDSize",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "VmPeak",
    "VmSize",
    "VmLck",
    "VmPin",
    "VmHWM",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmData",
    "VmStk",
    "VmExe",
    "VmLib",
    "VmPTE",
    "VmSwap",
    "HugetlbPages",
    "Threads",
    "SigQ",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];
/// The longest such line, in bytes.
const MAX_STATUS_BYTES: usize = 1024;

/// The guest's answer is not what a kernel writes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest's list of processes makes no sense: {0}")]
pub struct TableError(&'static str);

/// The processes and the guest around them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    processes: Vec<Process>,
    system: System,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pid: u32,
    name: String,
    state: char,
    /// `stat` from its fourth field on.
    numbers: Vec<i128>,
    /// Effective user and group.
    owner: (u32, u32),
    /// Lines of `status`, without the name and the state.
    status: Vec<String>,
    /// Its command line, with a NUL after each argument.
    command: String,
}

/// The guest: what `ps` relates a process's numbers to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct System {
    uptime_centiseconds: u64,
    /// Seconds since the epoch.
    booted: u64,
    memory_kib: u64,
}

impl Table {
    /// Takes in what the agent says about some of the processes.
    pub fn add(
        &mut self,
        answer: DescribeProcessesResponse,
        asked: &[u32],
    ) -> Result<(), TableError> {
        self.system = System::parse(&answer.system)?;
        for text in &answer.processes {
            let process = Process::parse(text)?;
            // 1 is the agent, and stands for something else below.
            if process.pid <= 1
                || !asked.contains(&process.pid)
                || self.processes.iter().any(|p| p.pid == process.pid)
            {
                return Err(TableError("a process that was not asked for"));
            }
            self.processes.push(process);
        }
        Ok(())
    }

    /// The processes' pids in the guest.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        self.processes.iter().map(|process| process.pid)
    }

    /// The process of this number.
    pub(crate) fn process(&self, pid: u32) -> Option<&Process> {
        self.processes.iter().find(|process| process.pid == pid)
    }

    /// Files of /proc about the guest as a whole.
    pub(crate) fn system_files(&self) -> [(&'static str, String); 3] {
        self.system.files()
    }

    /// Writes files like those of /proc into an empty directory. Process 1 is the reader itself, as `reader` describes it
    /// (`stat` and `status`): `ps` asks who it is. In a guest that is the agent, which belongs to no container.
    pub fn lay_out(&self, dir: &Path, reader: (&str, &str)) -> io::Result<()> {
        let put = |name: &str, text: &str| fs::write(dir.join(name), text);
        for (name, text) in self.system.files() {
            put(name, &text)?;
        }
        // Without a CPU like this one `ps` of procps 4 does not look for the time of boot.
        put(
            "cpuinfo",
            "processor\t: 0\ncore id\t\t: 0\napicid\t\t: 0\n\n",
        )?;
        put("loadavg", "0.00 0.00 0.00 1/1 1\n")?;
        for inner in ["self", "1", "tty", "sys/kernel"] {
            fs::create_dir_all(dir.join(inner))?;
        }
        let stat = reader.0.split_once(' ').map_or("", |(_, rest)| rest);
        for own in ["self", "1"] {
            put(&format!("{own}/stat"), &format!("1 {stat}"))?;
            put(&format!("{own}/status"), reader.1)?;
        }
        put("sys/kernel/pid_max", "4194304\n")?;
        put("sys/kernel/osrelease", "6.12.0\n")?;
        put(
            "tty/drivers",
            "pty_slave /dev/pts 136 0-1048575 pty:slave\n",
        )?;
        // `ps` keeps to the order of the directory, and tmpfs lists first what was made last.
        let mut processes: Vec<_> = self.processes.iter().collect();
        processes.sort_unstable_by_key(|process| Reverse(process.pid));
        processes
            .into_iter()
            .try_for_each(|process| process.lay_out(dir))
    }
}

impl System {
    fn files(&self) -> [(&'static str, String); 3] {
        let Self {
            uptime_centiseconds,
            booted,
            memory_kib,
        } = self;
        let (seconds, part) = (uptime_centiseconds / 100, uptime_centiseconds % 100);
        let cpus = "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n";
        [
            ("uptime", format!("{seconds}.{part:02} 0.00\n")),
            ("stat", format!("{cpus}btime {booted}\n")),
            (
                "meminfo",
                format!("MemTotal: {memory_kib} kB\nMemFree: 0 kB\nMemAvailable: 0 kB\n"),
            ),
        ]
    }

    fn parse(files: &[TextFile]) -> Result<Self, TableError> {
        let text = |name: &str| {
            let file = files.iter().find(|file| file.name == name);
            file.map_or_else(String::new, |file| {
                String::from_utf8_lossy(&file.text).into_owned()
            })
        };
        let line = |text: &str, key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let uptime = text("uptime");
        let uptime = uptime
            .split_whitespace()
            .next()
            .and_then(|word| word.split_once('.'))
            .filter(|(_, part)| part.len() == 2)
            .and_then(|(whole, part)| {
                let (whole, part): (u64, u64) = (whole.parse().ok()?, part.parse().ok()?);
                whole.checked_mul(100)?.checked_add(part)
            });
        Ok(Self {
            uptime_centiseconds: uptime.ok_or(TableError("its uptime"))?,
            booted: line(&text("stat"), "btime ").ok_or(TableError("its time of boot"))?,
            memory_kib: line(&text("meminfo"), "MemTotal:").ok_or(TableError("its memory"))?,
        })
    }
}

impl Process {
    fn parse(text: &ProcessText) -> Result<Self, TableError> {
        let pid = u32::try_from(text.pid).map_err(|_| TableError("a pid"))?;
        let stat = String::from_utf8_lossy(&text.stat);
        let (head, rest) = stat.rsplit_once(") ").ok_or(TableError("a stat"))?;
        let (_, name) = head.split_once(" (").ok_or(TableError("a name"))?;
        let mut fields = rest.split_whitespace();
        let state = fields
            .next()
            .and_then(|word| word.parse::<char>().ok())
            .filter(char::is_ascii_alphabetic)
            .ok_or(TableError("a state"))?;
        // All are 64 bits wide, some signed and some not.
        let number = |word: &str| {
            word.parse::<i64>()
                .map(i128::from)
                .or_else(|_| word.parse::<u64>().map(i128::from))
        };
        let numbers: Vec<i128> = fields
            .take(STAT_FIELDS.end() + 1)
            .map(number)
            .collect::<Result<_, _>>()
            .map_err(|_| TableError("a number of stat"))?;
        if !STAT_FIELDS.contains(&numbers.len()) {
            return Err(TableError("the length of stat"));
        }
        let status = String::from_utf8_lossy(&text.status);
        let status: Vec<String> = status
            .lines()
            .filter(|line| is_plain_status(line))
            .map(str::to_owned)
            .collect();
        let id = |key: &str| {
            let line = status.iter().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().nth(1)?.parse::<u32>().ok()
        };
        let owner = id("Uid:").zip(id("Gid:")).ok_or(TableError("an owner"))?;
        let command = String::from_utf8_lossy(&text.cmdline);
        Ok(Self {
            pid,
            name: printable(name).chars().take(MAX_NAME_BYTES).collect(),
            state,
            numbers,
            owner,
            status,
            command: command
                .split('\0')
                .map(printable)
                .collect::<Vec<_>>()
                .join("\0"),
        })
    }

    /// Effective user and group.
    pub(crate) fn owner(&self) -> (u32, u32) {
        self.owner
    }

    /// Its files below /proc/PID, in the order in which they are listed.
    pub(crate) fn files(&self) -> [(&'static str, String); 3] {
        let Self {
            pid,
            name,
            state,
            numbers,
            status,
            command,
            ..
        } = self;
        let numbers: Vec<String> = numbers.iter().map(i128::to_string).collect();
        let (numbers, status) = (numbers.join(" "), status.join("\n"));
        [
            ("stat", format!("{pid} ({name}) {state} {numbers}\n")),
            (
                "status",
                format!("Name:\t{name}\nState:\t{state}\n{status}\n"),
            ),
            ("cmdline", command.clone()),
        ]
    }

    fn lay_out(&self, proc: &Path) -> io::Result<()> {
        let dir = proc.join(self.pid.to_string());
        fs::DirBuilder::new().mode(0o555).create(&dir)?;
        for (name, text) in self.files() {
            fs::write(dir.join(name), text)?;
        }
        // The effective user of a process owns its directory, and this is where `ps` looks.
        let (uid, gid) = self.owner;
        match chown(&dir, Some(uid), Some(gid)) {
            // An ordinary user's `ps` knows no other users: they are his, there.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            other => other,
        }
    }
}

/// A line of `status` with a known name and nothing but numbers.
fn is_plain_status(line: &str) -> bool {
    let Some((key, value)) = line.split_once(":\t") else {
        return false;
    };
    let value = value.strip_suffix(" kB").unwrap_or(value);
    let is_number = |b: u8| b.is_ascii_hexdigit() || b" \t/".contains(&b);
    STATUS.contains(&key) && line.len() <= MAX_STATUS_BYTES && value.bytes().all(is_number)
}

/// Without control characters.
fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(plain).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn text(pid: i32, stat: &str, status: &str, cmdline: &str) -> ProcessText {
        ProcessText {
            pid,
            stat: stat.into(),
            status: status.into(),
            cmdline: cmdline.into(),
            ..Default::default()
        }
    }

    fn numbers() -> String {
        (0..49).map(|n| format!(" {n}")).collect()
    }

    fn sleeper(pid: i32) -> ProcessText {
        let stat = format!("{pid} (sl) eep) S{}\n", numbers());
        text(
            pid,
            &stat,
            "Name:\tx\nUid:\t7\t8\t9\t10\nGid:\t1\t2\t3\t4\nVmRSS:\t 12 kB\nState:\tS (sleeping)\n",
            "sleep\x001\x1b0\x00",
        )
    }

    fn answer(processes: Vec<ProcessText>) -> DescribeProcessesResponse {
        let file = |name: &str, text: &str| TextFile {
            name: name.into(),
            text: text.into(),
            ..Default::default()
        };
        DescribeProcessesResponse {
            processes,
            system: vec![
                file("uptime", "12.34 5.00\n"),
                file("stat", "cpu 1 2\nbtime 1700000000\n"),
                file("meminfo", "MemTotal:  2048 kB\n"),
            ],
            ..Default::default()
        }
    }

    /// A table with these processes.
    pub(crate) fn table(pids: &[i32]) -> Table {
        let mut table = Table::default();
        let asked: Vec<u32> = pids
            .iter()
            .map(|pid| u32::try_from(*pid).unwrap())
            .collect();
        let sleepers = pids.iter().map(|pid| sleeper(*pid)).collect();
        table.add(answer(sleepers), &asked).unwrap();
        table
    }

    #[test]
    fn what_is_laid_out_is_written_anew_from_checked_numbers() {
        let mut table = table(&[71]);
        // Only root may give directories away.
        table.processes[0].owner = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let dir = tempfile::tempdir().unwrap();
        table
            .lay_out(dir.path(), ("7 (x) S\n", "Name:\tx\n"))
            .unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("71/stat"), format!("71 (sl) eep) S{}\n", numbers()));
        assert_eq!(
            read("71/status"),
            "Name:\tsl) eep\nState:\tS\nUid:\t7\t8\t9\t10\nGid:\t1\t2\t3\t4\nVmRSS:\t 12 kB\n"
        );
        assert_eq!(
            (read("1/stat"), read("self/status")),
            ("1 (x) S\n".into(), "Name:\tx\n".into())
        );
        assert_eq!(read("71/cmdline"), "sleep\x001?0\x00");
        assert_eq!(read("uptime"), "12.34 0.00\n");
        assert!(read("stat").ends_with("btime 1700000000\n"));
        assert!(read("meminfo").starts_with("MemTotal: 2048 kB\n"));
    }

    #[test]
    fn the_effective_user_owns_a_process() {
        assert_eq!(Process::parse(&sleeper(1)).unwrap().owner, (8, 2));
    }

    #[test]
    fn nonsense_and_strangers_are_refused() {
        let good = numbers();
        for stat in [
            "",
            "1 x S 1",
            "1 (x) 5 1 2",
            &format!("1 (x) S{good} y"),
            "1 (x) S 1 2 3",
            &format!("1 (x) S{}", " 1".repeat(100)),
        ] {
            assert!(
                Process::parse(&text(1, stat, "Uid:\t0\t0\nGid:\t0\t0\n", "")).is_err(),
                "{stat}"
            );
        }
        assert!(Process::parse(&text(1, &format!("1 (x) S{good}"), "Uid:\t\x1b\n", "")).is_err());
        assert!(
            Process::parse(&text(
                -1,
                &format!("1 (x) S{good}"),
                "Uid:\t0\t0\nGid:\t0\t0\n",
                ""
            ))
            .is_err()
        );
        let mut table = Table::default();
        assert!(table.add(answer(vec![sleeper(3)]), &[4]).is_err());
        assert!(
            table
                .add(answer(vec![sleeper(4), sleeper(4)]), &[4])
                .is_err()
        );
        let mut without = answer(Vec::new());
        without.system.clear();
        assert!(table.add(without, &[]).is_err());
    }
}
