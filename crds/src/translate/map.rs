//! The configuration map, field by field.

use lamina_protocol::ids::{BootId, CopyId, Generation, Incarnation, LayerId, ServerId, SessionId, VolumeId};
use lamina_protocol::map as core;

use super::{Unreadable, id, number, shown};
use crate::id::Id;
use crate::volume::AttachMode;
use crate::volume::map as api;

/// What an attachment may do, as the protocol says it.
pub fn attach_wish_mode(mode: AttachMode) -> core::AccessMode {
    match mode {
        AttachMode::ReadWrite => core::AccessMode::ReadWrite,
        AttachMode::ReadOnly => core::AccessMode::ReadOnly,
    }
}

/// What an attachment may do, as the API says it.
pub fn attach_mode(mode: core::AccessMode) -> AttachMode {
    match mode {
        core::AccessMode::ReadWrite => AttachMode::ReadWrite,
        core::AccessMode::ReadOnly => AttachMode::ReadOnly,
    }
}

fn each<A, B>(list: &[A], read: fn(&A) -> Result<B, Unreadable>) -> Result<Vec<B>, Unreadable> {
    list.iter().map(read).collect()
}

/// Only the form is checked; whether it is a map that may be believed says `core::VolumeMap::validate`.
impl TryFrom<&api::VolumeMap> for core::VolumeMap {
    type Error = Unreadable;

    fn try_from(map: &api::VolumeMap) -> Result<Self, Unreadable> {
        Ok(Self {
            volume: id(VolumeId, &map.volume, "map.volume")?,
            generation: Generation(number(map.generation, "map.generation")?),
            format: number(i64::from(map.format), "map.format")?,
            required_features: number(map.required_features, "map.requiredFeatures")?,
            size: number(map.size, "map.size")?,
            multi_session: map.multi_session,
            servers: each(&map.servers, read_server)?,
            placements: each(&map.placements, read_placement)?,
            layers: each(&map.layers, read_layer)?,
            sessions: each(&map.sessions, read_session)?,
            revoked: each(&map.revoked, read_revocation)?,
        })
    }
}

impl From<&core::VolumeMap> for api::VolumeMap {
    fn from(map: &core::VolumeMap) -> Self {
        Self {
            volume: Id::of(map.volume.0),
            generation: shown(map.generation.0),
            format: i32::try_from(map.format).unwrap_or(i32::MAX),
            required_features: shown(map.required_features),
            size: shown(map.size),
            multi_session: map.multi_session,
            servers: map.servers.iter().map(write_server).collect(),
            placements: map.placements.iter().map(write_placement).collect(),
            layers: map.layers.iter().map(write_layer).collect(),
            sessions: map.sessions.iter().map(write_session).collect(),
            revoked: map.revoked.iter().map(write_revocation).collect(),
        }
    }
}

fn read_server(server: &api::MapServer) -> Result<core::ServerEntry, Unreadable> {
    Ok(core::ServerEntry { id: id(ServerId, &server.id, "map.servers.id")?, addresses: server.addresses.clone() })
}

fn write_server(server: &core::ServerEntry) -> api::MapServer {
    api::MapServer { id: Id::of(server.id.0), addresses: server.addresses.clone() }
}

fn read_placement(placement: &api::Placement) -> Result<core::Placement, Unreadable> {
    Ok(core::Placement { groups: each(&placement.groups, read_group)? })
}

fn write_placement(placement: &core::Placement) -> api::Placement {
    api::Placement { groups: placement.groups.iter().map(write_group).collect() }
}

fn read_group(group: &api::Group) -> Result<core::Group, Unreadable> {
    Ok(core::Group {
        members: each(&group.members, read_member)?,
        loss: Generation(number(group.loss, "map.placements.groups.loss")?),
        settle: read_settle(&group.settle)?,
    })
}

fn write_group(group: &core::Group) -> api::Group {
    api::Group {
        members: group.members.iter().map(write_member).collect(),
        loss: shown(group.loss.0),
        settle: write_settle(group.settle),
    }
}

fn read_settle(settle: &api::Settle) -> Result<core::Settle, Unreadable> {
    Ok(match (settle.state, &settle.authoritative, &settle.boot, settle.begun) {
        (api::SettleState::None, ..) => core::Settle::None,
        (api::SettleState::Over, ..) => core::Settle::Over,
        (api::SettleState::Running, Some(authoritative), Some(boot), Some(begun)) => core::Settle::Running {
            authoritative: id(CopyId, authoritative, "settle.authoritative")?,
            boot: id(BootId, boot, "settle.boot")?,
            begun: Generation(number(begun, "settle.begun")?),
        },
        (api::SettleState::Running, ..) => return Err(Unreadable::Settle),
    })
}

