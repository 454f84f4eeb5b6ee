//! A task's standard streams where containerd wants them: its FIFOs, a file, or a logger of the user's.
//!
//! Contract: an output FIFO is opened for reading too, so that it outlives a containerd that restarts, and its writer
//! waits meanwhile; an input FIFO is held open for writing until `CloseIO`, so that only that, together with the end of
//! all other writers, is the end of the input. Nothing here blocks.
//! `file:///path` is appended to; `binary:///program?name=value&flag` is started with the streams' ends as descriptors
//! 3 and 4 and is ready when it closes 5; it ends with the streams.
//! Not here: moving the bytes (`stdio.rs` of the crate).
//! Spec: containerd, docs/runtime-v2.md "I/O", "Logging".

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    pipe::{PipeFlags, pipe_with},
};

use crate::{
    sandbox::{Streams, Wanted},
    spawn::{Program, spawn_program},
    stdio::{self, Progress},
};

/// How long a logger may take to be ready.
const LOGGER_READY: Duration = Duration::from_secs(12);

/// What containerd names, empty where there is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Paths {
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) terminal: bool,
}

/// Why there are no streams.
#[derive(Debug, thiserror::Error)]
pub(super) enum StdioError {
    #[error("open {path}", path = path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("I/O scheme {0:?} is not supported")]
    Scheme(String),
    #[error("start the logger {program}", program = program.display())]
    Logger { program: PathBuf, source: io::Error },
    #[error("the logger {program} is not ready after {seconds} s", program = program.display(), seconds = LOGGER_READY.as_secs())]
    LoggerSlow { program: PathBuf },
    #[error("pass the standard streams on")]
    Flow(#[source] io::Error),
}

/// The host's ends.
#[derive(Debug, Default)]
pub(super) struct Files {
    stdin: Option<OwnedFd>,
    /// Keeps an input FIFO from ending.
    pub(super) keeper: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Streams that flow.
#[derive(Debug)]
pub(super) struct Flowing {
    outputs: [Option<Progress>; 2],
}

/// A place for output.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    Fifo(PathBuf),
    File(PathBuf),
    Logger { program: PathBuf, args: Vec<String> },
}

impl Paths {
    /// Opens them. `container` and `namespace` are what a logger is told.
    pub(super) fn open(&self, namespace: &str, container: &str) -> Result<Files, StdioError> {
        let mut files = Files::default();
        if !self.stdin.is_empty() {
            let path = Path::new(self.stdin.strip_prefix("fifo://").unwrap_or(&self.stdin));
            // The reader first: a writer is refused without one.
            files.stdin = Some(open(path, OFlags::RDONLY | OFlags::NONBLOCK)?.into());
            files.keeper = Some(open(path, OFlags::WRONLY | OFlags::NONBLOCK)?.into());
        }
        match place(&self.stdout)? {
            Place::Logger { program, args } => {
                logger(&mut files, &program, args, [namespace, container])?;
            }
            place => {
                files.stdout = output(&place)?;
                if !self.terminal {
                    let place = match (&place, self.stderr.is_empty()) {
                        // One file takes both.
                        (Place::File(_), true) => place,
                        _ => self::place(&self.stderr)?,
                    };
                    files.stderr = output(&place)?;
                }
            }
        }
        if self.terminal {
            files.stderr = None;
        }
        Ok(files)
    }
}

impl Files {
    /// Which streams the guest is to connect.
    pub(super) fn wanted(&self, terminal: bool) -> Wanted {
        Wanted {
            stdin: self.stdin.is_some(),
            // A terminal is one: its output is read even if nobody wants it.
            stdout: self.stdout.is_some() || terminal,
            stderr: self.stderr.is_some() && !terminal,
            resolver: false,
            preserved: 0,
        }
    }

