//! The program `caisson`: argv in, exit status out.

use std::process::ExitCode;

use caisson::{
    cli::Cli,
    commands::{self, Context},
    error,
    log::Log,
};
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let global = cli.global;
    let log = match Log::open(global.log.as_deref(), &global.log_format, global.debug) {
        Ok(log) => log,
        Err(error) => {
            Log::plain().error(&error::message(&error));
            return ExitCode::FAILURE;
        }
    };
    let Some(command) = cli.command else {
        return ExitCode::SUCCESS;
    };
    let context = Context::new(global, log);
    commands::dispatch(command, &context).unwrap_or_else(|error| {
        context.log.error(&error::message(&error));
        ExitCode::FAILURE
    })
}
