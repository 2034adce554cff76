//! Servers that answer as their contract says, and a store with compare-and-swap. No data, no drivers, no network: each
//! output is answered at once unless a test holds it back.

use super::super::*;
use crate::control::*;
use crate::ids::*;
use crate::map::*;
use std::collections::{BTreeMap, VecDeque};

mod lists;

pub(super) const GIB: u64 = 1 << 30;
pub(super) const V: VolumeId = VolumeId(77);
const CLUSTER: ClusterId = ClusterId(9);

#[derive(Debug, Default, Clone)]
pub(super) struct FakeCopy {
    pub(super) unsynced: u64,
    pub(super) pending: Vec<(SessionId, (Incarnation, u64))>,
    pub(super) before_start: u64,
    pub(super) settled_for: Option<SettleName>,
    /// Its suspect pages were marked under this promise.
    pub(super) listed: Generation,
}

#[derive(Debug)]
pub(super) struct FakeServer {
    pub(super) id: ServerId,
    pub(super) boot: BootId,
    pub(super) up: bool,
    /// The leader does not hear it, but other servers do.
    pub(super) hidden: bool,
    /// Answers heartbeats but no fence.
    pub(super) stuck: bool,
    pub(super) rejoins: Vec<Rejoin>,
    /// It was asked for a list outside the fence of that list.
    pub(super) refused_lists: u32,
    /// Says nothing of its suspect pages.
    pub(super) mute_lists: bool,
    pub(super) closed: bool,
    pub(super) leaving: bool,
    pub(super) no_space: bool,
    /// Bytes taken on its device.
    pub(super) used: u64,
    pub(super) fills: bool,
    pub(super) settles: bool,
    /// Another server answers at its address.
    pub(super) impostor: Option<Alive>,
    /// No newer map was committed than the one stored here.
    pub(super) is_newest: bool,
    pub(super) lease_number: u64,
    pub(super) promised: Generation,
    pub(super) map: Option<VolumeMap>,
    pub(super) sessions: Vec<(SessionId, (Incarnation, Generation))>,
    pub(super) copies: BTreeMap<CopyId, FakeCopy>,
    pub(super) fences: Vec<Fence>,
    /// Paces that it was told, with the generation stored then.
    pub(super) limits: Vec<(Generation, FillLimit)>,
}

impl FakeServer {
    fn new(id: u128) -> Self {
        Self {
            id: ServerId(id),
            boot: BootId(id * 1000),
            up: true,
            hidden: false,
            stuck: false,
            rejoins: Vec::new(),
            refused_lists: 0,
            mute_lists: false,
            closed: false,
            leaving: false,
            no_space: false,
            used: 0,
            fills: true,
            settles: true,
            impostor: None,
            is_newest: true,
            lease_number: 0,
            promised: Generation(0),
            map: None,
            sessions: Vec::new(),
            copies: BTreeMap::new(),
            fences: Vec::new(),
            limits: Vec::new(),
        }
    }

    pub(super) fn restart(&mut self) {
        self.up = true;
        self.boot.0 += 1;
        for copy in self.copies.values_mut() {
            copy.before_start += copy.pending.drain(..).map(|(_, (_, pages))| pages).sum::<u64>();
            copy.settled_for = None;
        }
    }

    fn stored(&self) -> Generation {
        self.map.as_ref().map_or(Generation(0), |map| map.generation)
    }

    fn alive(&self) -> Alive {
        let boot = if self.closed { BootId::NONE } else { self.boot };
        let progress = |(copy, c): (&CopyId, &FakeCopy)| CopyProgress {
            volume: V,
            copy: *copy,
            boot,
            stored: self.stored(),
            unsynced: c.unsynced,
            pages: 100,
            to_settle: u64::from(self.to_settle(c)),
            filled_bytes: 0,
        };
        let device =
            DeviceReport { device: DeviceId(1), boot, capacity_bytes: 10 * GIB, free_bytes: 10 * GIB - self.used };
        Alive {
            server: self.id,
            cluster: CLUSTER,
            lease_number: self.lease_number,
            leaving: self.leaving,
            devices: vec![device],
            copies: self
                .copies
                .iter()
                .map(progress)
                .filter(|p| p.boot.is_none() || p.unsynced + p.to_settle > 0)
                .collect(),
            behind: Vec::new(),
        }
    }

