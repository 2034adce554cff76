//! The storage server as a process beside a real kube-apiserver: its `StorageServer` object.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // Shared with the other test program.
#[path = "serving/loops.rs"]
mod loops;
#[allow(dead_code)] // Shared with the other test program.
#[path = "serving/process.rs"]
mod process;
#[path = "kubernetes/stale.rs"]
mod stale;
#[allow(dead_code)] // Shared with the other test program.
#[path = "serving/world.rs"]
mod world;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::{Condition, await_condition, conditions};
use kube::{Api, Client};
use lamina_crds::StorageServer;
use lamina_crds::storage_server::{DeviceState, DeviceStatus, StorageServerStatus};
use lamina_protocol::control::{ControlReply, ControlRequest};
use lamina_protocol::ids::Generation;
use process::Process;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;
use world::{COPIES, Leader, VOLUME};

const PATIENCE: Duration = Duration::from_secs(60);
const NODE: &str = "node-1";

async fn install(client: &Client) {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for manifest in lamina_crds::manifests().unwrap() {
        let name = manifest.crd.metadata.name.clone().unwrap();
        crds.create(&PostParams::default(), &manifest.crd).await.unwrap();
        await_condition(crds.clone(), &name, conditions::is_crd_established()).await.unwrap();
    }
}

/// Waits until the object is so.
async fn until(servers: &Api<StorageServer>, holds: impl Condition<StorageServer>) -> StorageServer {
    let found = timeout(PATIENCE, await_condition(servers.clone(), NODE, holds)).await;
    found.expect("it comes to that").unwrap().unwrap()
}

fn status(object: Option<&StorageServer>) -> Option<&StorageServerStatus> {
    object?.status.as_ref()
}

fn first_is(state: DeviceState) -> impl Condition<StorageServer> {
    move |object: Option<&StorageServer>| {
        status(object).is_some_and(|s| s.devices.first().is_some_and(|device| device.state == state))
    }
}

