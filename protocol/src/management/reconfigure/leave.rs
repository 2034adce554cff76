//! Whom a change goes on without (PROTOCOL.md §3.2, §3.3, §3.5).
//!
//! Invariant: nobody is left out but by a failure change, on what the leader saw itself, what a driver reports, or a
//! person's word.

use super::super::ServerHealth;
use super::super::heartbeat::too_many;
use super::super::object::Purpose;
use super::super::plan::Answer;
use super::super::serve::AGAIN_MS;
use super::super::volume::{FenceSilence, Volume, World};
use super::LATE_OUT_MS;
use crate::ids::ServerId;
use crate::limits::{FENCE_FAIL_MS, FENCE_PATIENCE_MS, HEARTBEAT_MS};
use crate::map::{Member, VolumeMap};
use crate::mutants::{Mutant, on};
use crate::time::Millis;

/// Before a force goes on without servers, each was asked again: two heartbeats, milliseconds.
const FORCE_PATIENCE_MS: u64 = 2 * HEARTBEAT_MS;

impl Volume {
    /// Members that would rejoin and did not answer in time cost no second pause for a while.
    pub(super) fn leave_late_ones(&mut self, world: &World<'_>) {
        let (Some(change), Some(map)) = (self.change.as_ref(), self.object.status.map.as_ref()) else { return };
        let late = |m: &&Member| change.optional.contains(&m.server) && !change.answers.contains_key(&m.server);
        for m in map.members().filter(late) {
            self.barred_until.insert(m.copy, world.now.after(LATE_OUT_MS));
        }
    }

    /// Servers that do not answer and have failed are left out by a failure change; any other change makes way for one.
    /// `false` = it did.
    pub(super) fn leave_out(&mut self, world: &mut World<'_>) -> bool {
        let Some(change) = self.change.as_ref() else { return false };
        let silent = change.required.iter().filter(|id| !change.answers.contains_key(id));
        // One that lives was asked by this change, too.
        let waited = world.now.since(change.since);
        let tried = waited >= FENCE_PATIENCE_MS;
        // I8: nobody is forced aside who was not asked once more, by a heartbeat, since the person's word.
        let asked = change.proposal.purpose != Purpose::Force || waited >= FORCE_PATIENCE_MS;
        let unfenced = on(Mutant::UnfencedLeftOut) && change.has_a_promise() && change.proposal.purpose.is_failure();
        let silent = silent.filter(|id| tried || unfenced || !world.servers.is_alive(**id));
        let gone = |id: &&ServerId| unfenced || self.may_leave_out(world, **id) && asked;
        let out: Vec<_> = silent.filter(gone).copied().collect();
        if out.is_empty() {
            return true;
        }
        if !change.proposal.purpose.is_failure() {
            if self.map().is_none() {
                self.full.extend(out.into_iter().map(|id| (id, world.now)));
            }
            self.abandon(world, 0);
            return false;
        }
        let alive: Vec<_> = out.iter().copied().filter(|id| world.servers.is_alive(*id)).collect();
        let members = self.object.status.map.iter().flat_map(VolumeMap::members);
        for m in members.filter(|m| alive.contains(&m.server)) {
            self.barred_until.insert(m.copy, world.now.after(LATE_OUT_MS));
        }
        if let Some(change) = self.change.as_mut() {
            change.answers.extend(out.into_iter().map(|id| (id, Answer::LeftOut)));
        }
        true
    }

    /// Whether a server that does not answer this fence may be left out: it has failed, or has left fences unanswered
    /// for 10 s although it answers heartbeats, unless so many do that the leader suspects itself; or a driver got no
    /// progress out of it and the leader gets none either.
    pub(in super::super) fn may_leave_out(&self, world: &World<'_>, server: ServerId) -> bool {
        match world.servers.health(server) {
            ServerHealth::Failed | ServerHealth::Foreign => true,
            // I8: a person has said that those that do not answer are stopped.
            ServerHealth::Suspected => self.forced_copies().is_some(),
            ServerHealth::Unknown => false,
            ServerHealth::Alive => {
                let Some(silence) = self.fence_silent.get(&server) else { return false };
                let all = self.fence_silent.values().filter(|s| is_stuck(s, world.now)).count();
                let stuck = is_stuck(silence, world.now) && !too_many(all, world.servers.by_id.len());
                let mute = world.now.since(silence.since) >= FENCE_PATIENCE_MS;
                stuck || (mute && self.is_stalled_at(server, world.now))
            }
        }
    }

    fn is_stalled_at(&self, server: ServerId, now: Millis) -> bool {
        let members = self.object.status.map.iter().flat_map(VolumeMap::members);
        members.filter(|m| m.server == server).any(|m| self.is_stalled(m, now))
    }
}

fn is_stuck(silence: &FenceSilence, now: Millis) -> bool {
    silence.asked.since(silence.since) + 2 * AGAIN_MS >= FENCE_FAIL_MS && now.since(silence.since) >= FENCE_FAIL_MS
}
