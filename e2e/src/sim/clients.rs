//! Hosts of clients: the kubelet and CSI side that attaches and stages, the device that outlives its driver's process,
//! the application, and the runtime around the production driver.

use super::event::{Event, Host, Process};
use super::net::{Leaving, Message, Purpose};
use super::plan::{Ask, Moment};
use super::servers::brief;
use super::stamp;
use super::world::{VOLUME, World};
use lamina_protocol::driver::{Config, Driver, Input, LinkId, Op, OpError, Output, Tag};
use lamina_protocol::ids::{Generation, ServerId, SessionId};
use lamina_protocol::management::{SessionState, VolumeObject};
use lamina_protocol::time::Millis;
use lamina_protocol::wire::{RequestBody, Start};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const BLOCK: u64 = 4096;
/// How often the kubelet looks.
const KUBELET_US: u64 = 200_000;
/// Requests that an application has under way at most.
const DEPTH: usize = 24;

/// A request in the device's queue.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) ask: Ask,
    pub(super) op: Op,
    /// Generation under which frames of this write were last sent (I1).
    pub(super) asked_at: u64,
}

/// A process with a driver.
pub(super) struct Runtime {
    driver: Driver,
    wake: u64,
    /// Holds the device: its kernel side goes from one process to the next, never to two.
    holds_device: bool,
    links: BTreeSet<LinkId>,
    fails: BTreeMap<ServerId, u32>,
    told: Generation,
}

/// What is attached to a host.
pub(super) struct Attachment {
    pub(super) id: SessionId,
    pub(super) wished: bool,
    /// Its first driver was started.
    pub(super) staged: bool,
    /// The device is gone with the host's power.
    pub(super) lost: bool,
    /// Every request fails.
    pub(super) dead: bool,
    /// The application stops; when all is answered and flushed, it is detached.
    pub(super) draining: bool,
}

/// A client's host.
#[derive(Default)]
pub(super) struct ClientHost {
    pub(super) epoch: u32,
    pub(super) off: bool,
    pub(super) attached: Option<Attachment>,
    /// The volume is to be attached here.
    pub(super) wanted: bool,
    pub(super) processes: BTreeMap<u32, Runtime>,
    pub(super) device: BTreeMap<u64, Request>,
    heard: Option<Rc<VolumeObject>>,
}

impl World {
    // ---- attach and detach ----

    /// The volume is wanted at this client; on a volume for one session nowhere else.
    pub(super) fn attach(&mut self, client: usize, clean: bool) {
        if self.clients[client].wanted {
            return;
        }
        if !self.plan.setup.multi_session {
            for other in 0..self.clients.len() {
                if self.clients[other].wanted {
                    self.detach(other, clean);
                }
            }
        }
        self.clients[client].wanted = true;
    }

    pub(super) fn detach(&mut self, client: usize, clean: bool) {
        self.clients[client].wanted = false;
        let Some(attached) = self.clients[client].attached.as_mut() else { return };
        attached.draining = true;
        if !clean || attached.lost || attached.dead {
            self.release(client);
        }
    }

    /// The wish goes. A host that lives unstages; one that does not hear of it goes on as long as it may.
    fn release(&mut self, client: usize) {
        let Some(attached) = self.clients[client].attached.as_mut() else { return };
        if std::mem::replace(&mut attached.wished, false) {
            let id = attached.id;
            self.unwish_session(id);
        }
    }