#[tokio::test]
async fn no_disk_is_touched_before_it_is_named_and_a_restart_keeps_the_id() {
    let test = "no_disk_is_touched_before_it_is_named_and_a_restart_keeps_the_id";
    let Some(cluster) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = cluster.client().await.unwrap();
    install(&client).await;
    let zone = json!({"metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "rack-7"}}});
    let nodes: Api<Node> = Api::all(client.clone());
    nodes.create(&PostParams::default(), &serde_json::from_value(zone).unwrap()).await.unwrap();
    let servers: Api<StorageServer> = Api::all(client);
    let dir = tempfile::tempdir().unwrap();
    let server = Process::of_node(NODE, cluster.kubeconfig());

    let made = until(&servers, |o: Option<&StorageServer>| status(o).is_some_and(|s| s.addresses.is_some())).await;
    assert!(made.spec.devices.is_empty() && made.spec.schedulable, "made without devices");
    assert_eq!(made.spec.zone.as_deref(), Some("rack-7"), "its failure domain is the node's");
    let shown = made.status.unwrap();
    assert_eq!(shown.addresses.unwrap().data, [server.block.to_string()]);
    assert!(shown.server_id.is_none() && shown.devices.is_empty());

    let path = dir.path().join("a.img");
    let devices = json!({"spec": {"devices": [{"path": path, "size": "128Mi"}]}});
    servers.patch(NODE, &PatchParams::default(), &Patch::Merge(&devices)).await.unwrap();
    let first = until(&servers, first_is(DeviceState::Ready)).await.status.unwrap();
    let has_id = |o: Option<&StorageServer>| status(o).is_some_and(|s| s.server_id.is_some());
    until(&servers, has_id).await;
    let boot = first.devices[0].boot.clone().unwrap();
    server.kill();

    let _server = Process::of_node(NODE, cluster.kubeconfig());
    let other_boot = move |o: Option<&StorageServer>| {
        status(o).is_some_and(|s| s.devices.iter().any(|d| d.boot.as_ref().is_some_and(|b| *b != boot)))
    };
    let again = until(&servers, other_boot).await.status.unwrap();
    assert_eq!((again.server_id, &again.devices[0].id), (first.server_id, &first.devices[0].id));
}

#[tokio::test]
async fn a_foreign_device_is_refused_by_name_until_format_is_said() {
    let test = "a_foreign_device_is_refused_by_name_until_format_is_said";
    let Some(cluster) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = cluster.client().await.unwrap();
    install(&client).await;
    let servers: Api<StorageServer> = Api::all(client);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    let mut foreign = vec![0; 128 << 20];
    foreign[..4].copy_from_slice(b"XFSB");
    std::fs::write(&path, &foreign).unwrap();
    let object = json!({
        "apiVersion": "lamina.dev/v1alpha1", "kind": "StorageServer", "metadata": {"name": NODE},
        "spec": {"schedulable": true, "devices": [{"path": path, "size": "128Mi"}]},
    });
    servers.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
    let _server = Process::of_node(NODE, cluster.kubeconfig());
    let refused = until(&servers, first_is(DeviceState::Refused)).await.status.unwrap();
    assert!(refused.devices[0].reason.as_ref().unwrap().contains("an XFS filesystem"), "{:?}", refused.devices[0]);
    assert_eq!(std::fs::read(&path).unwrap(), foreign, "not a byte of it was touched");

    let format = json!({"spec": {"devices": [{"path": path, "size": "128Mi", "format": true}]}});
    servers.patch(NODE, &PatchParams::default(), &Patch::Merge(&format)).await.unwrap();
    let ready = until(&servers, first_is(DeviceState::Ready)).await.status.unwrap();
    assert_eq!(ready.devices[0].reason, None);
}

fn device_is(path: &Path, state: DeviceState) -> impl Condition<StorageServer> {
    let path = path.display().to_string();
    move |object: Option<&StorageServer>| {
        status(object).is_some_and(|s| s.devices.iter().any(|d| d.path == path && d.state == state))
    }
}

async fn list(servers: &Api<StorageServer>, devices: Value) -> Result<StorageServer, kube::Error> {
    let patch = Patch::Merge(json!({"spec": {"devices": devices}}));
    servers.patch(NODE, &PatchParams::default(), &patch).await
}

fn of(object: &StorageServer, path: &Path) -> DeviceStatus {
    let path = path.display().to_string();
    object.status.as_ref().unwrap().devices.iter().find(|device| device.path == path).unwrap().clone()
}

/// A running server with one file of 128 MiB, and a copy on it.
async fn with_a_copy(servers: &Api<StorageServer>, file: &Path, kubeconfig: &Path) -> (Process, Leader) {
    let server = Process::of_node(NODE, kubeconfig);
    until(servers, |o: Option<&StorageServer>| status(o).is_some_and(|s| s.addresses.is_some())).await;
    list(servers, json!([{"path": file, "size": "128Mi"}])).await.unwrap();
    until(servers, device_is(file, DeviceState::Ready)).await;
    let mut leader = Leader::connect(&server).await;
    leader.put_copy(COPIES[0], false).await;
    until(servers, |o: Option<&StorageServer>| status(o).is_some_and(|s| s.devices[0].copies == Some(1))).await;
    (server, leader)
}

#[tokio::test]
async fn devices_are_added_and_grown_online_and_the_leader_sees_the_room_at_once() {
    let test = "devices_are_added_and_grown_online_and_the_leader_sees_the_room_at_once";
    let Some(cluster) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = cluster.client().await.unwrap();
    install(&client).await;
    let servers: Api<StorageServer> = Api::all(client);
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a.img", "b.img"].map(|name| dir.path().join(name));
    let (_server, mut leader) = with_a_copy(&servers, &a, cluster.kubeconfig()).await;
    let first = leader.alive().await.devices;

    list(&servers, json!([{"path": a, "size": "128Mi"}, {"path": b, "size": "64Mi"}])).await.unwrap();
    let both = until(&servers, device_is(&b, DeviceState::Ready)).await;
    assert_eq!(of(&both, &a).boot.unwrap().value(), Some(first[0].boot.0), "the other is not touched");
    assert_eq!(leader.alive().await.devices.len(), 2);

    let before = of(&both, &a).capacity_bytes.unwrap();
    list(&servers, json!([{"path": a, "size": "256Mi"}, {"path": b, "size": "64Mi"}])).await.unwrap();
    let larger = |o: Option<&StorageServer>| o.is_some_and(|o| of(o, &a).capacity_bytes.unwrap() > before);
    let grown = until(&servers, larger).await;
    let room = of(&grown, &a).capacity_bytes.unwrap();
    assert_eq!(room - before, 128 << 20, "all of it is for pages");
    let device = leader.alive().await.devices.into_iter().find(|d| d.device == first[0].device).unwrap();
    assert_eq!((device.capacity_bytes as i64, device.boot), (room, first[0].boot), "in the same opening");
    assert_eq!(device.free_bytes - first[0].free_bytes, 128 << 20);
    let shrunk = list(&servers, json!([{"path": a, "size": "128Mi"}, {"path": b, "size": "64Mi"}])).await;
    assert!(shrunk.unwrap_err().to_string().contains("only grow"), "a person is told at once");
}

#[tokio::test]
async fn a_block_device_that_grew_while_it_is_open_has_its_room_in_the_same_opening() {
    let test = "a_block_device_that_grew_while_it_is_open_has_its_room_in_the_same_opening";
    let dir = tempfile::tempdir().unwrap();
    let [below, other] = ["below.img", "other.img"].map(|name| dir.path().join(name));
    let Some(device) = loops::Loop::of(test, &below, 4096) else { return };
    let Some(cluster) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = cluster.client().await.unwrap();
    install(&client).await;
    let servers: Api<StorageServer> = Api::all(client);
    let _server = Process::of_node(NODE, cluster.kubeconfig());
    until(&servers, |o: Option<&StorageServer>| status(o).is_some_and(|s| s.addresses.is_some())).await;
    list(&servers, json!([{"path": device.path}])).await.unwrap();
    let ready = of(&until(&servers, device_is(&device.path, DeviceState::Ready)).await, &device.path);

    device.resize(&below, 256 << 20);
    // It would be seen within a minute; whoever applies the list sees it at once.
    list(&servers, json!([{"path": device.path}, {"path": other, "size": "64Mi"}])).await.unwrap();
    let before = ready.capacity_bytes.unwrap();
    let larger = |o: Option<&StorageServer>| o.is_some_and(|o| of(o, &device.path).capacity_bytes.unwrap() > before);
    let grown = of(&until(&servers, larger).await, &device.path);
    assert_eq!(grown.capacity_bytes.unwrap() - before, 128 << 20, "all of it is for pages");
    assert_eq!(grown.boot, ready.boot);
}

#[tokio::test]
async fn a_device_that_cannot_grow_is_used_as_it_is_and_says_so() {
    let test = "a_device_that_cannot_grow_is_used_as_it_is_and_says_so";
    let Some(cluster) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = cluster.client().await.unwrap();
    install(&client).await;
    let servers: Api<StorageServer> = Api::all(client);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.img");
    let (server, _) = with_a_copy(&servers, &file, cluster.kubeconfig()).await;
    list(&servers, json!([{"path": file, "size": "63Ti"}])).await.unwrap();
    let says_so = |o: Option<&StorageServer>| {
        status(o).is_some_and(|s| s.devices[0].reason.as_ref().is_some_and(|why| why.contains("smaller than listed")))
    };
    let shown = of(&until(&servers, says_so).await, &file);
    assert_eq!((shown.state, shown.copies), (DeviceState::Ready, Some(1)));
    let boot = shown.boot;
    server.kill();

    let _server = Process::of_node(NODE, cluster.kubeconfig());
    let again = |o: Option<&StorageServer>| o.is_some_and(|o| of(o, &file).boot.is_some_and(|b| Some(b) != boot));
    assert_eq!(of(&until(&servers, again).await, &file).state, DeviceState::Ready, "a restart, too");
    until(&servers, says_so).await;
}

#[tokio::test]
async fn a_device_is_not_taken_away_while_copies_lie_there_and_is_once_they_are_gone() {
    let test = "a_device_is_not_taken_away_while_copies_lie_there_and_is_once_they_are_gone";
    let Some(cluster) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = cluster.client().await.unwrap();
    install(&client).await;
    let servers: Api<StorageServer> = Api::all(client);
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a.img", "b.img"].map(|name| dir.path().join(name));
    let (server, leader) = with_a_copy(&servers, &a, cluster.kubeconfig()).await;
    let id = leader.server;
    list(&servers, json!([{"path": a, "size": "128Mi"}, {"path": b, "size": "64Mi"}])).await.unwrap();
    until(&servers, device_is(&b, DeviceState::Ready)).await;
    let refused = list(&servers, json!([{"path": b, "size": "64Mi"}])).await.unwrap_err().to_string();
    assert!(refused.contains("a device that holds copies cannot be taken away"), "{refused}");
    list(&servers, json!([{"path": a, "size": "128Mi"}])).await.unwrap();
    until(&servers, |o: Option<&StorageServer>| status(o).is_some_and(|s| s.devices.len() == 1)).await;

    // Nothing refuses that the whole object is deleted: what lies there is used on, by the next process too.
    servers.delete(NODE, &DeleteParams::default()).await.unwrap();
    let unlisted = of(&until(&servers, device_is(&a, DeviceState::Unlisted)).await, &a);
    assert!(unlisted.reason.unwrap().contains("copies lie on it"));
    server.kill();
    let server = Process::of_node(NODE, cluster.kubeconfig());
    let again = move |o: Option<&StorageServer>| {
        status(o).is_some_and(|s| s.devices.iter().any(|d| d.boot != unlisted.boot && d.copies == Some(1)))
    };
    let shown = of(&until(&servers, again).await, &a);
    assert_eq!(shown.state, DeviceState::Unlisted);
    let mut leader = Leader::connect(&server).await;
    assert_eq!((leader.server, leader.inventory().await.len()), (id, 1));

    let delete = ControlRequest::DeleteCopy { volume: VOLUME, copy: COPIES[0], generation: Generation(2) };
    assert_eq!(leader.call(delete).await, ControlReply::Done);
    until(&servers, |o: Option<&StorageServer>| status(o).is_some_and(|s| s.devices.is_empty())).await;
    assert!(leader.alive().await.devices.is_empty(), "closed once it is empty");
}
