//! Whether any block was ever written: every group of every layer is asked (PROTOCOL.md §2.9, Blank).
//!
//! Invariant: an answer reaches the OS as a read's data does: from `Active` members, under the read lease of every group
//! (R5), and a question that was refused is asked again under a newer map. A layer that cannot be asked fails it: what is
//! not known to be blank is never called blank.

use super::Driver;
use super::OpError;
use super::op::{Gathered, OpId, Setback};
use super::peer::{Outgoing, What, WrittenPart};
use super::view::View;
use crate::ids::{Seq, ServerId};
use crate::wire::RequestBody;
use bytes::Bytes;

impl Driver {
    /// Ask the next group: parts are counted layer by layer, group by group.
    pub(super) fn issue_written(&mut self, id: OpId, view: &View, at: u64) {
        let groups = view.routes.len() as u64;
        let op = self.ops.get_mut(&id).expect("the caller found it");
        op.attempt.next = (at + 1 < groups * view.map.layers.len() as u64).then_some(at + 1);
        op.attempt.outstanding += 1;
        let (layer, group) = ((at / groups) as usize, (at % groups) as u32);
        op.attempt.groups |= 1 << group;
        let attempt = op.attempt.number;
        let lies = &view.map.layers[layer];
        if lies.placement != view.map.top().placement {
            // The driver has no routes to another placement's members yet.
            return self.frame_set_back(id, Setback::Fail(OpError::Io));
        }
        if view.map.geometry(lies).pages(group) == 0 {
            return self.frame_done(id);
        }
        self.send_written(view, WrittenPart { op: id, attempt, layer, group, from: 0 });
        self.renew_leases(&view.routes[group as usize]);
    }

    fn send_written(&mut self, view: &View, part: WrittenPart) {
        let readers = &view.routes[part.group as usize].readers;
        let open = |server: &&ServerId| self.peers[server].is_open();
        let server = *readers.iter().find(open).or(readers.first()).expect("every group of a served map has a reader");
        let layer = view.map.layers[part.layer].id;
        let body = RequestBody::Written { layer, group: part.group, from: part.from };
        self.transmit(server, Outgoing { what: What::Written(part), body, payload: Bytes::new(), seq: Seq(0) });
    }

    /// Whether it is an answer to this very question.
    pub(super) fn written_fits(&self, part: WrittenPart, pages: &[u64], next: u64) -> bool {
        let Some(view) = &self.view else { return false };
        let there = view.map.geometry(&view.map.layers[part.layer]).pages(part.group);
        next > part.from && pages.iter().all(|page| (part.from..there.min(next)).contains(page))
    }

    /// A group has said which of its pages were written, or some of them.
    pub(super) fn written_answered(&mut self, part: WrittenPart, pages: &[u64], next: u64) {
        let view = self.view.clone().expect("the attempt runs under a map");
        match pages.first() {
            Some(page) => {
                let geometry = view.map.geometry(&view.map.layers[part.layer]);
                let address = geometry.address_of(part.group, *page, 0);
                let op = self.ops.get_mut(&part.op).expect("the caller found it");
                op.attempt.gathered = Gathered::Whole(Bytes::copy_from_slice(&address.to_le_bytes()));
                self.frame_done(part.op);
            }
            None if next == u64::MAX => self.frame_done(part.op),
            None => self.send_written(&view, WrittenPart { from: next, ..part }),
        }
    }
}
