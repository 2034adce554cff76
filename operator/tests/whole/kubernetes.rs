//! Against a real kube-apiserver.

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, ResourceExt};
use lamina_control_api::leader::{Refusal, Replace};
use lamina_crds::volume::{AttachmentPhase, VolumeState};
use lamina_crds::{Id, ReplicationPolicy, StorageServer, Volume};
use lamina_operator::csi;
use lamina_operator::kubernetes::{self, Replica};
use lamina_operator::runtime::{Ended, FailPoint};
use lamina_protocol::ids::{ClusterId, SessionId, VolumeId};
use lamina_test_apiserver::TestApiServer;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::servers::Servers;
use super::{PATIENCE, options};

const NAMESPACE: &str = "lamina-system";

pub(crate) struct Cluster {
    pub(crate) client: Client,
    id: ClusterId,
    servers: Servers,
    pub(crate) api: TestApiServer,
}

pub(crate) struct Replicas {
    stop: watch::Sender<bool>,
    task: JoinHandle<Ended>,
}

impl Cluster {
    pub(crate) async fn start(test: &str, servers: usize) -> Option<Self> {
        let api = lamina_test_apiserver::start_or_skip(test).await?;
        let client = api.client().await.unwrap();
        for manifest in lamina_crds::manifests().unwrap() {
            let crd: CustomResourceDefinition = serde_yaml::from_str(&manifest.yaml().unwrap()).unwrap();
            let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
            crds.create(&PostParams::default(), &crd).await.unwrap();
            await_condition(crds, &crd.name_any(), conditions::is_crd_established()).await.unwrap();
        }
        let namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}})).unwrap();
        Api::<Namespace>::all(client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
        let id = kubernetes::cluster_id(&client, NAMESPACE).await.unwrap();
        assert_eq!(kubernetes::cluster_id(&client, NAMESPACE).await.unwrap(), id, "minted once");
        let cluster = Self { servers: Servers::start(id, servers).await, client, id, api };
        cluster.make_objects().await;
        Some(cluster)
    }

    /// What storage nodes and people write.
    async fn make_objects(&self) {
        let servers: Api<StorageServer> = Api::all(self.client.clone());
        for (n, server) in self.servers.all.iter().enumerate() {
            let name = format!("node-{n}");
            let object = json!({"metadata": {"name": name}, "spec": {}});
            servers
                .create(&PostParams::default(), &serde_json::from_value(object_of("StorageServer", object)).unwrap())
                .await
                .unwrap();
            let status = json!({"status": {
                "serverId": server.id.to_string(), "capacityBytes": 1 << 30, "usedBytes": 1 << 20,
                "addresses": {"control": [server.address.to_string()], "data": [format!("127.0.0.1:{}", 40_000 + n)]},
                "devices": [{"path": "/dev/x", "state": "Ready"}],
            }});
            servers.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
        }
        let policy = json!({"metadata": {"name": "two"}, "spec": {"copies": 2, "stripeWidth": 2, "pageSize": "64Ki"}});
        let policy: ReplicationPolicy = serde_json::from_value(object_of("ReplicationPolicy", policy)).unwrap();
        Api::all(self.client.clone()).create(&PostParams::default(), &policy).await.unwrap();
    }

    pub(crate) fn replica(&self, name: &str, die_at: Option<FailPoint>) -> Replicas {
        let (options, stop) = options(self.id, die_at);
        let replica =
            Replica { name: name.to_owned(), namespace: NAMESPACE.to_owned(), address: "127.0.0.1:4710".to_owned() };
        Replicas { stop, task: tokio::spawn(kubernetes::run(self.client.clone(), replica, options)) }
    }

    pub(crate) fn volumes(&self) -> Api<Volume> {
        Api::all(self.client.clone())
    }

    pub(crate) async fn create(&self, name: &str, annotations: Value) -> Volume {
        let metadata = json!({"name": name, "annotations": annotations});
        let object = object_of("Volume", json!({"metadata": metadata, "spec": {"size": "16Mi", "policy": "two"}}));
        self.volumes().create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
    }

    /// Waits until it is so.
    pub(crate) async fn until(
        &self,
        name: &str,
        what: &str,
        so: impl Fn(Option<&Volume>) -> bool + Send,
    ) -> Option<Volume> {
        let condition = |volume: Option<&Volume>| so(volume);
        match tokio::time::timeout(PATIENCE, await_condition(self.volumes(), name, condition)).await {
            Ok(volume) => volume.unwrap(),
            Err(_) => panic!("not {what}: {:#?}", self.volumes().get_opt(name).await.unwrap().map(|v| v.status)),
        }
    }

    pub(crate) async fn healthy(&self, name: &str) -> Volume {
        let healthy = |v: Option<&Volume>| state(v) == Some(VolumeState::Healthy);
        self.until(name, "healthy", healthy).await.unwrap()
    }
}

