//! One call of a program under test: started, waited for with a deadline, judged by what it left.
//!
//! Its output goes to files, not pipes: containers inherit it and live on after the call, and a reader that waits for
//! the end of a pipe would wait for them. Tests about pipes make their own.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use std::os::unix::process::ExitStatusExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};

/// How long a call may take, unless it says otherwise. The lab emulates its processor, and may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// A program with its arguments, not yet started.
pub struct Call {
    command: Command,
    output: PathBuf,
    limit: Duration,
}

/// What a call left: its exit status and its output.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Exit status; 128 + n when signal n ended the process.
    pub status: i32,
    /// All of standard output.
    pub stdout: Vec<u8>,
    /// All of standard error.
    pub stderr: String,
}

/// A call that has been started.
pub struct Running {
    child: Child,
    output: PathBuf,
    limit: Duration,
}

impl Call {
    /// A call whose output goes to `<output>.out` and `<output>.err`.
    pub fn new(program: impl AsRef<OsStr>, output: &Path) -> Self {
        let mut command = Command::new(program);
        let file = |suffix| File::create(output.with_extension(suffix)).expect("output file");
        command
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("err"));
        Self {
            command,
            output: output.to_owned(),
            limit: LIMIT,
        }
    }

    /// More arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Standard input; `/dev/null` otherwise.
    #[must_use]
    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.command.stdin(stdin);
        self
    }

    /// Standard output, instead of the file.
    #[must_use]
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.command.stdout(stdout);
        self
    }

    /// Standard error, instead of the file.
    #[must_use]
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.command.stderr(stderr);
        self
    }

    /// The working directory.
    #[must_use]
    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// A deadline other than the usual one.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The same call, which begins when its piped standard input ends: until then it is a shell.
    #[must_use]
    pub fn held(self) -> Self {
        let mut shell = Self::new("sh", &self.output);
        shell
            .command
            .args(["-c", "read _; exec \"$@\" </dev/null", "sh"])
            .arg(self.command.get_program())
            .args(self.command.get_args())
            .envs(
                self.command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(Stdio::piped());
        shell
    }

    /// Starts the program.
    pub fn start(mut self) -> Running {
        let child = self
            .command
            .spawn()
            .unwrap_or_else(|e| panic!("{:?}: {e}", self.command));
        // The ends of pipes that were handed over are closed here with the command.
        Running {
            child,
            output: self.output,
            limit: self.limit,
        }
    }

    /// Starts the program and waits for its end.
    pub fn finish(self) -> Outcome {
        self.start().finish()
    }

    /// Waits for the end and fails the test unless the exit status is 0.
    #[track_caller]
    pub fn succeed(self) -> Outcome {
        let call = format!("{:?}", self.command);
        let outcome = self.finish();
        assert_eq!(outcome.status, 0, "{call}: {}", outcome.stderr);
        outcome
    }
}

impl Running {
    /// The process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("kill");
    }

    /// The writing end of a piped standard input.
    pub fn take_stdin(&mut self) -> std::process::ChildStdin {
        self.child
            .stdin
            .take()
            .expect("standard input is not a pipe")
    }

    /// The reading end of a piped standard output.
    pub fn take_stdout(&mut self) -> std::process::ChildStdout {
        self.child
            .stdout
            .take()
            .expect("standard output is not a pipe")
    }

    /// The reading end of a piped standard error.
    pub fn take_stderr(&mut self) -> std::process::ChildStderr {
        self.child
            .stderr
            .take()
            .expect("standard error is not a pipe")
    }

    /// The next line of a piped standard output: how a container says that it has come so far.
    #[track_caller]
    pub fn line(&mut self) -> String {
        let stdout = self
            .child
            .stdout
            .as_mut()
            .expect("standard output is not a pipe");
        let mut line = Vec::new();
        let mut byte = [0];
        while stdout.read_exact(&mut byte).is_ok() && byte != *b"\n" {
            line.push(byte[0]);
        }
        String::from_utf8(line).expect("text")
    }

    /// Waits for at most `time`; true if the program has ended.
    pub fn ends_within(&self, time: Duration) -> bool {
        wait_for_exit(self.pid(), time)
    }

    /// Waits for the end.
    ///
    /// # Panics
    ///
    /// If the program takes longer than its limit; it is killed then.
    #[track_caller]
    pub fn finish(mut self) -> Outcome {
        if !self.ends_within(self.limit) {
            let _ = self.child.kill();
            let said = fs::read_to_string(self.output.with_extension("err")).unwrap_or_default();
            panic!("did not end within {:?}; stderr: {said}", self.limit);
        }
        let status = exit_code(self.child.wait().expect("wait"));
        let read = |suffix| fs::read(self.output.with_extension(suffix)).unwrap_or_default();
        let stderr = String::from_utf8_lossy(&read("err")).into_owned();
        Outcome {
            status,
            stdout: read("out"),
            stderr,
        }
    }
}

impl Outcome {
    /// Standard output as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("output is text")
    }

    /// Fails the test unless this is a refusal as people should see it: non-zero, and one clear line on stderr.
    ///
    /// runc may add warnings and what else went wrong; its last line counts.
    #[track_caller]
    pub fn is_refusal(&self, mentioning: &str) {
        assert_ne!(self.status, 0, "{self:?}");
        let lines: Vec<&str> = self.stderr.trim_end().lines().collect();
        let may_add = crate::case::runtime() == "runc";
        assert!(lines.len() == 1 || (may_add && lines.len() > 1), "{self:?}");
        let said = lines
            .last()
            .map(|line| line.to_lowercase())
            .unwrap_or_default();
        assert!(
            said.contains(&mentioning.to_lowercase()),
            "no {mentioning:?} in {said:?}"
        );
    }
}

/// Waits until a process has ended (or is a zombie), for at most `time`; true if it has.
pub fn wait_for_exit(pid: Pid, time: Duration) -> bool {
    let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return true;
    };
    let time = Timespec::try_from(time).expect("time");
    let mut polled = [PollFd::new(&process, PollFlags::IN)];
    poll(&mut polled, Some(&time)).expect("poll") > 0
}

fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}
