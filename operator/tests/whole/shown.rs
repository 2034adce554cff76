//! What people see in a real API server: conditions, space, policies, events, and the PersistentVolume of a Volume.

use k8s_openapi::api::core::v1::PersistentVolume;
use k8s_openapi::api::events::v1::Event;
use kube::Resource;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use lamina_crds::condition::{Condition, ConditionStatus};
use lamina_crds::{ReplicationPolicy, StorageServer};
use lamina_operator::runtime::Ended;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::PATIENCE;
use super::kubernetes::{Cluster, object_of};

async fn until<K>(api: &Api<K>, name: &str, so: impl Fn(&K) -> bool + Send) -> K
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let condition = |object: Option<&K>| object.is_some_and(&so);
    let found = Box::pin(tokio::time::timeout(PATIENCE, await_condition(api.clone(), name, condition))).await;
    match found {
        Ok(found) => found.unwrap().unwrap(),
        Err(_) => panic!("{name} does not come to that: {:#?}", api.get_opt(name).await),
    }
}

fn holds(conditions: &[Condition], kind: &str, status: ConditionStatus) -> bool {
    conditions.iter().any(|c| c.kind == kind && c.status == status)
}

fn are_explained(conditions: &[Condition], kinds: &[&str]) {
    for kind in kinds {
        let found = conditions.iter().find(|c| c.kind == *kind);
        let found = found.unwrap_or_else(|| panic!("there is no condition {kind} in {conditions:#?}"));
        assert!(!found.reason.is_empty() && found.message.contains(' '), "in plain words: {found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_get_tells_how_servers_policies_and_volumes_are_and_events_what_happened() {
    let test = "kubectl_get_tells_how_servers_policies_and_volumes_are_and_events_what_happened";
    let Some(cluster) = Cluster::start(test, 3).await else { return };
    let leader = cluster.replica("a", None);
    cluster.create("v", json!({})).await;
    let volume = cluster.healthy("v").await.status.unwrap();
    are_explained(
        &volume.conditions,
        &["Placed", "Available", "Healthy", "Settled", "OutOfSpace", "Diverged", "Deleting"],
    );
    let servers: Api<StorageServer> = Api::all(cluster.client.clone());
    let used = |s: &StorageServer| s.status.as_ref().and_then(|s| s.summary.clone()?.used).is_some();
    let server = until(&servers, "node-0", used).await.status.unwrap();
    are_explained(&server.conditions, &["Ready", "DevicesReady", "Drained", "SpaceLow"]);
    assert!(holds(&server.conditions, "DevicesReady", ConditionStatus::True));
    assert_eq!(server.summary.unwrap().used.as_deref(), Some("0/1Gi (0%)"), "as heartbeats say");

    let policies: Api<ReplicationPolicy> = Api::all(cluster.client.clone());
    let counted = |p: &ReplicationPolicy| p.status.as_ref().is_some_and(|s| s.volumes == Some(1));
    let policy = until(&policies, "two", counted).await.status.unwrap();
    assert!(holds(&policy.conditions, "Satisfiable", ConditionStatus::True), "{policy:#?}");
    let many = object_of("ReplicationPolicy", json!({"metadata": {"name": "many"}, "spec": {"copies": 4}}));
    policies.create(&PostParams::default(), &serde_json::from_value(many).unwrap()).await.unwrap();
    let refused = |p: &ReplicationPolicy| {
        p.status.as_ref().is_some_and(|s| holds(&s.conditions, "Satisfiable", ConditionStatus::False))
    };
    let many = until(&policies, "many", refused).await.status.unwrap();
    assert!(many.conditions[0].message.contains("4 copies need 4 servers"), "{:?}", many.conditions);

    // As a storage node says it of a disk with something on it.
    let status = json!({"status": {"devices": [
        {"path": "/dev/x", "state": "Ready"}, {"path": "/dev/y", "state": "Refused", "reason": "found an ext4 filesystem"},
    ]}});
    servers.patch_status("node-0", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    let shown = |s: &StorageServer| {
        let status = s.status.as_ref().unwrap();
        let devices = status.summary.as_ref().and_then(|s| s.devices.as_deref());
        devices == Some("1/2") && holds(&status.conditions, "DevicesReady", ConditionStatus::False)
    };
    let refused = until(&servers, "node-0", shown).await.status.unwrap();
    let condition = refused.conditions.iter().find(|c| c.kind == "DevicesReady").unwrap();
    assert_eq!(
        (condition.reason.as_str(), condition.message.as_str()),
        ("Refused", "/dev/y is Refused: found an ext4 filesystem")
    );
    let events: Api<Event> = Api::all(cluster.client.clone());
    let told = async {
        loop {
            let all = events.list(&ListParams::default()).await.unwrap().items;
            let reasons: Vec<_> = all.iter().filter_map(|event| event.reason.clone()).collect();
            if ["DeviceRefused", "Created"].iter().all(|wanted| reasons.iter().any(|r| r == wanted)) {
                return all;
            }
            // sleep: events are told at their own pace and have no watch of ours.
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    let all = tokio::time::timeout(PATIENCE, told).await.unwrap();
    let refused = all.iter().find(|e| e.reason.as_deref() == Some("DeviceRefused")).unwrap();
    let about = refused.regarding.as_ref().unwrap();
    assert_eq!((about.kind.as_deref(), about.name.as_deref()), (Some("StorageServer"), Some("node-0")));
    assert!(refused.note.as_ref().unwrap().contains("ext4"), "{refused:?}");
    assert_eq!(leader.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_persistent_volume_of_a_volume_grows_with_it_and_goes_with_it() {
    let test = "the_persistent_volume_of_a_volume_grows_with_it_and_goes_with_it";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    let leader = cluster.replica("a", None);
    let wishes = json!({"lamina.dev/persistent-volume": "true", "lamina.dev/reclaim-policy": "Delete"});
    cluster.create("v", wishes).await;
    cluster.healthy("v").await;
    let pvs: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let capacity = |pv: &PersistentVolume| {
        let spec = pv.spec.as_ref().unwrap();
        spec.capacity.as_ref().unwrap()["storage"].0.clone()
    };
    let made = until(&pvs, "v", |_| true).await;
    assert_eq!(capacity(&made), "16Mi");
    let spec = made.spec.as_ref().unwrap();
    assert_eq!(spec.persistent_volume_reclaim_policy.as_deref(), Some("Delete"));
    assert_eq!(made.metadata.annotations.as_ref().unwrap()["pv.kubernetes.io/provisioned-by"], "csi.lamina.dev");

    let grow = json!({"spec": {"size": "32Mi"}});
    cluster.volumes().patch("v", &PatchParams::default(), &Patch::Merge(grow)).await.unwrap();
    until(&pvs, "v", |pv| capacity(pv) == "32Mi").await;
    let size = cluster.volumes().get("v").await.unwrap().status.unwrap().map.unwrap().size;
    assert_eq!(size, 32 << 20, "the PersistentVolume says so only when it is so");

    cluster.volumes().delete("v", &DeleteParams::default()).await.unwrap();
    cluster.until("v", "deleted", |v| v.is_none()).await;
    // Nothing here plays the controller that lets a PersistentVolume go; that it is to go is all that is ours.
    let going = async {
        while pvs.get_opt("v").await.unwrap().is_some_and(|pv| pv.metadata.deletion_timestamp.is_none()) {
            // sleep: either it is marked or it is gone, and there is no one condition for both.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(PATIENCE, going).await.expect("the PersistentVolume goes with its Volume");
    assert_eq!(leader.stop().await, Ended::Stopped);
}