    fn running(&self, copy: CopyId) -> Option<SettleName> {
        let map = self.map.as_ref()?;
        let (p, g, _) = map.place_of(copy)?;
        match map.placements[p as usize].groups[g as usize].settle {
            Settle::Running { authoritative, boot, begun } => Some(SettleName { authoritative, boot, begun }),
            Settle::None | Settle::Over => None,
        }
    }

    fn to_settle(&self, copy: &FakeCopy) -> bool {
        let id = self.copies.iter().find(|(_, c)| std::ptr::eq(*c, copy)).map(|(id, _)| *id);
        let source = |name: SettleName| Some(name.authoritative) == id && name.boot == self.boot;
        let name = id.and_then(|id| self.running(id));
        name.is_some_and(|name| copy.settled_for != Some(name) && !source(name))
    }

    fn report(&self, id: CopyId, copy: &FakeCopy) -> CopyReport {
        CopyReport {
            copy: id,
            boot: self.boot,
            unsynced: copy.unsynced,
            pending: copy.pending.clone(),
            pending_before_start: copy.before_start,
            settled_for: copy.settled_for,
            to_settle: u64::from(self.to_settle(copy)),
            listed: copy.listed == self.promised,
        }
    }

    fn serve(&mut self, map: VolumeMap) -> ControlReply {
        if self.copies.is_empty() {
            return ControlReply::NoCopy { copy: CopyId::NONE };
        }
        if self.map.as_ref() == Some(&map) && self.promised == map.generation {
            return ControlReply::Done;
        }
        if map.generation < self.promised || map.generation <= self.stored() {
            return ControlReply::Refused { promised: self.promised, stored: self.stored() };
        }
        self.promised = map.generation;
        for (id, copy) in &mut self.copies {
            let Some((p, g, m)) = map.place_of(*id) else { continue };
            let over = map.placements[p as usize].groups[g as usize].settle == Settle::Over;
            if over && m.boot == self.boot && m.state != MemberState::Failed {
                copy.before_start = 0;
                copy.pending.retain(|(s, (i, _))| map.session(*s).is_some_and(|listed| listed.incarnation <= *i));
            }
        }
        self.map = Some(map);
        self.is_newest = true;
        ControlReply::Done
    }

    fn forget_if_empty(&mut self) {
        if self.copies.is_empty() {
            (self.promised, self.map) = (Generation(0), None);
            self.sessions.clear();
        }
    }

    /// The device came back empty.
    pub(super) fn blank(&mut self) {
        self.restart();
        self.copies.clear();
        self.forget_if_empty();
    }

    /// Fills and settles as the map says.
    fn work(&mut self) {
        let Some(map) = self.map.clone() else { return };
        for (id, _) in self.copies.clone() {
            let name = self.running(id);
            let syncing = map.place_of(id).is_some_and(|(_, _, m)| m.state == MemberState::Syncing);
            let copy = self.copies.get_mut(&id).unwrap();
            if self.fills && syncing {
                copy.unsynced = 0;
            }
            if self.settles && name.is_some() {
                copy.settled_for = name;
            }
        }
    }

