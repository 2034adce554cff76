//! What a volume needs next, and whether it is worth starting (PROTOCOL.md §3 step 1; H24).
//!
//! The goal is put together from wishes and heartbeats, the fence's answers are guessed from heartbeats, and the plan is
//! made with them. Only if it differs from the committed map is a change begun: nothing is fenced to find out. A wrong
//! guess costs a pause, never safety; what is committed follows from the fence alone (H2).

use super::ServerHealth;
use super::heartbeat::{Hint, ServerState};
use super::object::{NewCopy, Policy, Purpose};
use super::placement::{self, Candidate, Need, Refusal};
use super::plan::{Answer, Goal, Hold, differs, next_map};
use super::reconfigure::serving;
use super::volume::{Volume, World};
use crate::control::{CopyReport, Promised, SETTLE_ANEW, SettleName};
use crate::ids::{BootId, CopyId, Generation, LayerId, ServerId};
use crate::limits::{READ_LEASE_WAIT_MS, SILENT_MEMBER_MS};
use crate::map::{Group, Member, MemberState, Settle, VolumeMap};
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use std::collections::{BTreeMap, BTreeSet};

/// Stands for an opening that is not known.
const OTHER_BOOT: BootId = BootId(u128::MAX);
/// A server without room is asked again after this long, milliseconds.
const FULL_MS: u64 = 60_000;
/// A driver's report of no progress counts for so long, milliseconds.
const STALLED_MS: u64 = 10_000;
/// A server that is back has so long to rejoin before its members are replaced, milliseconds.
const BACK_MS: u64 = 10_000;
/// What was refused is tried again after this long, if nothing wakes it before, milliseconds.
const REFUSED_MS: u64 = 10_000;

/// A change that is worth starting.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) purpose: Purpose,
    pub(super) goal: Goal,
    pub(super) layer: LayerId,
    pub(super) required: BTreeSet<ServerId>,
    pub(super) optional: BTreeSet<ServerId>,
}

impl Volume {
    /// Begins a change if one is needed and can be finished.
    pub(super) fn start_change(&mut self, world: &mut World<'_>) {
        if world.now < self.retry_at {
            world.wake_at(self.retry_at);
            return;
        }
        let start = if self.map().is_some() { self.next_start(world) } else { self.first_start(world) };
        if let Some(start) = start {
            self.intend(world, start);
        }
    }

    fn first_start(&mut self, world: &mut World<'_>) -> Option<Start> {
        if self.object.wishes.deleted || world.servers.by_id.values().any(|s| s.health == ServerHealth::Unknown) {
            return None;
        }
        let wishes = &self.object.wishes;
        let placed = placement::check(wishes.size, wishes.policy.as_ref()).and_then(|policy| {
            let near = (wishes.near_node.as_str(), wishes.near_zone.as_str());
            let size = placement::whole_blocks(wishes.size);
            let need = Need { policy, size, near_node: near.0, near_zone: near.1 };
            placement::place(need, &self.candidates(world))
        });
        let groups = match placed {
            Ok(groups) => groups,
            Err(refusal) => {
                self.refusal = Some(refusal);
                world.wake_at(world.now.after(REFUSED_MS));
                return None;
            }
        };
        self.refusal = None;
        let mut goal = self.base_goal(world);
        for (g, servers) in groups.into_iter().enumerate() {
            for server in servers {
                let copy = CopyId((world.mint)());
                goal.add.push(NewCopy { copy, server, placement: 0, group: g as u32, unsynced: false });
            }
        }
        let required = goal.add.iter().map(|new| new.server).collect();
        let layer = LayerId((world.mint)());
        Some(Start { purpose: Purpose::Create, goal, layer, required, optional: BTreeSet::new() })
    }

