//! Starting a process inside a cgroup, with chosen descriptors: what `std::process` cannot do.
//!
//! Contract: the child begins its life in the cgroup (clone3(2), `CLONE_INTO_CGROUP`), so that every page it ever touches
//! is charged there; moving it later would leave those behind, and costs the kernel a grace period of 10 ms and more.
//! Into cgroups of the first version it goes before it is the program, since nobody can be born there.
//! What [`spawn`] started ends with the thread that called: if the owner is killed, the kernel kills the child too,
//! whatever the child is doing or has become. Call from a thread that lives as long as the process.
//! It inherits the descriptors that are named, under the numbers that are named, and nothing else but `/dev/null` for
//! standard input and output; its environment is empty, its directory `/`, its process group its own. A program that
//! cannot be executed is an error of [`spawn`]. Dropping a [`Child`] kills the process and reaps it.
//! Between clone3 and execve the child makes system calls and nothing else: it allocates nothing and takes no lock.

#![allow(
    unsafe_code,
    reason = "clone3 and what its child does before execve have no safe form"
)]

use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    ptr,
};

use crate::cgroup::Entry;

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid},
};

/// Descriptors are moved to numbers from here on before the child puts them where they belong: targets lie below.
const ABOVE_TARGETS: i32 = 128;

/// A child process.
#[derive(Debug)]
pub(crate) struct Child {
    pid: u32,
    process: OwnedFd,
    ended: Option<WaitIdStatus>,
}

/// A program with what it is told.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    /// Without its name, which is its path.
    pub(crate) args: Vec<String>,
    /// `NAME=value`, and nothing else.
    pub(crate) env: Vec<String>,
}

/// Starts `program` in the cgroup behind `cgroup`. `files` are descriptors and the numbers under which the
/// child finds them, from 2 to 127; what it writes to 2 is its last words.
pub(crate) fn spawn(
    program: &Path,
    files: Vec<(OwnedFd, i32)>,
    cgroup: Option<&Entry>,
) -> io::Result<Child> {
    let program = Program {
        path: program.to_owned(),
        args: Vec::new(),
        env: Vec::new(),
    };
    spawn_bound(&program, files, cgroup)
}

/// As [`spawn`], with arguments and an environment.
pub(crate) fn spawn_bound(
    program: &Program,
    files: Vec<(OwnedFd, i32)>,
    cgroup: Option<&Entry>,
) -> io::Result<Child> {
    let owner = rustix::process::getpid().as_raw_pid();
    start(program, files, cgroup, Some(owner))
}

/// As [`spawn_bound`], with a life of its own: it may outlive this process.
pub(crate) fn spawn_program(
    program: &Program,
    files: Vec<(OwnedFd, i32)>,
    cgroup: Option<&Entry>,
) -> io::Result<Child> {
    start(program, files, cgroup, None)
}

fn start(
    program: &Program,
    files: Vec<(OwnedFd, i32)>,
    cgroup: Option<&Entry>,
    owner: Option<i32>,
) -> io::Result<Child> {
    let path = CString::new(program.path.as_os_str().as_bytes())?;
    let texts = |all: &[String]| -> Result<Vec<CString>, _> {
        all.iter().map(|text| CString::new(text.as_str())).collect()
    };
    let (args, env) = (texts(&program.args)?, texts(&program.env)?);
    let argv = pointers(std::iter::once(&path).chain(&args));
    let envp = pointers(&env);
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let mut moved = vec![(above(&null)?, 0), (above(&null)?, 1)];
    for (file, number) in files {
        moved.push((above(&file)?, number));
    }
    let plan: Vec<(i32, i32)> = moved
        .iter()
        .map(|(file, number)| (file.as_raw_fd(), *number))
        .collect();
    let (failure, low) = pipe_with(PipeFlags::CLOEXEC)?;
    let tell = above(&low)?;
    let (birthplace, doors) = match cgroup {
        None => (None, Vec::new()),
        Some(Entry::Directory(directory)) => (Some(directory.as_fd()), Vec::new()),
        Some(Entry::Doors(doors)) => (None, doors.iter().map(AsRawFd::as_raw_fd).collect()),
    };
    let started = clone_into(birthplace, 0)?;
    let Some((pid, process)) = started else {
        let moves = Moves {
            doors: &doors,
            files: &plan,
        };
        become_program(&path, [&argv, &envp], moves, tell.as_raw_fd(), owner)
    };
    let child = Child {
        pid,
        process,
        ended: None,
    };
    // The only writer left is the child's, until its execve.
    drop((low, tell, moved));
    let mut errno = [0; 4];
    match File::from(failure).read_exact(&mut errno) {
        // It hung up without a word: execve closed the pipe.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(child),
        Ok(()) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
        Err(error) => Err(error),
    }
}

