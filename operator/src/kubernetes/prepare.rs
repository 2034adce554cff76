//! A new Volume gets its finalizer, its id, and a PersistentVolume if it asks for one.
//!
//! Invariants: an id is minted once, by a patch under the resource version that was read; a Volume applied again without
//! its status gets back the id that a PersistentVolume names for it, never a new, blank one. Every step may be done twice.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::{CSIPersistentVolumeSource, PersistentVolume, PersistentVolumeSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, Resource, ResourceExt};
use lamina_crds::volume::{AccessMode, Volume};
use lamina_crds::{Id, Size};
use lamina_csi_api::DRIVER_NAME;
use lamina_protocol::ids::VolumeId;
use serde_json::{Value, json};

use crate::directory::FINALIZER;
use crate::index::Index;
use crate::store::StoreError;

/// Annotation of a Volume: `"true"` = make a PersistentVolume of the same name, for a claim to bind by `volumeName`.
pub(super) const WANTS_PV: &str = "lamina.dev/persistent-volume";
/// Annotation beside it: filesystem of that PersistentVolume; ext4 if left out.
const FS_TYPE: &str = "lamina.dev/fs-type";
/// Annotation beside it: Filesystem (if left out) or Block.
const VOLUME_MODE: &str = "lamina.dev/volume-mode";
/// Annotation beside it: what becomes of the Volume when the claim is deleted, Retain (if left out) or Delete.
const RECLAIM: &str = "lamina.dev/reclaim-policy";
/// Annotation of a PersistentVolume: the uid of the Volume that it was made for.
const MADE_FOR: &str = "lamina.dev/made-for";
/// Kubernetes' annotation of a PersistentVolume with the driver that may delete it.
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// Field manager of what is done here.
const FIELD_MANAGER: &str = "lamina-leader-prepare";
/// Key in a PersistentVolume's volumeAttributes with the name of its Volume.
const VOLUME_ATTRIBUTE: &str = "volume";

/// What a PersistentVolume that was made for a Volume is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum WantedPv {
    /// None was asked for.
    None,
    /// As large as this.
    Sized(String),
    /// Gone, with its Volume.
    Gone,
}

/// What is wanted of the PersistentVolume now. It grows when the Volume has grown, never before.
pub(super) fn wanted_pv(volume: &Volume) -> WantedPv {
    let committed = volume.status.as_ref().and_then(|s| s.map.as_ref()).map_or(0, |map| map.size.unsigned_abs());
    let wished = volume.spec.size.bytes().unwrap_or(u64::MAX);
    match () {
        () if !wants_pv(volume) => WantedPv::None,
        () if volume.metadata.deletion_timestamp.is_some() => WantedPv::Gone,
        () if committed == 0 || committed >= wished => WantedPv::Sized(volume.spec.size.to_string()),
        () => WantedPv::Sized(Size::of_bytes(committed).to_string()),
    }
}

/// Whether a Volume still lacks something. `pv`: what was done about its PersistentVolume.
pub(super) fn lacks(volume: &Volume, pv: Option<&WantedPv>) -> bool {
    let status = volume.status.as_ref();
    let complete = status.is_some_and(|s| s.volume_id.is_some() && s.generation.is_some());
    let wanted = wanted_pv(volume);
    let pv_lacks = wanted != WantedPv::None && pv != Some(&wanted);
    if volume.metadata.deletion_timestamp.is_some() {
        return never_named(volume) || pv_lacks;
    }
    !complete || !has_finalizer(volume) || pv_lacks
}

/// Deleted between its finalizer and its id: there is nothing of it anywhere, and nobody else would let it go.
fn never_named(volume: &Volume) -> bool {
    has_finalizer(volume) && volume.status.as_ref().is_none_or(|status| status.volume_id.is_none())
}

