//! Pages that go from one server to another: the source's side, and what the puller makes of them.
//!
//! Translucency (PROTOCOL.md §4): a fill writes blocks *where they are absent or stale*; blocks that are present or
//! holes are left alone, so a client's write wins in whatever order the two arrive. A settle makes a page as the
//! authoritative copy's (R1), the one movement of data that is no fill. A repair writes only over stale blocks.

use super::StorageServer;
use super::compare::Needs;
use super::handles::ReplyTo;
use super::medium::{MediumOp, PageRecord};
use super::page_ops::{Exec, ExecId, Work};
use super::requests::Located;
use crate::control::{ControlReply, FillLimit};
use crate::ids::{BootId, CopyId, Generation, Incarnation, LayerId, Seq, ServerId, SessionId, VolumeId};
use crate::layer::{BLOCK_BYTES, BlockState, BlockStates};
use crate::mutants::{Mutant, on};
use crate::wire::{Place, ReplyBody};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A page being read for a peer.
#[derive(Debug)]
pub(super) struct ServePage {
    pub(super) to: ReplyTo,
    blocks: BlockStates,
    parts: BTreeMap<u32, Bytes>,
    bad: Vec<u32>,
    pending: Vec<(SessionId, (Incarnation, Seq))>,
    before_start: bool,
    missed: u16,
    pub(super) next: u64,
    /// For a settle: what is stale in it is to be mended.
    pub(super) settles: bool,
}

/// What a page from a peer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Write where absent or stale.
    Fill,
    /// Make it as the authoritative copy's.
    Settle,
    /// Write where stale.
    Repair,
    /// Write where stale on the authoritative copy of a settle.
    Mend,
}

/// A page from a peer being applied.
#[derive(Debug)]
pub(super) struct ApplyPage {
    pub(super) mode: Mode,
    /// The generation under which it was pulled (H6).
    pub(super) generation: Generation,
    /// Who sent it.
    pub(super) source: ServerId,
    pub(super) blocks: BlockStates,
    pub(super) payload: Bytes,
    pub(super) writers: Vec<((SessionId, Incarnation), Seq)>,
    pub(super) before_start: bool,
    /// Ordinals that miss a write that the source has (H8, H9).
    pub(super) missed: u16,
    /// Nothing was applied: a promise came in between.
    pub(super) dropped: bool,
    /// A block that is stale here is stale at the source, too.
    pub(super) leaves_stale: bool,
    /// What each operation makes of the blocks from its first on.
    making: BTreeMap<u32, (Range<u32>, BlockState)>,
}

impl ServePage {
    pub(super) fn keep(&mut self, block: u32, data: Bytes, bad: &[u32]) {
        self.bad.extend(bad.iter().map(|b| b + block));
        self.parts.insert(block, data);
    }

    /// Blocks that have no good content here.
    pub(super) fn stale_blocks(&self) -> BTreeSet<u32> {
        let stale = self.blocks.iter().filter(|(_, state)| *state == BlockState::Stale).map(|(block, _)| block);
        stale.chain(self.bad.iter().copied()).collect()
    }

    /// The answer: a block that failed on the way is stale in it (R12), and its data is left out.
    pub(super) fn reply(mut self) -> (ReplyBody, Bytes) {
        for block in &self.bad {
            self.blocks.set(*block, BlockState::Stale);
        }
        let one_part = self.bad.is_empty() && self.parts.len() == 1;
        let payload =
            if one_part { self.parts.pop_first().map(|(_, data)| data).unwrap_or_default() } else { self.assemble() };
        let body = ReplyBody::Page {
            blocks: self.blocks,
            pending: self.pending,
            pending_before_start: self.before_start,
            missed: self.missed,
            next: self.next,
        };
        (body, payload)
    }

    fn assemble(&self) -> Bytes {
        let mut payload = BytesMut::new();
        for (first, data) in &self.parts {
            for (n, block) in data.chunks(BLOCK_BYTES as usize).enumerate() {
                if self.blocks.of(first + n as u32) == BlockState::Present {
                    payload.extend_from_slice(block);
                }
            }
        }
        payload.freeze()
    }
}

impl ApplyPage {
    pub(super) fn new(mode: Mode, generation: Generation, page: ReplyBody, payload: Bytes) -> Option<Self> {
        let ReplyBody::Page { blocks, pending, pending_before_start, missed, .. } = page else { return None };
        let present = blocks.iter().filter(|(_, state)| *state == BlockState::Present).count();
        let writers = pending.into_iter().map(|(session, (incarnation, seq))| ((session, incarnation), seq)).collect();
        (payload.len() == present * BLOCK_BYTES as usize).then(|| Self {
            mode,
            generation,
            source: ServerId::NONE,
            blocks,
            payload,
            writers,
            // Every member is to have a mended page on its list, and nothing but the end of a settle clears it there.
            before_start: pending_before_start || mode == Mode::Mend,
            missed,
            dropped: false,
            leaves_stale: false,
            making: BTreeMap::new(),
        })
    }

