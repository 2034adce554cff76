//! The volume's thread: events into the driver, its outputs out.
//!
//! All tasks of the thread share [`Core`]; none holds its state across a wait or a completion. The main task takes in
//! orders, maps and time, one task per connection its frames.

use super::dial::{dial, pause};
use super::link::Link;
use super::pending::{Answer, Next, Table};
use super::{Clock, Options, Order, Shared, Status};
use crate::block::BlockError;
use lamina_protocol::control::DriverReport;
use lamina_protocol::driver::{Driver, Input, LinkId, Op, Output, Tag};
use lamina_protocol::ids::{ClusterId, ServerId};
use lamina_protocol::time::Millis;
use lamina_protocol::wire::{ReplyBody, ReplyFrame};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// A connection with the task that reads it.
struct Open {
    server: ServerId,
    link: Rc<Link>,
    task: Option<JoinHandle<()>>,
}

/// A server that is being connected to, or was.
#[derive(Default)]
struct Dialled {
    /// In a row, since the last connection that was made and held.
    failures: u32,
    task: Option<JoinHandle<()>>,
}

struct State {
    driver: Driver,
    clock: Box<dyn Clock>,
    out: Vec<Output>,
    table: Table,
    links: BTreeMap<LinkId, Open>,
    dialled: BTreeMap<ServerId, Dialled>,
    next_link: u64,
    /// Connections with something to write in this batch.
    written: Vec<Rc<Link>>,
    answers: Vec<Answer>,
    /// Forced writes that are written and not yet flushed.
    to_flush: Vec<Tag>,
    wake_at: Millis,
    on_exit: Option<Box<dyn FnOnce() + Send>>,
    exited: bool,
}

/// What the tasks of the thread share.
pub(super) struct Core {
    state: RefCell<State>,
    shared: Arc<Shared>,
    cluster: ClusterId,
    reports: mpsc::Sender<DriverReport>,
    status: watch::Sender<Status>,
    /// The time to wake was changed, or the thread is to end.
    rewake: Notify,
}

/// Runs a volume until it is closed.
pub(super) async fn run(options: Options, shared: Arc<Shared>, status: watch::Sender<Status>) {
    let Options { cluster, driver: config, prefer, mut maps, reports, on_exit, clock } = options;
    let mut driver = Driver::new(config);
    driver.prefer(prefer);
    let state = State {
        driver,
        clock,
        out: Vec::new(),
        table: Table::default(),
        links: BTreeMap::new(),
        dialled: BTreeMap::new(),
        next_link: 0,
        written: Vec::new(),
        answers: Vec::new(),
        to_flush: Vec::new(),
        wake_at: Millis::NEVER,
        on_exit: Some(on_exit),
        exited: false,
    };
    let core = Rc::new(Core { state: RefCell::new(state), shared, cluster, reports, status, rewake: Notify::new() });
    core.take_map(&mut maps);
    // sleep: this is the driver's one timer; it is reset to each WakeAt.
    let sleep = tokio::time::sleep(Duration::ZERO);
    tokio::pin!(sleep);
    let mut set_for = Millis::NEVER;
    let mut maps_live = true;
    while !core.is_closing() {
        let wake_at = core.state.borrow().wake_at;
        if wake_at != set_for {
            set_for = wake_at;
            sleep.as_mut().reset(core.instant_of(wake_at));
        }
        tokio::select! {
            () = core.shared.wake.notified() => core.take_orders(),
            changed = maps.changed(), if maps_live => match changed {
                Ok(()) => core.take_map(&mut maps),
                Err(_) => maps_live = false,
            },
            () = core.rewake.notified() => {}
            () = &mut sleep, if set_for != Millis::NEVER => {
                set_for = Millis::NEVER;
                core.state.borrow_mut().wake_at = Millis::NEVER;
                core.feed([Input::Timer]);
            }
        }
    }
    core.close();
}

impl Core {
    fn is_closing(&self) -> bool {
        self.shared.closing.load(Ordering::Acquire)
    }

    fn instant_of(&self, at: Millis) -> Instant {
        let now = self.state.borrow_mut().clock.now();
        // A day is as good as never: the timer is set anew whenever the driver changes it.
        Instant::now() + Duration::from_millis(at.since(now).min(86_400_000))
    }

