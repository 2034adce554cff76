//! From API objects to what the leader is handed: wishes, policies, servers. Maps are in `lamina_crds::translate`.
//!
//! Invariant: the shape copied into a volume wins over its policy, so a policy made anew under the same name changes no
//! volume.

use kube::ResourceExt;
use lamina_crds::replication_policy::{Locality, RebuildLimit, ReplicationPolicy, TopologySpread};
use lamina_crds::translate::{self as maps, Unreadable};
use lamina_crds::volume::{AccessMode, AttachmentWish, Shape, Volume};
use lamina_crds::{Id, Size, StorageServer};
use lamina_protocol::control::FillLimit;
use lamina_protocol::ids::{CopyId, Generation, ServerId, SessionId, VolumeId};
use lamina_protocol::management::{
    Condition, ConditionKind, Force, Policy, ServerObject, SessionWish, Status, VolumeObject, Wishes, ZoneSpread,
};

use crate::store::{KnownDevice, KnownServer};

/// What rules a volume whose policy is gone, beside its shape: as the policy's defaults.
const DEFAULT_REBUILD_AFTER_MS: u64 = 600_000;

/// A volume's object for the leader. `None` = no id was minted yet.
///
/// # Errors
/// [`Unreadable`]: the object is to be left alone.
pub fn volume_object(
    volume: &Volume,
    policy: Option<&ReplicationPolicy>,
    near_zone: &str,
    id_is_new: bool,
) -> Result<Option<VolumeObject>, Unreadable> {
    let Some(status) = &volume.status else { return Ok(None) };
    let Some(id) = maps::volume_id(status)? else { return Ok(None) };
    let status: Status = maps::protocol_status(status)?;
    let wishes = wishes(volume, policy, near_zone)?;
    // A number in every API server there is, and from Kubernetes 1.35 on promised to be one. A directory has none.
    let version = volume.resource_version().and_then(|version| version.parse().ok()).unwrap_or(0);
    Ok(Some(VolumeObject { id, name: volume.name_any(), id_is_new, version, wishes, status }))
}

fn wishes(volume: &Volume, policy: Option<&ReplicationPolicy>, near_zone: &str) -> Result<Wishes, Unreadable> {
    let spec = &volume.spec;
    let near = spec.near.as_ref();
    Ok(Wishes {
        size: bytes(&spec.size, "spec.size")?,
        policy: policy_of(volume.status.as_ref().and_then(|s| s.shape.as_ref()), policy)?,
        multi_session: spec.access_mode != AccessMode::ReadWriteOnce,
        sessions: spec.attachments.iter().map(session_wish).collect::<Result<_, _>>()?,
        near_node: near.and_then(|near| near.node.clone()).unwrap_or_default(),
        near_zone: near.and_then(|near| near.zone.clone()).unwrap_or_else(|| near_zone.to_owned()),
        deleted: volume.metadata.deletion_timestamp.is_some(),
        let_go: spec.forget.iter().map(|copy| id(CopyId, copy, "spec.forget")).collect::<Result<_, _>>()?,
        adopt: spec.adopt_generation.map(|g| number(g, "spec.adoptGeneration").map(Generation)).transpose()?,
        force: spec.force.as_ref().filter(|f| f.others_are_stopped).map(force).transpose()?,
        delete_kept: spec.delete_copies.iter().map(|c| id(CopyId, c, "spec.deleteCopies")).collect::<Result<_, _>>()?,
    })
}

fn force(wish: &lamina_crds::volume::Force) -> Result<Force, Unreadable> {
    Ok(Force {
        generation: number(wish.generation, "spec.force.generation").map(Generation)?,
        copies: wish.copies.iter().map(|copy| id(CopyId, copy, "spec.force.copies")).collect::<Result<_, _>>()?,
    })
}

fn session_wish(wish: &AttachmentWish) -> Result<SessionWish, Unreadable> {
    Ok(SessionWish {
        id: id(SessionId, &wish.session, "spec.attachments.session")?,
        node: wish.node.clone(),
        mode: maps::attach_wish_mode(wish.mode),
    })
}

/// A policy as a volume without a shape of its own would have it.
pub fn plain_policy(policy: &ReplicationPolicy) -> Option<Policy> {
    policy_of(None, Some(policy)).ok().flatten()
}

