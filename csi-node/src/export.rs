//! `lamina-csi-node export`: a volume over NBD, without Kubernetes.
//!
//! Maps come from the leader's `WatchMap`; afterwards the data connections bring them too, so I/O goes on while the
//! leader is away. The session must be admitted already; a process that takes one over says so (`--resume`), and is
//! trusted that nothing of the process before is unanswered.

use crate::leader::{self, MAX_REPORTS, Whereabouts};
use crate::opener::{ClusterOpener, OpenVolume, Opener, Wish, flush};
use lamina_client::block::BlockError;
use lamina_client::merge::Aligned;
use lamina_client::nbd::{Exports, Limits, serve_tcp, serve_unix};
use lamina_client::runtime::OpenError;
use lamina_protocol::ids::{ClusterId, SessionId, VolumeId};
use lamina_protocol::wire::Start;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

/// A text that is not where to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be tcp://ADDRESS:PORT, such as tcp://127.0.0.1:10809, or unix:///PATH")]
pub struct NotAPlace;

impl FromStr for Listen {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Self, NotAPlace> {
        if let Some(address) = text.strip_prefix("tcp://") {
            return address.parse().map(Self::Tcp).map_err(|_| NotAPlace);
        }
        match text.strip_prefix("unix://") {
            Some(path) if path.starts_with('/') && path.len() > 1 => Ok(Self::Unix(path.into())),
            _ => Err(NotAPlace),
        }
    }
}

/// What to export.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of which cluster.
    pub cluster: ClusterId,
    /// Which volume.
    pub volume: VolumeId,
    /// Under which session.
    pub session: SessionId,
    /// First use of the session, or not.
    pub start: Start,
    /// `host:port` of a replica of the operator.
    pub leader: String,
    /// Where to listen.
    pub listen: Listen,
    /// Name of the export; the empty name always finds it.
    pub name: String,
}

/// Why the export ended.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The socket.
    #[error("cannot listen: {0}")]
    Listen(#[source] io::Error),
    /// The driver.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Final.
    #[error("the session has ended")]
    Ended,
    /// Writes may be lost.
    #[error("what was written last could not be made durable: {0}")]
    Flush(#[from] BlockError),
}

/// Export until `shutdown` turns true.
///
/// # Errors
/// [`ExportError`].
pub async fn export(options: Options, mut shutdown: watch::Receiver<bool>) -> Result<(), ExportError> {
    let (newest, maps) = watch::channel(None);
    tokio::spawn(leader::follow(Whereabouts::Fixed(options.leader.clone()), options.volume, newest));
    let (reports, reported) = mpsc::channel(MAX_REPORTS);
    tokio::spawn(leader::report(Whereabouts::Fixed(options.leader.clone()), reported));
    let (_, near) = watch::channel(Vec::new());
    let opener = ClusterOpener { cluster: options.cluster, reports, near };
    let (volume, session, start) = (options.volume, options.session, options.start);
    let on_superseded = Arc::new(|| std::process::exit(crate::serve::SUPERSEDED));
    let driver = opener.open(Wish { volume, session, start, maps, on_superseded })?;
    let mut status = driver.status();
    tracing::info!(%volume, %session, "waiting for a map that lists the session, and for its servers");
    tokio::select! {
        status = status.wait_for(|status| status.serving || status.ended) => {
            if status.map_or(true, |status| status.ended) {
                return Err(ExportError::Ended);
            }
        }
        _ = shutdown.wait_for(|end| *end) => return Ok(()),
    }
    if start == Start::Resume {
        driver.replayed();
    }
    serve_volume(&options, driver, shutdown).await
}

async fn serve_volume(
    options: &Options,
    driver: Arc<dyn OpenVolume>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), ExportError> {
    let exports = Arc::new(Exports::new());
    exports.insert(&options.name, Arc::new(Aligned::new(driver.clone())));
    let mut status = driver.status();
    let ended = async move {
        let _ = status.wait_for(|status| status.ended).await;
    };
    // On the driver's thread: a request changes threads only towards the client and the servers.
    let mut serving = JoinSet::new();
    serving.spawn_on(listen(options.listen.clone(), exports, driver.size()), &driver.thread());
    tokio::select! {
        // It is gone without a word only with the driver's thread.
        result = serving.join_next() => return result.and_then(Result::ok).unwrap_or(Err(ExportError::Ended)),
        () = ended => return Err(ExportError::Ended),
        _ = shutdown.wait_for(|end| *end) => serving.shutdown().await,
    }
    if let Listen::Unix(path) = &options.listen {
        let _ = std::fs::remove_file(path);
    }
    Ok(flush(&*driver).await?)
}

async fn listen(place: Listen, exports: Arc<Exports>, size: u64) -> Result<(), ExportError> {
    match place {
        Listen::Tcp(address) => {
            let listener = tokio::net::TcpListener::bind(address).await.map_err(ExportError::Listen)?;
            tracing::info!(%address, size, "serving NBD");
            serve_tcp(listener, exports, Limits::default()).await;
        }
        Listen::Unix(path) => {
            let listener = listen_on(&path).map_err(ExportError::Listen)?;
            tracing::info!(path = %path.display(), size, "serving NBD");
            serve_unix(listener, exports, Limits::default()).await;
        }
    }
    Ok(())
}

/// A socket that a killed process left is replaced, one that somebody serves is not.
fn listen_on(path: &std::path::Path) -> io::Result<tokio::net::UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    tokio::net::UnixListener::bind(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_place_to_listen_is_tcp_or_an_absolute_path() {
        assert_eq!("tcp://127.0.0.1:10809".parse(), Ok(Listen::Tcp("127.0.0.1:10809".parse().unwrap())));
        assert_eq!("unix:///run/x.sock".parse(), Ok(Listen::Unix("/run/x.sock".into())));
        for bad in ["127.0.0.1:10809", "unix://x.sock", "unix:///", "tcp://localhost", ""] {
            assert_eq!(bad.parse::<Listen>(), Err(NotAPlace), "{bad}");
        }
    }
}
