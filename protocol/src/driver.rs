//! The driver's state machine: block requests of the OS in, frames to storage servers out (seed 002 Fig. 7A, 7B).
//!
//! One driver serves one volume for one session in one process. It holds no socket and no clock: see [`Input`] and
//! [`Output`]. Absent on purpose: polling, retries on a timer without a reason, any word to the operator but reports.

use crate::control::{DriverReport, Trouble};
use crate::ids::{Generation, Incarnation, OpenNumber, ServerId, SessionId, VolumeId};
use crate::limits::STALL_TIMEOUT_MS;
use crate::map::{AccessMode, VolumeMap};
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use crate::wire::{ReplyFrame, RequestFrame, Start};
use bytes::Bytes;
use credit::Allocated;
use kept::{Kept, Seqs};
use op::{Op as Operation, OpId, Origin};
use order::Order;
use peer::{Outgoing, Peer, Stamp, frame_bytes};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use view::View;

mod attempt;
mod credit;
mod kept;
mod lease;
mod loss;
mod op;
mod order;
mod own;
mod peer;
mod read;
mod redirect;
mod session;
mod view;
mod write;
mod written;

#[cfg(test)]
mod tests;

/// What a driver is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Its volume.
    pub volume: VolumeId,
    /// Its session.
    pub session: SessionId,
    /// First stage of the session or take-over of a device.
    pub start: Start,
    /// Bytes of unflushed writes that it keeps (H5); default [`crate::limits::KEPT_WRITES_BYTES`].
    pub kept_bytes: u64,
}

/// Names a request of the OS until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// Names one connection to one server; a new connection has a new link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// What the OS asks. Addresses and lengths are whole blocks within the volume; the runtime refuses others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `length` bytes at `address`.
    Read {
        /// Bytes from the start of the volume.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// Write these bytes at `address`.
    Write {
        /// Bytes from the start of the volume.
        address: u64,
        /// Whole blocks.
        data: Bytes,
    },
    /// Make the range read as zeroes and give its space back (discard and write-zeroes alike).
    Discard {
        /// Bytes from the start of the volume.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// All that was answered before becomes durable on all members.
    Flush,
    /// Whether any block of the volume was ever written, in any layer and group (a discard counts). Takes in what was
    /// answered before.
    AskWritten,
}

/// Why a request of the OS fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OpError {
    /// EIO: the session is over, or no member has good data.
    Io,
    /// ENOSPC, out of a `Reserve`; nothing was sent.
    NoSpace,
    /// The session may not write.
    ReadOnly,
}

/// What happens to a driver.
#[derive(Clone, Debug)]
pub enum Input {
    /// A committed map, from the watch of the object (the first one comes so) or from a file.
    Map(VolumeMap),
    /// A connection was asked for and is there (its `Hello` is done by the runtime).
    Connected {
        /// To whom.
        server: ServerId,
        /// Its name.
        link: LinkId,
    },
    /// It could not be made, or broke. `None` = it could not be made.
    Broken {
        /// To whom.
        server: ServerId,
        /// Which.
        link: Option<LinkId>,
        /// Refused or reset by the other side (then reported at once), or a time-out or local trouble.
        refused: bool,
    },
    /// A frame came.
    Frame {
        /// Over this connection.
        link: LinkId,
        /// It.
        frame: ReplyFrame,
    },
    /// A request of the OS. A successor gets only requests that the process before can no longer answer: it is dead, or
    /// [`Driver::owns_device`] says that its members refuse it. Otherwise an old request, answered there meanwhile, would
    /// be executed again over a newer one.
    Submit {
        /// Its name.
        tag: Tag,
        /// It.
        op: Op,
    },
    /// Of a take-over ([`Start::Resume`]): every unanswered request of the process before has been submitted again. What
    /// is submitted after this is new. Until the flush that follows is acknowledged, a loss that the process before had
    /// not handled fails the session (R2).
    Replayed,
    /// The time of the last [`Output::WakeAt`] has come.
    Timer,
}

/// What a driver wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Connect to a server, trying its addresses in turn; answered by `Connected` or `Broken`. The runtime waits before
    /// a connection that failed lately. A second one for the same server replaces the first (other addresses).
    Connect {
        /// To whom.
        server: ServerId,
        /// `host:port`, in order.
        addresses: Vec<String>,
    },
    /// Close a connection.
    Disconnect {
        /// Which.
        link: LinkId,
    },
    /// Send a frame.
    Send {
        /// Over this connection.
        link: LinkId,
        /// It.
        frame: RequestFrame,
    },
    /// Answer the OS.
    Complete {
        /// Which request.
        tag: Tag,
        /// Data of a read; of [`Op::AskWritten`] the address of a page that was written, 8 bytes little endian, if there
        /// is one; else nothing.
        result: Result<Bytes, OpError>,
    },
    /// Tell the leader.
    Report(DriverReport),
    /// Wake me then; replaces the time set before. `Millis::NEVER` = not at all.
    WakeAt(Millis),
    /// A successor owns the device: answer the kernel nothing more and exit (R10).
    Exit,
}

