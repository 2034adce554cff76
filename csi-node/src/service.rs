//! The CSI Node service: requests read and checked, then handed to [`Node`].
//!
//! Invariants: what a request must have is asked for before anything is looked up, so an incomplete one is
//! INVALID_ARGUMENT whatever it names; a volume is changed by one call at a time, a second one is ABORTED; a change
//! that has begun is finished even when the caller goes away, and holds the volume's place until then.

use crate::node::{Node, NodeError, PublishWish, StageWish};
use crate::record::Kind;
use lamina_csi_api::capability::{Access, VolumeUse};
use lamina_csi_api::capacity::{WantedCapacity, wire_bytes};
use lamina_csi_api::context::{PublishContext, VolumeContext};
use lamina_csi_api::fields::required;
use lamina_csi_api::in_flight::InFlight;
use lamina_csi_api::name::VolumeHandle;
use lamina_csi_api::topology::NodeTopology;
use lamina_csi_api::v1;
use lamina_csi_api::v1::node_server::{Node as NodeApi, NodeServer};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Calls that change volumes at the same time; more than a node has volumes, so that recovery always has a place.
pub const MAX_CALLS: usize = 1024;

/// What the node says of itself.
#[derive(Clone, Debug)]
pub struct About {
    /// Name and zone.
    pub topology: NodeTopology,
    /// Volumes that may be attached at a time.
    pub max_volumes: u32,
}

/// The service.
#[derive(Clone)]
pub struct NodeService {
    node: Arc<Node>,
    calls: InFlight,
    about: About,
}

impl NodeService {
    /// Over these volumes, sharing the places of running calls with recovery.
    pub fn new(node: Arc<Node>, calls: InFlight, about: About) -> Self {
        Self { node, calls, about }
    }

    /// For a tonic router.
    pub fn into_server(self) -> NodeServer<Self> {
        NodeServer::new(self)
    }

