//! From submission to completion: starting, giving up and restarting attempts (seed 002 Fig. 7A, 7B; H1, M6).
//!
//! Invariants: an operation is answered exactly once; at the same generation it is restarted only when every frame of the
//! attempt before was answered or lost, and a higher handle is open wherever one was lost; overlapping ones keep their
//! order ([`super::order`]).

use super::op::{Broadcast, Hold, Kind, Op, OpId, Origin, Setback, State};
use super::peer::{Outgoing, What};
use super::{Driver, Op as Wish, OpError, Output, Phase, Replay, Tag};
use crate::ids::{Generation, Seq, ServerId};
use crate::limits::STALL_TIMEOUT_MS;
use crate::map::AccessMode;
use crate::mutants::{Mutant, on};
use crate::wire::{RequestBody, Start};
use bytes::Bytes;

/// Frames that one operation has outstanding before it waits for answers: a discard of a terabyte is not cut at once.
const MAX_FRAMES_OUT: u32 = 128;

impl Driver {
    pub(super) fn submit(&mut self, tag: Tag, wish: Wish) {
        let early = self.phase == Phase::Discovering && self.config.start == Start::Resume;
        assert!(!early, "a successor takes nothing from the kernel before its incarnation is final (H20)");
        if self.phase == Phase::Ended {
            self.out.push(Output::Complete { tag, result: Err(OpError::Io) });
            return;
        }
        let kind = match wish {
            Wish::Read { address, length } => Kind::Read { address, length },
            Wish::Write { address, data } => Kind::Write { address, data },
            Wish::Discard { address, length } => Kind::Discard { address, length },
            Wish::Flush => Kind::Broadcast(Broadcast::Flush { covers: Seq(0), acks: 0 }),
            Wish::AskWritten => Kind::Written,
        };
        let empty = !kind.is_whole() && kind.range().is_empty();
        if empty {
            self.out.push(Output::Complete { tag, result: Ok(Bytes::new()) });
            return;
        }
        let mut op = Op::new(Origin::Os(tag), kind);
        // What is given back to a successor may have been sent by the process before: it is a restart (R8).
        op.sent = self.replay == Replay::Running;
        if op.sent && matches!(op.kind, Kind::Read { .. }) && !on(Mutant::ReplayReadsEarly) {
            return self.hold_read(op);
        }
        let id = self.enter(op);
        if self.ops[&id].state == State::Ready {
            self.ready.push_back(id);
        }
    }

    /// A read waits until all is given back: an overlapping write that comes later may be on some members already, and
    /// what is read must not go back (PROTOCOL.md §4.5).
    fn hold_read(&mut self, mut op: Op) {
        self.next_op += 1;
        let id = OpId(self.next_op);
        op.blockers = 1;
        op.state = State::Blocked;
        self.ops.insert(id, op);
        self.held_reads.push(id);
    }

    /// All is given back: reads wait for the writes among it that they overlap, and for nothing else.
    pub(super) fn order_held_reads(&mut self) {
        for id in std::mem::take(&mut self.held_reads) {
            if self.ops.contains_key(&id) {
                self.put_behind_writes(id);
                self.unblock(id);
            }
        }
    }

    /// A read that is restarted: overlapping writes that came after it may be on some members by now.
    fn waits_again(&mut self, id: OpId) -> bool {
        let op = self.ops.get_mut(&id).expect("the caller found it");
        let restarted = matches!(op.kind, Kind::Read { .. }) && op.attempt.number != op.waited;
        op.waited = op.attempt.number;
        restarted && !on(Mutant::RestartedReadsEarly) && self.put_behind_writes(id)
    }

    /// Lets a read wait for every write under way that it overlaps; whether there is one.
    fn put_behind_writes(&mut self, id: OpId) -> bool {
        let range = self.ops[&id].kind.range();
        let mut before = Vec::new();
        self.order.enter(id, &range, false, &mut before);
        for other in &before {
            self.ops.get_mut(other).expect("a write in the order is under way").waiters.push(id);
        }
        let op = self.ops.get_mut(&id).expect("looked at above");
        op.blockers += before.len() as u32;
        if !before.is_empty() {
            op.state = State::Blocked;
        }
        !before.is_empty()
    }