    /// The newest map of the source.
    fn take_map(self: &Rc<Self>, maps: &mut watch::Receiver<Option<lamina_protocol::map::VolumeMap>>) {
        let map = maps.borrow_and_update().clone();
        self.feed(map.map(Input::Map));
    }

    /// Everything that was handed in since the last time.
    fn take_orders(self: &Rc<Self>) {
        let orders = std::mem::take(&mut *self.shared.inbox());
        let inputs = orders.into_iter().filter_map(|order| match order {
            Order::Replayed => Some(Input::Replayed),
            Order::AskWritten(completions) => {
                let (tag, op) = self.state.borrow_mut().table.enter_question(completions);
                Some(Input::Submit { tag, op })
            }
            Order::Request(request, since) => {
                let mut state = self.state.borrow_mut();
                match state.table.enter(request, since) {
                    Ok((tag, op)) => Some(Input::Submit { tag, op }),
                    Err(answer) => {
                        state.answers.push(answer);
                        None
                    }
                }
            }
        });
        self.feed(inputs);
    }

    /// Hand inputs to the driver, then send, answer and tell what came of them.
    fn feed(self: &Rc<Self>, inputs: impl IntoIterator<Item = Input>) {
        let now = self.state.borrow_mut().clock.now();
        for input in inputs {
            let mut state = self.state.borrow_mut();
            if state.exited {
                break;
            }
            self.step(&mut state, now, input);
            while let Some(tag) = state.to_flush.pop() {
                self.step(&mut state, now, Input::Submit { tag, op: Op::Flush });
            }
        }
        self.finish_batch();
    }

    fn step(self: &Rc<Self>, state: &mut State, now: Millis, input: Input) {
        let mut out = std::mem::take(&mut state.out);
        state.driver.handle(now, input, &mut out);
        for output in out.drain(..) {
            self.carry_out(state, output);
        }
        state.out = out;
    }