    fn next_start(&mut self, world: &mut World<'_>) -> Option<Start> {
        let map = self.object.status.map.clone()?;
        let mut goal = self.base_goal(world);
        let failing = self.must || self.is_failing(&map, world);
        let purpose = if failing {
            // A loss that the fence finds out would end all sessions (H5).
            goal.flushed = map.multi_session;
            self.leave_stalled(&map, &mut goal, world);
            self.force_goal(&map, &mut goal, world);
            match () {
                () if !goal.force.is_empty() => Purpose::Force,
                () if self.must => Purpose::Recover,
                () => Purpose::Failure,
            }
        } else {
            self.planned_goal(&map, &mut goal, world)
        };
        let guess = self.guess(&map, &goal, world)?;
        let next = match next_map(&map, &goal, &guess, self.status().highest().next()) {
            Ok(next) => next,
            Err(Hold::NeedsFlush) => {
                goal.flushed = true;
                next_map(&map, &goal, &guess, self.status().highest().next()).ok()?
            }
            Err(hold) => {
                self.note_hold(hold, world);
                return self.ask_mute_ones(&map, goal, &guess, world);
            }
        };
        self.hold = None;
        self.silent_since = None;
        let worth = self.must || differs(&map, &next.map);
        if !worth || (!failing && !self.is_served(world)) {
            return None;
        }
        let required = serving(&map);
        let new = next.map.members().filter(|m| m.state != MemberState::Failed).map(|m| m.server);
        let forced = map.members().filter(|m| goal.force.contains(&m.copy)).map(|m| m.server);
        let optional = new.chain(forced).filter(|id| !required.contains(id)).collect();
        Some(Start { purpose, goal, layer: LayerId::NONE, required, optional })
    }

    /// The group cannot do without a server that left fences unanswered but lives: it is asked again.
    fn ask_mute_ones(
        &self,
        map: &VolumeMap,
        goal: Goal,
        guess: &BTreeMap<ServerId, Answer>,
        world: &World<'_>,
    ) -> Option<Start> {
        let mute = guess.iter().any(|(id, answer)| *answer == Answer::LeftOut && world.servers.is_alive(*id));
        let (required, optional, layer) = (serving(map), BTreeSet::new(), LayerId::NONE);
        mute.then_some(Start { purpose: Purpose::Recover, goal, layer, required, optional })
    }

    fn note_hold(&mut self, hold: Hold, world: &mut World<'_>) {
        if matches!(hold, Hold::SilentMember { .. }) {
            let since = *self.silent_since.get_or_insert(world.now);
            world.wake_at(since.after(SILENT_MEMBER_MS));
        } else {
            self.silent_since = None;
        }
        self.hold = Some(hold);
    }

    /// What every change aims at.
    fn base_goal(&self, world: &mut World<'_>) -> Goal {
        let wishes = &self.object.wishes;
        let now = world.now;
        let over = |since: Option<Millis>, ms: u64| since.is_some_and(|at| now.since(at) >= ms);
        if let Some(since) = self.unpromised_since.filter(|_| !over(self.unpromised_since, READ_LEASE_WAIT_MS)) {
            world.wake_at(since.after(READ_LEASE_WAIT_MS));
        }
        let ended = |id| self.status().ended.contains(&id);
        let sessions = wishes.sessions.iter().filter(|wish| !ended(wish.id));
        // A volume that is being deleted takes nobody in any more.
        let listed = |id| self.map().is_some_and(|map| map.session(id).is_some());
        let sessions = sessions.filter(|wish| !wishes.deleted || listed(wish.id));
        Goal {
            size: self.map().map_or(placement::whole_blocks(wishes.size), |map| map.size),
            sessions: sessions.cloned().collect(),
            addresses: self.addresses(world),
            lease_over: over(self.unpromised_since, READ_LEASE_WAIT_MS),
            silent_over: over(self.silent_since, SILENT_MEMBER_MS),
            copies: self.wanted(),
            ..Goal::default()
        }
    }

    fn addresses(&self, world: &World<'_>) -> BTreeMap<ServerId, Vec<String>> {
        let of = |(id, server): (&ServerId, &ServerState)| {
            server.object.as_ref().map(|object| (*id, object.addresses.clone()))
        };
        world.servers.by_id.iter().filter_map(of).collect()
    }

    /// Whether a member that serves is away, restarted or closed, or is said not to serve.
    fn is_failing(&self, map: &VolumeMap, world: &World<'_>) -> bool {
        map.members().filter(|m| m.state != MemberState::Failed).any(|m| match world.servers.health(m.server) {
            ServerHealth::Alive if self.may_leave_out(world, m.server) => true,
            ServerHealth::Alive => {
                let hint = world.servers.of(m.server).map(|server| server.hint(m));
                hint != Some(Hint::Same) || self.suspects.contains(&m.copy) || self.stalls(map, m, world)
            }
            ServerHealth::Failed | ServerHealth::Foreign => true,
            ServerHealth::Unknown | ServerHealth::Suspected => self.may_leave_out(world, m.server),
        })
    }

