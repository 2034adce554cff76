//! `Volume` objects on a real kube-apiserver: the note of the filesystem, and maps as they are committed.
#![allow(clippy::unwrap_used)]

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client};
use lamina_crds::id::Id;
use lamina_crds::volume::{Filesystem, FilesystemState, Volume};
use lamina_csi_api::name::VolumeHandle;
use lamina_csi_node::objects::kubernetes::KubeObjects;
use lamina_csi_node::objects::{ObjectError, VolumeObjects};
use lamina_protocol::ids::Generation;
use lamina_protocol::map::VolumeMap;
use lamina_test_apiserver::TestApiServer;
use serde_json::{Value, json};
use std::time::Duration;

const HANDLE: u128 = 0xabc;
/// The API server's own watches end after some minutes, and that is not what is waited for.
const PATIENCE: Duration = Duration::from_secs(45);

struct Cluster {
    client: Client,
    volumes: Api<Volume>,
    objects: KubeObjects,
    server: TestApiServer,
}

impl Cluster {
    async fn start(test: &str) -> Option<Self> {
        let server = lamina_test_apiserver::start_or_skip(test).await?;
        let client = server.client().await.unwrap();
        let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
        for manifest in lamina_crds::manifests().unwrap() {
            let name = manifest.crd.metadata.name.clone().unwrap();
            crds.create(&PostParams::default(), &manifest.crd).await.unwrap();
            await_condition(crds.clone(), &name, conditions::is_crd_established()).await.unwrap();
        }
        let (volumes, objects) = (Api::all(client.clone()), KubeObjects::new(client.clone()));
        Some(Self { client, volumes, objects, server })
    }

    async fn create(&self, name: &str, id: u128) {
        let volume = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": "Volume", "metadata": {"name": name},
            "spec": {"size": "1Gi", "policy": "two"},
        });
        self.volumes.create(&PostParams::default(), &serde_json::from_value(volume).unwrap()).await.unwrap();
        self.status(name, json!({"volumeId": Id::of(id)})).await;
    }

    async fn status(&self, name: &str, status: Value) {
        let patch = Patch::Merge(json!({"status": status}));
        self.volumes.patch_status(name, &PatchParams::default(), &patch).await.unwrap();
    }
}

fn noted(kind: &str, state: FilesystemState) -> Filesystem {
    Filesystem { kind: kind.into(), state, session: Some(Id::of(1)) }
}

fn handle() -> VolumeHandle {
    VolumeHandle::new(HANDLE)
}

/// A map as the leader writes one.
fn map(generation: i64, sessions: &[u128]) -> Value {
    let sessions: Vec<Value> = sessions
        .iter()
        .map(|id| {
            json!({"id": Id::of(*id), "node": "n1", "mode": "ReadWrite", "incarnation": 0, "handled": generation,
                "standing": "Admitted"})
        })
        .collect();
    json!({"generation": generation, "map": {
        "volume": Id::of(HANDLE), "generation": generation, "format": 1, "requiredFeatures": 0, "size": 1 << 30,
        "multiSession": false, "servers": [{"id": Id::of(5), "addresses": ["127.0.0.1:4000"]}],
        "placements": [{"groups": [{"members": [{"ordinal": 0, "copy": Id::of(6), "server": Id::of(5),
            "boot": Id::of(8), "state": "Active", "avoid": false, "unpromised": false}], "loss": 0,
            "settle": {"state": "None"}}]}],
        "layers": [{"id": Id::of(9), "size": 1 << 30, "pageBytes": 1 << 20, "scheme": "Replicate",
            "chunkBytes": 65536, "placement": 0}],
        "sessions": sessions,
    }})
}

