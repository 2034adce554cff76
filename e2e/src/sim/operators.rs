//! The runtime of operators: the lease, control streams and calls to the API server around the production leader.

use super::event::{Event, Host, Process, StoreAnswer, StoreCall};
use super::net::{ConnIndex, Leaving, Message, Phase, Purpose};
use super::plan::Moment;
use super::servers::brief;
use super::world::{CLUSTER, World};
use lamina_protocol::control::{ControlRequest, DriverReport};
use lamina_protocol::ids::ServerId;
use lamina_protocol::management::{CallId, Config, Input, Leader, Output, ServerObject, Source, Step, VolumeObject};
use lamina_protocol::time::Millis;
use std::collections::BTreeMap;
use std::rc::Rc;

/// How often an operator renews, or tries to get, the lease.
const LEASE_TICK_US: u64 = 700_000;
/// How long a leader goes on without a renewal.
const RENEW_DEADLINE_US: u64 = 2_000_000;

/// A host with an operator.
#[derive(Default)]
pub(super) struct OperatorHost {
    pub(super) epoch: u32,
    pub(super) up: bool,
    pub(super) leader: Option<Leader>,
    renewed: u64,
    /// The number in the lease as it wrote it last.
    lease_number: u64,
    /// One control stream to each server.
    streams: BTreeMap<ServerId, ConnIndex>,
    /// Calls not answered.
    calls: BTreeMap<CallId, ConnIndex>,
    /// Calls that wait until their stream is there.
    waiting: BTreeMap<ConnIndex, Vec<(CallId, ControlRequest)>>,
    wake: u64,
}

impl World {
    pub(super) fn start_operators(&mut self) {
        for n in 0..self.operators.len() {
            self.boot_operator(n, 0);
        }
    }

    pub(super) fn boot_operator(&mut self, n: usize, epoch: u32) {
        let host = &mut self.operators[n];
        if host.up || host.epoch != epoch {
            return;
        }
        host.up = true;
        host.epoch += 1;
        let process = Process { host: Host::Operator(n), epoch: host.epoch };
        let at = self.now + self.dice.within(1, LEASE_TICK_US);
        self.queue.push(at, Event::LeaseTick { process });
    }

    pub(super) fn stop_operator(&mut self, n: usize, down_us: u64) {
        let host = &mut self.operators[n];
        if !std::mem::replace(&mut host.up, false) {
            return;
        }
        let epoch = host.epoch;
        if host.leader.is_some() {
            self.counters.count("reached: a leader was killed");
            self.count_crash("a leader");
        }
        self.note(|| format!("operator {n} is down"));
        self.thaw(Host::Operator(n), None);
        self.step_down(n);
        self.queue.push(self.now + down_us, Event::Boot { host: Host::Operator(n), epoch });
    }

    /// It no longer leads.
    fn step_down(&mut self, n: usize) {
        let host = &mut self.operators[n];
        let process = Process { host: Host::Operator(n), epoch: host.epoch };
        if host.leader.take().is_some() {
            self.note(|| format!("operator {n} no longer leads"));
        }
        let host = &mut self.operators[n];
        host.streams.clear();
        host.calls.clear();
        host.waiting.clear();
        host.wake += 1;
        if host.up {
            // Call ids begin at 1 with each leader: answers meant for the one before must not find this one.
            host.epoch += 1;
            let process = Process { host: Host::Operator(n), epoch: host.epoch };
            self.queue.push(self.now + LEASE_TICK_US, Event::LeaseTick { process });
        }
        self.drop_connections(process, Leaving::Closed);
    }

    pub(super) fn lease_tick(&mut self, process: Process) {
        let Host::Operator(n) = process.host else { return };
        let host = &self.operators[n];
        if host.epoch != process.epoch || !host.up {
            return;
        }
        let deadline = RENEW_DEADLINE_US + self.plan.setup.stubborn_ms * 1_000;
        if host.leader.is_some() && self.now - host.renewed > deadline {
            return self.step_down(n);
        }
        self.call_store(process, StoreCall::Lease);
        let at = self.now + LEASE_TICK_US + self.dice.below(100_000);
        self.queue.push(at, Event::LeaseTick { process });
    }

