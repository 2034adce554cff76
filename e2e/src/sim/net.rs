//! The network: connections of two ordered streams each, that deliver in order or break (the TCP model).
//!
//! What went out before a break may still arrive, all of it or a prefix; between connections nothing is ordered. A cut
//! in one direction holds a stream up; if it lasts, both ends see the connection break, each in its own time.

use super::dice::Dice;
use super::event::{Host, Process};
use lamina_protocol::control::{ControlReply, ControlRequest};
use lamina_protocol::ids::{Generation, ServerId, VolumeId};
use lamina_protocol::management::CallId;
use lamina_protocol::storage_server::{PeerId, StaleSeen};
use lamina_protocol::wire::{ReplyFrame, RequestFrame};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Names a connection of this run.
pub(super) type ConnIndex = usize;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A driver's, to this server.
    Driver(ServerId),
    /// A storage server's to a peer.
    Peer(PeerId, ServerId),
    /// An operator's to this server.
    Control(ServerId),
}

/// What goes over a connection.
#[derive(Clone, Debug)]
pub(super) enum Message {
    Request(RequestFrame),
    Reply(ReplyFrame),
    Call(CallId, Box<ControlRequest>),
    CallReply(CallId, Box<ControlReply>),
    AskMap(VolumeId, Generation),
    Stale(StaleSeen),
    /// The other end is closed.
    Fin,
}

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) queue: VecDeque<(u64, Message)>,
    last: u64,
    /// Since when a cut holds it up: a number that tells one time from another.
    pub(super) held: Option<u64>,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Dialing,
    /// Waits for the reply to `Hello`.
    Hello,
    Open,
    Over,
}

/// A connection. End 0 dialed end 1.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) ends: [Process; 2],
    pub(super) open: [bool; 2],
    pub(super) purpose: Purpose,
    pub(super) phase: Phase,
    /// End 0 was told that it is there.
    pub(super) connected: bool,
    pub(super) streams: [Stream; 2],
    /// What this connection's frames take longer than those of others, microseconds.
    slow_us: u64,
    dice: Dice,
}

/// How an end goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaving {
    /// The process closes the connection or dies: what it sent may arrive, then the other end knows.
    Closed,
    /// The host has no power: nothing tells the other end.
    Silent,
}

/// All connections, and what cuts them.
pub(super) struct Net {
    pub(super) conns: Vec<Conn>,
    /// Directions that carry nothing, with how many faults cut them.
    cuts: BTreeMap<(Host, Host), u32>,
    live: BTreeSet<ConnIndex>,
    holds: u64,
    seed: u64,
    base_us: u64,
    jitter_us: u64,
}

impl Net {
    pub(super) fn new(seed: u64, base_us: u64, jitter_us: u64) -> Self {
        Self { conns: Vec::new(), cuts: BTreeMap::new(), live: BTreeSet::new(), holds: 0, seed, base_us, jitter_us }
    }

    pub(super) fn dial(&mut self, from: Process, to: Process, purpose: Purpose) -> ConnIndex {
        let index = self.conns.len();
        let mut dice = Dice::new(self.seed, 1_000 + index as u64);
        let slow_us = if dice.chance(1, 6) { dice.within(0, 40 * self.base_us) } else { 0 };
        self.conns.push(Conn {
            ends: [from, to],
            open: [true, false],
            purpose,
            phase: Phase::Dialing,
            connected: false,
            streams: [Stream::default(), Stream::default()],
            slow_us,
            dice,
        });
        self.live.insert(index);
        index
    }

    /// Time on the way of one message over a connection.
    pub(super) fn delay(&mut self, conn: ConnIndex) -> u64 {
        let (base, jitter) = (self.base_us, self.jitter_us);
        let conn = &mut self.conns[conn];
        let late = if conn.dice.chance(1, 20) { conn.dice.within(0, jitter) } else { 0 };
        base / 2 + conn.dice.below(base) + conn.slow_us + late
    }

    /// Puts a message on its way. `Some(time)` if it is the only one there, so that somebody must look at that time.
    pub(super) fn send(&mut self, conn: ConnIndex, from: usize, now: u64, message: Message) -> Option<u64> {
        let delay = self.delay(conn);
        let found = &mut self.conns[conn];
        if !found.open[from] {
            return None;
        }
        let stream = &mut found.streams[from];
        let at = (now + delay).max(stream.last + 1);
        stream.last = at;
        stream.queue.push_back((at, message));
        (stream.queue.len() == 1 && stream.held.is_none()).then_some(at)
    }

    /// One end goes. What it was sent is lost; what it sent arrives in part. `Some(time)` as in [`Self::send`].
    pub(super) fn leave(&mut self, conn: ConnIndex, end: usize, now: u64, how: Leaving) -> Option<u64> {
        let found = &mut self.conns[conn];
        if !found.open[end] {
            return None;
        }
        found.open[end] = false;
        found.phase = Phase::Over;
        found.streams[1 - end].queue.clear();
        if !found.open[1 - end] {
            self.live.remove(&conn);
            found.streams[end].queue.clear();
            return None;
        }
        let stream = &mut found.streams[end];
        let waiting = !stream.queue.is_empty() || stream.held.is_some();
        if found.dice.chance(1, 2) {
            let keep = found.dice.index(stream.queue.len() + 1);
            stream.queue.truncate(keep);
        }
        if found.dice.chance(1, 3) {
            // Somewhere on the way it waits for longer than a new connection takes.
            let lag = found.dice.within(0, 1_500_000);
            stream.queue.iter_mut().for_each(|(at, _)| *at += lag);
            stream.last += lag;
        }
        if how == Leaving::Silent {
            return None;
        }
        let at = (now + 100).max(stream.last + 1);
        stream.last = at;
        stream.queue.push_back((at, Message::Fin));
        (!waiting).then_some(at)
    }

    pub(super) fn live(&self) -> Vec<ConnIndex> {
        self.live.iter().copied().collect()
    }

    /// Live connections with an end of this process.
    pub(super) fn of(&self, process: Process) -> Vec<(ConnIndex, usize)> {
        let end = |conn: &ConnIndex| self.conns[*conn].ends.iter().position(|e| *e == process).map(|end| (*conn, end));
        self.live.iter().filter_map(end).collect()
    }

    pub(super) fn is_cut(&self, from: Host, to: Host) -> bool {
        self.cuts.contains_key(&(from, to))
    }

    pub(super) fn cut(&mut self, from: Host, to: Host) {
        *self.cuts.entry((from, to)).or_default() += 1;
    }

    pub(super) fn mend(&mut self, from: Host, to: Host) {
        if let Some(count) = self.cuts.get_mut(&(from, to)) {
            *count -= 1;
            if *count == 0 {
                self.cuts.remove(&(from, to));
            }
        }
    }

    /// Notes that a stream is held up; a number for the occasion.
    pub(super) fn hold(&mut self, conn: ConnIndex, from: usize) -> u64 {
        self.holds += 1;
        self.conns[conn].streams[from].held = Some(self.holds);
        self.holds
    }

    /// Streams that were held up and are no longer cut.
    pub(super) fn freed(&mut self) -> Vec<(ConnIndex, usize)> {
        let mut freed = Vec::new();
        for &index in &self.live {
            for from in 0..2 {
                let ends = self.conns[index].ends;
                let cut = self.cuts.contains_key(&(ends[from].host, ends[1 - from].host));
                if self.conns[index].streams[from].held.is_some() && !cut {
                    self.conns[index].streams[from].held = None;
                    freed.push((index, from));
                }
            }
        }
        freed
    }
}
