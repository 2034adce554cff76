//! The leader's conversation with one storage server: [`connect`] for the leader, [`Service`] for the server.
//!
//! ```text
//! leader                       server
//!   hello {cluster, server} ->            refused: FAILED_PRECONDITION
//!                           <- hello {cluster, server, process}
//!   call ->                 <- answer     answers in any order
//!                           <- ask_map, stale_seen   unasked
//! ```
//! Invariants: calls arrive in the order in which they were sent; queues hold [`QUEUE_WORDS`] words; a server whose queue
//! to the leader is full drops what was unasked (both are told again by later requests), and ends the stream rather than
//! lose an answer.

use crate::edge::{Malformed, id_bytes, id_from, value_from};
use crate::v1;
use lamina_protocol::codec::encode;
use lamina_protocol::control::{ControlReply, ControlRequest};
use lamina_protocol::ids::{ClusterId, Generation, ServerId, SessionId, VolumeId};
use lamina_protocol::storage_server::{CallId, StaleSeen};

mod caller;
mod server;

pub use caller::{Caller, ConnectError, Connected, Expected, Unreachable, Words, connect, connect_over};
pub use server::{Answerer, NotSent, Presence, Service, Session};

/// Words that may wait in one direction of a session.
pub const QUEUE_WORDS: usize = 1024;

/// What a server says in a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerWord {
    /// The answer to a call.
    Answer {
        /// Which.
        call: CallId,
        /// It.
        reply: ControlReply,
    },
    /// It wants the committed map of a volume.
    AskMap {
        /// Which.
        volume: VolumeId,
        /// At least this new.
        at_least: Generation,
    },
    /// It answered a request `Stale` or `Ended`.
    StaleSeen(StaleSeen),
}

/// Who answered a `hello`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerIdentity {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its id; none while it has no device.
    pub server: ServerId,
    /// Minted at the start of its process: another value is a restart.
    pub process: u128,
    /// `host:port` of its block listener, in the order in which to try them.
    pub addresses: Vec<String>,
}

fn call_message(call: CallId, request: &ControlRequest) -> v1::ToServer {
    let call = v1::Call { call: call.0, request: encode(request) };
    v1::ToServer { word: Some(v1::to_server::Word::Call(call)) }
}

fn call_from(message: v1::ToServer) -> Result<(CallId, ControlRequest), Malformed> {
    match message.word {
        Some(v1::to_server::Word::Call(call)) => Ok((CallId(call.call), value_from("request", &call.request)?)),
        _ => Err(Malformed::OutOfTurn),
    }
}

fn word_message(word: &ServerWord) -> v1::FromServer {
    use v1::from_server::Word;
    let word = match word {
        ServerWord::Answer { call, reply } => Word::Answer(v1::Answer { call: call.0, reply: encode(reply) }),
        ServerWord::AskMap { volume, at_least } => {
            Word::AskMap(v1::AskMap { volume: id_bytes(volume.0), at_least: at_least.0 })
        }
        ServerWord::StaleSeen(seen) => Word::StaleSeen(v1::StaleSeen {
            volume: id_bytes(seen.volume.0),
            session: id_bytes(seen.session.0),
            had: seen.had.0,
            need: seen.need.0,
        }),
    };
    v1::FromServer { word: Some(word) }
}

fn word_from(message: v1::FromServer) -> Result<ServerWord, Malformed> {
    use v1::from_server::Word;
    Ok(match message.word {
        Some(Word::Answer(answer)) => {
            ServerWord::Answer { call: CallId(answer.call), reply: value_from("reply", &answer.reply)? }
        }
        Some(Word::AskMap(ask)) => {
            ServerWord::AskMap { volume: VolumeId(id_from("volume", &ask.volume)?), at_least: Generation(ask.at_least) }
        }
        Some(Word::StaleSeen(seen)) => ServerWord::StaleSeen(StaleSeen {
            volume: VolumeId(id_from("volume", &seen.volume)?),
            session: SessionId(id_from("session", &seen.session)?),
            had: Generation(seen.had),
            need: Generation(seen.need),
        }),
        Some(Word::Hello(_)) | None => return Err(Malformed::OutOfTurn),
    })
}

#[cfg(test)]
mod tests;