    /// What csi-node and the kubelet do when they look: stage, unstage, attach anew.
    pub(super) fn kubelet(&mut self, client: usize) {
        self.queue.push(self.now + KUBELET_US, Event::Kubelet { host: client });
        let host = &self.clients[client];
        let object = self.store.object.clone();
        let frozen = self.frozen.contains_key(&Host::Driver(client));
        let Some(attached) = &host.attached else {
            let elsewhere = self.clients.iter().any(|c| c.attached.as_ref().is_some_and(|a| a.wished));
            if host.wanted && !self.deleting() && (self.plan.setup.multi_session || !elsewhere) {
                let id = self.wish_session(client);
                self.clients[client].attached =
                    Some(Attachment { id, wished: true, staged: false, lost: false, dead: false, draining: false });
            }
            return;
        };
        let id = attached.id;
        let state = host.heard.as_ref().map(|heard| heard.status.session(id));
        if attached.draining && attached.wished {
            let idle = host.device.is_empty() || !attached.staged;
            if idle || attached.lost || attached.dead {
                self.release(client);
            }
        } else if !attached.wished {
            // A session that was ended (a loss on a shared volume) is as out as one that was let go.
            let out = matches!(object.status.session(id), SessionState::Out | SessionState::Ended);
            if !host.off && !frozen && out {
                self.unstage(client);
            }
        } else if attached.lost || attached.dead || state == Some(SessionState::Ended) {
            if !host.off {
                self.counters.count("reached: a session was replaced");
                if !frozen && self.dice.chance(1, 2) { self.replace_session(client) } else { self.release(client) }
            }
        } else if !attached.staged && !host.off && !frozen && state == Some(SessionState::Admitted) {
            self.stage(client, Start::Fresh);
        }
    }

    /// Nothing of the session is left on the host.
    pub(super) fn unstage(&mut self, client: usize) {
        for epoch in self.clients[client].processes.keys().copied().collect::<Vec<_>>() {
            self.end_process(client, epoch, Leaving::Closed);
        }
        for tag in std::mem::take(&mut self.clients[client].device).into_keys() {
            self.register.abandon(tag);
        }
        self.clients[client].attached = None;
    }

    fn stage(&mut self, client: usize, start: Start) {
        let host = &mut self.clients[client];
        let Some(attached) = host.attached.as_mut() else { return };
        attached.staged = true;
        let session = attached.id;
        host.epoch += 1;
        let process = Process { host: Host::Driver(client), epoch: host.epoch };
        let config = Config { volume: VOLUME, session, start, kept_bytes: self.plan.setup.kept_bytes };
        let runtime = Runtime {
            driver: Driver::new(config),
            wake: 0,
            holds_device: false,
            links: BTreeSet::new(),
            fails: BTreeMap::new(),
            told: Generation(0),
        };
        host.processes.insert(host.epoch, runtime);
        self.note(|| format!("client {client} starts a driver for session {:x} ({start:?})", session.0));
        // A successor asks for the device only when the members refuse every process before it (H20).
        if start == Start::Fresh {
            self.hand_device_to(process, start);
        }
        self.tell_client(client);
    }

    /// The device goes to this process, with every request that is not answered.
    fn hand_device_to(&mut self, process: Process, start: Start) {
        let Host::Driver(client) = process.host else { return };
        for (epoch, runtime) in &mut self.clients[client].processes {
            runtime.holds_device = *epoch == process.epoch;
        }
        if start == Start::Fresh {
            return;
        }
        // Whatever process had it before: what it kept of unflushed writes is not with this one.
        let session = self.clients[client].attached.as_ref().map(|a| a.id).unwrap_or_default();
        self.register.process_died(session);
        self.counters.count("reached: a successor took a device over");
        self.moment(Moment::TookOver);
        let device: Vec<u64> = self.clients[client].device.keys().copied().collect();
        if !device.is_empty() {
            self.counters.count("reached: take-over with requests in flight");
            if self.clients[client].device.values().any(|r| matches!(r.ask, Ask::Write(..) | Ask::Discard(..))) {
                self.counters.count("reached: take-over with writes in flight");
            }
        }
        self.note(|| {
            format!("driver {client}.{} has the device, with {} requests given back", process.epoch, device.len())
        });
        for tag in device {
            self.submit(process, tag);
        }
        self.driver_input(process, Input::Replayed);
    }

    // ---- processes ----

    /// A process ends without a word.
    pub(super) fn end_process(&mut self, client: usize, epoch: u32, how: Leaving) {
        if self.clients[client].processes.remove(&epoch).is_some() {
            let session = self.clients[client].attached.as_ref().map(|a| a.id);
            self.drop_connections(Process { host: Host::Driver(client), epoch }, how);
            if let Some(session) = session {
                self.register.process_died(session);
            }
        }
    }

