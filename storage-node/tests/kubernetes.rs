//! The storage server as a process beside a real kube-apiserver: its `StorageServer` object.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // Shared with the other test program.
#[path = "serving/process.rs"]
mod process;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::wait::{Condition, await_condition, conditions};
use kube::{Api, Client};
use lamina_crds::StorageServer;
use lamina_crds::storage_server::{DeviceState, StorageServerStatus};
use process::Process;
use serde_json::json;
use std::time::Duration;
use tokio::time::timeout;

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
