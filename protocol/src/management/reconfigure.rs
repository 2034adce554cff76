//! A change under way: intent, new copies, fence, commit (PROTOCOL.md §3). The transition diagram stands in `management`.
//!
//! A change lives in memory only. A leader that dies leaves the proposal in the object; the next one fences again under a
//! higher number and plans from what it finds. The same is done here when a change turns out to be another than was
//! intended: it is abandoned, and what was promised for it is overtaken by a higher number.

use super::Step;
use super::condition::EventReason;
use super::goal::Start;
use super::object::{MAX_FORCED, NewCopy, Proposal, Purpose, RetiredCopy, Status, WriteKind};
use super::plan::{Answer, First, Goal, Hold, Next, first_map, given_up, mistaken_boots, next_map};
use super::serve::{AGAIN_MS, retire};
use super::volume::{FenceSilence, Volume, What, World};
use crate::control::{ControlReply, ControlRequest, Fence, Promised};
use crate::ids::{CopyId, Generation, LayerId, ServerId};
use crate::limits::{FENCE_FAIL_MS, FENCE_PATIENCE_MS, MAX_FENCE_PATIENCE_MS, READ_LEASE_WAIT_MS};
use crate::map::{MemberState, VolumeMap};
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use std::collections::{BTreeMap, BTreeSet};

mod leave;
mod rejoin;

/// New copies must be durable within this time, milliseconds.
const PUT_PATIENCE_MS: u64 = 5_000;
/// A member that did not answer the fence under which it would have rejoined is not tried again for this long, ms.
const LATE_OUT_MS: u64 = 30_000;
/// The flush ahead of the pause is waited for no longer than this, milliseconds.
const FLUSH_PATIENCE_MS: u64 = 2_000;

/// A change under way.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) proposal: Proposal,
    pub(super) goal: Goal,
    /// The layer of a first map.
    layer: LayerId,
    stage: Stage,
    since: Millis,
    /// Must answer: they serve in the old map, or hold a copy of a first one.
    required: BTreeSet<ServerId>,
    /// Are waited for a while: they would serve in the new map only.
    optional: BTreeSet<ServerId>,
    done: BTreeSet<ServerId>,
    put: BTreeSet<CopyId>,
    answers: BTreeMap<ServerId, Answer>,
    /// Said once that a device is closed.
    closed: BTreeSet<ServerId>,
    asked: BTreeMap<ServerId, Millis>,
    last_answer: Millis,
    /// Lists of suspect pages on their way to members that return.
    lists: BTreeMap<CopyId, rejoin::Listing>,
}

#[derive(Debug)]
enum Stage {
    Intent,
    Put,
    Flush,
    Fence,
    LeaseWait(Box<Next>),
    Commit,
    GiveUp,
}

impl Volume {
    /// Writes the intent of a change (step 2). What an older proposal made is retired with it (R14).
    pub(super) fn intend(&mut self, world: &mut World<'_>, start: Start) {
        let generation = self.status().highest().max(self.floor).next();
        let Start { purpose, goal, layer, required, optional } = start;
        let proposal = Proposal { generation, name: (world.mint)(), purpose, copies: goal.add.clone() };
        let mut retired = self.status().retired.clone();
        self.retire_proposed(&mut retired, &[]);
        let wished = |id: &_| self.object.wishes.sessions.iter().any(|wish| wish.id == *id);
        let ended = self.status().ended.iter().filter(|id| wished(id)).copied().collect();
        let next = Status { proposed: Some(proposal.clone()), retired, ended, ..self.status().clone() };
        self.change = Some(Change {
            proposal,
            goal,
            layer,
            stage: Stage::Intent,
            since: world.now,
            required,
            optional,
            done: BTreeSet::new(),
            put: BTreeSet::new(),
            answers: BTreeMap::new(),
            closed: BTreeSet::new(),
            asked: BTreeMap::new(),
            last_answer: world.now,
            lists: BTreeMap::new(),
        });
        self.write(world, WriteKind::Intent, next);
    }

    /// Retires the copies of the proposal that stands in the object, but for those that a map keeps.
    fn retire_proposed(&self, retired: &mut Vec<RetiredCopy>, kept: &[CopyId]) {
        let Some(proposal) = &self.status().proposed else { return };
        let mapped = |copy| self.map().is_some_and(|map| map.place_of(copy).is_some());
        for new in proposal.copies.iter().filter(|new| !kept.contains(&new.copy) && !mapped(new.copy)) {
            let NewCopy { copy, server, .. } = *new;
            retire(retired, RetiredCopy { copy, server, generation: proposal.generation, kept: false });
        }
    }

