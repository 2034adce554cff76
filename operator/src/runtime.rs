//! The leader at work: one task owns the state machine, hands it what happens and carries out what it says.
//!
//! Invariants: inputs are taken one at a time; outputs are carried out in their order; every queue is bounded (what a full
//! one means is said where it is made); at a fail point nothing later of the same call is done. Writes are carried out in
//! tasks of their own, at most one per volume by the leader's own rules, and their answers come back as inputs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use lamina_protocol::ids::{ClusterId, ServerId, VolumeId};
use lamina_protocol::management::{
    CallId, Config, FillBudget, Input, Leader, Source, Status, Step, VolumeObject, Written,
};
use lamina_protocol::time::Millis;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::front::Front;
use crate::metrics::{Metrics, Named};
use crate::store::{Change, KnownServer, Notice, Store};
use connection::{Connection, Target, Word};
use shown::Shown;

pub mod clock;
mod connection;
mod outputs;
mod shown;

/// Words of servers and drivers that may wait for the leader; senders wait then, drivers are told `Busy`.
const QUEUE: usize = 4096;
/// Events that may wait to be told; more are dropped and counted.
const NOTICES: usize = 256;

/// How a leader is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The installation.
    pub cluster: ClusterId,
    /// Mints ids.
    pub mint: fn() -> u128,
    /// What fills of all volumes may take together.
    pub fill_budget: FillBudget,
    /// Dies there: for tests of what a successor finds.
    pub die_at: Option<FailPoint>,
    /// What is counted.
    pub metrics: Metrics,
    /// Where drivers ask.
    pub front: Front,
    /// Ends it when true.
    pub stop: watch::Receiver<bool>,
}

/// A step of a change at which the process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailPoint {
    /// Which.
    pub step: Step,
    /// At the how-manieth time; the first is 1.
    pub time: u32,
}

/// A text that names no step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a fail point is STEP or STEP:N, such as Committed or Fenced:2; steps: {}", steps())]
pub struct NoSuchStep;

fn steps() -> String {
    Step::ALL.map(|step| format!("{step:?}")).join(", ")
}

impl std::str::FromStr for FailPoint {
    type Err = NoSuchStep;

    fn from_str(text: &str) -> Result<Self, NoSuchStep> {
        let (name, time) = text.split_once(':').unwrap_or((text, "1"));
        let step = Step::ALL.into_iter().find(|step| format!("{step:?}").eq_ignore_ascii_case(name));
        let time = time.parse().ok().filter(|time| *time > 0);
        Ok(Self { step: step.ok_or(NoSuchStep)?, time: time.ok_or(NoSuchStep)? })
    }
}

/// How a leader ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to stop, or the store gave up its watch.
    Stopped,
    /// It came to its fail point: the process is to be gone at once.
    Died(Step),
}

/// What a task of the runtime brings back.
enum Done {
    Written { volume: VolumeId, call: CallId, outcome: Written, next: Option<Box<Status>> },
    Read { volume: VolumeId, object: Option<Box<VolumeObject>> },
    Described { what: shown::Key, worked: bool },
    Nothing,
}

struct Runtime {
    leader: Leader,
    options: Options,
    store: Arc<dyn Store>,
    connections: BTreeMap<String, Connection>,
    servers: BTreeMap<String, KnownServer>,
    by_id: BTreeMap<ServerId, String>,
    words: mpsc::Sender<Word>,
    notices: mpsc::Sender<Notice>,
    work: JoinSet<Done>,
    shown: Shown,
    /// Inputs that follow from outputs, taken before all others.
    follow: VecDeque<Input>,
    wake: Millis,
    passed: u32,
}

/// Runs a leader until it is stopped.
pub async fn run(options: Options, store: Arc<dyn Store>, mut changes: mpsc::Receiver<Change>) -> Ended {
    let (words, mut said) = mpsc::channel(QUEUE);
    let (reports, mut reported) = mpsc::channel(QUEUE);
    let (notices, told) = mpsc::channel(NOTICES);
    options.front.open(reports);
    let front = options.front.clone();
    let mut stop = options.stop.clone();
    let mut runtime = Runtime::new(options, Arc::clone(&store), words, notices);
    runtime.work.spawn(shown::tell_notices(store, told));
    let ended = loop {
        runtime.shown_again();
        let step = tokio::select! {
            biased;
            () = stopped(&mut stop) => break Ended::Stopped,
            Some(done) = runtime.work.join_next() => runtime.take_done(done),
            change = changes.recv() => match change {
                Some(change) => runtime.take_change(change),
                None => break Ended::Stopped,
            },
            Some(word) = said.recv() => runtime.take_word(word),
            Some(report) = reported.recv() => {
                runtime.options.metrics.reports.inc();
                runtime.take(report)
            }
            // sleep: this is the leader's one timer, armed by WakeAt.
            () = tokio::time::sleep(clock::until(runtime.wake)) => runtime.take(Input::Timer),
        };
        runtime.options.metrics.beat();
        if let Err(died) = step {
            break Ended::Died(died.0);
        }
    };
    front.close();
    ended
}

/// Waits until the word to stop is given, or nobody is left to give it.
pub async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error says that nobody is left.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The fail point was reached.
struct Died(Step);

impl Runtime {
    fn new(options: Options, store: Arc<dyn Store>, words: mpsc::Sender<Word>, notices: mpsc::Sender<Notice>) -> Self {
        let config = Config::new(options.cluster, Box::new(options.mint));
        let leader = Leader::new(Config { fill_budget: options.fill_budget, ..config });
        Self {
            leader,
            options,
            store,
            connections: BTreeMap::new(),
            servers: BTreeMap::new(),
            by_id: BTreeMap::new(),
            words,
            notices,
            work: JoinSet::new(),
            shown: Shown::default(),
            follow: VecDeque::new(),
            wake: Millis::NEVER,
            passed: 0,
        }
    }

