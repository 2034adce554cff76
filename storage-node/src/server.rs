//! The program around [`lamina_protocol::storage_server`]: one thread with the machine, its connections, its peers, the
//! leaders that talk to it, and its one timer.
//!
//! It decides nothing: every event becomes an [`Input`], every [`Output`] an operation of a device, a frame, an answer or
//! the timer (PROTOCOL.md §1, sans-IO). Invariants: inputs are handed in one batch at a time and all outputs of a batch
//! are carried out before the next; operations reach each device in the order in which the machine gave them; nothing is
//! awaited while the machine is borrowed.

use crate::clock;
use crate::connections::Accepted;
use crate::events::Inbox;
use crate::link::Link;
use crate::metrics::Metrics;
use crate::peers::Peer;
use crate::rate::LineLimit;
use crate::store::{Device, DeviceError, Ready, Recovered};
use lamina_control_api::storage::{Answerer, NotSent, ServerWord};
use lamina_protocol::control::{ControlReply, ControlRequest};
use lamina_protocol::ids::{BootId, ClusterId, ServerId};
use lamina_protocol::storage_server::medium::{MediumEvent, MediumOp, OpId, Opened};
use lamina_protocol::storage_server::{
    CallId, Config, ConnId, CopyStanding, Input, Output, PeerId, Rot, StorageServer, Violation,
};
use lamina_protocol::time::Millis;
use lamina_protocol::wire::{ReplyFrame, RequestFrame};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;
use tokio::sync::Notify;

/// A leader that has been silent for so long is not waited for by a planned leave.
const LEADER_SILENT_MS: u64 = 5_000;

/// The server; shared by the tasks of its thread.
pub(crate) struct Server {
    inner: RefCell<Inner>,
    /// What devices say.
    pub(crate) inbox: Rc<Inbox>,
    /// The timer was set anew.
    pub(crate) timer_set: Notify,
    /// Something for the main loop: a device was closed, or the leave is over.
    pub(crate) attention: Notify,
    /// Counters.
    pub(crate) metrics: Metrics,
    /// Log lines that connections can provoke.
    pub(crate) lines: LineLimit,
    /// Log lines about bad blocks.
    rot_lines: LineLimit,
    leaving: Cell<bool>,
    /// When a leader last said something to this very process.
    heard: Cell<Option<Millis>>,
}

struct Inner {
    config: Config,
    machine: StorageServer,
    out: Vec<Output>,
    wake: Millis,
    minted: u64,
    conns: HashMap<ConnId, Rc<Accepted>>,
    peers: HashMap<PeerId, Peer>,
    devices: HashMap<BootId, OpenDevice>,
    closed: Vec<BootId>,
    calls: HashMap<CallId, (u64, CallId)>,
    leaders: BTreeMap<u64, Leader>,
    /// Links and devices with something new in this batch.
    touched: Vec<Rc<Link>>,
    busy: Vec<BootId>,
}

/// A device that the machine works on.
struct OpenDevice {
    device: Rc<RefCell<Device>>,
    /// Operations of this batch, behind those that its queue had no room for.
    batch: VecDeque<(OpId, MediumOp)>,
}

/// A leader's session.
struct Leader {
    answers: Answerer,
    /// The session is to be ended: it takes no answers.
    over: Rc<Notify>,
}

impl Server {
    /// A server without devices, and so without an id.
    pub(crate) fn new(cluster: ClusterId, inbox: Rc<Inbox>, metrics: Metrics) -> Rc<Self> {
        let config = Config { server: ServerId::NONE, cluster };
        Rc::new(Self {
            inner: RefCell::new(Inner::new(config)),
            inbox,
            timer_set: Notify::new(),
            attention: Notify::new(),
            metrics,
            lines: LineLimit::default(),
            rot_lines: LineLimit::default(),
            leaving: Cell::new(false),
            heard: Cell::new(None),
        })
    }

    /// Its id; none before its first device was opened.
    pub(crate) fn id(&self) -> ServerId {
        self.inner.borrow().config.server
    }

    /// Its cluster.
    pub(crate) fn cluster(&self) -> ClusterId {
        self.inner.borrow().config.cluster
    }

    /// Every copy here.
    pub(crate) fn copies(&self) -> Vec<CopyStanding> {
        self.inner.borrow().machine.copies()
    }

