//! How large a sandbox's virtual machine is to be: the sum of what its containers may use, within its bounds.
//!
//! Contract: all containers of the sandbox say what they need, under one lock; the machine grows before they may use more
//! and shrinks after they may use less. A container without a limit needs what it needed when it had one. A machine never
//! gets smaller than it booted. Growth is all or nothing; shrinking is
//! up to the guest, which keeps what it cannot give back.
//!
//! ```text
//!  grow:    vCPUs made by the VMM -> brought online by the agent -> memory offered by the VMM -> driver bound -> plugged
//!  settle:  memory asked back -> vCPUs taken offline by the agent (they stay, halted)
//! ```

use std::{collections::HashMap, time::Duration};

use caisson_vmm_spec::MEMORY_DEVICE;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{Sandbox, SandboxError, message::Message};
use crate::sizing::{Bounds, MiB, Needs, VmSize};

/// How long a guest may take to plug the memory that it was offered.
const TO_GROW: Duration = Duration::from_secs(20);
/// How long it may take to give memory back before its container's limits are said to be changed.
const TO_SHRINK: Duration = Duration::from_secs(5);

/// What is to be done about a container's needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Nothing: how large would the machine be, at most, on the way?
    Look,
    /// The machine gets what it lacks.
    Grow,
    /// The container will not need it after all.
    Undo,
    /// It does: what the machine does not need any more goes back.
    Settle,
}

/// The machine of a sandbox.
#[derive(Debug)]
pub(super) struct Growth {
    bounds: Bounds,
    now: VmSize,
    /// vCPUs that the VMM has made.
    made: u8,
    needs: HashMap<String, Needs>,
}

