//! From the committed map, the goal and what the fence answered to the next map: pure (PROTOCOL.md §3 step 1, §5).
//!
//! The same function decides with the answers of a fence, for the commit (H2: nothing about a member comes from
//! anywhere else), and with answers guessed from heartbeats, for whether a change is worth starting. What it returns keeps:
//! every group has an `Active` member that was `Active` before and has promised (R5, I8); `loss` rises when that one
//! lost its boot id (H5); a member becomes `Active` only with 0 unsynced pages (I7) and only after a flush (H11b); a
//! settle is over only when every member that serves settled for its very name (M1, M3); sessions are held meanwhile (M5).

use super::choice::{Choice, Seen, choose};
use super::object::{Forced, NewCopy, SessionWish};
use crate::control::{CopyReport, Promised, SETTLE_ANEW, SettleName};
use crate::ids::{CopyId, Generation, ServerId, SessionId};
use crate::limits::MAX_ORDINALS;
use crate::map::{Group, Member, MemberState, ServerEntry, Session, Settle, Standing, VolumeMap};
use crate::mutants::{Mutant, on};
use std::collections::{BTreeMap, BTreeSet};

/// Sessions of one volume at a time: the map has to stay within its 64 KiB.
const MAX_SESSIONS: usize = 128;

/// What is wanted of the next map. What the answers do not allow is not done.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Goal {
    /// Bytes, whole blocks.
    pub size: u64,
    /// Sessions that may be there, oldest wish first.
    pub sessions: Vec<SessionWish>,
    /// Members to become `Failed` although they answer, where another `Active` one goes on.
    pub leave: BTreeSet<CopyId>,
    /// `Failed` members to become `Syncing`, if under this fence their suspect pages were marked unsynced (H7).
    pub rejoin: BTreeSet<CopyId>,
    /// New copies to become `Syncing`.
    pub add: Vec<NewCopy>,
    /// Members to be taken out; `Active` ones only from a group that keeps so many as [`Goal::copies`] says (R16).
    pub remove: BTreeSet<CopyId>,
    /// Copies that each group is to have.
    pub copies: usize,
    /// Where servers listen now.
    pub addresses: BTreeMap<ServerId, Vec<String>>,
    /// The members flush before they answer this fence (H11b): sessions may end, settles too, members become `Active`.
    pub flushed: bool,
    /// 1.25 read leases have passed since members were left out without their promise (M7).
    pub lease_over: bool,
    /// Copies that are behind and that a person forces, where a group has no `Active` member that answers (I8).
    pub force: BTreeSet<CopyId>,
    /// 60 s have passed since restarted members began to wait for a silent one (R15).
    pub silent_over: bool,
}

/// What a server answered to a fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It promised.
    Promised(Promised),
    /// It answers, but nothing of this volume can serve there: the devices are closed or blank.
    Gone,
    /// It did not answer and is left out (only in a failure change).
    LeftOut,
}

/// The next map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// It.
    pub map: VolumeMap,
    /// Sessions that it ends although they are wished for: a loss on a shared volume, or a person's force.
    pub ended: Vec<SessionId>,
    /// What it forces.
    pub forced: Vec<Forced>,
}

/// Why there is no next map yet. The volume is unavailable, what was promised stays promised, and it is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// A group has no `Active` member that answers (I8).
    NoActive {
        /// Any of these would do.
        copies: Vec<CopyId>,
    },
    /// Restarted members wait for silent ones (H13).
    SilentMember {
        /// All of these.
        copies: Vec<CopyId>,
    },
    /// A session must end that was not foreseen: the fence must be repeated with a flush (H11b).
    NeedsFlush,
}