    pub(super) fn intended(&mut self, world: &mut World<'_>) {
        let Some(change) = self.change.as_mut() else { return };
        change.stage = Stage::Put;
        change.since = world.now;
        let generation = change.proposal.generation;
        self.passed(world, generation, Step::Intended);
    }

    /// Takes the change one or more steps further.
    pub(super) fn advance_change(&mut self, world: &mut World<'_>) {
        while self.write.is_none() && !self.reading {
            let Some(change) = self.change.as_ref() else { return };
            let goes_on = match change.stage {
                Stage::Intent | Stage::GiveUp | Stage::Commit => false,
                Stage::Put => self.advance_put(world),
                Stage::Flush => self.advance_flush(world),
                Stage::Fence => self.advance_fence(world),
                Stage::LeaseWait(_) => self.advance_lease_wait(world),
            };
            if !goes_on {
                return;
            }
        }
    }

    fn enter(&mut self, world: &mut World<'_>, stage: Stage, step: Step) {
        let Some(change) = self.change.as_mut() else { return };
        change.stage = stage;
        change.since = world.now;
        change.asked.clear();
        let generation = change.proposal.generation;
        self.passed(world, generation, step);
    }

    /// The copies that the proposal names are made durable at their servers.
    fn advance_put(&mut self, world: &mut World<'_>) -> bool {
        let Some(change) = self.change.as_ref() else { return false };
        let left: Vec<_> = change.proposal.copies.iter().filter(|c| !change.put.contains(&c.copy)).copied().collect();
        if left.is_empty() {
            let flushes = change.goal.flushed && self.map().is_some() && !change.proposal.purpose.is_failure();
            let stage = if flushes { Stage::Flush } else { Stage::Fence };
            self.enter(world, stage, Step::CopiesPut);
            return true;
        }
        let (since, generation, layer) = (change.since, change.proposal.generation, change.layer);
        if world.now.since(since) >= PUT_PATIENCE_MS || left.iter().any(|c| !world.servers.is_alive(c.server)) {
            self.retract(world);
            return false;
        }
        if change.asked.is_empty() {
            let layers = self.layers_of_new_copy(layer);
            for new in left {
                let request = ControlRequest::PutCopy {
                    volume: self.id(),
                    generation,
                    copy: new.copy,
                    device: crate::ids::DeviceId::NONE,
                    placement: new.placement,
                    group: new.group,
                    layers: layers.clone(),
                    unsynced: new.unsynced,
                };
                world.ask(new.server, self.id(), What::Put(new.copy), request);
                if let Some(change) = self.change.as_mut() {
                    change.asked.insert(new.server, world.now);
                }
            }
        }
        world.wake_at(since.after(PUT_PATIENCE_MS));
        false
    }

    fn layers_of_new_copy(&self, first: LayerId) -> Vec<(LayerId, u32)> {
        match (self.map(), &self.object.wishes.policy) {
            (Some(map), _) => map.layers.iter().map(|layer| (layer.id, layer.page_bytes)).collect(),
            (None, Some(policy)) => vec![(first, policy.page_bytes)],
            (None, None) => Vec::new(),
        }
    }

    pub(super) fn put_answered(
        &mut self,
        world: &mut World<'_>,
        copy: CopyId,
        server: ServerId,
        reply: Option<ControlReply>,
    ) {
        let Some(change) = self.change.as_mut().filter(|c| matches!(c.stage, Stage::Put)) else { return };
        if change.proposal.copies.iter().all(|new| new.copy != copy) {
            return;
        }
        match reply {
            Some(ControlReply::Done) => {
                change.put.insert(copy);
                return;
            }
            Some(ControlReply::NoSpace | ControlReply::DeviceClosed) => {
                self.full.insert(server, world.now);
            }
            Some(ControlReply::Refused { promised, .. }) => self.floor = self.floor.max(promised),
            _ => {}
        }
        self.retract(world);
    }

    /// Nothing was fenced: the proposal's copies are retired, its number stands.
    fn retract(&mut self, world: &mut World<'_>) {
        let Some(change) = self.change.take() else { return };
        let mut retired = self.status().retired.clone();
        self.retire_proposed(&mut retired, &[]);
        let proposal = Proposal { purpose: Purpose::Void, copies: Vec::new(), ..change.proposal };
        let next = Status { proposed: Some(proposal), retired, ..self.status().clone() };
        self.back_off(world);
        self.write(world, WriteKind::Retract, next);
    }

