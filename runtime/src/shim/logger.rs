//! The server's log: the FIFO `log` in the bundle, which containerd copies into its own.
//!
//! Contract: opened for reading and writing, and without blocking: the server neither waits for a containerd that is
//! away nor notices that it is; a line that the FIFO has no room for is dropped. Lines are logrus's text, as containerd's,
//! and name the sandbox, and the container that they are about.

use std::{
    fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc,
    time::SystemTime,
};

use crate::log::{Format, Level, line};

/// The name of the FIFO in a bundle.
const FIFO: &str = "log";

/// Where messages go; clones are the same log.
#[derive(Debug, Clone)]
pub(super) struct Logger(Arc<Target>);

#[derive(Debug)]
struct Target {
    file: Option<std::fs::File>,
    debug: bool,
    sandbox: String,
}

impl Logger {
    /// Opens the log of the sandbox whose bundle is `bundle`; without a FIFO there is none.
    pub(super) fn open(bundle: &Path, sandbox: &str, debug: bool) -> Self {
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nonblocking)
            .open(bundle.join(FIFO));
        Self(Arc::new(Target {
            file: file.ok(),
            debug,
            sandbox: sandbox.to_owned(),
        }))
    }

    /// A log that nobody reads.
    #[cfg(test)]
    pub(super) fn silent() -> Self {
        Self(Arc::new(Target {
            file: None,
            debug: false,
            sandbox: String::new(),
        }))
    }

    /// Something failed.
    pub(super) fn error(&self, text: &str) {
        self.write(Level::Error, text, None);
    }

    /// Something about one container failed.
    pub(super) fn error_of(&self, container: &str, text: &str) {
        self.write(Level::Error, text, Some(container));
    }

    /// Something was not done as asked.
    pub(super) fn warning(&self, text: &str) {
        self.write(Level::Warning, text, None);
    }

    /// Something about one container was not done as asked.
    pub(super) fn warning_of(&self, container: &str, text: &str) {
        self.write(Level::Warning, text, Some(container));
    }

    /// For whoever looks for a fault.
    pub(super) fn debug(&self, text: &str) {
        if self.0.debug {
            self.write(Level::Debug, text, None);
        }
    }

    fn write(&self, level: Level, text: &str, container: Option<&str>) {
        if let Some(mut file) = self.0.file.as_ref() {
            // Short of a reader the line is dropped: the log must not change what the server does.
            let about = container.map(|id| ("container", id));
            let sandbox = ("sandbox", self.0.sandbox.as_str());
            let fields: Vec<_> = about.into_iter().chain([sandbox]).collect();
            let line = line(Format::Text, level, text, SystemTime::now(), &fields);
            let _ = file.write(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_log_without_a_reader_does_not_block_and_one_that_comes_later_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FIFO);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let log = Logger::open(dir.path(), "s1", false);
        for _ in 0..2000 {
            log.warning(&"x".repeat(100));
        }
        log.debug("not asked for");
        let mut first = [0; 5];
        std::fs::File::open(&path)
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        assert_eq!(&first, b"time=");
    }
}
