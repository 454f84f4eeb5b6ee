//! The re-executed child: carries out a plan, one step after the other, and becomes the container's process.
//!
//! It runs as two processes, neither with a second thread. The first (`enter`) stays in the guest's namespaces: it opens
//! what the container's user may not be able to reach, joins namespaces given by path, forks the second straight into its
//! new namespaces and its cgroup, writes its identity mappings and ends. The second is a child of the agent
//! (`CLONE_PARENT`) and becomes the container's process.
//!
//! The order of the second one's steps is runc's (libcontainer/standard_init_linux.go, setns_init_linux.go,
//! rootfs_linux.go, init_linux.go finalizeNamespace), since programs and profiles depend on it: for example a seccomp
//! filter is loaded while all capabilities are still there unless no_new_privs allows loading it last.
//! Every failure is one message on the control socket; the agent reaps what is left.

mod console;
mod control;
mod copy_up;
mod enter;
mod finish;
mod hooks;
mod lookup;
mod mount;
mod rootfs;

pub use control::{FromChild, MAX_MESSAGE_BYTES};

use crate::plan::{ChildPlan, ContainerPlan};
use crate::sys;
use control::Control;
use rustix::process::getpid;
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};

/// The first argument that makes the agent's binary such a child.
pub const COMMAND: &str = "container-init";

