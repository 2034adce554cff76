//! The oracle of what readers see: each block is a register with a volatile cache, over all sessions of the volume.
//!
//! It knows only what applications were told, and from the API server which sessions are listed and which generations
//! raised a loss; nothing of copies, disks or frames. For each block it keeps the writes that its content may be now:
//! - a read sees one of those that were possible at some time while it ran, and what it saw stays;
//! - an acknowledged write replaces what was before it began;
//! - a loss brings back, of a session that lost its driver's memory or its place in the map, any version since the last
//!   acknowledged flush; nothing else ever goes back (H5, R2);
//! - when a session is out and settled, what is then there is durable, and none of its writes arrives any more.

use super::plan::Ask;
use lamina_protocol::ids::SessionId;
use std::collections::{BTreeMap, BTreeSet};

/// A write or discard of one block; 0 is what was there in the beginning.
type WriteId = u64;

#[derive(Debug)]
struct Write {
    session: SessionId,
    invoked: u64,
    /// When it can no longer take effect: answered, or its session is out and settled.
    over: Option<u64>,
    /// 0 for a discard.
    content: u64,
}

#[derive(Debug)]
struct Block {
    /// What it may hold, apart from what is in flight.
    may: BTreeSet<WriteId>,
    in_flight: BTreeSet<WriteId>,
    /// What the last flush made durable may be one of these.
    base: BTreeSet<WriteId>,
    /// Acknowledged since, in order.
    unflushed: Vec<WriteId>,
    /// A loss may have made anything of it what is there, and it is not settled yet.
    open: bool,
    /// Every write that was ever asked for, but for those that found no room.
    all: Vec<WriteId>,
    /// What a read under way may see.
    reads: BTreeMap<u64, BTreeSet<WriteId>>,
}

#[derive(Debug, Default)]
struct Session {
    /// Its driver's memory of unflushed writes is gone, or nobody would write them again.
    fragile: bool,
    listed: bool,
    /// Out of the map and settled.
    sealed: bool,
    /// A loss may have taken acknowledged writes: its requests may fail.
    robbed: bool,
    /// Losses up to then are made good: something that was asked later was answered.
    handled: u64,
    /// When its driver's process was replaced last.
    took_over: u64,
}

/// One request of an application.
#[derive(Debug)]
struct Request {
    session: SessionId,
    ask: Ask,
    invoked: u64,
    writes: Vec<WriteId>,
}

/// What a reader saw that it must not see, or an error that it must not get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong(pub(super) String);

/// The oracle.
pub(super) struct Register {
    blocks: Vec<Block>,
    writes: Vec<Write>,
    by_content: BTreeMap<u64, WriteId>,
    requests: BTreeMap<u64, Request>,
    sessions: BTreeMap<SessionId, Session>,
    multi_session: bool,
    /// When a loss was raised, by our own count.
    losses: Vec<u64>,
    clock: u64,
    bad_blocks: bool,
    full: bool,
}

