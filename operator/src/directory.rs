//! A directory of files as the store: for use, tests and benches without Kubernetes.
//!
//! ```text
//! DIR/cluster            the cluster id
//! DIR/lease              the Lease's number (R6)
//! DIR/.lock              held exclusively for each read-compare-write
//! DIR/.serving           held by the one operator that serves
//! DIR/volumes/NAME.yaml  a Volume, spec and status; policies/ and servers/ alike
//! ```
//! Invariants: a file is replaced whole (written aside, flushed, renamed, the folder flushed) or not at all; it is read,
//! compared and replaced under one exclusive lock, so that two processes never both win (H18). The objects are those of
//! the Kubernetes API, with the same meaning. Changes by hand are seen at the next start; while an operator runs, people
//! go through its verbs.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use lamina_control_api::storage::ServerIdentity;
use lamina_crds::translate as maps;
use lamina_crds::{Id, ReplicationPolicy, StorageServer, Volume};
use lamina_protocol::ids::VolumeId;
use lamina_protocol::management::{Guard, Status, VolumeObject, Written};
use tokio::sync::{mpsc, watch};

use crate::index::Index;
use crate::store::{Change, Notice, Store, StoreError};
use crate::summary::{PolicyDescription, ServerDescription, VolumeDescription, write_conditions};
use crate::translate;
use files::{Files, Stored};

pub mod files;
mod replace;

pub use replace::Replacing;

/// Kept on a volume until nothing is left of it.
pub const FINALIZER: &str = "lamina.dev/volume";
/// Changes that may wait for the leader; whoever makes one more waits.
const QUEUE: usize = 1024;

/// The store; may be cloned.
#[derive(Clone)]
pub struct Directory(Arc<Inside>);

struct Inside {
    files: Files,
    index: Mutex<Index>,
    /// Orders what the leader hears as the files were changed.
    order: tokio::sync::Mutex<()>,
    changes: mpsc::Sender<Change>,
    /// Counts changes, for those who wait for one.
    version: watch::Sender<u64>,
}

/// What becomes of an object under the lock.
pub enum Verdict<R> {
    /// What now stands in place of it is written.
    Replace(R),
    /// It goes.
    Remove(R),
    /// It stays as it is.
    Keep(R),
}

impl Directory {
    /// Reads everything there is. What the leader is to hear comes out of the receiver, all objects first.
    ///
    /// # Errors
    /// [`StoreError`]: a file cannot be read or is no object.
    pub async fn open(path: impl Into<PathBuf>) -> Result<(Self, mpsc::Receiver<Change>), StoreError> {
        let files = Files::new(path.into());
        let loaded = files.clone();
        let (index, number) = blocking(move || load(&loaded)).await?;
        let (changes, heard) = mpsc::channel(QUEUE);
        let (version, _) = watch::channel(0);
        let inside = Inside { files, index: Mutex::new(index), order: Default::default(), changes, version };
        let this = Self(Arc::new(inside));
        tokio::spawn(this.clone().hand_in(number));
        Ok((this, heard))
    }

    async fn hand_in(self, lease_number: u64) {
        let _ordered = self.0.order.lock().await;
        let changes = {
            let index = self.index();
            let volumes =
                index.volumes().filter_map(|v| index.object(v)).map(|object| Change::Volume(Box::new(object)));
            let servers = index.servers().filter_map(|s| translate::known_server(s, "").ok()).map(Change::Server);
            servers.chain(volumes).collect::<Vec<_>>()
        };
        let numbers = [Change::LeaseNumber(lease_number.saturating_sub(1)), Change::LeaseNumber(lease_number)];
        self.say(numbers.into_iter().chain(changes).chain([Change::Listed])).await;
    }

    /// What exists, as of the last change. Not to be held over anything that waits.
    pub fn index(&self) -> MutexGuard<'_, Index> {
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts changes.
    pub fn version(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    async fn say(&self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            // Nobody listens any more when the operator stops.
            let _ = self.0.changes.send(change).await;
        }
        self.0.version.send_modify(|version| *version += 1);
    }

