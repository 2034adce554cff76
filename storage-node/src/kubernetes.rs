//! This node's `StorageServer` object: made without devices, watched for `spec.devices`, told how the devices are.
//!
//! Invariants: no disk is touched before somebody named it in `spec.devices`; only the fields of this program are written
//! (server-side apply under its own field manager), on transitions, and the space at steps of 1 % or after 60 s; a status
//! that could not be written is written again after a pause. Nothing of block requests waits for the API server.

use crate::args::DeviceSpec;
use crate::devices::DeviceView;
use crate::health::Asker;
use crate::serve::{Listed, ServeError};
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use lamina_crds::{StorageServer, StorageServerSpec};
use lamina_protocol::ids::{ClusterId, ServerId};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

mod shown;

/// Under this name the fields of this program are kept.
const FIELD_MANAGER: &str = "lamina-storage-node";
/// Label of a Node with its zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// How often the space is looked at (in this process; written far less often).
const LOOK: Duration = Duration::from_secs(5);
/// After the API server did not take something.
const PAUSE: Duration = Duration::from_secs(2);

/// What this program writes into its object.
pub(crate) struct Own {
    /// Name of the node, and of the object.
    pub(crate) node: String,
    /// The installation.
    pub(crate) cluster: ClusterId,
    /// Where block connections come in.
    pub(crate) data: Vec<String>,
    /// Where leaders come in.
    pub(crate) control: Vec<String>,
}

/// Begins to watch and to tell, on the present runtime.
pub(crate) async fn start(
    own: Own,
    listed: mpsc::Sender<Listed>,
    asker: Asker,
    views: watch::Receiver<Vec<DeviceView>>,
) -> Result<(), ServeError> {
    let client = Client::try_default().await.map_err(|why| ServeError::Kubernetes(Box::new(why)))?;
    let objects: Api<StorageServer> = Api::all(client.clone());
    let (there, is_there) = watch::channel(None);
    let made = Made { objects: objects.clone(), nodes: Api::all(client), node: own.node.clone() };
    tokio::spawn(follow(made, own.cluster, listed, there));
    tokio::spawn(tell(objects, own, asker, views, is_there));
    Ok(())
}

/// Makes the object when it is not there, and hands each change of its devices on. Ends with the server.
async fn follow(made: Made, cluster: ClusterId, listed: mpsc::Sender<Listed>, there: watch::Sender<Option<i64>>) {
    made.create().await;
    let config = watcher::Config::default().fields(&format!("metadata.name={}", made.node));
    let from_a_list = || Box::pin(watcher(made.objects.clone(), config.clone()));
    let mut events = from_a_list();
    let mut last = None;
    loop {
        let object = match events.try_next().await {
            Ok(Some(watcher::Event::Apply(object) | watcher::Event::InitApply(object))) => object,
            Ok(Some(watcher::Event::Delete(_))) => {
                // The devices are used on: what lies there is not forgotten with an object.
                made.create().await;
                continue;
            }
            Ok(Some(_)) => continue,
            Ok(None) => return,
            Err(why) => {
                tracing::warn!("cannot watch the StorageServer object: {why}");
                // sleep: back-off after the API server refused.
                tokio::time::sleep(PAUSE).await;
                // It may come back with an older state (R6), whose changes a watch from a later version would not tell.
                events = from_a_list();
                continue;
            }
        };
        there.send_replace(object.metadata.generation);
        let devices = specs(&object);
        if last.as_ref() != Some(&devices) {
            last = Some(devices.clone());
            let listed_now = Listed { server: known_id(&object, cluster), devices, unlisted: unlisted(&object) };
            if listed.send(listed_now).await.is_err() {
                return;
            }
        }
    }
}

/// Makes the object.
struct Made {
    objects: Api<StorageServer>,
    nodes: Api<Node>,
    node: String,
}

impl Made {
    /// Without devices; its failure domain is that of the node, for people to change.
    async fn create(&self) {
        loop {
            let zone = match self.zone().await {
                Ok(zone) => zone,
                Err(why) => {
                    tracing::warn!("cannot read the Node's zone: {why}");
                    None
                }
            };
            let spec = StorageServerSpec { schedulable: true, zone, ..StorageServerSpec::default() };
            let object = StorageServer::new(&self.node, spec);
            match self.objects.create(&PostParams::default(), &object).await {
                Ok(_) => return tracing::info!(node = self.node, "made the StorageServer object, without devices"),
                // Somebody made it before: people, chart values, or an earlier process.
                Err(kube::Error::Api(status)) if status.code == 409 => return,
                Err(why) => tracing::warn!("cannot make the StorageServer object: {why}"),
            }
            // sleep: back-off after the API server refused.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The zone of the Node, if it has one and the object may carry it.
    async fn zone(&self) -> Result<Option<String>, kube::Error> {
        let labels = self.nodes.get_opt(&self.node).await?.and_then(|node| node.metadata.labels);
        Ok(labels.and_then(|labels| labels.get(ZONE).cloned()).filter(|zone| !zone.is_empty()))
    }
}

fn specs(object: &StorageServer) -> Vec<DeviceSpec> {
    let of = |device: &lamina_crds::storage_server::DeviceSpec| DeviceSpec {
        path: device.path.clone().into(),
        atomic4k: device.atomic4k,
        format: device.format,
        // The schema has refused what is not a size.
        size: device.size.as_ref().and_then(|size| size.bytes().ok()),
    };
    object.spec.devices.iter().map(of).collect()
}

/// Devices that an earlier process used on although they were taken off the list.
fn unlisted(object: &StorageServer) -> Vec<DeviceSpec> {
    let shown = object.status.iter().flat_map(|status| &status.devices);
    let is_one = |path: &str| !object.spec.devices.iter().any(|listed| listed.path == path);
    let held = shown.filter(|device| device.copies.is_some_and(|copies| copies > 0) && is_one(&device.path));
    let of = |path: &str| DeviceSpec { path: path.into(), atomic4k: None, format: false, size: None };
    held.map(|device| of(&device.path)).collect()
}

/// The id that the object shows, if it is of this installation.
fn known_id(object: &StorageServer, cluster: ClusterId) -> Option<ServerId> {
    let status = object.status.as_ref()?;
    let of_this = status.cluster_id.as_ref().and_then(|id| id.value()) == Some(cluster.0);
    status.server_id.as_ref().and_then(|id| id.value()).filter(|_| of_this).map(ServerId)
}

/// Writes the status whenever there is something new to say.
async fn tell(
    objects: Api<StorageServer>,
    own: Own,
    asker: Asker,
    mut views: watch::Receiver<Vec<DeviceView>>,
    mut is_there: watch::Receiver<Option<i64>>,
) {
    if is_there.wait_for(Option::is_some).await.is_err() {
        return;
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let mut last = shown::Last::default();
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            changed = is_there.changed() => if changed.is_err() { return },
            _ = look.tick() => {}
        }
        let Some(now) = asker.ask().await else { continue };
        let status = shown::status(&own, &now);
        if !last.is_worth_writing(&status) {
            continue;
        }
        let patch = shown::patch(&own.node, &status);
        match objects.patch_status(&own.node, &params, &Patch::Apply(&patch)).await {
            Ok(written) => {
                tracing::debug!(version = ?written.resource_version(), "status written");
                last.written(status);
            }
            Err(why) => {
                tracing::warn!("cannot write the StorageServer's status: {why}");
                // sleep: back-off after the API server refused.
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
