//! The leader's end of a session.

use super::{QUEUE_WORDS, ServerIdentity, ServerWord, call_message, word_from};
use crate::edge::{Malformed, id_bytes, id_from};
use crate::{MAX_SESSION_MESSAGE_BYTES, VERSION, v1};
use lamina_protocol::control::ControlRequest;
use lamina_protocol::ids::{ClusterId, ServerId};
use lamina_protocol::storage_server::CallId;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use v1::storage_control_client::StorageControlClient;

/// How long a connection may take to be made, handshake included.
const PATIENCE: Duration = Duration::from_secs(3);
/// A connection on which nothing is heard is asked for a sign of life this often.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Whom the leader expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The cluster.
    pub cluster: ClusterId,
    /// The server; none = whoever is there.
    pub server: ServerId,
}

/// Why there is no session. The caller tries again, with a pause.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address does not parse, or nobody is there.
    #[error("cannot connect: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Nobody answered in time.
    #[error("no answer in time")]
    Silent,
    /// Somebody else is there, or an older or newer version.
    #[error("refused: {}", .0.message())]
    Refused(Box<Status>),
    /// What came is not the answer to a `hello`.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The server closed the stream before its `hello`.
    #[error("the server closed the stream")]
    Closed,
}

/// A session that was made.
#[derive(Debug)]
pub struct Connected {
    /// Who is there.
    pub server: ServerIdentity,
    /// Where calls go in.
    pub caller: Caller,
    /// Where the server's words come out.
    pub words: Words,
}

/// Hands calls in; may be cloned. The session ends when the last one and [`Words`] are dropped.
#[derive(Clone, Debug)]
pub struct Caller {
    calls: mpsc::Sender<v1::ToServer>,
}

/// The server's words.
#[derive(Debug)]
pub struct Words {
    stream: Streaming<v1::FromServer>,
}

/// Dials `http://host:port` and says `hello`.
pub async fn connect(address: &str, expected: Expected) -> Result<Connected, ConnectError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(PATIENCE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(PATIENCE)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect().await?;
    connect_over(channel, expected).await
}

/// Says `hello` over a channel that the caller made.
pub async fn connect_over(channel: Channel, expected: Expected) -> Result<Connected, ConnectError> {
    tokio::time::timeout(PATIENCE, greet(channel, expected)).await.map_err(|_| ConnectError::Silent)?
}

async fn greet(channel: Channel, expected: Expected) -> Result<Connected, ConnectError> {
    let (calls, outgoing) = mpsc::channel(QUEUE_WORDS);
    let hello = v1::LeaderHello {
        cluster: id_bytes(expected.cluster.0),
        server: id_bytes(expected.server.0),
        min_version: VERSION,
        max_version: VERSION,
    };
    let word = v1::ToServer { word: Some(v1::to_server::Word::Hello(hello)) };
    calls.try_send(word).expect("the queue is new and empty");
    let mut client = StorageControlClient::new(channel).max_decoding_message_size(MAX_SESSION_MESSAGE_BYTES);
    let refused = |status| ConnectError::Refused(Box::new(status));
    let mut stream = client.session(ReceiverStream::new(outgoing)).await.map_err(refused)?.into_inner();
    let first = stream.message().await.map_err(refused)?.ok_or(ConnectError::Closed)?;
    let server = identity_from(first)?;
    Ok(Connected { server, caller: Caller { calls }, words: Words { stream } })
}

fn identity_from(message: v1::FromServer) -> Result<ServerIdentity, Malformed> {
    match message.word {
        Some(v1::from_server::Word::Hello(hello)) if hello.version == VERSION => Ok(ServerIdentity {
            cluster: ClusterId(id_from("cluster", &hello.cluster)?),
            server: ServerId(id_from("server", &hello.server)?),
            process: id_from("process", &hello.process)?,
            addresses: hello.addresses,
        }),
        _ => Err(Malformed::OutOfTurn),
    }
}

/// The call was not sent: the stream is gone, or its queue is full because the server takes nothing. Either way the
/// session is to be dropped, and the call is unreachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the session takes no more calls")]
pub struct Unreachable;

impl Caller {
    /// Sends a call behind the others; never waits.
    pub fn call(&self, call: CallId, request: &ControlRequest) -> Result<(), Unreachable> {
        self.calls.try_send(call_message(call, request)).map_err(|_| Unreachable)
    }
}

impl Words {
    /// The next word; `None` when the stream is over. May be dropped and called again.
    pub async fn next(&mut self) -> Option<Result<ServerWord, Malformed>> {
        // A status at the end says no more than that it is over: the caller reconnects.
        self.stream.message().await.ok().flatten().map(word_from)
    }
}