    /// Reads, compares and replaces an object in one atomic, durable step, and tells the leader. `decide` is handed what
    /// stands there now and leaves what shall stand there.
    ///
    /// # Errors
    /// [`StoreError`] of the files; then nothing was changed, or it is not known (after a failed flush).
    pub async fn change<K: Stored, R: Send + 'static>(
        &self,
        name: &str,
        decide: impl FnOnce(&mut Option<K>) -> Verdict<R> + Send + 'static,
    ) -> Result<R, StoreError> {
        let _ordered = self.0.order.lock().await;
        let (files, owned) = (self.0.files.clone(), name.to_owned());
        let (result, left) = blocking(move || change_file(&files, &owned, decide)).await?;
        let changes = {
            let mut index = self.index();
            match left {
                // Also when nothing was changed: what the file holds is believed, whoever wrote it.
                Some(object) if K::known(&index, name) == Some(&*object) => return Ok(result),
                None if K::known(&index, name).is_none() => return Ok(result),
                Some(object) => K::apply(&mut index, *object),
                None => K::delete(&mut index, name),
            }
        };
        self.say(changes).await;
        Ok(result)
    }

    /// As [`Directory::change`], for a volume by its id; `None` if there is none, or it is another one by now.
    async fn change_volume<R: Send + 'static>(
        &self,
        id: VolumeId,
        decide: impl FnOnce(&mut Volume) -> Verdict<R> + Send + 'static,
    ) -> Result<Option<R>, StoreError> {
        let name = self.index().volume_by_id(id).map(ResourceExt::name_any);
        let Some(name) = name else { return Ok(None) };
        let changed = self.change::<Volume, _>(&name, move |object| {
            match object.as_mut().filter(|object| translate::id_of(object) == Some(id)).map(decide) {
                None => Verdict::Keep(None),
                Some(Verdict::Keep(result)) => Verdict::Keep(Some(result)),
                Some(Verdict::Replace(result)) => Verdict::Replace(Some(result)),
                Some(Verdict::Remove(result)) => Verdict::Remove(Some(result)),
            }
        });
        changed.await
    }

    /// Counts the Lease's number up, above `above`, and tells the leader.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub async fn count_lease_up(&self, above: u64) -> Result<(), StoreError> {
        let files = self.0.files.clone();
        let number = blocking(move || files.count_lease_up(above)).await?;
        self.say([Change::LeaseNumber(number)]).await;
        Ok(())
    }
}

async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    tokio::task::spawn_blocking(work).await.expect("file work does not panic and is not aborted")
}

fn load(files: &Files) -> Result<(Index, u64), StoreError> {
    let lock = files.lock()?;
    let mut index = Index::default();
    for policy in files.all(&lock)? {
        index.apply_policy(policy);
    }
    for server in files.all(&lock)? {
        index.apply_server(server);
    }
    for volume in files.all(&lock)? {
        index.apply_volume(volume);
    }
    drop(lock);
    Ok((index, files.count_lease_up(0)?))
}

/// Gives what stands in the file afterwards, too.
fn change_file<K: Stored, R>(
    files: &Files,
    name: &str,
    decide: impl FnOnce(&mut Option<K>) -> Verdict<R>,
) -> Result<(R, Option<Box<K>>), StoreError> {
    let lock = files.lock()?;
    let before: Option<K> = files.read(&lock, name)?;
    let mut object = before.clone();
    match decide(&mut object) {
        Verdict::Keep(result) => Ok((result, before.map(Box::new))),
        Verdict::Replace(result) => {
            let object = object.expect("whoever replaces leaves what shall stand there");
            files.write(&lock, name, &object)?;
            Ok((result, Some(Box::new(object))))
        }
        Verdict::Remove(result) => {
            files.remove::<K>(&lock, name)?;
            Ok((result, None))
        }
    }
}

/// Whether the object still is the one that a write builds on.
fn builds_on(volume: &Volume, guard: &Guard) -> bool {
    let status = volume.status.as_ref().and_then(|status| maps::protocol_status(status).ok());
    status.is_some_and(|status| guard.holds(&status))
}

fn outcome(result: Result<Option<Written>, StoreError>) -> Written {
    match result {
        Ok(written) => written.unwrap_or(Written::Conflict),
        Err(why) => {
            tracing::error!(%why, "nobody knows whether the write stands");
            Written::Unknown
        }
    }
}

#[tonic::async_trait]
impl Store for Directory {
    async fn write(&self, volume: VolumeId, guard: &Guard, next: &Status) -> Written {
        let (guard, next) = (guard.clone(), next.clone());
        let result = self.change_volume(volume, move |object| {
            if !builds_on(object, &guard) {
                return Verdict::Keep(Written::Conflict);
            }
            maps::write_status(&next, object.status.get_or_insert_default());
            Verdict::Replace(Written::Done)
        });
        outcome(result.await)
    }