    /// H8, H9: a page with pending writes at the source is pending here too. A settle marks every page that it touches.
    pub(super) fn needs_mark(&self) -> bool {
        if self.mode == Mode::Settle {
            return !on(Mutant::SettleUnmarked);
        }
        !on(Mutant::FillDropsPending) && (self.before_start || !self.writers.is_empty())
    }

    /// What a block becomes, if anything.
    fn becomes(&self, own: BlockState, source: BlockState) -> Option<BlockState> {
        use BlockState::{Absent, Hole, Present, Stale};
        match (self.mode, own, source) {
            // A block without good content at the source is taken from elsewhere, or stays as it is.
            (Mode::Settle | Mode::Repair | Mode::Mend, _, Stale) | (Mode::Fill, Stale, Stale) => None,
            (Mode::Settle, own, source) if own == source && own != Present => None,
            (Mode::Settle, _, source) => Some(source),
            (Mode::Repair | Mode::Mend, Stale, source) => Some(source),
            (Mode::Repair | Mode::Mend, ..) => None,
            (Mode::Fill, _, Present | Hole | Absent) if on(Mutant::FillOverPresent) => Some(source),
            (Mode::Fill, Present | Hole, _) | (Mode::Fill, Absent, Absent) => None,
            (Mode::Fill, Absent | Stale, source) => Some(source),
        }
    }

    /// Runs of blocks that become something, each with where its data starts in the payload.
    fn changes(&self, own: &BlockStates) -> Vec<(Range<u32>, BlockState, usize)> {
        let mut changes: Vec<(Range<u32>, BlockState, usize)> = Vec::new();
        let mut at = 0;
        for (block, source) in self.blocks.iter() {
            if let Some(state) = self.becomes(own.of(block), source) {
                match changes.last_mut() {
                    Some((run, last, _)) if *last == state && run.end == block => run.end = block + 1,
                    _ => changes.push((block..block + 1, state, at)),
                }
            }
            at += if source == BlockState::Present { BLOCK_BYTES as usize } else { 0 };
        }
        changes
    }

    pub(super) fn applied(&mut self, block: u32, record: &mut PageRecord) {
        if let Some((run, state)) = self.making.remove(&block) {
            record.allocated |= state == BlockState::Present;
            record.blocks.set_range(run, state);
        }
    }
}

impl StorageServer {
    /// What the leader lets the fills of a volume take: a pace, no decision.
    pub(super) fn limit_fills(&mut self, volume: VolumeId, limit: FillLimit) -> ControlReply {
        let Some(known) = self.volumes.get_mut(&volume) else { return ControlReply::NoCopy { copy: CopyId::NONE } };
        known.fill_limit = limit;
        ControlReply::Done
    }

