//! `signals`: prints the name of each signal that it receives, one a line, and ends on a count or on a given one.
//!
//! The first line is `ready`: from then on no signal is lost to its default action, so a test may send at once.
//! Signals that are pending twice are delivered once: a sender waits for the line before it sends the next.
//! SIGKILL and SIGSTOP cannot be caught; SIGSEGV, SIGILL and SIGFPE are left alone, and so is SIGPIPE, which ends the
//! program when nobody reads any more.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use signal_hook::consts::{
    SIGALRM, SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN,
    SIGTTOU, SIGURG, SIGUSR1, SIGUSR2, SIGWINCH, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::Signals;

/// Every signal that is printed, by the name that `kill -l` gives it.
const NAMES: &[(i32, &str)] = &[
    (SIGHUP, "HUP"),
    (SIGINT, "INT"),
    (SIGQUIT, "QUIT"),
    (SIGUSR1, "USR1"),
    (SIGUSR2, "USR2"),
    (SIGALRM, "ALRM"),
    (SIGTERM, "TERM"),
    (SIGCHLD, "CHLD"),
    (SIGCONT, "CONT"),
    (SIGTSTP, "TSTP"),
    (SIGTTIN, "TTIN"),
    (SIGTTOU, "TTOU"),
    (SIGURG, "URG"),
    (SIGXCPU, "XCPU"),
    (SIGXFSZ, "XFSZ"),
    (SIGPROF, "PROF"),
    (SIGWINCH, "WINCH"),
    (SIGIO, "IO"),
    (34, "RTMIN"),
    (35, "RTMIN+1"),
    (64, "RTMAX"),
];

#[derive(Parser)]
#[command(
    name = "signals",
    about = "Prints the name of each signal that it receives"
)]
struct Cli {
    /// End with status 0 after this many signals.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// End with status 0 at this signal, after printing it.
    #[arg(long, value_name = "NAME", value_parser = number)]
    until: Option<i32>,
}

/// The number of a signal of the table.
fn number(text: &str) -> Result<i32, String> {
    let wanted = text.strip_prefix("SIG").unwrap_or(text);
    let found = NAMES.iter().find(|(_, name)| *name == wanted);
    found
        .map(|(number, _)| *number)
        .ok_or_else(|| format!("{text} is no signal that is printed"))
}

fn main() -> ExitCode {
    match print(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("signals: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(cli: &Cli) -> io::Result<()> {
    let mut signals = Signals::new(NAMES.iter().map(|(number, _)| *number))?;
    line("ready")?;
    let mut seen = 0;
    for signal in signals.forever() {
        let name = NAMES
            .iter()
            .find(|(number, _)| *number == signal)
            .map_or("?", |(_, name)| name);
        line(name)?;
        seen += 1;
        if cli.until == Some(signal) || cli.count == Some(seen) {
            break;
        }
    }
    Ok(())
}

fn line(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn names_are_accepted_with_and_without_their_prefix() {
        assert_eq!((number("TERM"), number("SIGTERM")), (Ok(15), Ok(15)));
        assert!(number("KILL").is_err());
    }
}