    /// kill -9 of csi-node: the device stays.
    pub(super) fn kill_driver(&mut self, client: usize, down_us: u64) -> bool {
        let epochs: Vec<u32> = self.clients[client].processes.keys().copied().collect();
        if epochs.is_empty() {
            return false;
        }
        self.count_crash("a driver");
        self.thaw(Host::Driver(client), None);
        for epoch in epochs {
            self.end_process(client, epoch, Leaving::Closed);
        }
        let epoch = self.clients[client].epoch;
        self.queue.push(self.now + down_us, Event::Boot { host: Host::Driver(client), epoch });
        true
    }

    /// A successor starts beside the living process, which is told by the members only.
    pub(super) fn take_over(&mut self, client: usize) -> bool {
        let host = &self.clients[client];
        let alive = host.attached.as_ref().is_some_and(|a| a.staged && !a.lost) && !host.processes.is_empty();
        if alive && !self.frozen.contains_key(&Host::Driver(client)) {
            let session = host.attached.as_ref().map(|a| a.id).unwrap_or_default();
            self.register.process_died(session);
            self.stage(client, Start::Resume);
        }
        alive
    }

    pub(super) fn power_off_client(&mut self, client: usize, down_us: u64) {
        self.thaw(Host::Driver(client), None);
        for epoch in self.clients[client].processes.keys().copied().collect::<Vec<_>>() {
            self.end_process(client, epoch, Leaving::Silent);
        }
        for tag in std::mem::take(&mut self.clients[client].device).into_keys() {
            self.register.abandon(tag);
        }
        let host = &mut self.clients[client];
        host.off = true;
        host.epoch += 1;
        if let Some(attached) = host.attached.as_mut() {
            attached.lost |= attached.staged;
        }
        let epoch = host.epoch;
        self.queue.push(self.now + down_us, Event::Boot { host: Host::Driver(client), epoch });
    }

    pub(super) fn boot_client(&mut self, client: usize, epoch: u32) {
        let host = &mut self.clients[client];
        if host.epoch != epoch || !host.processes.is_empty() {
            return;
        }
        if std::mem::replace(&mut host.off, false) {
            return self.tell_client(client);
        }
        if host.attached.as_ref().is_some_and(|a| a.staged && !a.lost) {
            self.stage(client, Start::Resume);
        }
    }

    pub(super) fn client_watched(&mut self, client: usize, object: Rc<VolumeObject>) {
        if self.net.is_cut(Host::Api, Host::Driver(client)) || self.clients[client].off {
            return;
        }
        let map = object.status.map.clone();
        self.clients[client].heard = Some(object);
        let Some(map) = map else { return };
        for epoch in self.clients[client].processes.keys().copied().collect::<Vec<_>>() {
            let Some(runtime) = self.clients[client].processes.get_mut(&epoch) else { continue };
            if runtime.told < map.generation {
                runtime.told = map.generation;
                let process = Process { host: Host::Driver(client), epoch };
                self.driver_watch(process, map.clone());
            }
        }
    }

    fn driver_watch(&mut self, process: Process, map: lamina_protocol::map::VolumeMap) {
        // The word is taken when the process runs again; the newest one is enough.
        if !self.frozen.contains_key(&process.host) {
            self.driver_input(process, Input::Map(map));
        } else if let Host::Driver(client) = process.host
            && let Some(runtime) = self.clients[client].processes.get_mut(&process.epoch)
        {
            runtime.told = Generation(0);
        }
    }

    // ---- the application ----

    pub(super) fn application_asks(&mut self, client: usize, ask: Ask) {
        // On a volume for one session there is one application, wherever that is now.
        let client = if self.plan.setup.multi_session || self.may_ask(client) {
            client
        } else {
            (0..self.clients.len()).find(|c| self.may_ask(*c)).unwrap_or(client)
        };
        if !self.may_ask(client) || self.is_beyond(client, ask) || self.meets_another_session(client, ask) {
            return self.counters.count("asked in vain");
        }
        self.ask_now(client, ask);
    }