    pub(super) fn store_answered(&mut self, process: Process, answer: StoreAnswer) {
        let Host::Operator(n) = process.host else { return };
        if self.operators[n].epoch != process.epoch || !self.operators[n].up {
            return;
        }
        match answer {
            StoreAnswer::Leader(input) => self.leader_input(n, *input),
            StoreAnswer::LeaseUnknown => {}
            StoreAnswer::Lease { holds: true, number, object } => {
                let before = std::mem::replace(&mut self.operators[n].lease_number, number);
                if self.operators[n].leader.is_some() && number < before {
                    self.counters.count("reached: a leader finds that the lease went back");
                    return self.step_down(n);
                }
                self.operators[n].renewed = self.now;
                if self.operators[n].leader.is_some() {
                    self.leader_input(n, Input::LeaseNumber(number));
                } else {
                    self.begin_to_lead(n, number, object);
                }
            }
            StoreAnswer::Lease { holds: false, .. } => {
                let stubborn = self.now - self.operators[n].renewed <= self.plan.setup.stubborn_ms * 1_000;
                if self.operators[n].leader.is_some() && !stubborn {
                    self.step_down(n);
                } else if self.operators[n].leader.is_some() {
                    self.counters.count("reached: two leaders at once");
                }
            }
        }
    }

    fn begin_to_lead(&mut self, n: usize, number: u64, object: Option<Rc<VolumeObject>>) {
        let mut next = (self.mint() << 32) + 1;
        self.note(|| format!("operator {n} leads (lease number {number})"));
        let ids = Box::new(move || {
            next += 1;
            next
        });
        self.operators[n].leader = Some(Leader::new(Config::new(CLUSTER, ids)));
        self.operators[n].renewed = self.now;
        self.leader_input(n, Input::LeaseNumber(number));
        for server in 0..self.servers.len() {
            let object = self.server_object(server);
            self.leader_input(n, Input::Server(object));
        }
        if let Some(object) = object {
            self.leader_input(n, Input::Volume { object: (*object).clone(), source: Source::Watched });
        }
        self.leader_input(n, Input::Listed);
    }

    pub(super) fn server_object(&self, n: usize) -> ServerObject {
        ServerObject {
            id: self.servers[n].id,
            addresses: vec![format!("server-{n}:1")],
            zone: format!("zone-{n}"),
            node: format!("node-{n}"),
            schedulable: true,
            drain: self.servers[n].draining || self.servers[n].drained,
        }
    }

    pub(super) fn wake_operator(&mut self, n: usize, epoch: u32, serial: u64) {
        if self.operators[n].epoch == epoch && self.operators[n].wake == serial {
            self.leader_input(n, Input::Timer);
        }
    }

    pub(super) fn leader_input(&mut self, n: usize, input: Input) {
        let now = self.clock(Host::Operator(n));
        if self.operators[n].leader.is_none() {
            return;
        }
        self.trace(|| format!("operator {n} <- {}", brief(&input)));
        let epoch = self.operators[n].epoch;
        let Some(leader) = self.operators[n].leader.as_mut() else { return };
        let mut out = Vec::new();
        leader.handle(now, input, &mut out);
        for output in out {
            // The leader may be told to die between two outputs.
            if self.operators[n].epoch == epoch && self.operators[n].leader.is_some() {
                self.leader_output(n, output);
            }
        }
    }

    fn leader_output(&mut self, n: usize, output: Output) {
        self.trace(|| format!("operator {n} -> {}", brief(&output)));
        let process = Process { host: Host::Operator(n), epoch: self.operators[n].epoch };
        match output {
            Output::Control { server, call, request } => self.control_call(process, server, call, request),
            Output::Write { call, kind, guard, next, .. } => {
                self.counters.count(&format!("write: {kind:?}"));
                self.call_store(process, StoreCall::Write { call, guard, next: Box::new(next) });
            }
            Output::Release { call, guard, .. } => self.call_store(process, StoreCall::Release { call, guard }),
            Output::Read { .. } => self.call_store(process, StoreCall::Read),
            Output::RaiseLeaseNumber { above } => self.call_store(process, StoreCall::RaiseLease { above }),
            Output::Passed { step, generation, .. } => self.passed(n, step, generation.0),
            Output::WakeAt(at) => self.set_leader_timer(n, at),
            Output::Event(event) => {
                self.counters.count(&format!("event: {:?}", event.reason));
                self.note(|| format!("operator {n}: {:?}: {}", event.reason, event.text));
            }
            Output::Conditions { conditions, .. } => {
                self.trace(|| format!("operator {n}: {}", brief(&conditions)));
                // A person goes by the leader with the lease. Taken for granted, not shown: the product's deposed leader may
                // write its older conditions over those of the new one (seed 448176479291).
                if self.store.holder.is_none_or(|holder| holder == process) {
                    self.conditions_told(&conditions);
                }
            }
            Output::Progress { .. } | Output::Server(_) | Output::Orphans { .. } => {}
        }
    }

    fn passed(&mut self, n: usize, step: Step, generation: u64) {
        self.counters.count(&format!("passed: {step:?}"));
        self.trace(|| format!("operator {n} passes {step:?} of generation {generation}"));
        self.moment(Moment::Leader(step));
        if step == Step::Intended {
            // What the map before has brought about, before this change hides it.
            self.look();
        }
        if let Some(at) = self.armed.iter().position(|(armed, _)| *armed == step) {
            let (_, down_ms) = self.armed.remove(at);
            self.counters.count(&format!("leader killed at: {step:?}"));
            self.note(|| format!("operator {n} dies at {step:?} of generation {generation}"));
            self.stop_operator(n, down_ms * 1_000);
        }
    }

