//! csi-node's side of the device holder.
//!
//! One connection per process, open as long as the process serves devices: its end is what tells the holder that the
//! devices may go to another. A thread watches for the holder's own end (an upgrade of it, by hand): then everything
//! that was put or taken is put again.

use super::message::{self, Kind, Message};
use rustix::event::{PollFd, PollFlags};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

/// Between two attempts to reach a holder that went away: no event tells when its socket is there again.
const RECONNECT: Duration = Duration::from_secs(1);

/// Why the holder did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The holder cannot be reached, or the connection broke; everything is put again when it can be.
    #[error("device holder cannot be reached: {0}")]
    Unreachable(#[from] io::Error),
    /// Another process put this volume, or put it before this one started: take it instead.
    #[error("device holder has a device of this volume already")]
    Exists,
    /// Not this process's to change.
    #[error("device of this volume belongs to another process")]
    NotYours,
    /// More volumes than any node attaches.
    #[error("device holder is full")]
    Full,
    /// The process that has the device neither lets go nor can be ended.
    #[error("the process that serves this device does not let go of it")]
    Stuck,
}

/// A device that came from the holder.
#[derive(Debug)]
pub struct Taken {
    /// The kernel's descriptor.
    pub fd: Arc<OwnedFd>,
    /// What the process that had it last said about it.
    pub state: Vec<u8>,
}

#[derive(Default)]
struct Connection {
    stream: Option<Arc<UnixStream>>,
    /// What this process serves, to put it again at a new holder.
    kept: BTreeMap<String, (Arc<OwnedFd>, Vec<u8>)>,
}

struct Shared {
    path: PathBuf,
    connection: Mutex<Connection>,
}

/// A connection to the holder. Its methods block for as long as the holder takes, [`Self::take`] for seconds.
#[derive(Clone)]
pub struct HolderClient {
    shared: Arc<Shared>,
}

impl HolderClient {
    /// Connect to the holder's socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, HolderError> {
        let stream = Arc::new(UnixStream::connect(path)?);
        let connection = Mutex::new(Connection { stream: Some(stream.clone()), kept: BTreeMap::new() });
        let shared = Arc::new(Shared { path: path.to_owned(), connection });
        let watched = Arc::downgrade(&shared);
        std::thread::Builder::new().name("holder-watch".into()).spawn(move || watch(&watched, stream))?;
        Ok(Self { shared })
    }

    /// Give the holder the descriptor of `volume`, with a state of at most some KiB for the successor.
    pub fn put(&self, volume: &str, fd: Arc<OwnedFd>, state: Vec<u8>) -> Result<(), HolderError> {
        let mut connection = self.shared.lock();
        connection.ask(Kind::Put, volume, &state, Some(&fd))?;
        connection.kept.insert(volume.to_owned(), (fd, state));
        Ok(())
    }

    /// Replace the state of a volume that this process put or took.
    pub fn update(&self, volume: &str, state: Vec<u8>) -> Result<(), HolderError> {
        let mut connection = self.shared.lock();
        let answer = connection.ask(Kind::Update, volume, &state, None);
        if let Some(kept) = connection.kept.get_mut(volume) {
            kept.1 = state;
        }
        answer.map(drop)
    }

    /// The descriptor and state of `volume`, when its last owner is gone; that one is killed if it does not leave.
    /// `None`: the holder has nothing of this volume.
    pub fn take(&self, volume: &str) -> Result<Option<Taken>, HolderError> {
        let mut connection = self.shared.lock();
        let Some(Message { state, fd: Some(fd), .. }) = connection.ask(Kind::Take, volume, &[], None)? else {
            return Ok(None);
        };
        let fd = Arc::new(fd);
        connection.kept.insert(volume.to_owned(), (fd.clone(), state.clone()));
        Ok(Some(Taken { fd, state }))
    }

    /// The device of `volume` is no more: let go of the descriptor.
    pub fn release(&self, volume: &str) -> Result<(), HolderError> {
        let mut connection = self.shared.lock();
        connection.kept.remove(volume);
        connection.ask(Kind::Release, volume, &[], None).map(drop)
    }

    /// The volumes whose devices are held, whoever serves them.
    pub fn list(&self) -> Result<Vec<String>, HolderError> {
        let answer = self.shared.lock().ask(Kind::List, "", &[], None)?;
        let text = answer.map(|message| String::from_utf8_lossy(&message.state).into_owned()).unwrap_or_default();
        Ok(text.lines().map(str::to_owned).collect())
    }
}