    /// Put an operation among those under way; it is `Blocked` if it overlaps a write before it.
    pub(super) fn enter(&mut self, mut op: Op) -> OpId {
        self.next_op += 1;
        let id = OpId(self.next_op);
        if !op.kind.is_whole() {
            let mut before = std::mem::take(&mut self.before);
            let order = if op.handles_loss() { &mut self.rewrite_order } else { &mut self.order };
            order.enter(id, &op.kind.range(), op.kind.changes_blocks(), &mut before);
            for other in before.drain(..) {
                let other = self.ops.get_mut(&other).expect("a write in the order is under way");
                other.waiters.push(id);
                op.blockers += 1;
                op.state = State::Blocked;
            }
            self.before = before;
        }
        self.ops.insert(id, op);
        id
    }

    /// Start whatever may start.
    pub(super) fn run(&mut self) {
        if std::mem::take(&mut self.recheck_parked) {
            self.unpark();
        }
        if !self.view.as_ref().is_some_and(|view| view.admitted()) {
            return;
        }
        while self.phase == Phase::Recovering {
            let Some(id) = self.ready_first.pop_front() else { return };
            self.start(id);
        }
        while self.phase == Phase::Serving {
            let Some(id) = self.ready.pop_front() else { return };
            self.start(id);
        }
    }

    fn start(&mut self, id: OpId) {
        let view = self.view.clone().expect("admitted under a map");
        let Some(op) = self.ops.get_mut(&id).filter(|op| op.state == State::Ready) else { return };
        if op.revoked {
            return self.fail(id, OpError::Io);
        }
        let changes = op.kind.changes_blocks();
        let may_not_change = view.session.map_or(!on(Mutant::EndedGoesOn), |s| s.mode == AccessMode::ReadOnly);
        if changes && may_not_change {
            return self.fail(id, OpError::ReadOnly);
        }
        assert!(op.kind.range().end <= view.map.size, "the runtime refuses requests beyond the volume");
        if changes && !self.find_room(id) {
            return;
        }
        if self.waits_again(id) {
            return;
        }
        let op = self.ops.get_mut(&id).expect("it was found above");
        if let Kind::Broadcast(broadcast) = op.kind {
            return self.send_broadcast(id, broadcast, &view.serving);
        }
        op.begin(State::Running);
        if matches!(op.kind, Kind::Write { .. })
            && (!op.sent || on(Mutant::SentMayRunOut))
            && self.ask_for_room(id, &view)
        {
            return;
        }
        self.issue(id);
    }

    /// A flush, or another word to every serving server.
    fn send_broadcast(&mut self, id: OpId, broadcast: Broadcast, servers: &[ServerId]) {
        let now = Broadcast::Flush { covers: self.seqs.acknowledged(), acks: self.kept.acks() };
        let op = self.ops.get_mut(&id).expect("the caller found it");
        op.begin(State::Running);
        op.attempt.next = None;
        op.attempt.outstanding = servers.len() as u32;
        let attempt = op.attempt.number;
        let body = match broadcast {
            Broadcast::Flush { .. } => {
                op.kind = Kind::Broadcast(now);
                RequestBody::Flush
            }
            Broadcast::Handled(loss) => RequestBody::Handled { loss },
            Broadcast::Adopt(incarnation) => RequestBody::Adopt { incarnation },
            Broadcast::Confirm => RequestBody::Confirm,
        };
        for &server in servers {
            let what = What::Part { op: id, attempt };
            self.transmit(server, Outgoing { what, body: body.clone(), payload: Bytes::new(), seq: Seq(0) });
        }
    }

