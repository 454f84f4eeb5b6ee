//! A change of limits, carried out: the host first where there is to be more, the guest first where there is to be less.
//!
//! ```text
//!  host's cgroup makes room -> the machine grows -> the guest's limits -> the machine shrinks -> host's cgroup follows
//! ```
//! Contract: all or nothing: what fails up to the guest's limits undoes what came before it. What follows them only gives
//! back, and what the guest does not give back stays accounted for.

use super::{Limits, UpdateError};
use crate::{
    cgroup::{CgroupError, HostCgroup},
    sandbox::{Sandbox, SandboxError, Step},
};

/// Why limits stay as they are.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// They cannot be had.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// The host's cgroup refuses.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The guest or its machine does.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// Changes the limits of container `id`: `resources` is a `linux.resources` object. `cgroup` is the sandbox's, where it is
/// this container's alone.
pub async fn apply(
    limits: &mut Limits,
    sandbox: &Sandbox,
    id: &str,
    cgroup: Option<&HostCgroup>,
    resources: &str,
) -> Result<(), ApplyError> {
    let change = limits.change(resources)?;
    let needs = change.limits.needs();
    let size = sandbox.fit(id, Step::Look, needs).await?;
    let before = match cgroup {
        Some(cgroup) => cgroup.change(&change.host(size))?,
        None => Vec::new(),
    };
    let changed = async {
        sandbox.fit(id, Step::Grow, needs).await?;
        sandbox.update(id, change.guest.clone()).await
    };
    if let Err(error) = changed.await {
        // The error that led here is the one to report.
        let _ = sandbox.fit(id, Step::Undo, needs).await;
        if let Some(cgroup) = cgroup {
            cgroup.change_back(&before);
        }
        return Err(error.into());
    }
    // The limits hold from here on: what is not given back is no failure.
    let now = sandbox.fit(id, Step::Settle, needs).await;
    if let (Ok(now), Some(cgroup)) = (now, cgroup)
        && now.memory < size.memory
    {
        let mut lower = change.host(now);
        lower.retain(|limit| limit.file == "memory.max");
        let _ = cgroup.change(&lower);
    }
    *limits = change.limits;
    Ok(())
}