    /// The copies that a person forces now: the word was given for this very generation.
    pub(super) fn forced_copies(&self) -> Option<&BTreeSet<CopyId>> {
        let force = self.object.wishes.force.as_ref().filter(|force| force.generation == self.status().generation)?;
        Some(&force.copies)
    }

    /// What a person forces may end every session, so members flush before they answer (H11b).
    fn force_goal(&self, map: &VolumeMap, goal: &mut Goal, world: &World<'_>) {
        let Some(copies) = self.forced_copies() else { return };
        let there = |copy: &CopyId| map.place_of(*copy).is_some_and(|(_, _, m)| self.can_be_forced(m, world));
        goal.force = copies.iter().copied().filter(there).collect();
        goal.flushed |= !goal.force.is_empty();
    }

    /// A copy that is behind and whose server answers.
    pub(super) fn can_be_forced(&self, m: &Member, world: &World<'_>) -> bool {
        let open = |s: &ServerState| s.is_alive() && s.hint(m) != Hint::Closed;
        m.state != MemberState::Active && !self.lost.contains(&m.copy) && world.servers.of(m.server).is_some_and(open)
    }

    /// A driver got no progress out of it, and its group can do without.
    fn stalls(&self, map: &VolumeMap, m: &Member, world: &World<'_>) -> bool {
        let Some((p, g, _)) = map.place_of(m.copy) else { return false };
        let group = &map.placements[p as usize].groups[g as usize];
        let good = |o: &&Member| world.servers.is_alive(o.server) && !self.is_stalled(o, world.now);
        self.is_stalled(m, world.now) && group.in_state(MemberState::Active).filter(good).count() > 0
    }

    pub(super) fn is_stalled(&self, m: &Member, now: Millis) -> bool {
        self.stalled.get(&m.copy).is_some_and(|at| now.since(*at) < STALLED_MS)
    }

    fn is_barred(&self, m: &Member, now: Millis) -> bool {
        self.barred_until.get(&m.copy).is_some_and(|until| *until > now)
    }

    fn leave_stalled(&self, map: &VolumeMap, goal: &mut Goal, world: &World<'_>) {
        goal.leave.extend(map.members().filter(|m| self.stalls(map, m, world)).map(|m| m.copy));
    }

    fn planned_goal(&mut self, map: &VolumeMap, goal: &mut Goal, world: &mut World<'_>) -> Purpose {
        self.grow(map, goal, world);
        for (p, g, group) in map.groups() {
            self.group_goal(map, (p, g), group, goal, world);
        }
        let ends = map.sessions.iter().any(|s| goal.sessions.iter().all(|wish| wish.id != s.id));
        let joins = goal.sessions.iter().any(|wish| map.session(wish.id).is_none());
        let finishes = map.groups().any(|(_, _, group)| self.may_finish(group, world));
        goal.flushed = ends || finishes;
        if finishes {
            Purpose::Finish
        } else if ends || joins {
            Purpose::Sessions
        } else if !goal.rejoin.is_empty() || !goal.add.is_empty() {
            Purpose::Rejoin
        } else {
            Purpose::Shape
        }
    }

    fn grow(&mut self, map: &VolumeMap, goal: &mut Goal, world: &World<'_>) {
        let wished = placement::whole_blocks(self.object.wishes.size);
        self.refusal = None;
        if wished <= map.size {
            return;
        }
        let Some(policy) = self.object.wishes.policy else {
            self.refusal = Some(Refusal::UnknownPolicy);
            return;
        };
        let share = |size| placement::share_bytes(size, policy.groups, policy.page_bytes);
        let more = share(wished) - share(map.size);
        let mut needs: BTreeMap<ServerId, u64> = BTreeMap::new();
        map.members().for_each(|m| *needs.entry(m.server).or_default() += more);
        let candidates = self.all_candidates(world);
        let room =
            |id: &ServerId| candidates.iter().find(|c| c.id == *id).map(|c| placement::room_for_growth(c, &policy));
        let short = needs.iter().find(|(id, need)| room(id).is_some_and(|room| room < **need));
        match short {
            Some((id, need)) => {
                let room_bytes = room(id).unwrap_or(0);
                self.refusal = Some(Refusal::TooLarge { needed_bytes: *need, room_bytes });
            }
            None => goal.size = wished,
        }
    }

