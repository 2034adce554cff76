//! Volumes that come, grow and go.

use super::volumes::{Volumes, condition, from_kube, handle_of, size_of};
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Resource, ResourceExt};
use lamina_crds::condition::ConditionStatus;
use lamina_crds::size::Size;
use lamina_crds::volume::{AccessMode, Near, Volume, VolumeSpec};
use lamina_csi_api::capability::VolumeUse;
use lamina_csi_api::capacity::{VolumeSizes, WantedCapacity, wire_bytes};
use lamina_csi_api::context::{CreateParameters, VolumeContext};
use lamina_csi_api::name::{RequestName, VolumeHandle};
use lamina_csi_api::topology::{Place, wanted_places};
use lamina_csi_api::v1;
use lamina_protocol::ids::VolumeId;
use serde_json::json;
use tonic::Status;

/// Sizes a volume can have, as the CRD's bounds say.
const SIZES: VolumeSizes = VolumeSizes { smallest: 1 << 20, usual: 1 << 30, largest: 64 << 40 };
/// Whom a volume was made for; for people.
const CLAIM_ANNOTATION: &str = "lamina.dev/claim";

/// What a CreateVolume asks for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) name: RequestName,
    parameters: CreateParameters,
    capacity: WantedCapacity,
    access_mode: AccessMode,
    near: Option<Place>,
}

/// What a ControllerExpandVolume asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growth {
    pub(super) handle: VolumeHandle,
    capacity: WantedCapacity,
}

/// The access mode of the object that allows all the uses asked for.
fn access_mode(uses: &[VolumeUse]) -> AccessMode {
    if uses.iter().any(|u| u.mode.several_nodes() && !u.mode.read_only()) {
        AccessMode::ReadWriteMany
    } else if uses.iter().any(|u| u.mode.several_nodes()) {
        AccessMode::ReadOnlyMany
    } else {
        AccessMode::ReadWriteOnce
    }
}

/// Whether an object of this access mode can be used so.
pub(super) fn allows(mode: AccessMode, wanted: &VolumeUse) -> bool {
    match mode {
        AccessMode::ReadWriteMany => true,
        AccessMode::ReadOnlyMany => wanted.mode.read_only(),
        AccessMode::ReadWriteOnce => !wanted.mode.several_nodes(),
    }
}

impl Wanted {
    pub(super) fn parse(request: &v1::CreateVolumeRequest) -> Result<Self, Status> {
        let name: RequestName = request.name.parse()?;
        let uses = VolumeUse::parse_all(&request.volume_capabilities)?;
        let capacity = WantedCapacity::parse(request.capacity_range.as_ref())?;
        let parameters = CreateParameters::parse(&request.parameters)?;
        if request.volume_content_source.is_some() {
            return Err(Status::invalid_argument(
                "volume_content_source is not supported yet: leave it out, the volume starts empty",
            ));
        }
        let near = wanted_places(request.accessibility_requirements.as_ref())?.into_iter().next();
        Ok(Self { name, parameters, capacity, access_mode: access_mode(&uses), near })
    }

    fn object(&self, size: u64) -> Volume {
        let near = self.near.as_ref().map(|place| Near {
            node: place.node.as_ref().map(|node| node.as_str().to_owned()),
            zone: place.zone.as_ref().map(|zone| zone.as_str().to_owned()),
        });
        let spec = VolumeSpec {
            size: Size::of_bytes(size),
            policy: self.parameters.policy.as_str().to_owned(),
            access_mode: self.access_mode,
            source: None,
            near,
            attachments: Vec::new(),
            forget: Vec::new(),
            adopt_generation: None,
            force: None,
            delete_copies: Vec::new(),
        };
        let mut volume = Volume::new(&self.name.object_name(), spec);
        if let Some(claim) = &self.parameters.claim {
            let claim = format!("{}/{}", claim.namespace, claim.name);
            volume.annotations_mut().insert(CLAIM_ANNOTATION.to_owned(), claim);
        }
        volume
    }