/// The first number that descriptors for the process's own use may get: above any that it may be told to preserve.
const HIGH: i32 = 256;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChildError {
    #[error("{0}")]
    Step(String, #[source] io::Error),
    #[error("unable to chdir to {cwd:?}: {reason}")]
    Cwd { cwd: String, reason: &'static str },
    #[error("cannot set {0} to unmapped user in user namespace")]
    Unmapped(&'static str),
    #[error(transparent)]
    Mount(#[from] mount::MountError),
    #[error("error running hook #{index}: {reason}, stdout: {stdout}, stderr: {stderr}")]
    Hook {
        index: usize,
        reason: String,
        stdout: String,
        stderr: String,
    },
    #[error(transparent)]
    Lookup(#[from] lookup::LookupError),
    #[error("exec {path}")]
    Execute { path: String, source: io::Error },
    #[error("the agent is gone")]
    AgentGone,
}

/// Names the step that an error of the kernel belongs to.
pub(crate) trait Context<T> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, ChildError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, ChildError> {
        self.map_err(|e| ChildError::Step(step(), e.into()))
    }
}

/// What the agent handed down.
struct Inherited {
    plan: OwnedFd,
    control: Control,
    /// Of the container's init, when the plan joins its namespaces.
    init: Option<OwnedFd>,
    preserved: Vec<OwnedFd>,
}

/// Runs the child. `args` follow [`COMMAND`]: the descriptors of the plan, of the control socket, of the init process's
/// pidfd (or `-`), and the preserved ones.
pub fn main(args: &[String]) -> ! {
    let code = match inherit(args) {
        Err(e) => {
            // Without a control socket there is nobody to tell but the kernel's log.
            crate::kmsg::error(&format!("container-init: {e}"));
            1
        }
        Ok(inherited) => run(inherited),
    };
    std::process::exit(code)
}

fn run(inherited: Inherited) -> i32 {
    let control = match inherited.control.duplicate() {
        Ok(control) => control,
        Err(_) => return 1,
    };
    let mut ready = false;
    let Err(error) = carry_out(inherited, &mut ready) else {
        return 0;
    };
    let text = crate::error_line(&error);
    // runc words it so: what fails before the container is ready is an error of its init.
    let prefix = if ready {
        ""
    } else {
        "error during container init: "
    };
    control.send(&FromChild::Failed(format!("{prefix}{text}")));
    1
}

fn inherit(args: &[String]) -> io::Result<Inherited> {
    let missing = || io::Error::other("missing descriptor");
    let mut numbers = args.iter();
    let mut next = || -> io::Result<Option<OwnedFd>> {
        let word = numbers.next().ok_or_else(missing)?;
        if word == "-" {
            return Ok(None);
        }
        let low = sys::claim(word.parse().map_err(io::Error::other)?)?;
        // Out of the way of the numbers that the process's preserved descriptors will get.
        Ok(Some(rustix::io::fcntl_dupfd_cloexec(&low, HIGH)?))
    };
    let plan = next()?.ok_or_else(missing)?;
    let control = Control::new(next()?.ok_or_else(missing)?);
    let init = next()?;
    let mut preserved = Vec::new();
    for _ in 3..args.len() {
        preserved.extend(next()?);
    }
    Ok(Inherited {
        plan,
        control,
        init,
        preserved,
    })
}

fn carry_out(inherited: Inherited, ready: &mut bool) -> Result<(), ChildError> {
    let Inherited {
        plan,
        control,
        init,
        preserved,
    } = inherited;
    let mut text = Vec::new();
    let mut file = fs::File::from(plan);
    file.rewind()
        .and_then(|()| file.read_to_end(&mut text))
        .step(|| "read the plan".to_owned())?;
    drop(file);
    let plan: ChildPlan = serde_json::from_slice(&text).step(|| "parse the plan".to_owned())?;
    // An exec is a guest of a container that is ready already.
    *ready = plan.container.is_none();
    let Some(sources) = enter::enter(&plan, init, &control)? else {
        return Ok(());
    };
    become_process(plan, sources, &control, preserved, ready)
}

/// The second process: from its birth in the container's namespaces to execve.
fn become_process(
    mut plan: ChildPlan,
    sources: enter::Sources,
    control: &Control,
    preserved: Vec<OwnedFd>,
    ready: &mut bool,
) -> Result<(), ChildError> {
    enter::settle(&plan)?;
    let keyring = CString::new(format!("_ses.{}", plan.container_id)).unwrap_or_default();
    sys::join_session_keyring(&keyring).step(|| "join session keyring".to_owned())?;
    if let Some(container) = plan.container.take() {
        set_up(&plan, &container, sources, control)?;
        plan.container = Some(container);
    } else {
        finish::set_affinity(&plan.process.affinity.after, "final")?;
        if plan.process.terminal {
            console::set_up(plan.process.console_size, false, control)?;
        }
    }
    finish::limits(&plan.process)?;
    if plan.process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).step(|| "set no_new_privs".to_owned())?;
    }
    *ready = true;
    finish::place_descriptors(&preserved)?;
    sys::reset_signals().step(|| "reset signals".to_owned())?;
    let filter = plan.process.seccomp.take();
    let early = filter.as_ref().filter(|_| !plan.process.no_new_privileges);
    finish::load_filter(early, control)?;
    finish::finalize(&plan.process)?;
    if plan.holds {
        return hold(control);
    }
    let env = finish::environment(&plan.process);
    let program = lookup::program(&plan.process.args[0], &env)?;
    let late = filter.as_ref().filter(|_| plan.process.no_new_privileges);
    finish::load_filter(late, control)?;
    if let Some(container) = &plan.container {
        control.send(&FromChild::Ready);
        control.wait()?;
        hooks::run(
            &container.start_hooks,
            &hooks::state(&plan, container, "created"),
        )?;
    }
    Err(finish::execute(&program, &plan.process.args, &env))
}

/// The life of a process that keeps namespaces for others: in its own PID namespace, what loses its parent is the
/// kernel's to reap. Comes back only when the agent is gone.
fn hold(control: &Control) -> Result<(), ChildError> {
    sys::ignore_children().step(|| "ignore children".to_owned())?;
    control.send(&FromChild::Ready);
    loop {
        control.wait()?;
    }
}

/// Everything that is done once for a container, in its init process.
fn set_up(
    plan: &ChildPlan,
    container: &ContainerPlan,
    sources: enter::Sources,
    control: &Control,
) -> Result<(), ChildError> {
    if plan.namespaces.create & crate::plan::namespaces::NETWORK != 0 {
        sys::loopback_up().step(|| "set the loopback interface up".to_owned())?;
    }
    if plan.awaits_network {
        control.send(&FromChild::Network);
        control.wait()?;
    }
    let built = rootfs::build(container, sources, plan.namespaces.has_user())?;
    hooks::run(
        &container.create_hooks,
        &hooks::state(plan, container, "creating"),
    )?;
    rootfs::pivot(built.root.as_fd(), container.propagation)?;
    rootfs::use_containers_null()?;
    rootfs::make_cwd(&plan.process.cwd)?;
    if plan.process.terminal {
        console::set_up(plan.process.console_size, true, control)?;
    }
    rootfs::seal(built, container.readonly)?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(plan.process.umask));
    if let Some(name) = &container.hostname {
        rustix::system::sethostname(name.as_bytes()).step(|| "sethostname".to_owned())?;
    }
    if let Some(name) = &container.domainname {
        rustix::system::setdomainname(name.as_bytes()).step(|| "setdomainname".to_owned())?;
    }
    for (file, value) in &container.sysctls {
        let path = format!("/proc/sys/{file}");
        fs::write(&path, value).step(|| format!("write sysctl {path}"))?;
    }
    for path in &container.readonly_paths {
        mount::make_read_only(path)?;
    }
    for path in &container.masked_paths {
        mount::mask(path)?;
    }
    Ok(())
}

/// This process's identifier in its own PID namespace.
fn own_pid() -> i32 {
    getpid().as_raw_nonzero().get()
}