    /// Who leaves, comes back, is replaced or is no longer needed in a group.
    fn group_goal(
        &mut self,
        map: &VolumeMap,
        place: (u32, u32),
        group: &Group,
        goal: &mut Goal,
        world: &mut World<'_>,
    ) {
        let waits = group.members.iter().filter_map(|m| self.barred_until.get(&m.copy)).filter(|at| **at > world.now);
        waits.for_each(|at| world.wake = world.wake.min(*at));
        let asked = |m: &Member| world.servers.of(m.server).is_some_and(|s| s.alive.leaving);
        let leaving = |m: &Member| asked(m) || self.is_stalled(m, world.now);
        let drained = |m: &Member| self.is_drained(m.server, world);
        goal.leave.extend(group.members.iter().filter(|m| leaving(m)).map(|m| m.copy));
        let wanted = self.wanted();
        let lasting = |m: &&Member| !drained(m);
        let good: Vec<_> = group.in_state(MemberState::Active).filter(lasting).filter(|m| !leaving(m)).collect();
        if good.len() >= wanted {
            let surplus = group.members.iter().filter(|m| m.state != MemberState::Active || drained(m));
            goal.remove.extend(surplus.map(|m| m.copy));
            goal.remove.extend(beyond(good, wanted, world));
            return;
        }
        // Who leaves for a while is not replaced at once.
        let mut there = group.writers().filter(lasting).count();
        let stays: Vec<_> = group.in_state(MemberState::Failed).filter(lasting).map(|m| (m, leaving(m))).collect();
        for (m, leaving) in stays {
            if there >= wanted {
                break;
            }
            if self.may_rejoin(m, world) && !leaving {
                goal.rejoin.insert(m.copy);
                there += 1;
            } else if !self.is_given_up(m, world) {
                there += 1;
            }
        }
        if matches!(group.settle, Settle::Running { .. }) {
            return;
        }
        if there < wanted {
            self.add_replacement(map, place, group, goal, world);
        }
    }

    /// Copies that each group is to have. Whoever does not know takes none away.
    fn wanted(&self) -> usize {
        self.object.wishes.policy.map_or(usize::MAX, |p| usize::from(p.copies))
    }

    fn add_replacement(
        &mut self,
        map: &VolumeMap,
        (placement, group_number): (u32, u32),
        group: &Group,
        goal: &mut Goal,
        world: &mut World<'_>,
    ) {
        let Some(policy) = self.object.wishes.policy else { return };
        let lost: Vec<_> = group.members.iter().filter(|m| self.lost.contains(&m.copy)).copied().collect();
        let beside: Vec<_> = group.members.iter().filter(|m| !lost.contains(m)).map(|m| m.server).collect();
        let mut load = BTreeMap::new();
        goal.add.iter().for_each(|new| *load.entry(new.server).or_insert(0u64) += 1);
        let need = Need { policy: &policy, size: map.size, near_node: "", near_zone: "" };
        let candidates = self.candidates(world);
        match placement::pick(need, &candidates, &beside, &BTreeSet::new(), &load) {
            Ok(server) => {
                goal.remove.extend(lost.iter().map(|m| m.copy));
                let copy = CopyId((world.mint)());
                goal.add.push(NewCopy { copy, server, placement, group: group_number, unsynced: true });
            }
            Err(refusal) => {
                self.refusal = Some(refusal);
                world.wake_at(world.now.after(REFUSED_MS));
            }
        }
    }

    fn is_drained(&self, server: ServerId, world: &World<'_>) -> bool {
        world.servers.of(server).and_then(|s| s.object.as_ref()).is_some_and(|object| object.drain)
    }