impl Replicas {
    pub(crate) async fn stop(self) -> Ended {
        self.stop.send_replace(true);
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap()
    }
}

pub(crate) fn object_of(kind: &str, mut object: Value) -> Value {
    object["apiVersion"] = json!("lamina.dev/v1alpha1");
    object["kind"] = json!(kind);
    object
}

fn state(volume: Option<&Volume>) -> Option<VolumeState> {
    volume?.status.as_ref()?.state
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_placed_attached_detached_and_deleted_with_nothing_left() {
    let test = "a_volume_is_placed_attached_detached_and_deleted_with_nothing_left";
    let Some(cluster) = Cluster::start(test, 3).await else { return };
    let leader = cluster.replica("a", None);
    cluster.create("v", json!({})).await;
    let volume = cluster.healthy("v").await;
    let status = volume.status.unwrap();
    let summary = status.summary.unwrap();
    assert_eq!(summary.copies.as_deref(), Some("4/4"));
    assert_eq!(summary.doing.as_deref(), Some("idle"));
    assert!(summary.located.unwrap().contains("node-"), "places are told by name");
    assert!(status.shape.is_some(), "the policy's shape is copied");
    assert_eq!(cluster.servers.all.iter().map(super::servers::Server::copies).sum::<usize>(), 4);

    // As a backup tool leaves it that drops empty lists: commits go on.
    let gap: Patch<()> =
        Patch::Json(serde_json::from_value(json!([{"op": "remove", "path": "/status/retired"}])).unwrap());
    cluster.volumes().patch_status("v", &PatchParams::default(), &gap).await.unwrap();
    let session = "000000000000000000000000000000aa";
    let wish = json!({"spec": {"attachments": [{"node": "n", "session": session, "mode": "ReadWrite"}]}});
    cluster.volumes().patch("v", &PatchParams::default(), &Patch::Merge(wish)).await.unwrap();
    let attached = |v: Option<&Volume>| {
        let attachments = v.and_then(|v| v.status.as_ref()).map(|s| s.attachments.clone()).unwrap_or_default();
        attachments.iter().any(|a| a.session.0 == session && a.phase == AttachmentPhase::Attached)
    };
    cluster.until("v", "attached", attached).await;
    let unwish = json!({"spec": {"attachments": []}});
    cluster.volumes().patch("v", &PatchParams::default(), &Patch::Merge(unwish)).await.unwrap();
    let out = |v: Option<&Volume>| {
        let status = v.and_then(|v| v.status.as_ref()).unwrap();
        status.attachments.is_empty() && status.map.as_ref().unwrap().sessions.is_empty()
    };
    cluster.until("v", "detached", out).await;

    cluster.volumes().delete("v", &DeleteParams::default()).await.unwrap();
    cluster.until("v", "deleted", |v| v.is_none()).await;
    assert_eq!(cluster.servers.all.iter().map(super::servers::Server::copies).sum::<usize>(), 0);
    assert_eq!(leader.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_in_use_is_not_deleted_and_says_which_persistent_volume_and_where() {
    let test = "a_volume_in_use_is_not_deleted_and_says_which_persistent_volume_and_where";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    let leader = cluster.replica("a", None);
    cluster.create("v", json!({"lamina.dev/persistent-volume": "true"})).await;
    cluster.healthy("v").await;
    let pvs: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let there = |pv: Option<&PersistentVolume>| pv.is_some();
    tokio::time::timeout(PATIENCE, await_condition(pvs, "v", there)).await.unwrap().unwrap();
    let session = format!("{:032x}", 0xaa);
    let wish = json!({"spec": {"attachments": [{"node": "worker-7", "session": session, "mode": "ReadWrite"}]}});
    cluster.volumes().patch("v", &PatchParams::default(), &Patch::Merge(wish)).await.unwrap();
    cluster.volumes().delete("v", &DeleteParams::default()).await.unwrap();
    let says = |v: Option<&Volume>| {
        let conditions = v.and_then(|v| v.status.as_ref()).map(|s| s.conditions.clone()).unwrap_or_default();
        conditions.iter().any(|c| c.kind == "Deleting" && c.reason == "InUse")
    };
    let volume = cluster.until("v", "in use", says).await.unwrap();
    let status = volume.status.unwrap();
    let told = &status.conditions.iter().find(|c| c.kind == "Deleting").unwrap().message;
    assert!(told.starts_with("PersistentVolume v: ") && told.contains("node worker-7"), "{told}");
    assert_eq!(status.summary.unwrap().message.as_ref(), Some(told), "kubectl get shows it");
    assert_eq!(leader.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn r10_a_session_is_replaced_once_in_the_wish_of_its_node() {
    let test = "r10_a_session_is_replaced_once_in_the_wish_of_its_node";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    let leader = cluster.replica("a", None);
    cluster.create("v", json!({})).await;
    let volume = cluster.healthy("v").await.status.unwrap().volume_id.unwrap();
    let wish = json!({"spec": {"attachments": [{"node": "n", "session": Id::of(0xaa), "mode": "ReadWrite"}]}});
    cluster.volumes().patch("v", &PatchParams::default(), &Patch::Merge(wish)).await.unwrap();
    let sessions = csi::sessions(cluster.client.clone(), lamina_operator::mint);
    let volume = VolumeId(volume.value().unwrap());
    let ask = |session: u128, node: &str| Replace { volume, session: SessionId(session), node: node.to_owned() };
    let (once, twice) = (ask(0xaa, "n"), ask(0xaa, "n"));
    let (a, b) = tokio::join!(sessions.replace(&once), sessions.replace(&twice));
    let new = a.unwrap();
    assert_eq!(b.unwrap().session, new.session, "two at once");
    let volume = cluster.volumes().get("v").await.unwrap();
    assert_eq!(volume.spec.attachments[0].replaced, [Id::of(0xaa)]);
    let map = volume.status.unwrap().map.unwrap();
    assert_eq!(map.sessions.iter().map(|s| s.id.clone()).collect::<Vec<_>>(), [Id::of(new.session.0)]);
    let refused = sessions.replace(&ask(0xaa, "m")).await.unwrap_err();
    assert!(matches!(refused, Refusal::NotAttached { .. }), "{refused}");
    assert_eq!(leader.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_applied_without_its_status_gets_back_the_id_that_its_pv_names() {
    let test = "a_volume_applied_without_its_status_gets_back_the_id_that_its_pv_names";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    let leader = cluster.replica("a", None);
    cluster.create("v", json!({"lamina.dev/persistent-volume": "true"})).await;
    let id = cluster.healthy("v").await.status.unwrap().volume_id.unwrap();
    let pvs: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let there = |pv: Option<&PersistentVolume>| pv.is_some();
    tokio::time::timeout(PATIENCE, await_condition(pvs.clone(), "v", there)).await.unwrap().unwrap();
    let csi = pvs.get("v").await.unwrap().spec.unwrap().csi.unwrap();
    assert_eq!((csi.driver.as_str(), csi.volume_handle.as_str()), ("csi.lamina.dev", id.0.as_str()));
    assert_eq!(leader.stop().await, Ended::Stopped);

    // Somebody takes the object away by force and applies the manifest again.
    let forced = json!({"metadata": {"finalizers": null}});
    cluster.volumes().patch("v", &PatchParams::default(), &Patch::Merge(forced)).await.unwrap();
    cluster.volumes().delete("v", &DeleteParams::default()).await.unwrap();
    cluster.create("v", json!({})).await;
    let leader = cluster.replica("b", None);
    let named = |v: Option<&Volume>| v.and_then(|v| v.status.as_ref()?.volume_id.as_ref()).is_some();
    let again = cluster.until("v", "named", named).await.unwrap();
    assert_eq!(again.status.unwrap().volume_id.unwrap(), id);
    let restored = |v: Option<&Volume>| {
        let status = v.and_then(|v| v.status.as_ref()).unwrap();
        status.map.is_some() || status.state == Some(VolumeState::Diverged)
    };
    let found = cluster.until("v", "recovered or diverged", restored).await.unwrap();
    let status = found.status.unwrap();
    assert!(status.map.is_none() || status.generation.unwrap() > 1, "never a blank first map: {status:#?}");
    assert_eq!(leader.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_dies_after_its_commit_is_followed_by_the_other_replica() {
    let test = "a_leader_that_dies_after_its_commit_is_followed_by_the_other_replica";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    let first = cluster.replica("a", Some("Committed".parse().unwrap()));
    cluster.create("v", json!({})).await;
    let died = tokio::time::timeout(PATIENCE, first.task).await.unwrap().unwrap();
    assert!(matches!(died, Ended::Died(_)), "the fail point is hit");
    let second = cluster.replica("b", None);
    cluster.healthy("v").await;
    assert_eq!(second.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_deleted_before_it_got_its_id_goes() {
    let test = "a_volume_deleted_before_it_got_its_id_goes";
    let Some(cluster) = Cluster::start(test, 0).await else { return };
    cluster.create("v", json!({})).await;
    let held = json!({"metadata": {"finalizers": ["lamina.dev/volume"]}});
    cluster.volumes().patch("v", &PatchParams::default(), &Patch::Merge(held)).await.unwrap();
    cluster.volumes().delete("v", &DeleteParams::default()).await.unwrap();
    let leader = cluster.replica("a", None);
    cluster.until("v", "gone", |v| v.is_none()).await;
    assert_eq!(leader.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_replicas_one_leads_and_the_other_follows_at_once_when_it_stops() {
    let test = "of_two_replicas_one_leads_and_the_other_follows_at_once_when_it_stops";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let (first, second) = (cluster.replica("a", None), cluster.replica("b", None));
    let holder = |lease: Option<&Lease>| lease?.spec.as_ref()?.holder_identity.clone();
    let number = |lease: &Lease| lease.annotations()["lamina.dev/lease-number"].parse::<u64>().unwrap();
    let held = |lease: Option<&Lease>| holder(lease).is_some();
    let lease = await_condition(leases.clone(), "lamina-operator", held);
    let lease = tokio::time::timeout(PATIENCE, lease).await.unwrap().unwrap().unwrap();
    assert_eq!(lease.annotations()["lamina.dev/leader-address"], "127.0.0.1:4710");
    let leader = holder(Some(&lease)).unwrap();
    let (leading, standing) = if leader.starts_with("a_") { (first, second) } else { (second, first) };
    assert_eq!(leading.stop().await, Ended::Stopped);
    let other = |lease: Option<&Lease>| holder(lease).is_some_and(|now| now != leader);
    let follows = await_condition(leases, "lamina-operator", other);
    let next = tokio::time::timeout(PATIENCE, follows).await.unwrap().unwrap().unwrap();
    assert!(number(&next) > number(&lease), "the number never falls");
    cluster.create("v", json!({})).await;
    cluster.healthy("v").await;
    assert_eq!(standing.stop().await, Ended::Stopped);
}