/// The next map of a volume that has one.
pub fn next_map(
    old: &VolumeMap,
    goal: &Goal,
    answers: &BTreeMap<ServerId, Answer>,
    generation: Generation,
) -> Result<Next, Hold> {
    let mut map = VolumeMap { generation, ..old.clone() };
    map.size = old.size.max(goal.size);
    map.layers[0].size = map.size;
    let kept = kept_sessions(old, goal, answers);
    let mut plan = Plan::new(goal, answers, generation, &kept);
    plan.restart_settles = kept.iter().map(name_of).ne(old.sessions.iter().map(name_of));
    plan.settle_all = kept.len() != old.sessions.len() || !joining(&kept, old, goal).is_empty() || kept.is_empty();
    for (p, placement) in map.placements.iter_mut().enumerate() {
        for (g, group) in placement.groups.iter_mut().enumerate() {
            *group = plan.next_group(group, p as u32, g as u32)?;
        }
    }
    let forced = plan.forced;
    let ended = end_by_loss(&mut map, old, &kept, goal, !forced.is_empty())?;
    if ended.is_empty() {
        map.sessions = kept;
    }
    admit(&mut map, old, goal, &ended);
    map.servers = servers_of(&map, old, goal);
    assert_eq!(map.validate(), Ok(()), "the plan made an invalid map");
    assert!(
        keeps_an_active(old, &map, answers, &forced),
        "the plan left a group without a member that was Active and promised"
    );
    Ok(Next { map, ended, forced })
}

/// The map of a change that is given up: the same members, sessions and boot ids under the next generation; nothing of a
/// reply, and no 'settled' again (R13).
pub fn given_up(old: &VolumeMap, generation: Generation) -> VolumeMap {
    let mut map = VolumeMap { generation, ..old.clone() };
    for group in map.placements.iter_mut().flat_map(|p| &mut p.groups) {
        if group.settle == Settle::Over && !on(Mutant::GiveUpRepeatsSettled) {
            group.settle = Settle::None;
        }
    }
    map
}

/// What R13 forbids, if that very mistake is to be made: boot ids of replies. Else the map as it is.
pub(super) fn mistaken_boots<'a>(mut map: VolumeMap, answers: impl Iterator<Item = &'a Answer>) -> VolumeMap {
    if on(Mutant::GiveUpTakesBoots) {
        let promises = answers.filter_map(|a| if let Answer::Promised(p) = a { Some(p) } else { None });
        let reports: Vec<_> = promises.flat_map(|p| &p.copies).collect();
        for m in map.placements.iter_mut().flat_map(|p| &mut p.groups).flat_map(|g| &mut g.members) {
            m.boot = reports.iter().find(|r| r.copy == m.copy).map_or(m.boot, |r| r.boot);
        }
    }
    map
}

/// Whether two maps differ in anything but their generation and a settle's end.
pub fn differs(old: &VolumeMap, new: &VolumeMap) -> bool {
    let plain = |map: &VolumeMap| given_up(map, Generation(0));
    let over = new.groups().any(|(_, _, g)| g.settle == Settle::Over);
    over || plain(old) != plain(new)
}

/// The places of the answers' copies.
fn report_of(answers: &BTreeMap<ServerId, Answer>, server: ServerId, copy: CopyId) -> Option<&CopyReport> {
    match answers.get(&server)? {
        Answer::Promised(promised) => promised.copies.iter().find(|report| report.copy == copy),
        Answer::Gone | Answer::LeftOut => None,
    }
}

fn seen<'a>(answers: &'a BTreeMap<ServerId, Answer>, member: &Member) -> Seen<'a> {
    match answers.get(&member.server) {
        // No answer asked for or awaited: it counts as silent.
        None | Some(Answer::LeftOut) => Seen::Silent,
        Some(_) => Seen::of(report_of(answers, member.server, member.copy), member.boot),
    }
}

fn name_of(session: &Session) -> (SessionId, u64) {
    (session.id, session.incarnation.0)
}

/// The sessions of the old map that go on, with what the members know of them (H20, R2).
fn kept_sessions(old: &VolumeMap, goal: &Goal, answers: &BTreeMap<ServerId, Answer>) -> Vec<Session> {
    let wished = |s: &&Session| !goal.flushed || goal.sessions.iter().any(|wish| wish.id == s.id);
    let promised = answers.values().filter_map(|answer| match answer {
        Answer::Promised(promised) => Some(promised),
        Answer::Gone | Answer::LeftOut => None,
    });
    let known: Vec<_> = promised.flat_map(|p| &p.sessions).collect();
    let mut kept: Vec<_> = old.sessions.iter().filter(wished).cloned().collect();
    for session in &mut kept {
        for (_, (incarnation, handled)) in known.iter().filter(|(id, _)| *id == session.id) {
            session.incarnation = session.incarnation.max(*incarnation);
            session.handled = session.handled.max(*handled);
        }
    }
    kept
}

