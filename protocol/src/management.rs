//! The operator's state machine: who commits which next map, and when (PROTOCOL.md §2, §3, §5; seed 002 Fig. 6).
//!
//! One [`Leader`] is one process that holds the Lease, for as long as it believes so. It holds no socket, no clock and no
//! API client: see [`Input`] and [`Output`]. Safety never rests on being the only one: every write is guarded by what
//! was read (H18), every order to a server carries the generation for which it was decided, and a proposal's generation
//! belongs to that one plan for ever.
//!
//! A change of a volume goes through the steps of [`Step`]:
//!
//! ```text
//! idle ── plan differs ──> Intent ──> PutCopies ──> Prepare ──> Fence ──> LeaseWait ──> Commit ──> Serve ──> idle
//!                             │           │                      │                        │
//!                             │           └── no room: Retract   └── no answer: GiveUp    └── guard fails: read again
//!                             └── guard fails: read again
//! ```
//!
//! What a change leads to is decided by pure functions from the old map, the wishes and the fence's answers (`plan`,
//! `settle`, `placement`); what is known from heartbeats only decides whether a change is worth starting.

use crate::control::{Alive, ControlReply, ControlRequest, DriverReport, Trouble};
use crate::ids::{Generation, ServerId, VolumeId};
use crate::time::Millis;
use cluster::{Inventory, Lease, StaleKey, StaleSince};
use heartbeat::Servers;
use std::collections::BTreeMap;
use volume::{Call, Calls, Volume, What, World};

pub mod choice;
mod cluster;
pub mod condition;
pub mod contract;
mod diverged;
mod goal;
mod heartbeat;
pub mod object;
mod pace;
pub mod placement;
pub mod plan;
mod progress;
mod reach;
mod reconfigure;
mod serve;
mod tell;
#[cfg(test)]
mod tests;
mod volume;

pub use condition::{Condition, ConditionKind, Event, EventReason, Reason, Veto, VetoReason};
pub use contract::{
    CallId, Config, Input, Orphan, Output, ServerHealth, ServerObject, ServerView, Source, Step, Written,
};
pub use object::{
    Force, Forced, Guard, MAX_FORCED, NewCopy, Policy, Proposal, Purpose, RetiredCopy, SessionState, SessionWish,
    Status, VolumeObject, Wishes, WriteKind, ZoneSpread,
};
pub use pace::FillBudget;

/// A call that was not answered for so long is forgotten, milliseconds.
const FORGET_CALL_MS: u64 = 60_000;

/// The leader.
pub struct Leader {
    config: Config,
    listed: bool,
    servers: Servers,
    volumes: BTreeMap<VolumeId, Volume>,
    /// Bytes promised on servers, by volume.
    rooms: BTreeMap<VolumeId, Vec<(ServerId, u64)>>,
    /// Copies that are filled, by volume: they share a budget.
    filling: BTreeMap<VolumeId, pace::Filling>,
    paces_due: bool,
    calls: Calls,
    lease: Lease,
    rounds: reach::Rounds,
    inventories: BTreeMap<ServerId, Inventory>,
    views: BTreeMap<ServerId, ServerView>,
    stale: BTreeMap<StaleKey, StaleSince>,
    view_due: bool,
    /// When each volume wants to be looked at again.
    wakes: BTreeMap<VolumeId, Millis>,
}

