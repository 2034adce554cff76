//! The volumes of this node: opened, attached, mounted, published, and all of it undone.
//!
//! ```text
//!            attach                mount / nothing           bind
//! (nothing) --------> open volume ----------------> staged -------> published
//!     ^                 | detach  <---------------- unmount <------ unbind
//!     +-----------------+
//! ```
//! Invariants: what is begun is noted durably first ([`Record`]), so a successor finds it; every step may be repeated
//! and then only completes what is missing; nothing is mounted, unmounted or removed that is not this volume's own; a
//! device's first request comes after its driver serves, and a driver ends after its device has gone. One call at a
//! time changes a volume: callers hold its place in [`lamina_csi_api::in_flight::InFlight`].

use crate::device::Device;
use crate::host::Host;
use crate::objects::{Followed, VolumeObjects};
use crate::opener::{OpenVolume, Opener};
use crate::record::{Record, Records};
use crate::sessions::Sessions;
use lamina_csi_api::name::VolumeHandle;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

mod attach;
mod error;
mod filesystem;
mod look;
mod publish;
mod recover;
mod stage;
#[cfg(test)]
mod tests;

pub use error::NodeError;
pub use look::Health;
pub use publish::PublishWish;
pub use stage::StageWish;

/// How long things may take before the caller is told to come again. The kubelet's own limit is two minutes.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until a map lists the session.
    pub map: Duration,
    /// Until the storage servers serve.
    pub serving: Duration,
    /// Until a grown volume shows its size.
    pub growth: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { map: Duration::from_secs(30), serving: Duration::from_secs(60), growth: Duration::from_secs(30) }
    }
}

/// What a node works with.
pub struct Parts {
    /// Maps and the note of the filesystem.
    pub objects: Arc<dyn VolumeObjects>,
    /// Drivers.
    pub opener: Arc<dyn Opener>,
    /// New sessions for attachments.
    pub sessions: Arc<dyn Sessions>,
    /// The machine.
    pub host: Arc<dyn Host>,
    /// What a successor must know.
    pub records: Records,
    /// Ends the process without another word to the kernel (PROTOCOL.md R10).
    pub exit: Arc<dyn Fn() + Send + Sync>,
    /// Limits.
    pub patience: Patience,
}

/// A volume that is served here.
#[derive(Clone)]
struct Open {
    // In this order: the process lets go of the driver before the driver ends.
    _leash: Arc<attach::Leash>,
    driver: Arc<dyn OpenVolume>,
    device: Option<Arc<dyn Device>>,
    _followed: Arc<Followed>,
}

/// What is known of a volume here.
#[derive(Clone)]
struct Entry {
    record: Record,
    /// `None`: nobody serves it (any more).
    open: Option<Open>,
}

/// The volumes of this node.
pub struct Node {
    parts: Parts,
    entries: Mutex<BTreeMap<VolumeHandle, Entry>>,
}

impl Node {
    /// None yet; [`Self::recover`] finds those that were here before.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self { parts, entries: Mutex::default() })
    }

    /// The volumes served here with their drivers, for whoever counts.
    pub fn drivers(&self) -> Vec<(VolumeHandle, Arc<dyn OpenVolume>)> {
        let entries = self.lock();
        let open = entries.iter().filter_map(|(volume, entry)| Some((*volume, entry.open.as_ref()?.driver.clone())));
        open.collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeHandle, Entry>> {
        self.entries.lock().expect("nothing panics under this lock")
    }

    fn entry(&self, volume: VolumeHandle) -> Option<Entry> {
        self.lock().get(&volume).cloned()
    }

    /// Durable first, then known.
    async fn keep(&self, volume: VolumeHandle, entry: Entry) -> Result<(), NodeError> {
        let (records, record) = (self.parts.records.clone(), entry.record.clone());
        blocking(move || records.write(volume, &record)).await?;
        self.lock().insert(volume, entry);
        Ok(())
    }

    fn host(&self) -> Arc<dyn Host> {
        self.parts.host.clone()
    }
}

/// Run what blocks where it may.
async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, NodeError>
where
    T: Send + 'static,
    E: Send + 'static,
    NodeError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(NodeError::ShuttingDown),
        },
    }
}
