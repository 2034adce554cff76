//! A gRPC server on a unix socket, as CSI and the kubelet want it.
//!
//! Invariants: a path is taken over only from a socket that nobody answers on; whatever else lies there is left alone. The
//! socket is never there with more rights than 0600: it is made under a hidden name (which the kubelet's watcher skips), gets
//! its mode, and is then moved into place. At the end only this very socket is removed, not a successor's.
//!
//! Two processes that start at the same instant on the same path may both find it free; the later one has it. The kubelet
//! starts one pod per node, so no lock is spent on that.

use std::fs::{self, Metadata, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::Router;

mod authority;

use authority::TamedAuthority;

/// How long calls that run may go on after the shutdown. The kubelet's grace period for a pod is 30 s.
const GRACE: Duration = Duration::from_secs(10);

/// Owner only: whoever may connect may attach volumes.
const MODE: u32 = 0o600;

/// Why a socket could not be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something else lies there; a person has to look.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// Another process serves there; this one should not run.
    #[error("{} is served by another process", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// The path has no file name.
    #[error("{} is not the path of a file", path.display())]
    NoFileName {
        /// What was given.
        path: PathBuf,
    },
    /// The system refused; the caller may try again.
    #[error("cannot {step} {}", path.display())]
    System {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The server ended by itself.
    #[error("the server on {} failed", path.display())]
    Serve {
        /// Where.
        path: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
}

/// A socket that listens, not yet served: callers wait in its queue. Dropping it removes it.
#[derive(Debug)]
pub struct BoundSocket {
    listener: UnixListener,
    place: Place,
}

/// Removes the socket at the end, if it is still the same.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    inode: (u64, u64),
}

impl BoundSocket {
    /// Listens on `path`, in place of a socket that nobody answers on.
    ///
    /// # Errors
    /// [`SocketError`].
    pub async fn bind(path: impl Into<PathBuf>) -> Result<Self, SocketError> {
        let path = path.into();
        let hidden = hidden_name(&path)?;
        refuse_unless_stale(&path).await?;
        remove_if_socket(&hidden)?;
        let failed = |step| {
            let path = path.clone();
            move |source| SocketError::System { step, path, source }
        };
        let listener = UnixListener::bind(&hidden).map_err(failed("listen on"))?;
        let made = Place::of(&hidden).map_err(failed("look at"))?;
        fs::set_permissions(&hidden, Permissions::from_mode(MODE)).map_err(failed("set the mode of"))?;
        fs::rename(&hidden, &path).map_err(failed("move a socket to"))?;
        let place = made.moved_to(path);
        Ok(Self { listener, place })
    }

    /// Serves until `shutdown` comes, then lets running calls end for at most 10 s, then removes the socket. A call
    /// that takes longer goes on until the program ends.
    ///
    /// # Errors
    /// [`SocketError::Serve`].
    pub async fn serve(self, router: Router, shutdown: impl Future<Output = ()>) -> Result<(), SocketError> {
        self.serve_with(GRACE, router, shutdown).await
    }

    async fn serve_with(
        self,
        grace: Duration,
        router: Router,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), SocketError> {
        let Self { listener, place } = self;
        let (began, ends) = oneshot::channel::<()>();
        let signal = async move {
            shutdown.await;
            // Nobody listens if the server ended first.
            let _ = began.send(());
        };
        let patience_over = async move {
            match ends.await {
                // sleep: the grace that calls under way get when the server stops.
                Ok(()) => tokio::time::sleep(grace).await,
                Err(_) => std::future::pending().await,
            }
        };
        let incoming = UnixListenerStream::new(listener).map(|io| io.map(TamedAuthority::new));
        let served = router.serve_with_incoming_shutdown(incoming, signal);
        tokio::select! {
            result = served => result.map_err(|source| SocketError::Serve { path: place.path.clone(), source }),
            () = patience_over => Ok(()),
        }
    }
}

/// [`BoundSocket::bind`] and [`BoundSocket::serve`] in one.
///
/// # Errors
/// [`SocketError`].
pub async fn serve_uds(
    path: impl Into<PathBuf>,
    router: Router,
    shutdown: impl Future<Output = ()>,
) -> Result<(), SocketError> {
    BoundSocket::bind(path).await?.serve(router, shutdown).await
}

impl Place {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), inode: inode(&fs::symlink_metadata(path)?) })
    }

    /// The same socket under its final name.
    fn moved_to(mut self, path: PathBuf) -> Self {
        self.path = path;
        self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ours = |seen: &Metadata| inode(seen) == self.inode;
        if fs::symlink_metadata(&self.path).is_ok_and(|seen| ours(&seen)) {
            // A socket left behind is found stale by the next one: nothing to report.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(of: &Metadata) -> (u64, u64) {
    (of.dev(), of.ino())
}

/// Beside `path`, hidden, and of this call alone. What a killed process left under it is in nobody's use.
fn hidden_name(path: &Path) -> Result<PathBuf, SocketError> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let no_name = || SocketError::NoFileName { path: path.to_owned() };
    path.file_name().ok_or_else(no_name)?;
    // A path that is too long for clients would only fail for them: the hidden one is shorter.
    SocketAddr::from_pathname(path).map_err(|source| SocketError::System {
        step: "make an address of",
        path: path.to_owned(),
        source,
    })?;
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    Ok(path.with_file_name(format!(".{}-{call}.new", std::process::id())))
}

/// Whether `path` is free or held by a socket without a listener.
async fn refuse_unless_stale(path: &Path) -> Result<(), SocketError> {
    if !is_socket(path)? {
        return Ok(());
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => Ok(()),
        Err(source) => Err(SocketError::System { step: "ask who serves", path: path.to_owned(), source }),
    }
}

fn remove_if_socket(path: &Path) -> Result<(), SocketError> {
    if !is_socket(path)? {
        return Ok(());
    }
    fs::remove_file(path).map_err(|source| SocketError::System { step: "remove", path: path.to_owned(), source })
}

/// False if nothing is there.
fn is_socket(path: &Path) -> Result<bool, SocketError> {
    match fs::symlink_metadata(path) {
        Ok(seen) if seen.file_type().is_socket() => Ok(true),
        Ok(_) => Err(SocketError::NotASocket { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(SocketError::System { step: "look at", path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests;