    /// Ahead of the pause, so that the flush in it has little to do.
    fn advance_flush(&mut self, world: &mut World<'_>) -> bool {
        let Some(change) = self.change.as_mut() else { return false };
        let all_done = change.required.is_subset(&change.done);
        if all_done || world.now.since(change.since) >= FLUSH_PATIENCE_MS {
            self.enter(world, Stage::Fence, Step::Prepared);
            return true;
        }
        if change.asked.is_empty() {
            let required: Vec<_> = change.required.iter().copied().collect();
            change.asked = required.iter().map(|id| (*id, world.now)).collect();
            let (volume, generation) = (self.id(), self.status().generation);
            for server in required {
                world.ask(server, volume, What::Flush, ControlRequest::PrepareFlush { volume, generation });
            }
        }
        world.wake_at(world.now.after(FLUSH_PATIENCE_MS));
        false
    }

    pub(super) fn flush_answered(&mut self, server: ServerId) {
        if let Some(change) = self.change.as_mut() {
            change.done.insert(server);
        }
    }

    fn advance_fence(&mut self, world: &mut World<'_>) -> bool {
        if !self.leave_out(world) {
            return false;
        }
        self.send_fences(world);
        let listed = self.carry_lists(world) || on(Mutant::ListNotAwaited);
        let patience = self.patience();
        let Some(change) = self.change.as_ref() else { return false };
        let waited = world.now.since(change.since);
        let answered = |ids: &BTreeSet<ServerId>| ids.iter().all(|id| change.answers.contains_key(id));
        let all = answered(&change.optional) && listed;
        let complete = answered(&change.required) && (all || waited >= FENCE_PATIENCE_MS);
        if complete {
            self.leave_late_ones(world);
            self.leave_unlisted_ones(world);
            return self.evaluate(world);
        }
        if waited >= patience && !change.is_firm(self.map()) {
            self.give_up(world);
            return false;
        }
        world.wake_at(
            change.since.after(patience).min(change.since.after(FENCE_PATIENCE_MS)).max(world.now.after(AGAIN_MS / 4)),
        );
        false
    }

    fn send_fences(&mut self, world: &mut World<'_>) {
        let volume = self.id();
        let map = self.object.status.map.clone();
        let rejoin = self.change.iter().flat_map(|change| &change.goal.rejoin);
        let whole: BTreeSet<CopyId> = rejoin.filter(|copy| self.is_marked_whole(**copy)).copied().collect();
        let fenced = self.change.iter().flat_map(|change| change.required.iter().chain(&change.optional));
        let later: BTreeSet<ServerId> = fenced.filter(|id| self.fence_waits_for_list(**id)).copied().collect();
        let Some(change) = self.change.as_mut() else { return };
        let generation = change.proposal.generation;
        for id in change.required.iter().chain(&change.optional) {
            let open = !matches!(change.answers.get(id), Some(Answer::Promised(_) | Answer::Gone));
            let due = change.asked.get(id).is_none_or(|at| world.now.since(*at) >= 2 * AGAIN_MS);
            if !open || !due || later.contains(id) || !world.servers.is_alive(*id) {
                continue;
            }
            change.asked.insert(*id, world.now);
            let silence = self.fence_silent.entry(*id).or_insert(FenceSilence { since: world.now, asked: world.now });
            if world.now.since(silence.asked) >= FENCE_FAIL_MS {
                silence.since = world.now;
            }
            silence.asked = world.now;
            let here = |copy: &CopyId| map.as_ref().and_then(|m| m.place_of(*copy)).is_some_and(|p| p.2.server == *id);
            // H7: only `Failed` members that are to rejoin are ever marked, as a whole only when lists came too late.
            let whole = |copy: &&CopyId| here(copy) && whole.contains(*copy);
            let unsync = change.goal.rejoin.iter().filter(whole).copied().collect();
            let fence = Fence { volume, generation, flush: change.goal.flushed, unsync };
            world.ask(*id, volume, What::Fence(generation), ControlRequest::Fence(fence));
        }
    }

    pub(super) fn fence_answered(
        &mut self,
        world: &mut World<'_>,
        server: ServerId,
        generation: Generation,
        reply: Option<ControlReply>,
    ) {
        let ours = |c: &Change| c.proposal.generation == generation && matches!(c.stage, Stage::Fence);
        if matches!(reply, Some(ControlReply::Promised(_) | ControlReply::Refused { .. })) {
            // A late answer counts as an answer.
            self.fence_silent.remove(&server);
        }
        if self.change.as_ref().is_none_or(|c| !ours(c)) {
            return;
        }
        match reply {
            Some(ControlReply::Promised(promised)) if promised.generation == generation => {
                self.promised(world, server, promised);
            }
            Some(ControlReply::Promised(Promised { generation: promised, .. }))
            | Some(ControlReply::Refused { promised, .. }) => {
                self.floor = self.floor.max(promised);
                self.abandon(world, 200);
            }
            // Nothing of the volume is there any more.
            Some(ControlReply::NoCopy { .. }) => {
                self.gone(world, server, true);
            }
            Some(ControlReply::DeviceClosed) => self.gone(world, server, false),
            _ => {
                // Not delivered: sent again soon, for as long as the server counts as alive.
                if let Some(change) = self.change.as_mut() {
                    change.ask_soon(server, world.now);
                }
            }
        }
    }