/// The wishes that could be admitted beside the kept sessions: all on a shared volume, else one if there is none. A node
/// whose session is replaced (R10) gets the new one only when the old one is out of the committed map before.
fn joining<'a>(kept: &[Session], old: &VolumeMap, goal: &'a Goal) -> Vec<&'a SessionWish> {
    let new = goal.sessions.iter().filter(|wish| kept.iter().all(|s| s.id != wish.id));
    let new = new.filter(|wish| old.sessions.iter().all(|s| s.node != wish.node));
    let most = if old.multi_session { MAX_SESSIONS } else { 1usize }.saturating_sub(kept.len());
    new.take(most).collect()
}

/// H5: on a volume whose access mode allows several sessions a raised loss ends them all; a force does on any, for what it
/// loses was flushed, too (I8).
fn end_by_loss(
    map: &mut VolumeMap,
    old: &VolumeMap,
    kept: &[Session],
    goal: &Goal,
    forced: bool,
) -> Result<Vec<SessionId>, Hold> {
    if !(old.multi_session || forced) || map.loss() == old.loss() || kept.is_empty() || on(Mutant::SharedLossGoesOn) {
        return Ok(Vec::new());
    }
    if !goal.flushed {
        return Err(Hold::NeedsFlush);
    }
    map.sessions.clear();
    Ok(kept.iter().map(|s| s.id).collect())
}

/// Holds everybody while a settle runs (M5); else admits those who are there and, if nobody left out may still answer
/// reads (M7), those who wait.
fn admit(map: &mut VolumeMap, old: &VolumeMap, goal: &Goal, ended: &[SessionId]) {
    let standing = if map.settling() && !on(Mutant::SettleHoldsNobody) { Standing::Held } else { Standing::Admitted };
    for session in &mut map.sessions {
        session.standing = standing;
    }
    let lease_runs = map.members().any(|m| m.unpromised) && !on(Mutant::LeaseNotWaited);
    if standing == Standing::Held || lease_runs || !ended.is_empty() {
        return;
    }
    let joining: Vec<_> = joining(&map.sessions, old, goal).into_iter().cloned().collect();
    map.sessions.extend(joining.into_iter().map(|wish| Session {
        id: wish.id,
        node: wish.node,
        mode: wish.mode,
        incarnation: Default::default(),
        handled: map.generation,
        standing,
    }));
}

fn servers_of(map: &VolumeMap, old: &VolumeMap, goal: &Goal) -> Vec<ServerEntry> {
    let ids: BTreeSet<_> = map.members().map(|m| m.server).collect();
    let addresses = |id: &ServerId| {
        let now = goal.addresses.get(id).filter(|list| !list.is_empty()).cloned();
        now.or_else(|| old.server(*id).map(|entry| entry.addresses.clone())).unwrap_or_default()
    };
    ids.iter().map(|id| ServerEntry { id: *id, addresses: addresses(id) }).collect()
}

/// R5: every group keeps a member that was `Active` before and has promised, but for those that a person forces.
fn keeps_an_active(old: &VolumeMap, new: &VolumeMap, answers: &BTreeMap<ServerId, Answer>, forced: &[Forced]) -> bool {
    old.groups().zip(new.groups()).all(|((_, _, before), (_, _, after))| {
        forced.iter().any(|f| after.member(f.copy).is_some())
            || before.in_state(MemberState::Active).any(|m| {
                let stays = after.member(m.copy).is_some_and(|n| n.state == MemberState::Active);
                stays && matches!(answers.get(&m.server), Some(Answer::Promised(_)))
            })
    })
}

