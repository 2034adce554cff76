//! `device-holder`: keeps the kernel's device descriptors while csi-node crashes, is upgraded or deleted.
//!
//! A process that serves a device puts the device's descriptor here, keyed by the volume's handle and with a small
//! state in words of its own; its successor takes both. Invariant: a descriptor goes to a taker only after the socket
//! of the one that had it last has closed, so never do two processes answer the same kernel requests; one that does not
//! let go is killed after [`PATIENCE`] (data-path.md, Attach). The socket of a process closes only when its last thread
//! is gone, so it cannot answer anything after that.
//!
//! Nothing is kept on disk: with the holder the descriptors are gone, and csi-node, whose [`HolderClient`] notices,
//! puts its own again. The holder has to see the process ids of csi-node (`hostPID`), else it can only wait for it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

mod client;
mod message;
mod service;

pub use client::{HolderClient, HolderError, Taken};

/// How long the last taker may keep a descriptor that another one asks for.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Volumes kept at a time: above what a node attaches.
const MAX_VOLUMES: usize = 1024;
/// Clients at a time; further ones wait unaccepted. csi-node needs one, two while a successor starts.
const MAX_CLIENTS: usize = 32;

/// One descriptor.
struct Held {
    fd: Arc<OwnedFd>,
    state: Vec<u8>,
    /// The client that put it or took it last, while its socket is open.
    owner: Option<ClientId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ClientId(u64);

#[derive(Default)]
struct Shelf {
    volumes: BTreeMap<String, Held>,
    /// The processes of the clients that are connected; `None` if its id cannot be seen from here.
    clients: BTreeMap<ClientId, Option<OwnedFd>>,
    last_client: u64,
}

/// The holder: everything it keeps, shared by the threads of its clients.
#[derive(Default)]
pub struct Holder {
    shelf: Mutex<Shelf>,
    /// A client left.
    left: Condvar,
}

impl Holder {
    /// An empty one.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Make the socket at `path`, for root only, in place of one that a holder before this one left, and serve.
    pub async fn serve_at(self: Arc<Self>, path: &Path) -> io::Result<()> {
        if UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = tokio::net::UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        self.serve(listener).await;
        Ok(())
    }

    /// Serve clients until the future is dropped; those that are connected are served on until they leave. Never ends
    /// by itself: what is kept would be lost.
    pub async fn serve(self: Arc<Self>, listener: tokio::net::UnixListener) {
        let places = Arc::new(tokio::sync::Semaphore::new(MAX_CLIENTS));
        loop {
            let place = places.clone().acquire_owned().await.expect("nobody closes it");
            let accepted = listener.accept().await;
            if let Err(error) = accepted.and_then(|(stream, _)| self.start_client(stream, place)) {
                // Out of descriptors, or the client went away again: no event tells when it is worth trying.
                tracing::warn!(%error, "client of the device holder not accepted");
                // sleep: no event tells when accepting is worth trying again.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    fn start_client(self: &Arc<Self>, stream: tokio::net::UnixStream, place: OwnedSemaphorePermit) -> io::Result<()> {
        let process = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(open_process);
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        let holder = self.clone();
        std::thread::Builder::new().name("holder-client".into()).spawn(move || {
            holder.serve_client(&stream, process);
            drop(place);
        })?;
        Ok(())
    }

    fn serve_client(&self, stream: &UnixStream, process: Option<OwnedFd>) {
        let client = self.enter(process);
        if let Err(error) = service::serve(self, client, stream) {
            tracing::warn!(%error, "client of the device holder cut off");
        }
        self.leave(client);
    }

    fn enter(&self, process: Option<OwnedFd>) -> ClientId {
        let mut shelf = self.lock();
        shelf.last_client += 1;
        let client = ClientId(shelf.last_client);
        shelf.clients.insert(client, process);
        client
    }

    fn leave(&self, client: ClientId) {
        let mut shelf = self.lock();
        shelf.clients.remove(&client);
        for held in shelf.volumes.values_mut().filter(|held| held.owner == Some(client)) {
            held.owner = None;
        }
        drop(shelf);
        self.left.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().expect("nothing panics under this lock")
    }
}

fn open_process(pid: i32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

#[cfg(test)]
mod tests;
