//! Step 5 of a change, and orders to delete copies (PROTOCOL.md §3, Deletion; R14).
//!
//! Every member stores every committed map, `Failed` ones too. A copy id that ever stood in a proposal stays in the object
//! until its holder confirmed the deletion or a person let it go; the finalizer waits for that.

use super::condition::EventReason;
use super::heartbeat::{Hint, OPENED_MS, ServerState};
use super::object::{RetiredCopy, Status, WriteKind};
use super::volume::{Volume, What, World};
use super::{Output, Step};
use crate::control::{ControlReply, ControlRequest, Promised};
use crate::ids::{CopyId, Generation, ServerId};
use crate::map::MemberState;
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use std::collections::BTreeSet;

/// A call that failed, or was not answered, is repeated after this long, milliseconds.
pub(super) const AGAIN_MS: u64 = 1_000;

/// How far a server is with the committed map.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    generation: Generation,
    /// Since when it is to store it.
    since: Millis,
    asked: Option<Millis>,
    /// When it said that it stored it.
    pub(super) done: Option<Millis>,
}

/// How far the deletion of a retired copy is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deleting {
    asked: Option<Millis>,
    done: bool,
}

impl Volume {
    /// Sends the committed map to every server of it that has not confirmed it.
    pub(super) fn serve(&mut self, world: &mut World<'_>) {
        let Some(map) = self.object.status.map.as_ref() else { return };
        let (volume, generation) = (map.volume, map.generation);
        // Holders of kept copies too: what they store tells them that they serve no more (I8).
        let kept = self.object.status.retired.iter().filter(|r| r.kept).map(|r| r.server);
        let servers: BTreeSet<_> = map.members().map(|m| m.server).chain(kept).collect();
        self.served.retain(|id, _| servers.contains(id));
        for id in servers {
            let fresh = Served { generation, since: world.now, asked: None, done: None };
            let served = self.served.entry(id).or_insert(fresh);
            if served.generation != generation {
                *served = fresh;
            }
            let due = served.asked.is_none_or(|at| world.now.since(at) >= AGAIN_MS);
            if served.done.is_some() || !world.servers.is_alive(id) {
                continue;
            }
            if due {
                served.asked = Some(world.now);
                world.ask(id, volume, What::Serve(generation), ControlRequest::Serve { map: map.clone() });
            }
            world.wake_at(world.now.after(AGAIN_MS));
        }
    }

    /// When a server confirmed the committed map.
    pub(super) fn served_at(&self, server: ServerId) -> Option<Millis> {
        let served = self.served.get(&server)?;
        if served.generation == self.status().generation { served.done } else { None }
    }

    /// Since when a server is to store the committed map.
    pub(super) fn serving_since(&self, server: ServerId) -> Option<Millis> {
        let served = self.served.get(&server)?;
        (served.generation == self.status().generation).then_some(served.since)
    }

    /// A server says that it lacks the committed map.
    pub(super) fn serve_again(&mut self, server: ServerId) {
        self.served.remove(&server);
    }

    pub(super) fn serve_answered(
        &mut self,
        world: &mut World<'_>,
        server: ServerId,
        generation: Generation,
        reply: Option<ControlReply>,
    ) {
        if generation != self.status().generation {
            return;
        }
        match reply {
            Some(ControlReply::Done) => {
                let first = self.served.values().all(|s| s.done.is_none());
                if let Some(served) = self.served.get_mut(&server) {
                    served.done.get_or_insert(world.now);
                }
                self.tell_served(world, first);
            }
            Some(ControlReply::Refused { promised, .. }) if promised > generation => {
                self.floor = self.floor.max(promised);
                self.must |= self.change.is_none();
            }
            Some(ControlReply::NoCopy { .. }) => self.nothing_there(world, server),
            _ => {}
        }
    }

