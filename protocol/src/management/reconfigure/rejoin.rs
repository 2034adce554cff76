//! The list of suspect pages on its way from a source to a member that returns, under the fence (PROTOCOL.md §5.9).
//!
//! ```text
//! both fenced ─► Ask the source ─► Give the member ─┬─ more ─► Ask …
//!                                                   └─ last ─► its answer stands in place of its fence reply
//! ```
//! Invariant: nothing is asked before the source has answered this very fence under the boot id of the map; a piece counts
//! only under the number of this change. A member whose list is late stays out; the second time it is marked as a whole.

use super::super::plan::Answer;
use super::super::serve::AGAIN_MS;
use super::super::volume::{Volume, What, World};
use super::{Change, Stage};
use crate::control::{ControlReply, ControlRequest, PageList, Rejoin};
use crate::ids::{BootId, CopyId, Generation, ServerId};
use crate::map::{Member, MemberState};
use crate::mutants::{Mutant, on};
use crate::time::Millis;

/// Lists that were late before the whole copy is marked.
const LATE_LISTS: u8 = 2;
/// A member whose list was late is not tried again for this long, milliseconds.
const LATE_LIST_OUT_MS: u64 = 10_000;

/// One member's list on its way.
#[derive(Debug)]
pub(super) struct Listing {
    source: Member,
    /// The page from which on nothing is marked yet.
    next: u64,
    step: Step,
    asked: Option<Millis>,
}

#[derive(Debug)]
enum Step {
    Ask,
    Give(PageList),
    /// Nothing more comes of it: it is marked, or cannot be.
    Over,
}

impl Volume {
    /// Takes every list one step further; whether none is under way any more.
    pub(super) fn carry_lists(&mut self, world: &mut World<'_>) -> bool {
        let Some(change) = self.change.as_ref() else { return true };
        let copies: Vec<CopyId> =
            change.goal.rejoin.iter().filter(|copy| !self.is_marked_whole(**copy)).copied().collect();
        let mut over = true;
        for copy in copies {
            over &= self.carry_list(world, copy);
        }
        over
    }

    /// Its lists were late: every page of it is marked, with the fence itself.
    pub(super) fn is_marked_whole(&self, copy: CopyId) -> bool {
        self.late_lists.get(&copy).is_some_and(|late| *late >= LATE_LISTS)
    }

    fn carry_list(&mut self, world: &mut World<'_>, copy: CopyId) -> bool {
        let Some((_, _, member)) = self.object.status.map.as_ref().and_then(|map| map.place_of(copy)) else {
            return true;
        };
        let (server, towards) = (member.server, member.ordinal);
        let volume = self.id();
        let Some(change) = self.change.as_mut() else { return true };
        // One that has not answered is waited for, or left out, as any other.
        if change.is_listed(copy) {
            return true;
        }
        if change.boot_of(server, copy).is_none() && !on(Mutant::ListBeforeFence) {
            return true;
        }
        if !change.lists.contains_key(&copy) {
            let map = self.object.status.map.as_ref();
            let group = map.and_then(|map| Some((map, map.place_of(copy)?)));
            let group = group.map(|(map, (p, g, _))| &map.placements[p as usize].groups[g as usize]);
            let fenced = |m: &&Member| change.boot_of(m.server, m.copy) == Some(m.boot) || on(Mutant::ListBeforeFence);
            let Some(source) = group.and_then(|group| group.in_state(MemberState::Active).find(fenced)) else {
                return true;
            };
            change.lists.insert(copy, Listing { source: *source, next: 0, step: Step::Ask, asked: None });
        }
        let generation = change.proposal.generation;
        let Some(listing) = change.lists.get_mut(&copy) else { return true };
        if matches!(listing.step, Step::Over) {
            return true;
        }
        if listing.asked.is_some_and(|at| world.now.since(at) < 2 * AGAIN_MS) {
            return false;
        }
        listing.asked = Some(world.now);
        let source = listing.source;
        match &listing.step {
            Step::Ask => {
                let (from, boot) = (listing.next, source.boot);
                let request =
                    ControlRequest::ListSuspects { volume, generation, copy: source.copy, boot, towards, from };
                world.ask(source.server, volume, What::Suspects(generation, copy), request);
            }
            Step::Give(list) => {
                let rejoin = Rejoin { volume, generation, copy, source: source.ordinal, list: list.clone() };
                world.ask(server, volume, What::Rejoin(generation, copy), ControlRequest::Rejoin(rejoin));
            }
            Step::Over => {}
        }
        false
    }