    fn answer(&mut self, request: ControlRequest) -> Option<ControlReply> {
        if !self.up {
            return None;
        }
        self.work();
        Some(match request {
            ControlRequest::Heartbeat { lease_number } => {
                let alive = ControlReply::Alive(self.impostor.clone().unwrap_or_else(|| self.alive()));
                self.lease_number = self.lease_number.max(lease_number);
                alive
            }
            ControlRequest::Fence(_) if self.stuck => return None,
            ControlRequest::Fence(fence) => self.fence(fence),
            ControlRequest::ListSuspects { generation, boot, from, .. } => self.suspects(generation, boot, from),
            ControlRequest::Rejoin(rejoin) => self.rejoin(&rejoin),
            ControlRequest::Serve { map } => self.serve(map),
            ControlRequest::PutCopy { .. } if self.no_space => ControlReply::NoSpace,
            ControlRequest::PutCopy { copy, generation, unsynced, .. } => {
                assert!(generation > self.stored());
                self.copies.insert(copy, FakeCopy { unsynced: 100 * u64::from(unsynced), ..FakeCopy::default() });
                ControlReply::Done
            }
            ControlRequest::Reach { .. } => unreachable!("answered by those who know the others"),
            ControlRequest::PrepareFlush { .. } => ControlReply::Done,
            ControlRequest::LimitFills { limit, .. } => {
                self.limits.push((self.stored(), limit));
                ControlReply::Done
            }
            ControlRequest::DeleteCopy { generation, .. } if generation < self.promised.max(self.stored()) => {
                ControlReply::Refused { promised: self.promised, stored: self.stored() }
            }
            ControlRequest::DeleteCopy { .. } if self.closed => ControlReply::DeviceClosed,
            ControlRequest::DeleteCopy { copy, .. } => match self.copies.remove(&copy) {
                Some(_) => {
                    self.forget_if_empty();
                    ControlReply::Done
                }
                None => ControlReply::NoCopy { copy },
            },
            ControlRequest::GetVolume { .. } => {
                ControlReply::Volume { volume: Some(VolumeReport { promised: self.promised, map: self.map.clone() }) }
            }
            ControlRequest::Inventory => {
                let stored = self.stored();
                let one = |copy: &CopyId| CopyInventory { volume: V, copy: *copy, device: DeviceId(1), stored };
                ControlReply::Inventory { copies: self.copies.keys().map(one).collect() }
            }
        })
    }
}

/// Everything in one struct.
pub(super) struct Fake {
    pub(super) now: Millis,
    pub(super) leader: Leader,
    pub(super) servers: BTreeMap<ServerId, FakeServer>,
    pub(super) object: Option<VolumeObject>,
    pub(super) lease: u64,
    pub(super) events: Vec<EventReason>,
    pub(super) steps: BTreeMap<Step, u32>,
    pub(super) conditions: BTreeMap<ConditionKind, Condition>,
    pub(super) orphans: BTreeMap<ServerId, Vec<Orphan>>,
    pub(super) history: Vec<VolumeMap>,
    pub(super) views: Vec<ServerView>,
    /// As told last.
    pub(super) progress: Vec<CopyProgress>,
    /// The leader dies when it passes this step for the so-manieth time.
    pub(super) die_at: Option<Step>,
    pub(super) deaths: u32,
    pub(super) reads: u32,
    /// Runs in place of the next write of this kind.
    pub(super) lose_write: Option<WriteKind>,
    leaders: u128,
    wake: Millis,
    queue: VecDeque<Output>,
}

fn new_leader(number: u128) -> Leader {
    let mut last = number << 64;
    let ids = move || {
        last += 1;
        last
    };
    Leader::new(Config::new(CLUSTER, Box::new(ids)))
}

impl Fake {
    pub(super) fn new(servers: u128) -> Self {
        let mut fake = Self {
            now: Millis(1_000_000),
            leader: new_leader(1),
            servers: (1..=servers).map(|id| (ServerId(id), FakeServer::new(id))).collect(),
            object: None,
            lease: 5,
            events: Vec::new(),
            steps: BTreeMap::new(),
            conditions: BTreeMap::new(),
            orphans: BTreeMap::new(),
            history: Vec::new(),
            views: Vec::new(),
            progress: Vec::new(),
            die_at: None,
            deaths: 0,
            reads: 0,
            lose_write: None,
            leaders: 1,
            wake: Millis::NEVER,
            queue: VecDeque::new(),
        };
        fake.start();
        fake
    }

    /// A volume that is placed, with this many copies and groups.
    pub(super) fn with_volume(servers: u128, copies: u8, groups: u8) -> Self {
        let mut fake = Self::new(servers);
        fake.apply(volume(copies, groups));
        fake.run(3_000);
        assert!(fake.status().map.is_some(), "{:?}", fake.conditions);
        fake
    }

    fn start(&mut self) {
        self.input(Input::LeaseNumber(self.lease));
        for id in self.servers.keys().copied().collect::<Vec<_>>() {
            self.input(Input::Server(server_object(id)));
        }
        if let Some(object) = self.object.clone() {
            self.input(Input::Volume { object, source: Source::Watched });
        }
        self.input(Input::Listed);
    }