impl Register {
    /// `full` = devices may run out of space in this run.
    pub(super) fn new(blocks: u64, multi_session: bool, full: bool) -> Self {
        let block = || Block {
            may: BTreeSet::from([0]),
            in_flight: BTreeSet::new(),
            base: BTreeSet::from([0]),
            unflushed: Vec::new(),
            open: false,
            all: Vec::new(),
            reads: BTreeMap::new(),
        };
        let zero = Write { session: SessionId::NONE, invoked: 0, over: Some(0), content: 0 };
        Self {
            blocks: (0..blocks).map(|_| block()).collect(),
            writes: vec![zero],
            by_content: BTreeMap::new(),
            requests: BTreeMap::new(),
            sessions: BTreeMap::new(),
            multi_session,
            losses: Vec::new(),
            clock: 0,
            bad_blocks: false,
            full,
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A block rotted somewhere: reads may end in an error from now on.
    pub(super) fn rotted(&mut self) {
        self.bad_blocks = true;
    }

    /// Whether a block rotted in this run.
    pub(super) fn has_rot(&self) -> bool {
        self.bad_blocks
    }

    /// An application asks; the stamps of the blocks that a write writes.
    pub(super) fn ask(&mut self, tag: u64, session: SessionId, ask: Ask) -> Vec<u64> {
        let invoked = self.tick();
        let mut writes = Vec::new();
        let mut stamps = Vec::new();
        let (from, count) = match ask {
            Ask::Read(block, count) | Ask::Write(block, count) | Ask::Discard(block, count) => (block, count),
            Ask::Flush => (0, 0),
            Ask::Blank => (0, self.blocks.len() as u64),
        };
        for block in from..from + count {
            let found = &mut self.blocks[block as usize];
            if matches!(ask, Ask::Read(..) | Ask::Blank) {
                found.reads.insert(tag, found.may.union(&found.in_flight).copied().collect());
                continue;
            }
            let id = self.writes.len() as u64;
            let content = if matches!(ask, Ask::Write(..)) { (id << 16) | (block & 0xffff) } else { 0 };
            self.writes.push(Write { session, invoked, over: None, content });
            if content != 0 {
                self.by_content.insert(content, id);
            }
            found.in_flight.insert(id);
            found.all.push(id);
            for seen in found.reads.values_mut() {
                seen.insert(id);
            }
            writes.push(id);
            stamps.push(content);
        }
        self.requests.insert(tag, Request { session, ask, invoked, writes });
        stamps
    }

    /// A write, discard or flush was acknowledged.
    pub(super) fn done(&mut self, tag: u64) {
        let request = self.requests.remove(&tag).expect("asked for");
        let now = self.tick();
        self.made_good(request.session, request.invoked);
        match request.ask {
            Ask::Flush => self.flushed(request.session, request.invoked),
            Ask::Write(from, _) | Ask::Discard(from, _) => {
                for (n, id) in request.writes.iter().enumerate() {
                    self.acknowledged(from as usize + n, *id, now);
                }
            }
            Ask::Read(..) | Ask::Blank => unreachable!("answered with data"),
        }
    }

    fn acknowledged(&mut self, block: usize, id: WriteId, now: u64) {
        // It took effect before its session was out and settled; what followed is not changed by a late word of it.
        if self.writes[id as usize].over.is_some() {
            return;
        }
        self.writes[id as usize].over = Some(now);
        let invoked = self.writes[id as usize].invoked;
        let found = &mut self.blocks[block];
        found.in_flight.remove(&id);
        let later = |w: &WriteId| self.writes[*w as usize].over.is_none_or(|over| over > invoked);
        found.may.retain(later);
        found.may.insert(id);
        found.unflushed.push(id);
        let session = &self.sessions[&self.writes[id as usize].session];
        if (session.fragile || self.multi_session) && self.losses.iter().any(|loss| *loss > invoked) {
            self.expose(block);
        }
    }

    /// Any version since the last flush may be what is there.
    fn expose(&mut self, block: usize) {
        let found = &mut self.blocks[block];
        let back: Vec<WriteId> = found.base.iter().chain(&found.unflushed).copied().collect();
        for seen in found.reads.values_mut() {
            seen.extend(&back);
        }
        found.may.extend(back);
    }

    fn flushed(&mut self, session: SessionId, invoked: u64) {
        if self.sessions.get(&session).is_some_and(|s| s.sealed) {
            return;
        }
        for found in &mut self.blocks {
            let covered = |w: &WriteId| {
                let write = &self.writes[*w as usize];
                write.session == session && write.over.is_some_and(|over| over < invoked)
            };
            let Some(last) = found.unflushed.iter().rposition(covered) else { continue };
            let id = found.unflushed[last];
            let began = self.writes[id as usize].invoked;
            let later = |w: &WriteId| *w == id || self.writes[*w as usize].over.is_none_or(|over| over > began);
            found.may.retain(later);
            found.base = found.unflushed.drain(..=last).filter(later).collect();
        }
    }

    /// A request that was asked at this time succeeded: losses before it were handled, by writing again and flushing
    /// what had been acknowledged. A process that cannot do so answers nothing any more.
    fn made_good(&mut self, session: SessionId, invoked: u64) {
        let Some(found) = self.sessions.get_mut(&session).filter(|s| !s.sealed) else { return };
        let newest = self.losses.iter().copied().filter(|loss| *loss > found.handled && *loss < invoked).max();
        if let Some(loss) = newest.filter(|_| !self.multi_session) {
            found.handled = loss;
            self.flushed(session, loss);
        }
    }

    /// A successor has everything again that it was given back, and flushed: a driver like any other.
    pub(super) fn adopted(&mut self, session: SessionId) {
        let Some(found) = self.sessions.get_mut(&session).filter(|s| s.listed && !s.sealed) else { return };
        found.fragile = false;
        let since = found.took_over;
        found.handled = found.handled.max(since);
        self.flushed(session, since);
    }

    /// A read was answered with these stamps (`None` = a torn block).
    pub(super) fn read(&mut self, tag: u64, stamps: &[Option<u64>]) -> Result<(), Wrong> {
        let request = self.requests.remove(&tag).expect("asked for");
        self.tick();
        self.made_good(request.session, request.invoked);
        let Ask::Read(from, count) = request.ask else { unreachable!("only reads have data") };
        if stamps.len() as u64 != count {
            return Err(Wrong(format!("a read of {count} blocks was answered with {}", stamps.len())));
        }
        for (n, stamp) in stamps.iter().enumerate() {
            self.saw(tag, from as usize + n, *stamp, request.invoked)?;
        }
        Ok(())
    }

    fn saw(&mut self, tag: u64, block: usize, stamp: Option<u64>, invoked: u64) -> Result<(), Wrong> {
        let found = &mut self.blocks[block];
        let could = found.reads.remove(&tag).expect("noted when it was asked");
        let Some(stamp) = stamp else { return Err(Wrong(format!("block {block} reads torn"))) };
        let seen: BTreeSet<WriteId> =
            could.iter().filter(|w| self.writes[**w as usize].content == stamp).copied().collect();
        if seen.is_empty() {
            let what = self.describe(stamp);
            let could: Vec<String> = could.iter().map(|w| self.describe(self.writes[*w as usize].content)).collect();
            return Err(Wrong(format!("block {block} reads {what}; it could only be {}", could.join(" or "))));
        }
        let found = &mut self.blocks[block];
        let stays = |w: &WriteId| seen.contains(w) || self.writes[*w as usize].over.is_some_and(|over| over > invoked);
        let kept: BTreeSet<WriteId> = found.may.iter().filter(|w| stays(w)).copied().collect();
        let in_flight_seen = found.in_flight.iter().any(|w| seen.contains(w));
        if !kept.is_empty() || in_flight_seen {
            found.may = kept;
        }
        let over = |w: &WriteId| self.writes[*w as usize].over.is_some_and(|over| over < invoked);
        let newer = found.unflushed.iter().chain(&found.in_flight).any(|w| seen.contains(w));
        let durable = !found.open && !newer && found.base.iter().all(over);
        if durable && found.base.iter().any(|w| seen.contains(w)) {
            found.base.retain(|w| seen.contains(w));
        }
        Ok(())
    }

    /// Somebody was told that no block was ever written, or that something in these was. A discard is no write here: its
    /// hole may be gone again (H16).
    pub(super) fn blank(&mut self, tag: u64, found: Option<std::ops::Range<u64>>) -> Result<(), Wrong> {
        let request = self.requests.remove(&tag).expect("asked for");
        self.tick();
        self.made_good(request.session, request.invoked);
        let mut written = None;
        for (n, block) in self.blocks.iter_mut().enumerate() {
            let could = block.reads.remove(&tag).expect("noted when it was asked");
            if could.iter().all(|w| self.writes[*w as usize].content != 0) {
                written.get_or_insert(n);
            }
        }
        let touched = |block: u64| self.blocks.get(block as usize).is_some_and(|found| !found.all.is_empty());
        match (found, written) {
            (None, Some(block)) => Err(Wrong(format!("all is called blank, and block {block} was written"))),
            (Some(page), _) if !page.clone().any(touched) => {
                Err(Wrong(format!("blocks {page:?} are called written, and nobody ever wrote there")))
            }
            _ => Ok(()),
        }
    }

    fn describe(&self, stamp: u64) -> String {
        let Some(id) = self.by_content.get(&stamp) else {
            return if stamp == 0 { "zeroes".into() } else { format!("what nobody wrote ({stamp:#x})") };
        };
        let write = &self.writes[*id as usize];
        let state = match write.over {
            None => "in flight".into(),
            Some(over) => format!("over at {over}"),
        };
        format!("write {id} of session {:x} (began at {}, {state})", write.session.0, write.invoked)
    }

    /// A request ended in an I/O error.
    pub(super) fn failed(&mut self, tag: u64, listed: bool) -> Result<(), Wrong> {
        let request = self.requests.remove(&tag).expect("asked for");
        self.forget_reads(tag, request.ask);
        let robbed = self.sessions.get(&request.session).is_some_and(|s| s.robbed);
        let rotten = self.bad_blocks && matches!(request.ask, Ask::Read(..));
        if listed && !robbed && !rotten {
            let session = request.session.0;
            return Err(Wrong(format!(
                "'{}' of session {session:x} ended in an I/O error, for no reason (H22)",
                request.ask
            )));
        }
        Ok(())
    }

    fn forget_reads(&mut self, tag: u64, ask: Ask) {
        let blocks = match ask {
            Ask::Read(from, count) => from as usize..(from + count) as usize,
            Ask::Blank => 0..self.blocks.len(),
            Ask::Write(..) | Ask::Discard(..) | Ask::Flush => return,
        };
        for block in blocks {
            self.blocks[block].reads.remove(&tag);
        }
    }

    /// A request ended for want of space: nothing of it may ever show (R8).
    pub(super) fn no_space(&mut self, tag: u64) -> Result<(), Wrong> {
        let request = self.requests.remove(&tag).expect("asked for");
        let Ask::Write(from, _) = request.ask else {
            return Err(Wrong(format!("'{}' ended for want of space", request.ask)));
        };
        if !self.full {
            return Err(Wrong(format!("'{}' ended for want of space, of which there is plenty", request.ask)));
        }
        for (n, id) in request.writes.iter().enumerate() {
            let found = &mut self.blocks[from as usize + n];
            found.in_flight.remove(id);
            found.all.retain(|w| w != id);
            found.reads.values_mut().for_each(|seen| {
                seen.remove(id);
            });
        }
        Ok(())
    }

    /// A driver's process is gone, and with it what it kept of unflushed writes.
    pub(super) fn process_died(&mut self, session: SessionId) {
        let now = self.tick();
        let found = self.sessions.entry(session).or_default();
        found.fragile = true;
        found.took_over = now;
        let handled = found.handled;
        found.robbed |= self.losses.iter().any(|loss| *loss > handled);
        self.expose_lost(session);
    }

    /// After a loss: versions since the last flush come back in blocks that a session wrote whose memory is gone.
    fn expose_lost(&mut self, session: SessionId) {
        let handled = self.sessions.get(&session).map_or(0, |s| s.handled);
        for block in 0..self.blocks.len() {
            let taken = |w: &WriteId| {
                let write = &self.writes[*w as usize];
                write.session == session && self.losses.iter().any(|loss| *loss > write.invoked && *loss > handled)
            };
            if self.blocks[block].unflushed.iter().any(taken) {
                self.expose(block);
                self.fold(block);
            }
        }
    }

    /// Nobody will write again what was not flushed: whatever is there is all that there is.
    fn fold(&mut self, block: usize) {
        let found = &mut self.blocks[block];
        if !self.multi_session {
            found.base.clone_from(&found.may);
            found.unflushed.clear();
            found.open = true;
        }
    }

    /// A map was committed.
    pub(super) fn committed(&mut self, listed: &[SessionId], loss_raised: bool, settling: bool) {
        let now = self.tick();
        for session in listed {
            self.sessions.entry(*session).or_default().listed = true;
        }
        if loss_raised {
            self.losses.push(now);
        }
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        for id in ids {
            let multi = self.multi_session;
            let found = self.sessions.get_mut(&id).expect("its key");
            let gone = found.listed && !listed.contains(&id);
            found.fragile |= gone;
            found.robbed |= loss_raised && (found.fragile || multi);
            let fragile = found.fragile || multi;
            if fragile && !found.sealed {
                self.expose_lost(id);
            }
            let found = self.sessions.get_mut(&id).expect("its key");
            if gone && !settling && !found.sealed {
                found.sealed = true;
                self.seal(id, now);
            }
        }
    }

    /// A person forced a copy that is behind (I8): these blocks may be again what they were at any time, flushed or not.
    pub(super) fn forced(&mut self, blocks: impl Iterator<Item = u64>) {
        self.tick();
        // Of what was stale without a content that was kept nothing is served.
        self.bad_blocks = true;
        for block in blocks {
            let Some(found) = self.blocks.get_mut(block as usize) else { continue };
            let any: BTreeSet<WriteId> = found.all.iter().copied().chain([0]).collect();
            found.reads.values_mut().for_each(|seen| seen.extend(&any));
            found.base.clone_from(&any);
            found.may = any;
            found.unflushed.clear();
            found.open = true;
        }
    }

    /// None of its writes arrives any more, and what is there is durable.
    fn seal(&mut self, session: SessionId, now: u64) {
        let own_writes: BTreeSet<WriteId> =
            (0..self.writes.len() as u64).filter(|w| self.writes[*w as usize].session == session).collect();
        for found in &mut self.blocks {
            let own = |w: &WriteId| own_writes.contains(w);
            let arrived: Vec<WriteId> = found.in_flight.iter().filter(|w| own(w)).copied().collect();
            for id in &arrived {
                found.in_flight.remove(id);
                found.may.insert(*id);
                self.writes[*id as usize].over = Some(now);
            }
            if !arrived.is_empty() || found.open || found.unflushed.iter().any(own) {
                found.unflushed.retain(|w| !own(w));
                found.base = found.may.clone();
                found.open = false;
            }
        }
    }

    /// Whether everything that a loss may have taken is there again.
    pub(super) fn all_handled(&self) -> bool {
        let last = self.losses.last().copied().unwrap_or(0);
        let safe = |s: &Session| !s.listed || s.sealed || (s.handled >= last && !s.fragile);
        last == 0 || self.sessions.values().all(safe)
    }

    /// Whether somebody was told that the write with this content is done.
    pub(super) fn is_acknowledged(&self, content: u64) -> bool {
        self.by_content.get(&content).is_some_and(|id| self.writes[*id as usize].over.is_some())
    }

    /// A request of a device that is no more: nobody waits for its answer.
    pub(super) fn abandon(&mut self, tag: u64) {
        if let Some(request) = self.requests.remove(&tag) {
            self.forget_reads(tag, request.ask);
        }
    }

    /// The one content that a block must have now, if it is certain: nothing is in flight, nothing may have been lost.
    pub(super) fn certain(&self, block: usize) -> Option<u64> {
        let found = &self.blocks[block];
        let mut contents = found.may.iter().map(|w| self.writes[*w as usize].content);
        let first = contents.next()?;
        (found.in_flight.is_empty() && contents.all(|c| c == first)).then_some(first)
    }
}

#[cfg(test)]
mod tests;
