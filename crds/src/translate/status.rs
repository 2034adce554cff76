//! The part of a Volume's status that the protocol decides by: generation, map, proposal, retired copies, ended sessions.

use lamina_protocol::ids::{CopyId, Generation, ServerId, SessionId, VolumeId};
use lamina_protocol::management as core;
use lamina_protocol::map::VolumeMap;

use super::map::{read_state, write_state};
use super::{Unreadable, id, number, shown};
use crate::id::Id;
use crate::volume::VolumeStatus;
use crate::volume::map as api;

/// The id of the volume, if one was minted.
///
/// # Errors
/// [`Unreadable::Id`].
pub fn volume_id(status: &VolumeStatus) -> Result<Option<VolumeId>, Unreadable> {
    status.volume_id.as_ref().map(|text| id(VolumeId, text, "status.volumeId")).transpose()
}

/// The committed map for a driver: whole, of the committed generation, and one that the protocol allows. `None` = there
/// is none yet.
///
/// # Errors
/// Any [`Unreadable`]: nothing of it may be used.
pub fn committed_map(status: &VolumeStatus) -> Result<Option<VolumeMap>, Unreadable> {
    let Some(map) = &status.map else { return Ok(None) };
    let map = VolumeMap::try_from(map)?;
    if Some(shown(map.generation.0)) != status.generation {
        return Err(Unreadable::Generation);
    }
    map.validate()?;
    Ok(Some(map))
}

/// What the leader builds on. The map's form is checked, not its sense: the leader says in a condition what is wrong
/// with one.
///
/// # Errors
/// Any [`Unreadable`] but [`Unreadable::Map`] and [`Unreadable::Generation`].
pub fn protocol_status(status: &VolumeStatus) -> Result<core::Status, Unreadable> {
    Ok(core::Status {
        generation: Generation(number(status.generation.unwrap_or(0), "status.generation")?),
        map: status.map.as_ref().map(VolumeMap::try_from).transpose()?,
        proposed: status.proposed.as_ref().map(core::Proposal::try_from).transpose()?,
        retired: status.retired.iter().map(core::RetiredCopy::try_from).collect::<Result<_, _>>()?,
        ended: status.ended.iter().map(|s| id(SessionId, s, "status.ended")).collect::<Result<_, _>>()?,
        forced: status.forced.iter().map(core::Forced::try_from).collect::<Result<_, _>>()?,
    })
}

/// Puts what the leader decided into a status; all else in it stays.
pub fn write_status(next: &core::Status, into: &mut VolumeStatus) {
    into.generation = Some(shown(next.generation.0));
    into.map = next.map.as_ref().map(api::VolumeMap::from);
    into.proposed = next.proposed.as_ref().map(api::Proposal::from);
    into.retired = next.retired.iter().map(api::RetiredCopy::from).collect();
    into.ended = next.ended.iter().map(|session| Id::of(session.0)).collect();
    into.forced = next.forced.iter().map(api::ForcedCopy::from).collect();
}

impl TryFrom<&api::Proposal> for core::Proposal {
    type Error = Unreadable;

    fn try_from(proposal: &api::Proposal) -> Result<Self, Unreadable> {
        Ok(Self {
            generation: Generation(number(proposal.generation, "proposed.generation")?),
            name: id(|name| name, &proposal.name, "proposed.name")?,
            purpose: read_purpose(proposal.purpose),
            copies: proposal.copies.iter().map(core::NewCopy::try_from).collect::<Result<_, _>>()?,
        })
    }
}

impl From<&core::Proposal> for api::Proposal {
    fn from(proposal: &core::Proposal) -> Self {
        Self {
            generation: shown(proposal.generation.0),
            name: Id::of(proposal.name),
            purpose: write_purpose(proposal.purpose),
            copies: proposal.copies.iter().map(api::NewCopy::from).collect(),
        }
    }
}