    /// Applications on a shared volume write the same block at once only under a lock (PROTOCOL.md §7).
    fn meets_another_session(&self, client: usize, ask: Ask) -> bool {
        let range = |ask: Ask| match ask {
            Ask::Read(block, count) | Ask::Write(block, count) | Ask::Discard(block, count) => block..block + count,
            Ask::Flush | Ask::Blank => 0..0,
        };
        let writes = |ask: Ask| matches!(ask, Ask::Write(..) | Ask::Discard(..));
        let own = range(ask);
        let others = self.clients.iter().enumerate().filter(|(n, _)| *n != client);
        others.flat_map(|(_, c)| c.device.values()).any(|other| {
            let theirs = range(other.ask);
            (writes(ask) || writes(other.ask)) && own.start < theirs.end && theirs.start < own.end
        })
    }

    /// The device is not as large as that.
    fn is_beyond(&self, client: usize, ask: Ask) -> bool {
        let (Ask::Read(block, count) | Ask::Write(block, count) | Ask::Discard(block, count)) = ask else {
            return false;
        };
        let mut holders = self.clients[client].processes.values().filter(|r| r.holds_device);
        let size = holders.next().and_then(|r| r.driver.size()).unwrap_or(self.plan.setup.blocks * BLOCK);
        (block + count) * BLOCK > size
    }

    fn may_ask(&self, client: usize) -> bool {
        let host = &self.clients[client];
        let alive = host.attached.as_ref().is_some_and(|a| a.staged && !a.lost && !a.dead && !a.draining);
        alive && host.device.len() < DEPTH
    }

    /// Puts a request into the device.
    pub(super) fn ask_now(&mut self, client: usize, ask: Ask) -> u64 {
        let session = self.clients[client].attached.as_ref().map(|a| a.id).unwrap_or_default();
        let tag = self.mint() as u64;
        let stamps = self.register.ask(tag, session, ask);
        let op = match ask {
            Ask::Read(block, count) => Op::Read { address: block * BLOCK, length: count * BLOCK },
            Ask::Write(block, _) => Op::Write { address: block * BLOCK, data: stamp::content(stamps.iter().copied()) },
            Ask::Discard(block, count) => Op::Discard { address: block * BLOCK, length: count * BLOCK },
            Ask::Flush => Op::Flush,
            Ask::Blank => Op::AskWritten,
        };
        self.note(|| {
            format!(
                "client {client} {ask} (request {tag:x}{})",
                stamps.first().map_or(String::new(), |s| format!(", write {}", s >> 16))
            )
        });
        self.counters.count("operations");
        self.clients[client].device.insert(tag, Request { ask, op, asked_at: self.now });
        let holder = self.clients[client].processes.iter().find(|(_, r)| r.holds_device);
        if let Some(epoch) = holder.map(|(epoch, _)| *epoch) {
            let process = Process { host: Host::Driver(client), epoch };
            self.queue.push(self.now + 2, Event::Submit { process, tag });
        }
        tag
    }

    pub(super) fn submit(&mut self, process: Process, tag: u64) {
        let Host::Driver(client) = process.host else { return };
        let holds = self.clients[client].processes.get(&process.epoch).is_some_and(|r| r.holds_device);
        if let Some(request) = self.clients[client].device.get(&tag).filter(|_| holds) {
            let op = request.op.clone();
            self.driver_input(process, Input::Submit { tag: Tag(tag), op });
        }
    }