    fn promised(&mut self, world: &mut World<'_>, server: ServerId, promised: Promised) {
        if let Some(state) = world.servers.by_id.get_mut(&server) {
            state.learn_boots(world.now, promised.copies.iter().map(|report| report.boot));
        }
        self.note_missing(world, server, &promised);
        let Some(change) = self.change.as_mut() else { return };
        let first = !change.has_a_promise();
        change.answers.insert(server, Answer::Promised(promised));
        change.last_answer = world.now;
        let generation = change.proposal.generation;
        if first {
            self.passed(world, generation, Step::FirstPromise);
        }
    }

    /// Nothing of this volume can serve there: an answer, for nothing there serves an older generation either. A
    /// device that was closed while the fence was carried out says nothing of the others: those are asked once more.
    fn gone(&mut self, world: &World<'_>, server: ServerId, certain: bool) {
        self.fence_silent.remove(&server);
        let Some(change) = self.change.as_mut() else { return };
        if certain || !change.closed.insert(server) {
            change.answers.insert(server, Answer::Gone);
        } else {
            change.ask_soon(server, world.now);
        }
    }

    /// All answered: what follows from it?
    fn evaluate(&mut self, world: &mut World<'_>) -> bool {
        let Some(change) = self.change.as_ref() else { return false };
        match self.next_of(change) {
            None => {
                self.abandon(world, AGAIN_MS);
                false
            }
            Some(Err(hold)) => {
                if matches!(hold, Hold::SilentMember { .. }) {
                    self.silent_since.get_or_insert(world.now);
                }
                self.hold = Some(hold);
                self.abandon(world, AGAIN_MS);
                false
            }
            Some(Ok(next)) => {
                self.hold = None;
                self.silent_since = None;
                self.enter(world, Stage::LeaseWait(Box::new(next)), Step::Fenced);
                true
            }
        }
    }

    fn next_of(&self, change: &Change) -> Option<Result<Next, Hold>> {
        let generation = change.proposal.generation;
        if let Some(map) = self.map() {
            return Some(next_map(map, &change.goal, &change.answers, generation));
        }
        let policy = self.object.wishes.policy.as_ref()?;
        let multi_session = self.object.wishes.multi_session;
        let copies = &change.proposal.copies;
        let first = First { volume: self.id(), policy, multi_session, layer: change.layer, copies };
        let map = first_map(first, &change.goal, &change.answers, generation)?;
        Some(Ok(Next { map, ended: Vec::new(), forced: Vec::new() }))
    }

    /// M7: with several sessions the commit that leaves a member out without its promise waits itself.
    fn advance_lease_wait(&mut self, world: &mut World<'_>) -> bool {
        let Some(change) = self.change.as_mut() else { return false };
        let Stage::LeaseWait(next) = &change.stage else { return false };
        let several = self.object.status.map.as_ref().is_some_and(|map| map.sessions.len() > 1);
        let left_out = change.answers.values().any(|a| *a == Answer::LeftOut);
        let until = change.last_answer.after(READ_LEASE_WAIT_MS);
        if several && left_out && world.now < until && !on(Mutant::CommitBeforeLease) {
            world.wake_at(until);
            return false;
        }
        let next = next.clone();
        self.enter(world, Stage::Commit, Step::LeaseWaited);
        self.commit(world, *next);
        false
    }

    fn commit(&mut self, world: &mut World<'_>, next: Next) {
        let status = self.status();
        let mut retired = status.retired.clone();
        let kept: Vec<_> = next.map.members().map(|m| m.copy).collect();
        self.retire_proposed(&mut retired, &kept);
        let generation = next.map.generation;
        for (_, number, group) in status.map.iter().flat_map(VolumeMap::groups) {
            // I8: what lies beside a forced copy may be all that is left of what that lacks.
            let aside = next.forced.iter().any(|f| f.group == number);
            for m in group.members.iter().filter(|m| !kept.contains(&m.copy)) {
                retire(&mut retired, RetiredCopy { copy: m.copy, server: m.server, generation, kept: aside });
            }
        }
        let ended = status.ended.iter().copied().chain(next.ended).collect();
        let mut forced = status.forced.clone();
        forced.extend(next.forced);
        forced.drain(..forced.len().saturating_sub(MAX_FORCED));
        let status = Status { generation, map: Some(next.map), proposed: None, retired, ended, forced };
        self.write(world, WriteKind::Commit, status);
    }