impl Child {
    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes readable when the process ends.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// Ends it now.
    pub(crate) fn kill(&self) {
        // Fails only if it has ended already.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Waits for its end, in words.
    pub(crate) fn wait(&mut self) -> io::Result<String> {
        let status = match self.ended.take() {
            Some(status) => status,
            None => {
                let id = WaitId::PidFd(self.process.as_fd());
                rustix::io::retry_on_intr(|| waitid(id.clone(), WaitIdOptions::EXITED))?
                    .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?
            }
        };
        let words = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "it ended".to_owned(),
        };
        self.ended = Some(status);
        Ok(words)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended.is_none() {
            self.kill();
            // Fails only if somebody else has reaped it.
            let _ = self.wait();
        }
    }
}

/// A copy with a number above all targets, closed by execve.
fn above(file: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(file, ABOVE_TARGETS)?)
}

/// A user namespace with these identities, lines for `/proc/PID/uid_map` and `gid_map`. It lasts as long as the descriptor.
pub(crate) fn user_namespace(users: &str, groups: &str) -> io::Result<OwnedFd> {
    let owner = rustix::process::getpid().as_raw_pid();
    let Some((pid, process)) = clone_into(None, libc::CLONE_NEWUSER)? else {
        wait_for_the_end(owner)
    };
    // Killed and reaped when this value goes.
    let child = Child {
        pid,
        process,
        ended: None,
    };
    let proc = Path::new("/proc").join(child.pid().to_string());
    std::fs::write(proc.join("uid_map"), users)?;
    std::fs::write(proc.join("gid_map"), groups)?;
    Ok(File::open(proc.join("ns/user"))?.into())
}

/// A child whose namespace is all that is wanted of it.
fn wait_for_the_end(owner: i32) -> ! {
    while bind(owner) {
        // SAFETY: takes nothing; ends with a signal.
        unsafe { libc::pause() };
    }
    // SAFETY: ends this process at once, without running anything of its parent's.
    unsafe { libc::_exit(127) }
}

/// fork, into a cgroup and with `CLONE_NEW*` flags: `None` in the child, pid and process descriptor in the parent.
fn clone_into(
    cgroup: Option<BorrowedFd<'_>>,
    namespaces: libc::c_int,
) -> io::Result<Option<(u32, OwnedFd)>> {
    let mut process: i32 = -1;
    // SAFETY: all zeroes is a valid clone_args: plain numbers, of which zero means "none".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = as_u64(libc::CLONE_PIDFD | namespaces);
    args.pidfd = ptr::from_mut(&mut process).expose_provenance() as u64;
    args.exit_signal = as_u64(libc::SIGCHLD);
    if let Some(cgroup) = cgroup {
        /// clone3(2); libc has it as a number that does not fit its own type.
        const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = as_u64(cgroup.as_raw_fd());
    }
    // SAFETY: without CLONE_VM the child has a copy of this memory and its own stack, as after fork(2); `args` and the
    // place for the descriptor are alive, and the size given is that of `args`.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            ptr::from_ref(&args),
            size_of::<libc::clone_args>(),
        )
    };
    match u32::try_from(pid) {
        Ok(0) => Ok(None),
        // SAFETY: clone3 succeeded and has put a fresh descriptor there, which nothing else owns.
        Ok(pid) => Ok(Some((pid, unsafe { OwnedFd::from_raw_fd(process) }))),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// An array as execve(2) wants it; valid for as long as the texts are.
fn pointers<'t>(texts: impl IntoIterator<Item = &'t CString>) -> Vec<*const libc::c_char> {
    let texts = texts.into_iter().map(|text| text.as_ptr());
    texts.chain([ptr::null()]).collect()
}

/// Where the child goes before it is the program, and what it takes along.
#[derive(Clone, Copy)]
struct Moves<'m> {
    /// Files of cgroups of the first version.
    doors: &'m [i32],
    /// Descriptors and the numbers that they get.
    files: &'m [(i32, i32)],
}

