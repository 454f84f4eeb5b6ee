//! The program `caisson`: argv in, exit status out.

use std::{
    env,
    ffi::OsStr,
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
};

use caisson::{
    cli::Cli,
    commands::{self, Context},
    error, exec,
    log::Log,
    monitor, trace, version,
};
use clap::{CommandFactory, Parser};

fn main() -> ExitCode {
    trace::begin();
    // The processes that commands leave behind; they are not for people and cost no parsing.
    match env::args_os().nth(1).as_deref().and_then(OsStr::to_str) {
        Some(monitor::COMMAND) => return monitor::main(),
        Some(exec::COMMAND) => return exec::main(),
        _ => {}
    }
    match Cli::try_parse() {
        Ok(cli) => carry_out(cli),
        Err(error) if error.use_stderr() => {
            let misuse = error::misuse(&error);
            show(format_args!(
                "Incorrect Usage: {}\n\n{}\n",
                misuse.message,
                help(misuse.command.as_deref())
            ));
            Log::plain().error(&misuse.message);
            misuse.status
        }
        // What was asked for is the help.
        Err(error) => {
            show(&error);
            ExitCode::SUCCESS
        }
    }
}

fn carry_out(cli: Cli) -> ExitCode {
    let global = cli.global;
    if global.version {
        show(version::text());
        return ExitCode::SUCCESS;
    }
    let Some(command) = cli.command else {
        show(help(None));
        return ExitCode::SUCCESS;
    };
    let log = match Log::open(global.log.as_deref(), &global.log_format, global.debug) {
        Ok(log) => log,
        Err(error) => {
            Log::plain().error(&error::message(&error));
            return ExitCode::FAILURE;
        }
    };
    let (prefix, status) = error::framing(&command);
    let context = Context::new(global, log);
    commands::dispatch(command, &context).unwrap_or_else(|error| {
        context
            .log
            .error(&format!("{prefix}{}", error::message(&error)));
        status
    })
}

/// Prints what was asked for. Whoever closed standard output does not want to know.
fn show(text: impl Display) {
    let _ = write!(io::stdout(), "{text}");
}

/// The help of a command, or of all.
fn help(command: Option<&str>) -> impl Display + use<> {
    let mut all = Cli::command();
    all.build();
    match command.and_then(|name| all.find_subcommand_mut(name)) {
        Some(command) => command.render_help(),
        None => all.render_help(),
    }
}
