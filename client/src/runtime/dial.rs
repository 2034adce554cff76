//! Making a connection: addresses in turn, `Hello` both ways, a pause after failures.
//!
//! Invariant: a connection is handed to the driver only when the server at its other end has said that it is the one
//! expected, of this cluster, in a version and with windows that this code speaks: addresses are reused.

use super::link::is_refusal;
use bytes::Bytes;
use lamina_protocol::ids::{ClusterId, ServerId};
use lamina_protocol::limits::{MAX_FRAME_BYTES, WINDOW_BYTES, WINDOW_REQUESTS};
use lamina_protocol::wire::{
    Framing, ReplyBody, ReplyFrame, RequestBody, RequestFrame, RequestHeader, WIRE_VERSION, frame_length, put_request,
    read_reply,
};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long one address may take, handshake included.
const PATIENCE: Duration = Duration::from_secs(3);
/// First pause after a failure; doubled at each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Why a connection could not be made. The runtime tells the driver whether somebody refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// The socket.
    #[error("{0}")]
    Socket(#[from] io::Error),
    /// Nothing was heard in time.
    #[error("no answer in time")]
    Silent,
    /// What came is no frame.
    #[error("the server sent what is no frame: {0}")]
    Framing(#[from] Framing),
    /// Somebody else is there.
    #[error("another server, version or window than expected is there")]
    Unfit,
    /// The map gives no address.
    #[error("the map gives no address")]
    NoAddress,
}

impl DialError {
    /// Whether the server is known not to be there.
    pub(super) fn refused(&self) -> bool {
        matches!(self, Self::Socket(error) if is_refusal(error))
    }
}

/// The pause after this many failures in a row.
pub(super) fn pause(failures: u32) -> Duration {
    if failures == 0 { Duration::ZERO } else { MAX_PAUSE.min(FIRST_PAUSE * 2u32.saturating_pow(failures - 1)) }
}

/// Connect to the first address at which the expected server answers.
pub(super) async fn dial(cluster: ClusterId, server: ServerId, addresses: &[String]) -> Result<TcpStream, DialError> {
    let mut last = DialError::NoAddress;
    for address in addresses {
        match timeout(PATIENCE, greet(cluster, server, address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = DialError::Silent,
        }
    }
    Err(last)
}

async fn greet(cluster: ClusterId, server: ServerId, address: &str) -> Result<TcpStream, DialError> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut hello = Vec::new();
    put_request(&hello_to(cluster, server), &mut hello);
    stream.write_all(&hello).await?;
    let reply = read_one(&mut stream).await?;
    match reply.body {
        ReplyBody::Hello { server: there, version, max_frame_bytes, window_requests, window_bytes, .. }
            if there == server
                && version == WIRE_VERSION
                && max_frame_bytes >= MAX_FRAME_BYTES
                && window_requests >= WINDOW_REQUESTS
                && window_bytes >= WINDOW_BYTES =>
        {
            Ok(stream)
        }
        _ => Err(DialError::Unfit),
    }
}

fn hello_to(cluster: ClusterId, server: ServerId) -> RequestFrame {
    let body = RequestBody::Hello {
        cluster,
        server,
        min_version: WIRE_VERSION,
        max_version: WIRE_VERSION,
        features: 0,
        max_frame_bytes: MAX_FRAME_BYTES,
    };
    RequestFrame { header: RequestHeader::default(), body, payload: Bytes::new() }
}

/// Read exactly one frame.
async fn read_one(stream: &mut TcpStream) -> Result<ReplyFrame, DialError> {
    let mut frame = vec![0; 4];
    stream.read_exact(&mut frame).await?;
    let length = frame_length(&frame)?.expect("four bytes are there");
    frame.resize(length, 0);
    stream.read_exact(&mut frame[4..]).await?;
    Ok(read_reply(&Bytes::from(frame))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_bounded() {
        let pauses: Vec<_> = (0..8).map(|n| pause(n).as_millis()).collect();
        assert_eq!(pauses, [0, 50, 100, 200, 400, 800, 1600, 2000]);
        assert_eq!(pause(u32::MAX), MAX_PAUSE);
    }
}
