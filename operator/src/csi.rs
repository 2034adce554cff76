//! The CSI controller service: create, delete, publish, unpublish, expand, list, capacity, validate.
//!
//! Any replica answers. It writes wishes only (a `Volume` object, its size, an entry in `spec.attachments`) and waits for
//! the leader to act on them and say so in `status`; nothing is decided here and nothing of the protocol is touched.
//! Invariant: unpublish succeeds only when the session is out of a committed map (PROTOCOL.md §2, Sessions); every call
//! may be repeated and run twice at once.

use crate::csi::volumes::Volumes;
use crate::replacement::Sessions;
use lamina_csi_api::in_flight::InFlight;
use lamina_csi_api::v1::controller_server::{Controller, ControllerServer};
use lamina_csi_api::v1::{self, controller_service_capability as capability};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status};

mod attach;
mod create;
mod list;
mod volumes;

/// Calls under way at once, over all volumes; the sidecars have fewer workers than this.
const MAX_CALLS: usize = 256;

/// How long a call waits for the leader before it answers that the work goes on. Below the sidecars' own time-out, so
/// that they hear the reason and not a broken call.
const PATIENCE: Duration = Duration::from_secs(40);

/// What this service can do; each entry makes the sidecars use it.
const CAPABILITIES: [capability::rpc::Type; 9] = [
    capability::rpc::Type::CreateDeleteVolume,
    capability::rpc::Type::PublishUnpublishVolume,
    capability::rpc::Type::PublishReadonly,
    capability::rpc::Type::ListVolumes,
    capability::rpc::Type::ListVolumesPublishedNodes,
    capability::rpc::Type::GetCapacity,
    capability::rpc::Type::ExpandVolume,
    capability::rpc::Type::GetVolume,
    capability::rpc::Type::SingleNodeMultiWriter,
];

/// The service.
pub struct ControllerService {
    volumes: Volumes,
    in_flight: InFlight,
}

/// How long a replacement waits before its node asks again: below the node's own patience.
const REPLACE_PATIENCE: Duration = Duration::from_secs(30);

/// Where sessions are replaced, with Kubernetes.
pub fn sessions(client: kube::Client, mint: fn() -> u128) -> Arc<dyn Sessions> {
    Arc::new(Volumes::new(client, mint, REPLACE_PATIENCE))
}

impl ControllerService {
    /// A service on this API server. `mint` gives random ids that are never 0 and never repeat.
    pub fn new(client: kube::Client, mint: fn() -> u128) -> Self {
        Self { volumes: Volumes::new(client, mint, PATIENCE), in_flight: InFlight::new(MAX_CALLS) }
    }

    /// As a tonic service.
    pub fn into_server(self) -> ControllerServer<Self> {
        ControllerServer::new(self)
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(&self, request: Request<v1::CreateVolumeRequest>) -> Answer<v1::CreateVolumeResponse> {
        let wanted = create::Wanted::parse(request.get_ref())?;
        let _entered = self.in_flight.enter(wanted.name.clone())?;
        let volume = self.volumes.create(&wanted).await?;
        Ok(Response::new(v1::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(&self, request: Request<v1::DeleteVolumeRequest>) -> Answer<v1::DeleteVolumeResponse> {
        let id = &request.get_ref().volume_id;
        if let Some(handle) = volumes::handle_or_unknown(id)? {
            let _entered = self.in_flight.enter(handle)?;
            self.volumes.delete(handle).await?;
        }
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        request: Request<v1::ControllerPublishVolumeRequest>,
    ) -> Answer<v1::ControllerPublishVolumeResponse> {
        let wanted = attach::Wanted::parse(request.get_ref())?;
        let _entered = self.in_flight.enter(wanted.handle)?;
        let publish_context = self.volumes.attach(&wanted).await?.to_wire();
        Ok(Response::new(v1::ControllerPublishVolumeResponse { publish_context }))
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<v1::ControllerUnpublishVolumeRequest>,
    ) -> Answer<v1::ControllerUnpublishVolumeResponse> {
        let request = request.get_ref();
        if let Some(handle) = volumes::handle_or_unknown(&request.volume_id)? {
            let _entered = self.in_flight.enter(handle)?;
            let node = Some(request.node_id.as_str()).filter(|node| !node.is_empty());
            self.volumes.detach(handle, node).await?;
        }
        Ok(Response::new(v1::ControllerUnpublishVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<v1::ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<v1::ValidateVolumeCapabilitiesResponse> {
        self.volumes.validate(request.get_ref()).await.map(Response::new)
    }

    async fn list_volumes(&self, request: Request<v1::ListVolumesRequest>) -> Answer<v1::ListVolumesResponse> {
        self.volumes.list(request.get_ref()).await.map(Response::new)
    }

    async fn get_capacity(&self, request: Request<v1::GetCapacityRequest>) -> Answer<v1::GetCapacityResponse> {
        self.volumes.capacity(request.get_ref()).await.map(Response::new)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<v1::ControllerGetCapabilitiesRequest>,
    ) -> Answer<v1::ControllerGetCapabilitiesResponse> {
        let rpc = |kind: &capability::rpc::Type| v1::ControllerServiceCapability {
            r#type: Some(capability::Type::Rpc(capability::Rpc { r#type: *kind as i32 })),
        };
        let capabilities = CAPABILITIES.iter().map(rpc).collect();
        Ok(Response::new(v1::ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<v1::ControllerExpandVolumeRequest>,
    ) -> Answer<v1::ControllerExpandVolumeResponse> {
        let wanted = create::Growth::parse(request.get_ref())?;
        let _entered = self.in_flight.enter(wanted.handle)?;
        let size = self.volumes.expand(&wanted).await?;
        let capacity_bytes = lamina_csi_api::capacity::wire_bytes(size);
        Ok(Response::new(v1::ControllerExpandVolumeResponse { capacity_bytes, node_expansion_required: true }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<v1::ControllerGetVolumeRequest>,
    ) -> Answer<v1::ControllerGetVolumeResponse> {
        self.volumes.get(&request.get_ref().volume_id).await.map(Response::new)
    }
}
