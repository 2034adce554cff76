//! What a reply means: the driver's column of the comparator's table (PROTOCOL.md §2; seed 002 \[0065\]–\[0068\]).
//!
//! Invariant: a reply counts for the attempt, handle and generation that it answers, and for nothing else.

use super::op::{Hold, OpId, Setback, State};
use super::peer::{Handle, Peer, Sent, What};
use super::{Driver, LinkId, OpError};
use crate::control::Trouble;
use crate::ids::{Generation, ServerId};
use crate::mutants::{Mutant, on};
use crate::wire::{ReplyBody, ReplyFrame};

impl What {
    /// Whether an answer says that the member serves at this generation.
    pub(super) fn is_served_alike(&self) -> bool {
        !matches!(self, Self::Open(_))
    }
}

impl Driver {
    pub(super) fn frame(&mut self, link: LinkId, frame: ReplyFrame) {
        let Some(&server) = self.links.get(&link) else { return };
        let header = frame.header;
        if header.request.0 == 0 {
            if let ReplyBody::Map { map } = frame.body {
                let stored = map.generation;
                self.apply_map(map);
                self.caught_up(server, stored);
            }
            return;
        }
        let now = self.now;
        let peer = self.peers.get_mut(&server).expect("a link belongs to a peer");
        let Some(sent) = peer.answered(header.request, now) else {
            if !peer.was_sent(header.request) {
                self.drop_link(server); // Nobody asked: nothing that follows can be trusted.
            }
            return;
        };
        if peer.handle == Handle::Open(sent.handle) {
            peer.credit.heard(header.credit);
        }
        self.answered(server, sent, frame);
        if self.peers.get(&server).is_some_and(|peer| !peer.queue.is_empty()) {
            self.pump(server);
        }
    }

    fn answered(&mut self, server: ServerId, sent: Sent, frame: ReplyFrame) {
        let served = matches!(
            frame.body,
            ReplyBody::Done | ReplyBody::Data | ReplyBody::BadBlock { .. } | ReplyBody::Written { .. }
        );
        if served && sent.what.is_served_alike() {
            let peer = self.peers.get_mut(&server).expect("the caller found it");
            peer.served(sent.generation, if on(Mutant::LeaseFromReply) { self.now } else { sent.at });
        }
        match sent.what.attempt() {
            Some((op, attempt)) => self.part_answered(server, op, attempt, sent, frame),
            None => match sent.what {
                What::Open(key) => self.open_answered(server, key, sent.generation, frame),
                What::Release if frame.body.is_success() => {}
                What::Release => drop(self.setback_of(server, &sent, frame.body, None)),
                _ => self.ping_answered(server, &sent, frame.body),
            },
        }
        if served {
            self.recheck_leases();
        }
    }

    fn ping_answered(&mut self, server: ServerId, sent: &Sent, body: ReplyBody) {
        let current = sent.generation == self.generation();
        if let Some(peer) = self.peers.get_mut(&server).filter(|_| current) {
            peer.pinging = false;
        }
        if !body.is_success() {
            // Whatever waits for the lease is restarted by the map that this refusal is about.
            let setback = self.setback_of(server, sent, body, None);
            let for_map = matches!(setback, Some(Setback::Hold(hold)) if !hold.handles);
            if let Some(peer) = self.peers.get_mut(&server).filter(|_| current && for_map) {
                peer.ping_refused_at = sent.generation;
            }
        }
    }

