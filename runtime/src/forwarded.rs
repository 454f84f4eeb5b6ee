//! Signals that stand for the container's: caught here, passed on to its init.

use std::io;

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// What is passed on. The rest keeps its usual meaning, or concerns this process alone.
const FORWARDED: [i32; 10] = [
    1,  // SIGHUP
    2,  // SIGINT
    3,  // SIGQUIT
    10, // SIGUSR1
    12, // SIGUSR2
    14, // SIGALRM
    15, // SIGTERM
    18, // SIGCONT
    WINDOW_CHANGE,
    30, // SIGPWR
];

/// `SIGWINCH`: with a terminal it means a new size.
pub const WINDOW_CHANGE: i32 = 28;

/// Signals sent to this process.
#[derive(Debug)]
pub struct Signals(mpsc::Receiver<i32>);

impl Signals {
    /// Catches everything that is passed on; from here on none of it ends this process. Must be called inside a runtime.
    pub fn catch() -> io::Result<Self> {
        let (caught, signals) = mpsc::channel(FORWARDED.len());
        for number in FORWARDED {
            let mut stream = signal(SignalKind::from_raw(number))?;
            let caught = caught.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if caught.send(number).await.is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self(signals))
    }

    /// The number of the next one.
    pub async fn next(&mut self) -> i32 {
        match self.0.recv().await {
            Some(number) => number,
            // The tasks that catch end only with the runtime.
            None => std::future::pending().await,
        }
    }
}
