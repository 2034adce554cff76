//! Kubernetes objects as the store (being written).

use std::path::PathBuf;

use lamina_protocol::ids::ClusterId;
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::runtime::{Ended, Options};
use crate::store::StoreError;

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

/// Serves the CSI controller service.
pub async fn serve_csi(_client: kube::Client, _path: PathBuf, _metrics: Metrics, _stop: watch::Receiver<bool>) {}

/// Leads while it may.
///
/// # Errors
/// None yet.
pub async fn run(
    _client: kube::Client,
    _replica: Replica,
    _options: impl Fn(ClusterId, watch::Receiver<bool>) -> Options,
) -> Result<Ended, StoreError> {
    Ok(Ended::Stopped)
}
