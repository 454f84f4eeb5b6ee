//! System calls that no safe crate offers, each wrapped once.
//!
//! Contract: safe functions over kernel calls; arguments are owned or borrowed descriptors, byte strings and numbers.
//! Errors are the kernel's, unexplained: callers name the step. Callers are either the agent (one thread) or its
//! re-executed child (one thread).
//! Not here: the power-off port (`power.rs`).
#![allow(
    unsafe_code,
    reason = "system calls without a safe wrapper in our crates"
)]

use std::ffi::{CStr, CString, c_int, c_long, c_void};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A descriptor that this process inherited under a number it was told.
///
/// Each number may be claimed once: the caller owns the result.
pub(crate) fn claim(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(F_GETFD) takes no pointer; it only tells whether the number is open.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) }.into())?;
    // SAFETY: the descriptor is open (checked above) and by this function's contract nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Registers a non-blocking descriptor with the event loop.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor as long as it lives, and the AsyncFd owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Makes descriptor `number` a copy of `fd` that survives execve, closing what it was.
pub(crate) fn place(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: dup2(2) takes no pointers; the callers place only standard streams and preserved descriptors, which no
    // owned descriptor of this process uses (those were moved above them).
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into()).map(drop)
}

/// Marks every descriptor from `first` upwards close-on-exec.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: close_range(2) with CLOEXEC takes no pointers and closes nothing now.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `CLONE_INTO_CGROUP`, clone3(2).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A fork of this single-threaded process as its sibling (`CLONE_PARENT`), into new namespaces and, if
/// given, another cgroup.
///
/// Returns the new process's identifier as the caller sees it, and `None` in the new process.
pub(crate) fn fork_sibling(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Option<rustix::process::Pid>> {
    let into = if cgroup.is_some() {
        CLONE_INTO_CGROUP
    } else {
        0
    };
    let cgroup = cgroup.map_or(Ok(0), |fd| u64::try_from(fd.as_raw_fd()));
    let cgroup = cgroup.map_err(io::Error::other)?;
    let parent = u64::from(libc::CLONE_PARENT.unsigned_abs());
    let args = CloneArgs {
        flags: namespaces | parent | into,
        cgroup,
        ..CloneArgs::default()
    };
    // SAFETY: `args` is a valid clone_args for the size given; without CLONE_VM and with no stack this is fork(2), and
    // the caller has one thread, so no lock of another thread is copied in a held state.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    Ok(rustix::process::Pid::from_raw(
        i32::try_from(pid).map_err(io::Error::other)?,
    ))
}

/// Leaves a namespace for a new one; not for flags that would affect other threads' descriptors (`CLONE_FILES`).
pub(crate) fn unshare(namespace: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: only namespace flags are passed by the callers; the descriptor table stays shared as it was.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespace) }?)
}

/// What mount_setattr(2) changes.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) userns: u64,
}

/// mount_setattr(2) on the mount that `mount` is the root of.
pub(crate) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: MountAttributes,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a literal C string and `attributes` is a mount_attr of the size given, alive over the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// Loads a seccomp filter: one `sock_filter` per element, in its memory layout as a little-endian integer. Answers its
/// listener if `flags` ask for one (`SECCOMP_FILTER_FLAG_NEW_LISTENER`).
pub(crate) fn load_seccomp(program: &[u64], flags: u64) -> io::Result<Option<OwnedFd>> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `filter` points to `length` eight-byte instructions that outlive the call; the kernel only reads them and
    // validates them itself.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const filter,
        )
    })?;
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
        return Ok(None);
    }
    let number = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: with this flag the call answers a fresh descriptor, which nothing else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
