//! One server: a stream that is made again whenever it breaks, and the calls on it.
//!
//! Invariants: calls go out in the order in which they were given; each is answered exactly once, by its reply or by
//! `Unreachable`, also when the stream breaks, the queue is full or the server takes nothing; nothing waits for a server
//! that is not there longer than one try to connect.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lamina_control_api::storage::{Caller, Connected, Expected, ServerIdentity, ServerWord, Words, connect};
use lamina_protocol::control::ControlRequest;
use lamina_protocol::ids::{ClusterId, ServerId};
use lamina_protocol::management::{CallId, Input};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Calls that may wait for one server; a full queue makes it unreachable.
const QUEUE: usize = 1024;
/// Between two tries to connect, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// And at most: a heartbeat's time, so that a server that is back is seen at once.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Where a server is and who is expected there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) cluster: ClusterId,
    /// None = whoever is there.
    pub(super) server: ServerId,
    pub(super) addresses: Vec<String>,
}

/// What connections tell the runtime.
#[derive(Debug)]
pub(super) enum Word {
    Said(Box<Input>),
    Met { name: String, identity: Box<ServerIdentity> },
}

/// Calls that were given and not answered yet.
type Open = Arc<Mutex<BTreeSet<CallId>>>;

fn lock(open: &Open) -> MutexGuard<'_, BTreeSet<CallId>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running connection; ends when dropped.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) target: Target,
    calls: mpsc::Sender<(CallId, ControlRequest)>,
    open: Open,
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    pub(super) fn start(target: Target, words: mpsc::Sender<Word>) -> Self {
        let (calls, taken) = mpsc::channel(QUEUE);
        let open = Open::default();
        let line = Line { target: target.clone(), words, open: Arc::clone(&open), failure: String::new() };
        let task = tokio::spawn(line.run(taken)).abort_handle();
        Self { target, calls, open, task }
    }

    /// Hands a call in; `false` = unreachable.
    pub(super) fn call(&self, call: CallId, request: ControlRequest) -> bool {
        lock(&self.open).insert(call);
        let queued = self.calls.try_send((call, request)).is_ok();
        if !queued {
            lock(&self.open).remove(&call);
        }
        queued
    }

    /// Ends it; gives what nobody will answer any more.
    pub(super) fn end(self) -> Vec<Input> {
        self.task.abort();
        let open = std::mem::take(&mut *lock(&self.open));
        open.into_iter().map(|call| Input::Unreachable { server: self.target.server, call }).collect()
    }
}

type Calls = mpsc::Receiver<(CallId, ControlRequest)>;

struct Line {
    target: Target,
    words: mpsc::Sender<Word>,
    open: Open,
    /// Of the last try, so that it is logged once.
    failure: String,
}

/// The runtime, or this connection's owner, is gone.
struct Over;

impl Line {
    async fn run(mut self, mut calls: Calls) {
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(connected) = self.dial().await {
                pause = FIRST_PAUSE;
                if self.talk(connected, &mut calls).await.is_err() {
                    return;
                }
                tracing::info!(server = self.target.name, "the control stream is over");
            }
            if self.refuse_for(pause, &mut calls).await.is_err() {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn dial(&mut self) -> Option<Connected> {
        let expected = Expected { cluster: self.target.cluster, server: self.target.server };
        for address in &self.target.addresses {
            match connect(address, expected).await {
                Ok(connected) => {
                    tracing::info!(server = self.target.name, address, "the control stream is open");
                    self.failure.clear();
                    return Some(connected);
                }
                Err(why) => {
                    let why = why.to_string();
                    if why != self.failure {
                        tracing::warn!(server = self.target.name, address, why, "no control stream");
                        self.failure = why;
                    }
                }
            }
        }
        None
    }

    async fn talk(&self, connected: Connected, calls: &mut Calls) -> Result<(), Over> {
        let Connected { server, caller, mut words } = connected;
        let id = server.server;
        let name = self.target.name.clone();
        self.tell(Word::Met { name, identity: Box::new(server) }).await?;
        if id.is_none() {
            return Ok(());
        }
        let mut sent = BTreeSet::new();
        let result = self.converse(id, &caller, &mut words, calls, &mut sent).await;
        for call in sent {
            self.answer(call, Input::Unreachable { server: id, call }).await?;
        }
        result
    }

    async fn converse(
        &self,
        id: ServerId,
        caller: &Caller,
        words: &mut Words,
        calls: &mut Calls,
        sent: &mut BTreeSet<CallId>,
    ) -> Result<(), Over> {
        loop {
            tokio::select! {
                call = calls.recv() => {
                    let Some((call, request)) = call else { return Err(Over) };
                    sent.insert(call);
                    if caller.call(lamina_protocol::storage_server::CallId(call.0), &request).is_err() {
                        return Ok(());
                    }
                }
                word = words.next() => {
                    let said = match word {
                        None => return Ok(()),
                        Some(Err(why)) => {
                            tracing::error!(server = self.target.name, %why, "the server does not make sense");
                            return Ok(());
                        }
                        Some(Ok(word)) => word,
                    };
                    self.hear(id, said, sent).await?;
                }
            }
        }
    }

    /// Answers every call that waits or comes within the pause.
    async fn refuse_for(&self, pause: Duration, calls: &mut Calls) -> Result<(), Over> {
        // sleep: back-off between connection attempts; calls are refused meanwhile.
        let end = tokio::time::sleep(pause);
        tokio::pin!(end);
        loop {
            tokio::select! {
                biased;
                call = calls.recv() => {
                    let Some((call, _)) = call else { return Err(Over) };
                    self.answer(call, Input::Unreachable { server: self.target.server, call }).await?;
                }
                () = &mut end => return Ok(()),
            }
        }
    }

    /// What a server's word means to the leader; an answer to no open call means nothing.
    async fn hear(&self, server: ServerId, word: ServerWord, sent: &mut BTreeSet<CallId>) -> Result<(), Over> {
        match word {
            ServerWord::Answer { call, reply } => {
                let call = CallId(call.0);
                if sent.remove(&call) { self.answer(call, Input::Reply { server, call, reply }).await } else { Ok(()) }
            }
            ServerWord::AskMap { volume, at_least } => {
                self.tell(Word::Said(Box::new(Input::MapWanted { server, volume, at_least }))).await
            }
            ServerWord::StaleSeen(seen) => self.tell(Word::Said(Box::new(Input::Stale { server, seen }))).await,
        }
    }

    /// Answers a call, unless its owner has given the connection up meanwhile.
    async fn answer(&self, call: CallId, answer: Input) -> Result<(), Over> {
        // The room first: between taking the call out and telling there is nothing that may be aborted.
        let room = self.words.reserve().await.map_err(|_| Over)?;
        if lock(&self.open).remove(&call) {
            room.send(Word::Said(Box::new(answer)));
        }
        Ok(())
    }

    async fn tell(&self, word: Word) -> Result<(), Over> {
        self.words.send(word).await.map_err(|_| Over)
    }
}