    /// Nothing of the volume is at a server: a fence finds out about members that serve. The others are lost, unless the
    /// server has just come up and may not have opened all its devices.
    fn nothing_there(&mut self, world: &World<'_>, server: ServerId) {
        let named = self.map().is_some_and(|map| map.members().any(|m| m.server == server));
        if let Some(served) = self.served.get_mut(&server).filter(|_| !named) {
            // It held a kept copy and has lost it: there is nobody to be told.
            served.done = Some(world.now);
        }
        let Some(state) = world.servers.of(server) else { return };
        let here = self.object.status.map.iter().flat_map(|map| map.members()).filter(|m| m.server == server);
        for m in here.copied().collect::<Vec<_>>() {
            if m.state != MemberState::Failed {
                self.suspects.insert(m.copy);
            } else if state.hint(&m) != Hint::Closed && self.is_missing(world, server, m.copy) {
                self.lost.insert(m.copy);
            }
        }
    }

    /// A server said that it does not have a copy. Certain only if it said so before, long enough ago that it must have
    /// opened all its devices since, and has not restarted in between: a restart may not be noticed at once.
    pub(super) fn is_missing(&mut self, world: &World<'_>, server: ServerId, copy: CopyId) -> bool {
        let Some(state) = world.servers.of(server) else { return false };
        let since = self.missing.entry(copy).or_insert(world.now);
        *since = if state.boots_at > *since { world.now } else { *since };
        state.has_opened(world.now) && world.now.since(*since) >= OPENED_MS
    }

    /// A fence was answered without copies that are to be there.
    pub(super) fn note_missing(&mut self, world: &World<'_>, server: ServerId, promised: &Promised) {
        let here = self.object.status.map.iter().flat_map(|map| map.members()).filter(|m| m.server == server);
        for m in here.copied().collect::<Vec<_>>() {
            if promised.copies.iter().any(|report| report.copy == m.copy) {
                self.missing.remove(&m.copy);
            } else if world.servers.of(server).is_some_and(|s| s.hint(&m) != Hint::Closed)
                && self.is_missing(world, server, m.copy)
            {
                self.lost.insert(m.copy);
            }
        }
    }

    fn tell_served(&mut self, world: &mut World<'_>, first: bool) {
        let Some(map) = self.map() else { return };
        let generation = map.generation;
        let all = map.serving_servers().into_iter().all(|id| self.served_at(id).is_some());
        if first {
            self.passed(world, generation, Step::FirstServed);
        }
        if all && self.serving_told != generation {
            self.serving_told = generation;
            self.passed(world, generation, Step::Served);
        }
    }

    /// Whether every server that serves and answers has stored the committed map.
    pub(super) fn is_served(&self, world: &World<'_>) -> bool {
        self.map().is_none_or(|map| {
            map.serving_servers().into_iter().all(|id| self.served_at(id).is_some() || !world.servers.is_alive(id))
        })
    }

    /// Orders the deletion of what is retired, and forgets what is confirmed or let go.
    pub(super) fn delete_retired(&mut self, world: &mut World<'_>) {
        let retired = self.status().retired.clone();
        self.deleting.retain(|copy, _| retired.iter().any(|r| r.copy == *copy));
        let let_go = |r: &RetiredCopy| self.object.wishes.let_go.contains(&r.copy);
        let gone = |r: &RetiredCopy| let_go(r) || self.deleting.get(&r.copy).is_some_and(|d| d.done);
        let mut left: Vec<_> = retired.iter().filter(|r| !gone(r)).copied().collect();
        let wanted = |r: &&mut RetiredCopy| r.kept && self.object.wishes.delete_kept.contains(&r.copy);
        let mut freed = false;
        for r in left.iter_mut().filter(wanted) {
            (r.kept, freed) = (false, true);
        }
        if freed || left.len() < retired.len() {
            if left.len() < retired.len() {
                self.passed(world, self.status().generation, Step::CopiesDeleted);
            }
            let next = Status { retired: left, ..self.status().clone() };
            self.write(world, WriteKind::Retired, next);
            return;
        }
        for r in left.into_iter().filter(|r| !r.kept) {
            self.order_deletion(world, r);
        }
    }

