//! The [`Store`] over the API server.
//!
//! Invariants: what the protocol decides by is written by guarded JSON patches alone ([`commit`](super::commit)); what is
//! for people is applied under one field manager, so that nobody undoes another's word; no call is made under a lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource, ResourceExt};
use lamina_control_api::storage::ServerIdentity;
use lamina_crds::replication_policy::ReplicationPolicyStatus;
use lamina_crds::storage_server::StorageServerStatus;
use lamina_crds::translate as maps;
use lamina_crds::volume::VolumeStatus;
use lamina_crds::{ReplicationPolicy, StorageServer, Volume};
use lamina_protocol::ids::VolumeId;
use lamina_protocol::management::{self, Guard, Status, VolumeObject, Written};
use serde_json::json;
use tokio::sync::watch;

use super::{Replica, commit};
use crate::directory::FINALIZER;
use crate::index::Index;
use crate::store::{Notice, Store, StoreError};
use crate::summary::{PolicyDescription, ServerDescription, VolumeDescription, write_conditions};
use crate::{pv, translate};

/// Field manager of commits.
const COMMITS: &str = "lamina-leader-commit";
/// Field manager of what is for people.
const DESCRIBES: &str = "lamina-leader";
/// Longest note of an event, bytes.
const NOTE: usize = 1000;

/// The store.
pub(super) struct Objects {
    client: Client,
    volumes: Api<Volume>,
    servers: Api<StorageServer>,
    policies: Api<ReplicationPolicy>,
    index: Arc<Mutex<Index>>,
    recorder: Recorder,
    raise: watch::Sender<u64>,
}

