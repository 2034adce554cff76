//! Connections of this server to others, from which it fills and settles.
//!
//! Invariant: the machine hears of a peer only after it has said that it is the server that was expected, of this cluster,
//! in a version that this code speaks: addresses are reused.

use crate::connections::prepare;
use crate::link::{Link, LinkError};
use crate::server::Server;
use bytes::Bytes;
use lamina_protocol::ids::{ClusterId, ServerId};
use lamina_protocol::limits::MAX_FRAME_BYTES;
use lamina_protocol::storage_server::PeerId;
use lamina_protocol::wire::{
    ReplyBody, ReplyFrame, RequestBody, RequestFrame, RequestHeader, WIRE_VERSION, frame_length, put_request,
    read_reply,
};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// How long one address may take, `Hello` included.
const PATIENCE: Duration = Duration::from_secs(3);

/// A connection that the machine asked for. Dropping it closes it.
pub(crate) struct Peer {
    /// There once it is made.
    pub(crate) link: Option<Rc<Link>>,
    task: AbortHandle,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why a peer could not be reached; the machine tries again in its own time.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("{0}")]
    Socket(#[from] std::io::Error),
    #[error("no answer in time")]
    Silent,
    #[error("another server or version than expected is there")]
    Unfit,
    #[error("the map gives no address")]
    NoAddress,
}

impl Peer {
    /// Begins to connect.
    pub(crate) fn dial(
        server: &Rc<Server>,
        peer: PeerId,
        cluster: ClusterId,
        expected: ServerId,
        addresses: Vec<String>,
    ) -> Self {
        let server = server.clone();
        let live = async move {
            match dial(cluster, expected, &addresses).await {
                Ok(stream) => serve(&server, peer, stream).await,
                Err(why) => tracing::debug!(server = %expected, "cannot reach a peer: {why}"),
            }
            // On a task of its own, for the machine may close this peer meanwhile, which ends the present one.
            tokio::task::spawn_local(async move { server.peer_broken(peer) });
        };
        Self { link: None, task: tokio::task::spawn_local(live).abort_handle() }
    }
}

async fn serve(server: &Rc<Server>, peer: PeerId, stream: TcpStream) {
    let link = Rc::new(Link::new(stream));
    server.peer_connected(peer, link.clone());
    let ended = tokio::select! {
        error = link.read_frames(PATIENCE * 20, read_reply, |frames| server.peer_frames(peer, frames)) => error,
        error = link.write_rest() => error,
    };
    tracing::debug!("connection to a peer is over: {ended}");
}

/// Connects to the first address at which the expected server answers.
async fn dial(cluster: ClusterId, server: ServerId, addresses: &[String]) -> Result<TcpStream, DialError> {
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
    prepare(&stream)?;
    let body = RequestBody::Hello {
        cluster,
        server,
        min_version: WIRE_VERSION,
        max_version: WIRE_VERSION,
        features: 0,
        max_frame_bytes: MAX_FRAME_BYTES,
    };
    let mut hello = Vec::new();
    put_request(&RequestFrame { header: RequestHeader::default(), body, payload: Bytes::new() }, &mut hello);
    stream.write_all(&hello).await?;
    match read_one(&mut stream).await?.body {
        ReplyBody::Hello { server: there, version: WIRE_VERSION, max_frame_bytes, .. }
            if there == server && max_frame_bytes >= MAX_FRAME_BYTES =>
        {
            Ok(stream)
        }
        _ => Err(DialError::Unfit),
    }
}

/// Reads exactly one frame.
async fn read_one(stream: &mut TcpStream) -> Result<ReplyFrame, DialError> {
    let mut frame = vec![0; 4];
    stream.read_exact(&mut frame).await?;
    let length = frame_length(&frame).map_err(LinkError::from)?.expect("four bytes are there");
    frame.resize(length, 0);
    stream.read_exact(&mut frame[4..]).await?;
    Ok(read_reply(&Bytes::from(frame)).map_err(LinkError::from)?)
}