fn read_purpose(purpose: api::Purpose) -> core::Purpose {
    match purpose {
        api::Purpose::Create => core::Purpose::Create,
        api::Purpose::Sessions => core::Purpose::Sessions,
        api::Purpose::Failure => core::Purpose::Failure,
        api::Purpose::Rejoin => core::Purpose::Rejoin,
        api::Purpose::Finish => core::Purpose::Finish,
        api::Purpose::Shape => core::Purpose::Shape,
        api::Purpose::Recover => core::Purpose::Recover,
        api::Purpose::Force => core::Purpose::Force,
        api::Purpose::Void => core::Purpose::Void,
        api::Purpose::Adopted => core::Purpose::Adopted,
    }
}

fn write_purpose(purpose: core::Purpose) -> api::Purpose {
    match purpose {
        core::Purpose::Create => api::Purpose::Create,
        core::Purpose::Sessions => api::Purpose::Sessions,
        core::Purpose::Failure => api::Purpose::Failure,
        core::Purpose::Rejoin => api::Purpose::Rejoin,
        core::Purpose::Finish => api::Purpose::Finish,
        core::Purpose::Shape => api::Purpose::Shape,
        core::Purpose::Recover => api::Purpose::Recover,
        core::Purpose::Force => api::Purpose::Force,
        core::Purpose::Void => api::Purpose::Void,
        core::Purpose::Adopted => api::Purpose::Adopted,
    }
}

impl TryFrom<&api::NewCopy> for core::NewCopy {
    type Error = Unreadable;

    fn try_from(copy: &api::NewCopy) -> Result<Self, Unreadable> {
        Ok(Self {
            copy: id(CopyId, &copy.copy, "proposed.copies.copy")?,
            server: id(ServerId, &copy.server, "proposed.copies.server")?,
            placement: number(i64::from(copy.placement), "proposed.copies.placement")?,
            group: number(i64::from(copy.group), "proposed.copies.group")?,
            unsynced: copy.unsynced,
        })
    }
}

impl From<&core::NewCopy> for api::NewCopy {
    fn from(copy: &core::NewCopy) -> Self {
        let narrow = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
        Self {
            copy: Id::of(copy.copy.0),
            server: Id::of(copy.server.0),
            placement: narrow(copy.placement),
            group: narrow(copy.group),
            unsynced: copy.unsynced,
        }
    }
}

impl TryFrom<&api::RetiredCopy> for core::RetiredCopy {
    type Error = Unreadable;

    fn try_from(copy: &api::RetiredCopy) -> Result<Self, Unreadable> {
        Ok(Self {
            copy: id(CopyId, &copy.copy, "retired.copy")?,
            server: id(ServerId, &copy.server, "retired.server")?,
            generation: Generation(number(copy.generation, "retired.generation")?),
            kept: copy.kept,
        })
    }
}

impl From<&core::RetiredCopy> for api::RetiredCopy {
    fn from(copy: &core::RetiredCopy) -> Self {
        let (copy_id, server) = (Id::of(copy.copy.0), Id::of(copy.server.0));
        Self { copy: copy_id, server, generation: shown(copy.generation.0), kept: copy.kept }
    }
}

impl TryFrom<&api::ForcedCopy> for core::Forced {
    type Error = Unreadable;

    fn try_from(forced: &api::ForcedCopy) -> Result<Self, Unreadable> {
        Ok(Self {
            copy: id(CopyId, &forced.copy, "forced.copy")?,
            group: number(i64::from(forced.group), "forced.group")?,
            generation: Generation(number(forced.generation, "forced.generation")?),
            was: read_state(forced.was),
            unsynced: number(forced.pages_behind, "forced.pagesBehind")?,
        })
    }
}

impl From<&core::Forced> for api::ForcedCopy {
    fn from(forced: &core::Forced) -> Self {
        let may_be_lost = match forced.unsynced {
            0 => "all that was written since the copy was left out".to_owned(),
            n => format!("{n} pages were not filled: they hold what they held before they fell behind, or nothing"),
        };
        Self {
            copy: Id::of(forced.copy.0),
            group: i32::try_from(forced.group).unwrap_or(i32::MAX),
            generation: shown(forced.generation.0),
            was: write_state(forced.was),
            pages_behind: shown(forced.unsynced),
            may_be_lost,
        }
    }
}