struct ProgAttach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_ATTACH: c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Loads a device filter (`BPF_PROG_TYPE_CGROUP_DEVICE`) and attaches it to the cgroup, for as long as that exists.
pub(crate) fn attach_device_filter(cgroup: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    let load = ProgLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: `load` is the head of bpf_attr for this command and its pointers refer to live memory of the stated
    // length; the kernel only reads it.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<ProgLoad>(),
        )
    })?;
    let raw = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: bpf(2) returned a fresh descriptor (checked above) that nothing else owns.
    let prog = unsafe { OwnedFd::from_raw_fd(raw) };
    let attach = ProgAttach {
        target_fd: u32::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?,
        attach_bpf_fd: u32::try_from(prog.as_raw_fd()).map_err(io::Error::other)?,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attach` is the head of bpf_attr for this command, alive over the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of::<ProgAttach>(),
        )
    })
    .map(drop)
}

/// Joins a new session keyring of this name (keyctl(2)); a kernel without keyrings is no error.
pub(crate) fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;
    // SAFETY: `name` is a C string that outlives the call.
    match check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr())
    }) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other.map(drop),
    }
}

/// A real-time signal, which has a number but no name.
pub(crate) fn real_time_signal(number: i32) -> rustix::process::Signal {
    debug_assert!((32..=64).contains(&number), "not a real-time signal");
    // SAFETY: the callers pass 32..=64: valid signal numbers, sent to other processes only, never handled or blocked
    // here, so that the C library's own use of the first two in this process is untouched.
    unsafe { rustix::process::Signal::from_raw_unchecked(number) }
}

/// ioprio_set(2) for this process.
pub(crate) fn set_io_priority(value: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_long = 1;
    // SAFETY: ioprio_set(2) takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// personality(2).
pub(crate) fn set_personality(domain: u64) -> io::Result<()> {
    // SAFETY: personality(2) takes a number only.
    check(unsafe { libc::syscall(libc::SYS_personality, domain) }).map(drop)
}

/// Arguments of sched_setattr(2), version 0.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SchedAttributes {
    /// Size of this structure in bytes.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For `SCHED_OTHER` and `SCHED_BATCH`.
    pub nice: i32,
    /// For `SCHED_FIFO` and `SCHED_RR`.
    pub priority: u32,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub runtime: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub deadline: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub period: u64,
}

/// sched_setattr(2) for this process.
pub(crate) fn set_scheduler(attributes: &SchedAttributes) -> io::Result<()> {
    // SAFETY: `attributes` is a sched_attr that states its own size and outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            0,
            std::ptr::from_ref(attributes),
            0,
        )
    })
    .map(drop)
}

/// Has the kernel reap this process's children when they end: nobody here waits for them.
pub(crate) fn ignore_children() -> io::Result<()> {
    // SAFETY: `SIG_IGN` installs no handler.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets every signal to its default action and unblocks all: what a container's process starts with.
///
/// By the kernel's own call: glibc's refuses its two internal signals, which its posix_spawn leaves ignored.
pub(crate) fn reset_signals() -> io::Result<()> {
    /// `struct sigaction` of the kernel: all zeroes is `SIG_DFL`.
    const DEFAULT: [u64; 4] = [0; 4];
    const SET_BYTES: usize = 8;
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: the new action is a kernel sigaction that outlives the call and installs no handler; the old one is not
        // asked for; the mask's size is the kernel's.
        check(unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                0,
                SET_BYTES,
            )
        })?;
    }
    let empty = 0u64;
    // SAFETY: the new mask is eight bytes, as stated, alive over the call; the old one is not asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const empty,
            0,
            SET_BYTES,
        )
    })
    .map(drop)
}

/// execve(2). Returns only on failure.
pub(crate) fn execute(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: path is a C string; both arrays end with a null pointer and point to C strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// linux/vm_sockets.h, the variant that takes the C library's `timeval`.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: c_int = 6;

/// A non-blocking stream socket of vsock(7).
fn vsock() -> io::Result<OwnedFd> {
    let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket(2) takes numbers only.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, flags, 0) }.into())?;
    let raw = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: socket(2) returned a fresh descriptor (checked above) that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// An address of vsock(7) and its length.
fn vsock_address(cid: u32, port: u32) -> io::Result<(libc::sockaddr_vm, libc::socklen_t)> {
    // SAFETY: all zeroes is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).map_err(io::Error::other)?;
    address.svm_cid = cid;
    address.svm_port = port;
    let length =
        libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).map_err(io::Error::other)?;
    Ok((address, length))
}

/// Listens on a port of this guest (vsock(7)); non-blocking.
pub(crate) fn listen_vsock(port: u32, backlog: i32) -> io::Result<OwnedFd> {
    let socket = vsock()?;
    let (address, length) = vsock_address(libc::VMADDR_CID_ANY, port)?;
    // SAFETY: `address` is a sockaddr_vm of the length given, alive over the call.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    check(result.into())?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}

/// Begins to connect to a port of the host (vsock(7)); the socket is writable when it is done.
pub(crate) fn connect_vsock(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = vsock()?;
    // The default of two seconds is too short for a host that is busy; the VMM watches over the boot, and the runtime over
    // its calls.
    let patience = libc::timeval {
        tv_sec: 60,
        tv_usec: 0,
    };
    let length = libc::socklen_t::try_from(size_of::<libc::timeval>()).map_err(io::Error::other)?;
    // SAFETY: `patience` is a timeval of the length given, alive over the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const patience).cast(),
            length,
        )
    };
    check(result.into())?;
    let (address, length) = vsock_address(cid, port)?;
    // SAFETY: `address` is a sockaddr_vm of the length given, alive over the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    match check(result.into()) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(socket),
    }
}

/// Sets the loopback interface up in the caller's network namespace (netdevice(7), `SIOCSIFFLAGS`).
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is, alive over the call.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            (&raw mut request).cast::<c_void>(),
        )
    };
    check(result.into()).map(drop)
}