fn policy_of(shape: Option<&Shape>, policy: Option<&ReplicationPolicy>) -> Result<Option<Policy>, Unreadable> {
    let shape = match (shape, policy) {
        (Some(shape), _) => *shape,
        (None, Some(policy)) => shape_of(policy)?,
        (None, None) => return Ok(None),
    };
    let spec = policy.map(|policy| &policy.spec);
    let rebuild_after_ms =
        spec.map(|s| number::<u64>(s.rebuild_after_seconds, "spec.rebuildAfterSeconds")).transpose()?;
    Ok(Some(Policy {
        copies: number(shape.copies.into(), "copies")?,
        groups: number(shape.stripe_width.into(), "stripeWidth")?,
        chunk_bytes: number(shape.chunk_bytes.into(), "chunkBytes")?,
        page_bytes: number(shape.page_bytes.into(), "pageBytes")?,
        zones: match shape.topology_spread {
            TopologySpread::PreferZones => ZoneSpread::Prefer,
            TopologySpread::RequireZones => ZoneSpread::Require,
        },
        locality: spec.is_none_or(|s| s.locality == Locality::PreferLocal),
        overcommit_percent: spec.map_or(Ok(100), |s| number(s.overcommit_percent.into(), "overcommitPercent"))?,
        rebuild_after_ms: rebuild_after_ms.map_or(DEFAULT_REBUILD_AFTER_MS, |s| s.saturating_mul(1000)),
        fill_limit: spec.map(|s| fill_limit(&s.rebuild_limit)).transpose()?.unwrap_or_default(),
    }))
}

fn fill_limit(limit: &RebuildLimit) -> Result<FillLimit, Unreadable> {
    let bytes = limit.bytes_per_second.as_ref().map(|size| bytes(size, "spec.rebuildLimit.bytesPerSecond"));
    let pages = limit.parallel_pages.map(|n| number(n.into(), "spec.rebuildLimit.parallelPages"));
    Ok(FillLimit { bytes_per_second: bytes.transpose()?.unwrap_or(0), pages: pages.transpose()?.unwrap_or(0) })
}

/// The shape that a volume takes over from its policy.
///
/// # Errors
/// [`Unreadable::Size`] or [`Unreadable::Number`]: the policy is as good as none.
pub fn shape_of(policy: &ReplicationPolicy) -> Result<Shape, Unreadable> {
    let spec = &policy.spec;
    let narrow = |size: &Size, field| {
        bytes(size, field).and_then(|b| {
            i32::try_from(b).map_err(|_| Unreadable::Number { field, value: i64::try_from(b).unwrap_or(i64::MAX) })
        })
    };
    Ok(Shape {
        copies: spec.copies,
        stripe_width: spec.stripe_width,
        chunk_bytes: narrow(&spec.chunk, "spec.chunk")?,
        page_bytes: narrow(&spec.page_size, "spec.pageSize")?,
        topology_spread: spec.topology_spread,
    })
}

/// A server's object. `node_zone` is the zone of its Node, used where the object names none.
///
/// # Errors
/// [`Unreadable::Id`]: the object is to be left alone.
pub fn known_server(server: &StorageServer, node_zone: &str) -> Result<KnownServer, Unreadable> {
    let name = server.name_any();
    let status = server.status.as_ref();
    let addresses = status.and_then(|s| s.addresses.as_ref());
    let zone = server.spec.zone.clone().filter(|zone| !zone.is_empty());
    let server_id = status.and_then(|s| s.server_id.as_ref());
    let device = |d: &lamina_crds::storage_server::DeviceStatus| KnownDevice {
        path: d.path.clone(),
        state: d.state,
        reason: d.reason.clone().unwrap_or_default(),
    };
    Ok(KnownServer {
        devices: status.map(|s| s.devices.iter().map(device).collect()).unwrap_or_default(),
        control: addresses.map(|a| a.control.clone()).unwrap_or_default(),
        object: ServerObject {
            id: server_id.map_or(Ok(ServerId::NONE), |text| id(ServerId, text, "status.serverId"))?,
            addresses: addresses.map(|a| a.data.clone()).unwrap_or_default(),
            zone: zone.unwrap_or_else(|| node_zone.to_owned()),
            node: name.clone(),
            schedulable: server.spec.schedulable,
            drain: server.spec.drain,
        },
        name,
    })
}