    fn may_rejoin(&self, m: &Member, world: &World<'_>) -> bool {
        let Some(server) = world.servers.of(m.server).filter(|s| s.is_alive()) else { return false };
        // H24: it answers orders about this volume, for it has stored the committed map.
        let answers = self.served_at(m.server).is_some();
        answers && !self.lost.contains(&m.copy) && !self.is_barred(m, world.now) && server.hint(m) != Hint::Closed
    }

    /// Away for longer than `rebuildAfter`, or for ever.
    fn is_given_up(&self, m: &Member, world: &mut World<'_>) -> bool {
        let after = self.object.wishes.policy.map_or(u64::MAX, |p| p.rebuild_after_ms);
        let since = self.failed_since.get(&m.copy).copied().unwrap_or(world.now);
        if world.now.since(since) < after {
            world.wake_at(since.after(after));
        }
        if self.lost.contains(&m.copy) {
            return true;
        }
        // Who is just back is given the time to rejoin.
        let alive = world.servers.of(m.server).and_then(|server| server.alive_since);
        let back = alive.map(|at| at.max(self.serving_since(m.server).unwrap_or(at)).after(BACK_MS));
        if let Some(until) = back.filter(|until| *until > world.now && !self.is_barred(m, world.now)) {
            world.wake_at(until);
            return false;
        }
        world.now.since(since) >= after
    }

    /// Whether heartbeats say that a member is filled, or a settle is done or must begin anew.
    fn may_finish(&self, group: &Group, world: &World<'_>) -> bool {
        if let Settle::Running { authoritative, .. } = group.settle {
            let ends = |m: &Member, left| left == 0 || (left == SETTLE_ANEW && m.copy == authoritative);
            let settled = |m: &Member| self.hinted(m, world).is_some_and(|(_, to_settle)| ends(m, to_settle));
            let early = on(Mutant::SettleEndsEarly) && group.writers().any(settled);
            return early || group.writers().all(settled);
        }
        group
            .in_state(MemberState::Syncing)
            .any(|m| self.hinted(m, world).is_some_and(|(unsynced, _)| unsynced == 0 || on(Mutant::UnsyncedActive)))
    }

    /// (unsynced, to settle) as a heartbeat said that was sent after the server stored the committed map.
    fn hinted(&self, m: &Member, world: &World<'_>) -> Option<(u64, u64)> {
        let server = world.servers.of(m.server)?;
        let stored = self.served_at(m.server)?;
        if server.alive_sent <= stored || !server.is_alive() {
            return None;
        }
        Some(server.progress(m.copy).map_or((0, 0), |progress| (progress.unsynced, progress.to_settle)))
    }

    /// What the fence would be answered, as heartbeats have it; `None` = a member that serves may be there or not.
    fn guess(&self, map: &VolumeMap, goal: &Goal, world: &World<'_>) -> Option<BTreeMap<ServerId, Answer>> {
        let serving = serving(map);
        let mut guess = BTreeMap::new();
        let servers = serving.iter().copied().chain(goal.add.iter().map(|new| new.server));
        let named = |m: &&Member| goal.rejoin.contains(&m.copy) || goal.force.contains(&m.copy);
        let rejoining = map.members().filter(named).map(|m| m.server);
        for id in servers.chain(rejoining).collect::<BTreeSet<_>>() {
            let answer = match world.servers.health(id) {
                _ if serving.contains(&id) && self.may_leave_out(world, id) => Answer::LeftOut,
                ServerHealth::Alive => Answer::Promised(self.guess_promise(map, goal, world, id)),
                _ => return None,
            };
            guess.insert(id, answer);
        }
        Some(guess)
    }

    fn guess_promise(&self, map: &VolumeMap, goal: &Goal, world: &World<'_>, id: ServerId) -> Promised {
        let mut copies = Vec::new();
        for (_, _, group) in map.groups() {
            let here = group.members.iter().filter(|m| m.server == id);
            copies.extend(here.filter_map(|m| self.guess_report(group, m, world)));
        }
        let blank = |new: &NewCopy| CopyReport { copy: new.copy, boot: OTHER_BOOT, ..blank_report() };
        copies.extend(goal.add.iter().filter(|new| new.server == id).map(blank));
        Promised { server: id, generation: Generation(0), stored: Generation(0), sessions: Vec::new(), copies }
    }

