//! Maps, connections, handles and incarnations: under what right the driver acts (H1, R7, H20, R10).
//!
//! Invariants: a map replaces an older one only; no request is served before every serving member of the map under which
//! it will act has answered this incarnation's `Open`; every `Open` has a higher number than those before.

use super::op::State;
use super::peer::{Handle, Link, OpenKey, Outgoing, Peer, What};
use super::view::View;
use super::{Driver, LinkId, Output, Phase, STALL_TIMEOUT_MS};
use crate::control::Trouble;
use crate::ids::{Generation, Incarnation, OpenNumber, Seq, ServerId};
use crate::limits::{BEHIND_ASK_MEMBER_MS, IDLE_CONFIRM_MS};
use crate::map::VolumeMap;
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use crate::wire::{HandleId, Opener, ReplyBody, ReplyFrame, RequestBody, Start};
use bytes::Bytes;
use std::sync::Arc;

impl Driver {
    /// A committed map: from the watch, from a file, or from a member. Older ones and those of no use are dropped.
    pub(super) fn apply_map(&mut self, map: VolumeMap) {
        let newer = map.generation > self.generation() && map.volume == self.config.volume && map.validate().is_ok();
        if !newer || self.phase == Phase::Ended {
            return;
        }
        let view = Arc::new(View::new(map, self.config.session, &self.near));
        let older = self.view.replace(view.clone());
        if !self.take_standing(&view) {
            return;
        }
        if !older.as_ref().is_some_and(|older| view.same_openings(older)) {
            self.allocated.clear();
        }
        self.fail_revoked(older.as_deref(), &view);
        self.abandon_attempts(&view);
        self.adjust_peers(&view);
        match self.phase {
            Phase::Discovering => self.discover_anew(),
            Phase::Recovering | Phase::Serving => self.look_at_loss(),
            Phase::Ended | Phase::Exited => {}
        }
        self.reopen_waiting();
    }

    /// What the map says about the session; whether the driver goes on.
    fn take_standing(&mut self, view: &View) -> bool {
        let Some(session) = view.session else {
            if on(Mutant::EndedGoesOn) {
                return true;
            }
            if self.listed {
                self.end();
            } else if self.incarnation == Incarnation(0) {
                self.raise_incarnation(Incarnation(1)); // A successor asks: only a member's `Ended` is final for it.
            }
            return !self.listed;
        };
        self.handled = self.handled.max(session.handled);
        let first = !std::mem::replace(&mut self.listed, true);
        if self.phase != Phase::Discovering || self.config.start == Start::Fresh {
            if session.incarnation > self.incarnation {
                self.superseded();
                return false;
            }
        } else if session.incarnation > self.incarnation || first && session.incarnation >= self.incarnation {
            self.raise_incarnation(session.incarnation.next());
        }
        true
    }

    /// Take a higher incarnation during discovery: nobody has opened it yet.
    fn act_as(&mut self, incarnation: Incarnation) {
        self.raise_incarnation(incarnation);
        self.discover_anew();
    }

    fn raise_incarnation(&mut self, incarnation: Incarnation) {
        assert!(self.phase == Phase::Discovering && incarnation > self.incarnation);
        self.incarnation = incarnation;
        for peer in self.peers.values_mut() {
            peer.vouched = false;
            peer.forget_open();
        }
    }

    /// A newer map, or a higher incarnation: every serving member is asked again (H20).
    fn discover_anew(&mut self) {
        for peer in self.peers.values_mut() {
            peer.discovered = false;
            // An Open under way is answered first: its refusal would say that another process acts as this incarnation.
            if !matches!(peer.handle, Handle::Opening(_)) {
                peer.handle = Handle::Closed;
            }
        }
        let servers: Vec<_> = self.peers.keys().copied().collect();
        for server in servers {
            self.try_open(server);
        }
    }

    /// Whether all have answered; then the driver begins to serve.
    fn look_at_discovery(&mut self) {
        let Some(view) = self.view.clone() else { return };
        let found = |server: &ServerId| self.peers[server].discovered;
        let all = view.serving.iter().all(found) || on(Mutant::DiscoverySkipped) && view.serving.iter().any(found);
        if self.phase == Phase::Discovering && all && view.session.is_some() && view.available {
            self.phase = Phase::Serving;
            self.look_at_loss();
        }
    }

