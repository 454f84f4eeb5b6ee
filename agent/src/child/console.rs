//! The terminal of a process: a pseudo-terminal of the container's own devpts.
//!
//! Contract: the slave side becomes the process's standard streams and its controlling terminal, and for a container's
//! init also /dev/console; the master side goes to the agent over the control socket (runc: setupConsole).

use super::control::Control;
use super::rootfs::touch;
use super::{ChildError, Context};
use crate::sys;
use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::os::fd::AsFd;

/// Sets the terminal up. The container's root is this process's root.
pub(super) fn set_up(
    size: Option<(u16, u16)>,
    with_console: bool,
    control: &Control,
) -> Result<(), ChildError> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = open("/dev/ptmx", flags, Mode::empty()).step(|| "open /dev/ptmx".to_owned())?;
    unlockpt(&master).step(|| "unlock the terminal".to_owned())?;
    if let Some((rows, columns)) = size.filter(|(rows, columns)| *rows != 0 || *columns != 0) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).step(|| "set the terminal's size".to_owned())?;
    }
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, peer).step(|| "open the terminal".to_owned())?;
    if with_console {
        bind_console(&ptsname(&master, Vec::new()).step(|| "ptsname".to_owned())?)?;
    }
    for number in 0..3 {
        sys::place(slave.as_fd(), number).step(|| "dup the terminal".to_owned())?;
    }
    ioctl_tiocsctty(&slave).step(|| "set the controlling terminal".to_owned())?;
    control
        .send_terminal(master.as_fd())
        .step(|| "send the terminal".to_owned())
}

fn bind_console(name: &std::ffi::CStr) -> Result<(), ChildError> {
    const CONSOLE: &str = "/dev/console";
    let old = rustix::process::umask(Mode::empty());
    let made = touch(CONSOLE);
    rustix::process::umask(old);
    made?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, name, clone).step(|| "open the terminal's node".to_owned())?;
    move_mount(
        &tree,
        "",
        CWD,
        CONSOLE,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .step(|| "bind the terminal to /dev/console".to_owned())
}