/// What a group allows its members, by the answers of the others.
#[derive(Clone, Copy)]
struct May {
    /// No loss is raised and no settle runs.
    calm: bool,
    /// Another member stays `Active`: one may become `Failed` although it answers, what is not `Active` may be taken out.
    leave: bool,
    /// As many stay `Active` as are wanted: an `Active` one may be taken out.
    go: bool,
}

struct Plan<'a> {
    goal: &'a Goal,
    answers: &'a BTreeMap<ServerId, Answer>,
    generation: Generation,
    /// The sessions of the old map that go on.
    sessions: &'a [Session],
    /// Pages of sessions that are not listed are settled now: sessions come or go, or nobody is disturbed.
    settle_all: bool,
    /// The (session, incarnation)s listed are others than before: what is suspect has changed, so settles begin anew.
    restart_settles: bool,
    forced: Vec<Forced>,
}

impl<'a> Plan<'a> {
    fn new(
        goal: &'a Goal,
        answers: &'a BTreeMap<ServerId, Answer>,
        generation: Generation,
        sessions: &'a [Session],
    ) -> Self {
        Self { goal, answers, generation, sessions, settle_all: false, restart_settles: false, forced: Vec::new() }
    }

    fn next_group(&mut self, old: &Group, placement: u32, group: u32) -> Result<Group, Hold> {
        let active: Vec<_> = old.in_state(MemberState::Active).map(|m| (m.copy, seen(self.answers, m))).collect();
        let raised = match choose(&active, self.goal.silent_over) {
            Choice::GoOn => false,
            Choice::Restarted => true,
            Choice::WaitForSilent(copies) => return Err(Hold::SilentMember { copies }),
            Choice::WaitForActive(copies) => {
                return self.forced_group(old, group).ok_or(Hold::NoActive { copies });
            }
        };
        let calm = !raised && !matches!(old.settle, Settle::Running { .. });
        let stays = |m: &&Member| !self.goal.leave.contains(&m.copy) && !self.goal.remove.contains(&m.copy);
        let others = old.in_state(MemberState::Active).filter(|m| matches!(seen(self.answers, m), Seen::Same(_)));
        let good = others.filter(stays).count();
        let may = May { calm, leave: calm && good > 0, go: self.may_go(calm, good) };
        let mut members: Vec<_> = old.members.iter().filter_map(|m| self.next_member(m, raised, may)).collect();
        if calm {
            let added = self.goal.add.iter().filter(|new| (new.placement, new.group) == (placement, group));
            added.for_each(|new| self.add(&mut members, old, new));
        }
        let loss = if raised && !on(Mutant::LossNotRaised) { self.generation } else { old.loss };
        let mut next = Group { members, loss, settle: Settle::None };
        next.settle = self.next_settle(old, &next, raised);
        Ok(next)
    }

    /// I8: the copy that a person forces is alone in its group from now on, and the loss rises. What the others hold is
    /// kept aside ([`RetiredCopy::kept`](super::object::RetiredCopy::kept)).
    fn forced_group(&mut self, old: &Group, group: u32) -> Option<Group> {
        let wanted = |m: &&Member| self.goal.force.contains(&m.copy);
        let (m, report) = old.members.iter().filter(wanted).find_map(|m| {
            let report = report_of(self.answers, m.server, m.copy)?;
            Some((m, report))
        })?;
        let generation = self.generation;
        self.forced.push(Forced { copy: m.copy, group, generation, was: m.state, unsynced: report.unsynced });
        let member = Member { state: MemberState::Active, boot: report.boot, unpromised: false, ..*m };
        let settle = Settle::Running { authoritative: m.copy, boot: report.boot, begun: generation };
        Some(Group { members: vec![member], loss: generation, settle })
    }

    /// R16: whether an `Active` member may be taken out, with so many others that stay `Active`.
    fn may_go(&self, calm: bool, good: usize) -> bool {
        let enough = if on(Mutant::DrainBlind) { 1 } else { self.goal.copies.max(1) };
        calm && good >= enough
    }