fn has_finalizer(volume: &Volume) -> bool {
    volume.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

fn wants_pv(volume: &Volume) -> bool {
    volume.annotations().get(WANTS_PV).is_some_and(|value| value == "true")
}

/// Does the next step that a Volume lacks, and all after it; gives what was done about its PersistentVolume.
pub(super) async fn prepare(client: &Client, index: &Mutex<Index>, seen: &Volume) -> Result<WantedPv, StoreError> {
    let volumes: Api<Volume> = Api::all(client.clone());
    let name = &seen.name_any();
    let found = volumes.get_opt(name).await?.filter(|found| found.uid() == seen.uid());
    if found.as_ref().unwrap_or(seen).metadata.deletion_timestamp.is_some() && wants_pv(seen) {
        delete_pv(client, seen).await?;
    }
    let Some(mut volume) = found else { return Ok(wanted_pv(seen)) };
    if volume.metadata.deletion_timestamp.is_some() {
        if never_named(&volume) {
            patch_finalizers(&volumes, &volume, false).await?;
        }
        return Ok(wanted_pv(&volume));
    }
    if !has_finalizer(&volume) {
        volume = patch_finalizers(&volumes, &volume, true).await?;
    }
    let id = match crate::translate::id_of(&volume) {
        Some(id) => id,
        None => choose_id(client, index, name).await?,
    };
    if let Some(patch) = status_patch(&volume, id) {
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        volume = volumes.patch_status(name, &params, &json_patch(patch)).await?;
    }
    if wants_pv(&volume) {
        make_pv(client, &volume, id).await?;
    }
    Ok(wanted_pv(&volume))
}

fn json_patch(operations: Value) -> Patch<()> {
    Patch::Json(serde_json::from_value(operations).expect("operations of ours are a patch"))
}

fn unchanged(volume: &Volume) -> Value {
    json!({"op": "test", "path": "/metadata/resourceVersion", "value": volume.resource_version()})
}

async fn patch_finalizers(volumes: &Api<Volume>, volume: &Volume, ours: bool) -> Result<Volume, StoreError> {
    let others = volume.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).map(String::as_str);
    let finalizers: Vec<_> = others.chain(ours.then_some(FINALIZER)).collect();
    let patch = json!([unchanged(volume), {"op": "add", "path": "/metadata/finalizers", "value": finalizers}]);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    Ok(volumes.patch(&volume.name_any(), &params, &json_patch(patch)).await?)
}

/// The patch that gives a status what commits test and replace; `None` = all is there.
fn status_patch(volume: &Volume, id: VolumeId) -> Option<Value> {
    let put = |path: &str, value: Value| json!({"op": "add", "path": path, "value": value});
    let fields =
        [("volumeId", json!(Id::of(id.0))), ("generation", json!(0)), ("retired", json!([])), ("ended", json!([]))];
    let Some(status) = &volume.status else {
        let status: serde_json::Map<_, _> = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        return Some(json!([unchanged(volume), put("/status", Value::Object(status))]));
    };
    let there = [
        status.volume_id.is_some(),
        status.generation.is_some(),
        status.generation.is_some() || !status.retired.is_empty(),
        status.generation.is_some() || !status.ended.is_empty(),
    ];
    if there.iter().all(|there| *there) {
        return None;
    }
    let missing = fields.into_iter().zip(there).filter(|(_, there)| !there);
    let puts = missing.map(|((name, value), _)| put(&format!("/status/{name}"), value));
    Some(std::iter::once(unchanged(volume)).chain(puts).collect())
}

/// The id that a PersistentVolume names for this Volume, or a new one. Costs one list of PersistentVolumes per new Volume.
async fn choose_id(client: &Client, index: &Mutex<Index>, name: &str) -> Result<VolumeId, StoreError> {
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let mut handles = BTreeMap::new();
    for pv in volumes.list(&ListParams::default()).await?.items {
        if let Some((handle, pv)) = handle_for(&pv, name) {
            handles.insert(handle, pv);
        }
    }
    let lock = || index.lock().unwrap_or_else(PoisonError::into_inner);
    match handles.len() {
        0 => {
            let id = VolumeId(crate::mint());
            lock().minted(id);
            Ok(id)
        }
        1 => {
            let (id, pv) = handles.pop_first().expect("there is one");
            tracing::warn!(volume = name, pv, %id, "the Volume came back without its status: it gets its old id");
            Ok(id)
        }
        _ => {
            tracing::error!(volume = name, ?handles, "several PersistentVolumes name this Volume with different ids");
            Err(StoreError::Gone)
        }
    }
}

fn handle_for(pv: &PersistentVolume, volume: &str) -> Option<(VolumeId, String)> {
    let csi = pv.spec.as_ref()?.csi.as_ref().filter(|csi| csi.driver == DRIVER_NAME)?;
    let named = csi.volume_attributes.as_ref()?.get(VOLUME_ATTRIBUTE)?;
    (named == volume).then(|| Some((csi.volume_handle.parse().ok()?, pv.name_any())))?
}

