//! `linux.memoryPolicy`: from which of the host's memory nodes the container's memory comes.
//!
//! The container's memory is its virtual machine's, so the policy is the VMM's (set_mempolicy(2)), in force before the
//! first page of guest memory is touched. The nodes are the host's; the guest has one of its own.
//!
//! Contract: pure. Whether a node exists the kernel says, when the VMM starts.
//! Spec: OCI config-linux.md, "Memory policy"; set_mempolicy(2).

use caisson_agent_api::number_list::{self, ListError};
use caisson_vmm_spec::MemoryPolicy;
use oci_spec::runtime::{MemoryPolicyFlagType, MemoryPolicyModeType, Spec};

/// The policy that a specification asks for.
pub fn of(spec: &Spec) -> Result<Option<MemoryPolicy>, ListError> {
    let linux = spec.linux().as_ref();
    let Some(asked) = linux.and_then(|linux| linux.memory_policy().as_ref()) else {
        return Ok(None);
    };
    let nodes = match asked.nodes().as_deref() {
        None | Some("") => Vec::new(),
        Some(nodes) => number_list::parse(nodes)?,
    };
    let flags = asked.flags().iter().flatten();
    let mode = flags.fold(mode(asked.mode()), |mode, flag| mode | bit(*flag));
    Ok(Some(MemoryPolicy { mode, nodes }))
}

/// `MPOL_*` of `linux/mempolicy.h`.
const fn mode(mode: MemoryPolicyModeType) -> u32 {
    match mode {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    }
}

/// `MPOL_F_*` of `linux/mempolicy.h`.
const fn bit(flag: MemoryPolicyFlagType) -> u32 {
    match flag {
        MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
        MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
        MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn asked(policy: Value) -> Result<Option<MemoryPolicy>, ListError> {
        let spec = json!({"ociVersion": "1.3.0", "linux": {"memoryPolicy": policy}});
        of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn mode_and_flags_are_one_number() {
        let policy =
            asked(json!({"mode": "MPOL_BIND", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"]}));
        let policy = policy.unwrap().unwrap();
        assert_eq!((policy.mode, policy.nodes), (2 | 1 << 15, vec![0, 1]));
        let local = asked(json!({"mode": "MPOL_LOCAL"})).unwrap().unwrap();
        assert_eq!((local.mode, local.nodes), (4, Vec::new()));
    }

    #[test]
    fn nodes_that_are_no_list_are_refused() {
        assert!(asked(json!({"mode": "MPOL_BIND", "nodes": "x"})).is_err());
        assert_eq!(of(&Spec::default()).unwrap(), None);
    }
}