    /// The same name with other parameters is another volume's.
    fn fits(&self, volume: &Volume) -> Result<(), Status> {
        let taken =
            |what: &str| Status::already_exists(format!("volume {} exists with another {what}", volume.name_any()));
        if volume.spec.policy != self.parameters.policy.as_str() {
            return Err(taken("policy"));
        }
        if volume.spec.access_mode != self.access_mode {
            return Err(taken("access mode"));
        }
        let size = volume.spec.size.bytes().map_err(|e| Status::internal(e.to_string()))?;
        if self.capacity.admits(size) { Ok(()) } else { Err(taken("size")) }
    }
}

impl Growth {
    pub(super) fn parse(request: &v1::ControllerExpandVolumeRequest) -> Result<Self, Status> {
        lamina_csi_api::fields::required("volume_id", &request.volume_id)?;
        let capacity = WantedCapacity::parse_required(request.capacity_range.as_ref())?;
        Ok(Self { handle: request.volume_id.parse()?, capacity })
    }
}

impl Volumes {
    pub(super) async fn create(&self, wanted: &Wanted) -> Result<v1::Volume, Status> {
        let name = wanted.name.object_name();
        let volume = match self.api.get_opt(&name).await.map_err(from_kube)? {
            Some(volume) => volume,
            None => self.make(wanted).await?,
        };
        wanted.fits(&volume)?;
        if volume.meta().deletion_timestamp.is_some() {
            return Err(Status::aborted(format!("volume {name} is being deleted, try again when it is gone")));
        }
        let volume = self.wait(&name, "placing", |v| v.is_none_or(|v| is_placed(v) || refusal(v).is_some())).await?;
        let volume = volume.ok_or_else(|| Status::aborted(format!("volume {name} was deleted meanwhile")))?;
        if let Some(refusal) = refusal(&volume).filter(|_| !is_placed(&volume)) {
            self.take_back(&volume).await?;
            return Err(refusal);
        }
        Ok(self.as_wire(&volume))
    }

    async fn make(&self, wanted: &Wanted) -> Result<Volume, Status> {
        let object = wanted.object(wanted.capacity.choose(&SIZES)?);
        match self.api.create(&PostParams::default(), &object).await {
            Ok(volume) => Ok(volume),
            Err(kube::Error::Api(response)) if response.code == 409 => {
                self.api.get(&object.name_any()).await.map_err(from_kube)
            }
            Err(error) => Err(from_kube(error)),
        }
    }

    /// A claim whose volume cannot be placed is tried again by the provisioner, perhaps elsewhere; until then nothing
    /// stays behind. Only an object that nothing was ever placed for goes, and only as it was read.
    async fn take_back(&self, volume: &Volume) -> Result<(), Status> {
        let preconditions = Preconditions { resource_version: volume.resource_version(), uid: volume.uid() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match self.api.delete(&volume.name_any(), &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(response)) if matches!(response.code, 404 | 409) => Ok(()),
            Err(error) => Err(from_kube(error)),
        }
    }

    /// A volume as CSI shows it. Every node can attach it, so no topology binds it to one.
    pub(super) fn as_wire(&self, volume: &Volume) -> v1::Volume {
        v1::Volume {
            capacity_bytes: wire_bytes(size_of(volume)),
            volume_id: handle_of(volume).map(|handle| handle.to_string()).unwrap_or_default(),
            volume_context: VolumeContext { object: Some(volume.name_any()) }.to_wire(),
            content_source: None,
            accessible_topology: Vec::new(),
        }
    }