    /// Takes an input and everything that follows from it at once.
    fn take(&mut self, input: Input) -> Result<(), Died> {
        self.follow.push_back(input);
        while let Some(input) = self.follow.pop_front() {
            let touched = volume_of(&input);
            let mut outputs = Vec::new();
            self.leader.handle(clock::now(), input, &mut outputs);
            for output in outputs {
                self.carry_out(output)?;
            }
            if let Some(volume) = touched {
                self.volume_moved(volume);
            }
        }
        Ok(())
    }

    fn take_word(&mut self, word: Word) -> Result<(), Died> {
        match word {
            Word::Said(input) => {
                if matches!(*input, Input::Stale { .. }) {
                    self.options.metrics.stale.inc();
                }
                self.take(*input)
            }
            Word::Met { name, identity } => {
                if self.store.meets_servers() {
                    let store = Arc::clone(&self.store);
                    self.work.spawn(async move {
                        if let Err(why) = store.server_met(&name, &identity).await {
                            tracing::warn!(server = name, %why, "who the server is could not be noted");
                        }
                        Done::Nothing
                    });
                }
                Ok(())
            }
        }
    }

    fn take_change(&mut self, change: Change) -> Result<(), Died> {
        match change {
            Change::Listed => {
                self.options.metrics.set_ready(true);
                self.take(Input::Listed)
            }
            Change::Volume(object) => self.take(Input::Volume { object: *object, source: Source::Watched }),
            Change::VolumeGone(volume) => {
                self.options.front.withdraw(volume);
                self.shown.forget_volume(volume);
                self.take(Input::VolumeGone { volume })
            }
            Change::Server(known) => self.take_server(known),
            Change::ServerGone(name) => self.take_server_gone(&name),
            Change::Policy { name, policy, volumes } => {
                self.shown.policy(name, policy, volumes);
                Ok(())
            }
            Change::PolicyGone(name) => {
                self.shown.forget_policy(&name);
                Ok(())
            }
            Change::LeaseNumber(number) => self.take(Input::LeaseNumber(number)),
        }
    }

    fn take_server(&mut self, known: KnownServer) -> Result<(), Died> {
        let name = known.name.clone();
        let before = self.servers.insert(name.clone(), known.clone());
        self.tell_devices(&known, before.as_ref());
        if let Some(gone) = before.filter(|b| b.id() != known.id() && !b.id().is_none()) {
            self.by_id.remove(&gone.id());
            self.take(Input::ServerGone { server: gone.id() })?;
        }
        self.reconnect(&known);
        if known.id().is_none() {
            return Ok(());
        }
        let owner = self.by_id.entry(known.id()).or_insert_with(|| name.clone());
        if *owner != name {
            tracing::error!(server = name, owner, "two StorageServers carry the same id: the later one is left alone");
            return Ok(());
        }
        self.shown.server_moved(&name);
        self.take(Input::Server(known.object))
    }

    fn take_server_gone(&mut self, name: &str) -> Result<(), Died> {
        self.disconnect(name);
        let Some(known) = self.servers.remove(name) else { return Ok(()) };
        self.shown.forget_server(name);
        if self.by_id.get(&known.id()).is_some_and(|owner| owner == name) {
            self.by_id.remove(&known.id());
            return self.take(Input::ServerGone { server: known.id() });
        }
        Ok(())
    }

    fn disconnect(&mut self, name: &str) {
        let unanswered = self.connections.remove(name).map(Connection::end);
        self.follow.extend(unanswered.into_iter().flatten());
    }

    /// Makes the connection to a server anew if it is to go elsewhere.
    fn reconnect(&mut self, known: &KnownServer) {
        let target = Target {
            name: known.name.clone(),
            cluster: self.options.cluster,
            server: known.id(),
            addresses: known.control.clone(),
        };
        if self.connections.get(&known.name).is_some_and(|c| c.target == target) {
            return;
        }
        self.disconnect(&known.name);
        let dialled = !target.server.is_none() || self.store.meets_servers();
        if dialled && !target.addresses.is_empty() {
            let connection = Connection::start(target, self.words.clone());
            self.connections.insert(known.name.clone(), connection);
        }
    }

    fn take_done(&mut self, done: Result<Done, tokio::task::JoinError>) -> Result<(), Died> {
        match done.expect("a task of the runtime does not panic and is not aborted while it runs") {
            Done::Written { volume, call, outcome, next } => {
                let name = format!("{outcome:?}");
                self.options.metrics.writes.get_or_create(&Named { name }).inc();
                if let (Written::Done, Some(map)) = (outcome, next.as_ref().and_then(|next| next.map.as_ref())) {
                    self.options.front.publish(volume, Some(map));
                }
                self.take(Input::Written { call, outcome })?;
                self.volume_moved(volume);
                Ok(())
            }
            Done::Read { object: Some(object), .. } => {
                self.take(Input::Volume { object: *object, source: Source::Read })
            }
            Done::Read { volume, object: None } => self.take(Input::VolumeGone { volume }),
            Done::Described { what, worked } => {
                self.shown.described(what, worked);
                Ok(())
            }
            Done::Nothing => Ok(()),
        }
    }

    /// The leader's object of a volume may have changed: drivers and people are told.
    fn volume_moved(&mut self, volume: VolumeId) {
        let Some(object) = self.leader.volume(volume) else { return };
        self.options.front.publish(volume, object.status.map.as_ref());
        self.shown.volume_moved(volume);
    }
}

fn volume_of(input: &Input) -> Option<VolumeId> {
    match input {
        Input::Volume { object, .. } => Some(object.id),
        _ => None,
    }
}