    fn completed(&mut self, client: usize, epoch: u32, tag: u64, result: Result<bytes::Bytes, OpError>) {
        let generation = self.driver_generation(client, epoch);
        if !self.clients[client].processes.get(&epoch).is_some_and(|r| r.holds_device) {
            return;
        }
        let Some(request) = self.clients[client].device.remove(&tag) else { return };
        self.note(|| {
            let how = result.as_ref().map_or_else(|e| format!("fails: {e:?}"), |data| first_stamps(data));
            format!("client {client}: request {tag:x} ({}) {how}", request.ask)
        });
        let took_ms = (self.now - request.asked_at) / 1_000;
        self.counters.count(if took_ms > 3_000 { "requests that took over 3 s" } else { "requests within 3 s" });
        let session = self.clients[client].attached.as_ref().map(|a| a.id).unwrap_or_default();
        match (result, request.ask) {
            (Ok(data), Ask::Read(..)) => {
                let stamps: Vec<_> = data.chunks(BLOCK as usize).map(stamp::read).collect();
                let verdict = self.register.read(tag, &stamps);
                self.judge(verdict);
            }
            (Ok(data), Ask::Blank) => self.found_blank(tag, &data),
            (Ok(_), ask) => {
                self.check_applied(generation, ask, &request.op);
                self.register.done(tag);
                if ask == Ask::Flush {
                    self.moment(Moment::FlushDone);
                }
            }
            (Err(OpError::NoSpace), _) => {
                self.counters.count("reached: no space");
                let verdict = self.register.no_space(tag);
                self.judge(verdict);
            }
            (Err(error), _) => self.ended_in_error(client, tag, session, error),
        }
    }

    fn ended_in_error(&mut self, client: usize, tag: u64, session: SessionId, error: OpError) {
        self.counters.count("reached: an I/O error");
        if error == OpError::ReadOnly {
            self.fail("driver", "a session that may write is told that it may not".into());
        }
        let verdict = self.register.failed(tag, self.store.lists(session));
        self.judge(verdict);
        let ended = self.clients[client].processes.values().any(|r| r.driver.has_ended());
        if let Some(attached) = self.clients[client].attached.as_mut() {
            attached.dead |= ended;
        }
    }

    // ---- the runtime of a driver ----

    pub(super) fn wake_driver(&mut self, client: usize, epoch: u32, serial: u64) {
        if self.clients[client].processes.get(&epoch).is_some_and(|r| r.wake == serial) {
            self.driver_input(Process { host: Host::Driver(client), epoch }, Input::Timer);
        }
    }

    pub(super) fn driver_connected(&mut self, process: Process, server: ServerId, link: LinkId) {
        let Host::Driver(client) = process.host else { return };
        if let Some(runtime) = self.clients[client].processes.get_mut(&process.epoch) {
            runtime.links.insert(link);
            runtime.fails.remove(&server);
            self.driver_input(process, Input::Connected { server, link });
        }
    }

    pub(super) fn driver_broken(&mut self, process: Process, server: ServerId, link: Option<LinkId>, refused: bool) {
        let Host::Driver(client) = process.host else { return };
        let Some(runtime) = self.clients[client].processes.get_mut(&process.epoch) else { return };
        if let Some(link) = link
            && !runtime.links.remove(&link)
        {
            return;
        }
        *runtime.fails.entry(server).or_default() += 1;
        self.driver_input(process, Input::Broken { server, link, refused });
    }

    pub(super) fn dial_for_driver(&mut self, process: Process, server: ServerId) {
        let Host::Driver(client) = process.host else { return };
        if self.clients[client].processes.contains_key(&process.epoch) {
            self.dial(process, server, Purpose::Driver(server));
        }
    }

    pub(super) fn driver_input(&mut self, process: Process, input: Input) {
        let Host::Driver(client) = process.host else { return };
        let now = self.clock(process.host);
        self.trace(|| format!("driver {client}.{} <- {}", process.epoch, brief(&input)));
        let Some(runtime) = self.clients[client].processes.get_mut(&process.epoch) else { return };
        let mut out = Vec::new();
        runtime.driver.handle(now, input, &mut out);
        for output in out {
            self.driver_output(client, process, output);
        }
        let mine = self.clients[client].processes.get(&process.epoch);
        let holder = self.clients[client].processes.iter().find(|(_, r)| r.holds_device).map_or(0, |(epoch, _)| *epoch);
        if holder < process.epoch && mine.is_some_and(|r| r.driver.owns_device()) {
            self.hand_device_to(process, Start::Resume);
        }
    }

