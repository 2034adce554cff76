//! What there is: volumes, capacity, and whether a volume can be used in a certain way.

use super::create::allows;
use super::volumes::{Volumes, from_kube, handle_of, troubles};
use kube::api::{Api, ListParams};
use lamina_crds::replication_policy::ReplicationPolicy;
use lamina_crds::storage_server::{ServerState, StorageServer};
use lamina_crds::volume::{AttachmentPhase, Volume, VolumeState};
use lamina_csi_api::capability::VolumeUse;
use lamina_csi_api::capacity::wire_bytes;
use lamina_csi_api::context::{CreateParameters, VolumeContext};
use lamina_csi_api::name::VolumeHandle;
use lamina_csi_api::v1;
use tonic::Status;

/// Volumes on one page of a list when the caller sets no limit.
const PAGE: u32 = 500;

impl Volumes {
    pub(super) async fn list(&self, request: &v1::ListVolumesRequest) -> Result<v1::ListVolumesResponse, Status> {
        let limit = u32::try_from(request.max_entries)
            .map_err(|_| Status::invalid_argument(format!("max_entries is {}, below zero", request.max_entries)))?;
        let limit = if limit == 0 { PAGE } else { limit.min(PAGE) };
        let mut params = ListParams::default().limit(limit);
        if !request.starting_token.is_empty() {
            params = params.continue_token(&request.starting_token);
        }
        let listed = self.api.list(&params).await.map_err(|error| match error {
            // A token that is not one, or too old: the caller begins again.
            kube::Error::Api(response) if matches!(response.code, 400 | 410) && !request.starting_token.is_empty() => {
                Status::aborted(format!("starting_token is not valid: {}", response.message))
            }
            other => from_kube(other),
        })?;
        let next_token = listed.metadata.continue_.clone().unwrap_or_default();
        let there = listed.items.iter().filter(|v| v.metadata.deletion_timestamp.is_none() && handle_of(v).is_some());
        let entries = there.map(|volume| v1::list_volumes_response::Entry {
            volume: Some(self.as_wire(volume)),
            status: Some(v1::list_volumes_response::VolumeStatus {
                published_node_ids: nodes_of(volume),
                volume_condition: Some(condition_of(volume)),
            }),
        });
        Ok(v1::ListVolumesResponse { entries: entries.collect(), next_token })
    }

    pub(super) async fn get(&self, id: &str) -> Result<v1::ControllerGetVolumeResponse, Status> {
        lamina_csi_api::fields::required("volume_id", id)?;
        let handle: VolumeHandle = id.parse()?;
        let volume = self.must_find(handle).await?;
        let status = v1::controller_get_volume_response::VolumeStatus {
            published_node_ids: nodes_of(&volume),
            volume_condition: Some(condition_of(&volume)),
        };
        Ok(v1::ControllerGetVolumeResponse { volume: Some(self.as_wire(&volume)), status: Some(status) })
    }

    pub(super) async fn validate(
        &self,
        request: &v1::ValidateVolumeCapabilitiesRequest,
    ) -> Result<v1::ValidateVolumeCapabilitiesResponse, Status> {
        lamina_csi_api::fields::required("volume_id", &request.volume_id)?;
        let uses = VolumeUse::parse_all(&request.volume_capabilities)?;
        VolumeContext::parse(&request.volume_context)?;
        let parameters = CreateParameters::parse_if_any(&request.parameters)?;
        let volume = self.must_find(request.volume_id.parse()?).await?;
        let other_policy = parameters.is_some_and(|p| p.policy.as_str() != volume.spec.policy);
        let refused = uses.iter().find(|wanted| !allows(volume.spec.access_mode, wanted));
        let message = match (other_policy, refused) {
            (true, _) => format!("the volume has the policy {}", volume.spec.policy),
            (false, Some(_)) => format!("the volume is {:?}", volume.spec.access_mode),
            (false, None) => {
                let confirmed = v1::validate_volume_capabilities_response::Confirmed {
                    volume_context: request.volume_context.clone(),
                    volume_capabilities: request.volume_capabilities.clone(),
                    parameters: request.parameters.clone(),
                    mutable_parameters: request.mutable_parameters.clone(),
                };
                return Ok(v1::ValidateVolumeCapabilitiesResponse {
                    confirmed: Some(confirmed),
                    message: String::new(),
                });
            }
        };
        Ok(v1::ValidateVolumeCapabilitiesResponse { confirmed: None, message })
    }

    /// Room for one more volume of a policy, in bytes: what is free on healthy, schedulable servers over its copies. An
    /// estimate; a CreateVolume decides.
    pub(super) async fn capacity(&self, request: &v1::GetCapacityRequest) -> Result<v1::GetCapacityResponse, Status> {
        if !request.volume_capabilities.is_empty() {
            VolumeUse::parse_all(&request.volume_capabilities)?;
        }
        let parameters = CreateParameters::parse_if_any(&request.parameters)?;
        let copies = match parameters {
            Some(parameters) => self.copies_of(parameters.policy.as_str()).await?,
            None => 1,
        };
        let servers: Api<StorageServer> = Api::all(self.client.clone());
        let servers = servers.list(&ListParams::default()).await.map_err(from_kube)?.items;
        let mut free: Vec<u64> = servers.iter().filter_map(free_bytes).collect();
        free.sort_unstable();
        let room = if free.len() < copies { 0 } else { free.iter().sum::<u64>() / copies as u64 };
        Ok(v1::GetCapacityResponse {
            available_capacity: wire_bytes(room.min(i64::MAX.unsigned_abs())),
            maximum_volume_size: None,
            minimum_volume_size: None,
        })
    }

    async fn copies_of(&self, policy: &str) -> Result<usize, Status> {
        let policies: Api<ReplicationPolicy> = Api::all(self.client.clone());
        let found = policies.get_opt(policy).await.map_err(from_kube)?;
        let found = found.ok_or_else(|| Status::invalid_argument(format!("there is no ReplicationPolicy {policy}")))?;
        Ok(usize::try_from(found.spec.copies).unwrap_or(1).max(1))
    }
}

fn free_bytes(server: &StorageServer) -> Option<u64> {
    let status = server.status.as_ref().filter(|s| s.state == Some(ServerState::Ready))?;
    let free = status.capacity_bytes? - status.used_bytes.unwrap_or(0);
    (server.spec.schedulable && !server.spec.drain).then(|| u64::try_from(free).unwrap_or(0))
}

fn nodes_of(volume: &Volume) -> Vec<String> {
    let attachments = volume.status.iter().flat_map(|s| &s.attachments);
    let attached = attachments.filter(|a| matches!(a.phase, AttachmentPhase::Attached | AttachmentPhase::Held));
    attached.map(|a| a.node.clone()).collect()
}

fn condition_of(volume: &Volume) -> v1::VolumeCondition {
    let state = volume.status.as_ref().and_then(|s| s.state);
    let abnormal = !matches!(state, None | Some(VolumeState::Healthy | VolumeState::Pending));
    let message = troubles(volume);
    let message = if message.is_empty() { "every copy serves".to_owned() } else { message };
    v1::VolumeCondition { abnormal, message }
}