#[cfg(test)]
impl HolderClient {
    /// What the end of the holder's process does to this side.
    pub(super) fn lose_connection(&self) {
        let connection = self.shared.lock();
        let stream = connection.stream.as_ref().expect("was connected");
        stream.shutdown(std::net::Shutdown::Both).expect("is a socket");
    }
}

impl Connection {
    /// `None` if the holder does not know the volume.
    fn ask(
        &mut self,
        kind: Kind,
        volume: &str,
        state: &[u8],
        fd: Option<&OwnedFd>,
    ) -> Result<Option<Message>, HolderError> {
        let stream = self.stream.clone().ok_or(io::ErrorKind::NotConnected).map_err(io::Error::from)?;
        let asked = message::send(&stream, kind, volume, state, fd.map(AsFd::as_fd));
        let answer = asked
            .and_then(|()| message::receive(&stream))
            .and_then(|answer| answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()));
        let answer = answer.inspect_err(|_| {
            // Half a frame may be on its way: nothing on this connection can be trusted. The watcher makes a new one.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            self.stream = None;
        })?;
        match answer.kind {
            Kind::NotFound => Ok(None),
            Kind::Exists => Err(HolderError::Exists),
            Kind::NotYours => Err(HolderError::NotYours),
            Kind::Full => Err(HolderError::Full),
            Kind::Stuck => Err(HolderError::Stuck),
            _ => Ok(Some(answer)),
        }
    }
}

impl Shared {
    // Requests to the holder are short and must not mix on the one stream, so this lock is held across them; the data
    // path never comes here.
    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().expect("nothing panics under this lock")
    }

    /// A new connection with everything put again.
    fn reconnect(&self) -> io::Result<Arc<UnixStream>> {
        let stream = Arc::new(UnixStream::connect(&self.path)?);
        let mut connection = self.lock();
        connection.stream = Some(stream.clone());
        let kept: Vec<_> =
            connection.kept.iter().map(|(volume, (fd, state))| (volume.clone(), fd.clone(), state.clone())).collect();
        for (volume, fd, state) in kept {
            match connection.ask(Kind::PutAgain, &volume, &state, Some(&fd)) {
                Ok(_) => {}
                Err(HolderError::Unreachable(error)) => return Err(error),
                Err(error) => tracing::error!(volume, %error, "device holder does not take a device again"),
            }
        }
        Ok(stream)
    }
}

/// Wait for the connection to end and make a new one, until the client is dropped.
fn watch(shared: &Weak<Shared>, mut stream: Arc<UnixStream>) {
    loop {
        let mut ends = [PollFd::new(&stream, PollFlags::RDHUP)];
        if rustix::event::poll(&mut ends, None).is_err() {
            continue;
        }
        loop {
            let Some(shared) = shared.upgrade() else {
                return;
            };
            match shared.reconnect() {
                Ok(again) => {
                    stream = again;
                    break;
                }
                Err(error) => tracing::warn!(%error, "device holder is away: a crash now would cost the devices"),
            }
            drop(shared);
            // sleep: back-off until the holder's socket is there again, on a thread of its own.
            std::thread::sleep(RECONNECT);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let connection = self.connection.get_mut().expect("nothing panics under this lock");
        if let Some(stream) = connection.stream.take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
