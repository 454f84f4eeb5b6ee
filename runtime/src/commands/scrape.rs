//! Text over HTTP on a Unix socket, for a collector that asks now and then: `GET /metrics`.
//!
//! Contract: one request a connection, one connection at a time, each with a deadline: whoever is slow keeps others
//! waiting only so long. Ends on `SIGTERM` and `SIGINT`, and then the socket is gone. A socket that nobody serves any
//! more is replaced, one that is served is an error.
//! Spec: RFC 9112, as much of it as an answer that closes the connection needs.

use std::{
    fs, io,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    signal::unix::{SignalKind, signal},
};

use crate::{error::CommandError, monitor::runtime};

/// The longest request, in bytes.
const MAX_REQUEST_BYTES: usize = 8 << 10;

/// How long a request may take to arrive, and its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket's file, removed when dropped.
struct Named<'a>(&'a Path);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = fs::remove_file(self.0);
    }
}

/// Serves what `text` says at each request.
pub(super) fn serve(
    socket: &Path,
    text: impl Fn() -> Result<String, CommandError>,
) -> Result<ExitCode, CommandError> {
    let failed = |source| CommandError::Write {
        what: socket.display().to_string(),
        source,
    };
    let listener = listen(socket).map_err(failed)?;
    let _named = Named(socket);
    let serving = async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let mut ends = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
        let [Ok(terminate), Ok(interrupt)] = &mut ends else {
            return Err(io::Error::other("catch signals"));
        };
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                accepted = listener.accept() => {
                    // An asker that hangs up or takes too long has no answer.
                    let asked = answer(accepted?.0, &text);
                    let _ = tokio::time::timeout(PATIENCE, asked).await;
                }
            }
        }
    };
    let done = runtime().and_then(|runtime| runtime.block_on(serving));
    done.map(|()| ExitCode::SUCCESS).map_err(failed)
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(socket) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                return Err(error);
            }
            fs::remove_file(socket)?;
            UnixListener::bind(socket)
        }
        bound => bound,
    }
}

async fn answer(
    mut stream: tokio::net::UnixStream,
    text: &impl Fn() -> Result<String, CommandError>,
) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let room = MAX_REQUEST_BYTES.saturating_sub(request.len());
        if room == 0
            || (&mut stream)
                .take(room as u64)
                .read_buf(&mut request)
                .await?
                == 0
        {
            break;
        }
    }
    let (status, body) = match wanted(&request) {
        Ok(()) => match text() {
            Ok(text) => ("200 OK", text),
            Err(error) => ("500 Internal Server Error", error.to_string() + "\n"),
        },
        Err(refusal) => (refusal, refusal.to_owned() + "\n"),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// Whether a request is for the numbers; else the status that refuses it.
fn wanted(request: &[u8]) -> Result<(), &'static str> {
    let line = request
        .split(|&byte| byte == b'\r')
        .next()
        .unwrap_or_default();
    let words: Vec<_> = line.split(|&byte| byte == b' ').collect();
    match words.as_slice() {
        [b"GET", b"/" | b"/metrics", version] if version.starts_with(b"HTTP/1.") => Ok(()),
        [b"GET", _, _] => Err("404 Not Found"),
        [_, _, version] if version.starts_with(b"HTTP/1.") => Err("405 Method Not Allowed"),
        _ => Err("400 Bad Request"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_numbers_are_to_be_had() {
        assert_eq!(wanted(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), Ok(()));
        assert_eq!(wanted(b"GET / HTTP/1.0\r\n\r\n"), Ok(()));
        assert_eq!(wanted(b"GET /etc HTTP/1.1\r\n\r\n"), Err("404 Not Found"));
        let refused = Err("405 Method Not Allowed");
        assert_eq!(wanted(b"POST /metrics HTTP/1.1\r\n\r\n"), refused);
        for nonsense in [&b""[..], b"GET", b"\xff\xfe \0 x", b"SSH-2.0-x"] {
            assert_eq!(wanted(nonsense), Err("400 Bad Request"));
        }
    }

    #[test]
    fn a_socket_that_is_served_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let first = listen(&socket).unwrap();
        assert!(listen(&socket).is_err());
        drop(first);
        listen(&socket).unwrap();
    }
}
