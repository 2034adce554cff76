//! Publish and unpublish: a wish in `spec.attachments`, and the wait until the leader has acted on it.

use super::create::allows;
use super::volumes::{Volumes, from_kube};
use crate::replacement::{self, Sessions};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::{Resource, ResourceExt};
use lamina_control_api::leader::{Refusal, Replace, Replaced};
use lamina_crds::id::Id;
use lamina_crds::volume::{AccessMode, AttachMode, AttachmentPhase, AttachmentWish, Volume};
use lamina_csi_api::capability::VolumeUse;
use lamina_csi_api::context::{PublishContext, VolumeContext};
use lamina_csi_api::name::{NodeName, VolumeHandle};
use lamina_csi_api::v1;
use serde_json::json;
use std::num::NonZeroU64;
use tonic::Status;

/// What a ControllerPublishVolume asks for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) handle: VolumeHandle,
    node: NodeName,
    mode: AttachMode,
    wanted: VolumeUse,
}

impl Wanted {
    pub(super) fn parse(request: &v1::ControllerPublishVolumeRequest) -> Result<Self, Status> {
        lamina_csi_api::fields::required("volume_id", &request.volume_id)?;
        lamina_csi_api::fields::required("node_id", &request.node_id)?;
        let wanted = VolumeUse::parse(request.volume_capability.as_ref())?;
        VolumeContext::parse(&request.volume_context)?;
        let mode = if wanted.read_only(request.readonly) { AttachMode::ReadOnly } else { AttachMode::ReadWrite };
        Ok(Self { handle: request.volume_id.parse()?, node: request.node_id.parse()?, mode, wanted })
    }

    /// The wishes with this one among them; `None` if it stands there already.
    fn wishes(&self, volume: &Volume, session: u128) -> Result<Option<Vec<AttachmentWish>>, Status> {
        let name = volume.name_any();
        if volume.meta().deletion_timestamp.is_some() {
            return Err(Status::failed_precondition(format!("volume {name} is being deleted")));
        }
        if !allows(volume.spec.access_mode, &self.wanted) {
            let mode = volume.spec.access_mode;
            return Err(Status::invalid_argument(format!("volume {name} is {mode:?} and cannot be used like this")));
        }
        let node = self.node.as_str();
        if let Some(wish) = volume.spec.attachments.iter().find(|wish| wish.node == node) {
            let other = || Status::already_exists(format!("volume {name} is attached to {node} as {:?}", wish.mode));
            return if wish.mode == self.mode { Ok(None) } else { Err(other()) };
        }
        if let (AccessMode::ReadWriteOnce, Some(wish)) = (volume.spec.access_mode, volume.spec.attachments.first()) {
            let holder = &wish.node;
            return Err(Status::failed_precondition(format!(
                "volume {name} is attached to {holder}: detach it there first"
            )));
        }
        let mut wishes = volume.spec.attachments.clone();
        wishes.push(AttachmentWish {
            node: node.to_owned(),
            session: Id::of(session),
            mode: self.mode,
            replaced: Vec::new(),
        });
        Ok(Some(wishes))
    }
}

impl Volumes {
    pub(super) async fn attach(&self, wanted: &Wanted) -> Result<PublishContext, Status> {
        self.must_find(wanted.handle).await?;
        let node = wanted.node.as_str();
        let nodes: Api<Node> = Api::all(self.client.clone());
        if nodes.get_opt(node).await.map_err(from_kube)?.is_none() {
            return Err(Status::not_found(format!("there is no node {node}")));
        }
        let session = (self.mint)();
        let volume = self
            .wish(wanted.handle, |volume| {
                Ok(wanted.wishes(volume, session)?.map(|attachments| json!({"attachments": attachments})))
            })
            .await?;
        let wish = volume.spec.attachments.iter().find(|wish| wish.node == node);
        let session = wish.map(|wish| wish.session.clone()).ok_or_else(gone)?;
        let settled = |v: Option<&Volume>| v.is_none_or(|v| !wishes_for(v, &session) || is_settled(v, &session));
        let volume = self.wait(&volume.name_any(), "attaching", settled).await?.ok_or_else(gone)?;
        publish_context(&volume, &session)
    }

    pub(super) async fn detach(&self, handle: VolumeHandle, node: Option<&str>) -> Result<(), Status> {
        let leaves = |other: &str| node.is_none_or(|node| node == other);
        let wished = self
            .wish(handle, |volume| {
                let stay: Vec<_> = volume.spec.attachments.iter().filter(|wish| !leaves(&wish.node)).collect();
                let changed = stay.len() < volume.spec.attachments.len();
                Ok(changed.then(|| json!({"attachments": stay})))
            })
            .await;
        let volume = match wished {
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(()),
            other => other?,
        };
        self.wait(&volume.name_any(), "detaching", |v| v.is_none_or(|v| is_out(v, &leaves))).await.map(drop)
    }
}

