//! `create`.

use std::process::ExitCode;

use super::{Context, launch::launch};
use crate::{cli::Create, error::CommandError};

/// Creates a container; its monitor lives on.
pub(super) fn run(args: &Create, context: &Context) -> Result<ExitCode, CommandError> {
    launch(context, &args.launch, true, false)?;
    Ok(ExitCode::SUCCESS)
}
