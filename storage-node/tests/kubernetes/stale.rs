//! A storage server as a process, the operator's own run and a real kube-apiserver: what people hear of a client that is
//! stale (PROTOCOL.md §2.5).

use super::*;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use lamina_crds::translate::committed_map;
use lamina_crds::volume::AttachmentPhase;
use lamina_crds::{Id, ReplicationPolicy, Volume};
use lamina_operator::kubernetes::{Replica, run};
use lamina_operator::runtime::{Ended, Options};
use lamina_protocol::wire::{Opener, ReplyBody, RequestBody};
use std::time::Instant;
use tokio::sync::watch;
use world::{CLUSTER, Client as Driver, SESSION};

const NAMESPACE: &str = "lamina";

async fn create<K>(api: &Api<K>, object: Value)
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned + serde::Serialize,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
}

/// A volume of one copy, used by the node `worker-3` in this session, under an id that is chosen here.
async fn attached_volume(client: &Client) -> Api<Volume> {
    let (api, policies) = ("lamina.dev/v1alpha1", Api::<ReplicationPolicy>::all(client.clone()));
    let policy =
        json!({"apiVersion": api, "kind": "ReplicationPolicy", "metadata": {"name": "one"}, "spec": {"copies": 1}});
    create(&policies, policy).await;
    let volumes: Api<Volume> = Api::all(client.clone());
    let wish = json!([{"node": "worker-3", "session": Id::of(SESSION.0), "mode": "ReadWrite"}]);
    let volume = json!({
        "apiVersion": api, "kind": "Volume", "metadata": {"name": "db"},
        "spec": {"size": "16Mi", "policy": "one", "attachments": wish},
    });
    create(&volumes, volume).await;
    let id = Patch::Merge(json!({"status": {"volumeId": Id::of(VOLUME.0)}}));
    volumes.patch_status("db", &PatchParams::default(), &id).await.unwrap();
    volumes
}

/// The leader, and what stops it when it is dropped.
fn lead(client: &Client) -> (tokio::task::JoinHandle<Ended>, watch::Sender<bool>) {
    let (stopping, stop) = watch::channel(false);
    let options = Options {
        cluster: CLUSTER,
        mint: lamina_operator::mint,
        fill_budget: Default::default(),
        die_at: None,
        metrics: Default::default(),
        front: Default::default(),
        stop,
    };
    let replica = Replica { name: "a".into(), namespace: NAMESPACE.into(), address: "127.0.0.1:4710".into() };
    (tokio::spawn(run(client.clone(), replica, options)), stopping)
}

async fn stale_events(client: &Client) -> Vec<Event> {
    let all = Api::<Event>::all(client.clone()).list(&ListParams::default()).await.unwrap().items;
    all.into_iter().filter(|event| event.reason.as_deref() == Some("StaleSession")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stays_stale_is_an_event_of_its_volume_with_what_it_had_and_needs() {
    let test = "a_client_that_stays_stale_is_an_event_of_its_volume_with_what_it_had_and_needs";
    let Some(cluster) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = cluster.client().await.unwrap();
    install(&client).await;
    create(&Api::<Namespace>::all(client.clone()), json!({"metadata": {"name": NAMESPACE}})).await;
    let servers: Api<StorageServer> = Api::all(client.clone());
    let dir = tempfile::tempdir().unwrap();
    let server = Process::of_node(NODE, cluster.kubeconfig());
    until(&servers, |o: Option<&StorageServer>| status(o).is_some_and(|s| s.addresses.is_some())).await;
    list(&servers, json!([{"path": dir.path().join("a.img"), "size": "128Mi"}])).await.unwrap();
    let volumes = attached_volume(&client).await;
    let (leader, stop) = lead(&client);
    let is_attached = |volume: Option<&Volume>| {
        let attachments = volume.and_then(|v| v.status.as_ref()).map(|s| s.attachments.clone()).unwrap_or_default();
        attachments.iter().any(|attachment| attachment.phase == AttachmentPhase::Attached)
    };
    let volume = timeout(PATIENCE, await_condition(volumes, "db", is_attached)).await.expect("attached").unwrap();
    let map = committed_map(volume.unwrap().status.as_ref().unwrap()).unwrap().unwrap();
    let (now, holder) = (map.generation.0, map.servers[0].id);

    let mut driver = Driver::open_as(&server, holder, Opener::Session { session: SESSION }, (now, 1)).await;
    let begun = Instant::now();
    let event = loop {
        // What a client does that no map reaches.
        let reply = driver.ask(now - 1, RequestBody::Ping, vec![]).await.body;
        assert_eq!(reply, ReplyBody::Stale { wait_for: Generation(now) });
        if let Some(event) = stale_events(&client).await.pop() {
            break event;
        }
        assert!(begun.elapsed() < PATIENCE, "nobody is told");
        // sleep: requests come at a pace of their own.
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    assert!(begun.elapsed() >= Duration::from_secs(5), "it may get its map any moment");
    let note = event.note.unwrap();
    let says = format!("client worker-3 (session {}) of volume db had generation {}, needs {now}", SESSION, now - 1);
    assert!(note.contains(&says), "{note}");
    let about = event.regarding.unwrap();
    assert_eq!((about.kind.as_deref(), about.name.as_deref()), (Some("Volume"), Some("db")));
    assert_eq!(event.type_.as_deref(), Some("Warning"));
    assert!(server.metric("lamina_storage_stale_requests").await >= 6.0, "each was counted");
    stop.send_replace(true);
    assert_eq!(timeout(PATIENCE, leader).await.unwrap().unwrap(), Ended::Stopped);
}
