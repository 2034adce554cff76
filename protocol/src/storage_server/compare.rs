//! The comparator (seed 000 c1, seed 001, seed 002 \[0028\]; PROTOCOL.md, Comparator): the first row that fits decides,
//! and nothing else happens.

use crate::ids::{BootId, Generation, Incarnation, ServerId};
use crate::map::{MemberState, Revocation, Standing, VolumeMap};
use crate::mutants::{Mutant, on};
use crate::wire::{Opener, ReplyBody};

/// What the comparator looks at beside the stored map.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    /// The stored map; `None` counts as generation 0.
    pub(super) map: Option<&'a VolumeMap>,
    /// Highest promise.
    pub(super) promised: Generation,
    /// Whether the handle is dead, or of a lower incarnation.
    pub(super) superseded: bool,
    /// Highest incarnation known of the session.
    pub(super) highest: Incarnation,
    /// Who asks.
    pub(super) opener: Opener,
    /// The generation in the request.
    pub(super) generation: Generation,
    /// The byte range of the volume that it touches, if any.
    pub(super) range: Option<(u64, u64)>,
}

/// Rows 1 to 5: whether the request is of this configuration at all.
pub(super) fn compare(facts: &Facts<'_>) -> Result<(), ReplyBody> {
    if facts.superseded {
        return Err(ReplyBody::Superseded { highest: facts.highest });
    }
    let own = facts.map.map_or(Generation(0), |map| map.generation);
    if facts.generation > own && !on(Mutant::AheadServed) {
        return Err(ReplyBody::Behind { own });
    }
    let Some(map) = facts.map else { return Err(ReplyBody::Behind { own }) };
    let held = match facts.opener {
        Opener::Peer { server } => map.server(server).map(|_| false),
        Opener::Session { session } => map.session(session).map(|s| s.standing == Standing::Held),
    };
    let Some(held) = held.or(on(Mutant::EndedGoesOn).then_some(false)) else { return Err(ReplyBody::Ended) };
    if is_revoked(map, facts) {
        return Err(ReplyBody::Revoked);
    }
    let older = facts.generation < own && !on(Mutant::OlderServed);
    if older || facts.promised > own && !on(Mutant::ServedAfterFence) {
        return Err(ReplyBody::Stale { wait_for: own.max(facts.promised) });
    }
    if held && !on(Mutant::HeldServed) {
        return Err(ReplyBody::Stale { wait_for: own.next() });
    }
    Ok(())
}

fn is_revoked(map: &VolumeMap, facts: &Facts<'_>) -> bool {
    let (Opener::Session { session }, Some((start, length))) = (facts.opener, facts.range) else { return false };
    let touches = |r: &Revocation| {
        r.ranges.is_empty() || r.ranges.iter().any(|&(at, len)| start < at + len && at < start + length)
    };
    map.revoked.iter().any(|r| r.session == session && facts.generation < r.below && touches(r))
}

/// What a member must be for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Reads, pings and the source of a fill.
    Active,
    /// Writes, flushes and discards.
    Writer,
}

/// Row 6 (H2): whether the map lists the copy in this group of this server, with the boot id of its open device, in a
/// state that serves this.
pub(super) fn member_serves(
    map: &VolumeMap,
    placement: u32,
    group: u32,
    server: ServerId,
    open: Option<BootId>,
    needs: Needs,
) -> Result<(), ReplyBody> {
    let Some(member) = map.member_on(placement, group, server) else { return Err(ReplyBody::NoCopy) };
    let state_fits = match needs {
        Needs::Active if on(Mutant::SyncingRead) => member.state != MemberState::Failed,
        Needs::Active => member.state == MemberState::Active,
        Needs::Writer => member.state != MemberState::Failed,
    };
    let boot_fits = open == Some(member.boot) || on(Mutant::BootNotCompared) && open.is_some();
    if state_fits && boot_fits { Ok(()) } else { Err(ReplyBody::NotServing) }
}