#[tokio::test]
async fn the_note_of_the_filesystem_is_written_only_over_what_was_read() {
    let Some(cluster) = Cluster::start("the_note_of_the_filesystem").await else { return };
    cluster.create("other", 1).await;
    cluster.create("db", HANDLE).await;
    cluster.status("db", map(1, &[1])).await;
    let objects = &cluster.objects;
    assert_eq!(objects.find(handle()).await.unwrap().unwrap().filesystem, None);
    let (begun, done) = (noted("ext4", FilesystemState::Formatting), noted("ext4", FilesystemState::Formatted));
    objects.note_filesystem(handle(), None, Some(&begun)).await.unwrap();
    objects.note_filesystem(handle(), None, Some(&begun)).await.expect("it stands there already");
    let other = noted("xfs", FilesystemState::Formatting);
    let refused = objects.note_filesystem(handle(), None, Some(&other)).await.unwrap_err();
    assert!(matches!(refused, ObjectError::Changed), "{refused}");
    objects.note_filesystem(handle(), Some(&begun), Some(&done)).await.unwrap();
    assert_eq!(objects.find(handle()).await.unwrap().unwrap().filesystem, Some(done.clone()));
    let volume = cluster.volumes.get("db").await.unwrap();
    assert!(volume.metadata.managed_fields.unwrap().iter().any(|f| f.manager.as_deref() == Some("lamina-csi-node")));
    objects.note_filesystem(handle(), Some(&done), None).await.unwrap();
    let volume = cluster.volumes.get("db").await.unwrap();
    assert_eq!(volume.status.unwrap().filesystem, None);
    assert_eq!(cluster.volumes.get("other").await.unwrap().status.unwrap().filesystem, None);
    cluster.status("db", map(2, &[2])).await;
    let refused = objects.note_filesystem(handle(), None, Some(&begun)).await.unwrap_err();
    assert!(matches!(refused, ObjectError::NotListed), "a session that is out notes nothing: {refused}");
    let gone = objects.note_filesystem(VolumeHandle::new(77), None, Some(&done)).await.unwrap_err();
    assert!(matches!(gone, ObjectError::Gone(_)), "{gone}");
}

#[tokio::test]
async fn the_note_and_the_leaders_writes_do_not_undo_each_other() {
    let Some(cluster) = Cluster::start("the_note_and_the_leaders_writes").await else { return };
    cluster.create("db", HANDLE).await;
    cluster.status("db", map(1, &[1])).await;
    let (begun, done) = (noted("ext4", FilesystemState::Formatting), noted("ext4", FilesystemState::Formatted));
    let leader = async {
        for generation in 2..=20 {
            cluster.status("db", map(generation, &[1])).await;
        }
    };
    let node = async {
        cluster.objects.note_filesystem(handle(), None, Some(&begun)).await.unwrap();
        cluster.objects.note_filesystem(handle(), Some(&begun), Some(&done)).await.unwrap();
    };
    tokio::join!(leader, node);
    let seen = cluster.objects.find(handle()).await.unwrap().unwrap();
    assert_eq!(seen.filesystem, Some(done));
    assert_eq!(seen.map.unwrap().generation, Generation(20));
}

#[tokio::test]
async fn maps_are_followed_by_the_volumes_id_and_only_forward() {
    let Some(cluster) = Cluster::start("maps_are_followed").await else { return };
    cluster.create("other", 1).await;
    let followed = cluster.objects.follow(handle());
    let mut maps = followed.maps.clone();
    assert_eq!(*maps.borrow(), None);
    cluster.create("db", HANDLE).await;
    for generation in [3, 4] {
        cluster.status("db", map(generation, &[1])).await;
        let reached = maps.wait_for(|map| map.as_ref().is_some_and(|map| map.generation.0 == generation as u64));
        tokio::time::timeout(Duration::from_secs(10), reached).await.expect("the watch brings it").unwrap();
    }
    let objects = KubeObjects::new(cluster.client.clone());
    assert_eq!(objects.find(VolumeHandle::new(77)).await.unwrap(), None);
    drop(followed);
    assert!(maps.changed().await.is_err(), "nobody follows it any more");
}

#[tokio::test]
async fn r6_maps_are_followed_on_when_the_api_server_went_back_to_an_old_copy_and_never_backward() {
    let Some(mut cluster) = Cluster::start("r6_maps_are_followed_on").await else { return };
    cluster.create("db", HANDLE).await;
    cluster.status("db", map(3, &[1])).await;
    let saved = cluster.server.save().await.unwrap();
    let followed = cluster.objects.follow(handle());
    let mut maps = followed.maps.clone();
    // Versions rise beyond those that the restored server will give for long.
    for generation in 4..=12 {
        cluster.status("db", map(generation, &[1])).await;
    }
    let of =
        |generation: u64| move |map: &Option<VolumeMap>| map.as_ref().is_some_and(|m| m.generation.0 == generation);
    tokio::time::timeout(PATIENCE, maps.wait_for(of(12))).await.expect("the watch brings it").unwrap();

    cluster.server.restore(&saved).await.unwrap();
    maps.mark_unchanged();
    cluster.status("db", map(13, &[1])).await;
    tokio::time::timeout(PATIENCE, maps.changed()).await.expect("it is listed anew").unwrap();
    assert_eq!(maps.borrow().as_ref().map(|map| map.generation), Some(Generation(13)), "the old map is not told");
}