    fn adjust_peers(&mut self, view: &View) {
        let gone: Vec<_> = self.peers.keys().filter(|server| !view.serving.contains(server)).copied().collect();
        for server in gone {
            let peer = self.peers.remove(&server).expect("it was just listed");
            if let Some(link) = peer.up() {
                self.links.remove(&link);
                self.out.push(Output::Disconnect { link });
            }
        }
        for &server in &view.serving {
            let entry = view.map.server(server).expect("validated: every member's server is listed");
            let peer = self.peers.get_mut(&server);
            let connect = match peer {
                Some(peer) => {
                    let moved = peer.addresses != entry.addresses;
                    peer.addresses.clone_from(&entry.addresses);
                    moved && peer.link == Link::Connecting
                }
                None => {
                    self.peers.insert(server, Peer::new(entry.addresses.clone(), self.now));
                    true
                }
            };
            if connect {
                self.connect(server);
            }
        }
    }

    fn connect(&mut self, server: ServerId) {
        let addresses = self.peers[&server].addresses.clone();
        self.out.push(Output::Connect { server, addresses });
        self.wake_by(self.now.after(STALL_TIMEOUT_MS));
    }

    pub(super) fn connected(&mut self, server: ServerId, link: LinkId) {
        let waited_for = self.peers.get_mut(&server).filter(|peer| peer.link == Link::Connecting);
        let Some(peer) = waited_for else {
            self.out.push(Output::Disconnect { link });
            return;
        };
        peer.link = Link::Up(link);
        peer.owes_since = None;
        self.links.insert(link, server);
        if on(Mutant::HandleKept) && matches!(self.peers[&server].handle, Handle::Open(_)) {
            return self.join_old_handle(server, link);
        }
        self.try_open(server);
    }

    /// What M6 forbids, if that very mistake is to be made: no `Open`, so that what was lost with the connection may still
    /// be carried out.
    fn join_old_handle(&mut self, server: ServerId, link: LinkId) {
        let (stamp, key) = (self.stamp(), (self.incarnation, OpenNumber(0)));
        let peer = self.peers.get_mut(&server).expect("the caller found it");
        let (what, body) = (What::Open(key), RequestBody::Join);
        let frame = peer.frame(Outgoing { what, body, payload: Bytes::new(), seq: Seq(0) }, stamp);
        peer.handle = Handle::Opening(key);
        self.out.push(Output::Send { link, frame });
    }

    pub(super) fn broken(&mut self, server: ServerId, link: Option<LinkId>, refused: bool) {
        let current = match (self.peers.get(&server).map(|peer| peer.link), link) {
            (Some(Link::Connecting), None) => true,
            (Some(Link::Up(up)), Some(broken)) => up == broken,
            _ => false,
        };
        if !current {
            return;
        }
        if refused {
            self.report(server, Trouble::Unreachable);
        }
        match link {
            Some(_) => self.lose(server),
            None => self.connect(server),
        }
    }

    /// The connection is gone. Attempts with a frame on it are given up once the other frames are answered, and go on
    /// when a higher handle is open here (M6).
    fn lose(&mut self, server: ServerId) {
        let peer = self.peers.get_mut(&server).expect("the caller found it");
        let asking = matches!(peer.handle, Handle::Opening(_)) && !peer.vouched;
        if let Some(link) = peer.up() {
            self.links.remove(&link);
        }
        let lost = peer.lose(self.now);
        for sent in lost.into_values() {
            if let Some((op, attempt)) = sent.what.attempt() {
                self.frame_lost(op, attempt);
            }
        }
        if asking && self.phase == Phase::Discovering && self.config.start == Start::Resume {
            // The answer might have been that another process acts under this very incarnation: take a higher one.
            self.act_as(self.incarnation.next());
        }
        self.connect(server);
    }

    /// The other side broke the protocol, or says nothing for too long: start anew.
    pub(super) fn drop_link(&mut self, server: ServerId) {
        if let Some(link) = self.peers[&server].up() {
            self.out.push(Output::Disconnect { link });
            self.lose(server);
        }
    }