    async fn release(&self, volume: VolumeId, guard: &Guard) -> Written {
        let guard = guard.clone();
        let result = self.change_volume(volume, move |object| {
            if !builds_on(object, &guard) {
                return Verdict::Keep(Written::Conflict);
            }
            object.finalizers_mut().retain(|finalizer| finalizer != FINALIZER);
            let goes = object.metadata.deletion_timestamp.is_some() && object.finalizers().is_empty();
            if goes { Verdict::Remove(Written::Done) } else { Verdict::Replace(Written::Done) }
        });
        outcome(result.await)
    }

    async fn read(&self, volume: VolumeId) -> Result<Option<VolumeObject>, StoreError> {
        let found = self.change_volume(volume, |object| Verdict::Keep(object.clone())).await?;
        Ok(found.and_then(|found| self.index().object(&found)))
    }

    async fn raise_lease_number(&self, above: u64) {
        if let Err(why) = self.count_lease_up(above).await {
            tracing::error!(%why, "the Lease's number could not be raised");
        }
    }

    async fn describe_volume(&self, volume: VolumeId, description: &VolumeDescription) -> Result<(), StoreError> {
        let shape = {
            let index = self.index();
            let policy = index.volume_by_id(volume).and_then(|v| index.policy(&v.spec.policy));
            policy.and_then(|policy| translate::shape_of(policy).ok())
        };
        let description = description.clone();
        let done = self.change_volume(volume, move |object| {
            let observed = object.metadata.generation;
            let status = object.status.get_or_insert_default();
            let before = status.clone();
            description.write(status, observed);
            status.shape = status.shape.or(shape.filter(|_| description.placed));
            if *status == before { Verdict::Keep(()) } else { Verdict::Replace(()) }
        });
        done.await?.ok_or(StoreError::Gone)
    }

    async fn describe_server(&self, name: &str, description: &ServerDescription) -> Result<(), StoreError> {
        let description = description.clone();
        let done = self.change::<StorageServer, _>(name, move |object| {
            let Some(object) = object.as_mut() else { return Verdict::Keep(()) };
            let status = object.status.get_or_insert_default();
            let before = status.clone();
            status.state = Some(description.state);
            if before.state != status.state {
                status.last_transition = Some(Time(Timestamp::now()));
            }
            status.capacity_bytes = Some(i64::try_from(description.capacity_bytes).unwrap_or(i64::MAX));
            status.used_bytes = Some(i64::try_from(description.used_bytes).unwrap_or(i64::MAX));
            write_conditions(&description.conditions, &mut status.conditions, object.metadata.generation);
            status.provisioned_bytes = Some(i64::try_from(description.provisioned_bytes).unwrap_or(i64::MAX));
            status.copies = Some(description.copies);
            status.orphans.clone_from(&description.orphans);
            status.vetoes.clone_from(&description.vetoes);
            status.summary = Some(description.summary);
            if *status == before { Verdict::Keep(()) } else { Verdict::Replace(()) }
        });
        done.await
    }

    async fn describe_policy(&self, name: &str, description: &PolicyDescription) -> Result<(), StoreError> {
        let description = description.clone();
        let done = self.change::<ReplicationPolicy, _>(name, move |object| {
            let Some(object) = object.as_mut() else { return Verdict::Keep(()) };
            let status = object.status.get_or_insert_default();
            let before = status.clone();
            status.volumes = i64::try_from(description.volumes).ok();
            write_conditions(&description.conditions, &mut status.conditions, object.metadata.generation);
            if *status == before { Verdict::Keep(()) } else { Verdict::Replace(()) }
        });
        done.await
    }

    async fn tell(&self, _notice: &Notice) -> Result<(), StoreError> {
        // The runtime has logged it, and nobody else reads events here.
        Ok(())
    }

    fn meets_servers(&self) -> bool {
        true
    }

    async fn server_met(&self, name: &str, identity: &ServerIdentity) -> Result<(), StoreError> {
        let identity = identity.clone();
        let noted = self.change::<StorageServer, _>(name, move |object| {
            let Some(object) = object.as_mut() else { return Verdict::Keep(()) };
            let status = object.status.get_or_insert_default();
            let before = status.clone();
            if !identity.server.is_none() {
                status.server_id = Some(Id::of(identity.server.0));
            }
            status.cluster_id = Some(Id::of(identity.cluster.0));
            if !identity.addresses.is_empty() {
                status.addresses.get_or_insert_default().data.clone_from(&identity.addresses);
            }
            if *status == before { Verdict::Keep(()) } else { Verdict::Replace(()) }
        });
        noted.await
    }
}
