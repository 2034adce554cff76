//! The runtime of storage servers: devices, connections and control calls around the production state machine.

use super::disk::{Cut, Disk, Ended};
use super::event::{Event, Host, Process};
use super::net::{ConnIndex, Leaving, Message, Purpose};
use super::world::{CLUSTER, World};
use lamina_protocol::control::{ControlRequest, Rejoin};
use lamina_protocol::ids::{BootId, CopyId, DeviceId, Generation, ServerId};
use lamina_protocol::management;
use lamina_protocol::mutants::{Mutant, on};
use lamina_protocol::storage_server::medium::{MediumEvent, MediumOp, OpId};
use lamina_protocol::storage_server::{CallId, Config, Input, Output, PeerId, StorageServer};
use lamina_protocol::time::Millis;
use lamina_protocol::wire::RequestId;
use std::collections::BTreeMap;

/// A host with a storage server.
pub(super) struct ServerHost {
    pub(super) id: ServerId,
    pub(super) epoch: u32,
    pub(super) powered: bool,
    pub(super) machine: Option<StorageServer>,
    pub(super) disks: Vec<Disk>,
    /// Disks that others were put in place of.
    pub(super) set_aside: Vec<Disk>,
    pub(super) peers: BTreeMap<PeerId, ConnIndex>,
    /// Control connections accepted.
    pub(super) control: Vec<ConnIndex>,
    pub(super) calls: BTreeMap<CallId, (ConnIndex, management::CallId)>,
    pub(super) extra_us: u64,
    /// It was asked to stop and waits to be left out.
    pub(super) leaving: bool,
    /// A person wants it empty.
    pub(super) draining: bool,
    /// It was to be empty and is.
    pub(super) drained: bool,
    wake: u64,
    /// Generation of each request under way, for I1.
    pub(super) requests: BTreeMap<(ConnIndex, RequestId), Generation>,
    /// Highest generation that it said to have promised (I1, I2).
    pub(super) promised: Generation,
    /// Highest generation that it said to store for each copy (I2).
    pub(super) stored: BTreeMap<CopyId, Generation>,
    /// When a leader last heard of it.
    pub(super) heard_at: u64,
    /// Openings that ended with a failure of the device, by process: only a deliberate mistake uses one again (R3).
    failed_boots: BTreeMap<usize, (u32, BootId)>,
}

impl World {
    pub(super) fn start_servers(&mut self) {
        for n in 0..self.plan.setup.servers {
            let disks = (0..self.plan.setup.disks)
                .map(|_| Disk::blank(DeviceId(self.mint()), self.plan.setup.capacity_bytes))
                .collect();
            self.servers.push(ServerHost {
                id: ServerId(0x5e0 + n as u128),
                epoch: 0,
                powered: false,
                machine: None,
                disks,
                set_aside: Vec::new(),
                peers: BTreeMap::new(),
                control: Vec::new(),
                calls: BTreeMap::new(),
                extra_us: 0,
                leaving: false,
                draining: false,
                drained: false,
                wake: 0,
                requests: BTreeMap::new(),
                promised: Generation(0),
                stored: BTreeMap::new(),
                heard_at: 0,
                failed_boots: BTreeMap::new(),
            });
            self.boot_server(n, 0);
        }
    }

    pub(super) fn server_index(&self, id: ServerId) -> usize {
        self.servers.iter().position(|s| s.id == id).expect("ids of servers come from the simulator")
    }

    /// The process starts; its devices are opened one after the other.
    pub(super) fn boot_server(&mut self, n: usize, epoch: u32) {
        let host = &mut self.servers[n];
        if host.machine.is_some() || host.epoch != epoch {
            return;
        }
        host.epoch += 1;
        host.powered = true;
        host.machine = Some(StorageServer::new(Config { server: host.id, cluster: CLUSTER }));
        let process = Process { host: Host::Server(n), epoch: host.epoch };
        self.note(|| format!("server {n} starts"));
        let mut at = self.now;
        for disk in 0..self.servers[n].disks.len() {
            at += self.dice.within(500, 40_000);
            self.queue.push(at, Event::OpenDisk { process, disk });
        }
    }

