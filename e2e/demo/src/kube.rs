//! What the demo asks the API server, through kubectl as a person would.

use std::time::Duration;

use lamina_cluster::host::wait_until;
use lamina_cluster::{Cluster, ClusterError, cgroup};
use serde::de::DeserializeOwned;

use crate::objects::{List, Pod, StorageServer, Volume};

/// The namespace of the programs.
pub const NAMESPACE: &str = "lamina";

/// Why an object cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    /// kubectl fails, or something awaited did not come.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// As [`KubeError::Cluster`].
    #[error(transparent)]
    Host(#[from] lamina_cluster::host::HostError),
    /// The object is not of the form that this program knows.
    #[error("{what}: {source}")]
    Form {
        /// Which object.
        what: String,
        /// What is odd.
        source: serde_json::Error,
    },
    /// No Volume has this handle.
    #[error("the claim {0} has no Volume yet")]
    NoVolume(String),
    /// No pod of a storage server on this node.
    #[error("no storage pod runs on {0}")]
    NoPod(String),
    /// kubectl gives no way to a pod's port.
    #[error("kubectl forwards no port to the pod {0}")]
    NoForward(String),
    /// The pod's node is none of the cluster's.
    #[error("the pod {0} is on no node")]
    NotPlaced(String),
}

/// Any object as JSON.
///
/// # Errors
/// kubectl fails or prints another form.
pub fn get<T: DeserializeOwned>(cluster: &Cluster, args: &[&str]) -> Result<T, KubeError> {
    let words: Vec<&str> = ["get", "-o", "json"].iter().chain(args).copied().collect();
    let text = cluster.kubectl(&words)?;
    serde_json::from_str(&text).map_err(|source| KubeError::Form { what: args.join(" "), source })
}

/// All storage servers.
///
/// # Errors
/// As [`get`].
pub fn servers(cluster: &Cluster) -> Result<Vec<StorageServer>, KubeError> {
    Ok(get::<List<StorageServer>>(cluster, &["storageservers"])?.items)
}

/// A Volume by its name.
///
/// # Errors
/// As [`get`].
pub fn volume(cluster: &Cluster, name: &str) -> Result<Volume, KubeError> {
    get(cluster, &["volume", name])
}

/// The Volume behind a claim of the default namespace.
///
/// # Errors
/// As [`get`]; the claim is not bound, or nothing has its handle.
pub fn volume_of_claim(cluster: &Cluster, claim: &str) -> Result<Volume, KubeError> {
    let name = cluster.kubectl(&["get", "pvc", claim, "-o", "jsonpath={.spec.volumeName}"])?;
    if name.is_empty() {
        return Err(KubeError::NoVolume(claim.to_owned()));
    }
    let handle = cluster.kubectl(&["get", "pv", &name, "-o", "jsonpath={.spec.csi.volumeHandle}"])?;
    let all = get::<List<Volume>>(cluster, &["volumes"])?.items;
    let found = all.into_iter().find(|volume| volume.status.volume_id == handle);
    found.ok_or_else(|| KubeError::NoVolume(claim.to_owned()))
}

/// A pod.
///
/// # Errors
/// As [`get`].
pub fn pod(cluster: &Cluster, namespace: &str, name: &str) -> Result<Pod, KubeError> {
    get(cluster, &["-n", namespace, "pod", name])
}

/// The pods with a label.
///
/// # Errors
/// As [`get`].
pub fn pods(cluster: &Cluster, namespace: &str, label: &str) -> Result<Vec<Pod>, KubeError> {
    Ok(get::<List<Pod>>(cluster, &["-n", namespace, "pods", "-l", label])?.items)
}

/// The storage server's pod on a node.
///
/// # Errors
/// As [`get`]; there is none.
pub fn storage_pod(cluster: &Cluster, node: &str) -> Result<Pod, KubeError> {
    let all = pods(cluster, NAMESPACE, "app.kubernetes.io/component=storage-node")?;
    let found = all.into_iter().find(|pod| pod.spec.node_name == node && pod.metadata.deletion_timestamp.is_none());
    found.ok_or_else(|| KubeError::NoPod(node.to_owned()))
}

/// Waits until a pod of the default namespace is ready, as another one than `not_uid`.
///
/// # Errors
/// It does not become ready in time; the error of kubectl.
pub fn await_ready(cluster: &Cluster, name: &str, not_uid: &str, limit: Duration) -> Result<Pod, KubeError> {
    let mut found = None;
    wait_until(&format!("the pod {name} to be ready"), limit, || {
        // Between deletion and new creation there is no such pod.
        found = pod(cluster, "default", name).ok().filter(|pod| pod.metadata.uid != not_uid && pod.is_ready());
        pause();
        Ok::<_, KubeError>(found.is_some())
    })?;
    found.ok_or_else(|| KubeError::NoPod(name.to_owned()))
}

/// Waits until a Volume is as `wanted` says and returns it.
///
/// # Errors
/// It does not become so in time; the error of kubectl.
pub fn await_volume(
    cluster: &Cluster,
    name: &str,
    what: &str,
    limit: Duration,
    wanted: impl Fn(&Volume) -> bool,
) -> Result<Volume, KubeError> {
    let mut seen = volume(cluster, name)?;
    wait_until(&format!("{name} {what}"), limit, || {
        seen = volume(cluster, name)?;
        let done = wanted(&seen);
        if !done {
            pause();
        }
        Ok::<_, KubeError>(done)
    })?;
    Ok(seen)
}

/// The processes of a pod's containers on this machine.
///
/// # Errors
/// The pod is on no node of the cluster.
pub fn processes(cluster: &Cluster, pod: &Pod) -> Result<Vec<i32>, KubeError> {
    let node = pod.spec.node_name.parse().map_err(|_| KubeError::NotPlaced(pod.metadata.name.clone()))?;
    let ids = pod.status.container_statuses.iter();
    let ids: Vec<&str> = ids.filter_map(|one| one.container_id.strip_prefix("containerd://")).collect();
    Ok(cluster.pids_of(node).into_iter().filter(|pid| cgroup::in_any(*pid, &ids)).collect())
}

/// kubectl costs some 50 ms of a core: asked without pause it would take the machine from the programs that are looked
/// at.
fn pause() {
    std::thread::sleep(Duration::from_millis(150));
}
