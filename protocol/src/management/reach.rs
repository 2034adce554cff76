//! A leader that suspects itself asks those that answer whether they can reach those that do not (PROTOCOL.md §3.3).
//!
//! ```text
//! Suspected ── some server is asked, all that answer say no ──> Failed
//!     └──────── one reaches it: it stays Suspected, and is asked about again
//! ```
//! Invariant: without a single answer nobody is failed; whoever answers the leader itself is alive.

use super::heartbeat::Servers;
use super::volume::{Call, What};
use super::{Leader, Output, ServerHealth};
use crate::control::{ControlReply, ControlRequest};
use crate::ids::ServerId;
use crate::time::Millis;
use std::collections::BTreeMap;

/// Between two rounds of questions about one server, milliseconds.
const ROUND_MS: u64 = 5_000;
/// Servers that are asked about one.
const ASKED: usize = 5;

/// A round of questions about one server.
#[derive(Clone, Copy, Debug)]
struct Round {
    begun: Millis,
    open: usize,
    no: usize,
    yes: usize,
}

/// Rounds of questions, by the server that they are about.
#[derive(Debug, Default)]
pub(super) struct Rounds(BTreeMap<ServerId, Round>);

impl Leader {
    /// Asks about every server that is silent together with many others.
    pub(super) fn ask_about_suspects(&mut self, now: Millis, out: &mut Vec<Output>) {
        let in_health = |servers: &Servers, health| -> Vec<ServerId> {
            servers.by_id.keys().copied().filter(|id| servers.health(*id) == health).collect()
        };
        let suspects = in_health(&self.servers, ServerHealth::Suspected);
        self.rounds.0.retain(|id, _| suspects.contains(id));
        let askers: Vec<_> = in_health(&self.servers, ServerHealth::Alive).into_iter().take(ASKED).collect();
        for suspect in suspects {
            let due = self.rounds.0.get(&suspect).is_none_or(|round| now.since(round.begun) >= ROUND_MS);
            let object = self.servers.of(suspect).and_then(|s| s.object.as_ref());
            let addresses = object.map(|o| o.addresses.clone()).filter(|addresses| !addresses.is_empty());
            let Some(addresses) = addresses.filter(|_| due && !askers.is_empty()) else { continue };
            self.rounds.0.insert(suspect, Round { begun: now, open: askers.len(), no: 0, yes: 0 });
            for asker in &askers {
                let request = ControlRequest::Reach { server: suspect, addresses: addresses.clone() };
                self.ask(now, *asker, What::Reach(suspect), request, out);
            }
        }
    }

    pub(super) fn take_reached(&mut self, now: Millis, call: Call, suspect: ServerId, reply: Option<ControlReply>) {
        let Some(round) = self.rounds.0.get_mut(&suspect).filter(|round| round.begun == call.sent) else { return };
        round.open = round.open.saturating_sub(1);
        match reply {
            Some(ControlReply::Reached { server, reached: true }) if server == suspect => round.yes += 1,
            Some(ControlReply::Reached { server, reached: false }) if server == suspect => round.no += 1,
            // It answers nobody now, or is too old to know the question.
            _ => {}
        }
        if round.open == 0 && round.yes == 0 && round.no > 0 {
            self.servers.unreached(now, suspect);
        }
    }
}