fn write_settle(settle: core::Settle) -> api::Settle {
    let plain = |state| api::Settle { state, authoritative: None, boot: None, begun: None };
    match settle {
        core::Settle::None => plain(api::SettleState::None),
        core::Settle::Over => plain(api::SettleState::Over),
        core::Settle::Running { authoritative, boot, begun } => api::Settle {
            state: api::SettleState::Running,
            authoritative: Some(Id::of(authoritative.0)),
            boot: Some(Id::of(boot.0)),
            begun: Some(shown(begun.0)),
        },
    }
}

pub(super) fn read_state(state: api::MemberState) -> core::MemberState {
    match state {
        api::MemberState::Active => core::MemberState::Active,
        api::MemberState::Syncing => core::MemberState::Syncing,
        api::MemberState::Failed => core::MemberState::Failed,
    }
}

pub(super) fn write_state(state: core::MemberState) -> api::MemberState {
    match state {
        core::MemberState::Active => api::MemberState::Active,
        core::MemberState::Syncing => api::MemberState::Syncing,
        core::MemberState::Failed => api::MemberState::Failed,
    }
}

fn read_member(member: &api::Member) -> Result<core::Member, Unreadable> {
    Ok(core::Member {
        ordinal: number(i64::from(member.ordinal), "members.ordinal")?,
        copy: id(CopyId, &member.copy, "members.copy")?,
        server: id(ServerId, &member.server, "members.server")?,
        boot: id(BootId, &member.boot, "members.boot")?,
        state: read_state(member.state),
        avoid: member.avoid,
        unpromised: member.unpromised,
    })
}

fn write_member(member: &core::Member) -> api::Member {
    api::Member {
        ordinal: i32::from(member.ordinal),
        copy: Id::of(member.copy.0),
        server: Id::of(member.server.0),
        boot: Id::of(member.boot.0),
        state: write_state(member.state),
        avoid: member.avoid,
        unpromised: member.unpromised,
    }
}

fn read_layer(layer: &api::Layer) -> Result<core::Layer, Unreadable> {
    let api::Scheme::Replicate = layer.scheme;
    Ok(core::Layer {
        id: id(LayerId, &layer.id, "layers.id")?,
        size: number(layer.size, "layers.size")?,
        page_bytes: number(i64::from(layer.page_bytes), "layers.pageBytes")?,
        scheme: core::Scheme::Replicate,
        chunk_bytes: number(i64::from(layer.chunk_bytes), "layers.chunkBytes")?,
        placement: number(i64::from(layer.placement), "layers.placement")?,
        sealed: layer.sealed.map(|g| number(g, "layers.sealed").map(Generation)).transpose()?,
    })
}

fn write_layer(layer: &core::Layer) -> api::Layer {
    let core::Scheme::Replicate = layer.scheme;
    let narrow = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    api::Layer {
        id: Id::of(layer.id.0),
        size: shown(layer.size),
        page_bytes: narrow(layer.page_bytes),
        scheme: api::Scheme::Replicate,
        chunk_bytes: narrow(layer.chunk_bytes),
        placement: narrow(layer.placement),
        sealed: layer.sealed.map(|g| shown(g.0)),
    }
}

fn read_session(session: &api::Session) -> Result<core::Session, Unreadable> {
    Ok(core::Session {
        id: id(SessionId, &session.id, "sessions.id")?,
        node: session.node.clone(),
        mode: attach_wish_mode(session.mode),
        incarnation: Incarnation(number(session.incarnation, "sessions.incarnation")?),
        handled: Generation(number(session.handled, "sessions.handled")?),
        standing: match session.standing {
            api::Standing::Admitted => core::Standing::Admitted,
            api::Standing::Held => core::Standing::Held,
        },
    })
}

fn write_session(session: &core::Session) -> api::Session {
    api::Session {
        id: Id::of(session.id.0),
        node: session.node.clone(),
        mode: attach_mode(session.mode),
        incarnation: shown(session.incarnation.0),
        handled: shown(session.handled.0),
        standing: match session.standing {
            core::Standing::Admitted => api::Standing::Admitted,
            core::Standing::Held => api::Standing::Held,
        },
    }
}

fn read_revocation(revocation: &api::Revocation) -> Result<core::Revocation, Unreadable> {
    let range = |r: &api::ByteRange| Ok((number(r.start, "ranges.start")?, number(r.length, "ranges.length")?));
    Ok(core::Revocation {
        session: id(SessionId, &revocation.session, "revoked.session")?,
        below: Generation(number(revocation.below, "revoked.below")?),
        ranges: each(&revocation.ranges, range)?,
    })
}

fn write_revocation(revocation: &core::Revocation) -> api::Revocation {
    let range = |r: &(u64, u64)| api::ByteRange { start: shown(r.0), length: shown(r.1) };
    api::Revocation {
        session: Id::of(revocation.session.0),
        below: shown(revocation.below.0),
        ranges: revocation.ranges.iter().map(range).collect(),
    }
}
