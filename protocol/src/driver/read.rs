//! Reads: one frame per part to one `Active` member, bad blocks from the next (seed 002 Fig. 7A; R5, R12).
//!
//! Invariant: data reaches the OS only under the read lease, and only what some `Active` member gave as good.

use super::op::{Gathered, OpId, Setback, State};
use super::peer::{Outgoing, Partial, ReadPart, What};
use super::view::View;
use super::{Driver, OpError};
use crate::ids::{Seq, ServerId};
use crate::layer::BLOCK_BYTES;
use crate::wire::{Place, RequestBody};
use bytes::{Bytes, BytesMut};

impl Driver {
    /// Send the part of a read that starts `at` bytes into it.
    pub(super) fn issue_read(&mut self, id: OpId, view: &View, address: u64, length: u64, at: u64) {
        let extent = view.geometry.split(address + at, length - at).next().expect("a part is left");
        let op = self.ops.get_mut(&id).expect("the caller found it");
        let next = at + u64::from(extent.length);
        op.attempt.next = (next < length).then_some(next);
        op.attempt.outstanding += 1;
        let new_group = op.attempt.groups & (1 << extent.group) == 0;
        op.attempt.groups |= 1 << extent.group;
        let attempt = op.attempt.number;
        let (address, length) = (extent.address, extent.length);
        self.send_read(view, ReadPart { op: id, attempt, address, length, tried: 0, partial: None });
        if new_group {
            self.renew_leases(&view.routes[extent.group as usize]);
        }
    }

    /// Ask the best member that was not asked yet; if none is left, the read fails.
    fn send_read(&mut self, view: &View, mut part: ReadPart) {
        let extent = view.geometry.split(part.address, part.length.into()).next().expect("parts are not empty");
        let readers = &view.routes[extent.group as usize].readers;
        let open = |server: &ServerId| self.peers[server].is_open();
        let untried = |(i, _): &(usize, &ServerId)| part.tried & (1 << i) == 0;
        let candidate = |wanted: bool| {
            let mut left = readers.iter().enumerate().filter(untried);
            left.find(|(_, server)| open(server) || !wanted).map(|(i, server)| (i, *server))
        };
        let Some((i, server)) = candidate(true).or_else(|| candidate(false)) else {
            // No Active member has these blocks (R12). With none at all the map would not be served (I8).
            return self.frame_set_back(part.op, Setback::Fail(OpError::Io));
        };
        part.tried |= 1 << i;
        let place = Place {
            layer: view.layer,
            group: extent.group,
            page: extent.page,
            offset: extent.offset,
            length: extent.length,
        };
        let body = RequestBody::Read { place };
        self.transmit(server, Outgoing { what: What::Read(part), body, payload: Bytes::new(), seq: Seq(0) });
    }

    /// A part's data came.
    pub(super) fn read_answered(&mut self, mut part: ReadPart, payload: Bytes) {
        let payload = match part.partial.take() {
            Some(partial) => Partial::filled_from(*partial, &payload, &[]).0,
            None => payload,
        };
        self.gather(&part, payload);
        self.frame_done(part.op);
    }

    /// A member has no good content of some blocks: the next one is asked (R12). The server repairs its own.
    pub(super) fn read_bad(&mut self, mut part: ReadPart, payload: Bytes, bad: Vec<u32>) {
        let (data, missing) = match part.partial.take() {
            Some(partial) => Partial::filled_from(*partial, &payload, &bad),
            None => (payload, bad),
        };
        if missing.is_empty() {
            self.gather(&part, data);
            return self.frame_done(part.op);
        }
        part.partial = Some(Box::new(Partial { data: data.to_vec(), missing }));
        let view = self.view.clone().expect("the attempt runs under a map");
        self.send_read(&view, part);
    }

    /// Put a part's data where it belongs.
    fn gather(&mut self, part: &ReadPart, payload: Bytes) {
        let op = self.ops.get_mut(&part.op).expect("the caller found it");
        let range = op.kind.range();
        if u64::from(part.length) == range.end - range.start {
            op.attempt.gathered = Gathered::Whole(payload);
            return;
        }
        if !matches!(op.attempt.gathered, Gathered::Pieces(_)) {
            op.attempt.gathered = Gathered::Pieces(BytesMut::zeroed((range.end - range.start) as usize));
        }
        if let Gathered::Pieces(pieces) = &mut op.attempt.gathered {
            let at = (part.address - range.start) as usize;
            pieces[at..at + payload.len()].copy_from_slice(&payload);
        }
    }

    /// All data is there: hand it over if the lease holds, else wait for the pings (R5).
    pub(super) fn hand_over(&mut self, id: OpId) {
        let view = self.view.clone().expect("the attempt runs under a map");
        let op = &self.ops[&id];
        if !self.lease_holds(&view, op.attempt.groups) {
            let groups = op.attempt.groups;
            self.ops.get_mut(&id).expect("just seen").state = State::AwaitingLease;
            self.awaiting_lease.insert(id);
            return self.ask_for_lease(&view, groups);
        }
        let op = self.ops.get_mut(&id).expect("just seen");
        let nothing = matches!(op.attempt.gathered, Gathered::Nothing);
        assert!(!nothing || op.kind.is_whole(), "every part of a read has brought data");
        let data = match std::mem::take(&mut op.attempt.gathered) {
            Gathered::Nothing => Bytes::new(),
            Gathered::Whole(data) => data,
            Gathered::Pieces(pieces) => pieces.freeze(),
        };
        self.finish(id, Ok(data));
    }
}

impl Partial {
    /// Take the missing blocks from another member's data, which lacks `bad`; what is still missing comes second.
    fn filled_from(mut self, payload: &Bytes, bad: &[u32]) -> (Bytes, Vec<u32>) {
        let block = BLOCK_BYTES as usize;
        for &missing in self.missing.iter().filter(|missing| !bad.contains(missing)) {
            let at = missing as usize * block;
            self.data[at..at + block].copy_from_slice(&payload[at..at + block]);
        }
        self.missing.retain(|missing| bad.contains(missing));
        (Bytes::from(self.data), self.missing)
    }
}