    /// Accepted connections.
    pub(crate) fn connections(&self) -> usize {
        self.inner.borrow().conns.len()
    }

    /// Whether a leader has spoken to this very process.
    pub(crate) fn heard_leader(&self) -> bool {
        self.heard.get().is_some()
    }

    /// The counters of an open device.
    pub(crate) fn stats(&self, boot: BootId) -> Option<crate::store::Stats> {
        self.inner.borrow().devices.get(&boot).map(|d| d.device.borrow().stats())
    }

    /// Tells an open device that what lies below has grown.
    pub(crate) fn grow(&self, boot: BootId) {
        if let Some(open) = self.inner.borrow().devices.get(&boot) {
            open.device.borrow_mut().grow();
        }
    }

    /// A name for a connection or a session.
    pub(crate) fn mint(&self) -> u64 {
        let mut inner = self.inner.borrow_mut();
        inner.minted += 1;
        inner.minted
    }

    /// When the machine wants to be woken.
    pub(crate) fn wake_at(&self) -> Millis {
        self.inner.borrow().wake
    }

    /// The time of [`Self::wake_at`] has come.
    pub(crate) fn timer(self: &Rc<Self>) {
        self.feed([Input::Timer]);
    }

    /// The process was asked to stop.
    pub(crate) fn leave(self: &Rc<Self>) {
        self.leaving.set(true);
        self.feed([Input::Leave]);
    }

    /// Whether a stop need not wait any longer: no map counts on a copy here that others could do without, or there is no
    /// leader that would change it.
    pub(crate) fn has_left(&self) -> bool {
        let now = clock::now();
        let leader = self.heard.get().is_some_and(|heard| now.since(heard) < LEADER_SILENT_MS);
        !leader || !self.inner.borrow().machine.copies().iter().any(CopyStanding::could_be_left_out)
    }

    /// A device was opened: it serves on this thread from now on. The first one gives the server its id.
    pub(crate) fn device_opened(self: &Rc<Self>, recovered: Recovered, opened: Opened) -> Result<(), DeviceError> {
        let device = recovered.start(self.inbox.sink(opened.boot))?;
        let ready = device.ready()?;
        let mut inner = self.inner.borrow_mut();
        if inner.config.server.is_none() {
            inner.take_id(opened.server);
        }
        let device = Rc::new(RefCell::new(device));
        tokio::task::spawn_local(attend(self.clone(), device.clone(), ready));
        inner.devices.insert(opened.boot, OpenDevice { device, batch: VecDeque::new() });
        drop(inner);
        self.feed([Input::DeviceOpened(opened)]);
        Ok(())
    }

    /// Closes a device that is no longer wanted; nothing of a copy lies there.
    pub(crate) fn close_device(self: &Rc<Self>, boot: BootId) {
        self.feed([Input::Device { boot, event: MediumEvent::Failed }]);
    }

    /// Devices that the machine closed since this was asked last.
    pub(crate) fn take_closed(&self) -> Vec<BootId> {
        std::mem::take(&mut self.inner.borrow_mut().closed)
    }

    /// Takes what devices have said.
    pub(crate) fn device_events(self: &Rc<Self>) {
        let events = self.inbox.take();
        if events.is_empty() {
            return;
        }
        let mut inner = self.inner.borrow_mut();
        for (boot, _) in &events {
            // Its queue has moved: what had no room may have some now.
            if inner.devices.get(boot).is_some_and(|open| !open.batch.is_empty()) {
                inner.busy.push(*boot);
            }
        }
        drop(inner);
        self.feed(events.into_iter().map(|(boot, event)| Input::Device { boot, event }));
    }

    /// A connection was accepted; false while the server has no id and can greet nobody.
    pub(crate) fn admit(&self, conn: ConnId, accepted: Rc<Accepted>) -> bool {
        let mut inner = self.inner.borrow_mut();
        let has_id = !inner.config.server.is_none();
        if has_id {
            inner.conns.insert(conn, accepted);
        }
        has_id
    }

    /// Frames of a connection, all that one buffer held.
    pub(crate) fn frames(self: &Rc<Self>, conn: ConnId, frames: &mut Vec<RequestFrame>) {
        {
            let inner = self.inner.borrow();
            let Some(accepted) = inner.conns.get(&conn) else { return };
            let now = Instant::now();
            for frame in frames.iter() {
                accepted.account.borrow_mut().began(frame, now, &inner.machine, &self.metrics);
            }
        }
        self.feed(frames.drain(..).map(|frame| Input::Frame { conn, frame }));
    }

