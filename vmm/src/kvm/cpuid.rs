//! What a vCPU says about itself: the host's CPUID as KVM supports it, with our topology.
//!
//! Pure. The topology is one package of `cpus` cores with one thread each; APIC ids count from 0. Leaves that the
//! processor's vendor does not define are left as KVM made them.

use kvm_bindings::kvm_cpuid_entry2;

const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HYPER_THREADING: u32 = 1 << 28;
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The entries for the vCPU with that APIC id, of `cpus`.
pub fn entries(supported: &[kvm_cpuid_entry2], apic_id: u32, cpus: u32) -> Vec<kvm_cpuid_entry2> {
    let shift = u32::BITS - (cpus - 1).leading_zeros();
    let mut entries: Vec<_> = supported
        .iter()
        // Our own topology leaves follow; AMD's newest (0x80000026) would contradict them.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | cpus << 16 | apic_id << 24;
                entry.ecx |= HYPERVISOR | TSC_DEADLINE;
                entry.edx &= !HYPER_THREADING;
                entry.edx |= if cpus > 1 { HYPER_THREADING } else { 0 };
            }
            // Intel's caches: cores per package; level 3 is shared by all of them, lower ones by nobody.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { cpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | (cpus - 1) << 26;
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | shift << 12 | (cpus - 1),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { cpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
            _ => {}
        }
    }
    for (index, (shift, count, level)) in
        [(0, 1, LEVEL_THREAD), (shift, cpus, LEVEL_CORE), (0, 0, 0)]
            .into_iter()
            .enumerate()
    {
        let index = u32::try_from(index).unwrap_or(0); // 0 to 2
        entries.push(kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: level | index,
            edx: apic_id,
            ..kvm_cpuid_entry2::default()
        });
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_every_leaf() {
        let supported = [
            leaf(1),
            leaf(0xb),
            leaf(0x1f),
            leaf(0x8000_0008),
            leaf(0x8000_001e),
        ];
        let entries = entries(&supported, 5, 6);
        let one = find(&entries, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (5, 6));
        assert_ne!(one.ecx & HYPERVISOR, 0);
        assert_ne!(one.edx & HYPER_THREADING, 0);
        assert_eq!(find(&entries, 0xb, 0).edx, 5);
        let core = find(&entries, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(find(&entries, 0x8000_001e, 0).eax, 5);
        assert!(!entries.iter().any(|entry| entry.function == 0x1f));
    }

    #[test]
    fn a_single_vcpu_has_no_siblings() {
        let entries = entries(&[leaf(1)], 0, 1);
        assert_eq!(find(&entries, 1, 0).edx & HYPER_THREADING, 0);
        assert_eq!(find(&entries, 0xb, 1).eax, 0);
    }
}
