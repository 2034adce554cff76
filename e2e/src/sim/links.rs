//! Connections as they live: dialing, `Hello`, delivery, breaks. The `Hello` is done here as the runtimes do it.

use super::event::{Event, Host, Process};
use super::net::{ConnIndex, Leaving, Message, Phase, Purpose};
use super::world::{CLUSTER, World};
use lamina_protocol::driver::{self, LinkId};
use lamina_protocol::ids::ServerId;
use lamina_protocol::limits::MAX_FRAME_BYTES;
use lamina_protocol::management;
use lamina_protocol::storage_server::{self, ConnId};
use lamina_protocol::wire::{self, ReplyBody, RequestBody, RequestFrame, RequestHeader, RequestId, WIRE_VERSION};

/// One frame in so many goes through its bytes.
const ENCODE_ONE_IN: u64 = 16;

impl World {
    /// Begins to connect a process to a server.
    pub(super) fn dial(&mut self, from: Process, server: ServerId, purpose: Purpose) -> ConnIndex {
        let to = self.server_index(server);
        let process = Process { host: Host::Server(to), epoch: self.servers[to].epoch };
        let conn = self.net.dial(from, process, purpose);
        let way = self.net.delay(conn) + self.net.delay(conn);
        self.queue.push(self.now + way, Event::Dialed { conn });
        conn
    }

    pub(super) fn dialed(&mut self, conn: ConnIndex) {
        let [from, to] = self.net.conns[conn].ends;
        if self.net.conns[conn].phase != Phase::Dialing {
            return;
        }
        let Host::Server(n) = to.host else { unreachable!("only servers are dialed") };
        let unreachable = self.net.is_cut(from.host, to.host) || self.net.is_cut(to.host, from.host);
        if unreachable || !self.servers[n].powered {
            let timeout = self.dice.within(1_000_000, 3_000_000);
            self.queue.push(self.now + timeout, Event::DialTimedOut { conn });
        } else if self.servers[n].machine.is_none() {
            self.dial_failed(conn, true);
        } else {
            self.accepted(conn);
        }
    }

    fn accepted(&mut self, conn: ConnIndex) {
        let Host::Server(n) = self.net.conns[conn].ends[1].host else { unreachable!("only servers are dialed") };
        let epoch = self.servers[n].epoch;
        let found = &mut self.net.conns[conn];
        found.ends[1].epoch = epoch;
        found.open[1] = true;
        let (Purpose::Driver(server) | Purpose::Peer(_, server)) = found.purpose else {
            found.phase = Phase::Open;
            return self.control_connected(conn);
        };
        found.phase = Phase::Hello;
        let header = RequestHeader { request: RequestId(1), ..RequestHeader::default() };
        let body = RequestBody::Hello {
            cluster: CLUSTER,
            server,
            min_version: WIRE_VERSION,
            max_version: WIRE_VERSION,
            features: 0,
            max_frame_bytes: MAX_FRAME_BYTES,
        };
        self.send(conn, 0, Message::Request(RequestFrame { header, body, payload: Default::default() }));
    }

    pub(super) fn dial_failed(&mut self, conn: ConnIndex, refused: bool) {
        if self.net.conns[conn].phase == Phase::Dialing {
            self.net.leave(conn, 0, self.now, Leaving::Closed);
            self.tell_broken(conn, refused);
        }
    }

    pub(super) fn send(&mut self, conn: ConnIndex, from: usize, message: Message) {
        let message = self.through_bytes(message);
        let carried = matches!(message, Message::Request(_) | Message::Reply(_));
        self.work.requests += u64::from(matches!(message, Message::Request(_)));
        if let Some(at) = self.net.send(conn, from, self.now, message) {
            self.queue.push(at, Event::Stream { conn, from });
        }
        if carried {
            self.break_now_and_then(conn);
        }
    }