    /// A connection is gone.
    pub(crate) fn closed(self: &Rc<Self>, conn: ConnId) {
        if self.inner.borrow_mut().conns.remove(&conn).is_some() {
            self.feed([Input::Closed { conn }]);
        }
    }

    /// A peer is there.
    pub(crate) fn peer_connected(self: &Rc<Self>, peer: PeerId, link: Rc<Link>) {
        if let Some(known) = self.inner.borrow_mut().peers.get_mut(&peer) {
            known.link = Some(link);
        }
        self.feed([Input::PeerConnected { peer }]);
    }

    /// A peer could not be reached, or broke.
    pub(crate) fn peer_broken(self: &Rc<Self>, peer: PeerId) {
        self.inner.borrow_mut().peers.remove(&peer);
        self.feed([Input::PeerBroken { peer }]);
    }

    /// Frames of a peer.
    pub(crate) fn peer_frames(self: &Rc<Self>, peer: PeerId, frames: &mut Vec<ReplyFrame>) {
        self.feed(frames.drain(..).map(|frame| Input::PeerFrame { peer, frame }));
    }

    /// A leader began a session.
    pub(crate) fn leader_came(&self, session: u64, answers: Answerer, over: Rc<Notify>) {
        self.inner.borrow_mut().leaders.insert(session, Leader { answers, over });
    }

    /// A leader's session is over.
    pub(crate) fn leader_went(&self, session: u64) {
        let mut inner = self.inner.borrow_mut();
        inner.leaders.remove(&session);
        inner.calls.retain(|_, (of, _)| *of != session);
    }

    /// How many leaders talk.
    pub(crate) fn leaders(&self) -> usize {
        self.inner.borrow().leaders.len()
    }

    /// A leader asks.
    pub(crate) fn call(self: &Rc<Self>, session: u64, call: CallId, request: ControlRequest) {
        self.heard.set(Some(clock::now()));
        let own = CallId(self.mint());
        self.inner.borrow_mut().calls.insert(own, (session, call));
        self.feed([Input::Control { call: own, request }]);
        if self.leaving.get() && self.has_left() {
            self.attention.notify_one();
        }
    }

    /// Hands inputs in and carries out what comes of them.
    fn feed(self: &Rc<Self>, inputs: impl IntoIterator<Item = Input>) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let now = clock::now();
        for input in inputs {
            inner.machine.handle(now, input, &mut inner.out);
        }
        let at = Instant::now();
        let mut out = std::mem::take(&mut inner.out);
        for output in out.drain(..) {
            self.carry_out(inner, output, at);
        }
        inner.out = out;
        inner.submit();
        for link in inner.touched.drain(..) {
            link.flush();
        }
    }

    fn carry_out(self: &Rc<Self>, inner: &mut Inner, output: Output, at: Instant) {
        match output {
            Output::Medium { boot, op, what } => inner.queue(boot, op, what),
            Output::Reply { conn, frame } => self.reply(inner, conn, &frame, at),
            Output::WakeAt(wake) => {
                inner.wake = wake;
                self.timer_set.notify_one();
            }
            Output::CloseDevice { boot } => {
                if let Some(open) = inner.devices.remove(&boot) {
                    open.device.borrow_mut().close();
                    inner.closed.push(boot);
                }
                self.attention.notify_one();
            }
            Output::Close { conn, why } => self.close(inner, conn, why),
            Output::ControlReply { call, reply } => inner.answer(call, reply),
            Output::PeerConnect { peer, server, addresses } => {
                let known = Peer::dial(self, peer, inner.config.cluster, server, addresses);
                inner.peers.insert(peer, known);
            }
            Output::PeerSend { peer, frame } => {
                if let Some(link) = inner.peers.get(&peer).and_then(|p| p.link.as_ref())
                    && link.push(&frame)
                {
                    inner.touched.push(link.clone());
                }
            }
            Output::PeerClose { peer } => drop(inner.peers.remove(&peer)),
            Output::StaleSeen(seen) => {
                self.metrics.stale(seen.volume);
                tracing::debug!(volume = %seen.volume, session = %seen.session, had = %seen.had, need = %seen.need, "a stale request");
                inner.tell(&ServerWord::StaleSeen(seen));
            }
            Output::Rot(rot) => self.rot(&rot),
            Output::AskMap { volume, at_least } => inner.tell(&ServerWord::AskMap { volume, at_least }),
        }
    }

    fn reply(&self, inner: &mut Inner, conn: ConnId, frame: &ReplyFrame, at: Instant) {
        let Some(accepted) = inner.conns.get(&conn) else { return };
        accepted.account.borrow_mut().ended(frame, at, &self.metrics);
        if accepted.link.push(frame) {
            inner.touched.push(accepted.link.clone());
        }
    }

    /// R12: told to whoever runs the servers, for the disk under it may be failing.
    fn rot(&self, rot: &Rot) {
        self.metrics.rot(rot);
        let Some(left_out) = self.rot_lines.admit(clock::now()) else { return };
        let (volume, copy, page) = (rot.volume, rot.page.copy, rot.page.page);
        match rot.bad {
            0 => tracing::info!(%volume, %copy, page, left_out, "bad blocks of a page were taken from another copy"),
            blocks => tracing::warn!(
                %volume, %copy, page, blocks, left_out,
                "the device gave back other than what was written: the blocks are read from another copy"
            ),
        }
    }

    /// The other side broke the protocol.
    fn close(&self, inner: &mut Inner, conn: ConnId, why: Violation) {
        let Some(accepted) = inner.conns.remove(&conn) else { return };
        self.metrics.violation(why);
        if let Some(left_out) = self.lines.admit(clock::now()) {
            tracing::warn!(from = %accepted.from, left_out, "connection closed: {why}");
        }
        accepted.over.notify_one();
    }
}