/// A condition's type, as Kubernetes spells it.
#[must_use]
pub fn condition_type(kind: ConditionKind) -> String {
    format!("{kind:?}")
}

/// A condition's reason, as Kubernetes spells it.
#[must_use]
pub fn condition_reason(condition: &Condition) -> String {
    format!("{:?}", condition.reason)
}

/// The id that an object carries, if it reads as one.
#[must_use]
pub fn id_of(volume: &Volume) -> Option<VolumeId> {
    volume.status.as_ref()?.volume_id.as_ref()?.value().map(VolumeId)
}

fn id<T>(make: fn(u128) -> T, text: &Id, field: &'static str) -> Result<T, Unreadable> {
    text.value().map(make).ok_or(Unreadable::Id { field })
}

fn number<T: TryFrom<i64>>(value: i64, field: &'static str) -> Result<T, Unreadable> {
    T::try_from(value).map_err(|_| Unreadable::Number { field, value })
}

fn bytes(size: &Size, field: &'static str) -> Result<u64, Unreadable> {
    size.bytes().map_err(|_| Unreadable::Size { field })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn volume(spec: Value, status: Value) -> Volume {
        let object = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": "Volume", "metadata": {"name": "v"},
            "spec": spec, "status": status,
        });
        serde_json::from_value(object).unwrap()
    }

    fn policy(spec: Value) -> ReplicationPolicy {
        let kind = "ReplicationPolicy";
        let object = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": kind, "metadata": {"name": "p"}, "spec": spec,
        });
        serde_json::from_value(object).unwrap()
    }

    fn id(n: u8) -> String {
        format!("{n:032x}")
    }

    #[test]
    fn a_policy_made_anew_does_not_change_the_shape_of_a_placed_volume() {
        let shape = json!({"copies": 3, "stripeWidth": 4, "chunkBytes": 65536, "pageBytes": 1048576,
                           "topologySpread": "RequireZones"});
        let spec = json!({"size": "1Gi", "policy": "p"});
        let placed = volume(spec.clone(), json!({"volumeId": id(1), "shape": shape}));
        let limit = json!({"bytesPerSecond": "2Mi", "parallelPages": 3});
        let anew = policy(json!({"copies": 1, "rebuildAfterSeconds": 7, "rebuildLimit": limit}));
        let wished = volume_object(&placed, Some(&anew), "", false).unwrap().unwrap().wishes.policy.unwrap();
        assert_eq!((wished.copies, wished.groups, wished.zones), (3, 4, ZoneSpread::Require));
        assert_eq!(wished.rebuild_after_ms, 7000, "what is no shape holds at once");
        assert_eq!(wished.fill_limit, FillLimit { bytes_per_second: 2 << 20, pages: 3 });
        let unplaced = volume(spec, json!({"volumeId": id(1)}));
        let wished = volume_object(&unplaced, Some(&anew), "", false).unwrap().unwrap().wishes;
        assert_eq!(wished.policy.unwrap().copies, 1);
        let without = volume_object(&unplaced, None, "", false).unwrap().unwrap().wishes;
        assert_eq!(without.policy, None, "an unknown policy is none");
    }

    #[test]
    fn wishes_are_read_in_order_and_a_bad_id_leaves_the_volume_alone() {
        let wish = |node: &str, session: String| json!({"node": node, "session": session, "mode": "ReadOnly"});
        let spec = |attachments: Value| {
            json!({
                "size": "5G", "policy": "p", "accessMode": "ReadOnlyMany", "attachments": attachments,
                "forget": [id(9)], "adoptGeneration": 4, "near": {"node": "b"},
            })
        };
        let good = volume(spec(json!([wish("b", id(2)), wish("a", id(1))])), json!({"volumeId": id(7)}));
        let wishes = volume_object(&good, None, "z", true).unwrap().unwrap().wishes;
        assert_eq!(wishes.sessions.iter().map(|s| s.node.as_str()).collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!((wishes.size, wishes.multi_session, wishes.near_zone.as_str()), (5_000_000_000, true, "z"));
        assert_eq!((wishes.let_go, wishes.adopt), (vec![CopyId(9)], Some(Generation(4))));
        let bad = volume(spec(json!([wish("b", "zz".to_owned())])), json!({"volumeId": id(7)}));
        let why = volume_object(&bad, None, "", true).unwrap_err();
        assert_eq!(why, Unreadable::Id { field: "spec.attachments.session" });
    }
}
