//! `net-echo`: sends back what arrives on a port, over TCP and UDP, over IPv4 and IPv6, until it is killed.
//!
//! Says `ready` once both sockets are bound. One TCP connection at a time.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;

fn main() -> ExitCode {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok());
    match port.map_or(Err(io::ErrorKind::InvalidInput.into()), serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("net-echo: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(port: u16) -> io::Result<()> {
    // By Linux's default such a socket takes IPv4 too.
    let any = (Ipv6Addr::UNSPECIFIED, port);
    let (tcp, udp) = (TcpListener::bind(any)?, UdpSocket::bind(any)?);
    println!("ready");
    std::thread::spawn(move || datagrams(&udp));
    for stream in tcp.incoming() {
        // The other side may leave when it likes.
        let _ = stream.and_then(echo);
    }
    Ok(())
}

fn datagrams(udp: &UdpSocket) -> io::Result<()> {
    let mut packet = vec![0; 65_536];
    loop {
        let (len, from) = udp.recv_from(&mut packet)?;
        let _ = udp.send_to(&packet[..len], from);
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            len => stream.write_all(&chunk[..len])?,
        }
    }
}
