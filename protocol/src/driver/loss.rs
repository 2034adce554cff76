//! A raised `loss`: all members of a group restarted and may have forgotten what was acknowledged (H5, R2).
//!
//! ```text
//! Serving --map with loss > handled--> Recovering: rewrite all kept --> flush --> say `handled` --> Serving
//!                                          '------- any newer map: from the beginning
//! ```
//! Invariant: before any other request is served under that map, everything acknowledged and unflushed is on all members
//! again and flushed. A successor cannot know what that was until its replay is flushed: it fails everything instead. On
//! volumes of several sessions nothing is rewritten: the loss ends their sessions.

use super::kept::Change;
use super::op::{Broadcast, Kind, Op, Origin, Purpose, State};
use super::{Driver, Phase, Replay};
use crate::ids::{Generation, Seq};
use crate::limits::IDLE_CONFIRM_MS;
use crate::mutants::{Mutant, on};

impl Driver {
    /// Under a new map, or at the beginning: whether something may be lost that is not handled.
    pub(super) fn look_at_loss(&mut self) {
        let view = self.view.clone().expect("the caller has a map");
        self.drop_recovery();
        let loss = view.map.loss();
        if loss <= self.handled || view.map.multi_session || on(Mutant::LossIgnored) {
            self.handled = self.handled.max(loss);
            return self.serve();
        }
        if self.replay != Replay::Over {
            return self.end();
        }
        self.phase = Phase::Recovering;
        self.rewrite_all();
    }

    /// Serve, and see to what became due meanwhile.
    fn serve(&mut self) {
        self.phase = Phase::Serving;
        self.wake_by(self.now.after(IDLE_CONFIRM_MS));
    }

    /// Steps of an older handling do not count under a newer map. Their numbers stay below the next flush, which is sent
    /// only after everything was written again.
    fn drop_recovery(&mut self) {
        let steps: Vec<_> = self.ops.iter().filter(|(_, op)| op.handles_loss()).map(|(id, _)| *id).collect();
        for id in steps {
            let op = self.ops.remove(&id).expect("just listed");
            self.parked.remove(&id);
            if let Some(first) = op.first_seq {
                self.seqs.succeed(first);
            }
        }
        self.rewrite_order.clear();
        self.ready_first.clear();
        self.rewrites_left = 0;
    }

    fn rewrite_all(&mut self) {
        let kinds: Vec<_> = self.kept.changes().map(Change::to_kind).collect();
        self.rewrites_left = kinds.len();
        for kind in kinds {
            let mut op = Op::new(Origin::Own(Purpose::Rewrite), kind);
            op.sent = true; // Draws on the servers' reserve: it must not end with ENOSPC (R8).
            let id = self.enter(op);
            if self.ops[&id].state == State::Ready {
                self.ready_first.push_back(id);
            }
        }
        if self.rewrites_left == 0 {
            self.flush_rewrites();
        }
    }

    pub(super) fn rewritten(&mut self) {
        self.rewrites_left -= 1;
        if self.rewrites_left == 0 {
            self.flush_rewrites();
        }
    }

    fn flush_rewrites(&mut self) {
        if on(Mutant::HandledBeforeFlush) {
            return self.rewrites_flushed();
        }
        self.tell_all(Purpose::RewriteFlush, Broadcast::Flush { covers: Seq(0), acks: 0 });
    }

    pub(super) fn rewrites_flushed(&mut self) {
        let loss = self.view.as_ref().expect("it ran under a map").map.loss();
        self.tell_all(Purpose::SayHandled, Broadcast::Handled(loss));
    }

    pub(super) fn loss_handled(&mut self, loss: Generation) {
        self.handled = self.handled.max(loss);
        self.serve();
    }
}

impl Change {
    fn to_kind(&self) -> Kind {
        match self {
            Self::Write { address, data } => Kind::Write { address: *address, data: data.clone() },
            Self::Discard { address, length } => Kind::Discard { address: *address, length: *length },
        }
    }
}