    fn driver_output(&mut self, client: usize, process: Process, output: Output) {
        self.trace(|| format!("driver {client}.{} -> {}", process.epoch, brief(&output)));
        match output {
            Output::Connect { server, .. } => {
                let fails = self.clients[client].processes.get(&process.epoch).and_then(|r| r.fails.get(&server));
                let wait = fails.map_or(0, |n| (25_000u64 << (*n).min(6)).min(1_000_000));
                self.queue.push(self.now + 1 + wait, Event::Dial { process, to: server });
            }
            Output::Disconnect { link } => {
                if let Some(runtime) = self.clients[client].processes.get_mut(&process.epoch) {
                    runtime.links.remove(&link);
                }
                self.close(link.0 as usize, 0);
            }
            Output::Send { link, frame } => {
                self.count_sent(process, &frame.body, &frame.payload);
                self.send(link.0 as usize, 0, Message::Request(frame));
            }
            Output::Complete { tag, result } => self.completed(client, process.epoch, tag.0, result),
            Output::Report(report) => self.send_report(client, &report),
            Output::WakeAt(at) => self.set_driver_timer(client, process, at),
            Output::Exit => {
                self.counters.count("reached: a superseded driver exits");
                self.note(|| format!("driver {client}.{} exits", process.epoch));
                let gone = self.clients[client].processes.remove(&process.epoch);
                self.drop_connections(process, Leaving::Closed);
                if gone.is_some_and(|r| r.holds_device) {
                    self.pass_device_on(client);
                }
            }
        }
    }

    /// All that was given back is done and flushed: what was acknowledged before the take-over is durable.
    fn adopts(&mut self, process: Process) {
        let Host::Driver(client) = process.host else { return };
        self.counters.count("reached: a successor adopts");
        let host = &self.clients[client];
        if let Some(session) = host.attached.as_ref().map(|a| a.id).filter(|_| host.epoch == process.epoch) {
            self.register.adopted(session);
        }
        self.moment(Moment::Adopted);
    }

    /// The process with the device is gone: the one that its members prefer gets it, if it is there already.
    fn pass_device_on(&mut self, client: usize) {
        let owner = self.clients[client].processes.iter().rfind(|(_, r)| r.driver.owns_device());
        if let Some(epoch) = owner.map(|(epoch, _)| *epoch) {
            self.hand_device_to(Process { host: Host::Driver(client), epoch }, Start::Resume);
        }
    }

    fn count_sent(&mut self, process: Process, body: &RequestBody, payload: &[u8]) {
        if matches!(body, RequestBody::Write { .. }) && self.register.is_acknowledged(stamp::first_word(payload)) {
            self.counters.count("reached: a driver writes again what was acknowledged");
        }
        match body {
            RequestBody::Ping => self.counters.count("reached: a ping for the read lease"),
            RequestBody::Write { .. } | RequestBody::Discard { .. } => self.moment(Moment::WriteSent),
            RequestBody::Handled { .. } => {
                self.counters.count("reached: a driver said handled");
                self.moment(Moment::Handled);
            }
            RequestBody::Adopt { .. } => self.adopts(process),
            RequestBody::Reserve { .. } => self.counters.count("reached: a reservation"),
            RequestBody::Release { .. } => self.counters.count("room given back"),
            _ => {}
        }
    }

    fn set_driver_timer(&mut self, client: usize, process: Process, at: Millis) {
        let Some(runtime) = self.clients[client].processes.get_mut(&process.epoch) else { return };
        runtime.wake += 1;
        let serial = runtime.wake;
        if let Some(at) = self.when(process.host, at) {
            self.queue.push(at, Event::Wake { process, serial });
        }
    }

    fn driver_generation(&self, client: usize, epoch: u32) -> Generation {
        self.clients[client].processes.get(&epoch).map_or(Generation(0), |r| r.driver.generation())
    }
}

fn first_stamps(data: &[u8]) -> String {
    let stamps: Vec<String> = data
        .chunks(BLOCK as usize)
        .take(24)
        .map(|b| stamp::read(b).map_or("torn".into(), |s| (s >> 16).to_string()))
        .collect();
    if stamps.is_empty() { "is done".into() } else { format!("reads {}", stamps.join(" ")) }
}