    /// Open a handle if there is a connection without one and a map to do it under.
    pub(super) fn try_open(&mut self, server: ServerId) {
        let known = self.listed || self.config.start == Start::Resume;
        let stamp = self.stamp();
        let Some(peer) = self.peers.get_mut(&server).filter(|_| known) else { return };
        let (Link::Up(link), Handle::Closed) = (peer.link, peer.handle) else { return };
        // A successor's first Open has the lowest number until it is taken: if another process has opened as this very
        // incarnation, it is refused.
        let first = self.phase == Phase::Discovering && self.config.start == Start::Resume && !peer.vouched;
        let number = if first { OpenNumber(1) } else { self.last_open.next() };
        let key = (self.incarnation, number);
        self.last_open = self.last_open.max(number);
        peer.handle = Handle::Opening(key);
        let body = RequestBody::Open {
            volume: self.config.volume,
            opener: Opener::Session { session: self.config.session },
            incarnation: self.incarnation,
            number,
            start: self.config.start,
            grant: Bytes::new(),
        };
        let frame = peer.frame(Outgoing { what: What::Open(key), body, payload: Bytes::new(), seq: Seq(0) }, stamp);
        self.out.push(Output::Send { link, frame });
        self.wake_by(self.now.after(STALL_TIMEOUT_MS));
    }

    /// Servers that would not open before are asked again under the newer map.
    fn reopen_waiting(&mut self) {
        let servers: Vec<_> = self.peers.keys().copied().collect();
        for server in servers {
            self.reopen_if_waiting(server);
        }
        self.recheck_parked = true;
    }

    /// The handle is dead, or was not given: open a higher one.
    pub(super) fn reopen(&mut self, server: ServerId) {
        if let Some(peer) = self.peers.get_mut(&server) {
            peer.handle = Handle::Closed;
            self.try_open(server);
        }
    }

    /// An `Open` that was sent under the map of this generation was answered.
    pub(super) fn open_answered(&mut self, server: ServerId, key: OpenKey, under: Generation, frame: ReplyFrame) {
        let (now, outdated) = (self.now, under < self.generation());
        let peer = self.peers.get_mut(&server).expect("the caller found it");
        if peer.handle != Handle::Opening(key) {
            return; // A later Open has made this one's handle dead.
        }
        match frame.body {
            ReplyBody::Opened { handle, incarnation, handled, map } => {
                if incarnation > self.incarnation {
                    return self.outdone(incarnation);
                }
                peer.handle = Handle::Open(handle);
                peer.vouched = true;
                peer.credit.opened(frame.header.credit);
                self.handled = self.handled.max(handled);
                if let Some(map) = map {
                    self.apply_map(map); // In discovery a newer one asks anew.
                }
                self.opened(server, handle, under);
            }
            ReplyBody::Done if on(Mutant::HandleKept) => {
                peer.handle = Handle::Open(frame.header.handle);
                self.opened(server, frame.header.handle, under);
            }
            ReplyBody::Superseded { highest } if highest > self.incarnation => self.outdone(highest),
            ReplyBody::Superseded { .. } => self.reopen(server),
            ReplyBody::OpenRefused { highest } => self.refused(server, highest),
            ReplyBody::Ended => self.end(),
            _ if outdated => self.reopen(server),
            ReplyBody::Behind { .. } => {
                peer.handle = Handle::Waiting;
                peer.fall_behind(now);
                self.retry_open(server);
            }
            ReplyBody::Unsupported => {
                peer.handle = Handle::Waiting;
                self.retry_open(server);
            }
            ReplyBody::NotServing | ReplyBody::NoCopy => {
                peer.handle = Handle::Waiting;
                self.report(server, Trouble::NotServing);
            }
            _ => peer.handle = Handle::Waiting,
        }
    }

    /// The server pushes the map that it lacks only where a handle is open: ask again after a while.
    fn retry_open(&mut self, server: ServerId) {
        let at = self.now.after(BEHIND_ASK_MEMBER_MS);
        self.peers.get_mut(&server).expect("the caller found it").retry_open_at = Some(at);
        self.wake_by(at);
    }

    /// Open where it was not possible some time ago.
    pub(super) fn retry_opens(&mut self) {
        let now = self.now;
        let due = |peer: &Peer| peer.retry_open_at.is_some_and(|at| at <= now);
        let servers: Vec<_> = self.peers.iter().filter(|(_, peer)| due(peer)).map(|(server, _)| *server).collect();
        for server in servers {
            self.reopen_if_waiting(server);
        }
        let next = self.peers.values().filter_map(|peer| peer.retry_open_at).min();
        self.wake_by(next.unwrap_or(Millis::NEVER));
    }

