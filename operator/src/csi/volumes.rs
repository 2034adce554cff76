//! `Volume` objects as the CSI controller sees them: found by handle, changed under their resource version, waited for.

use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::wait::{self, Condition};
use kube::{Client, ResourceExt};
use lamina_crds::condition::ConditionStatus;
use lamina_crds::volume::Volume;
use lamina_csi_api::name::VolumeHandle;
use serde_json::{Value, json};
use std::time::Duration;
use tonic::Status;

/// The field manager of wishes.
const FIELD_MANAGER: &str = "lamina-csi-controller";
/// A change that others overtook so often in a row is given back to the caller.
const MAX_CONFLICTS: usize = 16;

/// Access to `Volume` objects.
pub(super) struct Volumes {
    pub(super) client: Client,
    pub(super) api: Api<Volume>,
    pub(super) mint: fn() -> u128,
    patience: Duration,
}

/// Reads a handle where an unknown volume is as good as a deleted one: a malformed handle names none.
pub(super) fn handle_or_unknown(id: &str) -> Result<Option<VolumeHandle>, Status> {
    lamina_csi_api::fields::required("volume_id", id)?;
    Ok(id.parse().ok())
}

/// An answer of the API server as CSI says it: the caller tries again unless it was refused for good.
pub(super) fn from_kube(error: kube::Error) -> Status {
    match error {
        kube::Error::Api(response) if response.code == 404 => Status::not_found(response.message),
        kube::Error::Api(response) if response.code == 422 || response.code == 400 => {
            Status::invalid_argument(response.message)
        }
        kube::Error::Api(response) if response.code == 403 => Status::failed_precondition(response.message),
        other => Status::unavailable(format!("the API server did not answer: {other}")),
    }
}

impl Volumes {
    pub(super) fn new(client: Client, mint: fn() -> u128, patience: Duration) -> Self {
        Self { api: Api::all(client.clone()), client, mint, patience }
    }

    /// The volume with this id, wherever it is listed.
    pub(super) async fn find(&self, handle: VolumeHandle) -> Result<Option<Volume>, Status> {
        let params = ListParams::default().fields(&format!("status.volumeId={handle}"));
        let mut found = self.api.list(&params).await.map_err(from_kube)?.items;
        Ok(found.pop())
    }

    pub(super) async fn must_find(&self, handle: VolumeHandle) -> Result<Volume, Status> {
        let missing = || Status::not_found(format!("there is no volume {handle}"));
        self.find(handle).await?.ok_or_else(missing)
    }

    /// Changes the spec of a volume under its resource version, again and again until nobody comes in between. `change`
    /// gives the fields of `spec` to replace, or `None` when all is as wished.
    pub(super) async fn wish(
        &self,
        handle: VolumeHandle,
        change: impl Fn(&Volume) -> Result<Option<Value>, Status>,
    ) -> Result<Volume, Status> {
        for _ in 0..MAX_CONFLICTS {
            let volume = self.must_find(handle).await?;
            let Some(spec) = change(&volume)? else { return Ok(volume) };
            let patch = json!({"metadata": {"resourceVersion": volume.resource_version()}, "spec": spec});
            let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            match self.api.patch(&volume.name_any(), &params, &Patch::Merge(&patch)).await {
                Ok(volume) => return Ok(volume),
                Err(kube::Error::Api(response)) if response.code == 409 => {}
                Err(error) => return Err(from_kube(error)),
            }
        }
        Err(Status::aborted(format!("volume {handle} is being changed by others all the time, try again")))
    }

    /// Waits until a volume is as wished; `None` as its object means that it is gone. When patience is at its end the
    /// caller hears what the volume waits for and comes again.
    pub(super) async fn wait(
        &self,
        name: &str,
        what: &str,
        done: impl Fn(Option<&Volume>) -> bool,
    ) -> Result<Option<Volume>, Status> {
        let condition = Holds(done);
        match tokio::time::timeout(self.patience, wait::await_condition(self.api.clone(), name, condition)).await {
            Ok(Ok(volume)) => Ok(volume),
            Ok(Err(error)) => Err(Status::unavailable(format!("watching volume {name}: {error}"))),
            Err(_) => {
                let volume = self.api.get_opt(name).await.map_err(from_kube)?;
                let why = volume.as_ref().map(troubles).filter(|why| !why.is_empty());
                let why = why.unwrap_or_else(|| "is the operator running?".to_owned());
                Err(Status::deadline_exceeded(format!("{what} of volume {name} goes on: {why}")))
            }
        }
    }
}

struct Holds<F>(F);

impl<F: Fn(Option<&Volume>) -> bool> Condition<Volume> for Holds<F> {
    fn matches_object(&self, volume: Option<&Volume>) -> bool {
        (self.0)(volume)
    }
}

/// A condition of a volume, if it is there.
pub(super) fn condition<'a>(volume: &'a Volume, kind: &str) -> Option<&'a lamina_crds::Condition> {
    volume.status.as_ref()?.conditions.iter().find(|c| c.kind == kind)
}

/// What is wrong with a volume, in plain words; empty when nothing is.
pub(super) fn troubles(volume: &Volume) -> String {
    let bad = |kind: &&str| match *kind {
        "Deleting" | "Diverged" => ConditionStatus::True,
        _ => ConditionStatus::False,
    };
    let kinds = ["Diverged", "Deleting", "Placed", "Available", "Settled", "Healthy"];
    let said = kinds.iter().filter_map(|kind| condition(volume, kind).filter(|c| c.status == bad(kind)));
    said.map(|c| format!("{}: {}", c.reason, c.message)).collect::<Vec<_>>().join("; ")
}

/// Bytes of a volume as committed, or as wished before there is a map.
pub(super) fn size_of(volume: &Volume) -> u64 {
    let committed = volume.status.as_ref().and_then(|s| s.map.as_ref()).and_then(|map| u64::try_from(map.size).ok());
    committed.unwrap_or_else(|| volume.spec.size.bytes().unwrap_or(0))
}

/// The id, once it is minted.
pub(super) fn handle_of(volume: &Volume) -> Option<VolumeHandle> {
    volume.status.as_ref()?.volume_id.as_ref()?.value().map(VolumeHandle::new)
}
