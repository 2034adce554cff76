//! What people see of a volume: conditions, told when they change, and events at commits.

use super::Output;
use super::condition::{Condition, ConditionKind, EventReason, Reason};
use super::diverged::Doubt;
use super::object::Status;
use super::placement::Refusal;
use super::plan::Hold;
use super::volume::{Volume, World};
use crate::ids::{CopyId, ServerId};
use crate::map::{Group, Member, MemberState, VolumeMap};
use std::collections::BTreeSet;
use std::fmt::{Display, Write as _};

impl Volume {
    /// Tells conditions and progress, if they changed.
    pub(super) fn show(&mut self, world: &mut World<'_>) {
        let conditions = vec![
            self.placed(),
            self.available(world),
            self.healthy(world),
            self.settled(),
            self.out_of_space(world),
            self.diverged(world),
            self.deleting(world),
        ];
        if conditions != self.conditions {
            self.conditions.clone_from(&conditions);
            world.out.push(Output::Conditions { volume: self.id(), conditions });
        }
        self.show_progress(world);
    }

    fn placed(&self) -> Condition {
        let kind = ConditionKind::Placed;
        let shrink = self.map().filter(|map| self.object.wishes.size.div_ceil(4096) * 4096 < map.size);
        match (self.refusal, shrink, self.map()) {
            (Some(refusal), _, map) => {
                let text = match map {
                    Some(_) => format!("not as wished: {refusal}; tried again when servers or wishes change"),
                    None => format!("{refusal}; tried again when servers or wishes change"),
                };
                Condition { kind, holds: map.is_some(), reason: reason_of(refusal), text }
            }
            (None, Some(map), _) => {
                let text = format!("a volume only grows: it keeps its {} bytes", map.size);
                Condition { kind, holds: true, reason: Reason::ShrinkRefused, text }
            }
            (None, None, Some(map)) => {
                let servers = map.servers.len();
                let text = format!("{} groups on {servers} servers", map.groups().count());
                Condition { kind, holds: true, reason: Reason::AsWished, text }
            }
            (None, None, None) => {
                let text = "not placed yet".to_string();
                Condition { kind, holds: false, reason: Reason::Pending, text }
            }
        }
    }

    fn available(&self, world: &World<'_>) -> Condition {
        let kind = ConditionKind::Available;
        let no = |reason, text| Condition { kind, holds: false, reason, text };
        let Some(map) = self.map() else { return no(Reason::Pending, "there is no map".to_string()) };
        match &self.hold {
            Some(Hold::SilentMember { copies }) => {
                let text =
                    format!("all members that answer have restarted; waiting for {}", places(map, copies, world));
                return no(Reason::WaitingForSilentMember, text);
            }
            Some(Hold::NoActive { copies }) => {
                return no(Reason::WaitingForCopies, self.waiting_text(map, copies, world));
            }
            Some(Hold::NeedsFlush) | None => {}
        }
        let away = |group: &&Group| group.in_state(MemberState::Active).all(|m| !world.servers.is_alive(m.server));
        if let Some(group) = map.groups().map(|(_, _, group)| group).find(away) {
            let copies: Vec<_> = group.in_state(MemberState::Active).map(|m| m.copy).collect();
            return no(Reason::WaitingForCopies, self.waiting_text(map, &copies, world));
        }
        let text = "every group has an up-to-date copy".to_string();
        Condition { kind, holds: true, reason: Reason::AsWished, text }
    }

    /// What is missing, and what a person can do if it never comes back (I8).
    fn waiting_text(&self, map: &VolumeMap, copies: &[CopyId], world: &World<'_>) -> String {
        let mut text = format!("no up-to-date copy answers; waiting for one of {}", places(map, copies, world));
        let waits = |group: &&Group| group.members.iter().any(|m| copies.contains(&m.copy));
        let groups = map.groups().map(|(_, _, group)| group).filter(waits);
        let behind: Vec<_> = groups.flat_map(|g| &g.members).filter(|m| self.can_be_forced(m, world)).collect();
        if behind.is_empty() {
            return text;
        }
        let lacks = |m: &&Member| format!("{} ({})", places(map, &[m.copy], world), self.lacks(m, world));
        let _ = write!(
            text,
            ". If they never come back, a person can go on with a copy that is behind, and lose what it lacks: {}. Stop the              servers and nodes that do not answer, then set spec.force to {{generation: {}, copies: [one of these for each              group that waits], othersAreStopped: true}}",
            join(behind.iter().map(lacks)),
            self.status().generation
        );
        text
    }

    fn lacks(&self, m: &Member, world: &World<'_>) -> String {
        let progress = world.servers.of(m.server).and_then(|s| s.progress(m.copy));
        match progress.filter(|p| p.unsynced > 0) {
            Some(p) => format!("{} of {} pages are not filled: they are old or empty", p.unsynced, p.pages),
            None => "lacks all that was written since it was left out".to_string(),
        }
    }