    /// A peer pulls a page: served only as `Active` in that layer, at its own generation (H6); the peer's place in the
    /// map was compared.
    pub(super) fn serve_page(
        &mut self,
        to: ReplyTo,
        volume: VolumeId,
        (layer, group): (LayerId, u32),
        page: u64,
        settles: bool,
    ) {
        let place = Place { layer, group, page, offset: 0, length: BLOCK_BYTES };
        let (boot, key, page_bytes) = match self.locate(volume, &place, Needs::Active) {
            Err(Located::Nonsense) => return self.violation(to.conn, super::Violation::Place),
            Err(Located::Reply(reply)) => return self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new()),
            Ok(found) => found,
        };
        let blocks = page_bytes / BLOCK_BYTES;
        let serve = ServePage {
            to,
            blocks: BlockStates::absent(blocks),
            parts: BTreeMap::new(),
            bad: Vec::new(),
            pending: Vec::new(),
            before_start: false,
            missed: 0,
            next: u64::MAX,
            settles,
        };
        self.begin(Exec::new(volume, boot, key, 0..blocks, Work::Serve(serve)));
    }

    pub(super) fn run_serve(&mut self, id: ExecId) {
        let exec = &self.execs[&id];
        let (volume, boot, page) = (exec.volume, exec.boot, exec.page);
        let record = self.devices[&boot].records[&page].clone();
        let layer = self.known(volume).layer_mut(&page).expect("located");
        let pending = layer.pending.get(&page.page).cloned().unwrap_or_default();
        let missed = layer.missed.get(&page.page).map_or(0, |missed| missed.mask);
        let Some(Work::Serve(serve)) = self.execs.get_mut(&id).map(|e| &mut e.work) else { return };
        serve.missed = missed;
        serve.before_start = pending.before_start;
        serve.pending = pending.writers.iter().map(|((s, i), seq)| (*s, (*i, *seq))).collect();
        serve.blocks = record.blocks.clone();
        let all = 0..record.blocks.len();
        for (run, _) in record.blocks.runs(all).into_iter().filter(|(_, state)| *state == BlockState::Present) {
            self.exec_medium(id, run.start, MediumOp::Read { page, blocks: run });
        }
        let next = MediumOp::NextPage { copy: page.copy, layer: page.layer, from: page.page + 1 };
        self.exec_medium_next(id, next);
    }

    pub(super) fn run_apply(&mut self, id: ExecId) {
        let exec = &self.execs[&id];
        let (volume, boot, page) = (exec.volume, exec.boot, exec.page);
        let promised = self.volumes[&volume].promised;
        let pulled = self.pulls.contains_key(&page.copy);
        let own = self.devices[&boot].records[&page].blocks.clone();
        let Some(Work::Apply(apply)) = self.execs.get_mut(&id).map(|e| &mut e.work) else { return };
        // H6: dropped if this member has promised or stored another generation since the page was asked for.
        if (promised != apply.generation || !pulled) && !on(Mutant::LateFillApplied) {
            apply.dropped = true;
            return;
        }
        let stale = |states: &BlockStates, block| states.of(block) == BlockState::Stale;
        apply.leaves_stale = apply.blocks.iter().any(|(block, _)| stale(&own, block) && stale(&apply.blocks, block));
        let changes = apply.changes(&own);
        let payload = apply.payload.clone();
        let mended_by = (apply.mode == Mode::Mend).then_some(apply.source);
        apply.making = changes.iter().map(|(run, state, _)| (run.start, (run.clone(), *state))).collect();
        if let Some(source) = mended_by {
            let taken = changes.iter().flat_map(|(run, _, _)| run.clone()).collect();
            self.mending(volume, page, source, &own, &taken);
        }
        for (run, state, at) in changes {
            let first = run.start;
            let what = if state == BlockState::Present {
                let data = payload.slice(at..at + run.len() * BLOCK_BYTES as usize);
                MediumOp::Write { page, first, data }
            } else {
                MediumOp::Shape { page, changes: vec![(run, state)] }
            };
            self.exec_medium(id, first, what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(mode: Mode, source: &[BlockState]) -> ApplyPage {
        let mut blocks = BlockStates::absent(16);
        for (n, state) in source.iter().enumerate() {
            blocks.set(n as u32, *state);
        }
        let present = source.iter().filter(|s| **s == BlockState::Present).count();
        let page =
            ReplyBody::Page { blocks, pending: Vec::new(), pending_before_start: false, missed: 0, next: u64::MAX };
        let payload = Bytes::from(vec![1; present * BLOCK_BYTES as usize]);
        ApplyPage::new(mode, Generation(1), page, payload).expect("a page whose payload fits")
    }

    #[test]
    fn a_fill_never_touches_what_a_client_wrote() {
        use BlockState::{Absent, Hole, Present, Stale};
        for source in [Absent, Present, Hole, Stale] {
            let page = apply(Mode::Fill, &[source]);
            assert_eq!(page.becomes(Present, source), None);
            assert_eq!(page.becomes(Hole, source), None);
        }
        let page = apply(Mode::Fill, &[Absent]);
        assert_eq!(page.becomes(Stale, Absent), Some(Absent), "what the source does not have must go (R9)");
        assert_eq!(page.becomes(Absent, Stale), Some(Stale), "a bad block stays known as one (R12)");
    }

    #[test]
    fn runs_find_their_data_behind_blocks_that_are_left_alone() {
        use BlockState::{Hole, Present};
        let page = apply(Mode::Fill, &[Present, Present, Hole, Present]);
        let mut own = BlockStates::absent(16);
        own.set(0, Present);
        let block = BLOCK_BYTES as usize;
        assert_eq!(page.changes(&own), [(1..2, Present, block), (2..3, Hole, 2 * block), (3..4, Present, 2 * block)]);
    }

    #[test]
    fn a_page_with_too_little_data_is_refused() {
        let blocks = apply(Mode::Fill, &[BlockState::Present]).blocks;
        let page =
            ReplyBody::Page { blocks, pending: Vec::new(), pending_before_start: false, missed: 0, next: u64::MAX };
        assert!(ApplyPage::new(Mode::Fill, Generation(1), page, Bytes::new()).is_none());
    }
}
