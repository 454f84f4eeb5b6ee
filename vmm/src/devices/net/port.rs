//! What an interface is connected to: a tap, or nothing yet.
//!
//! Contract: the main thread plugs and unplugs while the device is of no kind (`Transport::replace`), so the device's
//! thread, which looks only when a driver activates the device, never sees a change under way. The tap is closed once
//! both have let go of it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::config_space;
use crate::virtio::ConfigSpace;

/// One interface's connection.
#[derive(Debug)]
pub struct Port {
    /// Never held while anything waits.
    tap: Mutex<Option<Arc<OwnedFd>>>,
    config: ConfigSpace,
}

impl Default for Port {
    fn default() -> Self {
        Self {
            tap: Mutex::default(),
            config: ConfigSpace::read_only(config_space([0; 6]).to_vec()),
        }
    }
}

impl Port {
    /// Connects a tap, which is attached, non-blocking, and has `IFF_VNET_HDR`. `false`: something is plugged in already.
    pub fn plug(&self, tap: OwnedFd, mac: [u8; 6]) -> bool {
        let mut place = self.tap.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() {
            return false;
        }
        *place = Some(Arc::new(tap));
        self.config
            .update(|bytes| bytes.copy_from_slice(&config_space(mac)));
        true
    }

    /// Lets go of the tap.
    pub fn unplug(&self) {
        self.tap
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Whether something is plugged in.
    pub fn is_plugged(&self) -> bool {
        self.tap().is_some()
    }

    /// The tap, if there is one.
    pub(super) fn tap(&self) -> Option<Arc<OwnedFd>> {
        self.tap
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
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
        assert!(port.plug(tap(), [2, 0, 0, 0, 0, 1]));
        assert!(!port.plug(tap(), [2, 0, 0, 0, 0, 2]));
        let mut mac = [0; 6];
        port.config().read(0, &mut mac);
        assert!(mac == [2, 0, 0, 0, 0, 1] && port.is_plugged());
        port.unplug();
        assert!(!port.is_plugged() && port.plug(tap(), [2, 0, 0, 0, 0, 2]));
    }
}
