//! The monitor's way into the sandbox's cgroup, and back.

use std::{
    fs,
    path::PathBuf,
    thread::{self, JoinHandle},
};

use super::CreateError;
use crate::cgroup::{self, CgroupError, HostCgroup};

/// This process on its way into the sandbox's cgroup. Moving a process costs the kernel a grace period of 10 ms and
/// more, which passes while the guest boots.
pub(super) struct Joining(Option<JoinHandle<Result<(), CgroupError>>>, Inside);

/// This process in the sandbox's cgroup; dropping it goes back, so that the cgroup can be removed.
pub(super) struct Inside {
    /// The files that lead there.
    before: Vec<PathBuf>,
}

impl Joining {
    pub(super) fn begin(cgroup: &HostCgroup) -> Result<Self, CreateError> {
        let before = cgroup::way_back();
        let cgroup = HostCgroup::at(cgroup.path().to_owned(), None);
        let thread = thread::Builder::new()
            .name("cgroup".to_owned())
            .stack_size(64 << 10);
        let thread = thread
            .spawn(move || cgroup.join())
            .map_err(|source| CreateError::Host {
                step: "start a thread",
                source,
            })?;
        Ok(Self(Some(thread), Inside { before }))
    }

    /// Waits for the end of the move, if it is not long over.
    pub(super) fn finish(mut self) -> Result<Inside, CreateError> {
        self.wait()?;
        let before = std::mem::take(&mut self.1.before);
        Ok(Inside { before })
    }

    fn wait(&mut self) -> Result<(), CgroupError> {
        match self.0.take().map(JoinHandle::join) {
            Some(Ok(joined)) => joined,
            // A panic ends the process.
            None | Some(Err(_)) => Ok(()),
        }
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        // The error that led here is the one to report; then the guard inside goes back.
        let _ = self.wait();
    }
}

impl Inside {
    pub(super) fn stay(mut self) {
        self.before.clear();
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        for procs in &self.before {
            // Then the cgroup stays for `delete --force`.
            let _ = fs::write(procs, "0");
        }
    }
}