    /// Send parts until all are out or enough are outstanding.
    pub(super) fn issue(&mut self, id: OpId) {
        let view = self.view.clone().expect("running under a map");
        loop {
            let Some(op) = self.ops.get_mut(&id) else { return };
            let Some(at) = op.attempt.next else { return };
            if op.attempt.outstanding >= MAX_FRAMES_OUT || op.attempt.setback.is_some() {
                return;
            }
            match op.kind {
                Kind::Read { address, length } => self.issue_read(id, &view, address, length, at),
                Kind::Write { .. } => self.issue_write(id, &view, at),
                Kind::Discard { address, length } => self.issue_discard(id, &view, address, length, at),
                Kind::Written => self.issue_written(id, &view, at),
                Kind::Broadcast(_) => unreachable!("a broadcast is sent whole"),
            }
        }
    }

    /// A frame of an attempt that still counts was answered with success.
    pub(super) fn frame_done(&mut self, id: OpId) {
        if let Some(op) = self.ops.get_mut(&id) {
            if op.attempt.outstanding == 0 && (on(Mutant::AckOnOneCopy) || on(Mutant::AnyAttemptCounts)) {
                return;
            }
            op.attempt.outstanding -= 1;
            self.advance(id);
        }
    }

    /// A frame of an attempt that still counts was answered with something else.
    pub(super) fn frame_set_back(&mut self, id: OpId, setback: Setback) {
        if let Some(op) = self.ops.get_mut(&id) {
            if op.attempt.outstanding == 0 && (on(Mutant::AckOnOneCopy) || on(Mutant::AnyAttemptCounts)) {
                return;
            }
            op.attempt.outstanding -= 1;
            op.set_back(setback);
            self.advance(id);
        }
    }

    /// A frame will not be answered: its connection is gone.
    pub(super) fn frame_lost(&mut self, id: OpId, attempt: u32) {
        if self.ops.get(&id).is_some_and(|op| op.attempt.number == attempt) {
            let handles = !matches!(self.ops[&id].kind, Kind::Read { .. } | Kind::Written);
            self.frame_set_back(id, Setback::Hold(Hold { handles, ..Hold::default() }));
        }
    }

    /// Go on with an attempt after an answer.
    fn advance(&mut self, id: OpId) {
        let op = &self.ops[&id];
        let attempt = &op.attempt;
        match (attempt.setback, attempt.outstanding, attempt.next) {
            (Some(setback), 0, _) => self.settle_setback(id, setback),
            (Some(_), _, _) => {}
            (None, 0, _) if op.state == State::Reserving => self.room_granted(id),
            (None, _, _) if op.state == State::Reserving => {}
            (None, 0, None) => self.attempt_succeeded(id),
            (None, out, Some(_)) if out <= MAX_FRAMES_OUT / 2 => self.issue(id),
            (None, _, _) => {}
        }
    }

    /// No frame of a failed attempt is outstanding any longer.
    fn settle_setback(&mut self, id: OpId, setback: Setback) {
        match setback {
            Setback::Fail(error) => {
                if error == OpError::NoSpace {
                    self.give_room_back(id);
                }
                self.fail(id, error);
            }
            Setback::Hold(hold) => {
                let met = self.is_met(id, hold);
                let op = self.ops.get_mut(&id).expect("the caller found it");
                if met {
                    op.state = State::Ready;
                    let queue = if op.handles_loss() { &mut self.ready_first } else { &mut self.ready };
                    queue.push_back(id);
                } else {
                    op.state = State::Parked(hold);
                    self.parked.insert(id);
                }
            }
        }
    }

    /// Whether a parked operation may be restarted.
    fn is_met(&self, id: OpId, hold: Hold) -> bool {
        let view = self.view.as_ref().expect("an attempt ran under a map");
        let op = &self.ops[&id];
        let open = |server: &ServerId| self.peers.get(server).is_some_and(|peer| peer.is_open());
        let handles = || match op.kind {
            Kind::Broadcast(_) => view.serving.iter().all(open),
            _ => view.groups(op.attempt.groups).flat_map(|route| &route.writers).all(open),
        };
        hold.map <= view.generation() && (!hold.handles || handles())
    }