    /// Joins them with the guest's.
    pub(super) fn flow(self, guest: Streams) -> Result<Flowing, StdioError> {
        if let (Some(from), Some(to)) = (self.stdin, guest.stdin) {
            stdio::input(from, to).map_err(StdioError::Flow)?;
        }
        let output = |from: Option<OwnedFd>, to: Option<OwnedFd>| {
            let Some(from) = from else { return Ok(None) };
            let to = match to {
                Some(to) => to,
                None => File::options().write(true).open("/dev/null")?.into(),
            };
            stdio::output(from, to).map(Some)
        };
        Ok(Flowing {
            outputs: [
                output(guest.stdout, self.stdout).map_err(StdioError::Flow)?,
                output(guest.stderr, self.stderr).map_err(StdioError::Flow)?,
            ],
        })
    }
}

impl Flowing {
    /// Waits until that much of standard output and standard error has been passed on.
    pub(super) async fn reached(&mut self, bytes: [u64; 2]) {
        for (stream, bytes) in self.outputs.iter_mut().zip(bytes) {
            if let Some(stream) = stream {
                stream.reached(bytes).await;
            }
        }
    }
}

fn open(path: &Path, flags: OFlags) -> Result<File, StdioError> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, rustix::fs::Mode::empty())
        .map(File::from)
        .map_err(|errno| StdioError::Open {
            path: path.to_owned(),
            source: errno.into(),
        })
}

fn output(place: &Place) -> Result<Option<OwnedFd>, StdioError> {
    match place {
        Place::Nowhere | Place::Logger { .. } => Ok(None),
        Place::Fifo(path) => open(path, OFlags::RDWR).map(|file| Some(file.into())),
        Place::File(path) => append(path).map(Some).map_err(|source| StdioError::Open {
            path: path.clone(),
            source,
        }),
    }
}

fn append(path: &Path) -> io::Result<OwnedFd> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o644);
    Ok(options.open(path)?.into())
}

fn place(text: &str) -> Result<Place, StdioError> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    match scheme {
        "" if text.is_empty() => Ok(Place::Nowhere),
        "" => Ok(plain(text)),
        "fifo" => Ok(Place::Fifo(decoded(path).into())),
        "file" => Ok(Place::File(decoded(path).into())),
        "binary" => Ok(Place::Logger {
            program: decoded(path).into(),
            args: arguments(query),
        }),
        other => Err(StdioError::Scheme(other.to_owned())),
    }
}

/// A path without a scheme is a FIFO; what is none there (as /dev/null) is written as it is.
fn plain(text: &str) -> Place {
    let path = PathBuf::from(text);
    match fs::metadata(&path) {
        Ok(meta) if meta.file_type().is_fifo() || meta.file_type().is_char_device() => {
            Place::Fifo(path)
        }
        Ok(_) => Place::File(path),
        Err(_) => Place::Fifo(path),
    }
}

/// `a=b&c` are the arguments `a b c`.
fn arguments(query: &str) -> Vec<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .flat_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = Some(value).filter(|value| !value.is_empty());
            std::iter::once(name).chain(value)
        })
        .map(|text| decoded(&text.replace('+', " ")))
        .collect()
}