impl Growth {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            now: bounds.boot,
            made: bounds.boot.vcpus,
            needs: HashMap::new(),
        }
    }

    /// What a container needs if it may use this: without a limit, as much as before.
    fn kept(&self, id: &str, needs: Needs) -> Needs {
        let before = self.needs.get(id).copied().unwrap_or_default();
        let or = |now: u64, before: u64| if now == 0 { before } else { now };
        Needs {
            memory_bytes: or(needs.memory_bytes, before.memory_bytes),
            milli_cpus: or(needs.milli_cpus, before.milli_cpus),
            huge_bytes: or(needs.huge_bytes, before.huge_bytes),
        }
    }

    /// The machine for these containers if `id` needs this.
    fn wanted(&self, id: &str, needs: Needs) -> VmSize {
        self.bounds.fitting(self.others(id).chain([needs]))
    }

    fn others(&self, id: &str) -> impl Iterator<Item = Needs> {
        let others = self.needs.iter().filter(move |(other, _)| *other != id);
        others.map(|(_, needs)| *needs)
    }

    /// Limits are no claims, and their sum may be more than a machine can have; huge pages are.
    fn check(&self, id: &str, needs: Needs) -> Result<(), SandboxError> {
        let others = self.others(id).map(|other| other.huge_bytes);
        let huge_bytes = others.fold(needs.huge_bytes, u64::saturating_add);
        match self.bounds.beyond(huge_bytes) {
            Some(needed) if needs.huge_bytes > 0 => Err(SandboxError::HugePages {
                needed: needed.0,
                most: self.bounds.most.memory.0,
            }),
            _ => Ok(()),
        }
    }

    /// A container is gone.
    pub(super) fn forget(&mut self, id: &str) {
        self.needs.remove(id);
    }

    /// Takes a step for a container; answers how large the machine is then.
    pub(super) async fn fit(
        &mut self,
        sandbox: &Sandbox,
        id: &str,
        step: Step,
        needs: Needs,
    ) -> Result<VmSize, SandboxError> {
        let needs = self.kept(id, needs);
        let wanted = self.wanted(id, needs);
        let enough = VmSize {
            vcpus: wanted.vcpus.max(self.now.vcpus),
            memory: wanted.memory.max(self.now.memory),
        };
        match step {
            Step::Look => return Ok(enough),
            Step::Grow => {
                self.check(id, needs)?;
                let before = self.now;
                if let Err(error) = self.grow(sandbox, enough).await {
                    // As far as the guest lets it; the error that led here is the one to report.
                    let _ = self.shrink(sandbox, before).await;
                    return Err(error);
                }
            }
            Step::Undo => {
                let before = self.wanted(id, self.kept(id, Needs::default()));
                self.shrink(sandbox, before).await?;
            }
            Step::Settle => {
                self.needs.insert(id.to_owned(), needs);
                self.shrink(sandbox, wanted).await?;
            }
        }
        Ok(self.now)
    }

    async fn grow(&mut self, sandbox: &Sandbox, size: VmSize) -> Result<(), SandboxError> {
        if size.vcpus > self.now.vcpus {
            if size.vcpus > self.made {
                let count = size.vcpus;
                sandbox.ask(|reply| Message::Vcpus { count, reply }).await?;
                self.made = count;
            }
            // Some may be online when another is refused.
            self.now.vcpus = size.vcpus;
            self.fit_guest(sandbox, None).await?;
        }
        if size.memory > self.now.memory {
            let before = self.now.memory;
            // What is offered may be taken at any time from now on.
            self.now.memory = size.memory;
            let followed = self.offer(sandbox, size.memory).await?;
            self.fit_guest(sandbox, Some(MEMORY_DEVICE)).await?;
            if !matches!(tokio::time::timeout(TO_GROW, followed).await, Ok(Ok(()))) {
                let mib = size.memory.0 - before.0;
                return Err(SandboxError::NotTaken(mib));
            }
        }
        Ok(())
    }

    async fn shrink(&mut self, sandbox: &Sandbox, size: VmSize) -> Result<(), SandboxError> {
        if size.memory < self.now.memory {
            let followed = self.offer(sandbox, size.memory).await?;
            if matches!(tokio::time::timeout(TO_SHRINK, followed).await, Ok(Ok(()))) {
                self.now.memory = size.memory;
            }
        }
        if size.vcpus < self.now.vcpus {
            let before = std::mem::replace(&mut self.now.vcpus, size.vcpus);
            if let Err(error) = self.fit_guest(sandbox, None).await {
                self.now.vcpus = before;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Offers the guest memory up to `memory` in all; answers who tells that it has followed.
    async fn offer(
        &self,
        sandbox: &Sandbox,
        memory: MiB,
    ) -> Result<oneshot::Receiver<()>, SandboxError> {
        let extra = MiB(memory.0.saturating_sub(self.bounds.boot.memory.0));
        let (tell, followed) = oneshot::channel();
        let offer = |reply| Message::Memory {
            extra,
            followed: tell,
            reply,
        };
        sandbox.ask(offer).await.map(|()| followed)
    }

    async fn fit_guest(
        &self,
        sandbox: &Sandbox,
        memory_device: Option<u32>,
    ) -> Result<(), SandboxError> {
        let cpus = self.now.vcpus;
        let fit = |reply| Message::FitGuest {
            memory_device,
            cpus,
            reply,
        };
        sandbox.ask(fit).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_without_a_limit_needs_what_it_needed_when_it_had_one() {
        let size = |vcpus, memory| VmSize {
            vcpus,
            memory: MiB(memory),
        };
        let needs = |mib: u64, milli_cpus| Needs {
            memory_bytes: mib << 20,
            milli_cpus,
            huge_bytes: 0,
        };
        let mut growth = Growth::new(Bounds {
            boot: size(1, 256),
            most: size(4, 2048),
            overhead: MiB(64),
            huge: MiB(0),
        });
        assert_eq!(growth.wanted("a", needs(0, 0)), size(1, 256));
        growth.needs.insert("a".into(), needs(512, 1500));
        assert_eq!(growth.kept("a", needs(0, 900)), needs(512, 900));
        assert_eq!(growth.kept("b", needs(0, 900)), needs(0, 900));
        assert_eq!(growth.wanted("b", needs(100, 600)), size(3, 676));
        assert_eq!(growth.wanted("a", needs(100, 600)), size(1, 256));
        let huge = |mib: u64| Needs {
            huge_bytes: mib << 20,
            ..Needs::default()
        };
        growth.needs.insert("b".into(), huge(1000));
        growth.check("c", huge(792)).unwrap();
        let error = growth.check("c", huge(793)).unwrap_err().to_string();
        assert!(
            error.contains("2049 MiB of memory and may have 2048"),
            "{error}"
        );
        growth.check("c", needs(4000, 0)).unwrap();
        growth.forget("a");
        assert_eq!(growth.kept("a", needs(0, 0)), needs(0, 0));
    }
}
