//! Which pages of a group were ever written: what a node asks before it makes a filesystem (PROTOCOL.md §2.9, Blank).
//!
//! Invariant: answered only by a member that would serve a read of the group now, and a page is left out only if every
//! block of it is absent here; a hole and a stale block count as written. Bounded: [`WRITTEN_PAGES`] pages are looked at
//! for one request, and the answer says where to go on.

use super::compare::Needs;
use super::handles::ReplyTo;
use super::medium::{MediumAnswer, MediumOp};
use super::page_ops::{Exec, ExecId, Work};
use super::requests::Located;
use super::{StorageServer, Violation};
use crate::ids::{BootId, LayerId, VolumeId};
use crate::layer::{BLOCK_BYTES, BlockState, PageKey};
use crate::limits::WRITTEN_PAGES;
use crate::wire::{Place, ReplyBody};
use bytes::Bytes;

/// A walk over the pages of one copy's layer.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) to: ReplyTo,
    /// The page that is looked at.
    at: PageKey,
    looked_at: usize,
    written: Vec<u64>,
    /// The page from which to go on.
    next: u64,
}

impl Survey {
    pub(super) fn reply(self) -> ReplyBody {
        ReplyBody::Written { pages: self.written, next: self.next }
    }

    /// What to ask the medium next; `None` = this piece of the list is whole.
    fn answered(&mut self, answer: MediumAnswer) -> Option<MediumOp> {
        match answer {
            MediumAnswer::NextPage(None) => {
                self.next = u64::MAX;
                None
            }
            MediumAnswer::NextPage(Some(page)) => {
                self.at.page = page;
                Some(MediumOp::Load(self.at))
            }
            MediumAnswer::Page(record) => {
                // An entry may hold no more than a flag.
                if record.is_some_and(|record| !record.blocks.all(BlockState::Absent)) {
                    self.written.push(self.at.page);
                }
                self.looked_at += 1;
                self.next = self.at.page.saturating_add(1);
                (self.looked_at < WRITTEN_PAGES).then(|| self.look_on())
            }
            other => panic!("a survey was answered with {other:?}"),
        }
    }

    fn look_on(&self) -> MediumOp {
        MediumOp::NextPage { copy: self.at.copy, layer: self.at.layer, from: self.next }
    }
}

impl StorageServer {
    /// A driver asks for the written pages of a group, from a page on.
    pub(super) fn survey(&mut self, to: ReplyTo, volume: VolumeId, (layer, group): (LayerId, u32), from: u64) {
        let place = Place { layer, group, page: 0, offset: 0, length: BLOCK_BYTES };
        let (boot, at, _) = match self.locate(volume, &place, Needs::Active) {
            Err(Located::Nonsense) => return self.violation(to.conn, Violation::Place),
            Err(Located::Reply(reply)) => return self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new()),
            Ok(found) => found,
        };
        let survey = Survey { to, at, looked_at: 0, written: Vec::new(), next: from };
        let first = survey.look_on();
        let exec = self.admit(Exec::survey(volume, boot, survey));
        self.exec_medium(exec, 0, first);
    }

    pub(super) fn survey_answered(&mut self, id: ExecId, answer: MediumAnswer) {
        let Some(Work::Survey(survey)) = self.execs.get_mut(&id).map(|exec| &mut exec.work) else { return };
        if let Some(what) = survey.answered(answer) {
            self.exec_medium(id, 0, what);
        }
        self.finish_if_done(id);
    }
}