impl Objects {
    /// With the index that the watch fills.
    pub(super) fn new(client: Client, replica: &Replica, raise: watch::Sender<u64>) -> (Self, Arc<Mutex<Index>>) {
        let index = Arc::new(Mutex::new(Index::default()));
        let reporter = Reporter { controller: "lamina-operator".to_owned(), instance: Some(replica.name.clone()) };
        let store = Self {
            client: client.clone(),
            volumes: Api::all(client.clone()),
            servers: Api::all(client.clone()),
            policies: Api::all(client.clone()),
            index: Arc::clone(&index),
            recorder: Recorder::new(client, reporter),
            raise,
        };
        (store, index)
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cached(&self, id: VolumeId) -> Option<Volume> {
        self.index().volume_by_id(id).cloned()
    }

    /// Of a volume that cannot be deleted because it is in use, the description names the PersistentVolume too.
    async fn with_pv(&self, volume: VolumeId, description: &VolumeDescription) -> VolumeDescription {
        let mut named = description.clone();
        let in_use = |c: &&mut management::Condition| c.reason == management::Reason::InUse;
        if let Some(condition) = named.conditions.iter_mut().find(in_use) {
            let text = pv::named(&self.client, volume, &condition.text).await;
            let message = &mut named.summary.message;
            if message.as_ref() == Some(&condition.text) {
                *message = Some(text.clone());
            }
            condition.text = text;
        }
        named
    }

    /// The guard's tests fail, too, on a status in which somebody else left a list out (a restored backup, say). Puts the
    /// lists there; `false` = that is not it, or it could not be done.
    async fn filled_gaps(&self, name: &str, id: VolumeId, guard: &Guard) -> bool {
        let Ok(Some(found)) = self.volumes.get_opt(name).await else { return false };
        let Some(status) = found.status.as_ref().filter(|_| translate::id_of(&found) == Some(id)) else { return false };
        if !maps::protocol_status(status).is_ok_and(|status| guard.holds(&status)) {
            return false;
        }
        let put = |path: &str, value: serde_json::Value| json!({"op": "add", "path": path, "value": value});
        let patch = json!([
            {"op": "test", "path": "/metadata/resourceVersion", "value": found.resource_version()},
            put("/status/generation", json!(status.generation.unwrap_or(0))),
            put("/status/retired", json!(status.retired)),
            put("/status/ended", json!(status.ended)),
        ]);
        self.volumes.patch_status(name, &manager(), &json_patch(patch)).await.is_ok()
    }

    async fn try_release(&self, id: VolumeId, guard: &Guard) -> Result<Written, kube::Error> {
        let Some(name) = self.cached(id).map(|v| v.name_any()) else { return Ok(Written::Conflict) };
        let Some(volume) = self.volumes.get_opt(&name).await? else { return Ok(Written::Done) };
        let Some(place) = volume.finalizers().iter().position(|f| f == FINALIZER) else { return Ok(Written::Done) };
        let path = format!("/metadata/finalizers/{place}");
        let mut operations = commit::tests(id, guard);
        operations.push(json!({"op": "test", "path": path, "value": FINALIZER}));
        operations.push(json!({"op": "remove", "path": path}));
        self.volumes.patch(&name, &manager(), &json_patch(operations.into())).await.map(|_| Written::Done)
    }
}

fn manager() -> PatchParams {
    PatchParams { field_manager: Some(COMMITS.to_owned()), ..PatchParams::default() }
}

fn json_patch(operations: serde_json::Value) -> Patch<()> {
    Patch::Json(serde_json::from_value(operations).expect("operations of ours are a patch"))
}

/// What became of a guarded patch. A test that fails is answered 422 without causes; a schema or CEL rule that refuses
/// the result names its causes, and trying again at once would change nothing.
fn outcome(name: &str, result: Result<Written, kube::Error>) -> Written {
    match result {
        Ok(written) => written,
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Written::Conflict,
        Err(kube::Error::Api(status)) if status.code == 422 => {
            if status.details.as_ref().is_some_and(|details| !details.causes.is_empty()) {
                tracing::error!(volume = name, why = status.message, "the API server refuses the status");
                return Written::Unknown;
            }
            tracing::debug!(volume = name, why = status.message, "the guard does not hold");
            Written::Conflict
        }
        Err(why) => {
            tracing::warn!(volume = name, %why, "nobody knows whether the write stands");
            Written::Unknown
        }
    }
}

fn applied(result: Result<(), kube::Error>) -> Result<(), StoreError> {
    match result {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Err(StoreError::Gone),
        other => other.map_err(StoreError::from),
    }
}

#[tonic::async_trait]
impl Store for Objects {
    async fn write(&self, volume: VolumeId, guard: &Guard, next: &Status) -> Written {
        let Some(name) = self.cached(volume).map(|v| v.name_any()) else { return Written::Conflict };
        let patch = json_patch(commit::operations(volume, guard, next));
        let write = async || {
            let written = self.volumes.patch_status(&name, &manager(), &patch).await;
            outcome(&name, written.map(|_| Written::Done))
        };
        match write().await {
            Written::Conflict if self.filled_gaps(&name, volume, guard).await => write().await,
            written => written,
        }
    }

    async fn release(&self, volume: VolumeId, guard: &Guard) -> Written {
        outcome(&volume.to_string(), self.try_release(volume, guard).await)
    }

    async fn read(&self, volume: VolumeId) -> Result<Option<VolumeObject>, StoreError> {
        let Some(name) = self.cached(volume).map(|v| v.name_any()) else { return Ok(None) };
        let found = self.volumes.get_opt(&name).await?.filter(|found| translate::id_of(found) == Some(volume));
        Ok(found.and_then(|found| self.index().object(&found)))
    }

    async fn raise_lease_number(&self, above: u64) {
        self.raise.send_replace(above);
    }

    async fn describe_volume(&self, volume: VolumeId, description: &VolumeDescription) -> Result<(), StoreError> {
        let Some(cached) = self.cached(volume) else { return Err(StoreError::Gone) };
        let description = &self.with_pv(volume, description).await;
        let before = cached.status.clone().unwrap_or_default();
        let shape = {
            let index = self.index();
            let policy = index.policy(&cached.spec.policy).filter(|_| description.placed);
            policy.and_then(|policy| translate::shape_of(policy).ok())
        };
        let mut status =
            VolumeStatus { shape: before.shape.or(shape), conditions: before.conditions, ..VolumeStatus::default() };
        description.write(&mut status, cached.metadata.generation);
        let object = json!({
            "apiVersion": Volume::api_version(&()), "kind": Volume::kind(&()),
            "metadata": {"name": cached.name_any(), "uid": cached.metadata.uid}, "status": status,
        });
        let params = PatchParams::apply(DESCRIBES).force();
        applied(self.volumes.patch_status(&cached.name_any(), &params, &Patch::Apply(object)).await.map(drop))
    }