    /// Run a change of a volume to its end, in its place.
    async fn change<T, F>(&self, volume: VolumeHandle, change: impl FnOnce(Arc<Node>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, NodeError>> + Send + 'static,
        T: Send + 'static,
    {
        let place = self.calls.enter(volume)?;
        let change = change(self.node.clone());
        let running = tokio::spawn(async move {
            let result = change.await;
            drop(place);
            result
        });
        let result = running.await.map_err(|error| Status::internal(format!("the call broke off: {error}")))?;
        result.map_err(|error| {
            tracing::warn!(%volume, %error, "call failed");
            error.into()
        })
    }
}

fn kind(wanted: &VolumeUse) -> Kind {
    Kind::of(wanted.filesystem())
}

fn flags(wanted: &VolumeUse) -> Vec<String> {
    match &wanted.access {
        Access::Block => Vec::new(),
        Access::Mount(mount) => mount.flags.iter().map(str::to_owned).collect(),
    }
}

fn stage_wish(request: &v1::NodeStageVolumeRequest) -> Result<StageWish, Status> {
    required("volume_id", &request.volume_id)?;
    let path = required("staging_target_path", &request.staging_target_path)?;
    let wanted = VolumeUse::parse(request.volume_capability.as_ref())?;
    let volume = request.volume_id.parse()?;
    VolumeContext::parse(&request.volume_context)?;
    let context = PublishContext::parse(&request.publish_context)?;
    let (session, generation) = (context.session, context.generation.get());
    Ok(StageWish { volume, session, generation, path: path.into(), kind: kind(&wanted), flags: flags(&wanted) })
}

fn publish_wish(request: &v1::NodePublishVolumeRequest) -> Result<PublishWish, Status> {
    required("volume_id", &request.volume_id)?;
    let target = required("target_path", &request.target_path)?;
    let wanted = VolumeUse::parse(request.volume_capability.as_ref())?;
    if request.staging_target_path.is_empty() {
        return Err(Status::failed_precondition("staging_target_path is required: volumes are staged first"));
    }
    let volume = request.volume_id.parse()?;
    VolumeContext::parse(&request.volume_context)?;
    let context = PublishContext::parse(&request.publish_context)?;
    let staged = StageWish {
        volume,
        session: context.session,
        generation: context.generation.get(),
        path: request.staging_target_path.as_str().into(),
        kind: kind(&wanted),
        flags: flags(&wanted),
    };
    let read_only = wanted.read_only(request.readonly);
    Ok(PublishWish { staged, target: target.into(), read_only, alone: wanted.mode.single_workload() })
}

/// A handle that is none of ours names a volume that was never here.
fn handle_or_unknown(text: &str) -> Option<VolumeHandle> {
    text.parse().ok()
}

#[tonic::async_trait]
impl NodeApi for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<v1::NodeStageVolumeRequest>,
    ) -> Result<Response<v1::NodeStageVolumeResponse>, Status> {
        let wish = stage_wish(request.get_ref())?;
        self.change(wish.volume, |node| async move { Box::pin(node.stage(&wish)).await }).await?;
        Ok(Response::new(v1::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<v1::NodeUnstageVolumeRequest>,
    ) -> Result<Response<v1::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        required("staging_target_path", &request.staging_target_path)?;
        if let Some(volume) = handle_or_unknown(&request.volume_id) {
            self.change(volume, |node| async move { node.unstage(volume).await }).await?;
        }
        Ok(Response::new(v1::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<v1::NodePublishVolumeRequest>,
    ) -> Result<Response<v1::NodePublishVolumeResponse>, Status> {
        let wish = publish_wish(request.get_ref())?;
        self.change(wish.staged.volume, |node| async move { Box::pin(node.publish(&wish)).await }).await?;
        Ok(Response::new(v1::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<v1::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<v1::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let target = PathBuf::from(required("target_path", &request.target_path)?);
        if let Some(volume) = handle_or_unknown(&request.volume_id) {
            self.change(volume, |node| async move { node.unpublish(volume, &target).await }).await?;
        }
        Ok(Response::new(v1::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<v1::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<v1::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let path = required("volume_path", &request.volume_path)?;
        let volume = request.volume_id.parse()?;
        let (usage, is_filesystem, health) = self.node.stats(volume, Path::new(path)).await?;
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let entry = |unit: v1::volume_usage::Unit, available, total, used| v1::VolumeUsage {
            available: number(available),
            total: number(total),
            used: number(used),
            unit: unit.into(),
        };
        use v1::volume_usage::Unit;
        let mut usages = vec![entry(Unit::Bytes, usage.bytes_free, usage.bytes, usage.bytes_used)];
        if is_filesystem && usage.files > 0 {
            let used = usage.files.saturating_sub(usage.files_free);
            usages.push(entry(Unit::Inodes, usage.files_free, usage.files, used));
        }
        let condition = v1::VolumeCondition { abnormal: health.abnormal, message: health.message };
        Ok(Response::new(v1::NodeGetVolumeStatsResponse { usage: usages, volume_condition: Some(condition) }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<v1::NodeExpandVolumeRequest>,
    ) -> Result<Response<v1::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let path = PathBuf::from(required("volume_path", &request.volume_path)?);
        let volume: VolumeHandle = request.volume_id.parse()?;
        WantedCapacity::parse(request.capacity_range.as_ref())?;
        let range = request.capacity_range.unwrap_or_default();
        let least = u64::try_from(range.required_bytes).unwrap_or(0);
        let size = self.change(volume, |node| async move { node.expand(volume, &path, least).await }).await?;
        Ok(Response::new(v1::NodeExpandVolumeResponse { capacity_bytes: wire_bytes(size) }))
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<v1::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<v1::NodeGetCapabilitiesResponse>, Status> {
        use v1::node_service_capability::rpc::Type as Rpc;
        use v1::node_service_capability::{Rpc as RpcMessage, Type};
        let capability =
            |kind: Rpc| v1::NodeServiceCapability { r#type: Some(Type::Rpc(RpcMessage { r#type: kind.into() })) };
        let all = [
            Rpc::StageUnstageVolume,
            Rpc::GetVolumeStats,
            Rpc::ExpandVolume,
            Rpc::VolumeCondition,
            Rpc::SingleNodeMultiWriter,
        ];
        Ok(Response::new(v1::NodeGetCapabilitiesResponse { capabilities: all.map(capability).into() }))
    }

    async fn node_get_info(
        &self,
        _request: Request<v1::NodeGetInfoRequest>,
    ) -> Result<Response<v1::NodeGetInfoResponse>, Status> {
        Ok(Response::new(v1::NodeGetInfoResponse {
            node_id: self.about.topology.node().to_string(),
            max_volumes_per_node: self.about.max_volumes.into(),
            accessible_topology: Some(self.about.topology.to_wire()),
        }))
    }
}
