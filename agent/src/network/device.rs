//! Network devices by number: which interface a device is.

use std::{fs, io};

use super::NetworkError;
use crate::virtio;

fn failed(device: u32, step: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Device {
        device,
        step,
        source,
    }
}

/// The number of the device's interface in this namespace; its driver is bound first if it has none.
pub(super) fn interface_of(device: u32) -> Result<u32, NetworkError> {
    virtio::bind(device).map_err(failed(device, "bind the driver"))?;
    let interface = virtio::made(device, "net").map_err(failed(device, "find the interface"))?;
    let index = fs::read_to_string(interface.join("ifindex"))
        .and_then(|text| text.trim().parse().map_err(io::Error::other));
    index.map_err(failed(device, "read the interface's number"))
}

/// Takes the driver away, and the interface with it, in whatever namespace it is.
pub(super) fn unbind(device: u32) -> Result<(), NetworkError> {
    virtio::unbind(device).map_err(failed(device, "unbind the driver"))
}