    pub(super) fn open_disk(&mut self, process: Process, disk: usize) {
        let Host::Server(n) = process.host else { return };
        if self.servers[n].epoch != process.epoch || self.servers[n].machine.is_none() {
            return;
        }
        let fresh = self.mint_boot();
        let host = &mut self.servers[n];
        let again = host.failed_boots.remove(&disk).filter(|(epoch, _)| *epoch == process.epoch);
        let boot = again.filter(|_| on(Mutant::SameBootAgain)).map_or(fresh, |(_, boot)| boot);
        if host.disks[disk].boot().is_some() {
            return;
        }
        if std::mem::take(&mut host.disks[disk].returns_blank) {
            self.counters.count("reached: a server is back with a blank disk");
        }
        let host = &mut self.servers[n];
        let opened = host.disks[disk].open(boot, host.id, CLUSTER);
        self.trace(|| format!("server {n} opens disk {disk} as boot {:x}", boot.0));
        self.server_input(n, Input::DeviceOpened(opened));
    }

    /// The process ends.
    pub(super) fn stop_server(&mut self, n: usize, cut: Cut, down_us: u64) {
        let host = &mut self.servers[n];
        if host.machine.take().is_none() {
            return;
        }
        self.count_crash("a server");
        let host = &mut self.servers[n];
        let process = Process { host: Host::Server(n), epoch: host.epoch };
        host.powered = cut == Cut::Process;
        host.leaving = false;
        host.peers.clear();
        host.control.clear();
        host.calls.clear();
        host.requests.clear();
        let epoch = host.epoch;
        let mut lost = 0;
        for disk in &mut host.disks {
            lost += disk.close(cut, &mut self.dice);
        }
        self.counters.add("reached: unflushed blocks lost", lost as u64);
        self.thaw(Host::Server(n), None);
        let how = if cut == Cut::Power { Leaving::Silent } else { Leaving::Closed };
        self.drop_connections(process, how);
        self.note(|| {
            format!(
                "server {n} is down{}",
                if lost > 0 { format!(", {lost} unflushed blocks lost") } else { String::new() }
            )
        });
        self.queue.push(self.now + down_us, Event::Boot { host: Host::Server(n), epoch });
    }

    pub(super) fn wake_server(&mut self, n: usize, epoch: u32, serial: u64) {
        if self.servers[n].epoch == epoch && self.servers[n].wake == serial {
            self.server_input(n, Input::Timer);
        }
    }

    pub(super) fn server_input(&mut self, n: usize, input: Input) {
        let now = self.clock(Host::Server(n));
        self.trace(|| format!("server {n} <- {}", brief(&input)));
        let Some(machine) = self.servers[n].machine.as_mut() else { return };
        let mut out = Vec::new();
        machine.handle(now, input, &mut out);
        for output in out {
            self.server_output(n, output);
        }
    }

    fn server_output(&mut self, n: usize, output: Output) {
        self.trace(|| format!("server {n} -> {}", brief(&output)));
        match output {
            Output::Medium { boot, op, what } => self.medium(n, boot, op, what),
            Output::CloseDevice { boot } => self.close_device(n, boot),
            Output::Reply { conn, frame } => {
                self.check_reply(n, conn.0 as usize, &frame);
                self.send(conn.0 as usize, 1, Message::Reply(frame));
            }
            Output::Close { conn, why } => {
                self.fail("protocol", format!("server {n} closes a connection: {why}"));
                self.close(conn.0 as usize, 1);
            }
            Output::ControlReply { call, reply } => {
                self.check_control_reply(n, &reply);
                if let Some((conn, call)) = self.servers[n].calls.remove(&call) {
                    self.send(conn, 1, Message::CallReply(call, Box::new(reply)));
                }
            }
            Output::PeerConnect { peer, server, .. } => {
                let process = Process { host: Host::Server(n), epoch: self.servers[n].epoch };
                let conn = self.dial(process, server, Purpose::Peer(peer, server));
                self.servers[n].peers.insert(peer, conn);
            }
            Output::PeerSend { peer, frame } => {
                if let Some(conn) = self.servers[n].peers.get(&peer) {
                    self.send(*conn, 0, Message::Request(frame));
                }
            }
            Output::PeerClose { peer } => {
                if let Some(conn) = self.servers[n].peers.remove(&peer) {
                    self.close(conn, 0);
                }
            }
            Output::StaleSeen(seen) => {
                self.counters.count("reached: a stale request was seen");
                self.tell_leaders(n, Message::Stale(seen));
            }
            Output::Rot(rot) => self.counters.count(match rot.bad {
                0 => "reached: a page with bad blocks was repaired",
                _ => "reached: bad blocks were found",
            }),
            Output::AskMap { volume, at_least } => {
                self.counters.count("reached: a server asked for a map");
                self.tell_leaders(n, Message::AskMap(volume, at_least));
            }
            Output::WakeAt(at) => self.set_server_timer(n, at),
        }
    }

