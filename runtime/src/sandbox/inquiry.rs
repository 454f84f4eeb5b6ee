//! Questions about a container whose answers are texts of the guest's kernel: asked, and parsed into checked types.

use super::SandboxError;
use crate::{
    agent::Agent,
    process_table::Table,
    stats::{self, Stats},
};

/// How many processes are described in one message: their texts have at most 36 KiB each, a message 4 MiB.
const AT_ONCE: usize = 100;

/// The container's processes.
pub(super) async fn table(agent: &Agent, id: &str) -> Result<Table, SandboxError> {
    let mut pids = agent.processes(id).await?;
    pids.sort_unstable();
    pids.dedup();
    let mut table = Table::default();
    for some in pids.chunks(AT_ONCE) {
        table.add(agent.describe(some).await?, some)?;
    }
    Ok(table)
}

/// What the container uses.
pub(super) async fn stats(agent: &Agent, id: &str) -> Result<Stats, SandboxError> {
    let files = agent.cgroup_files(id, stats::FILES).await?;
    Ok(Stats::parse(&files)?)
}