    fn carry_out(self: &Rc<Self>, state: &mut State, output: Output) {
        match output {
            Output::Send { link, frame } => {
                let Some(open) = state.links.get(&link) else { return };
                open.link.push(&frame);
                if !open.link.in_batch.replace(true) {
                    let link = open.link.clone();
                    state.written.push(link);
                }
            }
            Output::Complete { tag, result } => match state.table.answered(tag, result, &self.shared.metrics) {
                Next::Answer(answer) => state.answers.push(answer),
                Next::Flush(tag) => state.to_flush.push(tag),
            },
            Output::WakeAt(at) => {
                state.wake_at = at;
                self.rewake.notify_one();
            }
            Output::Report(report) => {
                if self.reports.try_send(report).is_err() {
                    self.shared.metrics.reports_dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            Output::Connect { server, addresses } => self.connect(state, server, addresses),
            Output::Disconnect { link } => {
                if let Some(task) = state.links.remove(&link).and_then(|open| open.task) {
                    task.abort();
                }
            }
            Output::Exit => state.exited = true,
        }
    }

    /// After a batch: one write per connection, then the answers, with nothing borrowed.
    fn finish_batch(self: &Rc<Self>) {
        let (written, answers, exit) = {
            let mut state = self.state.borrow_mut();
            self.publish(&state);
            let exit = if state.exited { state.on_exit.take() } else { None };
            (std::mem::take(&mut state.written), std::mem::take(&mut state.answers), exit)
        };
        for link in written {
            link.in_batch.set(false);
            link.flush();
        }
        for answer in answers {
            answer.deliver();
        }
        if let Some(on_exit) = exit {
            self.leave(on_exit);
        }
    }

    /// A successor owns the device: the callback ends the process; should it come back, front ends are told.
    fn leave(&self, on_exit: Box<dyn FnOnce() + Send>) {
        self.shared.superseded.store(true, Ordering::Release);
        on_exit();
        let left = self.state.borrow_mut().table.fail_all(BlockError::Superseded);
        left.into_iter().for_each(Answer::deliver);
    }

    /// What others may know, if it has changed.
    fn publish(&self, state: &State) {
        let driver = &state.driver;
        let status = Status {
            size: driver.size().unwrap_or(0),
            generation: driver.generation(),
            serving: driver.is_serving(),
            owns_device: driver.owns_device(),
            ended: driver.has_ended(),
            superseded: state.exited,
        };
        self.shared.metrics.under_way.store(state.table.len() as u64, Ordering::Relaxed);
        if *self.status.borrow() != status {
            self.shared.size.store(status.size, Ordering::Release);
            self.shared.read_only.store(driver.read_only(), Ordering::Release);
            self.status.send_replace(status);
        }
    }

    fn connect(self: &Rc<Self>, state: &mut State, server: ServerId, addresses: Vec<String>) {
        let dialled = state.dialled.entry(server).or_default();
        if let Some(task) = dialled.task.take() {
            task.abort();
        }
        let (core, wait) = (self.clone(), pause(dialled.failures));
        dialled.task = Some(tokio::task::spawn_local(async move {
            // sleep: back-off before the next connection attempt; nothing tells when a server is back.
            tokio::time::sleep(wait).await;
            match dial(core.cluster, server, &addresses).await {
                Ok(stream) => core.connected(server, stream),
                Err(error) => {
                    tracing::info!(%server, %error, "storage server not reached");
                    let refused = error.refused();
                    core.count_failure(server);
                    core.feed([Input::Broken { server, link: None, refused }]);
                }
            }
        }));
    }

    fn count_failure(&self, server: ServerId) {
        self.shared.metrics.broken.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.borrow_mut();
        let dialled = state.dialled.entry(server).or_default();
        dialled.failures = dialled.failures.saturating_add(1);
        // This very task is the one that failed: it must not be aborted by the next dialling.
        dialled.task = None;
    }

    fn connected(self: &Rc<Self>, server: ServerId, stream: tokio::net::TcpStream) {
        self.shared.metrics.connections.fetch_add(1, Ordering::Relaxed);
        let id = {
            let mut state = self.state.borrow_mut();
            state.next_link += 1;
            let id = LinkId(state.next_link);
            state.dialled.entry(server).or_default().task = None;
            let link = Rc::new(Link::new(stream));
            let task = tokio::task::spawn_local(self.clone().serve_link(server, id, link.clone()));
            state.links.insert(id, Open { server, link, task: Some(task) });
            id
        };
        self.feed([Input::Connected { server, link: id }]);
    }

    /// Reads and writes one connection until it breaks.
    async fn serve_link(self: Rc<Self>, server: ServerId, id: LinkId, link: Rc<Link>) {
        let each_batch = |frames: &mut Vec<ReplyFrame>| {
            let inputs = frames.drain(..).map(|frame| {
                self.note_frame(server, &frame);
                Input::Frame { link: id, frame }
            });
            self.feed(inputs);
        };
        let error = tokio::select! {
            error = link.read_frames(each_batch) => error,
            error = link.write_rest() => error.into(),
        };
        tracing::info!(%server, %error, "connection to a storage server lost");
        let known = {
            let mut state = self.state.borrow_mut();
            // Its task is this one: it ends by itself.
            state.links.remove(&id).is_some_and(|open| open.server == server)
        };
        if known {
            self.count_failure(server);
            self.feed([Input::Broken { server, link: Some(id), refused: error.refused() }]);
        }
    }

    fn note_frame(&self, server: ServerId, frame: &ReplyFrame) {
        match frame.body {
            ReplyBody::Stale { .. } => {
                self.shared.metrics.stale.fetch_add(1, Ordering::Relaxed);
            }
            // A server that opens a handle is there: the next break is a first one.
            ReplyBody::Opened { .. } => {
                self.state.borrow_mut().dialled.entry(server).or_default().failures = 0;
            }
            _ => {}
        }
    }

    /// The volume is closed: connections end, what is unanswered fails.
    fn close(&self) {
        let left = {
            let mut state = self.state.borrow_mut();
            state.exited = true;
            let links = std::mem::take(&mut state.links).into_values().filter_map(|open| open.task);
            let dialling = std::mem::take(&mut state.dialled).into_values().filter_map(|dialled| dialled.task);
            links.chain(dialling).for_each(|task| task.abort());
            state.table.fail_all(BlockError::Io)
        };
        left.into_iter().for_each(Answer::deliver);
        for order in std::mem::take(&mut *self.shared.inbox()) {
            match order {
                Order::Request(request, _) => request.completions.complete(request.tag, Err(BlockError::Io)),
                Order::AskWritten(completions) => completions.complete(0, Err(BlockError::Io)),
                Order::Replayed => {}
            }
        }
    }
}