/// Undoes percent-encoding. What is not encoded properly stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after
            .get(..2)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let encoded = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match encoded.filter(|_| first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Starts a logger and waits until it is ready.
fn logger(
    files: &mut Files,
    program: &Path,
    args: Vec<String>,
    [namespace, container]: [&str; 2],
) -> Result<(), StdioError> {
    let failed = |source| StdioError::Logger {
        program: program.to_owned(),
        source,
    };
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()));
    let (stdout, our_stdout) = pipe()?;
    let (stderr, our_stderr) = pipe()?;
    let (ready, their_ready) = pipe()?;
    let started = spawn_program(
        &Program {
            path: program.to_owned(),
            args,
            env: vec![
                format!("CONTAINER_ID={container}"),
                format!("CONTAINER_NAMESPACE={namespace}"),
            ],
        },
        vec![(stdout, 3), (stderr, 4), (their_ready, 5)],
        None,
    );
    let mut child = started.map_err(failed)?;
    let limit = Timespec {
        tv_sec: i64::try_from(LOGGER_READY.as_secs()).unwrap_or(12),
        tv_nsec: 0,
    };
    let mut watched = [PollFd::new(&ready, PollFlags::IN)];
    let events = rustix::io::retry_on_intr(|| poll(&mut watched, Some(&limit)));
    if events.map_err(|errno| failed(errno.into()))? == 0 {
        return Err(StdioError::LoggerSlow {
            program: program.to_owned(),
        });
    }
    // A byte or the end: both mean that it reads.
    let _ = File::from(ready).read(&mut [0]);
    files.stdout = Some(our_stdout);
    files.stderr = Some(our_stderr);
    // It ends when its streams end, and must not be hurried: it may have much to write still.
    thread::Builder::new()
        .name("logger".to_owned())
        .stack_size(64 << 10)
        .spawn(move || child.wait())
        .map(drop)
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn every_scheme_is_understood_and_no_other() {
        assert_eq!(place("").unwrap(), Place::Nowhere);
        assert_eq!(place("/no/such").unwrap(), Place::Fifo("/no/such".into()));
        assert_eq!(place("file:///a%20b").unwrap(), Place::File("/a b".into()));
        let logger = Place::Logger {
            program: "/bin/log".into(),
            args: ["id", "a b", "flag"].map(str::to_owned).into(),
        };
        assert_eq!(place("binary:///bin/log?id=a+b&flag=").unwrap(), logger);
        assert!(matches!(place("npipe:////x"), Err(StdioError::Scheme(_))));
    }

    #[test]
    fn broken_encoding_is_left_alone() {
        assert_eq!(decoded("100%"), "100%");
        assert_eq!(decoded("%zz%41"), "%zzA");
    }

    #[test]
    fn opening_needs_nobody_on_the_other_side() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdin: fifo(dir.path(), "0"),
            stdout: fifo(dir.path(), "1"),
            stderr: fifo(dir.path(), "2"),
            terminal: false,
        };
        let files = paths.open("ns", "c").unwrap();
        assert!(files.keeper.is_some());
        let wanted = files.wanted(false);
        assert!(wanted.stdin && wanted.stdout && wanted.stderr);
    }

    #[test]
    fn input_ends_with_close_io_and_not_with_a_client_that_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "0");
        let paths = Paths {
            stdin: path.clone(),
            ..Default::default()
        };
        let mut files = paths.open("ns", "c").unwrap();
        let keeper = files.keeper.take();
        let (host, mut guest) = std::os::unix::net::UnixStream::pair().unwrap();
        let streams = Streams {
            stdin: Some(host.into()),
            ..Default::default()
        };
        let _flowing = files.flow(streams).unwrap();
        for text in ["one", "two"] {
            let mut client = OpenOptions::new().write(true).open(&path).unwrap();
            client.write_all(text.as_bytes()).unwrap();
            drop(client);
            let mut read = [0; 3];
            guest.read_exact(&mut read).unwrap();
            assert_eq!(read, text.as_bytes());
        }
        drop(keeper);
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    }

    #[tokio::test]
    async fn a_file_takes_both_outputs() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("deep/log");
        let paths = Paths {
            stdout: format!("file://{}", log.display()),
            ..Default::default()
        };
        let files = paths.open("ns", "c").unwrap();
        let (stdout, mut out) = std::os::unix::net::UnixStream::pair().unwrap();
        let (stderr, mut err) = std::os::unix::net::UnixStream::pair().unwrap();
        let streams = Streams {
            stdout: Some(stdout.into()),
            stderr: Some(stderr.into()),
            ..Default::default()
        };
        let mut flowing = files.flow(streams).unwrap();
        out.write_all(b"out").unwrap();
        flowing.reached([3, 0]).await;
        err.write_all(b"err").unwrap();
        flowing.reached([3, 3]).await;
        assert_eq!(fs::read_to_string(log).unwrap(), "outerr");
    }
}