    /// Whether a source is sent its fence only when it has been asked for its list: what §5.9 forbids, if that very mistake
    /// is to be made.
    pub(super) fn fence_waits_for_list(&self, server: ServerId) -> bool {
        if !on(Mutant::ListBeforeFence) {
            return false;
        }
        let Some((change, map)) = self.change.as_ref().zip(self.map()) else { return false };
        let unlisted = |copy: &CopyId| change.lists.get(copy).is_none_or(|list| matches!(list.step, Step::Ask));
        let elsewhere = |copy: &CopyId| map.place_of(*copy).is_some_and(|(_, _, m)| m.server != server);
        change.goal.rejoin.iter().any(|copy| elsewhere(copy) && unlisted(copy))
    }

    /// The list of a copy, if it is still wanted by this very change.
    fn listing(&mut self, generation: Generation, copy: CopyId) -> Option<&mut Listing> {
        let ours = |c: &&mut Change| c.proposal.generation == generation && matches!(c.stage, Stage::Fence);
        self.change.as_mut().filter(ours)?.lists.get_mut(&copy)
    }

    /// The source answers.
    pub(in super::super) fn suspects_answered(
        &mut self,
        world: &mut World<'_>,
        (generation, copy): (Generation, CopyId),
        reply: Option<ControlReply>,
    ) {
        let Some(listing) = self.listing(generation, copy).filter(|l| matches!(l.step, Step::Ask)) else { return };
        match reply {
            Some(ControlReply::Suspects(list)) if list.from == listing.next => {
                (listing.step, listing.asked) = (Step::Give(list), None);
            }
            Some(ControlReply::Suspects(_)) => {}
            other => self.list_refused(world, generation, copy, other),
        }
    }

    /// The returning member answers: with the last piece anew what it answered to the fence.
    pub(in super::super) fn rejoin_answered(
        &mut self,
        world: &mut World<'_>,
        server: ServerId,
        (generation, copy): (Generation, CopyId),
        reply: Option<ControlReply>,
    ) {
        let Some(listing) = self.listing(generation, copy) else { return };
        let Step::Give(list) = &listing.step else { return };
        let (next, last) = (list.next, list.next == u64::MAX);
        match reply {
            Some(ControlReply::Promised(promised)) if promised.generation == generation && last => {
                listing.step = Step::Over;
                if let Some(change) = self.change.as_mut() {
                    change.answers.insert(server, Answer::Promised(promised));
                    change.last_answer = world.now;
                }
            }
            Some(ControlReply::Done) => {
                (listing.next, listing.step, listing.asked) = (next, Step::Ask, None);
            }
            other => self.list_refused(world, generation, copy, other),
        }
    }

    fn list_refused(
        &mut self,
        world: &mut World<'_>,
        generation: Generation,
        copy: CopyId,
        reply: Option<ControlReply>,
    ) {
        match reply {
            Some(ControlReply::Refused { promised, .. }) if promised > generation => {
                self.floor = self.floor.max(promised);
                self.abandon(world, 200);
            }
            // Not delivered: asked again soon.
            None => {
                let asked = Millis((world.now.0 + AGAIN_MS / 4).saturating_sub(2 * AGAIN_MS));
                if let Some(listing) = self.listing(generation, copy) {
                    listing.asked = Some(asked);
                    world.wake_at(world.now.after(AGAIN_MS / 4));
                }
            }
            // The opening is another one, or what was marked is forgotten.
            Some(_) => {
                if let Some(listing) = self.listing(generation, copy) {
                    listing.step = Step::Over;
                }
            }
        }
    }

    /// Members that would rejoin and were not marked in time cost no second pause for a while.
    pub(super) fn leave_unlisted_ones(&mut self, world: &World<'_>) {
        let Some(change) = self.change.as_ref() else { return };
        let unlisted = |copy: &&CopyId| change.lists.contains_key(copy) && !change.is_listed(**copy);
        let late: Vec<CopyId> = change.goal.rejoin.iter().filter(unlisted).copied().collect();
        for copy in late {
            self.barred_until.insert(copy, world.now.after(LATE_LIST_OUT_MS));
            *self.late_lists.entry(copy).or_default() += 1;
        }
    }

    /// A member that is back, or that no map names any more, begins anew.
    pub(super) fn forget_late_lists(&mut self) {
        let map = self.object.status.map.as_ref();
        let out = |copy: CopyId| {
            map.and_then(|map| map.place_of(copy)).is_some_and(|(_, _, m)| m.state == MemberState::Failed)
        };
        self.late_lists.retain(|copy, _| out(*copy));
    }
}

impl Change {
    /// The boot id under which a copy answered the fence.
    fn boot_of(&self, server: ServerId, copy: CopyId) -> Option<BootId> {
        let Some(Answer::Promised(promised)) = self.answers.get(&server) else { return None };
        promised.copies.iter().find(|report| report.copy == copy).map(|report| report.boot)
    }

    fn is_listed(&self, copy: CopyId) -> bool {
        let promises = self.answers.values().filter_map(|a| if let Answer::Promised(p) = a { Some(p) } else { None });
        promises.flat_map(|p| &p.copies).any(|report| report.copy == copy && report.listed)
    }
}
