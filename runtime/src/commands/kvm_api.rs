//! Asks `/dev/kvm` for its API version: the one ioctl that this package makes.
#![allow(unsafe_code, reason = "an ioctl has no safe form")]

use std::os::fd::OwnedFd;

use rustix::{
    io::Errno,
    ioctl::{self, Ioctl, IoctlOutput, Opcode},
};

/// `KVM_GET_API_VERSION`: no argument, the version is the return value (linux/kvm.h).
struct ApiVersion;

// SAFETY: the opcode takes no argument, so the null pointer is never followed; it only returns a number.
unsafe impl Ioctl for ApiVersion {
    type Output = i32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        ioctl::opcode::none(0xae, 0x00)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        version: IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(version)
    }
}

/// The version of the KVM API behind an open device.
pub(super) fn version(device: &OwnedFd) -> Result<i32, Errno> {
    // SAFETY: `ApiVersion` describes an ioctl without an argument; on a device that is not KVM it fails with ENOTTY.
    unsafe { ioctl::ioctl(device, ApiVersion) }
}