    fn order_deletion(&mut self, world: &mut World<'_>, r: RetiredCopy) {
        assert!(self.map().is_none_or(|map| map.place_of(r.copy).is_none()), "a copy in the map is never deleted");
        let deleting = self.deleting.entry(r.copy).or_insert(Deleting { asked: None, done: false });
        let due = deleting.asked.is_none_or(|at| world.now.since(at) >= AGAIN_MS);
        if !world.servers.is_alive(r.server) {
            return;
        }
        if due {
            deleting.asked = Some(world.now);
            let (volume, generation) = (self.id(), self.status().generation);
            let request = ControlRequest::DeleteCopy { volume, copy: r.copy, generation };
            world.ask(r.server, volume, What::Delete(r.copy), request);
        }
        world.wake_at(world.now.after(AGAIN_MS));
    }

    pub(super) fn delete_answered(
        &mut self,
        world: &mut World<'_>,
        server: ServerId,
        copy: CopyId,
        reply: Option<ControlReply>,
    ) {
        let missing = matches!(reply, Some(ControlReply::NoCopy { .. })) && self.is_missing(world, server, copy);
        let Some(deleting) = self.deleting.get_mut(&copy) else { return };
        match reply {
            // Before all devices were opened that says nothing: it is asked again.
            Some(ControlReply::NoCopy { .. }) if !missing => {}
            // Not there is as good as deleted; a closed device says so instead.
            Some(ControlReply::Done | ControlReply::NoCopy { .. }) if !deleting.done => {
                deleting.done = true;
                self.tell(world, EventReason::CopyDeleted, format!("copy {copy} was deleted"));
            }
            Some(ControlReply::Refused { promised, .. }) => {
                self.floor = self.floor.max(promised);
                self.must |= self.change.is_none() && self.map().is_some();
            }
            _ => {}
        }
    }

    /// Takes a deletion further; `true` = nothing else is to be done with this volume.
    pub(super) fn delete(&mut self, world: &mut World<'_>) -> bool {
        let wishes = &self.object.wishes;
        if !wishes.deleted || !wishes.sessions.is_empty() {
            return false;
        }
        match self.map() {
            // A session that nobody wishes for any more ends first, with a fence, as always.
            Some(map) if !map.sessions.is_empty() => false,
            None if self.status().proposed.is_none() => {
                self.delete_retired(world);
                self.release_if_empty(world);
                true
            }
            _ => {
                self.retire_all(world);
                true
            }
        }
    }

    fn retire_all(&mut self, world: &mut World<'_>) {
        let status = self.status();
        let generation = status.highest().max(self.floor).next();
        let mut retired = status.retired.clone();
        retired.iter_mut().for_each(|r| r.kept = false);
        let mapped = status.map.iter().flat_map(|map| map.members()).map(|m| (m.copy, m.server));
        let proposed = status.proposed.iter().flat_map(|p| &p.copies).map(|c| (c.copy, c.server));
        for (copy, server) in mapped.chain(proposed) {
            retire(&mut retired, RetiredCopy { copy, server, generation, kept: false });
        }
        let next =
            Status { generation, map: None, proposed: None, retired, ended: Vec::new(), forced: status.forced.clone() };
        self.write(world, WriteKind::Delete, next);
    }

    fn release_if_empty(&mut self, world: &mut World<'_>) {
        if self.write.is_some() || !self.status().retired.is_empty() || self.release.is_some() {
            return;
        }
        let call = world.calls.name();
        self.release = Some(call);
        world.out.push(Output::Release { volume: self.id(), call, guard: self.status().guard() });
    }

    /// Copies that serve under the boot id that their server shows, and all copies, on a server (readiness).
    pub(super) fn copies_on(&self, state: &ServerState, server: ServerId) -> (u32, u32) {
        let Some(map) = self.map() else { return (0, 0) };
        let here: Vec<_> = map.members().filter(|m| m.server == server).collect();
        let good = here.iter().filter(|m| m.state == MemberState::Active && state.hint(m) == Hint::Same);
        (good.count() as u32, here.len() as u32)
    }
}

/// Adds a copy to the retired ones, once.
pub(super) fn retire(retired: &mut Vec<RetiredCopy>, copy: RetiredCopy) {
    if retired.iter().all(|r| r.copy != copy.copy) && !on(Mutant::CopyForgotten) {
        retired.push(copy);
    }
}
