//! What the tap is told when a driver is ready: how long the header of a packet is, and what the guest can do itself.
//!
//! Contract: the tap stays as it was made otherwise; a further driver (after a reset) sets both again.
//! Spec: `include/uapi/linux/if_tun.h`; virtio 1.2, 5.1.3 (features).
#![allow(unsafe_code, reason = "two ioctls that rustix has no functions for")]

use std::ffi::c_int;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Opcode, Setter, ioctl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::HEADER_BYTES;

/// `TUNSETOFFLOAD`, `_IOW('T', 208, unsigned int)`; takes its argument by value.
const SET_OFFLOAD: Opcode = 0x4004_54d0;
/// `TUNSETVNETHDRSZ`, `_IOW('T', 216, int)`.
const SET_HEADER_SIZE: Opcode = 0x4004_54d8;

const OFFLOAD_CHECKSUM: usize = 1;
const OFFLOAD_TSO4: usize = 2;
const OFFLOAD_TSO6: usize = 4;

/// What packets to the guest may still lack, by the features that its driver accepted (`TUN_F_*`).
pub(super) fn offloads(features: u64) -> usize {
    let has = |feature: u32| features & 1 << feature != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0; // segmentation needs checksums: virtio 5.1.3.1
    }
    let mut offloads = OFFLOAD_CHECKSUM;
    for (feature, offload) in [
        (VIRTIO_NET_F_GUEST_TSO4, OFFLOAD_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, OFFLOAD_TSO6),
    ] {
        if has(feature) {
            offloads |= offload;
        }
    }
    offloads
}

/// An ioctl whose argument is a number, not a pointer.
struct ByValue<const OPCODE: Opcode>(usize);

// SAFETY: the argument is an integer that the kernel does not dereference; nothing is written.
unsafe impl<const OPCODE: Opcode> rustix::ioctl::Ioctl for ByValue<OPCODE> {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    // SAFETY: nothing is read from the second argument.
    unsafe fn output_from_ptr(
        _: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Sets header size and offloads.
///
/// # Errors
/// The system's: not a tap.
pub(super) fn set_up(tap: BorrowedFd<'_>, offloads: usize) -> io::Result<()> {
    // 12: fits.
    let size = c_int::try_from(HEADER_BYTES).unwrap_or_default();
    // SAFETY: TUNSETVNETHDRSZ reads one int behind its argument, which is what the setter passes.
    let header = unsafe { Setter::<SET_HEADER_SIZE, c_int>::new(size) };
    // SAFETY: the setter above describes this ioctl.
    unsafe { ioctl(tap, header) }?;
    // SAFETY: TUNSETOFFLOAD takes flags by value.
    unsafe { ioctl(tap, ByValue::<SET_OFFLOAD>(offloads)) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_leaves_undone_only_what_the_driver_takes_over() {
        let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
        let tso4 = 1 << VIRTIO_NET_F_GUEST_TSO4;
        let tso6 = 1 << VIRTIO_NET_F_GUEST_TSO6;
        let cases = [
            (0, 0),
            (csum, 1),
            (csum | tso4, 3),
            (csum | tso4 | tso6, 7),
            (tso4 | tso6, 0),
        ];
        for (features, expected) in cases {
            assert_eq!(offloads(features), expected, "{features:#x}");
        }
    }
}
