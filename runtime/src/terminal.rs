//! Terminals on the host's side: the pair behind `--console-socket`, and the caller's own.
//!
//! The container's terminal is in the guest. With a console socket, the caller gets the master of a pair made here, and
//! the slave, in raw mode, stands for the guest's terminal: bytes pass unchanged, and because the process that holds the
//! slave makes it its controlling terminal, the kernel tells it of a new size (`SIGWINCH`) and of a caller that is gone
//! (`SIGHUP`). Without one, in the foreground, the caller's terminal is put in raw mode for as long as a guard lives.
//! Not here: moving the bytes (`stdio.rs`), telling the guest (`sandbox/`).

#![allow(
    unsafe_code,
    reason = "giving a controlling terminal up is an ioctl that rustix does not have"
)]

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use oci_spec::runtime::BoxBuilder;
use rustix::{
    ioctl::{NoArg, Opcode, ioctl},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    pty::OpenptFlags,
    termios::{
        OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
    },
};

/// Why there is no terminal.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    /// The console socket does not take the master.
    #[error("send the terminal to the console socket {path}", path = path.display())]
    ConsoleSocket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A terminal operation failed.
    #[error("{step}")]
    Terminal {
        /// What was tried.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Rows and columns.
pub type Size = (u16, u16);

/// Makes a pair, sends its master over the console socket, and answers the slave: in raw mode, and the controlling
/// terminal of this process, which must lead a session without one.
pub fn behind_console_socket(path: &Path, size: Option<Size>) -> Result<OwnedFd, TerminalError> {
    let (master, slave, name) = pair().map_err(step("make a pseudo-terminal"))?;
    make_raw(slave.as_fd()).map_err(step("put the pseudo-terminal in raw mode"))?;
    if let Some(size) = size {
        set_size(slave.as_fd(), size).map_err(step("size the pseudo-terminal"))?;
    }
    rustix::process::ioctl_tiocsctty(&slave)
        .map_err(|errno| step("take the controlling terminal")(errno.into()))?;
    hand_over(path, &name, master.as_fd()).map_err(|source| TerminalError::ConsoleSocket {
        path: path.to_owned(),
        source,
    })?;
    Ok(slave)
}

/// Gives the controlling terminal up. A process that ends with one has the kernel hang the terminal up, and what its
/// other side has not read yet is lost; without one, the other side reads everything and then the end.
/// The kernel sends this process a last `SIGHUP`.
pub fn release(terminal: BorrowedFd<'_>) {
    /// tty_ioctl(4), asm-generic/ioctls.h.
    const TIOCNOTTY: Opcode = 0x5422;
    // SAFETY: TIOCNOTTY is an operation without an argument.
    let give_up = unsafe { NoArg::<TIOCNOTTY>::new() };
    // SAFETY: it touches no memory of this process; on anything but our controlling terminal it fails.
    let _ = unsafe { ioctl(terminal, give_up) };
}

/// The size of a terminal; `None` if it is none or has no size.
pub fn size(terminal: BorrowedFd<'_>) -> Option<Size> {
    let Winsize { ws_row, ws_col, .. } = tcgetwinsize(terminal).ok()?;
    (ws_row > 0 && ws_col > 0).then_some((ws_row, ws_col))
}

/// A size as `config.json` has it.
pub fn console_size((rows, columns): Size) -> Option<oci_spec::runtime::Box> {
    // A builder of two plain numbers has nothing to refuse.
    BoxBuilder::default()
        .height(rows)
        .width(columns)
        .build()
        .ok()
}

/// The caller's terminal in raw mode; dropping it restores what was.
#[derive(Debug)]
pub struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Finds the caller's terminal where runc looks for it: standard error, output and input, then `/dev/tty`.
    pub fn enter() -> Result<Self, TerminalError> {
        let failed = step("find a terminal");
        let terminal = caller_terminal().map_err(failed)?;
        let before = make_raw(terminal.as_fd()).map_err(step("put the terminal in raw mode"))?;
        Ok(Self { terminal, before })
    }

    /// Its size now.
    pub fn size(&self) -> Option<Size> {
        size(self.terminal.as_fd())
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // If the terminal has gone there is nothing to restore.
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

fn caller_terminal() -> io::Result<OwnedFd> {
    let (error, output, input) = (io::stderr(), io::stdout(), io::stdin());
    for stream in [error.as_fd(), output.as_fd(), input.as_fd()] {
        if rustix::termios::isatty(stream) {
            return stream.try_clone_to_owned();
        }
    }
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    Ok(rustix::fs::open(
        "/dev/tty",
        flags,
        rustix::fs::Mode::empty(),
    )?)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd, Vec<u8>)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?.into_bytes();
    Ok((master, slave, name))
}

fn make_raw(terminal: BorrowedFd<'_>) -> io::Result<Termios> {
    let before = tcgetattr(terminal)?;
    let mut raw = before.clone();
    raw.make_raw();
    tcsetattr(terminal, OptionalActions::Now, &raw)?;
    Ok(before)
}

fn set_size(terminal: BorrowedFd<'_>, (ws_row, ws_col): Size) -> io::Result<()> {
    Ok(tcsetwinsize(
        terminal,
        Winsize {
            ws_row,
            ws_col,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )?)
}

/// runc's protocol: one message, the terminal's name with the master attached.
fn hand_over(path: &Path, name: &[u8], master: BorrowedFd<'_>) -> io::Result<()> {
    let socket = UnixStream::connect(path)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [master];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        &socket,
        &[IoSlice::new(name)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

fn step(step: &'static str) -> impl Fn(io::Error) -> TerminalError {
    move |source| TerminalError::Terminal { step, source }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, io::Write};

    use super::*;

    #[test]
    fn bytes_pass_a_raw_pair_unchanged() {
        let (master, slave, name) = pair().unwrap();
        assert!(name.starts_with(b"/dev/pts/"));
        make_raw(slave.as_fd()).unwrap();
        let (mut master, mut slave) = (File::from(master), File::from(slave));
        slave.write_all(b"a\nb\r\x03").unwrap();
        let mut received = [0; 5];
        master.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"a\nb\r\x03");
    }

    #[test]
    fn a_size_set_on_one_side_is_seen_on_the_other() {
        let (master, slave, _) = pair().unwrap();
        assert_eq!(size(master.as_fd()), None);
        set_size(slave.as_fd(), (24, 80)).unwrap();
        assert_eq!(size(master.as_fd()), Some((24, 80)));
    }

    #[test]
    fn what_is_no_terminal_has_no_size() {
        assert_eq!(size(tempfile::tempfile().unwrap().as_fd()), None);
    }

    #[test]
    fn a_missing_console_socket_is_named() {
        let (master, _slave, name) = pair().unwrap();
        let error = hand_over(Path::new("/nonexistent/socket"), &name, master.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
