//! The API server: one volume's object, the objects of the servers, the lease; compare-and-swap, watches that lag.

use super::event::{Event, Host, Process, StoreAnswer, StoreCall};
use super::people::Backup;
use super::plan::Setup;
use super::world::{VOLUME, World};
use lamina_protocol::ids::{Generation, SessionId};
use lamina_protocol::management::{
    Guard, Input, Policy, SessionWish, Source, Status, VolumeObject, Wishes, Written, ZoneSpread,
};
use lamina_protocol::map::{AccessMode, VolumeMap};
use std::collections::BTreeMap;
use std::rc::Rc;

/// How long a lease holds without a renewal.
const LEASE_US: u64 = 3_000_000;
/// How long an operator waits for an answer.
const PATIENCE_US: u64 = 1_500_000;

/// What the API server keeps.
pub(super) struct Store {
    pub(super) object: Rc<VolumeObject>,
    pub(super) holder: Option<Process>,
    pub(super) renewed: u64,
    pub(super) lease_number: u64,
    /// What each way of a call takes longer at most.
    pub(super) extra_us: u64,
    /// States that may be put back.
    pub(super) backups: Vec<Backup>,
    /// An old state was put back.
    pub(super) restored: bool,
    /// A leader says that a person must say which map counts.
    pub(super) diverged: bool,
    /// Since when a group has waited for a server that is down.
    pub(super) waits_since: Option<u64>,
    /// The object is no more.
    pub(super) gone: bool,
    /// Every map ever committed.
    pub(super) maps: BTreeMap<Generation, VolumeMap>,
    /// When the next word of a watch may come: watches are ordered.
    next_watch: BTreeMap<Host, u64>,
    sessions: u128,
}

impl Store {
    pub(super) fn new(setup: &Setup) -> Self {
        let policy = Policy {
            copies: setup.copies,
            groups: setup.groups,
            chunk_bytes: 64 << 10,
            page_bytes: setup.page_bytes,
            zones: ZoneSpread::Prefer,
            locality: true,
            overcommit_percent: 1_000_000,
            rebuild_after_ms: setup.rebuild_after_ms,
            fill_limit: Default::default(),
        };
        let wishes = Wishes {
            size: setup.blocks * 4096,
            policy: Some(policy),
            multi_session: setup.multi_session,
            sessions: Vec::new(),
            near_node: String::new(),
            near_zone: String::new(),
            deleted: false,
            let_go: Vec::new(),
            adopt: None,
            force: None,
            delete_kept: Vec::new(),
        };
        let status = Status::default();
        let object = VolumeObject { id: VOLUME, name: "volume".into(), id_is_new: true, version: 1, wishes, status };
        Self {
            object: Rc::new(object),
            holder: None,
            renewed: 0,
            lease_number: 0,
            extra_us: 0,
            backups: Vec::new(),
            restored: false,
            diverged: false,
            waits_since: None,
            gone: false,
            maps: BTreeMap::new(),
            next_watch: BTreeMap::new(),
            sessions: 0,
        }
    }

    /// The committed map.
    pub(super) fn map(&self) -> Option<&VolumeMap> {
        self.object.status.map.as_ref()
    }

    pub(super) fn lists(&self, session: SessionId) -> bool {
        self.map().is_some_and(|map| map.session(session).is_some())
    }
}

impl World {
    // ---- wishes: what people and the CSI plugin write ----

    /// Changes the wishes. Everybody who watches hears of it.
    pub(super) fn wish(&mut self, change: impl FnOnce(&mut Wishes)) {
        let mut object = (*self.store.object).clone();
        object.version += 1;
        change(&mut object.wishes);
        self.store.object = Rc::new(object);
        self.back_up();
        self.tell_watchers();
    }

    /// A new wish to attach the volume to a client.
    pub(super) fn wish_session(&mut self, client: usize) -> SessionId {
        self.store.sessions += 1;
        let id = SessionId(0xa00 + self.store.sessions);
        let wish = SessionWish { id, node: format!("client-{client}"), mode: AccessMode::ReadWrite };
        self.wish(|wishes| wishes.sessions.push(wish));
        self.note(|| format!("session {:x} of client {client} is wished for", id.0));
        id
    }

    /// A new wish of a client's node in the place of one.
    pub(super) fn wish_instead(&mut self, client: usize, old: SessionId) -> SessionId {
        self.store.sessions += 1;
        let id = SessionId(0xa00 + self.store.sessions);
        self.note(|| format!("session {:x} of client {client} takes the place of {:x}", id.0, old.0));
        self.wish(|wishes| wishes.sessions.iter_mut().filter(|wish| wish.id == old).for_each(|wish| wish.id = id));
        id
    }

    pub(super) fn unwish_session(&mut self, id: SessionId) {
        self.note(|| format!("session {:x} is no longer wished for", id.0));
        self.wish(|wishes| wishes.sessions.retain(|s| s.id != id));
    }

    // ---- watches ----

    /// Everybody who watches hears of the object as it is now.
    pub(super) fn tell_watchers(&mut self) {
        for n in 0..self.operators.len() {
            if self.operators[n].leader.is_some() {
                let process = Process { host: Host::Operator(n), epoch: self.operators[n].epoch };
                let (at, object) = (self.watch_time(Host::Operator(n)), self.store.object.clone());
                let word = Event::Watch { process, object };
                self.now_and_then_again(word.clone());
                self.queue.push(at, word);
            }
        }
        for n in 0..self.clients.len() {
            self.tell_client(n);
        }
    }

    /// A client's host hears of the object as it is now.
    pub(super) fn tell_client(&mut self, n: usize) {
        let (at, object) = (self.watch_time(Host::Driver(n)), self.store.object.clone());
        self.queue.push(at, Event::ClientWatch { host: n, object });
    }