    fn guess_report(&self, group: &Group, m: &Member, world: &World<'_>) -> Option<CopyReport> {
        let boot = match world.servers.of(m.server)?.hint(m) {
            Hint::Closed => return None,
            Hint::Same if !self.suspects.contains(&m.copy) => m.boot,
            Hint::Same | Hint::Restarted => OTHER_BOOT,
        };
        let (unsynced, to_settle) = self.hinted(m, world).unwrap_or((1, 1));
        let settled_for = match group.settle {
            Settle::Running { authoritative, boot, begun } => Some(SettleName { authoritative, boot, begun }),
            Settle::None | Settle::Over => None,
        };
        Some(CopyReport { copy: m.copy, boot, unsynced, settled_for, to_settle, ..blank_report() })
    }

    /// Servers that may take a new copy.
    fn candidates(&self, world: &World<'_>) -> Vec<Candidate> {
        let full = |id| self.full.get(&id).is_some_and(|at| world.now.since(*at) < FULL_MS);
        let open = |c: &Candidate| world.servers.of(c.id).is_some_and(ServerState::takes_copies) && !full(c.id);
        self.all_candidates(world).into_iter().filter(open).collect()
    }

    fn all_candidates(&self, world: &World<'_>) -> Vec<Candidate> {
        // What an abandoned proposal of this volume promised is free again.
        let others =
            world.rooms.iter().filter(|(volume, _)| **volume != self.id()).flat_map(|(_, rooms)| rooms.clone());
        world.servers.candidates(others.chain(self.mapped_rooms()))
    }

    /// Bytes that this volume is promised on servers.
    pub(super) fn rooms(&self) -> Vec<(ServerId, u64)> {
        self.mapped_rooms().into_iter().chain(self.proposed_rooms()).collect()
    }

    fn mapped_rooms(&self) -> Vec<(ServerId, u64)> {
        let Some(map) = self.map() else { return Vec::new() };
        let kept = self.status().retired.iter().filter(|r| r.kept);
        let share = |m: &VolumeMap, placement: u32| {
            let groups = m.placements[placement as usize].groups.len() as u8;
            placement::share_bytes(m.size, groups, m.top().page_bytes)
        };
        let lie = map.groups().flat_map(|(p, _, group)| group.members.iter().map(move |m| (m.server, share(map, p))));
        lie.chain(kept.map(|r| (r.server, share(map, 0)))).collect()
    }

    fn proposed_rooms(&self) -> Vec<(ServerId, u64)> {
        let wishes = &self.object.wishes;
        let (Some(proposal), Some(policy)) = (&self.status().proposed, &wishes.policy) else { return Vec::new() };
        let share = placement::share_bytes(wishes.size, policy.groups, policy.page_bytes);
        let lie = |new: &&NewCopy| self.map().is_none_or(|map| map.place_of(new.copy).is_none());
        proposal.copies.iter().filter(lie).map(|new| (new.server, share)).collect()
    }

    /// The policy that the volume was placed by.
    pub(super) fn policy(&self) -> Option<&Policy> {
        self.object.wishes.policy.as_ref()
    }
}

/// The members beyond the wanted number: first those that share their zone with another, then the newest (R16).
fn beyond(mut good: Vec<&Member>, wanted: usize, world: &World<'_>) -> Vec<CopyId> {
    let zone = |m: &Member| {
        let zone = world.servers.of(m.server).and_then(|s| s.object.as_ref()).map(|object| object.zone.clone());
        zone.filter(|zone| !zone.is_empty())
    };
    let mut surplus = Vec::new();
    while good.len() > wanted {
        // A member that comes into a group is put behind the others.
        let shares =
            |m: &&Member| zone(m).is_some_and(|own| good.iter().filter(|o| zone(o).as_ref() == Some(&own)).count() > 1);
        let worst = good.iter().rposition(shares).unwrap_or(good.len() - 1);
        surplus.push(good.remove(worst).copy);
    }
    surplus
}

fn blank_report() -> CopyReport {
    CopyReport {
        copy: CopyId::NONE,
        boot: BootId::NONE,
        unsynced: 0,
        pending: Vec::new(),
        pending_before_start: 0,
        settled_for: None,
        to_settle: 0,
        // What the fence will find out.
        listed: true,
    }
}