    fn next_member(&self, m: &Member, raised: bool, may: May) -> Option<Member> {
        let seen = seen(self.answers, m);
        let silent = seen == Seen::Silent;
        let may_go = if m.state == MemberState::Active { may.go } else { may.leave };
        if may_go && self.goal.remove.contains(&m.copy) && !self.is_unpromised(m, silent) {
            return None;
        }
        let calm = may.calm;
        let leaves = may.leave && self.goal.leave.contains(&m.copy);
        let filled = |r: &CopyReport| calm && self.goal.flushed && (r.unsynced == 0 || on(Mutant::UnsyncedActive));
        let (state, boot) = match (m.state, seen) {
            (MemberState::Active | MemberState::Syncing, Seen::Same(_)) if leaves => (MemberState::Failed, m.boot),
            (MemberState::Active, Seen::Same(r)) if on(Mutant::RestartUnseen) => (MemberState::Active, r.boot),
            (MemberState::Active, Seen::Same(_)) => (MemberState::Active, m.boot),
            (MemberState::Active, Seen::Restarted(r)) if raised => (MemberState::Active, r.boot),
            // I7; in no map that raises a loss, and not while a settle runs.
            (MemberState::Syncing, Seen::Same(r)) if filled(r) => (MemberState::Active, m.boot),
            (MemberState::Syncing, Seen::Same(_)) => (MemberState::Syncing, m.boot),
            (MemberState::Failed, Seen::Same(r) | Seen::Restarted(r))
                if calm && self.goal.rejoin.contains(&m.copy) && (r.listed || on(Mutant::ListNotAwaited)) =>
            {
                (MemberState::Syncing, r.boot)
            }
            _ => (MemberState::Failed, m.boot),
        };
        Some(Member { state, boot, unpromised: self.is_unpromised(m, silent), ..*m })
    }

    /// M7: left out without its promise, by this map or an earlier one whose lease still runs.
    fn is_unpromised(&self, m: &Member, silent: bool) -> bool {
        silent
            && !on(Mutant::UnpromisedUnmarked)
            && (m.state != MemberState::Failed || (m.unpromised && !self.goal.lease_over))
    }

    fn add(&self, members: &mut Vec<Member>, old: &Group, new: &NewCopy) {
        let Some(report) = report_of(self.answers, new.server, new.copy) else { return };
        if members.iter().any(|m| m.server == new.server) {
            return;
        }
        let Some(ordinal) = free_ordinal(old, members) else { return };
        members.push(Member {
            ordinal,
            copy: new.copy,
            server: new.server,
            boot: report.boot,
            state: MemberState::Syncing,
            avoid: false,
            unpromised: false,
        });
    }

    /// The settle of a group in the next map (H12, R1, M1–M3).
    fn next_settle(&self, old: &Group, next: &Group, raised: bool) -> Settle {
        let first = next.first_active().expect("chosen: a group keeps an Active member");
        let anew = Settle::Running { authoritative: first.copy, boot: first.boot, begun: self.generation };
        let Settle::Running { authoritative, boot, begun } = old.settle else {
            return if raised || (self.settle_all && self.leftover(next) && !on(Mutant::DeadPendingIgnored)) {
                anew
            } else {
                Settle::None
            };
        };
        let source = next.member(authoritative);
        let lives = source.is_some_and(|m| m.state == MemberState::Active && m.boot == boot);
        let name = SettleName { authoritative, boot, begun };
        if raised || (!lives && !on(Mutant::SourceKept)) || self.restart_settles || self.is_mended(source, name) {
            return anew;
        }
        let settled = |m: &Member| self.has_settled(m, old, name);
        let early = on(Mutant::SettleEndsEarly) && next.writers().any(settled);
        if self.goal.flushed && (early || next.writers().all(settled)) { Settle::Over } else { old.settle }
    }

    /// The authoritative copy took what it had stale from another member: what it served before is not what it has now.
    fn is_mended(&self, source: Option<&Member>, name: SettleName) -> bool {
        let report = source.and_then(|m| report_of(self.answers, m.server, m.copy));
        report.is_some_and(|r| r.settled_for == Some(name) && r.to_settle == SETTLE_ANEW)
    }