impl Leader {
    /// A leader that knows nothing yet: hand in `LeaseNumber`, every object, then `Listed`, then `Timer` as asked.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            listed: false,
            servers: Servers::default(),
            volumes: BTreeMap::new(),
            rooms: BTreeMap::new(),
            filling: BTreeMap::new(),
            paces_due: false,
            calls: Calls::default(),
            lease: Lease::default(),
            rounds: reach::Rounds::default(),
            inventories: BTreeMap::new(),
            views: BTreeMap::new(),
            stale: BTreeMap::new(),
            view_due: false,
            wakes: BTreeMap::new(),
        }
    }

    /// The object of a volume as the leader knows it.
    pub fn volume(&self, id: VolumeId) -> Option<&VolumeObject> {
        self.volumes.get(&id).map(|volume| &volume.object)
    }

    /// What the leader thinks of each server.
    pub fn servers(&self) -> impl Iterator<Item = &ServerView> {
        self.views.values()
    }

    /// Takes one input at a time `now` that never goes back; appends what is to be done, in order.
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        let concerned = self.take(now, input, out);
        let changed = self.beat(now, out);
        if self.listed {
            self.check_lease(out);
        }
        match concerned {
            _ if !self.listed => {}
            Concerned::Volume(id) if !changed => self.advance(now, id, out),
            Concerned::Nobody if !changed => {}
            Concerned::Due if !changed => {
                let due: Vec<_> = self.wakes.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
                due.into_iter().for_each(|id| self.advance(now, id, out));
            }
            _ => {
                let ids: Vec<_> = self.volumes.keys().copied().collect();
                ids.into_iter().for_each(|id| self.advance(now, id, out));
                self.view_due = true;
            }
        }
        if self.listed && std::mem::take(&mut self.paces_due) && self.config.fill_budget != FillBudget::default() {
            self.pace_fills(now, out);
        }
        if std::mem::take(&mut self.view_due) {
            self.view_servers(now, out);
        }
        let wake = self.wakes.values().copied().min().unwrap_or(Millis::NEVER);
        out.push(Output::WakeAt(wake.min(self.servers.next_beat()).max(now.after(1))));
    }

    fn take(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) -> Concerned {
        match input {
            Input::Listed => {
                self.listed = true;
                Concerned::All
            }
            Input::Volume { object, source } => self.take_volume(now, object, source),
            Input::VolumeGone { volume } => {
                self.volumes.remove(&volume);
                self.rooms.remove(&volume);
                self.wakes.remove(&volume);
                self.paces_due |= self.filling.remove(&volume).is_some();
                Concerned::All
            }
            Input::Written { call, outcome } => self.take_written(now, call, outcome, out),
            Input::Server(object) => {
                let server = self.servers.meet(now, object.id);
                server.object = Some(object);
                Concerned::All
            }
            Input::ServerGone { server } => {
                let named = |v: &Volume| v.map().is_some_and(|map| map.members().any(|m| m.server == server));
                if self.volumes.values().any(named) {
                    self.servers.meet(now, server).object = None;
                } else {
                    self.servers.by_id.remove(&server);
                    self.views.remove(&server);
                }
                Concerned::All
            }
            Input::Reply { server, call, reply } => self.take_reply(now, server, call, Some(reply), out),
            Input::Unreachable { server, call } => self.take_reply(now, server, call, None, out),
            Input::Report(report) => self.take_report(now, &report),
            Input::MapWanted { server, volume, at_least } => self.take_behind(server, volume, at_least),
            Input::Stale { server, seen } => {
                self.take_stale(now, server, seen, out);
                Concerned::Nobody
            }
            Input::LeaseNumber(number) => {
                self.lease.own = number;
                Concerned::Nobody
            }
            Input::Timer => Concerned::Due,
        }
    }

    fn take_volume(&mut self, now: Millis, object: VolumeObject, source: Source) -> Concerned {
        let id = object.id;
        for m in object.status.map.iter().flat_map(|map| map.members()) {
            self.servers.meet(now, m.server);
        }
        match self.volumes.get_mut(&id) {
            Some(volume) => volume.take(now, object, source),
            None => {
                self.volumes.insert(id, Volume::new(object, now));
            }
        }
        self.count(id);
        Concerned::Volume(id)
    }

    fn take_written(&mut self, now: Millis, call: CallId, outcome: Written, out: &mut Vec<Output>) -> Concerned {
        let waits = |v: &Volume| v.release == Some(call) || v.write.as_ref().is_some_and(|w| w.call == Some(call));
        let Some(id) = self.volumes.iter().find(|(_, v)| waits(v)).map(|(id, _)| *id) else {
            return Concerned::Nobody;
        };
        self.with(now, id, out, |volume, world| volume.written(world, call, outcome));
        Concerned::Volume(id)
    }

    fn take_reply(
        &mut self,
        now: Millis,
        server: ServerId,
        call: CallId,
        reply: Option<ControlReply>,
        out: &mut Vec<Output>,
    ) -> Concerned {
        let Some(call) = self.calls.pending.remove(&call).filter(|c| c.server == server) else {
            return Concerned::Nobody;
        };
        if reply.is_none() {
            self.servers.refused(server);
        }
        if let (What::Delete(copy), Some(ControlReply::Done | ControlReply::NoCopy { .. })) = (call.what, &reply) {
            // The inventory is asked for when a server comes; what was deleted since is no orphan.
            self.inventories.entry(server).or_default().copies.retain(|lying| lying.copy != copy);
        }
        match (call.what, reply, call.volume) {
            (What::Heartbeat, Some(ControlReply::Alive(alive)), _) => self.take_alive(now, server, call, alive, out),
            (What::Inventory, Some(ControlReply::Inventory { copies }), _) => {
                self.inventories.entry(server).or_default().copies = copies;
                Concerned::All
            }
            (What::Reach(suspect), reply, _) => {
                self.take_reached(now, call, suspect, reply);
                Concerned::Nobody
            }
            (_, reply, Some(id)) => {
                self.with(now, id, out, |volume, world| volume.answered(world, call, reply));
                Concerned::Volume(id)
            }
            _ => Concerned::Nobody,
        }
    }

    fn take_alive(
        &mut self,
        now: Millis,
        server: ServerId,
        call: Call,
        alive: Alive,
        out: &mut Vec<Output>,
    ) -> Concerned {
        let foreign = alive.server != server || alive.cluster != self.config.cluster;
        self.lease.heard = self.lease.heard.max(if foreign { 0 } else { alive.lease_number });
        let behind = alive.behind.clone();
        let stored: Vec<_> = alive.copies.iter().map(|copy| (copy.volume, copy.stored)).collect();
        let before = self.servers.of(server).map(|s| s.alive.clone());
        let news = before.as_ref() != Some(&alive);
        let full = heartbeat::full_devices(&alive.devices);
        self.servers.heard(now, call.sent, server, alive, foreign);
        self.view_due |= self.servers.of(server).is_some_and(|s| s.has_used_news(now));
        if full > before.map_or(0, |alive| heartbeat::full_devices(&alive.devices)) {
            // Which copies lie on a device is asked for when it matters.
            self.ask(now, server, What::Inventory, ControlRequest::Inventory, out);
        }
        if foreign || !self.listed {
            return Concerned::Nobody;
        }
        for (volume, generation) in stored {
            self.with(now, volume, out, |volume, world| volume.heard_stored(world, generation));
        }
        let mut some = false;
        for (volume, generation) in behind {
            some |= self.take_behind(server, volume, generation) != Concerned::Nobody;
        }
        // A word that is as before may still end a wait: hints count from after a commit only.
        let waited = self.volumes.values().any(|v| v.waits_for_word(server));
        if news || some || waited { Concerned::All } else { Concerned::Nobody }
    }

    /// A server, or a driver or peer of it, is ahead of the map that it stores.
    fn take_behind(&mut self, server: ServerId, volume: VolumeId, at_least: Generation) -> Concerned {
        let Some(v) = self.volumes.get_mut(&volume) else { return Concerned::Nobody };
        if at_least <= v.status().generation {
            v.serve_again(server);
        } else if v.change.is_none() && v.write.is_none() && v.map().is_some() {
            v.floor = v.floor.max(at_least);
            v.must = true;
        }
        Concerned::Volume(volume)
    }

    fn take_report(&mut self, now: Millis, report: &DriverReport) -> Concerned {
        let Some(volume) = self.volumes.get_mut(&report.volume) else { return Concerned::Nobody };
        if report.generation != volume.status().generation || volume.change.is_some() {
            return Concerned::Nobody;
        }
        match report.trouble {
            Trouble::Unreachable => self.servers.reported(now, report.server),
            Trouble::Stalled => {
                self.servers.reported(now, report.server);
                volume.stalled.insert(report.copy, now);
            }
            // Before it has stored the committed map that says nothing.
            Trouble::NotServing | Trouble::NoCopy if volume.served_at(report.server).is_none() => {}
            Trouble::NotServing | Trouble::NoCopy => {
                volume.suspects.insert(report.copy);
            }
        }
        Concerned::Volume(report.volume)
    }

    /// Sends heartbeats that are due and judges who answers; `true` = somebody changed.
    fn beat(&mut self, now: Millis, out: &mut Vec<Output>) -> bool {
        for server in self.servers.due(now, self.config.heartbeat_ms) {
            self.ask(now, server, What::Heartbeat, ControlRequest::Heartbeat { lease_number: self.lease.own }, out);
        }
        let changed = self.servers.judge(now, self.config.heartbeat_ms, self.config.heartbeat_failed_ms);
        for (id, was) in &changed {
            let health = self.servers.health(*id);
            self.tell_health(*id, *was, health, out);
            if health == ServerHealth::Alive {
                self.ask(now, *id, What::Inventory, ControlRequest::Inventory, out);
            }
        }
        self.ask_about_suspects(now, out);
        self.calls.pending.retain(|_, call| now.since(call.sent) < FORGET_CALL_MS);
        !changed.is_empty()
    }

    fn ask(&mut self, now: Millis, server: ServerId, what: What, request: ControlRequest, out: &mut Vec<Output>) {
        let call = self.calls.name();
        self.calls.pending.insert(call, Call { server, volume: None, what, sent: now });
        out.push(Output::Control { server, call, request });
    }

    fn tell_health(&self, id: ServerId, was: ServerHealth, health: ServerHealth, out: &mut Vec<Output>) {
        let (reason, text) = match health {
            ServerHealth::Failed => (EventReason::ServerFailed, "does not answer"),
            ServerHealth::Suspected => (EventReason::SuspectsItself, "silent together with many others"),
            ServerHealth::Foreign => (EventReason::ForeignServer, "another server or cluster answers at its address"),
            ServerHealth::Alive if was != ServerHealth::Unknown => (EventReason::ServerBack, "answers again"),
            ServerHealth::Alive | ServerHealth::Unknown => return,
        };
        out.push(Output::Event(Event { volume: None, server: Some(id), reason, text: text.to_string() }));
    }

    fn advance(&mut self, now: Millis, id: VolumeId, out: &mut Vec<Output>) {
        let wake = self.with(now, id, out, |volume, world| volume.advance(world));
        self.wakes.insert(id, wake.max(now.after(1)));
        self.count(id);
        if let Some(volume) = self.volumes.get_mut(&id) {
            self.view_due |= volume.viewed != volume.status().generation;
            volume.viewed = volume.status().generation;
        } else {
            self.wakes.remove(&id);
        }
    }

    /// What a volume takes of what it shares with others.
    fn count(&mut self, id: VolumeId) {
        let Some(volume) = self.volumes.get(&id) else { return };
        self.rooms.insert(id, volume.rooms());
        let filling = volume.filling();
        let before =
            if filling.is_empty() { self.filling.remove(&id) } else { self.filling.insert(id, filling.clone()) };
        self.paces_due |= before.unwrap_or_default() != filling;
    }

    /// Fills began or ended: the others' shares of the budget change.
    fn pace_fills(&mut self, now: Millis, out: &mut Vec<Output>) {
        let ids: Vec<_> = self.filling.keys().copied().collect();
        for id in ids {
            let wake = self.with(now, id, out, |volume, world| volume.limit_fills(world));
            self.wakes.entry(id).and_modify(|at| *at = wake.min(*at)).or_insert(wake);
        }
    }

    /// Lets a volume act; returns when it wants to be looked at again.
    fn with(
        &mut self,
        now: Millis,
        id: VolumeId,
        out: &mut Vec<Output>,
        act: impl FnOnce(&mut Volume, &mut World<'_>),
    ) -> Millis {
        let Some(volume) = self.volumes.get_mut(&id) else { return Millis::NEVER };
        let mut world = World {
            now,
            servers: &mut self.servers,
            calls: &mut self.calls,
            mint: &mut *self.config.ids,
            rooms: &self.rooms,
            filling: &self.filling,
            fill_budget: self.config.fill_budget,
            inventories: &self.inventories,
            restored: self.lease.restored,
            out,
            wake: Millis::NEVER,
        };
        act(volume, &mut world);
        world.wake
    }
}

/// Whom an input concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Concerned {
    Nobody,
    Volume(VolumeId),
    Due,
    All,
}
