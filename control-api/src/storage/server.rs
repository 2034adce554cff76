//! The server's end of a session.

use super::{QUEUE_WORDS, ServerIdentity, ServerWord, call_from, word_message};
use crate::edge::{Malformed, id_bytes, id_from};
use crate::{MAX_SESSION_MESSAGE_BYTES, VERSION, v1};
use lamina_protocol::control::ControlRequest;
use lamina_protocol::storage_server::CallId;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use v1::storage_control_server::{StorageControl, StorageControlServer};

/// Sessions that may wait to be taken by the server's loop.
const WAITING_SESSIONS: usize = 16;

/// Who is here, as it changes: a server without devices has no id yet.
pub type Presence = watch::Receiver<ServerIdentity>;

/// The gRPC service of a storage server; hands each session that said a fitting `hello` to the server's loop.
#[derive(Debug)]
pub struct Service {
    presence: Presence,
    sessions: mpsc::Sender<Session>,
}

/// One session of a leader. Dropping it ends the stream.
#[derive(Debug)]
pub struct Session {
    calls: Streaming<v1::ToServer>,
    answers: Answerer,
}

/// Where a session's words go.
#[derive(Clone, Debug)]
pub struct Answerer {
    words: mpsc::Sender<Result<v1::FromServer, Status>>,
}

/// A word was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// The leader does not take its words. Drop the session if it was an answer; drop the word if it was unasked.
    #[error("the leader takes no words")]
    Full,
    /// The stream is over.
    #[error("the session is over")]
    Over,
}

impl Service {
    /// The service, and where its sessions come out.
    pub fn new(presence: Presence) -> (StorageControlServer<Self>, mpsc::Receiver<Session>) {
        let (sessions, taken) = mpsc::channel(WAITING_SESSIONS);
        let server = StorageControlServer::new(Self { presence, sessions });
        (server.max_decoding_message_size(MAX_SESSION_MESSAGE_BYTES), taken)
    }

    fn check(&self, first: Option<v1::ToServer>) -> Result<ServerIdentity, Status> {
        let Some(v1::ToServer { word: Some(v1::to_server::Word::Hello(hello)) }) = first else {
            return Err(Malformed::OutOfTurn.into());
        };
        let here = self.presence.borrow().clone();
        let server = id_from("server", &hello.server)?;
        if id_from("cluster", &hello.cluster)? != here.cluster.0 {
            return Err(Status::failed_precondition("this server belongs to another cluster"));
        }
        if server != 0 && server != here.server.0 {
            return Err(Status::failed_precondition("another server is at this address"));
        }
        if !(hello.min_version..=hello.max_version).contains(&VERSION) {
            return Err(Status::failed_precondition(format!("this server speaks version {VERSION} only")));
        }
        Ok(here)
    }
}

#[tonic::async_trait]
impl StorageControl for Service {
    type SessionStream = ReceiverStream<Result<v1::FromServer, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::ToServer>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut calls = request.into_inner();
        let here = self.check(calls.message().await?)?;
        let (words, outgoing) = mpsc::channel(QUEUE_WORDS);
        let hello = v1::ServerHello {
            cluster: id_bytes(here.cluster.0),
            server: id_bytes(here.server.0),
            version: VERSION,
            process: id_bytes(here.process),
            addresses: here.addresses,
        };
        let first = v1::FromServer { word: Some(v1::from_server::Word::Hello(hello)) };
        words.try_send(Ok(first)).expect("the queue is new and empty");
        let session = Session { calls, answers: Answerer { words } };
        // Waits while the loop has sixteen others to take; a stopped loop is a stopping process.
        self.sessions.send(session).await.map_err(|_| Status::unavailable("the server stops"))?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

impl Session {
    /// The next call; `None` when the leader is gone. May be dropped and called again.
    pub async fn next(&mut self) -> Option<Result<(CallId, ControlRequest), Malformed>> {
        self.calls.message().await.ok().flatten().map(call_from)
    }

    /// Where words go.
    pub fn answerer(&self) -> Answerer {
        self.answers.clone()
    }

    /// Ends the session and tells the leader why, if it still listens.
    pub fn end(self, why: Malformed) {
        // A leader that takes no words learns from the end of the stream.
        let _ = self.answers.words.try_send(Err(why.into()));
    }
}

impl Answerer {
    /// Sends a word behind the others; never waits.
    pub fn say(&self, word: &ServerWord) -> Result<(), NotSent> {
        self.words.try_send(Ok(word_message(word))).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => NotSent::Full,
            mpsc::error::TrySendError::Closed(_) => NotSent::Over,
        })
    }

    /// Waits until nobody listens any more.
    pub async fn over(&self) {
        self.words.closed().await;
    }
}
