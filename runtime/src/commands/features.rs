//! `features`: what this runtime can do, laid out as runc does.

use std::process::ExitCode;

use super::print;
use crate::{error::CommandError, features::document};

pub(super) fn features() -> Result<ExitCode, CommandError> {
    let text = serde_json::to_string_pretty(&document()).map_err(CommandError::Json)?;
    // runc indents by four.
    let wide = text.lines().map(|line| {
        let depth = line.len() - line.trim_start().len();
        format!("{}{line}\n", " ".repeat(depth))
    });
    print(&wide.collect::<String>())
}