#[tonic::async_trait]
impl Sessions for Volumes {
    async fn replace(&self, asked: &Replace) -> Result<Replaced, Refusal> {
        let handle = VolumeHandle::new(asked.volume.0);
        let volume = self.must_find(handle).await.map_err(refused)?;
        let fresh = (self.mint)();
        // Looked at for itself first: a refusal is told as one.
        if replacement::wishes(&volume, asked, fresh)?.is_some() {
            let wished = self.wish(handle, |volume| {
                let wishes = replacement::wishes(volume, asked, fresh);
                let wishes = wishes.map_err(|refusal| Status::aborted(refusal.to_string()))?;
                Ok(wishes.map(|attachments| json!({"attachments": attachments})))
            });
            wished.await.map_err(refused)?;
        }
        let settled = |v: Option<&Volume>| v.is_none_or(|v| replacement::outcome(v, asked).is_some());
        match self.wait(&volume.name_any(), "replacing the session", settled).await {
            Ok(None) => Err(Refusal::NoVolume),
            Ok(Some(volume)) => replacement::outcome(&volume, asked)
                .unwrap_or_else(|| Err(Refusal::NotYet { waits_for: replacement::waits_for(Some(&volume)) })),
            Err(status) => Err(Refusal::NotYet { waits_for: status.message().to_owned() }),
        }
    }
}

fn refused(status: Status) -> Refusal {
    match status.code() {
        tonic::Code::NotFound => Refusal::NoVolume,
        _ => Refusal::Object { why: status.message().to_owned() },
    }
}

fn gone() -> Status {
    Status::aborted("the wish to attach was taken back meanwhile")
}

fn wishes_for(volume: &Volume, session: &Id) -> bool {
    volume.spec.attachments.iter().any(|wish| wish.session == *session)
}

fn is_settled(volume: &Volume, session: &Id) -> bool {
    let attachments = volume.status.iter().flat_map(|s| &s.attachments);
    let phase = attachments.filter(|a| a.session == *session).map(|a| a.phase).next();
    matches!(phase, Some(AttachmentPhase::Attached | AttachmentPhase::Ended))
}

/// Detached = no committed map and no attachment under way names a session there (PROTOCOL.md §2: only then may another
/// node publish).
fn is_out(volume: &Volume, leaves: &impl Fn(&str) -> bool) -> bool {
    let Some(status) = &volume.status else { return true };
    let in_map = status.map.iter().flat_map(|map| &map.sessions).any(|s| leaves(&s.node));
    let ended = |phase| matches!(phase, AttachmentPhase::Detached | AttachmentPhase::Ended);
    let under_way = status.attachments.iter().any(|a| leaves(&a.node) && !ended(a.phase));
    !in_map && !under_way
}

fn publish_context(volume: &Volume, session: &Id) -> Result<PublishContext, Status> {
    let status = volume.status.as_ref().ok_or_else(gone)?;
    let attachment = status.attachments.iter().find(|a| a.session == *session).ok_or_else(gone)?;
    if attachment.phase != AttachmentPhase::Attached {
        let why = attachment.message.clone().unwrap_or_else(|| "its session was ended".to_owned());
        return Err(Status::failed_precondition(format!("volume {} cannot be used: {why}", volume.name_any())));
    }
    let generation = status.generation.and_then(|g| u64::try_from(g).ok()).and_then(NonZeroU64::new);
    let session = session.value().ok_or_else(gone)?;
    Ok(PublishContext { session, generation: generation.ok_or_else(gone)? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use v1::volume_capability::{AccessMode as WireMode, AccessType, BlockVolume, access_mode::Mode};

    fn wanted(node: &str, readonly: bool) -> Wanted {
        let capability = v1::VolumeCapability {
            access_mode: Some(WireMode { mode: Mode::SingleNodeWriter as i32 }),
            access_type: Some(AccessType::Block(BlockVolume {})),
        };
        Wanted::parse(&v1::ControllerPublishVolumeRequest {
            volume_id: format!("{:032x}", 7),
            node_id: node.to_owned(),
            volume_capability: Some(capability),
            readonly,
            ..Default::default()
        })
        .unwrap()
    }

    fn volume(spec: serde_json::Value, status: serde_json::Value) -> Volume {
        let object = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": "Volume", "metadata": {"name": "v"},
            "spec": spec, "status": status,
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_second_node_waits_until_the_first_is_out() {
        let attachments = json!([{"node": "a", "session": format!("{:032x}", 1), "mode": "ReadWrite"}]);
        let volume = volume(json!({"size": "1Gi", "policy": "p", "attachments": attachments}), json!({}));
        assert_eq!(wanted("a", false).wishes(&volume, 2).unwrap(), None, "the same call again changes nothing");
        assert_eq!(wanted("a", true).wishes(&volume, 2).unwrap_err().code(), tonic::Code::AlreadyExists);
        assert_eq!(wanted("b", false).wishes(&volume, 2).unwrap_err().code(), tonic::Code::FailedPrecondition);
    }

    #[test]
    fn a_session_still_in_the_map_is_not_out() {
        let spec = json!({"size": "1Gi", "policy": "p"});
        let attachment =
            |phase: &str| json!({"attachments": [{"session": format!("{:032x}", 1), "node": "a", "phase": phase}]});
        let out = |phase| is_out(&volume(spec.clone(), attachment(phase)), &|node| node == "a");
        assert!(!out("Detaching"));
        assert!(out("Detached"));
        assert!(is_out(&volume(spec.clone(), attachment("Attached")), &|node| node == "b"));
    }
}
