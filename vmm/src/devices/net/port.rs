//! What an interface is connected to: a tap, or nothing yet.
//!
//! Contract: the main thread plugs and unplugs while the device is of no kind (`Transport::replace`), so the device's
//! thread, which looks only when a driver activates the device, never sees a change under way. The tap is closed once
//! both have let go of it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config_space;
use super::vhost::Vhost;
use crate::virtio::{ConfigSpace, DeviceError};

/// What is plugged in.
#[derive(Debug)]
pub(super) struct Plug {
    pub(super) tap: OwnedFd,
    pub(super) vhost: Option<Vhost>,
}

/// One interface's connection.
#[derive(Debug)]
pub struct Port {
    /// Never held while anything waits.
    plug: Mutex<Option<Arc<Plug>>>,
    config: ConfigSpace,
}

impl Default for Port {
    fn default() -> Self {
        Self {
            plug: Mutex::default(),
            config: ConfigSpace::read_only(config_space([0; 6]).to_vec()),
        }
    }
}

impl Port {
    /// Connects a tap, which is attached, non-blocking, and has `IFF_VNET_HDR`, and a vhost-net device that nobody has used
    /// yet. `false`: something is plugged in already.
    pub fn plug(&self, tap: OwnedFd, vhost: Option<OwnedFd>, mac: [u8; 6]) -> bool {
        let mut place = self.place();
        if place.is_some() {
            return false;
        }
        // Without descriptors left the VMM moves the packets itself.
        let vhost = vhost.and_then(|device| Vhost::new(device).ok());
        *place = Some(Arc::new(Plug { tap, vhost }));
        self.config
            .update(|bytes| bytes.copy_from_slice(&config_space(mac)));
        true
    }

    /// Lets go of what is plugged in.
    pub fn unplug(&self) {
        self.place().take();
    }

    /// To be called when guest memory has grown or shrunk: the kernel works on it, too.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub fn memory_changed(&self) -> Result<(), DeviceError> {
        match self.plugged().as_deref() {
            Some(Plug {
                vhost: Some(vhost), ..
            }) => vhost.memory_changed(),
            _ => Ok(()),
        }
    }

    /// Whether something is plugged in.
    pub fn is_plugged(&self) -> bool {
        self.place().is_some()
    }

    /// What is plugged in.
    pub(super) fn plugged(&self) -> Option<Arc<Plug>> {
        self.place().clone()
    }

    fn place(&self) -> MutexGuard<'_, Option<Arc<Plug>>> {
        self.plug.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the driver reads.
    pub(super) fn config(&self) -> &ConfigSpace {
        &self.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap() -> OwnedFd {
        std::io::pipe().unwrap().0.into()
    }

    #[test]
    fn one_tap_is_plugged_in_at_a_time() {
        let port = Port::default();
        assert!(!port.is_plugged());
        assert!(port.plug(tap(), None, [2, 0, 0, 0, 0, 1]));
        assert!(!port.plug(tap(), None, [2, 0, 0, 0, 0, 2]));
        let mut mac = [0; 6];
        port.config().read(0, &mut mac);
        assert!(mac == [2, 0, 0, 0, 0, 1] && port.is_plugged());
        port.unplug();
        assert!(!port.is_plugged() && port.plug(tap(), None, [2, 0, 0, 0, 0, 2]));
    }
}
