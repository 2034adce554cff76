//! Trying to reach another server, because a leader that suspects itself asks (PROTOCOL.md §3.3).
//!
//! Invariant: every question is answered, at the latest after [`REACH_MS`]; reached is who took a connection and said hello
//! as the server that was expected.

use super::contract::{CallId, Output, PeerId};
use super::{Due, StorageServer};
use crate::control::ControlReply;
use crate::ids::ServerId;

/// A server that took no connection for so long is not reached, milliseconds.
const REACH_MS: u64 = 2_000;
/// Questions under way; one more is answered at once, with no.
const MAX_TRIES: usize = 64;

/// A question under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Try {
    call: CallId,
    server: ServerId,
}

impl StorageServer {
    pub(super) fn reach(&mut self, call: CallId, server: ServerId, addresses: Vec<String>) {
        if self.tries.len() >= MAX_TRIES || addresses.is_empty() {
            let reply = ControlReply::Reached { server, reached: false };
            return self.out.push(Output::ControlReply { call, reply });
        }
        let peer = PeerId(self.mint());
        self.tries.insert(peer, Try { call, server });
        self.out.push(Output::PeerConnect { peer, server, addresses });
        self.due(self.now.after(REACH_MS), Due::Reach(peer));
    }

    /// A try is over; `false` = this peer is none.
    pub(super) fn tried(&mut self, peer: PeerId, reached: bool) -> bool {
        let Some(Try { call, server }) = self.tries.remove(&peer) else { return false };
        self.out.push(Output::PeerClose { peer });
        self.out.push(Output::ControlReply { call, reply: ControlReply::Reached { server, reached } });
        true
    }
}
