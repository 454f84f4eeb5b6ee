//! What a specification must say, may say and must not say to this runtime: pure functions of its values.
//!
//! Contract: the first rule that is broken is reported, with the property's path in `config.json`.

use oci_spec::runtime::Spec;

use super::{BundleError, Caller, VmSection};
use crate::config::Config;

pub(super) fn check(
    _spec: &Spec,
    _vm: Option<&VmSection>,
    _config: &Config,
) -> Result<(), BundleError> {
    Ok(())
}

pub(super) fn warnings(_spec: &Spec) -> Vec<String> {
    Vec::new()
}

/// runc 1.1, `utils_linux.go`, `checkTerminal`.
pub(super) fn terminal(terminal: bool, caller: Caller) -> Result<(), &'static str> {
    match (terminal, caller.detach, caller.console_socket) {
        (true, true, false) => {
            Err("cannot allocate tty if runc will detach without setting console socket")
        }
        (_, false, true) | (false, true, true) => {
            Err("cannot use console socket if runc will not detach or allocate tty")
        }
        _ => Ok(()),
    }
}
