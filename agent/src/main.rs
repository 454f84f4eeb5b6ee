//! `caisson-agent`: PID 1 of the guest, and the child that it executes to make a container's process.

use caisson_agent::{child, guest, kmsg, power, service};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let Some((command, rest)) = args.get(1..).and_then(<[String]>::split_first)
        && command == child::COMMAND
    {
        child::main(rest);
    }
    if !rustix::process::getpid().is_init() {
        eprintln!("caisson-agent: this is PID 1 of a caisson guest and nothing else");
        return ExitCode::FAILURE;
    }
    // A panic ends PID 1 and with it the kernel; its reason must reach the VMM first.
    std::panic::set_hook(Box::new(|panic| kmsg::emergency(&panic.to_string())));
    if let Err(e) = guest::prepare() {
        kmsg::emergency(&guest::line(&e));
        return ExitCode::FAILURE;
    }
    if let Err(e) = service::run(guest::Vsock) {
        kmsg::emergency(&e);
        return ExitCode::FAILURE;
    }
    power::off()
}