    pub(super) fn new_leader(&mut self) {
        self.leaders += 1;
        self.leader = new_leader(self.leaders);
        self.queue.clear();
        self.wake = Millis::NEVER;
        self.lease += 1;
        self.start();
    }

    pub(super) fn input(&mut self, input: Input) {
        let mut out = Vec::new();
        self.leader.handle(self.now, input, &mut out);
        for output in out {
            if self.is_death(&output) {
                self.die_at = None;
                self.deaths += 1;
                self.new_leader();
                return;
            }
            self.queue.push_back(output);
        }
    }

    fn is_death(&self, output: &Output) -> bool {
        matches!(output, Output::Passed { step, .. } if self.die_at == Some(*step))
    }

    /// Runs for so many milliseconds.
    pub(super) fn run(&mut self, ms: u64) {
        let end = self.now.after(ms);
        loop {
            while let Some(output) = self.queue.pop_front() {
                self.carry_out(output);
            }
            if self.wake > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(self.wake);
            self.wake = Millis::NEVER;
            self.input(Input::Timer);
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Control { server, call, request: ControlRequest::Reach { server: about, .. } } => {
                let (asked, other) = (&self.servers[&server], &self.servers[&about]);
                let reached = other.up || other.hidden;
                match asked.up {
                    true => {
                        let reply = ControlReply::Reached { server: about, reached };
                        self.input(Input::Reply { server, call, reply });
                    }
                    false => self.input(Input::Unreachable { server, call }),
                }
            }
            Output::Control { server, call, request } => {
                match self.servers.get_mut(&server).and_then(|s| s.answer(request)) {
                    Some(reply) => self.input(Input::Reply { server, call, reply }),
                    None => self.input(Input::Unreachable { server, call }),
                }
            }
            Output::Write { call, kind, guard, next, .. } => self.write(call, kind, &guard, next),
            Output::Release { call, guard, volume } => {
                let held = self.object.as_ref().is_some_and(|o| guard.holds(&o.status));
                assert!(held);
                self.object = None;
                self.input(Input::Written { call, outcome: Written::Done });
                self.input(Input::VolumeGone { volume });
            }
            Output::Read { volume } => {
                self.reads += 1;
                match self.object.clone() {
                    Some(object) => self.input(Input::Volume { object, source: Source::Read }),
                    None => self.input(Input::VolumeGone { volume }),
                }
            }
            Output::RaiseLeaseNumber { above } => {
                self.lease = above + 1;
                self.input(Input::LeaseNumber(self.lease));
            }
            Output::Event(event) => self.events.push(event.reason),
            Output::Conditions { conditions, .. } => {
                self.conditions = conditions.into_iter().map(|c| (c.kind, c)).collect();
            }
            Output::Orphans { server, orphans } => {
                self.orphans.insert(server, orphans);
            }
            Output::Passed { step, .. } => *self.steps.entry(step).or_default() += 1,
            Output::WakeAt(at) => self.wake = at,
            Output::Server(view) => self.views.push(view),
            Output::Progress { copies, .. } => self.progress = copies,
        }
    }

    fn write(&mut self, call: CallId, kind: WriteKind, guard: &Guard, next: Status) {
        if self.lose_write == Some(kind) {
            self.lose_write = None;
            self.input(Input::Written { call, outcome: Written::Unknown });
            return;
        }
        let Some(object) = self.object.as_mut() else {
            return self.input(Input::Written { call, outcome: Written::Conflict });
        };
        if !guard.holds(&object.status) {
            return self.input(Input::Written { call, outcome: Written::Conflict });
        }
        assert!(next.generation >= object.status.generation, "the generation never falls");
        assert!(next.highest() >= object.status.highest(), "a number is never used twice");
        let named = |s: &Status| {
            let mapped = s.map.iter().flat_map(|m| m.members().map(|m| m.copy)).collect::<Vec<_>>();
            let proposed = s.proposed.iter().flat_map(|p| p.copies.iter().map(|c| c.copy));
            mapped.into_iter().chain(proposed).chain(s.retired.iter().map(|r| r.copy)).collect::<Vec<_>>()
        };
        if kind != WriteKind::Retired {
            let after = named(&next);
            assert!(named(&object.status).iter().all(|copy| after.contains(copy)), "no copy is ever forgotten (R14)");
        }
        if let Some(map) = next.map.as_ref().filter(|map| self.history.last() != Some(*map)) {
            self.history.push(map.clone());
        }
        object.status = next;
        let object = object.clone();
        for server in self.servers.values_mut() {
            server.is_newest = server.stored() == object.status.generation;
        }
        self.input(Input::Written { call, outcome: Written::Done });
        self.input(Input::Volume { object, source: Source::Watched });
    }

