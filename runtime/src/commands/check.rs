//! `check`: says in plain words whether this host can run caisson, and what to do about each thing that is missing.
//!
//! Contract: one line for each [`Finding`], those that must be mended marked `MISSING`, those worth knowing `note`.
//! Exit status 0 if nothing is missing. Facts are gathered by `probe.rs`; [`judge`] is a pure function of them.

use std::process::ExitCode;

use super::{Context, print};
use crate::error::CommandError;

mod judge;
mod probe;

pub(super) fn check(context: &Context) -> Result<ExitCode, CommandError> {
    let findings = judge::judge(&probe::host());
    let mut text = String::new();
    for finding in &findings {
        text.push_str(&finding.to_string());
    }
    let missing = findings
        .iter()
        .filter(|finding| finding.is_missing())
        .count();
    text.push_str(match missing {
        0 => "\nThis host can run caisson.\n",
        _ => "\nThis host cannot run caisson until what is MISSING is there.\n",
    });
    context.log.debug(&format!("{missing} things are missing"));
    let good = print(&text)?;
    Ok(if missing == 0 {
        good
    } else {
        ExitCode::FAILURE
    })
}