    fn healthy(&self, world: &World<'_>) -> Condition {
        let kind = ConditionKind::Healthy;
        let Some(map) = self.map() else {
            let text = "there is no map".to_string();
            return Condition { kind, holds: false, reason: Reason::Pending, text };
        };
        let wanted = self.policy().map_or(1, |p| usize::from(p.copies));
        let short = |group: &&Group| group.in_state(MemberState::Active).count() < wanted;
        let degraded: Vec<_> = map.groups().map(|(_, _, g)| g).filter(short).collect();
        let failing = |m: &&crate::map::Member| m.state != MemberState::Failed && !world.servers.is_alive(m.server);
        if degraded.is_empty() && map.members().filter(failing).count() == 0 {
            let text = format!("all {wanted} copies of every group are up to date");
            return Condition { kind, holds: true, reason: Reason::AsWished, text };
        }
        let filling: Vec<_> = degraded.iter().flat_map(|g| g.in_state(MemberState::Syncing)).map(|m| m.copy).collect();
        let (reason, text) = if filling.is_empty() {
            let away = |m: &&crate::map::Member| m.state == MemberState::Failed || failing(m);
            let copies: Vec<_> = map.members().filter(away).map(|m| m.copy).collect();
            (Reason::MembersFailed, format!("away: {}{}", places(map, &copies, world), self.suspicion(map, world)))
        } else {
            (Reason::Filling, format!("being filled: {}", places(map, &filling, world)))
        };
        Condition { kind, holds: false, reason, text }
    }

