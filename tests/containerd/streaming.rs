//! The CRI's streaming server: a WebSocket whose messages begin with the number of their stream.

use std::net::TcpStream;
use std::time::Duration;

use k8s_cri::v1::{AttachRequest, ExecRequest};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use crate::kubelet::Kubelet;

/// How long the next message may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The streams of `v4.channel.k8s.io`.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const SIZE: u8 = 4;

/// The streams of the first port that is forwarded.
const DATA: u8 = 0;
const ERROR: u8 = 1;

/// A process's streams. Reading gives up after a minute.
pub(crate) struct Stream {
    socket: WebSocket<TcpStream>,
    /// All output so far, as text.
    pub(crate) output: String,
    /// The same as it came.
    pub(crate) bytes: Vec<u8>,
    /// All of standard error so far.
    pub(crate) errors: String,
    /// What the server says of the end, as JSON.
    pub(crate) status: String,
}

/// Opens an address that the CRI answered with.
fn open(url: &str) -> WebSocket<TcpStream> {
    let address = url.strip_prefix("http://").expect("an http address");
    let host = address.split('/').next().expect("a host");
    let stream = TcpStream::connect(host).expect("the streaming server");
    stream.set_read_timeout(Some(LIMIT)).expect("timeout");
    let mut request = format!("ws://{address}")
        .into_client_request()
        .expect("request");
    let protocol = HeaderValue::from_static("v4.channel.k8s.io");
    request
        .headers_mut()
        .insert("Sec-WebSocket-Protocol", protocol);
    let origin = HeaderValue::from_static("http://localhost");
    request.headers_mut().insert("Origin", origin);
    tungstenite::client(request, stream).expect("a WebSocket").0
}

/// What comes back over a connection to a port of a pod to which `said` has been sent: its data, and the server's error.
pub(crate) fn forwarded(url: &str, said: &str) -> (String, String) {
    let mut socket = open(url);
    let message = [&[DATA], said.as_bytes()].concat();
    socket.send(Message::binary(message)).expect("send");
    let (mut data, mut error) = (Vec::new(), Vec::new());
    while let Ok(message) = socket.read() {
        match message.into_data().split_first() {
            Some((&DATA, bytes)) => data.extend_from_slice(bytes),
            Some((&ERROR, bytes)) => error.extend_from_slice(bytes),
            _ => {}
        }
    }
    // First the server says which port each stream is of, in two bytes.
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes.get(2..).unwrap_or(&[])).into_owned();
    (text(&data), text(&error))
}

impl Stream {
    /// Runs a program in a container.
    pub(crate) fn exec(node: &Kubelet<'_>, request: ExecRequest) -> Self {
        let answer = node.cri.answer(node.cri.runtime().exec(request));
        Self::open(&answer.expect("Exec").url)
    }

    /// Is connected with a container's first process.
    pub(crate) fn attach(node: &Kubelet<'_>, request: AttachRequest) -> Self {
        let answer = node.cri.answer(node.cri.runtime().attach(request));
        Self::open(&answer.expect("Attach").url)
    }

    fn open(url: &str) -> Self {
        Self {
            socket: open(url),
            output: String::new(),
            bytes: Vec::new(),
            errors: String::new(),
            status: String::new(),
        }
    }

    /// Types.
    pub(crate) fn write(&mut self, text: &str) {
        self.send(text.as_bytes());
    }

    /// Sends bytes to standard input.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        // The server takes messages of 4 MiB at most.
        for part in bytes.chunks(1 << 16) {
            self.send_to(STDIN, part);
        }
    }

    /// Hangs up.
    pub(crate) fn close(mut self) {
        self.socket.close(None).expect("close");
        self.finish();
    }

    /// Gives the terminal a size.
    pub(crate) fn resize(&mut self, columns: u16, rows: u16) {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        self.send_to(SIZE, size.as_bytes());
    }

    /// Reads until the output contains a text.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) {
        while !self.output.contains(text) {
            assert!(self.read(), "no {text:?} in {:?}", self.output);
        }
    }

    /// Reads until the server closes.
    pub(crate) fn finish(&mut self) {
        while self.read() {}
    }

    fn send_to(&mut self, stream: u8, bytes: &[u8]) {
        let message = [&[stream], bytes].concat();
        self.socket.send(Message::binary(message)).expect("send");
    }

    /// Whether there was one more message.
    pub(crate) fn read(&mut self) -> bool {
        let Ok(message) = self.socket.read() else {
            return false;
        };
        let bytes = message.into_data();
        if let Some((stream, text)) = bytes.split_first() {
            if *stream == STDOUT {
                self.bytes.extend_from_slice(text);
            }
            let text = String::from_utf8_lossy(text);
            match *stream {
                STDOUT => self.output.push_str(&text),
                STDERR => self.errors.push_str(&text),
                STATUS => self.status.push_str(&text),
                _ => {}
            }
        }
        true
    }
}