    /// A connection breaks with frames on their way; each end sees it in its own time.
    fn break_now_and_then(&mut self, conn: ConnIndex) {
        let flaky = self.plan.setup.flaky;
        if flaky == 0 || self.healed || !self.dice.chance(1, flaky) {
            return;
        }
        self.counters.count("fault: a connection breaks under a frame");
        let end = self.dice.index(2);
        let [soon, late] = [self.dice.within(1, 5_000), self.dice.within(1, 2_000_000)];
        self.queue.push(self.now + soon, Event::Gone { conn, end });
        self.queue.push(self.now + late, Event::Gone { conn, end: 1 - end });
    }

    /// What goes through its bytes now and then must come back as it was.
    fn through_bytes(&mut self, message: Message) -> Message {
        if !matches!(message, Message::Request(_) | Message::Reply(_)) || !self.dice.chance(1, ENCODE_ONE_IN) {
            return message;
        }
        self.counters.count("frames through their bytes");
        let mut bytes = Vec::new();
        match message {
            Message::Request(frame) => {
                wire::put_request(&frame, &mut bytes);
                let read = wire::read_request(&bytes.into()).expect("what was written is read");
                assert_eq!(read, frame, "a request comes out of its bytes as it went in");
                Message::Request(read)
            }
            Message::Reply(frame) => {
                wire::put_reply(&frame, &mut bytes);
                let read = wire::read_reply(&bytes.into()).expect("what was written is read");
                assert_eq!(read, frame, "a reply comes out of its bytes as it went in");
                Message::Reply(read)
            }
            other => other,
        }
    }

    /// The head of a stream has come to its end.
    pub(super) fn stream(&mut self, conn: ConnIndex, from: usize) {
        let found = &mut self.net.conns[conn];
        let (source, target) = (found.ends[from], found.ends[1 - from]);
        if found.streams[from].held.is_some() || found.streams[from].queue.is_empty() {
            return;
        }
        if self.net.is_cut(source.host, target.host) {
            let serial = self.net.hold(conn, from);
            let patience = self.dice.within(2_000_000, 10_000_000);
            self.queue.push(self.now + patience, Event::HeldTooLong { conn, from, serial });
            return;
        }
        let found = &mut self.net.conns[conn];
        if let Some((at, _)) = found.streams[from].queue.front().filter(|(at, _)| *at > self.now) {
            // It was delayed once more since this was planned.
            return self.queue.push(*at, Event::Stream { conn, from });
        }
        let (_, message) = found.streams[from].queue.pop_front().expect("looked at above");
        if let Some((at, _)) = found.streams[from].queue.front() {
            let at = (*at).max(self.now + 1);
            self.queue.push(at, Event::Stream { conn, from });
        }
        if self.net.conns[conn].open[1 - from] {
            self.deliver(conn, from, message);
        }
    }

    fn deliver(&mut self, conn: ConnIndex, from: usize, message: Message) {
        let target = self.net.conns[conn].ends[1 - from];
        match (target.host, message) {
            (_, Message::Fin) => self.gone(conn, 1 - from),
            (Host::Server(n), Message::Request(frame)) => {
                if !self.net.conns[conn].open[0] && frame.body.changes_blocks() {
                    self.counters.count("reached: a late write through an old connection");
                }
                self.note_request(n, conn, &frame);
                self.server_input(n, storage_server::Input::Frame { conn: ConnId(conn as u64), frame });
            }
            (Host::Server(n), Message::Call(call, request)) => self.server_called(n, conn, call, *request),
            (_, Message::Reply(frame)) if self.net.conns[conn].phase == Phase::Hello => {
                let ReplyBody::Hello { .. } = frame.body else { panic!("a server answers Hello with Hello") };
                self.net.conns[conn].phase = Phase::Open;
                self.net.conns[conn].connected = true;
                self.tell_connected(conn);
            }
            (Host::Server(n), Message::Reply(frame)) => {
                let Purpose::Peer(peer, _) = self.net.conns[conn].purpose else { unreachable!("servers dial peers") };
                let late = frame.header.generation < self.servers[n].promised;
                if late && matches!(frame.body, ReplyBody::Page { .. }) {
                    self.counters.count("reached: a page for a fill arrives after a later promise");
                }
                self.server_input(n, storage_server::Input::PeerFrame { peer, frame });
            }
            (Host::Driver(_), Message::Reply(frame)) => {
                self.driver_input(target, driver::Input::Frame { link: LinkId(conn as u64), frame });
            }
            (Host::Operator(_), message) => self.leader_hears(target, conn, message),
            (host, message) => unreachable!("{host} is not sent {message:?}"),
        }
    }