    fn tell_leaders(&mut self, n: usize, message: Message) {
        for conn in self.servers[n].control.clone() {
            self.send(conn, 1, message.clone());
        }
    }

    fn set_server_timer(&mut self, n: usize, at: Millis) {
        let host = &mut self.servers[n];
        host.wake += 1;
        let (serial, process) = (host.wake, Process { host: Host::Server(n), epoch: host.epoch });
        if let Some(at) = self.when(Host::Server(n), at) {
            self.queue.push(at, Event::Wake { process, serial });
        }
    }

    // ---- devices ----

    fn medium(&mut self, n: usize, boot: BootId, op: OpId, what: MediumOp) {
        let extra = self.servers[n].extra_us;
        let took = match &what {
            MediumOp::Commit(_) => self.dice.within(60, 600),
            MediumOp::Flush => self.dice.within(100, 2_500),
            MediumOp::Load(_) | MediumOp::NextPage { .. } | MediumOp::Allocate(_) | MediumOp::Release(_) => {
                self.dice.within(1, 40)
            }
            _ => self.dice.within(20, 250),
        };
        let slow = if extra > 0 { self.dice.within(0, extra) } else { 0 };
        self.counters.count("disk operations");
        let host = &mut self.servers[n];
        let Some(disk) = host.disks.iter().position(|d| d.boot() == Some(boot)) else { return };
        let process = Process { host: Host::Server(n), epoch: host.epoch };
        if let Some(at) = host.disks[disk].hand_in(boot, op, what, self.now, took + slow) {
            self.queue.push(at, Event::Disk { process, disk, boot, op });
        }
    }

    pub(super) fn disk_done(&mut self, process: Process, disk: usize, boot: BootId, op: OpId) {
        let Host::Server(n) = process.host else { return };
        let found = &mut self.servers[n].disks[disk];
        let ended = found.complete(boot, op);
        // A block that its source has stale stays stale, whatever a client writes there (R12).
        if let Some(page) = found.synced_early.take().filter(|_| !self.register.has_rot()) {
            self.fail("H11c", format!("server {n} calls a page synced whose filled blocks are not durable: {page:?}"));
        }
        let found = &mut self.servers[n].disks[disk];
        match ended {
            Ended::Nothing => {}
            Ended::Answer(answer) => {
                let free_bytes = found.free_bytes();
                self.server_input(n, Input::Device { boot, event: MediumEvent::Answered { op, answer, free_bytes } });
            }
            Ended::Failed => {
                self.counters.count("reached: a disk failed");
                self.note(|| format!("disk {disk} of server {n} fails"));
                self.server_input(n, Input::Device { boot, event: MediumEvent::Failed });
            }
        }
    }

    /// R3: what the device still had in its cache may be lost; later it is opened anew, under a new boot id.
    fn close_device(&mut self, n: usize, boot: BootId) {
        let host = &mut self.servers[n];
        let Some(disk) = host.disks.iter().position(|d| d.boot() == Some(boot)) else { return };
        let process = Process { host: Host::Server(n), epoch: host.epoch };
        host.disks[disk].close(Cut::Power, &mut self.dice);
        host.failed_boots.insert(disk, (process.epoch, boot));
        let later = self.dice.within(50_000, 4_000_000);
        self.queue.push(self.now + later, Event::OpenDisk { process, disk });
    }

    // ---- connections ----

