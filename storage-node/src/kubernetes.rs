//! Placeholder written next: the `StorageServer` object of this node.

use crate::devices::DeviceView;
use crate::health::Asker;
use crate::serve::{Listed, ServeError};
use lamina_protocol::ids::ClusterId;
use tokio::sync::{mpsc, watch};

pub(crate) struct Own {
    pub(crate) node: String,
    pub(crate) cluster: ClusterId,
    pub(crate) data: Vec<String>,
    pub(crate) control: Vec<String>,
}

pub(crate) async fn start(
    own: Own,
    _listed: mpsc::Sender<Listed>,
    _asker: Asker,
    _views: watch::Receiver<Vec<DeviceView>>,
) -> Result<(), ServeError> {
    tracing::info!(node = own.node, cluster = %own.cluster, data = ?own.data, control = ?own.control, "kubernetes");
    Ok(())
}
