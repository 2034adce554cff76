//! What a watch tells of an API server that went back, against a real one.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use lamina_protocol::management::VolumeObject;
use serde_json::json;

use super::*;

/// Everything is done long before; the API server's own watches end after some minutes, and that is not what is waited for.
const PATIENCE: Duration = Duration::from_secs(45);

async fn make_crds(client: &Client) {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for manifest in lamina_crds::manifests().unwrap() {
        let crd: CustomResourceDefinition = serde_yaml::from_str(&manifest.yaml().unwrap()).unwrap();
        crds.create(&PostParams::default(), &crd).await.unwrap();
        await_condition(crds.clone(), &crd.name_any(), conditions::is_crd_established()).await.unwrap();
    }
}

async fn wish_for_size(client: &Client, size: &str) {
    let patch = Patch::Merge(json!({"spec": {"size": size}}));
    Api::<Volume>::all(client.clone()).patch("v", &PatchParams::default(), &patch).await.unwrap();
}

/// Waits for a word of the volume of which this holds.
async fn told(changes: &mut mpsc::Receiver<Change>, what: &str, so: impl Fn(&VolumeObject) -> bool) -> VolumeObject {
    let word = async {
        loop {
            match changes.recv().await.unwrap() {
                Change::Volume(object) if so(&object) => return *object,
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, word).await.unwrap_or_else(|_| panic!("never told: {what}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn r6_objects_are_listed_anew_when_the_api_server_went_away_and_told_though_they_are_older() {
    let test = "r6_objects_are_listed_anew_when_the_api_server_went_away_and_told_though_they_are_older";
    let Some(mut api) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = api.client().await.unwrap();
    make_crds(&client).await;
    let volume = json!({
        "apiVersion": "lamina.dev/v1alpha1", "kind": "Volume",
        "metadata": {"name": "v"}, "spec": {"size": "16Mi", "policy": "none"},
    });
    let volumes: Api<Volume> = Api::all(client.clone());
    volumes.create(&PostParams::default(), &serde_json::from_value(volume).unwrap()).await.unwrap();
    let (say, mut changes) = mpsc::channel(1024);
    let watching = tokio::spawn(run(client.clone(), Arc::default(), say));
    let of = |size: u64| move |object: &VolumeObject| object.wishes.size == size << 20;
    told(&mut changes, "the volume as it was made", of(16)).await;

    let saved = api.save().await.unwrap();
    for size in ["32Mi", "48Mi", "64Mi"] {
        wish_for_size(&client, size).await;
    }
    let newest = told(&mut changes, "the volume as it is wished for now", of(64)).await;
    api.restore(&saved).await.unwrap();
    let older = told(&mut changes, "the volume as it was", of(16)).await;
    assert!(older.version < newest.version, "{} {}", older.version, newest.version);
    watching.abort();
}