    fn watch_time(&mut self, host: Host) -> u64 {
        let late = if self.dice.chance(1, 20) { 800_000 } else { 8_000 };
        let at = self.now + self.dice.within(300, late);
        let next = self.store.next_watch.entry(host).or_default();
        *next = (*next + 1).max(at);
        *next
    }

    /// A word of a watch has come to an operator: lost if the API server is cut off; a new watch lists anew.
    pub(super) fn watched(&mut self, process: Process, object: &Rc<VolumeObject>) {
        if self.store.gone {
            return self.leader_input_of(process, Input::VolumeGone { volume: VOLUME });
        }
        if !self.net.is_cut(Host::Api, process.host) {
            let input = Input::Volume { object: (**object).clone(), source: Source::Watched };
            self.leader_input_of(process, input);
        }
    }

    // ---- calls ----

    pub(super) fn call_store(&mut self, process: Process, call: StoreCall) {
        let late = if self.dice.chance(1, 60) { self.dice.within(500_000, 5_000_000) } else { 0 };
        let at = self.now + self.dice.within(300, 6_000) + late + self.slow_way();
        self.queue.push(at, Event::StoreArrive { process, call });
    }

    fn slow_way(&mut self) -> u64 {
        let extra_us = self.store.extra_us;
        if extra_us > 0 { self.dice.within(0, extra_us) } else { 0 }
    }

    pub(super) fn store_arrive(&mut self, process: Process, call: StoreCall) {
        let arrives = !self.net.is_cut(process.host, Host::Api);
        let twice = arrives && !self.healed && matches!(call, StoreCall::Write { .. }) && self.dice.chance(1, 80);
        if twice {
            // Who asks for it got no answer and asks again by itself; the second answer is what is heard.
            self.counters.count("fault: a write to the API server is done twice");
            self.carry_out(process, &call);
        }
        let answer = arrives.then(|| self.carry_out(process, &call));
        let returns = arrives && !self.net.is_cut(Host::Api, process.host);
        let (wait, answer) = match answer.filter(|_| returns) {
            Some(answer) => (self.dice.within(300, 6_000) + self.slow_way(), Some(answer)),
            None => (PATIENCE_US, unknown(&call)),
        };
        match answer {
            Some(answer) => self.queue.push(self.now + wait, Event::StoreAnswer { process, answer }),
            // A read is repeated by the runtime until it is answered.
            None => self.queue.push(self.now + wait, Event::StoreArrive { process, call }),
        }
    }

    fn carry_out(&mut self, process: Process, call: &StoreCall) -> StoreAnswer {
        let leader = |input| StoreAnswer::Leader(Box::new(input));
        match call {
            StoreCall::Write { call, guard, next } => {
                let outcome = self.write_status(process, guard, next);
                leader(Input::Written { call: *call, outcome })
            }
            StoreCall::Release { call, guard } => {
                let wishes = &self.store.object.wishes;
                let free = wishes.deleted && wishes.sessions.is_empty() && !self.store.gone;
                let outcome = match free && guard.holds(&self.store.object.status) {
                    true => Written::Done,
                    false => Written::Conflict,
                };
                if outcome == Written::Done {
                    self.released(process);
                }
                leader(Input::Written { call: *call, outcome })
            }
            StoreCall::Read if self.store.gone => leader(Input::VolumeGone { volume: VOLUME }),
            StoreCall::Read => leader(Input::Volume { object: (*self.store.object).clone(), source: Source::Read }),
            StoreCall::Lease => self.lease(process),
            StoreCall::RaiseLease { above } => {
                self.store.lease_number = self.store.lease_number.max(above + 1);
                leader(Input::LeaseNumber(self.store.lease_number))
            }
        }
    }

    fn write_status(&mut self, process: Process, guard: &Guard, next: &Status) -> Written {
        if self.store.gone || !guard.holds(&self.store.object.status) {
            self.counters.count("reached: a guarded write was refused");
            return Written::Conflict;
        }
        let leads = self.store.holder == Some(process);
        if !leads {
            self.counters.count("reached: a deposed leader's write went through");
        }
        let mut object = (*self.store.object).clone();
        object.version += 1;
        let before = std::mem::replace(&mut object.status, next.clone());
        self.store.object = Rc::new(object);
        self.back_up();
        self.committed(&before);
        self.tell_watchers();
        Written::Done
    }

    fn lease(&mut self, process: Process) -> StoreAnswer {
        let expired = self.now.saturating_sub(self.store.renewed) > LEASE_US;
        if self.store.holder.is_none() || self.store.holder == Some(process) || expired {
            if self.store.holder != Some(process) {
                self.note(|| format!("{} holds the lease", process.host));
                self.counters.count("reached: a new leader");
            }
            self.store.holder = Some(process);
            self.store.renewed = self.now;
            self.store.lease_number += 1;
            self.back_up();
        }
        StoreAnswer::Lease {
            holds: self.store.holder == Some(process),
            number: self.store.lease_number,
            object: (!self.store.gone).then(|| self.store.object.clone()),
        }
    }
}

/// What an operator thinks of a call that was not answered.
fn unknown(call: &StoreCall) -> Option<StoreAnswer> {
    match call {
        StoreCall::Write { call, .. } | StoreCall::Release { call, .. } => {
            Some(StoreAnswer::Leader(Box::new(Input::Written { call: *call, outcome: Written::Unknown })))
        }
        StoreCall::Lease => Some(StoreAnswer::LeaseUnknown),
        StoreCall::Read | StoreCall::RaiseLease { .. } => None,
    }
}