    /// R13: the old map, under a number of its own that needs no new promise. Guarded like a commit.
    fn give_up(&mut self, world: &mut World<'_>) {
        let Some(map) = self.map() else {
            self.abandon(world, AGAIN_MS);
            return;
        };
        let generation = self.status().highest().max(self.floor).next();
        let answers = self.change.iter().flat_map(|change| change.answers.values());
        let map = mistaken_boots(given_up(map, generation), answers);
        let mut retired = self.status().retired.clone();
        self.retire_proposed(&mut retired, &[]);
        if let Some(change) = self.change.as_mut() {
            change.stage = Stage::GiveUp;
        }
        let next = Status { generation, map: Some(map), proposed: None, retired, ..self.status().clone() };
        self.write(world, WriteKind::GiveUp, next);
    }

    /// The change is not the one that is needed now. What was promised is overtaken by a higher number.
    fn abandon(&mut self, world: &mut World<'_>, again_ms: u64) {
        self.change = None;
        self.must = true;
        self.retry_at = world.now.after(again_ms << self.tries.min(3));
        if again_ms > 0 {
            self.tries += 1;
        }
    }

    pub(super) fn back_off(&mut self, world: &World<'_>) {
        self.retry_at = world.now.after(AGAIN_MS << self.tries.min(3));
        self.tries += 1;
    }

    /// How long a planned change waits for the fence: doubled at each retry.
    fn patience(&self) -> u64 {
        (FENCE_PATIENCE_MS << self.tries.min(3)).min(MAX_FENCE_PATIENCE_MS)
    }

    /// A commit or a give-up stands.
    pub(super) fn change_committed(&mut self, world: &mut World<'_>, kind: WriteKind, before: &Status) {
        let change = self.change.take();
        self.must = false;
        let generation = self.status().generation;
        if kind == WriteKind::GiveUp {
            self.back_off(world);
            self.tell(world, EventReason::ChangeGivenUp, "a serving member did not answer in time".to_string());
        } else if self.changed_nothing(before) && change.is_some() {
            // What heartbeats promised was not so: not at once again.
            self.back_off(world);
        } else {
            self.tries = 0;
        }
        self.forget_late_lists();
        if let Some(change) = change.filter(|_| kind == WriteKind::Commit) {
            self.fills_begun(&change.answers);
        }
        self.tell_differences(world, before);
        self.committed(world.now);
        self.unpromised_restart(world.now, before);
        let step = if kind == WriteKind::GiveUp { Step::GivenUp } else { Step::Committed };
        self.passed(world, generation, step);
    }

    fn changed_nothing(&self, before: &Status) -> bool {
        let both = before.map.as_ref().zip(self.map());
        both.is_some_and(|(old, new)| !super::plan::differs(old, new))
    }

    /// M7: the wait counts from the commit that left somebody out.
    fn unpromised_restart(&mut self, now: Millis, before: &Status) {
        let was = |copy| before.map.as_ref().and_then(|m| m.place_of(copy)).is_some_and(|p| p.2.unpromised);
        let new = self.map().is_some_and(|map| map.members().any(|m| m.unpromised && !was(m.copy)));
        if new {
            self.unpromised_since = Some(now);
        }
    }
}

impl Change {
    fn has_a_promise(&self) -> bool {
        self.answers.values().any(|answer| matches!(answer, Answer::Promised(_)))
    }

    /// Sends the fence to this server again in a quarter of a second.
    fn ask_soon(&mut self, server: ServerId, now: Millis) {
        self.asked.insert(server, Millis((now.0 + AGAIN_MS / 4).saturating_sub(2 * AGAIN_MS)));
    }

    /// Not given up: safety or somebody's I/O waits for it.
    fn is_firm(&self, map: Option<&VolumeMap>) -> bool {
        let settling = map.is_some_and(VolumeMap::settling);
        self.proposal.purpose.is_failure() || settling || map.is_none()
    }
}

impl Purpose {
    /// Only such a change may leave members out.
    pub(super) fn is_failure(self) -> bool {
        matches!(self, Self::Failure | Self::Recover | Self::Force)
    }
}

/// The servers that serve in a map.
pub(super) fn serving(map: &VolumeMap) -> BTreeSet<ServerId> {
    map.members().filter(|m| m.state != MemberState::Failed).map(|m| m.server).collect()
}
