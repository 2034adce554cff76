//! The simulated world: virtual time, the loop over events, who lives, and the history in words.

use super::api::Store;
use super::checks::Checks;
use super::clients::ClientHost;
use super::dice::Dice;
use super::event::{Event, Host, Process};
use super::explore::Exploration;
use super::faults::Timed;
use super::finish::{Ending, Work};
use super::net::Net;
use super::operators::OperatorHost;
use super::plan::{Action, Fault, Moment, Plan};
use super::queue::Queue;
use super::register::{Register, Wrong};
use super::servers::ServerHost;
use super::{Counters, Failure, Outcome, Tell};
use lamina_protocol::ids::{BootId, ClusterId, VolumeId};
use lamina_protocol::management::Step as LeaderStep;
use lamina_protocol::time::Millis;
use std::collections::BTreeMap;

pub(super) const CLUSTER: ClusterId = ClusterId(0xc1);
pub(super) const VOLUME: VolumeId = VolumeId(0xf0);
/// How often the checks look at the whole world.
const LOOK_US: u64 = 700_000;

/// A process that stands still, with what waits for it.
pub(super) struct Frozen {
    number: usize,
    backlog: Vec<Event>,
}

/// Everything.
pub(super) struct World {
    pub(super) now: u64,
    pub(super) queue: Queue,
    pub(super) dice: Dice,
    pub(super) plan: Plan,
    pub(super) net: Net,
    pub(super) servers: Vec<ServerHost>,
    pub(super) clients: Vec<ClientHost>,
    pub(super) operators: Vec<OperatorHost>,
    pub(super) store: Store,
    pub(super) register: Register,
    pub(super) checks: Checks,
    pub(super) counters: Counters,
    pub(super) frozen: BTreeMap<Host, Frozen>,
    /// Leaders that are to die at a step, and for how long.
    pub(super) armed: Vec<(LeaderStep, u64)>,
    /// Trouble that waits for a moment.
    pub(super) timed: Vec<Timed>,
    /// When each moment was last: a crash right after it has a name.
    pub(super) last_moments: Vec<(Moment, u64)>,
    /// What went wrong so far.
    pub(super) injected: Vec<Fault>,
    /// All is healed; no step of the plan acts any more.
    pub(super) healed: bool,
    pub(super) ending: Ending,
    /// What is tried at which event, in a search.
    pub(super) exploration: Option<Exploration>,
    /// Work so far that is bounded when all is well.
    pub(super) work: Work,
    pub(super) stopped: bool,
    drift: BTreeMap<Host, i64>,
    minted: u128,
    tell: Tell,
    history: Vec<String>,
    failure: Option<Failure>,
}

impl World {
    pub(super) fn new(plan: Plan, tell: Tell) -> Self {
        let setup = &plan.setup;
        let seed = plan.seed;
        let tight = setup.capacity_bytes < (64 << 20);
        let mut world = Self {
            now: 0,
            queue: Queue::new(seed),
            dice: Dice::new(seed, 2),
            net: Net::new(seed, setup.network_us, setup.jitter_us),
            servers: Vec::new(),
            clients: (0..setup.clients).map(|_| ClientHost::default()).collect(),
            operators: (0..setup.operators).map(|_| OperatorHost::default()).collect(),
            store: Store::new(setup),
            register: Register::new(setup.most_blocks.max(setup.blocks), setup.multi_session, tight),
            checks: Checks::default(),
            counters: Counters::default(),
            frozen: BTreeMap::new(),
            armed: Vec::new(),
            timed: Vec::new(),
            last_moments: Vec::new(),
            injected: Vec::new(),
            healed: false,
            ending: Ending::NotYet,
            exploration: None,
            work: Work::default(),
            stopped: false,
            drift: BTreeMap::new(),
            minted: 0x1000,
            tell,
            history: Vec::new(),
            failure: None,
            plan,
        };
        world.set_clocks();
        world
    }

    fn set_clocks(&mut self) {
        let mut dice = Dice::new(self.plan.seed, 3);
        let ppm = self.plan.setup.drift_ppm;
        let hosts = (0..4).flat_map(|n| [Host::Server(n), Host::Driver(n), Host::Operator(n)]);
        for host in hosts {
            self.drift.insert(host, dice.within(0, 2 * ppm) as i64 - ppm as i64);
        }
    }

    pub(super) fn run(&mut self) {
        self.start_servers();
        self.start_operators();
        for (n, step) in self.plan.steps.iter().enumerate() {
            self.queue.push(step.at_us, Event::Step(n));
        }
        let heal_at = self.plan.setup.heal_at_us;
        self.queue.push(heal_at, Event::Heal(usize::MAX));
        self.queue.push(LOOK_US, Event::Look);
        for client in 0..self.clients.len() {
            self.queue.push(500_000, Event::Kubelet { host: client });
        }
        while !self.stopped && self.failure.is_none() {
            let (at, event) = self.queue.pop().expect("the world always looks again");
            self.now = at;
            self.counters.count("events");
            if let Some(event) = self.chosen(event) {
                self.happen(event);
            }
        }
    }

