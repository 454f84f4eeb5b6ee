//! `net-cost`: a TCP server that receives, sends, or answers, as often as the client says, until it is killed.
//!
//! A connection begins with one byte and a number (8 bytes, big-endian): `r`: so many bytes are received, then one is
//! sent; `s`: so many are sent; `e`: so many times one byte is received and sent back. Then comes the next such request.
//! Here: the traffic. Not here: what it costs (the benchmark).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;

const CHUNK_BYTES: usize = 64 << 10;

fn main() -> ExitCode {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok());
    match port.map_or(Err(io::ErrorKind::InvalidInput.into()), serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("net-cost: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(port: u16) -> io::Result<()> {
    for stream in TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?.incoming() {
        // The other side may leave when it likes.
        let _ = stream.and_then(|stream| obey(&stream));
    }
    Ok(())
}

fn obey(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let (mut kind, mut count) = ([0], [0; 8]);
        stream.read_exact(&mut kind)?;
        stream.read_exact(&mut count)?;
        let count = u64::from_be_bytes(count);
        match kind {
            [b'r'] => {
                let mut left = count;
                while left > 0 {
                    let len = stream.read(&mut chunk)?;
                    if len == 0 {
                        return Ok(());
                    }
                    left = left.saturating_sub(len as u64);
                }
                stream.write_all(&[0])?;
            }
            [b's'] => {
                let mut left = count;
                while left > 0 {
                    let len =
                        usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
                    stream.write_all(&chunk[..len])?;
                    left -= len as u64;
                }
            }
            [b'e'] => {
                for _ in 0..count {
                    stream.read_exact(&mut kind)?;
                    stream.write_all(&kind)?;
                }
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
