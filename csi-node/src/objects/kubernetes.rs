//! The `Volume` objects of a cluster.

use super::{Attachment, Followed, ObjectError, Seen, VolumeObjects, may_note};
use futures::StreamExt;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, ResourceExt};
use lamina_crds::id::Id;
use lamina_crds::translate::committed_map;
use lamina_crds::volume::{AttachmentWish, Filesystem, Volume};
use lamina_csi_api::name::VolumeHandle;
use lamina_protocol::ids::SessionId;
use lamina_protocol::map::VolumeMap;
use serde_json::json;
use std::time::Duration;
use tokio::sync::watch;

/// Who writes `status.filesystem`.
const FIELD_MANAGER: &str = "lamina-csi-node";
/// Between two tries to watch, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// The leader writes status too; a change that was overtaken so often in a row is given up.
const MAX_CONFLICTS: usize = 32;

/// The `Volume` objects of a cluster.
#[derive(Clone)]
pub struct KubeObjects {
    api: Api<Volume>,
}

impl KubeObjects {
    /// Those that this client sees.
    pub fn new(client: Client) -> Self {
        Self { api: Api::all(client) }
    }

    async fn object(&self, volume: VolumeHandle) -> Result<Option<Volume>, ObjectError> {
        let params = ListParams::default().fields(&selector(volume));
        Ok(self.api.list(&params).await.map_err(Box::new)?.items.pop())
    }
}

/// The handle decides, never a name.
fn selector(volume: VolumeHandle) -> String {
    format!("status.volumeId={volume}")
}

#[tonic::async_trait]
impl VolumeObjects for KubeObjects {
    async fn find(&self, volume: VolumeHandle) -> Result<Option<Seen>, ObjectError> {
        Ok(self.object(volume).await?.map(|object| seen(&object)))
    }

    fn follow(&self, volume: VolumeHandle) -> Followed {
        let (newest, maps) = watch::channel(None);
        let task = tokio::spawn(follow(self.api.clone(), volume, newest));
        Followed { maps, task: Some(task.abort_handle()) }
    }

    async fn note_filesystem(
        &self,
        volume: VolumeHandle,
        was: Option<&Filesystem>,
        now: Option<&Filesystem>,
    ) -> Result<(), ObjectError> {
        for _ in 0..MAX_CONFLICTS {
            let object = self.object(volume).await?.ok_or(ObjectError::Gone(volume))?;
            let noted = object.status.as_ref().and_then(|status| status.filesystem.as_ref());
            if noted == now {
                return Ok(());
            }
            if noted != was {
                return Err(ObjectError::Changed);
            }
            if !may_note(readable_map(&object).as_ref(), now) {
                return Err(ObjectError::NotListed);
            }
            // The resource version is the guard: what was read is what is replaced. A merge patch takes null for
            // "remove".
            let version = object.resource_version();
            let patch = json!({"metadata": {"resourceVersion": version}, "status": {"filesystem": now}});
            let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            match self.api.patch_status(&object.name_any(), &params, &Patch::Merge(&patch)).await {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(response)) if response.code == 409 => {}
                Err(error) => return Err(Box::new(error).into()),
            }
        }
        Err(ObjectError::Contended)
    }
}

fn seen(object: &Volume) -> Seen {
    let Some(status) = &object.status else { return Seen::default() };
    let ended = status.ended.iter().filter_map(|id| id.value().map(SessionId)).collect();
    let attachments = object.spec.attachments.iter().filter_map(attachment).collect();
    Seen { map: readable_map(object), filesystem: status.filesystem.clone(), ended, attachments }
}

fn attachment(wish: &AttachmentWish) -> Option<Attachment> {
    let replaced = wish.replaced.iter().filter_map(Id::value).collect();
    Some(Attachment { session: wish.session.value()?, replaced })
}

fn readable_map(object: &Volume) -> Option<VolumeMap> {
    let map = object.status.as_ref().map(committed_map)?;
    map.inspect_err(|error| tracing::error!(volume = object.name_any(), %error, "unreadable map: not used")).ok()?
}

/// Hand on every newer map until nobody listens. A watch that broke begins anew with a list: the API server may come back
/// with an older state (R6), whose changes a watch from a later version would not tell.
async fn follow(api: Api<Volume>, volume: VolumeHandle, newest: watch::Sender<Option<VolumeMap>>) {
    let config = watcher::Config::default().fields(&selector(volume));
    let from_a_list = || watcher(api.clone(), config.clone()).applied_objects().boxed();
    let (mut objects, mut pause) = (from_a_list(), PAUSES.0);
    loop {
        let object = match objects.next().await {
            Some(Ok(object)) => object,
            Some(Err(error)) => {
                tracing::warn!(%volume, %error, "watch of the Volume broke; it is begun anew");
                // sleep: back-off after the API server refused; it says nothing when it would not.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
                objects = from_a_list();
                continue;
            }
            None => return,
        };
        pause = PAUSES.0;
        let Some(map) = readable_map(&object) else { continue };
        newest.send_if_modified(|known| {
            let newer = known.as_ref().is_none_or(|known| map.generation > known.generation);
            if newer {
                *known = Some(map);
            }
            newer
        });
        if newest.is_closed() {
            return;
        }
    }
}