    fn part_answered(&mut self, server: ServerId, id: OpId, attempt: u32, sent: Sent, frame: ReplyFrame) {
        let counts = self.ops.get(&id).is_some_and(|op| op.attempt.number == attempt);
        let ReplyFrame { header, body, payload } = frame;
        if !counts {
            if !body.is_success() {
                self.setback_of(server, &sent, body, None);
            }
            return;
        }
        if body.is_success() && header.token != sent.seq {
            self.frame_lost(id, attempt);
            return self.drop_link(server);
        }
        match (sent.what, body) {
            (What::Read(part), ReplyBody::Data) if payload.len() == part.length as usize => {
                self.read_answered(part, payload);
            }
            (What::Read(part), ReplyBody::BadBlock { blocks })
                if payload.len() == part.length as usize && blocks_fit(&blocks, part.length) =>
            {
                self.read_bad(part, payload, blocks);
            }
            (What::Written(part), ReplyBody::Written { pages, next }) if self.written_fits(part, &pages, next) => {
                self.written_answered(part, &pages, next);
            }
            (What::Part { .. }, ReplyBody::Done) => self.frame_done(id),
            (what, body) if body.is_success() || matches!(body, ReplyBody::BadBlock { .. }) => {
                // Not an answer to this question: nothing that this server says can be believed.
                let (op, attempt) = what.attempt().expect("a part of an attempt");
                self.frame_lost(op, attempt);
                self.drop_link(server);
            }
            (what, body) => {
                let sent = Sent { what, ..sent };
                if let Some(setback) = self.setback_of(server, &sent, body, Some(id)) {
                    self.frame_set_back(id, setback);
                }
            }
        }
    }

    /// What a refusal makes of an attempt, and what the driver does about it besides. `None` = the session is over, or
    /// the driver itself.
    fn setback_of(&mut self, server: ServerId, sent: &Sent, body: ReplyBody, op: Option<OpId>) -> Option<Setback> {
        let newer = sent.generation.next();
        let current = sent.generation == self.generation();
        let for_map = |map: Generation| Some(Setback::Hold(Hold { map, handles: false }));
        match body {
            ReplyBody::Superseded { highest } if highest > self.incarnation => {
                self.outdone(highest);
                None
            }
            ReplyBody::Superseded { .. } => {
                if self.peers.get(&server).is_some_and(|peer| peer.handle == Handle::Open(sent.handle)) {
                    self.reopen(server);
                }
                Some(Setback::Hold(Hold { map: Generation(0), handles: true }))
            }
            ReplyBody::Behind { .. } => {
                if let Some(peer) = self.peers.get_mut(&server).filter(|_| current) {
                    peer.fall_behind(self.now);
                }
                Some(Setback::Hold(Hold { map: Generation(0), handles: true }))
            }
            ReplyBody::Ended if on(Mutant::EndedGoesOn) => for_map(newer),
            ReplyBody::Ended => {
                self.end();
                None
            }
            ReplyBody::Revoked => Some(Setback::Fail(OpError::Io)),
            ReplyBody::Stale { wait_for } => for_map(wait_for.max(newer)),
            ReplyBody::NoSpace if op.is_some_and(|id| self.ops[&id].state == State::Reserving) => {
                Some(Setback::Fail(OpError::NoSpace))
            }
            refusal => {
                let trouble = match refusal {
                    ReplyBody::NoCopy => Trouble::NoCopy,
                    // R8: the leader leaves the member out if its group can do without, else the write waits.
                    ReplyBody::NoSpace => Trouble::Stalled,
                    _ => Trouble::NotServing,
                };
                if let (Trouble::Stalled, Some(id)) = (trouble, op) {
                    self.starve(id);
                }
                let news = |peer: &&mut Peer| current && peer.refused_at != sent.generation;
                if let Some(peer) = self.peers.get_mut(&server).filter(news) {
                    peer.refused_at = sent.generation;
                    self.report(server, trouble);
                }
                for_map(newer)
            }
        }
    }

    /// A member has pushed a map: it serves at that generation now.
    fn caught_up(&mut self, server: ServerId, stored: Generation) {
        let generation = self.generation();
        let Some(peer) = self.peers.get_mut(&server) else { return };
        if !peer.behind || stored < generation {
            return;
        }
        peer.catch_up();
        if peer.handle == Handle::Waiting {
            self.reopen(server);
        }
        self.recheck_parked = true;
        self.pump(server);
        self.recheck_leases();
    }
}

fn blocks_fit(blocks: &[u32], length: u32) -> bool {
    let count = length / crate::layer::BLOCK_BYTES;
    !blocks.is_empty() && blocks.iter().all(|block| *block < count)
}
