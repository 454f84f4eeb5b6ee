//! The VMM process: `caisson_vmm::machine` and an exit status. It takes no arguments and reads no environment.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(caisson_vmm::machine::run())
}
