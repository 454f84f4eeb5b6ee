//! The architectural state of a vCPU as a plain value: what it starts with, what can be saved.
//!
//! Pure, except [`VcpuState::apply`]. The first vCPU starts in 32-bit protected mode with flat segments and paging off,
//! `ebx` at the start info (PVH); the others wait for their start-up interrupt, as KVM makes them.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::KvmError;
use crate::boot::Entry;

const PROTECTED_MODE: u64 = 1;
const EXTENSION_TYPE: u64 = 1 << 4;
const CODE: u8 = 0xb;
const DATA: u8 = 3;
const BUSY_TSS: u8 = 0xb;
/// IA32_MISC_ENABLE: fast string operations, as firmware leaves them.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: enabled, write-back, as firmware leaves it.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 0x806);

/// One model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// How floating point behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpuControl {
    /// x87 control word.
    pub fcw: u16,
    /// SSE control and status.
    pub mxcsr: u32,
}

/// The state of one vCPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// x87 and SSE control; their registers start empty.
    pub fpu: FpuControl,
    /// Model-specific registers.
    pub msrs: Vec<Msr>,
}

impl VcpuState {
    /// A vCPU at a PVH entry point; what PVH leaves open is as in `reset`.
    pub fn at_entry(reset: kvm_sregs, entry: Entry) -> Self {
        let segment = |selector, type_, s, db| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            s,
            db,
            g: 1,
            ..kvm_segment::default()
        };
        let data = segment(16, DATA, 1, 1);
        let sregs = kvm_sregs {
            cs: segment(8, CODE, 1, 1),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: kvm_segment {
                limit: 0x67,
                g: 0,
                ..segment(24, BUSY_TSS, 0, 0)
            },
            cr0: PROTECTED_MODE | EXTENSION_TYPE,
            cr4: 0,
            efer: 0,
            ..reset
        };
        let regs = kvm_regs {
            rip: entry.rip,
            rbx: entry.start_info,
            rflags: 2,
            ..kvm_regs::default()
        };
        let fpu = FpuControl {
            fcw: 0x37f,
            mxcsr: 0x1f80,
        };
        let msrs = [MISC_ENABLE, MTRR_DEF_TYPE]
            .map(|(index, value)| Msr { index, value })
            .to_vec();
        Self {
            regs,
            sregs,
            fpu,
            msrs,
        }
    }

    /// Puts the state into a vCPU that is not running.
    ///
    /// # Errors
    /// [`KvmError`] with the step that KVM refused.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let step = |step| move |source| KvmError { step, source };
        vcpu.set_sregs(&self.sregs)
            .map_err(step("set the system registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(step("set the registers"))?;
        let FpuControl { fcw, mxcsr } = self.fpu;
        let fpu = kvm_fpu {
            fcw,
            mxcsr,
            ..kvm_fpu::default()
        };
        vcpu.set_fpu(&fpu).map_err(step("set the FPU"))?;
        let entry = |msr: &Msr| kvm_msr_entry {
            index: msr.index,
            data: msr.value,
            ..kvm_msr_entry::default()
        };
        let entries: Vec<_> = self.msrs.iter().map(entry).collect();
        // At most a few hundred: below the limit of the wrapper.
        let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError {
            step: "list the MSRs",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        // A host that does not know one of them keeps its own value.
        vcpu.set_msrs(&msrs).map_err(step("set the MSRs"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_vcpu_starts_as_pvh_says() {
        let entry = Entry {
            rip: 0x100_0000,
            start_info: 0x6000,
        };
        let state = VcpuState::at_entry(kvm_sregs::default(), entry);
        assert_eq!((state.regs.rip, state.regs.rbx), (0x100_0000, 0x6000));
        assert_eq!(state.regs.rflags, 2);
        let sregs = &state.sregs;
        assert_eq!((sregs.cr0 & 1, sregs.cr0 >> 31, sregs.efer), (1, 0, 0));
        for segment in [sregs.cs, sregs.ds, sregs.es, sregs.ss] {
            assert_eq!(
                (segment.base, segment.limit, segment.db),
                (0, 0xffff_ffff, 1)
            );
        }
    }

    #[test]
    fn a_state_survives_serialisation() {
        let entry = Entry {
            rip: 1,
            start_info: 2,
        };
        let state = VcpuState::at_entry(kvm_sregs::default(), entry);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<VcpuState>(&text).unwrap(), state);
    }
}
