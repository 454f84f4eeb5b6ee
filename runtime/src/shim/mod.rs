//! containerd's door: `containerd-shim-caisson-v2`, which containerd starts for every sandbox and speaks to over ttrpc.
//!
//! ```text
//!  containerd --argv, stdin--> start  --socket as stdin--> server (one per sandbox; task service v2, v3; sandbox service)
//!             <--- address ----'                             |
//!             <=========== ttrpc (Task, Sandbox) ===========>+-- sandbox owner (`sandbox/`) -- caisson-vmm
//!             <=============== events =======================+
//!             --argv, in the bundle--> delete (the server is gone: removes what it has left)
//! ```
//!
//! Contract: a container outside Kubernetes has a server and a virtual machine of its own; the containers of a pod share
//! those of the pod's sandbox, which its pause container brings, or the Sandbox API. Everything that a sandbox mounts is in
//! the server's own mount namespace: when server and VMM are gone the kernel has removed it. The server outlives
//! containerd and is found again by the address that `start` has left in the bundle.
//! Not here: what happens in a sandbox (`sandbox/`), what a bundle may say (`bundle/`).
//! Spec: containerd, docs/runtime-v2.md ("Runtime v2"), 1.6 to 2.x.

mod args;
mod bootstrap;
mod container;
mod control;
mod delete;
mod error;
mod events;
mod info;
mod logger;
mod metrics;
mod options;
mod order;
mod pod;
mod process;
mod rootfs;
mod sandboxes;
mod server;
mod service;
mod stdio;
mod tasks;
mod ticket;

use std::{
    env,
    io::{self, Read, Write},
    process::ExitCode,
};

use args::Args;

/// The most that containerd ever writes to standard input, in bytes.
const MAX_INPUT_BYTES: u64 = 10 << 20;

/// The program's life, whatever it was started for.
pub fn main() -> ExitCode {
    let done = Args::parse(env::args_os().skip(1)).map_err(|error| crate::error::message(&error));
    let done = done.and_then(|args| match args.action.as_str() {
        _ if args.version => answer(&info::version()),
        _ if args.info => input().and_then(|options| answer(&info::info(&options))),
        "start" => input()
            .and_then(|input| {
                bootstrap::start(&args, &input).map_err(|e| crate::error::message(&e))
            })
            .and_then(|reply| answer(&reply)),
        "delete" => delete::delete(&args)
            .map_err(|error| crate::error::message(&error))
            .and_then(|reply| answer(&reply)),
        // Started by `start`: standard input is the listening socket.
        "" => Ok(server::serve(&args)),
        other => Err(format!("unknown action {other:?}")),
    });
    done.unwrap_or_else(|message| {
        // containerd shows this as the reason; nobody is left to tell if it cannot be written.
        let _ = writeln!(io::stderr(), "containerd-shim-caisson-v2: {message}");
        ExitCode::FAILURE
    })
}

fn input() -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    if io::IsTerminal::is_terminal(&io::stdin()) {
        return Ok(bytes);
    }
    io::stdin()
        .lock()
        .take(MAX_INPUT_BYTES)
        .read_to_end(&mut bytes)
        .map(|_| bytes)
        .map_err(|error| format!("read standard input: {error}"))
}

fn answer(bytes: &[u8]) -> Result<ExitCode, String> {
    let mut out = io::stdout();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map(|()| ExitCode::SUCCESS)
        .map_err(|error| format!("write the answer: {error}"))
}
