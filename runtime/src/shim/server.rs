//! The server process of one sandbox, from the socket that `start` left it to its end.
//!
//! Contract: ends when containerd says so and no container is left, or on `SIGTERM`, which ends the virtual machine
//! first; then the socket is gone. containerd's restarts are not noticed but for events that wait.
//! Threads: one for everything, and the pumps of `stdio.rs`.

use std::{
    env, fs, io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{
    sandbox_async::create_sandbox,
    shim_async::create_task,
    ttrpc::r#async::{Server, transport::Listener},
};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    args::Args, bootstrap::TTRPC_ADDRESS, control, events, logger::Logger, sandboxes::Sandboxes,
    service::Service, tasks::Tasks,
};
use crate::{
    monitor::{inherited_socket, runtime},
    share,
};

/// The versions of the task service: the same messages under two names. containerd 1.x calls the older one.
const VERSIONS: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];

/// How long the last answers may take.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Serves the sandbox whose bundle is the working directory.
pub(super) fn serve(args: &Args) -> ExitCode {
    let log = Logger::open(Path::new(""), &args.id, args.debug);
    match inherited_socket().and_then(|socket| run(args, socket, &log)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.error(&format!("serve sandbox {}: {error}", args.id));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, socket: OwnedFd, log: &Logger) -> io::Result<()> {
    // Before there is a second thread.
    share::enter_private_namespace()
        .map_err(|error| io::Error::other(crate::error::message(&error)))?;
    let listener = UnixListener::from(socket);
    let runtime = runtime()?;
    let served = runtime.block_on(async {
        let address = env::var(TTRPC_ADDRESS).unwrap_or_default();
        let (publisher, sending) = events::publisher(&address, &args.namespace, log.clone());
        let tasks = Arc::new(Tasks::new(&args.namespace, publisher, log.clone()));
        let mut server = serving(listener, &tasks)?;
        server.start().await.map_err(io::Error::other)?;
        control::serve(Path::new("."), &tasks, log);
        log.debug(&format!("serving sandbox {}", args.id));
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            () = tasks.over() => {}
            _ = terminate.recv() => tasks.stop().await,
        }
        if !args.socket.is_empty() {
            // Already gone is as good.
            let _ = fs::remove_file(&args.socket);
        }
        // The answer to the request that ended this is on its way; then nobody asks any more.
        let _ = tokio::time::timeout(LAST_ANSWERS, server.shutdown()).await;
        drop(server);
        drop(tasks);
        sending.finish().await;
        Ok(())
    });
    // A hook that does not end holds nobody up.
    runtime.shutdown_background();
    served
}

fn serving(listener: UnixListener, tasks: &Arc<Tasks>) -> io::Result<Server> {
    let mut server = Server::new().add_listener(Listener::try_from(listener)?);
    for version in VERSIONS {
        let service = create_task(Arc::new(Service(Arc::clone(tasks))));
        let renamed = service
            .into_values()
            .map(|methods| (version.to_owned(), methods));
        server = server.register_service(renamed.collect());
    }
    Ok(server.register_service(create_sandbox(Arc::new(Sandboxes(Arc::clone(tasks))))))
}