/// The child's way to the program: system calls only, until it is the program or has said why not.
fn become_program(
    program: &CStr,
    [argv, envp]: [&[*const libc::c_char]; 2],
    Moves { doors, files }: Moves<'_>,
    tell: i32,
    owner: Option<i32>,
) -> ! {
    close_inherited(libc::CLOSE_RANGE_CLOEXEC);
    let bound = owner.is_none_or(bind);
    let entered = doors.iter().all(|door| {
        // SAFETY: one byte of a literal, into an open file.
        unsafe { libc::write(*door, c"0".as_ptr().cast(), 1) == 1 }
    });
    // Only now, because these numbers may be among those that are replaced.
    let placed = entered
        && files.iter().all(|(from, to)| {
            // SAFETY: dup2 takes numbers; this process has one thread and no use for what it replaces.
            unsafe { libc::dup2(*from, *to) >= 0 }
        });
    // SAFETY: setpgid takes numbers.
    let grouped = unsafe { libc::setpgid(0, 0) } == 0;
    // SAFETY: the path is a literal that ends in a zero byte.
    let moved = unsafe { libc::chdir(c"/".as_ptr()) } == 0;
    if bound && placed && grouped && moved {
        // SAFETY: the program and both arrays are alive and end in zero; it returns only if it failed.
        unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    }
    let errno = io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
        .to_ne_bytes();
    // SAFETY: four bytes of a live array, into a pipe that has room for them.
    unsafe { libc::write(tell, errno.as_ptr().cast(), errno.len()) };
    // SAFETY: ends this process at once, without running anything of its parent's.
    unsafe { libc::_exit(127) }
}

/// Lets this process end with its parent, which must be `owner` still.
fn bind(owner: i32) -> bool {
    // SAFETY: takes numbers.
    let bound = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } == 0;
    // An owner that died before that is not waited for any more: this process has another parent by now.
    // SAFETY: takes nothing.
    bound && unsafe { libc::getppid() } == owner
}

/// Closes every descriptor from 3 on that a process got from whoever started it, before it opens any of its own.
pub(crate) fn forget_inherited() {
    close_inherited(0);
}

/// Takes a descriptor from 3 on over from whoever started this process. Each can be taken once; this process's own, which
/// are all close-on-exec, are not there for it.
pub(crate) fn take_inherited(number: u32) -> io::Result<OwnedFd> {
    let nothing = || io::Error::from_raw_os_error(libc::EBADF);
    let number = i32::try_from(number).map_err(|_| nothing())?;
    // SAFETY: F_GETFD takes numbers and changes nothing.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if number < 3 || flags & libc::FD_CLOEXEC != 0 {
        return Err(nothing());
    }
    // SAFETY: takes numbers; the descriptor is open, and nobody in this process depends on its flags.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and nothing owns it: what this program opens is close-on-exec from the start, and what has been
    // taken here before is so since.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn close_inherited(flags: libc::c_uint) {
    // SAFETY: takes numbers. It runs where nothing owns a descriptor from 3 on: at the very start of a process, or (with
    // CLOEXEC, which closes nothing yet) just before one becomes another program.
    // It fails only on kernels before 5.11, where what the caller has left open stays so.
    let _ = unsafe { libc::close_range(3, libc::c_uint::MAX, flags.cast_signed()) };
}

/// Flags, signals and open descriptors are not negative.
fn as_u64(number: i32) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(files: Vec<(OwnedFd, i32)>) -> Child {
        spawn(Path::new("/bin/sh"), files, None).unwrap()
    }

    #[test]
    fn descriptors_arrive_under_their_numbers() {
        // Without arguments a shell reads its script from standard input, which is empty here: it exits with 0.
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut child = shell(vec![(writer, 2)]);
        assert_eq!(child.wait().unwrap(), "exit status 0");
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "");
    }

    #[test]
    fn a_program_that_is_none_is_an_error() {
        let error = |path| spawn(Path::new(path), Vec::new(), None).unwrap_err().kind();
        assert_eq!(error("/nonexistent/program"), io::ErrorKind::NotFound);
        assert_eq!(error("/etc"), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_dropped_child_is_killed_and_reaped() {
        let child = spawn(Path::new("/usr/bin/yes"), Vec::new(), None).unwrap();
        let pid = child.pid();
        drop(child);
        assert!(!Path::new("/proc").join(pid.to_string()).exists());
    }

    #[test]
    fn a_child_ends_with_the_thread_that_started_it() {
        let mut child =
            std::thread::spawn(|| spawn(Path::new("/usr/bin/yes"), Vec::new(), None).unwrap())
                .join()
                .unwrap();
        assert_eq!(child.wait().unwrap(), "killed by signal 9");
    }

    #[test]
    fn a_killed_child_says_so() {
        let mut child = spawn(Path::new("/usr/bin/yes"), Vec::new(), None).unwrap();
        child.kill();
        assert_eq!(child.wait().unwrap(), "killed by signal 9");
        assert_eq!(child.wait().unwrap(), "killed by signal 9");
    }
}