    /// Restart the parked operations whose time has come, in their order.
    fn unpark(&mut self) {
        if self.view.is_none() {
            return;
        }
        let hold = |id: &OpId| if let State::Parked(hold) = self.ops[id].state { Some(hold) } else { None };
        let met = |id: &&OpId| hold(id).is_some_and(|hold| self.is_met(**id, hold));
        let ids: Vec<_> = self.parked.iter().filter(met).copied().collect();
        for id in ids {
            self.parked.remove(&id);
            self.make_ready(id);
        }
    }

    /// A member had no room for it even in its reserve (R8): it is tried again after a while, should no map come before.
    pub(super) fn starve(&mut self, id: OpId) {
        if self.starved.is_empty() {
            self.starved_until = self.now.after(STALL_TIMEOUT_MS);
            self.wake_by(self.starved_until);
        }
        self.starved.insert(id);
    }

    /// Every frame of theirs was answered, so they may be restarted at this very generation (M6).
    pub(super) fn retry_starved(&mut self) {
        match self.starved.is_empty() {
            true => return,
            false if self.now < self.starved_until => return self.wake_by(self.starved_until),
            false => {}
        }
        for id in std::mem::take(&mut self.starved) {
            match self.ops.get(&id).map(|op| op.state) {
                Some(State::Parked(hold)) if self.is_met(id, Hold { map: Generation(0), ..hold }) => {
                    self.parked.remove(&id);
                    self.make_ready(id);
                }
                Some(State::Parked(_) | State::Running) => self.starve(id),
                _ => {}
            }
        }
        // What it refuses then is told anew.
        self.peers.values_mut().for_each(|peer| peer.refused_at = Generation(0));
    }

    fn make_ready(&mut self, id: OpId) {
        let op = self.ops.get_mut(&id).expect("it is under way");
        op.state = State::Ready;
        let queue = if op.handles_loss() { &mut self.ready_first } else { &mut self.ready };
        queue.push_back(id);
    }

    /// Every part was answered with success.
    fn attempt_succeeded(&mut self, id: OpId) {
        match self.ops[&id].kind {
            Kind::Read { .. } | Kind::Written => self.hand_over(id),
            Kind::Write { .. } | Kind::Discard { .. } => self.change_succeeded(id),
            Kind::Broadcast(broadcast) => self.broadcast_answered(id, broadcast),
        }
    }

    /// End an operation with an error. The OS is told only what PROTOCOL.md H22 allows.
    pub(super) fn fail(&mut self, id: OpId, error: OpError) {
        let op = self.ops.get(&id).expect("the caller found it");
        if let Origin::Own(_) = op.origin {
            // What the driver must do for the session cannot be done: nothing later may be called safe.
            return self.end();
        }
        if op.kept_bytes > 0 {
            self.kept.release(op.kept_bytes);
        }
        self.finish(id, Err(error));
        // Its room is free, and no flush need come that would say so.
        if !self.awaiting_room.is_empty() {
            self.admit_waiting();
        }
    }

    /// Answer the OS and let go what waited for this operation.
    pub(super) fn finish(&mut self, id: OpId, result: Result<Bytes, OpError>) -> Op {
        let op = self.ops.remove(&id).expect("the caller found it");
        self.parked.remove(&id);
        self.awaiting_lease.remove(&id);
        if op.kind.changes_blocks() {
            let order = if op.handles_loss() { &mut self.rewrite_order } else { &mut self.order };
            order.leave(id, &op.kind.range());
        }
        for waiter in &op.waiters {
            self.unblock(*waiter);
        }
        if let Origin::Os(tag) = op.origin {
            self.out.push(Output::Complete { tag, result });
            self.look_at_replay();
        }
        op
    }

    fn unblock(&mut self, id: OpId) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        op.blockers -= 1;
        if op.blockers == 0 {
            op.state = State::Ready;
            let queue = if op.handles_loss() { &mut self.ready_first } else { &mut self.ready };
            queue.push_back(id);
        }
    }
}
