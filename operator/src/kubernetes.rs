//! Kubernetes objects as the store: several replicas, one of which leads for as long as it holds the Lease.
//!
//! | file | what |
//! |---|---|
//! | `lease` | who leads, and the number that tells an API server restored from an old copy (R6) |
//! | `watch` | objects as they change |
//! | `prepare` | a new Volume gets its finalizer, its id, and a PersistentVolume if it asks for one |
//! | `commit` | the guarded patches (H18) |
//! | `objects` | the [`Store`](crate::store::Store) |
//!
//! Invariant: losing the Lease ends the leader's task before another may take over, as far as clocks allow; where they do
//! not, guards and generations hold (PROTOCOL.md §3.3).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ObjectMeta, PostParams};
use lamina_csi_api::identity::{IdentityService, Readiness};
use lamina_protocol::ids::ClusterId;
use tokio::sync::{mpsc, watch};

use crate::csi::ControllerService;
use crate::mint;
use crate::runtime::{self, Ended, Options};
use crate::store::{Change, StoreError};
use lease::{Candidate, Held};
use objects::Objects;

pub mod commit;
pub mod lease;
mod objects;
mod prepare;
mod watch_objects;

/// The ConfigMap with the cluster id, in the namespace of the operator, and its key.
const CLUSTER: (&str, &str) = ("lamina-cluster", "id");
/// Changes that may wait for the leader.
const QUEUE: usize = 1024;
/// After a leader that ended although nobody asked for it.
const AGAIN: Duration = Duration::from_secs(1);

/// This process among its replicas.
#[derive(Clone, Debug)]
pub struct Replica {
    /// Name of its pod.
    pub name: String,
    /// Namespace of the Lease.
    pub namespace: String,
    /// `host:port` where drivers reach it.
    pub address: String,
}

/// Serves the CSI controller service and Identity until `stop`.
pub async fn serve_csi(client: kube::Client, path: PathBuf, mut stop: watch::Receiver<bool>) {
    let (_ready, readiness) = watch::channel(Readiness::Ready);
    let router = tonic::transport::Server::builder()
        .add_service(IdentityService::new(readiness).into_server())
        .add_service(ControllerService::new(client, mint).into_server());
    let served = lamina_csi_api::socket::serve_uds(path, router, async move { runtime::stopped(&mut stop).await });
    if let Err(why) = served.await {
        tracing::error!(%why, "the CSI socket is gone");
    }
}

/// The cluster id: minted once, by a create that fails if it is there already.
///
/// # Errors
/// [`StoreError::Api`], or [`StoreError::Gone`] if the ConfigMap holds no id: a person has to look.
pub async fn cluster_id(client: &kube::Client, namespace: &str) -> Result<ClusterId, StoreError> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let (name, key) = CLUSTER;
    let id = ClusterId(mint()).to_string();
    let minted = ConfigMap {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        data: Some([(key.to_owned(), id)].into()),
        immutable: Some(true),
        ..ConfigMap::default()
    };
    let found = match api.get_opt(name).await? {
        Some(found) => found,
        None => match api.create(&PostParams::default(), &minted).await {
            Err(kube::Error::Api(status)) if status.code == 409 => api.get(name).await?,
            other => other?,
        },
    };
    let text = found.data.and_then(|mut data| data.remove(key)).unwrap_or_default();
    text.trim().parse().map_err(|_| {
        tracing::error!(configmap = name, key, "holds no cluster id of 32 hexadecimal digits");
        StoreError::Gone
    })
}

/// Leads whenever it may, until `options.stop`.
pub async fn run(client: kube::Client, replica: Replica, options: Options) -> Ended {
    let mut stop = options.stop.clone();
    let mut candidate = Candidate::new(client.clone(), replica.clone());
    options.metrics.set_ready(true);
    loop {
        let front = options.front.clone();
        let held = tokio::select! {
            biased;
            () = runtime::stopped(&mut stop) => return Ended::Stopped,
            held = candidate.acquire(|leader| front.set_leader(leader)) => held,
        };
        tracing::info!(replica = replica.name, number = held.number, "leads");
        options.metrics.leading.set(1);
        let ended = lead(&client, &replica, options.clone(), held).await;
        options.metrics.leading.set(0);
        match ended {
            Ended::Died(_) => return ended,
            Ended::Stopped if *stop.borrow() => {
                candidate.release().await;
                return ended;
            }
            Ended::Stopped => {
                tracing::warn!(replica = replica.name, "leads no more");
                // sleep: back-off before standing for election again.
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// One term.
async fn lead(client: &kube::Client, replica: &Replica, options: Options, held: Held) -> Ended {
    let (changes, heard) = mpsc::channel(QUEUE);
    let (raise, raised) = watch::channel(0);
    let (end, ended) = watch::channel(false);
    for number in [held.found, held.number] {
        // The queue is new and empty.
        let _ = changes.try_send(Change::LeaseNumber(number));
    }
    let (store, index) = Objects::new(client.clone(), replica, raise);
    let mut stop = options.stop.clone();
    let (kept, watched) = (changes.clone(), index.clone());
    let watching = watch_objects::run(client.clone(), watched, changes);
    let holding = async move {
        tokio::select! {
            () = runtime::stopped(&mut stop) => {}
            () = held.keep(kept, raised) => {}
        }
        let _ = end.send(true);
        std::future::pending::<()>().await;
    };
    let leading = runtime::run(Options { stop: ended, ..options }, Arc::new(store), heard);
    // All three in this one task: when the leader's task ends, nothing of the term goes on.
    tokio::select! {
        ended = leading => ended,
        () = holding => unreachable!("it waits for ever"),
        () = watching => Ended::Stopped,
    }
}