    /// Why silent members are not left out.
    fn suspicion(&self, map: &VolumeMap, world: &World<'_>) -> &'static str {
        let suspected = map.members().any(|m| world.servers.health(m.server) == super::ServerHealth::Suspected);
        if suspected {
            "; so many servers are silent at once that the operator suspects itself: they are left out only when a \
             driver reports them too or no server that answers can reach them"
        } else {
            ""
        }
    }

    fn settled(&self) -> Condition {
        let running = self.map().is_some_and(VolumeMap::settling);
        let (reason, text) = if running {
            (Reason::Settling, "pages that may differ between copies are made equal; sessions wait")
        } else {
            (Reason::AsWished, "nothing is to be made equal")
        };
        Condition { kind: ConditionKind::Settled, holds: !running, reason, text: text.to_string() }
    }

    fn out_of_space(&self, world: &World<'_>) -> Condition {
        let kind = ConditionKind::OutOfSpace;
        let full = |m: &&Member| {
            let device = world.inventories.get(&m.server).and_then(|inventory| inventory.device_of(m.copy));
            world.servers.of(m.server).is_some_and(|s| s.is_alive() && s.is_full(device))
        };
        let serving = self.map().into_iter().flat_map(VolumeMap::members).filter(|m| m.state != MemberState::Failed);
        let on: BTreeSet<_> = serving.filter(full).map(|m| m.server).collect();
        if on.is_empty() {
            let text = "its servers have room for new pages".to_string();
            return Condition { kind, holds: false, reason: Reason::AsWished, text };
        }
        let text = format!(
            "no room for new pages on {}: writes to parts that were never written fail for lack of space; add a device, \
             delete volumes there, or move copies away",
            join(on.into_iter().map(|id| name_of(id, world)))
        );
        Condition { kind, holds: true, reason: Reason::DeviceFull, text }
    }

    fn diverged(&self, world: &World<'_>) -> Condition {
        let kind = ConditionKind::Diverged;
        if !self.is_sound() {
            let text = "the map in the object contradicts itself or the object: nothing is changed".to_string();
            return Condition { kind, holds: true, reason: Reason::MapInvalid, text };
        }
        match &self.doubt {
            Doubt::Unasked | Doubt::Clear => {
                let text = "no server stores a newer map".to_string();
                Condition { kind, holds: false, reason: Reason::AsWished, text }
            }
            Doubt::Asking(_) => {
                let waiting = join(self.unanswered(world).into_iter().map(|id| name_of(id, world)));
                let text = format!("nothing is changed before these servers said what they store: {waiting}");
                Condition { kind, holds: true, reason: Reason::WaitingForServers, text }
            }
            Doubt::Diverged(asked) => {
                let text = format!(
                    "a server stores the committed generation {}, the object has {}: say which to adopt",
                    asked.highest(),
                    self.status().generation
                );
                Condition { kind, holds: true, reason: Reason::NewerMapFound, text }
            }
        }
    }

    fn deleting(&self, world: &World<'_>) -> Condition {
        let kind = ConditionKind::Deleting;
        let wishes = &self.object.wishes;
        let retired = &self.status().retired;
        if !wishes.deleted {
            let text = "deletion was not asked for".to_string();
            return Condition { kind, holds: false, reason: Reason::NotAsked, text };
        }
        if !wishes.sessions.is_empty() {
            let nodes = join(wishes.sessions.iter().map(|wish| wish.node.as_str()));
            let text = format!("volume {} is in use on node {nodes}; detach it there first", self.object.name);
            return Condition { kind, holds: true, reason: Reason::InUse, text };
        }
        let away = |id| if world.servers.is_alive(id) { "" } else { " (does not answer)" };
        let holders = join(retired.iter().map(|r| format!("{}{}", name_of(r.server, world), away(r.server))));
        let text = format!("waiting for the holders of {} copies to confirm: {holders}", retired.len());
        Condition { kind, holds: true, reason: Reason::DeletingCopies, text }
    }

    /// Events for what a commit changed.
    pub(super) fn tell_differences(&self, world: &mut World<'_>, before: &Status) {
        let Some(new) = self.map() else { return };
        let Some(old) = &before.map else {
            self.tell(world, EventReason::Created, "the first map is committed".to_string());
            self.tell_sessions(world, None, new);
            return;
        };
        for (_, _, group) in new.groups() {
            for m in &group.members {
                let was = old.place_of(m.copy).map(|(_, _, m)| m.state);
                let Some(reason) = reason_of_member(was, m.state) else { continue };
                let text = format!("copy {} on server {} is {:?}", m.copy, m.server, m.state);
                self.tell(world, reason, text);
            }
        }
        for m in old.members().filter(|m| new.place_of(m.copy).is_none()) {
            let text = format!("copy {} on server {} is no longer needed", m.copy, m.server);
            self.tell(world, EventReason::MemberRemoved, text);
        }
        for f in self.status().forced.iter().filter(|f| f.generation > before.generation) {
            let text = format!(
                "a person forced copy {} of group {}, which was {:?} with {} pages not filled: what it lacks is lost, the \
                 other copies are kept aside, every session is ended",
                f.copy, f.group, f.was, f.unsynced
            );
            self.tell(world, EventReason::Forced, text);
        }
        if new.loss() > old.loss() && before.forced == self.status().forced {
            let text = "all members of a group have restarted: unflushed writes are written again by the driver";
            self.tell(world, EventReason::LossRaised, text.to_string());
        }
        match (old.settling(), new.settling()) {
            (false, true) => self.tell(world, EventReason::SettleBegun, "copies are made equal".to_string()),
            (true, false) => self.tell(world, EventReason::SettleOver, "copies are equal".to_string()),
            _ => {}
        }
        if new.size > old.size {
            self.tell(world, EventReason::Grown, format!("from {} to {} bytes", old.size, new.size));
        }
        self.tell_sessions(world, Some(old), new);
    }

    fn tell_sessions(&self, world: &mut World<'_>, old: Option<&VolumeMap>, new: &VolumeMap) {
        for s in new.sessions.iter().filter(|s| old.is_none_or(|map| map.session(s.id).is_none())) {
            self.tell(world, EventReason::Attached, format!("session {} on node {}", s.id, s.node));
        }
        for s in old.iter().flat_map(|map| &map.sessions).filter(|s| new.session(s.id).is_none()) {
            let ended = self.status().ended.contains(&s.id);
            let reason = if ended { EventReason::SessionEnded } else { EventReason::Detached };
            self.tell(world, reason, format!("session {} on node {}", s.id, s.node));
        }
    }
}

fn reason_of_member(was: Option<MemberState>, is: MemberState) -> Option<EventReason> {
    match (was, is) {
        (Some(was), is) if was == is => None,
        (_, MemberState::Failed) => Some(EventReason::MemberFailed),
        (None, MemberState::Syncing) => Some(EventReason::MemberReplaced),
        (Some(_), MemberState::Syncing) => Some(EventReason::MemberRejoined),
        (_, MemberState::Active) => Some(EventReason::MemberActive),
    }
}

fn reason_of(refusal: Refusal) -> Reason {
    match refusal {
        Refusal::UnknownPolicy => Reason::UnknownPolicy,
        Refusal::InvalidWish => Reason::InvalidWish,
        Refusal::TooFewServers { .. } => Reason::TooFewServers,
        Refusal::TooFewZones { .. } => Reason::TooFewZones,
        Refusal::TooLarge { .. } => Reason::TooLarge,
    }
}

fn places(map: &VolumeMap, copies: &[CopyId], world: &World<'_>) -> String {
    join(copies.iter().map(|copy| match map.place_of(*copy) {
        Some((_, group, m)) => format!("copy {copy} of group {group} on server {}", name_of(m.server, world)),
        None => format!("copy {copy}"),
    }))
}

/// A server as people know it.
fn name_of(server: ServerId, world: &World<'_>) -> String {
    let object = world.servers.of(server).and_then(|s| s.object.as_ref());
    object.filter(|o| !o.node.is_empty()).map_or_else(|| server.to_string(), |o| o.node.clone())
}

fn join(items: impl IntoIterator<Item = impl Display>) -> String {
    let texts: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    texts.join(", ")
}