    async fn describe_server(&self, name: &str, description: &ServerDescription) -> Result<(), StoreError> {
        let cached = self.index().server(name).cloned();
        let Some(cached) = cached else { return Err(StoreError::Gone) };
        let object = json!({
            "apiVersion": StorageServer::api_version(&()), "kind": StorageServer::kind(&()),
            "metadata": {"name": name, "uid": cached.metadata.uid}, "status": server_status(&cached, description),
        });
        let params = PatchParams::apply(DESCRIBES).force();
        applied(self.servers.patch_status(name, &params, &Patch::Apply(object)).await.map(drop))
    }

    async fn describe_policy(&self, name: &str, description: &PolicyDescription) -> Result<(), StoreError> {
        let cached = self.index().policy(name).cloned();
        let Some(cached) = cached else { return Err(StoreError::Gone) };
        let observed = cached.metadata.generation;
        let mut conditions = cached.status.clone().unwrap_or_default().conditions;
        write_conditions(&description.conditions, &mut conditions, observed);
        let volumes = i64::try_from(description.volumes).ok();
        let status = ReplicationPolicyStatus { volumes, observed_generation: observed, conditions };
        let object = json!({
            "apiVersion": ReplicationPolicy::api_version(&()), "kind": ReplicationPolicy::kind(&()),
            "metadata": {"name": name, "uid": cached.metadata.uid}, "status": status,
        });
        let params = PatchParams::apply(DESCRIBES).force();
        applied(self.policies.patch_status(name, &params, &Patch::Apply(object)).await.map(drop))
    }

    async fn tell(&self, notice: &Notice) -> Result<(), StoreError> {
        let (volume, server) = {
            let index = self.index();
            let volume = notice.volume.as_deref().and_then(|name| Some(index.volume(name)?.object_ref(&())));
            let server = notice.server.as_deref().and_then(|name| Some(index.server(name)?.object_ref(&())));
            (volume, server)
        };
        let (Some(about), second) = first_of(volume, server) else { return Ok(()) };
        let event = Event {
            type_: if notice.warning { EventType::Warning } else { EventType::Normal },
            reason: notice.reason.clone(),
            note: Some(notice.text.chars().take(NOTE).collect()),
            action: notice.reason.clone(),
            secondary: second,
        };
        Ok(self.recorder.publish(&event, &about).await?)
    }

    fn meets_servers(&self) -> bool {
        false
    }

    async fn server_met(&self, _name: &str, _identity: &ServerIdentity) -> Result<(), StoreError> {
        Ok(())
    }
}

fn first_of(
    volume: Option<ObjectReference>,
    server: Option<ObjectReference>,
) -> (Option<ObjectReference>, Option<ObjectReference>) {
    if volume.is_some() { (volume, server) } else { (server, None) }
}

/// The leader's part of a server's status; ids, addresses, devices and space are the server's own.
fn server_status(cached: &StorageServer, description: &ServerDescription) -> StorageServerStatus {
    let before = cached.status.clone().unwrap_or_default();
    let now = || Time(Timestamp::now());
    let same = before.state == Some(description.state);
    let mut conditions = before.conditions;
    write_conditions(&description.conditions, &mut conditions, cached.metadata.generation);
    StorageServerStatus {
        state: Some(description.state),
        last_transition: before.last_transition.filter(|_| same).or_else(|| Some(now())),
        provisioned_bytes: i64::try_from(description.provisioned_bytes).ok(),
        copies: Some(description.copies),
        orphans: description.orphans.clone(),
        vetoes: description.vetoes.clone(),
        summary: Some(description.summary.clone()),
        conditions,
        ..StorageServerStatus::default()
    }
}