    pub(super) async fn delete(&self, handle: VolumeHandle) -> Result<(), Status> {
        let Some(volume) = self.find(handle).await? else { return Ok(()) };
        let name = volume.name_any();
        if !volume.spec.attachments.is_empty() {
            let nodes: Vec<&str> = volume.spec.attachments.iter().map(|a| a.node.as_str()).collect();
            let nodes = nodes.join(", ");
            let text = format!("volume {name} is in use on node {nodes}: delete the pods that use it first");
            let text = crate::pv::named(&self.client, VolumeId(handle.id()), &text).await;
            return Err(Status::failed_precondition(text));
        }
        let uid = volume.uid();
        let preconditions = Preconditions { resource_version: None, uid: uid.clone() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match self.api.delete(&name, &params).await {
            Ok(_) => {}
            Err(kube::Error::Api(response)) if matches!(response.code, 404 | 409) => return Ok(()),
            Err(error) => return Err(from_kube(error)),
        }
        // Gone is only what no storage server holds any more: the finalizer waits for each of them (R14).
        self.wait(&name, "deletion", |v| v.is_none_or(|v| v.uid() != uid)).await.map(drop)
    }

    pub(super) async fn expand(&self, wanted: &Growth) -> Result<u64, Status> {
        let size = std::sync::atomic::AtomicU64::new(0);
        let volume = self
            .wish(wanted.handle, |volume| {
                let now = volume.spec.size.bytes().map_err(|e| Status::internal(e.to_string()))?;
                let grown = wanted.capacity.grow(now, &SIZES)?;
                size.store(grown, std::sync::atomic::Ordering::Relaxed);
                Ok((grown > now).then(|| json!({"size": Size::of_bytes(grown)})))
            })
            .await?;
        let size = size.into_inner();
        let grown = |v: Option<&Volume>| v.is_none_or(|v| size_of(v) >= size && is_placed(v));
        let volume = self.wait(&volume.name_any(), "growth", grown).await?;
        volume.map(|v| size_of(&v)).ok_or_else(|| Status::not_found("the volume was deleted meanwhile"))
    }
}

/// A map is committed: every copy has its place.
fn is_placed(volume: &Volume) -> bool {
    handle_of(volume).is_some() && volume.status.as_ref().is_some_and(|s| s.map.is_some())
}

/// Why a volume cannot be placed, as CSI says it; `None` while it may yet be.
fn refusal(volume: &Volume) -> Option<Status> {
    let placed = condition(volume, "Placed").filter(|c| c.status == ConditionStatus::False)?;
    let text = format!("{}: {}", placed.reason, placed.message);
    match placed.reason.as_str() {
        "UnknownPolicy" | "InvalidWish" => Some(Status::invalid_argument(text)),
        "TooLarge" | "TooFewServers" | "TooFewZones" => Some(Status::resource_exhausted(text)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::HashMap;
    use v1::volume_capability::{AccessMode as WireMode, AccessType, BlockVolume, access_mode::Mode};

    fn request(mode: Mode, required: i64) -> v1::CreateVolumeRequest {
        let capability = v1::VolumeCapability {
            access_mode: Some(WireMode { mode: mode as i32 }),
            access_type: Some(AccessType::Block(BlockVolume {})),
        };
        v1::CreateVolumeRequest {
            name: "pvc-1".into(),
            capacity_range: Some(v1::CapacityRange { required_bytes: required, limit_bytes: 0 }),
            volume_capabilities: vec![capability],
            parameters: HashMap::from([("policy".to_owned(), "two".to_owned())]),
            ..Default::default()
        }
    }

    #[test]
    fn the_same_name_with_other_parameters_is_taken() {
        let wanted = Wanted::parse(&request(Mode::SingleNodeWriter, 1 << 30)).unwrap();
        let volume = wanted.object(1 << 30);
        assert!(wanted.fits(&volume).is_ok());
        let larger = Wanted::parse(&request(Mode::SingleNodeWriter, 2 << 30)).unwrap();
        assert_eq!(larger.fits(&volume).unwrap_err().code(), tonic::Code::AlreadyExists);
        let shared = Wanted::parse(&request(Mode::MultiNodeMultiWriter, 1 << 30)).unwrap();
        assert_eq!(shared.fits(&volume).unwrap_err().code(), tonic::Code::AlreadyExists);
    }

    #[test]
    fn a_volume_made_from_something_is_refused_until_snapshots_land() {
        let mut request = request(Mode::SingleNodeWriter, 1 << 30);
        request.volume_content_source = Some(v1::VolumeContentSource { r#type: None });
        assert_eq!(Wanted::parse(&request).unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn what_several_nodes_write_needs_a_shared_volume() {
        let mode = |mode| Wanted::parse(&request(mode, 0)).unwrap().access_mode;
        assert_eq!(mode(Mode::SingleNodeSingleWriter), AccessMode::ReadWriteOnce);
        assert_eq!(mode(Mode::MultiNodeReaderOnly), AccessMode::ReadOnlyMany);
        assert_eq!(mode(Mode::MultiNodeSingleWriter), AccessMode::ReadWriteMany);
    }
}