/// Makes the PersistentVolume, or lets it grow.
async fn make_pv(client: &Client, volume: &Volume, id: VolumeId) -> Result<(), StoreError> {
    let api: Api<PersistentVolume> = Api::all(client.clone());
    let Some(found) = api.get_opt(&volume.name_any()).await? else {
        return match api.create(&PostParams::default(), &persistent_volume(volume, id)).await {
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            other => other.map(drop).map_err(StoreError::from),
        };
    };
    let WantedPv::Sized(size) = wanted_pv(volume) else { return Ok(()) };
    let bytes = |text: &str| text.parse::<Size>().ok().and_then(|size| size.bytes().ok()).unwrap_or(0);
    let had = found.spec.as_ref().and_then(|spec| spec.capacity.as_ref()?.get("storage").cloned());
    if !is_made_for(&found, volume) || bytes(&size) <= bytes(&had.map(|q| q.0).unwrap_or_default()) {
        return Ok(());
    }
    let patch = json!({
        "metadata": {"resourceVersion": found.resource_version()}, "spec": {"capacity": {"storage": size}},
    });
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    Ok(api.patch(&volume.name_any(), &params, &Patch::Merge(patch)).await.map(drop)?)
}

/// The PersistentVolume goes with the Volume whose data it named. One that a claim is still bound to goes with that claim
/// (Kubernetes' own protection).
async fn delete_pv(client: &Client, volume: &Volume) -> Result<(), StoreError> {
    let api: Api<PersistentVolume> = Api::all(client.clone());
    let Some(found) = api.get_opt(&volume.name_any()).await?.filter(|pv| is_made_for(pv, volume)) else {
        return Ok(());
    };
    let preconditions = Preconditions { resource_version: None, uid: found.uid() };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match api.delete(&volume.name_any(), &params).await {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => other.map(drop).map_err(StoreError::from),
    }
}

/// People's own PersistentVolumes, and those of an earlier Volume of that name, are left alone.
fn is_made_for(pv: &PersistentVolume, volume: &Volume) -> bool {
    pv.annotations().get(MADE_FOR).is_some_and(|uid| Some(uid) == volume.meta().uid.as_ref())
}

fn persistent_volume(volume: &Volume, id: VolumeId) -> PersistentVolume {
    let name = volume.name_any();
    let annotation = |key: &str| volume.annotations().get(key).cloned();
    let block = annotation(VOLUME_MODE).is_some_and(|mode| mode == "Block");
    let mode = match volume.spec.access_mode {
        AccessMode::ReadWriteOnce => "ReadWriteOnce",
        AccessMode::ReadOnlyMany => "ReadOnlyMany",
        AccessMode::ReadWriteMany => "ReadWriteMany",
    };
    let reclaim = annotation(RECLAIM).filter(|policy| policy == "Delete").unwrap_or_else(|| "Retain".to_owned());
    let mut annotations = BTreeMap::from([(MADE_FOR.to_owned(), volume.meta().uid.clone().unwrap_or_default())]);
    if reclaim == "Delete" {
        // With it the external provisioner deletes the volume when its claim is gone, as one that it made itself.
        annotations.insert(PROVISIONED_BY.to_owned(), DRIVER_NAME.to_owned());
    }
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            labels: Some([("app.kubernetes.io/managed-by".to_owned(), "lamina".to_owned())].into()),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            access_modes: Some(vec![mode.to_owned()]),
            capacity: Some([("storage".to_owned(), Quantity(volume.spec.size.to_string()))].into()),
            csi: Some(CSIPersistentVolumeSource {
                driver: DRIVER_NAME.to_owned(),
                volume_handle: id.to_string(),
                fs_type: (!block).then(|| annotation(FS_TYPE).unwrap_or_else(|| "ext4".to_owned())),
                volume_attributes: Some([(VOLUME_ATTRIBUTE.to_owned(), name)].into()),
                ..CSIPersistentVolumeSource::default()
            }),
            persistent_volume_reclaim_policy: Some(reclaim),
            storage_class_name: Some(String::new()),
            volume_mode: Some(if block { "Block" } else { "Filesystem" }.to_owned()),
            ..PersistentVolumeSpec::default()
        }),
        ..PersistentVolume::default()
    }
}
