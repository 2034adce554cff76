//! The NBD server: volumes for qemu, libnbd, fio, nbd-client over TCP, unix sockets or any other byte stream.
//!
//! Fixed newstyle negotiation, simple replies, as in the NBD protocol document (`proto.md` of the reference
//! implementation). One task per connection and none per request: all frames of a buffer are parsed and handed in, all
//! answers that are there leave in one write (data-path.md, Network). Invariants: what a connection has under way is
//! bounded by [`Limits`], beyond which its socket is not read; every request is answered once, or the connection ends;
//! nothing a client sends makes the server panic or allocate beyond the window.
//!
//! Several connections to one export are announced as safe (`CAN_MULTI_CONN`): a flush of the target covers every
//! write that was acknowledged, on whatever connection.

use crate::block::BlockTarget;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

mod decoder;
mod handshake;
mod outbox;
mod transmission;
mod under_way;
mod wire;

pub use transmission::Ended;

/// What bounds one server. Together they limit the memory that clients can make it use: `bytes` for each connection,
/// and one request of 32 MiB in each direction.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests of one connection that are not answered yet; at least 1.
    pub requests: usize,
    /// Bytes that one connection has under way, answers that wait in the outbox included. One request may start below
    /// this and end above it.
    pub bytes: usize,
    /// Connections at a time; further ones wait unaccepted.
    pub connections: usize,
    /// How long a client may take to choose an export.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 256, bytes: 32 << 20, connections: 32, handshake: Duration::from_secs(10) }
    }
}

/// Why a connection ended before it served an export, or why serving it failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket failed; the client is gone.
    #[error("connection failed: {0}")]
    Socket(#[from] io::Error),
    /// The client sent what no client may send; it was cut off.
    #[error("client broke the NBD protocol: {0}")]
    Protocol(&'static str),
    /// The client did not choose an export in time.
    #[error("client did not finish the handshake in time")]
    HandshakeTimeout,
}

/// The volumes that a server offers, by name. The empty name asks for the only one, if there is just one.
#[derive(Default)]
pub struct Exports {
    by_name: RwLock<BTreeMap<String, Arc<dyn BlockTarget>>>,
}

impl Exports {
    /// No volumes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Offer `target` as `name` from now on; the one that had this name before is given back, its connections go on.
    /// Unless every request to the target is in whole blocks anyway, it should be a [`crate::merge::Aligned`].
    pub fn insert(&self, name: &str, target: Arc<dyn BlockTarget>) -> Option<Arc<dyn BlockTarget>> {
        self.by_name.write().expect("nothing panics under this lock").insert(name.to_owned(), target)
    }

    /// Offer `name` no longer; connections that serve it go on.
    pub fn remove(&self, name: &str) -> Option<Arc<dyn BlockTarget>> {
        self.by_name.write().expect("nothing panics under this lock").remove(name)
    }

    fn find(&self, name: &str) -> Option<Arc<dyn BlockTarget>> {
        let by_name = self.by_name.read().expect("nothing panics under this lock");
        let only = || by_name.values().next().filter(|_| name.is_empty() && by_name.len() == 1);
        by_name.get(name).or_else(only).cloned()
    }

    fn names(&self) -> Vec<String> {
        self.by_name.read().expect("nothing panics under this lock").keys().cloned().collect()
    }
}

/// Serve a stream that a client has just opened, from the greeting to the end. On an error the stream is closed.
pub async fn serve_connection<S>(mut stream: S, exports: &Exports, limits: Limits) -> Result<Ended, NbdError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let chosen = tokio::time::timeout(limits.handshake, handshake::negotiate(&mut stream, exports));
    match chosen.await.map_err(|_| NbdError::HandshakeTimeout)?? {
        Some(target) => serve_negotiated(stream, target, limits).await,
        None => Ok(Ended::ByClient),
    }
}

/// Serve a stream whose other side knows the export already: the kernel's NBD client.
pub async fn serve_negotiated<S>(stream: S, target: Arc<dyn BlockTarget>, limits: Limits) -> Result<Ended, NbdError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    transmission::Transmission::new(stream, target, limits).run().await
}

/// Accept and serve clients on TCP until the future is dropped, which cuts off those that are connected.
pub async fn serve_tcp(listener: TcpListener, exports: Arc<Exports>, limits: Limits) {
    let mut clients = JoinSet::new();
    loop {
        let accepted = listener.accept().await.and_then(|(stream, _)| stream.set_nodelay(true).map(|()| stream));
        admit(&mut clients, accepted, &exports, limits).await;
    }
}

/// Accept and serve clients on a unix socket until the future is dropped, which cuts off those that are connected.
#[cfg(unix)]
pub async fn serve_unix(listener: tokio::net::UnixListener, exports: Arc<Exports>, limits: Limits) {
    let mut clients = JoinSet::new();
    loop {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        admit(&mut clients, accepted, &exports, limits).await;
    }
}

/// Start serving an accepted client; comes back when another one may be accepted.
async fn admit<S>(clients: &mut JoinSet<()>, accepted: io::Result<S>, exports: &Arc<Exports>, limits: Limits)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match accepted {
        Ok(stream) => {
            let exports = exports.clone();
            clients.spawn(async move {
                match serve_connection(stream, &exports, limits).await {
                    Ok(ended) => tracing::debug!(?ended, "NBD client left"),
                    Err(error) => tracing::warn!(%error, "NBD client cut off"),
                }
            });
        }
        Err(error) => {
            // Out of descriptors, or the client went away again: the kernel gives no event for when it is worth trying.
            tracing::warn!(%error, "NBD client not accepted");
            // sleep: the kernel gives no event for when accepting is worth trying again.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    while clients.try_join_next().is_some() {}
    while clients.len() >= limits.connections {
        clients.join_next().await;
    }
}

#[cfg(test)]
mod tests;