    pub(super) fn held_too_long(&mut self, conn: ConnIndex, from: usize, serial: u64) {
        if self.net.conns[conn].streams[from].held == Some(serial) {
            self.counters.count("reached: a connection broke of silence");
            for end in 0..2 {
                let later = self.dice.within(1, 3_000_000);
                self.queue.push(self.now + later, Event::Gone { conn, end });
            }
        }
    }

    /// One end sees that the connection is gone.
    pub(super) fn gone(&mut self, conn: ConnIndex, end: usize) {
        if !self.net.conns[conn].open[end] {
            return;
        }
        self.close(conn, end);
        if end == 0 {
            self.tell_broken(conn, true);
        } else if let Host::Server(n) = self.net.conns[conn].ends[1].host {
            self.server_conn_closed(n, conn);
        }
    }

    /// A process closes its end.
    pub(super) fn close(&mut self, conn: ConnIndex, end: usize) {
        if let Some(at) = self.net.leave(conn, end, self.now, Leaving::Closed) {
            self.queue.push(at, Event::Stream { conn, from: end });
        }
    }

    fn tell_connected(&mut self, conn: ConnIndex) {
        let from = self.net.conns[conn].ends[0];
        match self.net.conns[conn].purpose {
            Purpose::Driver(server) => self.driver_connected(from, server, LinkId(conn as u64)),
            Purpose::Peer(peer, _) => {
                let Host::Server(n) = from.host else { unreachable!("peers are servers") };
                self.server_input(n, storage_server::Input::PeerConnected { peer });
            }
            Purpose::Control(_) => unreachable!("no Hello there"),
        }
    }

    /// End 0 is told that its connection broke, or was never made.
    fn tell_broken(&mut self, conn: ConnIndex, refused: bool) {
        let from = self.net.conns[conn].ends[0];
        let link = self.net.conns[conn].connected.then_some(LinkId(conn as u64));
        match self.net.conns[conn].purpose {
            Purpose::Driver(server) => self.driver_broken(from, server, link, refused),
            Purpose::Peer(peer, _) => {
                let Host::Server(n) = from.host else { unreachable!("peers are servers") };
                if self.servers[n].epoch == from.epoch && self.servers[n].peers.remove(&peer).is_some() {
                    self.server_input(n, storage_server::Input::PeerBroken { peer });
                }
            }
            Purpose::Control(server) => self.control_broken(from, conn, server),
        }
    }

    /// A process ends: all its connections do.
    pub(super) fn drop_connections(&mut self, process: Process, how: Leaving) {
        for (conn, end) in self.net.of(process) {
            let was_dialing = self.net.conns[conn].phase == Phase::Dialing;
            if let Some(at) = self.net.leave(conn, end, self.now, how) {
                self.queue.push(at, Event::Stream { conn, from: end });
            }
            if how == Leaving::Silent && !was_dialing {
                let keepalive = self.dice.within(2_000_000, 10_000_000);
                self.queue.push(self.now + keepalive, Event::Gone { conn, end: 1 - end });
            }
        }
    }

    /// Directions are free again: what was held up goes on.
    pub(super) fn flow_again(&mut self) {
        for (conn, from) in self.net.freed() {
            let later = self.dice.within(1, 50_000);
            self.queue.push(self.now + later, Event::Stream { conn, from });
        }
    }

    pub(super) fn leader_input_of(&mut self, process: Process, input: management::Input) {
        let Host::Operator(n) = process.host else { return };
        if self.operators[n].epoch == process.epoch {
            self.leader_input(n, input);
        }
    }
}