    fn reopen_if_waiting(&mut self, server: ServerId) {
        let Some(peer) = self.peers.get_mut(&server) else { return };
        peer.retry_open_at = None;
        if peer.handle == Handle::Waiting {
            self.reopen(server);
        }
    }

    /// A handle is open: what waited for it goes on. In discovery it counts if it was asked for under the present map.
    fn opened(&mut self, server: ServerId, handle: HandleId, under: Generation) {
        let current = under == self.generation();
        let Some(peer) = self.peers.get_mut(&server).filter(|peer| peer.handle == Handle::Open(handle)) else { return };
        if self.phase == Phase::Discovering && !current {
            return self.reopen(server);
        }
        peer.discovered = true;
        peer.catch_up();
        self.allocated.clear(); // Its credit is counted anew.
        self.recheck_parked = true;
        self.look_at_discovery();
        self.pump(server);
        self.recheck_leases();
        if self.seqs.confirmed() > Seq(0) {
            self.wake_by(self.now.after(IDLE_CONFIRM_MS));
        }
    }

    /// A higher incarnation exists: whoever still looks for its own takes a higher one, whoever served before has a
    /// successor (R10).
    pub(super) fn outdone(&mut self, highest: Incarnation) {
        if self.phase == Phase::Discovering && self.config.start == Start::Resume {
            self.act_as(highest.next());
        } else {
            self.superseded();
        }
    }

    /// A process with this very incarnation has opened here. During discovery that is another one: a first stage gives
    /// way, a successor takes a higher incarnation. Later it can only be this process, before the server left the map.
    fn refused(&mut self, server: ServerId, highest: OpenNumber) {
        self.last_open = self.last_open.max(highest);
        match (self.phase, self.config.start) {
            (Phase::Discovering, Start::Fresh) => self.superseded(),
            (Phase::Discovering, Start::Resume) => self.act_as(self.incarnation.next()),
            _ => self.reopen(server),
        }
    }

    /// Requests in a range that was revoked since, and which the kernel issued before, fail (PROTOCOL.md §7).
    fn fail_revoked(&mut self, older: Option<&View>, view: &View) {
        let since = older.map_or_else(Default::default, View::generation);
        let own = |r: &&crate::map::Revocation| r.session == self.config.session && r.below > since;
        let revoked: Vec<_> = view.map.revoked.iter().filter(own).cloned().collect();
        if revoked.is_empty() {
            return;
        }
        let hit = |range: &std::ops::Range<u64>| {
            let overlaps = |(start, length): &(u64, u64)| *start < range.end && range.start < start + length;
            revoked.iter().any(|r| !range.is_empty() && (r.ranges.is_empty() || r.ranges.iter().any(overlaps)))
        };
        let failed: Vec<_> = self.ops.iter().filter(|(_, op)| hit(&op.kind.range())).map(|(id, _)| *id).collect();
        for id in failed {
            let op = self.ops.get_mut(&id).expect("just listed");
            op.revoked = true;
            // A blocked one keeps its place: others wait behind it for the writes before it.
            if op.state != State::Blocked {
                self.fail(id, super::OpError::Io);
            }
        }
    }

    /// A new map: every attempt is given up, every request starts from the top in the order of submission.
    fn abandon_attempts(&mut self, view: &View) {
        let generation = view.generation();
        self.ready.clear();
        self.ready_first.clear();
        self.awaiting_lease.clear();
        self.starved.clear();
        for (id, op) in &mut self.ops {
            match op.state {
                State::Blocked | State::AwaitingRoom => continue,
                State::Parked(hold) if hold.map > generation => continue,
                State::Parked(_) | State::Ready | State::Reserving | State::Running | State::AwaitingLease => {
                    op.begin(State::Ready);
                    self.parked.remove(id);
                    let queue = if op.handles_loss() { &mut self.ready_first } else { &mut self.ready };
                    queue.push_back(*id);
                }
            }
        }
        for peer in self.peers.values_mut() {
            peer.queue.clear();
            peer.behind = false;
            peer.pinging = false; // One under way says nothing of this generation.
        }
    }
}
