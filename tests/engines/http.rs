//! A client for a server in a container, at a port of this machine.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server at a published port.
#[derive(Clone, Copy)]
pub(crate) struct Server(u16);

/// A connection to it, for any number of requests.
pub(crate) struct Connection(BufReader<TcpStream>);

impl Server {
    /// The one at this port.
    pub(crate) fn at(port: u16) -> Self {
        Self(port)
    }

    /// A new connection.
    #[track_caller]
    pub(crate) fn connect(self) -> Connection {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.0)).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        Connection(BufReader::new(stream))
    }

    /// A file, over a connection of its own.
    #[track_caller]
    pub(crate) fn get(self, path: &str) -> String {
        let (status, body) = self.connect().ask("GET", path, "");
        assert_eq!(status, 200, "{path}: {body}");
        body
    }
}

impl Connection {
    /// One request; answers status and body.
    #[track_caller]
    pub(crate) fn ask(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        let stream = self.0.get_mut();
        stream.write_all(request.as_bytes()).expect("ask");
        let status = self.line();
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok());
        let mut length = None;
        loop {
            let line = self.line().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().ok();
            }
        }
        let mut body = Vec::new();
        match length {
            Some(length) => self.0.by_ref().take(length).read_to_end(&mut body),
            // To the end of the connection.
            None => self.0.read_to_end(&mut body),
        }
        .expect("body");
        (
            status.expect("a status"),
            String::from_utf8(body).expect("text"),
        )
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("answer");
        line.trim_end().to_owned()
    }
}