/// Takes what a device's ring has done, until it is over: also one that failed or was closed keeps its memory and its file
/// until the kernel has ended every transfer.
async fn attend(server: Rc<Server>, device: Rc<RefCell<Device>>, ready: Ready) {
    // Without the reactor the process is at its end.
    while !device.borrow().is_over() && ready.came().await.is_ok() {
        device.borrow_mut().turn(false);
        server.device_events();
    }
}

impl Inner {
    fn new(config: Config) -> Self {
        Self {
            config,
            machine: StorageServer::new(config),
            out: Vec::new(),
            wake: Millis::NEVER,
            minted: 0,
            conns: HashMap::new(),
            peers: HashMap::new(),
            devices: HashMap::new(),
            closed: Vec::new(),
            calls: HashMap::new(),
            leaders: BTreeMap::new(),
            touched: Vec::new(),
            busy: Vec::new(),
        }
    }

    /// A machine without an id has no device, no connection and nothing under way, so nothing is lost with it.
    fn take_id(&mut self, server: ServerId) {
        assert!(self.devices.is_empty() && self.conns.is_empty(), "the id is known before anything is served");
        self.config.server = server;
        self.machine = StorageServer::new(self.config);
        self.wake = Millis::NEVER;
    }

    fn queue(&mut self, boot: BootId, op: OpId, what: MediumOp) {
        // A device that has failed meanwhile answers nothing; the machine hears of it by its `Failed`.
        if let Some(open) = self.devices.get_mut(&boot) {
            if open.batch.is_empty() {
                self.busy.push(boot);
            }
            open.batch.push_back((op, what));
        }
    }

    /// Hands the operations of this batch to the devices, in order; what has no room waits for the device's next event.
    fn submit(&mut self) {
        for boot in self.busy.drain(..) {
            if let Some(open) = self.devices.get_mut(&boot) {
                let left = open.device.borrow_mut().submit_all(std::mem::take(&mut open.batch).into());
                open.batch = left.into();
            }
        }
    }

    fn answer(&mut self, call: CallId, reply: ControlReply) {
        let Some((session, theirs)) = self.calls.remove(&call) else { return };
        let Some(leader) = self.leaders.get(&session) else { return };
        let word = ServerWord::Answer { call: theirs, reply };
        if leader.answers.say(&word) == Err(NotSent::Full) {
            leader.over.notify_one();
        }
    }

    /// Tells all leaders; a deposed one ignores it. What one has no room for is told again by later requests.
    fn tell(&self, word: &ServerWord) {
        for leader in self.leaders.values() {
            let _ = leader.answers.say(word);
        }
    }
}
