//! Pseudo-terminals as a person or a container engine holds them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use crate::{Call, Running};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// How long a terminal may be silent before the test fails.
const SILENCE: Duration = Duration::from_secs(60);

/// The master's side of a terminal.
pub struct Terminal {
    master: File,
    seen: Vec<u8>,
}

impl Terminal {
    /// A new terminal and its slave, to be the standard streams of a process.
    pub fn open() -> (Self, File) {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("openpt");
        grantpt(&master).expect("grantpt");
        unlockpt(&master).expect("unlockpt");
        let name = ptsname(&master, Vec::new())
            .expect("ptsname")
            .into_string()
            .expect("a path");
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name)
            .expect("slave");
        (Self::of(master), slave)
    }

    /// Starts a call with a new terminal as its three standard streams.
    pub fn start(call: Call) -> (Self, Running) {
        let (terminal, slave) = Self::open();
        let stream = || slave.try_clone().expect("dup");
        let call = call.stdin(stream()).stdout(stream()).stderr(stream());
        (terminal, call.start())
    }

    /// The terminal that a runtime sends to a console socket.
    pub fn receive(socket: &UnixListener) -> Self {
        let (connection, _) = socket.accept().expect("accept");
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 4096];
        let mut buffers = [io::IoSliceMut::new(&mut name)];
        recvmsg(
            &connection,
            &mut buffers,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .expect("recvmsg");
        let master = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Self::of(master.expect("no descriptor in the console message"))
    }

    /// A listening console socket.
    pub fn console_socket(path: &Path) -> UnixListener {
        UnixListener::bind(path).expect("console socket")
    }

    fn of(master: OwnedFd) -> Self {
        Self {
            master: master.into(),
            seen: Vec::new(),
        }
    }

    /// Types.
    pub fn write(&mut self, text: &str) {
        self.master
            .write_all(text.as_bytes())
            .expect("write to the terminal");
    }

    /// Sets the window's size.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).expect("resize");
    }

    /// Reads until `text` has appeared; what came before it is consumed.
    ///
    /// # Panics
    ///
    /// If the terminal closes or stays silent before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        loop {
            let seen = String::from_utf8_lossy(&self.seen).into_owned();
            if let Some(at) = seen.find(text) {
                self.seen = seen.as_bytes()[at + text.len()..].to_vec();
                return seen[..at].to_owned();
            }
            assert!(
                self.read_more(),
                "the terminal ended before {text:?}: {seen:?}"
            );
        }
    }

    /// Reads to the end.
    pub fn finish(mut self) -> String {
        while self.read_more() {}
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    fn read_more(&mut self) -> bool {
        let silence = Timespec::try_from(SILENCE).expect("time");
        let mut polled = [PollFd::from_borrowed_fd(self.master.as_fd(), PollFlags::IN)];
        let ready = poll(&mut polled, Some(&silence)).expect("poll");
        assert!(
            ready > 0,
            "silent terminal; so far: {:?}",
            String::from_utf8_lossy(&self.seen)
        );
        let mut buffer = [0; 4096];
        // The slave's last close is an end of file on some systems and EIO on Linux.
        let length = self.master.read(&mut buffer).unwrap_or(0);
        self.seen.extend_from_slice(&buffer[..length]);
        length > 0
    }
}