/// What a driver is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Waits for a map that lists the session and for every serving member of it to refuse older incarnations (H20).
    Discovering,
    /// Writes again what a loss may have taken, before anything else (R2).
    Recovering,
    /// Serves.
    Serving,
    /// The session is over: every request fails (I/O error for `Ended` is final).
    Ended,
    /// A successor owns the device: nothing is answered any longer (R10).
    Exited,
}

/// How far a successor's replay is (R2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replay {
    /// The kernel side gives back what was unanswered.
    Running,
    /// Everything below this number was given back; the flush follows when all of it is done.
    Given(OpId),
    /// The flush is under way.
    Flushing,
    /// A driver like any other.
    Over,
}

/// The driver of one volume.
#[derive(Debug)]
pub struct Driver {
    config: Config,
    near: Vec<ServerId>,
    phase: Phase,
    replay: Replay,
    view: Option<Arc<View>>,
    /// Whether a map has listed the session.
    listed: bool,
    incarnation: Incarnation,
    /// The highest number of an `Open`, at whatever server (R7).
    last_open: OpenNumber,
    /// Losses up to here are handled (R2).
    handled: Generation,
    peers: BTreeMap<ServerId, Peer>,
    links: BTreeMap<LinkId, ServerId>,
    ops: BTreeMap<OpId, Operation>,
    next_op: u64,
    order: Order,
    rewrite_order: Order,
    /// Reads given back to a successor that has not got everything back yet.
    held_reads: Vec<OpId>,
    /// Rewrites of this loss that are not done.
    rewrites_left: usize,
    /// May start when the driver serves.
    ready: VecDeque<OpId>,
    /// Steps of the handling of a loss, which may start before.
    ready_first: VecDeque<OpId>,
    /// Writes that wait for room among the kept ones.
    awaiting_room: VecDeque<OpId>,
    parked: BTreeSet<OpId>,
    /// Of those: a member had no room even in its reserve (R8).
    starved: BTreeSet<OpId>,
    /// When those are tried again.
    starved_until: Millis,
    /// Something that parked operations wait for may have come.
    recheck_parked: bool,
    awaiting_lease: BTreeSet<OpId>,
    seqs: Seqs,
    kept: Kept,
    /// A flush of the driver's own is on its way.
    own_flush: bool,
    allocated: Allocated,
    /// When a change was last acknowledged.
    changed_at: Millis,
    /// When the first change was acknowledged that no flush covers.
    unflushed_since: Option<Millis>,
    wake_at: Millis,
    now: Millis,
    /// Writes found in the way of an operation that is entered; kept for its memory.
    before: Vec<OpId>,
    out: Vec<Output>,
}

impl Driver {
    /// A driver that knows no map yet; it sends nothing before the first one.
    pub fn new(config: Config) -> Self {
        let resume = config.start == Start::Resume;
        Self {
            near: Vec::new(),
            phase: Phase::Discovering,
            replay: if resume && !on(Mutant::ResumeIsFresh) { Replay::Running } else { Replay::Over },
            view: None,
            listed: false,
            incarnation: Incarnation(u64::from(!resume)),
            last_open: OpenNumber(0),
            handled: Generation(0),
            peers: BTreeMap::new(),
            links: BTreeMap::new(),
            ops: BTreeMap::new(),
            next_op: 0,
            order: Order::default(),
            rewrite_order: Order::default(),
            held_reads: Vec::new(),
            rewrites_left: 0,
            ready: VecDeque::new(),
            ready_first: VecDeque::new(),
            awaiting_room: VecDeque::new(),
            parked: BTreeSet::new(),
            starved: BTreeSet::new(),
            starved_until: Millis::NEVER,
            recheck_parked: false,
            awaiting_lease: BTreeSet::new(),
            seqs: Seqs::default(),
            kept: Kept::new(config.kept_bytes),
            own_flush: false,
            allocated: Allocated::default(),
            changed_at: Millis(0),
            unflushed_since: None,
            wake_at: Millis::NEVER,
            now: Millis(0),
            before: Vec::new(),
            out: Vec::new(),
            config,
        }
    }

    /// Read from these servers, nearest first, where their members are as good as others (locality). Holds from the next
    /// map on.
    pub fn prefer(&mut self, near: Vec<ServerId>) {
        self.near = near;
    }

