//! What the driver does by itself: flushes, `confirmed`, the end of a replay, the one timer (PROTOCOL.md §5; H5, H20).
//!
//! Invariants: `confirmed` rises only when a flush was answered by all, and only to what was acknowledged before it was
//! sent; an idle driver has flushed and confirmed within [`IDLE_CONFIRM_MS`] and a round trip, and then sets no timer.

use super::op::{Broadcast, Kind, Op, OpId, Origin, Purpose};
use super::peer::Link;
use super::{Driver, Output, Phase, Replay};
use crate::control::Trouble;
use crate::ids::{Incarnation, Seq};
use crate::limits::{IDLE_CONFIRM_MS, STALL_TIMEOUT_MS};
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use bytes::Bytes;

/// A driver that is never idle and never told to flush does it after this long, so that pending pages stay few.
const UNFLUSHED_MAX_MS: u64 = 5_000;
/// A connection on which nothing has come for so long although something is owed is made anew.
const SILENT_LINK_MS: u64 = 3 * STALL_TIMEOUT_MS;

impl Driver {
    /// Begin something of the driver's own that goes to every serving server.
    pub(super) fn tell_all(&mut self, purpose: Purpose, broadcast: Broadcast) {
        let id = self.enter(Op::new(Origin::Own(purpose), Kind::Broadcast(broadcast)));
        let queue = if purpose.handles_loss() { &mut self.ready_first } else { &mut self.ready };
        queue.push_back(id);
    }

    /// Flush, if the driver's own flush is not on its way.
    pub(super) fn flush_by_itself(&mut self) {
        if !self.own_flush && self.kept.unflushed() {
            self.own_flush = true;
            self.tell_all(Purpose::Flush, Broadcast::Flush { covers: Seq(0), acks: 0 });
        }
    }

    /// Every serving server has answered.
    pub(super) fn broadcast_answered(&mut self, id: OpId, broadcast: Broadcast) {
        if let Broadcast::Flush { covers, acks } = broadcast {
            let acks = if on(Mutant::FlushCoversLater) { self.kept.acks() } else { acks };
            self.flushed(covers, acks);
        }
        let op = self.finish(id, Ok(Bytes::new()));
        let Origin::Own(purpose) = op.origin else { return };
        match (purpose, broadcast) {
            (Purpose::Flush, _) => {
                self.own_flush = false;
                self.look_at_idleness();
            }
            (Purpose::RewriteFlush, _) => self.rewrites_flushed(),
            (Purpose::SayHandled, Broadcast::Handled(loss)) => self.loss_handled(loss),
            (Purpose::ReplayFlush, _) => {
                self.replay = Replay::Over;
                self.tell_all(Purpose::Adopt, Broadcast::Adopt(Incarnation(self.incarnation.0 - 1)));
            }
            (Purpose::Confirm | Purpose::Adopt | Purpose::Rewrite | Purpose::SayHandled, _) => {}
        }
        if !self.awaiting_room.is_empty() {
            self.admit_waiting();
        }
    }

    /// A flush was answered by all that serve: what was acknowledged before it was sent is durable everywhere.
    fn flushed(&mut self, covers: Seq, acks: u64) {
        self.seqs.confirm(covers);
        self.kept.flushed(acks);
        self.unflushed_since = self.kept.unflushed().then_some(self.changed_at);
        if self.wants_confirming() {
            self.wake_by(self.now.after(IDLE_CONFIRM_MS));
        }
    }

    fn wants_confirming(&self) -> bool {
        let confirmed = self.seqs.confirmed();
        self.peers.values().any(|peer| peer.told_confirmed < confirmed)
    }

    /// The kernel side has given back everything that the process before left unanswered.
    pub(super) fn replayed(&mut self) {
        if self.replay == Replay::Running {
            self.replay = Replay::Given(OpId(self.next_op + 1));
            self.order_held_reads();
            self.look_at_replay();
        }
    }

    /// When all that was given back is done, a flush makes the replay final (R2).
    pub(super) fn look_at_replay(&mut self) {
        let Replay::Given(first_new) = self.replay else { return };
        if on(Mutant::AdoptBeforeFlush) {
            self.replay = Replay::Over;
            return self.tell_all(Purpose::Adopt, Broadcast::Adopt(Incarnation(self.incarnation.0 - 1)));
        }
        let given_back = |(id, op): (&OpId, &Op)| *id < first_new && matches!(op.origin, Origin::Os(_));
        if self.phase != Phase::Ended && !self.ops.range(..first_new).any(given_back) {
            self.replay = Replay::Flushing;
            self.tell_all(Purpose::ReplayFlush, Broadcast::Flush { covers: Seq(0), acks: 0 });
        }
    }

    /// Set the timer if it is not set for an earlier time.
    pub(super) fn wake_by(&mut self, at: Millis) {
        if at < self.wake_at {
            self.wake_at = at;
            self.out.push(Output::WakeAt(at));
        }
    }

    pub(super) fn timer(&mut self) {
        self.wake_at = Millis::NEVER;
        if self.phase == Phase::Ended {
            return;
        }
        self.retry_opens();
        self.retry_starved();
        self.look_at_stalls();
        self.look_at_idleness();
    }

    /// Report members without progress (PROTOCOL.md §3); a connection that stays silent is made anew.
    fn look_at_stalls(&mut self) {
        let servers: Vec<_> = self.peers.iter().filter_map(|(s, p)| p.owes_since.map(|since| (*s, since))).collect();
        for (server, since) in servers {
            let late = self.now.since(since);
            if late < STALL_TIMEOUT_MS {
                self.wake_by(since.after(STALL_TIMEOUT_MS));
                continue;
            }
            self.report(server, Trouble::Stalled);
            self.wake_by(self.now.after(STALL_TIMEOUT_MS));
            if late >= SILENT_LINK_MS && matches!(self.peers[&server].link, Link::Up(_)) {
                self.drop_link(server);
            }
        }
    }

    /// Idle: flush what is not flushed, then let everybody know how far is confirmed.
    fn look_at_idleness(&mut self) {
        if !self.is_serving() {
            return; // The timer is set anew when it serves again.
        }
        if let Some(since) = self.unflushed_since {
            let due = self.changed_at.after(IDLE_CONFIRM_MS).min(since.after(UNFLUSHED_MAX_MS));
            if self.now >= due {
                self.flush_by_itself();
            } else {
                self.wake_by(due);
            }
        } else if self.wants_confirming() {
            self.tell_all(Purpose::Confirm, Broadcast::Confirm);
        }
    }
}