    pub(super) fn server_conn_closed(&mut self, n: usize, conn: ConnIndex) {
        if self.servers[n].epoch != self.net.conns[conn].ends[1].epoch {
            return;
        }
        match self.net.conns[conn].purpose {
            Purpose::Control(_) => {
                let host = &mut self.servers[n];
                host.control.retain(|c| *c != conn);
                host.calls.retain(|_, (c, _)| *c != conn);
            }
            Purpose::Driver(_) | Purpose::Peer(..) => {
                self.servers[n].requests.retain(|(c, _), _| *c != conn);
                let conn = lamina_protocol::storage_server::ConnId(conn as u64);
                self.server_input(n, Input::Closed { conn });
            }
        }
    }

    pub(super) fn server_called(
        &mut self,
        n: usize,
        conn: ConnIndex,
        call: management::CallId,
        request: ControlRequest,
    ) {
        if self.store.holder != Some(self.net.conns[conn].ends[0]) {
            self.counters.count("reached: a deposed leader's command");
        }
        if matches!(request, ControlRequest::Fence(_)) && !self.servers[n].requests.is_empty() {
            self.counters.count("reached: a fence meets requests under way");
        }
        if let ControlRequest::Rejoin(rejoin) = &request {
            self.count_list(n, rejoin);
        }
        if matches!(request, ControlRequest::Fence(_)) && self.servers[n].disks.iter().any(Disk::is_writing) {
            self.counters.count("reached: a fence meets a write at the disk");
        }
        self.call_again_later(n, &request);
        let own = CallId(self.mint() as u64);
        if !matches!(request, ControlRequest::Heartbeat { .. }) {
            self.counters.count("control calls");
        }
        self.servers[n].calls.insert(own, (conn, call));
        self.server_input(n, Input::Control { call: own, request });
    }

    /// A command comes once more, behind later ones: a leader that heard no answer gave it again, and what it had sent
    /// first came last. Nobody waits for the answer.
    fn call_again_later(&mut self, n: usize, request: &ControlRequest) {
        let rare = if matches!(request, ControlRequest::Heartbeat { .. }) { 1_000 } else { 40 };
        if self.healed || !self.dice.chance(1, rare) {
            return;
        }
        self.counters.count("fault: a command comes again");
        let process = Process { host: Host::Server(n), epoch: self.servers[n].epoch };
        let at = self.now + self.dice.within(1, 2_000_000);
        self.queue.push(at, Event::CallAgain { process, request: Box::new(request.clone()) });
    }

    pub(super) fn called_again(&mut self, process: Process, request: ControlRequest) {
        let Host::Server(n) = process.host else { return };
        if self.servers[n].epoch == process.epoch && self.servers[n].machine.is_some() {
            let call = CallId(self.mint() as u64);
            self.server_input(n, Input::Control { call, request });
        }
    }
}

impl World {
    /// How much of its copy a member that returns is to mark.
    fn count_list(&mut self, n: usize, rejoin: &Rejoin) {
        let Some(disk) = self.servers[n].disks.iter().find(|d| d.has_copy(rejoin.copy)) else { return };
        let listed: Vec<u64> = rejoin.list.pages().collect();
        let again = listed.iter().any(|page| disk.is_page_unsynced(rejoin.copy, rejoin.list.layer, *page));
        let map = self.store.map();
        let group = map.and_then(|map| Some((map, map.place_of(rejoin.copy)?.1)));
        let pages = group.map_or(0, |(map, group)| map.geometry(map.top()).pages(group));
        self.counters.count("reached: a member is given the list of suspect pages");
        self.counters.add("pages listed for members that rejoin", listed.len() as u64);
        self.counters.add("pages of the copies of members that rejoin", pages);
        if again {
            self.counters.count("reached: a page is listed that was unsynced already");
        }
        if (listed.len() as u64) < pages {
            self.counters.count("reached: a member rejoins by difference");
        }
    }
}

/// A value in one line that is not too long.
pub(super) fn brief(value: &impl std::fmt::Debug) -> String {
    let mut line = format!("{value:?}");
    if line.len() > 400 {
        let cut = (0..=400).rev().find(|n| line.is_char_boundary(*n)).unwrap_or(0);
        line.truncate(cut);
        line.push_str(" ...");
    }
    line
}