    /// M1, M3: its report is of this very settle, it served in the map before under this boot id, and nothing is left.
    fn has_settled(&self, m: &Member, old: &Group, name: SettleName) -> bool {
        let served = old.member(m.copy).is_some_and(|o| o.state != MemberState::Failed && o.boot == m.boot);
        let Some(report) = report_of(self.answers, m.server, m.copy) else { return false };
        // The authoritative copy takes only what it has stale from others: else the flush before this answer is its report.
        let mends = report.settled_for == Some(name) && report.to_settle > 0;
        let own = m.copy == name.authoritative && !mends || on(Mutant::WrongAuthority);
        served
            && report.boot == m.boot
            && (own || ((report.settled_for == Some(name) || on(Mutant::SettleNotNamed)) && report.to_settle == 0))
    }

    /// Whether a member that serves has pages pending of a (session, incarnation) that is not listed, or from before
    /// its start (M1: a member that missed the end of a settle says so here).
    fn leftover(&self, next: &Group) -> bool {
        let listed =
            |id: SessionId, incarnation| self.sessions.iter().any(|s| s.id == id && s.incarnation <= incarnation);
        next.writers().filter_map(|m| report_of(self.answers, m.server, m.copy)).any(|report| {
            let dead = |(id, (incarnation, pages)): &(SessionId, (_, u64))| *pages > 0 && !listed(*id, *incarnation);
            report.pending_before_start > 0 || report.pending.iter().any(dead)
        })
    }
}

/// An ordinal that no member has, the next above the highest if there is one: masks may still name one that was given up.
fn free_ordinal(old: &Group, members: &[Member]) -> Option<u8> {
    let taken = |ordinal: u8| old.members.iter().chain(members).any(|m| m.ordinal == ordinal);
    let highest = old.members.iter().chain(members).map(|m| m.ordinal).max().unwrap_or(0);
    (1..=MAX_ORDINALS).map(|step| (highest + step) % MAX_ORDINALS).find(|ordinal| !taken(*ordinal))
}

/// What a first map is made of.
#[derive(Clone, Copy, Debug)]
pub struct First<'a> {
    /// The volume.
    pub volume: crate::ids::VolumeId,
    /// Its policy.
    pub policy: &'a super::object::Policy,
    /// The access mode allows several sessions.
    pub multi_session: bool,
    /// The id of its layer.
    pub layer: crate::ids::LayerId,
    /// Its copies, group by group, first copies first.
    pub copies: &'a [NewCopy],
}

/// The first map of a volume; `None` if a copy is not where it was put.
pub fn first_map(
    first: First<'_>,
    goal: &Goal,
    answers: &BTreeMap<ServerId, Answer>,
    generation: Generation,
) -> Option<VolumeMap> {
    let policy = first.policy;
    let empty = Group { members: Vec::new(), loss: Generation(0), settle: Settle::None };
    let mut groups = vec![empty; usize::from(policy.groups)];
    for new in first.copies {
        let report = report_of(answers, new.server, new.copy)?;
        let members = &mut groups[new.group as usize].members;
        members.push(Member {
            ordinal: members.len() as u8,
            copy: new.copy,
            server: new.server,
            boot: report.boot,
            state: MemberState::Active,
            avoid: false,
            unpromised: false,
        });
    }
    let layer = crate::map::Layer {
        id: first.layer,
        size: goal.size,
        page_bytes: policy.page_bytes,
        scheme: crate::map::Scheme::Replicate,
        chunk_bytes: policy.chunk_bytes,
        placement: 0,
        sealed: None,
    };
    let mut map = VolumeMap {
        volume: first.volume,
        generation,
        format: crate::map::MAP_FORMAT,
        required_features: 0,
        size: goal.size,
        multi_session: first.multi_session,
        servers: Vec::new(),
        placements: vec![crate::map::Placement { groups }],
        layers: vec![layer],
        sessions: Vec::new(),
        revoked: Vec::new(),
    };
    let bare = map.clone();
    admit(&mut map, &bare, goal, &[]);
    map.servers = servers_of(&map, &bare, goal);
    assert_eq!(map.validate(), Ok(()), "the plan made an invalid first map");
    Some(map)
}