    /// Something happened; appends what is to be done. Nothing comes after [`Output::Exit`].
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        if self.phase == Phase::Exited {
            return;
        }
        self.now = self.now.max(now);
        std::mem::swap(out, &mut self.out);
        match input {
            Input::Map(map) => self.apply_map(map),
            Input::Connected { server, link } => self.connected(server, link),
            Input::Broken { server, link, refused } => self.broken(server, link, refused),
            Input::Frame { link, frame } => self.frame(link, frame),
            Input::Submit { tag, op } => self.submit(tag, op),
            Input::Replayed => self.replayed(),
            Input::Timer => self.timer(),
        }
        self.run();
        std::mem::swap(out, &mut self.out);
    }

    /// Bytes of the volume under the newest map known; `None` before the first one.
    pub fn size(&self) -> Option<u64> {
        self.view.as_ref().map(|view| view.map.size)
    }

    /// The generation that it works under; 0 before the first map.
    pub fn generation(&self) -> Generation {
        self.view.as_ref().map_or(Generation(0), |view| view.generation())
    }

    /// Whether requests are being served: not parked as a whole, and not over.
    pub fn is_serving(&self) -> bool {
        self.phase == Phase::Serving && self.view.as_ref().is_some_and(|view| view.admitted())
    }

    /// Whether every member refuses older incarnations, or the session is over: only now may the kernel be asked to give
    /// back what a process before left unanswered (H20, R10).
    pub fn owns_device(&self) -> bool {
        !matches!(self.phase, Phase::Discovering | Phase::Exited)
    }

    /// Whether the session has ended for good, so that every request fails.
    pub fn has_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// The incarnation under which it acts (H20); final once it serves.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Requests of the OS that are not answered yet.
    pub fn unanswered(&self) -> usize {
        self.ops.values().filter(|op| matches!(op.origin, Origin::Os(_))).count()
    }

    /// Whether the session may only read.
    pub fn read_only(&self) -> bool {
        let session = self.view.as_ref().and_then(|view| view.session);
        session.is_some_and(|s| s.mode == AccessMode::ReadOnly)
    }

    fn stamp(&self) -> Stamp {
        Stamp { now: self.now, generation: self.generation(), confirmed: self.seqs.confirmed() }
    }

    /// Hand a frame to a peer: at once if its handle and window allow, else in order.
    fn transmit(&mut self, server: ServerId, outgoing: Outgoing) {
        let stamp = self.stamp();
        let peer = self.peers.get_mut(&server).expect("every serving server of the map has a peer");
        if !peer.queue.is_empty() || !peer.may_send(frame_bytes(&outgoing.body)) {
            peer.queue.push_back(outgoing);
            return;
        }
        let link = peer.up().expect("an open handle has a connection");
        let frame = peer.frame(outgoing, stamp);
        self.out.push(Output::Send { link, frame });
        self.wake_by(self.now.after(STALL_TIMEOUT_MS));
    }

    /// Send what waited, as far as handle and window allow; what was given up meanwhile is dropped here.
    fn pump(&mut self, server: ServerId) {
        let stamp = self.stamp();
        let Some(peer) = self.peers.get_mut(&server) else { return };
        while let Some(next) = peer.queue.front() {
            if !peer.may_send(frame_bytes(&next.body)) {
                break;
            }
            let next = peer.queue.pop_front().expect("it has a front");
            let counts = next
                .what
                .attempt()
                .is_none_or(|(op, attempt)| self.ops.get(&op).is_some_and(|op| op.attempt.number == attempt));
            if counts {
                let link = peer.up().expect("an open handle has a connection");
                let frame = peer.frame(next, stamp);
                self.out.push(Output::Send { link, frame });
            }
        }
        self.wake_by(self.now.after(STALL_TIMEOUT_MS));
    }

    /// Tell the leader about every serving member on a server.
    fn report(&mut self, server: ServerId, trouble: Trouble) {
        let Some(view) = self.view.clone() else { return };
        for copy in view.copies_on(server) {
            let (volume, session) = (self.config.volume, self.config.session);
            let generation = view.generation();
            self.out.push(Output::Report(DriverReport { volume, session, generation, copy, server, trouble }));
        }
    }

    /// A successor acts for this session: not a word more to the kernel (R10).
    fn superseded(&mut self) {
        if on(Mutant::SupersededTellsKernel) {
            self.end();
        }
        self.phase = Phase::Exited;
        self.ops.clear();
        self.forget_all();
        self.out.push(Output::Exit);
    }

    /// The session is over, or may have lost what the OS was told is written: every request fails from now on.
    fn end(&mut self) {
        self.phase = Phase::Ended;
        for (_, op) in std::mem::take(&mut self.ops) {
            if let Origin::Os(tag) = op.origin {
                self.out.push(Output::Complete { tag, result: Err(OpError::Io) });
            }
        }
        self.forget_all();
    }

    /// Nothing is under way any longer, and no connection is needed.
    fn forget_all(&mut self) {
        self.order.clear();
        self.ready.clear();
        self.ready_first.clear();
        self.awaiting_room.clear();
        self.parked.clear();
        self.starved.clear();
        self.awaiting_lease.clear();
        for (_, peer) in std::mem::take(&mut self.peers) {
            if let Some(link) = peer.up() {
                self.out.push(Output::Disconnect { link });
            }
        }
        self.links.clear();
    }
}