    fn happen(&mut self, event: Event) {
        let conns = &self.net.conns;
        let process = event.process(|conn, end| conns[conn].ends[end]);
        if let Some(process) = process
            && let Some(frozen) = self.frozen.get_mut(&process.host)
        {
            frozen.backlog.push(event);
            return;
        }
        match event {
            Event::Step(n) => self.step(n),
            Event::Timed(fault) => self.timed_fault(&fault),
            Event::Heal(usize::MAX) => self.heal_all(),
            Event::Heal(n) => self.heal(n),
            Event::Thaw { host, number } => self.thaw(host, Some(number)),
            Event::Look => self.look_again(),
            Event::Wake { process, serial } => self.wake(process, serial),
            Event::Stream { conn, from } => self.stream(conn, from),
            Event::Dial { process, to } => self.dial_for_driver(process, to),
            Event::Dialed { conn } => self.dialed(conn),
            Event::DialTimedOut { conn } => self.dial_failed(conn, false),
            Event::HeldTooLong { conn, from, serial } => self.held_too_long(conn, from, serial),
            Event::Gone { conn, end } => self.gone(conn, end),
            Event::Disk { process, disk, boot, op } => self.disk_done(process, disk, boot, op),
            Event::OpenDisk { process, disk } => self.open_disk(process, disk),
            Event::Submit { process, tag } => self.submit(process, tag),
            Event::Boot { host, epoch } => self.boot(host, epoch),
            Event::StoreArrive { process, call } => self.store_arrive(process, call),
            Event::StoreAnswer { process, answer } => self.store_answered(process, answer),
            Event::LeaseTick { process } => self.lease_tick(process),
            Event::CallAgain { process, request } => self.called_again(process, *request),
            Event::Watch { process, object } => self.watched(process, &object),
            Event::ClientWatch { host, object } => self.client_watched(host, object),
            Event::Report { operator, report } => self.reported(operator, *report),
            Event::Kubelet { host } => self.kubelet(host),
        }
    }

    fn look_again(&mut self) {
        self.look();
        self.check_named();
        self.look_at_drains();
        self.people_look();
        self.watch_the_end();
        self.queue.push(self.now + LOOK_US, Event::Look);
    }

    fn step(&mut self, n: usize) {
        if self.healed {
            return;
        }
        let action = self.plan.steps[n].action.clone();
        if !matches!(action, Action::Ask { .. }) {
            self.note(|| action.to_string());
        }
        match action {
            Action::Ask { client, ask } => self.application_asks(client, ask),
            Action::Attach { client, clean } => self.attach(client, clean),
            Action::Detach { client } => self.detach(client, true),
            Action::Grow { blocks } => self.grow(blocks),
            Action::Delete => self.delete_volume(),
            Action::Fault(fault) => self.fault(&fault),
        }
    }

    fn boot(&mut self, host: Host, epoch: u32) {
        match host {
            Host::Server(n) => self.boot_server(n, epoch),
            Host::Driver(n) => self.boot_client(n, epoch),
            Host::Operator(n) => self.boot_operator(n, epoch),
            Host::Api => {}
        }
    }

    fn wake(&mut self, process: Process, serial: u64) {
        match process.host {
            Host::Server(n) => self.wake_server(n, process.epoch, serial),
            Host::Driver(n) => self.wake_driver(n, process.epoch, serial),
            Host::Operator(n) => self.wake_operator(n, process.epoch, serial),
            Host::Api => {}
        }
    }

    // ---- standstill ----

    pub(super) fn freeze(&mut self, host: Host, number: usize) {
        self.frozen.entry(host).or_insert(Frozen { number, backlog: Vec::new() });
    }

    pub(super) fn thaw(&mut self, host: Host, number: Option<usize>) {
        if self.frozen.get(&host).is_none_or(|f| number.is_some_and(|n| n != f.number)) {
            return;
        }
        let Some(frozen) = self.frozen.remove(&host) else { return };
        self.note(|| format!("{host} goes on"));
        for event in frozen.backlog {
            self.happen(event);
        }
    }

    // ---- time and ids ----

    /// What this host's clock says.
    pub(super) fn clock(&self, host: Host) -> Millis {
        let ppm = self.drift.get(&host).copied().unwrap_or(0);
        let own = i128::from(self.now) * i128::from(1_000_000 + ppm) / 1_000_000;
        Millis(own as u64 / 1_000 + 1_000)
    }

    /// When this host's clock will say that; not before now.
    pub(super) fn when(&self, host: Host, at: Millis) -> Option<u64> {
        if at == Millis::NEVER {
            return None;
        }
        let ppm = self.drift.get(&host).copied().unwrap_or(0);
        let own_us = i128::from(at.0.saturating_sub(1_000)) * 1_000;
        let real = (own_us * 1_000_000 + i128::from(1_000_000 + ppm) - 1) / i128::from(1_000_000 + ppm);
        Some((real as u64 + 1).max(self.now + 1))
    }

    pub(super) fn mint(&mut self) -> u128 {
        self.minted += 1;
        self.minted
    }

    pub(super) fn mint_boot(&mut self) -> BootId {
        BootId(self.mint())
    }

    // ---- history and findings ----

    /// A line of the history.
    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if self.tell >= Tell::History {
            self.history.push(format!("{:>12.6} s  {}", self.now as f64 / 1e6, line()));
        }
    }

    /// A line that only a trace has.
    pub(super) fn trace(&mut self, line: impl FnOnce() -> String) {
        if self.tell >= Tell::Everything {
            self.history.push(format!("{:>12.6} s      {}", self.now as f64 / 1e6, line()));
        }
    }

    pub(super) fn fail(&mut self, oracle: &str, text: String) {
        if self.failure.is_none() {
            self.note(|| format!("WRONG ({oracle}): {text}"));
            self.failure = Some(Failure { oracle: oracle.into(), at_us: self.now, text });
        }
    }

    pub(super) fn judge(&mut self, verdict: Result<(), Wrong>) {
        if let Err(Wrong(text)) = verdict {
            self.fail("register (I4, I5, reads)", text);
        }
    }

    pub(super) fn outcome(self) -> Outcome {
        Outcome { failure: self.failure, counters: self.counters, history: self.history }
    }
}