    fn set_leader_timer(&mut self, n: usize, at: Millis) {
        let host = &mut self.operators[n];
        host.wake += 1;
        let (serial, process) = (host.wake, Process { host: Host::Operator(n), epoch: host.epoch });
        if let Some(at) = self.when(Host::Operator(n), at) {
            self.queue.push(at, Event::Wake { process, serial });
        }
    }

    // ---- control streams ----

    fn control_call(&mut self, process: Process, server: ServerId, call: CallId, request: ControlRequest) {
        let Host::Operator(n) = process.host else { return };
        let known = self.operators[n].streams.get(&server).copied();
        let conn = known.unwrap_or_else(|| self.dial(process, server, Purpose::Control(server)));
        self.operators[n].streams.insert(server, conn);
        self.operators[n].calls.insert(call, conn);
        if self.net.conns[conn].phase == Phase::Open {
            self.send_call(conn, call, request);
        } else {
            self.operators[n].waiting.entry(conn).or_default().push((call, request));
        }
    }

    fn send_call(&mut self, conn: ConnIndex, call: CallId, request: ControlRequest) {
        if self.dice.chance(1, 16) {
            let bytes = lamina_protocol::codec::encode(&request);
            let read: ControlRequest = lamina_protocol::codec::decode(&bytes).expect("what was written is read");
            assert_eq!(read, request, "a control request comes out of its bytes as it went in");
        }
        self.send(conn, 0, Message::Call(call, Box::new(request)));
    }

    pub(super) fn control_connected(&mut self, conn: ConnIndex) {
        let [from, to] = self.net.conns[conn].ends;
        let (Host::Operator(n), Host::Server(server)) = (from.host, to.host) else { return };
        self.servers[server].control.push(conn);
        self.net.conns[conn].connected = true;
        for (call, request) in self.operators[n].waiting.remove(&conn).unwrap_or_default() {
            self.send_call(conn, call, request);
        }
    }

    pub(super) fn control_broken(&mut self, from: Process, conn: ConnIndex, server: ServerId) {
        let Host::Operator(n) = from.host else { return };
        if self.operators[n].epoch != from.epoch {
            return;
        }
        let host = &mut self.operators[n];
        if host.streams.get(&server) == Some(&conn) {
            host.streams.remove(&server);
        }
        host.waiting.remove(&conn);
        let calls: Vec<CallId> = host.calls.iter().filter(|(_, c)| **c == conn).map(|(call, _)| *call).collect();
        for call in calls {
            self.operators[n].calls.remove(&call);
            self.leader_input(n, Input::Unreachable { server, call });
        }
    }

    /// A server says something over a control stream.
    pub(super) fn leader_hears(&mut self, process: Process, conn: ConnIndex, message: Message) {
        let Host::Operator(operator) = process.host else { return };
        let Purpose::Control(server) = self.net.conns[conn].purpose else { return };
        if self.operators[operator].epoch != process.epoch {
            return;
        }
        match message {
            Message::CallReply(call, reply) => {
                let n = self.server_index(server);
                self.servers[n].heard_at = self.now;
                if self.operators[operator].calls.remove(&call).is_some() {
                    self.leader_input(operator, Input::Reply { server, call, reply: *reply });
                }
            }
            Message::AskMap(volume, at_least) => {
                self.leader_input(operator, Input::MapWanted { server, volume, at_least })
            }
            Message::Stale(seen) => self.leader_input(operator, Input::Stale { server, seen }),
            other => unreachable!("an operator is not sent {other:?}"),
        }
    }

    /// A driver's report, on its way to all operators: whoever leads takes it.
    pub(super) fn send_report(&mut self, client: usize, report: &DriverReport) {
        self.counters.count("reached: a driver reported trouble");
        for operator in 0..self.operators.len() {
            if !self.net.is_cut(Host::Driver(client), Host::Operator(operator)) {
                let at = self.now + self.dice.within(200, 10_000);
                self.queue.push(at, Event::Report { operator, report: Box::new(report.clone()) });
                if self.dice.chance(1, 10) {
                    let again = at + self.dice.within(1, 3_000_000);
                    self.queue.push(again, Event::Report { operator, report: Box::new(report.clone()) });
                }
            }
        }
    }

    pub(super) fn reported(&mut self, operator: usize, report: DriverReport) {
        if !self.frozen.contains_key(&Host::Operator(operator)) {
            self.leader_input(operator, Input::Report(report));
        }
    }
}
