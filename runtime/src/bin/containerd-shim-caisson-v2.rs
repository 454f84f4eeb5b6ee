//! The program `containerd-shim-caisson-v2`: containerd's door to this library.

use std::process::ExitCode;

fn main() -> ExitCode {
    caisson::shim::main()
}
