//! What the holder does for one client, in a thread of that client's own.
//!
//! ```text
//! put:     unknown volume, or the client's own -> its
//! take:    nobody's -> its
//!          another's -> waits; after PATIENCE that process is killed; when its socket is closed -> its
//! update, release: only of its own
//! closed:  all of its are nobody's
//! ```

use super::message::{self, Kind, Message};
use super::{ClientId, Held, Holder, MAX_VOLUMES, PATIENCE};
use rustix::process::{Signal, pidfd_send_signal};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

/// A killed process that is not gone after this many times [`PATIENCE`] hangs in the kernel.
const KILL_PATIENCE: u32 = 15;

/// Answer a client until it leaves.
pub(super) fn serve(holder: &Holder, client: ClientId, stream: &UnixStream) -> io::Result<()> {
    while let Some(message) = message::receive(stream)? {
        let volume = message.volume.clone();
        match message.kind {
            Kind::Take => match holder.take(client, &volume) {
                Ok((fd, state)) => message::send(stream, Kind::Done, &volume, &state, Some(fd.as_fd()))?,
                Err(kind) => message::send(stream, kind, &volume, &[], None)?,
            },
            Kind::List => message::send(stream, Kind::Done, "", holder.list().join("\n").as_bytes(), None)?,
            Kind::Put | Kind::PutAgain => message::send(stream, holder.put(client, message), &volume, &[], None)?,
            Kind::Update => message::send(stream, holder.update(client, &volume, message.state), &volume, &[], None)?,
            Kind::Release => message::send(stream, holder.release(client, &volume), &volume, &[], None)?,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    Ok(())
}

impl Holder {
    fn put(&self, client: ClientId, message: Message) -> Kind {
        let Some(fd) = message.fd.map(Arc::new) else {
            return Kind::NotFound;
        };
        let mut shelf = self.lock();
        match shelf.volumes.get(&message.volume) {
            Some(held) if held.owner.is_none() && message.kind == Kind::PutAgain => {}
            Some(held) if held.owner != Some(client) => return Kind::Exists,
            None if shelf.volumes.len() >= MAX_VOLUMES => return Kind::Full,
            _ => {}
        }
        shelf.volumes.insert(message.volume, Held { fd, state: message.state, owner: Some(client) });
        Kind::Done
    }

    fn update(&self, client: ClientId, volume: &str, state: Vec<u8>) -> Kind {
        match self.lock().volumes.get_mut(volume) {
            None => Kind::NotFound,
            Some(held) if held.owner != Some(client) => Kind::NotYours,
            Some(held) => {
                held.state = state;
                Kind::Done
            }
        }
    }

    fn release(&self, client: ClientId, volume: &str) -> Kind {
        let mut shelf = self.lock();
        match shelf.volumes.get(volume) {
            None => Kind::NotFound,
            Some(held) if held.owner != Some(client) => Kind::NotYours,
            Some(_) => {
                shelf.volumes.remove(volume);
                Kind::Done
            }
        }
    }

    fn list(&self) -> Vec<String> {
        self.lock().volumes.keys().cloned().collect()
    }

    fn take(&self, client: ClientId, volume: &str) -> Result<(Arc<OwnedFd>, Vec<u8>), Kind> {
        let asked = Instant::now();
        let mut killed = false;
        let mut shelf = self.lock();
        loop {
            let held = shelf.volumes.get_mut(volume).ok_or(Kind::NotFound)?;
            let Some(owner) = held.owner.filter(|owner| *owner != client) else {
                held.owner = Some(client);
                return Ok((held.fd.clone(), held.state.clone()));
            };
            let waited = asked.elapsed();
            if waited >= PATIENCE && !killed {
                let process = shelf.clients.get(&owner).and_then(Option::as_ref).ok_or(Kind::Stuck)?;
                tracing::warn!(volume, "the process that has the device does not let go: killing it");
                pidfd_send_signal(process, Signal::KILL).map_err(|_| Kind::Stuck)?;
                killed = true;
            }
            let until = if killed { PATIENCE * KILL_PATIENCE } else { PATIENCE };
            if waited >= until {
                return Err(Kind::Stuck);
            }
            shelf = self.left.wait_timeout(shelf, until - waited).expect("nothing panics under this lock").0;
        }
    }
}
