//! `lamina-csi-node serve`: the program of the DaemonSet, from its options to its end.
//!
//! Order: metrics, then take-over, then the CSI socket, then registration. A device that cannot be taken over within
//! [`TAKE_OVER`] does not hold up the others: calls for its volume are ABORTED until it is. At the end nothing is
//! detached: devices stay with the holder for the successor.

use crate::device::DeviceKind;
use crate::host::linux::LinuxHost;
use crate::leader::{self, MAX_REPORTS, Whereabouts};
use crate::metrics::{self, Shown};
use crate::near;
use crate::node::{Node, NodeError, Parts, Patience};
use crate::objects::kubernetes::KubeObjects;
use crate::opener::ClusterOpener;
use crate::record::{RecordError, Records};
use crate::registration;
use crate::service::{About, MAX_CALLS, NodeService};
use crate::sessions::AtLeader;
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::{Api, Client, ResourceExt};
use lamina_csi_api::identity::{IdentityService, Readiness};
use lamina_csi_api::in_flight::InFlight;
use lamina_csi_api::name::NodeName;
use lamina_csi_api::registration::RegistrationOutcome;
use lamina_csi_api::socket::{BoundSocket, SocketError};
use lamina_csi_api::topology::{NodeTopology, TopologyError, Zone};
use lamina_protocol::ids::ClusterId;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tonic::transport::Server;

/// How long the CSI socket waits for devices to be taken over.
const TAKE_OVER: Duration = Duration::from_secs(10);
/// How long a process before this one may hold the CSI socket.
const SOCKET: Duration = Duration::from_secs(20);
/// The well-known label of a node's zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The exit status of a process that a successor has replaced.
pub const SUPERSEDED: i32 = 75;

/// What the program is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node.
    pub node: NodeName,
    /// Servers of another cluster are refused.
    pub cluster: ClusterId,
    /// Where the operator's Lease is.
    pub namespace: String,
    /// The CSI socket, on a path that is the same for the kubelet.
    pub csi_endpoint: PathBuf,
    /// The kubelet's `plugins_registry`.
    pub registration_dir: PathBuf,
    /// The device holder's socket; without one devices end with this process.
    pub holder: Option<PathBuf>,
    /// How volumes become devices.
    pub device: DeviceKind,
    /// For `/metrics`, `/healthz`, `/readyz`.
    pub metrics: SocketAddr,
    /// Volumes that may be attached at a time.
    pub max_volumes: u32,
}

/// Why the program ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No API server.
    #[error("the API server cannot be used: {0}")]
    Kube(#[from] Box<kube::Error>),
    /// The node's name or zone.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The plugin's directory.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Take-over.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The metrics' port.
    #[error("metrics cannot be served on {address}: {source}")]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
}

/// Serve until `shutdown` turns true.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(options: Options, client: Client, shutdown: watch::Receiver<bool>) -> Result<(), ServeError> {
    let (reports, reported) = mpsc::channel(MAX_REPORTS);
    tokio::spawn(leader::report(Whereabouts::lease(client.clone(), &options.namespace), reported));
    let directory = options.csi_endpoint.parent().map(|parent| parent.join("volumes")).unwrap_or_default();
    let node = Node::new(Parts {
        objects: Arc::new(KubeObjects::new(client.clone())),
        sessions: Arc::new(AtLeader {
            whereabouts: Whereabouts::lease(client.clone(), &options.namespace),
            node: options.node.clone(),
        }),
        opener: Arc::new(ClusterOpener {
            cluster: options.cluster,
            reports,
            near: near::follow(client.clone(), options.node.as_str()),
        }),
        host: Arc::new(LinuxHost::new(options.device, options.holder.clone(), options.node.as_str())),
        records: Records::open(&directory)?,
        exit: Arc::new(|| std::process::exit(SUPERSEDED)),
        patience: Patience::default(),
    });
    let (ready, readiness) = watch::channel(Readiness::NotYet);
    serve_pages(options.metrics, Shown { node: node.clone(), readiness: readiness.clone() }).await?;
    let calls = InFlight::new(MAX_CALLS);
    let mut recoveries = Box::pin(node.recover(&calls)).await?;
    let all = async { while recoveries.join_next().await.is_some() {} };
    if tokio::time::timeout(TAKE_OVER, all).await.is_err() {
        tracing::warn!("some devices are not taken over yet; the others are served");
    }
    let about = About { topology: topology(&client, options.node.clone()).await?, max_volumes: options.max_volumes };
    let service = NodeService::new(node, calls, about);
    let router =
        Server::builder().add_service(IdentityService::new(readiness).into_server()).add_service(service.into_server());
    let socket = bind(&options.csi_endpoint).await?;
    ready.send_replace(Readiness::Ready);
    tracing::info!(endpoint = %options.csi_endpoint.display(), "serving CSI");
    let mut ends = shutdown.clone();
    let csi = socket.serve(router, async move {
        let _ = ends.wait_for(|end| *end).await;
    });
    let (outcome, _) = watch::channel(RegistrationOutcome::Waiting);
    let registration = registration::serve(&options.registration_dir, &options.csi_endpoint, outcome, shutdown);
    tokio::try_join!(csi, registration)?;
    Ok(())
}

async fn serve_pages(address: SocketAddr, shown: Shown) -> Result<(), ServeError> {
    let listener = tokio::net::TcpListener::bind(address).await;
    let listener = listener.map_err(|source| ServeError::Metrics { address, source })?;
    tokio::spawn(async move { axum::serve(listener, metrics::router(shown)).await });
    Ok(())
}

/// The process before this one may still be at its end.
async fn bind(path: &std::path::Path) -> Result<BoundSocket, SocketError> {
    let asked = tokio::time::Instant::now();
    loop {
        match BoundSocket::bind(path).await {
            Err(SocketError::InUse { .. }) if asked.elapsed() < SOCKET => {
                // sleep: the end of another process's socket is no event
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            bound => return bound,
        }
    }
}

/// Name and zone of this node. Zones come from the Node object; without the object there is none.
async fn topology(client: &Client, name: NodeName) -> Result<NodeTopology, ServeError> {
    let nodes: Api<KubeNode> = Api::all(client.clone());
    let node = nodes.get_opt(name.as_str()).await.map_err(Box::new)?;
    let zone = node.as_ref().and_then(|node| node.labels().get(ZONE_LABEL));
    let zone = zone.map(|zone| zone.parse::<Zone>()).transpose()?;
    Ok(NodeTopology::new(name, zone)?)
}