    /// Applies an object, or new wishes for it.
    pub(super) fn apply(&mut self, mut object: VolumeObject) {
        object.version = self.object.as_ref().map_or(0, |now| now.version) + 1;
        self.object = Some(object.clone());
        self.input(Input::Volume { object, source: Source::Watched });
    }

    /// Changes the wishes.
    pub(super) fn wish(&mut self, change: impl FnOnce(&mut Wishes)) {
        let mut object = self.object.clone().unwrap();
        change(&mut object.wishes);
        self.apply(object);
    }

    pub(super) fn attach(&mut self, session: u128, node: &str) {
        let wish = SessionWish { id: SessionId(session), node: node.to_string(), mode: AccessMode::ReadWrite };
        self.wish(|wishes| wishes.sessions.push(wish));
    }

    pub(super) fn detach(&mut self, session: u128) {
        self.wish(|wishes| wishes.sessions.retain(|s| s.id != SessionId(session)));
    }

    pub(super) fn status(&self) -> &Status {
        &self.object.as_ref().unwrap().status
    }

    pub(super) fn map(&self) -> &VolumeMap {
        self.status().map.as_ref().unwrap()
    }

    pub(super) fn server(&mut self, id: u128) -> &mut FakeServer {
        self.servers.get_mut(&ServerId(id)).unwrap()
    }

    /// States of the members of a group, by server: `1A 2F 3S`.
    pub(super) fn group(&self, group: usize) -> String {
        let letter = |state| match state {
            MemberState::Active => 'A',
            MemberState::Syncing => 'S',
            MemberState::Failed => 'F',
        };
        let members = &self.map().placements[0].groups[group].members;
        members.iter().map(|m| format!("{}{}", m.server.0, letter(m.state))).collect::<Vec<_>>().join(" ")
    }

    pub(super) fn condition(&self, kind: ConditionKind) -> &Condition {
        &self.conditions[&kind]
    }

    pub(super) fn report(&mut self, server: u128, trouble: Trouble) {
        let map = self.map().clone();
        let m = *map.members().find(|m| m.server == ServerId(server)).unwrap();
        let session = map.sessions.first().map(|s| s.id).unwrap_or_default();
        let generation = map.generation;
        let report = DriverReport { volume: V, session, generation, copy: m.copy, server: m.server, trouble };
        self.input(Input::Report(report));
    }
}

fn server_object(id: ServerId) -> ServerObject {
    ServerObject {
        id,
        addresses: vec![format!("10.0.0.{}:7000", id.0)],
        zone: String::new(),
        node: format!("n{}", id.0),
        schedulable: true,
        drain: false,
    }
}

pub(super) fn drained(id: u128) -> ServerObject {
    ServerObject { drain: true, ..server_object(ServerId(id)) }
}

pub(super) fn volume(copies: u8, groups: u8) -> VolumeObject {
    let policy = Policy {
        copies,
        groups,
        chunk_bytes: 65536,
        page_bytes: 1 << 20,
        zones: ZoneSpread::Prefer,
        locality: false,
        overcommit_percent: 100,
        rebuild_after_ms: 60_000,
        fill_limit: Default::default(),
    };
    let wishes = Wishes {
        size: GIB,
        policy: Some(policy),
        multi_session: false,
        sessions: Vec::new(),
        near_node: String::new(),
        near_zone: String::new(),
        deleted: false,
        let_go: Vec::new(),
        adopt: None,
        force: None,
        delete_kept: Vec::new(),
    };
    VolumeObject { id: V, name: "data".to_string(), id_is_new: true, version: 0, wishes, status: Status::default() }
}
