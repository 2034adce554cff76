//! Executions: what is done to one page for one request, in the right order.
//!
//! ```text
//! begin ─► Queued ─► Preparing (record loaded, pending mark durable: I3) ─► Running (medium) ─► finish ─► reply
//! ```
//! Executions on a page whose blocks overlap run one after the other unless both only read, in the order in which they
//! came, so a checksum is never compared with half a write and a fill never overtakes a client's write.

use super::contract::{Output, Rot};
use super::handles::ReplyTo;
use super::medium::{MediumAnswer, MediumOp, PageRecord, Record};
use super::{Device, Line, MAX_CACHED_RECORDS, Owner, StorageServer};
use crate::ids::{BootId, VolumeId};
use crate::layer::{BLOCK_BYTES, BlockState, BlockStates, PageKey};
use crate::mutants::{Mutant, on};
use crate::wire::ReplyBody;
use bytes::{Bytes, BytesMut};
use std::collections::BTreeSet;
use std::ops::Range;

use super::fill::{ApplyPage, ServePage};
use super::reserve::Reserve;
use super::survey::Survey;

/// Names an execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ExecId(pub(super) u64);

/// One request, or one page of a fill, being carried out.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) volume: VolumeId,
    pub(super) boot: BootId,
    pub(super) page: PageKey,
    pub(super) blocks: Range<u32>,
    pub(super) work: Work,
    stage: Stage,
    outstanding: u32,
    /// The medium had no room.
    no_space: bool,
    /// It counts among those that need the page's pending mark.
    pub(super) is_marked: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Queued,
    Preparing,
    Running,
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Work {
    Read {
        to: ReplyTo,
        data: ReadData,
        bad: Vec<u32>,
    },
    Write {
        to: ReplyTo,
        data: Bytes,
    },
    Discard {
        to: ReplyTo,
    },
    Flush {
        to: ReplyTo,
        boots: Vec<BootId>,
    },
    /// Slots for pages.
    Reserve(Reserve),
    /// Which pages were ever written.
    Survey(Survey),
    /// The source of a fill or settle.
    Serve(ServePage),
    /// A page from a peer.
    Apply(ApplyPage),
    /// A settle's mark on a page of a `Syncing` member (H7).
    Unsync,
}

/// The data of a read as it comes together.
#[derive(Debug)]
pub(super) enum ReadData {
    /// Nothing yet.
    None,
    /// One run: the medium's own bytes, not copied.
    Whole(Bytes),
    /// Several runs, copied into place; holes and what is absent stay zero.
    Parts(BytesMut),
}

/// What runs and waits on one page.
#[derive(Debug, Default)]
pub(super) struct PageQueue {
    running: Vec<ExecId>,
    waiting: Line<ExecId>,
    loading: bool,
}

impl Work {
    pub(super) fn read(to: ReplyTo, _blocks: Range<u32>) -> Self {
        Self::Read { to, data: ReadData::None, bad: Vec::new() }
    }

    fn only_reads(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Serve(_))
    }

    fn reply_to(&self) -> Option<ReplyTo> {
        match self {
            Self::Read { to, .. } | Self::Write { to, .. } | Self::Discard { to } | Self::Flush { to, .. } => Some(*to),
            Self::Reserve(reserve) => Some(reserve.to),
            Self::Survey(survey) => Some(survey.to),
            Self::Serve(serve) => Some(serve.to),
            Self::Apply(_) | Self::Unsync => None,
        }
    }
}

impl Exec {
    pub(super) fn new(volume: VolumeId, boot: BootId, page: PageKey, blocks: Range<u32>, work: Work) -> Self {
        let stage = Stage::Queued;
        Self { volume, boot, page, blocks, work, stage, outstanding: 0, no_space: false, is_marked: false }
    }

    /// A flush of devices: on no page, running at once.
    pub(super) fn flush(volume: VolumeId, boot: BootId, to: ReplyTo, boots: Vec<BootId>) -> Self {
        let devices = boots.len() as u32;
        Self::pageless(volume, boot, Work::Flush { to, boots }, devices)
    }

    /// A reservation: on no page's queue, waiting for what it asks of the devices.
    pub(super) fn reserve(volume: VolumeId, boot: BootId, reserve: Reserve) -> Self {
        Self::pageless(volume, boot, Work::Reserve(reserve), 0)
    }

    /// A survey of a layer's pages: it waits for nothing that runs on them.
    pub(super) fn survey(volume: VolumeId, boot: BootId, survey: Survey) -> Self {
        Self::pageless(volume, boot, Work::Survey(survey), 0)
    }

    fn pageless(volume: VolumeId, boot: BootId, work: Work, outstanding: u32) -> Self {
        let page = PageKey { copy: Default::default(), layer: Default::default(), page: 0 };
        let mut exec = Self::new(volume, boot, page, 0..0, work);
        (exec.stage, exec.outstanding) = (Stage::Running, outstanding);
        exec
    }

    /// Whether the end of this opening ends it too. A flush or reservation may be on several devices; then the loss of
    /// any of them does.
    pub(super) fn uses(&self, boot: BootId) -> bool {
        match &self.work {
            Work::Flush { boots, .. } => boots.contains(&boot),
            Work::Reserve(reserve) => reserve.uses(boot),
            _ => self.boot == boot,
        }
    }

    /// So many more operations are handed to the medium.
    pub(super) fn await_answers(&mut self, more: u32) {
        self.outstanding += more;
    }

    /// The reservation that it is, if it is one.
    pub(super) fn as_reserve(&self) -> Option<&Reserve> {
        if let Work::Reserve(reserve) = &self.work { Some(reserve) } else { None }
    }

    /// Whether the medium owes nothing.
    pub(super) fn is_answered(&self) -> bool {
        self.outstanding == 0
    }

    /// There is no room for it.
    pub(super) fn refuse_room(&mut self) {
        self.no_space = true;
    }

    fn conflicts(&self, other: &Self) -> bool {
        let overlap = self.blocks.start < other.blocks.end && other.blocks.start < self.blocks.end;
        overlap && !(self.work.only_reads() && other.work.only_reads())
    }
}

impl Device {
    /// Keeps a record, in place of one that nothing runs on if there are many.
    fn cache(&mut self, page: PageKey, record: PageRecord) {
        while self.records.len() >= MAX_CACHED_RECORDS {
            let after = self.evicted.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
            let idle = |key: &&PageKey| !self.pages.contains_key(key);
            let range = (after, std::ops::Bound::Unbounded);
            let next = self.records.range(range).map(|(key, _)| key).find(idle).copied();
            let Some(victim) = next.or_else(|| self.records.keys().find(idle).copied()) else { break };
            self.records.remove(&victim);
            self.evicted = Some(victim);
        }
        self.records.insert(page, record);
    }
}

impl StorageServer {
    /// Counts an execution in: a fence waits for it (H19), its handle's window holds it.
    pub(super) fn admit(&mut self, exec: Exec) -> ExecId {
        let id = ExecId(self.mint());
        self.known(exec.volume).executing += 1;
        if let Some(handle) = exec.work.reply_to().and_then(|to| self.handles.get_mut(&to.header.handle)) {
            handle.requests += 1;
            handle.bytes += exec.work.reply_to().map_or(0, |to| to.bytes);
        }
        self.execs.insert(id, exec);
        id
    }

    /// Puts an execution into its page's queue.
    pub(super) fn begin(&mut self, exec: Exec) {
        let (boot, page) = (exec.boot, exec.page);
        let id = self.admit(exec);
        let device = self.devices.get_mut(&boot).expect("located on an open device");
        device.pages.entry(page).or_default().waiting.push_back(id);
        self.start_waiting(boot, page);
    }

    /// Starts what waits on a page and conflicts with nothing that runs or waits before it.
    fn start_waiting(&mut self, boot: BootId, page: PageKey) {
        let Some(device) = self.devices.get_mut(&boot) else { return };
        let Some(queue) = device.pages.get_mut(&page) else { return };
        let mut started = Vec::new();
        let mut kept: Line<ExecId> = Line::new();
        for id in std::mem::take(&mut queue.waiting) {
            let exec = &self.execs[&id];
            let blocked = |other: &ExecId| self.execs[other].conflicts(exec);
            if queue.running.iter().any(blocked) || kept.iter().any(blocked) {
                kept.push_back(id);
            } else {
                queue.running.push(id);
                started.push(id);
            }
        }
        queue.waiting = kept;
        if queue.running.is_empty() && queue.waiting.is_empty() {
            device.pages.remove(&page);
        }
        for id in started {
            self.prepare(id);
        }
    }

    fn prepare(&mut self, id: ExecId) {
        let exec = self.execs.get_mut(&id).expect("started");
        exec.stage = Stage::Preparing;
        let (boot, page) = (exec.boot, exec.page);
        let device = self.devices.get_mut(&boot).expect("open while executions run");
        let queue = device.pages.get_mut(&page).expect("it runs there");
        if !device.records.contains_key(&page) && !std::mem::replace(&mut queue.loading, true) {
            let volume = self.execs[&id].volume;
            self.medium(boot, Owner::Load(volume, page), MediumOp::Load(page));
        }
        if !on(Mutant::DataBeforeMark) {
            self.mark_for(id);
        }
        self.try_run(id);
    }

    pub(super) fn loaded(&mut self, boot: BootId, volume: VolumeId, page: PageKey, answer: MediumAnswer) {
        let MediumAnswer::Page(found) = answer else { panic!("a load is answered with a page") };
        let layer = self.volumes.get_mut(&volume).and_then(|v| v.layer_mut(&page));
        let blocks = layer.map_or(0, |l| l.page_bytes) / BLOCK_BYTES;
        let blank = PageRecord {
            allocated: false,
            blocks: BlockStates::absent(blocks),
            unsynced: false,
            pending: false,
            missed: 0,
        };
        let Some(device) = self.devices.get_mut(&boot) else { return };
        device.cache(page, found.unwrap_or(blank));
        if let Some(queue) = device.pages.get_mut(&page) {
            queue.loading = false;
        }
        self.run_prepared(boot, page);
    }

    /// Something that executions on this page waited for is there.
    pub(super) fn run_prepared(&mut self, boot: BootId, page: PageKey) {
        let queue = self.devices.get(&boot).and_then(|d| d.pages.get(&page));
        let running = queue.map(|q| q.running.clone()).unwrap_or_default();
        for id in running {
            if self.execs.get(&id).is_some_and(|e| e.stage == Stage::Preparing) {
                self.try_run(id);
            }
        }
    }

    /// The page's marks found no room: nothing that needs them is done (I3), and the marks are as they were.
    pub(super) fn refuse_unmarked(&mut self, boot: BootId, volume: VolumeId, page: PageKey) {
        let queue = self.devices.get(&boot).and_then(|d| d.pages.get(&page));
        let mut refused = queue.map(|q| q.running.clone()).unwrap_or_default();
        let waits = |exec: &Exec| exec.stage == Stage::Preparing && !self.mark_is_durable(exec);
        refused.retain(|id| self.execs.get(id).is_some_and(waits));
        for id in &refused {
            let exec = self.execs.get_mut(id).expect("just looked at");
            (exec.stage, exec.is_marked, exec.no_space) = (Stage::Running, false, true);
        }
        if let Some(layer) = self.known(volume).layer_mut(&page) {
            layer.miss_refused(page.page);
            layer.pending.retain(|number, pending| *number != page.page || pending.durable);
            if let Some(pending) = layer.pending.get_mut(&page.page) {
                pending.busy = pending.busy.saturating_sub(refused.len() as u32);
            }
        }
        refused.into_iter().for_each(|id| self.finish_if_done(id));
    }

    fn try_run(&mut self, id: ExecId) {
        let exec = &self.execs[&id];
        let device = &self.devices[&exec.boot];
        if device.records.contains_key(&exec.page) && (self.mark_is_durable(exec) || on(Mutant::DataBeforeMark)) {
            self.execs.get_mut(&id).expect("looked at above").stage = Stage::Running;
            self.run(id);
            if on(Mutant::DataBeforeMark) {
                self.mark_for(id);
            }
            self.finish_if_done(id);
        }
    }

    fn run(&mut self, id: ExecId) {
        let exec = &self.execs[&id];
        let (boot, page, blocks, first) = (exec.boot, exec.page, exec.blocks.clone(), exec.blocks.start);
        let record = &self.devices[&boot].records[&page];
        match &exec.work {
            Work::Read { .. } => {
                let runs = record.blocks.runs(blocks);
                self.run_read(id, boot, page, &runs);
            }
            Work::Write { data, .. } => {
                let what = MediumOp::Write { page, first, data: data.clone() };
                self.exec_medium(id, first, what);
            }
            Work::Discard { .. } => {
                self.exec_medium(id, first, MediumOp::Shape { page, changes: vec![(blocks, BlockState::Hole)] });
            }
            Work::Serve(_) => self.run_serve(id),
            Work::Apply(_) => self.run_apply(id),
            Work::Unsync => self.exec_medium(id, first, MediumOp::Commit(vec![Record::MarkUnsynced(page)])),
            Work::Flush { .. } | Work::Reserve(_) | Work::Survey(_) => unreachable!("on no page"),
        }
    }

    /// Hands an operation to the medium for an execution, which goes on when all of them are answered.
    pub(super) fn exec_medium(&mut self, id: ExecId, block: u32, what: MediumOp) {
        let exec = self.execs.get_mut(&id).expect("running");
        exec.outstanding += 1;
        let boot = exec.boot;
        self.medium(boot, Owner::Exec(id, block), what);
    }

    /// Like [`Self::exec_medium`], for the next page after the one served.
    pub(super) fn exec_medium_next(&mut self, id: ExecId, what: MediumOp) {
        let exec = self.execs.get_mut(&id).expect("running");
        exec.outstanding += 1;
        let boot = exec.boot;
        self.medium(boot, Owner::ExecNext(id), what);
    }

    fn run_read(&mut self, id: ExecId, boot: BootId, page: PageKey, runs: &[(Range<u32>, BlockState)]) {
        let exec = self.execs.get_mut(&id).expect("running");
        let first = exec.blocks.start;
        let length = exec.blocks.len() * BLOCK_BYTES as usize;
        let Work::Read { data, bad, .. } = &mut exec.work else { unreachable!("a read") };
        if runs.len() > 1 || runs[0].1 != BlockState::Present {
            *data = ReadData::Parts(BytesMut::zeroed(length));
        }
        for (run, state) in runs {
            if *state == BlockState::Stale {
                bad.extend(run.clone().map(|block| block - first));
            }
        }
        debug_assert_eq!(exec.boot, boot);
        if !bad.is_empty() {
            let volume = exec.volume;
            self.bad_was_read(volume, page);
        }
        for (run, _) in runs.iter().filter(|(_, state)| *state == BlockState::Present) {
            self.exec_medium(id, run.start, MediumOp::Read { page, blocks: run.clone() });
        }
    }

    pub(super) fn exec_answered(&mut self, id: ExecId, block: u32, answer: MediumAnswer) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        exec.outstanding -= 1;
        match exec.work {
            Work::Survey(_) => return self.survey_answered(id, answer),
            Work::Reserve(_) => return self.reserve_answered(id, block, answer),
            _ => {}
        }
        let (boot, page) = (exec.boot, exec.page);
        let device = self.devices.get_mut(&boot);
        let record = device.and_then(|device| {
            if matches!(exec.work, Work::Write { .. }) && answer == MediumAnswer::Done {
                device.reserved.remove(&page); // What was reserved is taken.
            }
            device.records.get_mut(&page)
        });
        match (&mut exec.work, answer) {
            (_, MediumAnswer::NoSpace) => exec.no_space = true,
            (Work::Read { data, bad, .. }, MediumAnswer::Data { data: read, bad: failed }) => {
                let first = exec.blocks.start;
                bad.extend(failed.iter().map(|b| b + block - first));
                keep_read(data, ((block - first) * BLOCK_BYTES) as usize, read);
                self.note_bad(id, block, &failed);
            }
            (Work::Serve(serve), MediumAnswer::Data { data, bad }) => {
                serve.keep(block, data, &bad);
                self.note_bad(id, block, &bad);
            }
            (Work::Write { to, data, .. }, _) => {
                let record = record.expect("kept while its page has work");
                let takes_room = !std::mem::replace(&mut record.allocated, true);
                record.blocks.set_range(block..block + (data.len() as u32 / BLOCK_BYTES), BlockState::Present);
                // Not before: until now what is free did not show it.
                if let Some(handle) = self.handles.get_mut(&to.header.handle).filter(|_| takes_room) {
                    handle.used += 1;
                }
            }
            (Work::Discard { .. }, _) => {
                let record = record.expect("kept while its page has work");
                record.blocks.set_range(exec.blocks.clone(), BlockState::Hole);
            }
            (Work::Unsync, _) => record.expect("kept while its page has work").blocks.make_stale(),
            (Work::Apply(apply), _) => apply.applied(block, record.expect("kept while its page has work")),
            (Work::Flush { .. } | Work::Reserve(_) | Work::Survey(_) | Work::Read { .. } | Work::Serve(_), _) => {
                unreachable!("answered otherwise")
            }
        }
        self.finish_if_done(id);
    }

    pub(super) fn exec_next(&mut self, id: ExecId, answer: MediumAnswer) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        exec.outstanding -= 1;
        let (Work::Serve(serve), MediumAnswer::NextPage(next)) = (&mut exec.work, answer) else {
            panic!("only a source asks for the next page");
        };
        serve.next = next.unwrap_or(u64::MAX);
        self.finish_if_done(id);
    }

    pub(super) fn flush_answered(&mut self, id: ExecId) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        exec.outstanding -= 1;
        self.finish_if_done(id);
    }

    /// R12: a block that cannot be read becomes stale, never absent, and is repaired from another member.
    fn note_bad(&mut self, id: ExecId, first: u32, bad: &[u32]) {
        if bad.is_empty() {
            return;
        }
        let exec = &self.execs[&id];
        let (volume, boot, page) = (exec.volume, exec.boot, exec.page);
        let blocks: Vec<u32> = bad.iter().map(|b| b + first).collect();
        if let Some(record) = self.devices.get_mut(&boot).and_then(|d| d.records.get_mut(&page)) {
            for &block in &blocks {
                record.blocks.set(block, if on(Mutant::BadIsAbsent) { BlockState::Absent } else { BlockState::Stale });
            }
        }
        let known = self.known(volume);
        known.executing += 1;
        if let Some(copy) = known.copies.get_mut(&page.copy) {
            // Others were asked for less.
            copy.repairs.insert((page.layer, page.page), BTreeSet::new());
        }
        self.out.push(Output::Rot(Rot { volume, page, bad: blocks.len() as u32 }));
        self.medium(boot, Owner::Bad(volume), MediumOp::Commit(vec![Record::Stale { page, blocks }]));
        self.due(self.now, super::Due::Pulls(volume));
    }

    pub(super) fn finish_if_done(&mut self, id: ExecId) {
        if self.execs.get(&id).is_some_and(|e| e.stage == Stage::Running && e.outstanding == 0) {
            self.finish(id);
        }
    }

    fn finish(&mut self, id: ExecId) {
        let exec = self.execs.remove(&id).expect("looked at by the caller");
        let (volume, boot, page) = (exec.volume, exec.boot, exec.page);
        self.unmark_for(&exec);
        let to = exec.work.reply_to();
        let (body, payload) = if exec.no_space { self.out_of_room(exec) } else { self.result(exec) };
        if let Some(to) = to {
            self.release(to, boot, body, payload);
        }
        self.leave_page(id, boot, page);
        self.finished_one(volume);
        self.finish_opens();
    }

    fn result(&mut self, exec: Exec) -> (ReplyBody, Bytes) {
        match exec.work {
            Work::Read { data, bad, .. } => {
                let data = match data {
                    ReadData::Whole(data) => data,
                    ReadData::Parts(data) => data.freeze(),
                    ReadData::None => Bytes::new(),
                };
                if bad.is_empty() { (ReplyBody::Data, data) } else { (ReplyBody::BadBlock { blocks: bad }, data) }
            }
            Work::Reserve(reserve) => {
                self.reserved(&reserve);
                (ReplyBody::Done, Bytes::new())
            }
            Work::Survey(survey) => (survey.reply(), Bytes::new()),
            Work::Serve(serve) => {
                self.note_served(exec.volume, exec.page, &serve);
                serve.reply()
            }
            Work::Apply(apply) => {
                self.page_applied(exec.page, &apply);
                (ReplyBody::Done, Bytes::new())
            }
            Work::Unsync => {
                self.page_unsynced(exec.page);
                (ReplyBody::Done, Bytes::new())
            }
            Work::Write { .. } | Work::Discard { .. } | Work::Flush { .. } => (ReplyBody::Done, Bytes::new()),
        }
    }

    /// No room for a write that was within its credit can only be a write that drew on the reserve: nothing was changed, the
    /// driver says so and tries again (R8, H22). A page from a peer is asked for again.
    fn out_of_room(&mut self, exec: Exec) -> (ReplyBody, Bytes) {
        match exec.work {
            Work::Apply(apply) => self.page_refused(exec.page, &apply),
            // The settle that marks it begins again.
            Work::Unsync => self.pause(exec.page.copy),
            _ => {}
        }
        (ReplyBody::NoSpace, Bytes::new())
    }

    /// Gives an execution's place in the window back and answers it.
    fn release(&mut self, to: ReplyTo, boot: BootId, body: ReplyBody, payload: Bytes) {
        let id = to.header.handle;
        if let Some(handle) = self.handles.get_mut(&id) {
            handle.requests -= 1;
            handle.bytes -= to.bytes;
        }
        self.grant(id);
        self.answer(to.conn, &to.header, boot, body, payload);
        self.forget_handle(id);
    }

    fn leave_page(&mut self, id: ExecId, boot: BootId, page: PageKey) {
        let queue = self.devices.get_mut(&boot).and_then(|d| d.pages.get_mut(&page));
        if let Some(queue) = queue {
            queue.running.retain(|other| *other != id);
            queue.waiting.retain(|other| *other != id);
            self.start_waiting(boot, page);
        }
    }

    /// R3: the device is gone; whatever was asked is answered `NotServing`, never success. What other devices still answer for
    /// it (a flush is on several) goes unheeded.
    pub(super) fn abandon(&mut self, id: ExecId) {
        let Some(exec) = self.execs.remove(&id) else { return };
        if let Some(to) = exec.work.reply_to() {
            self.release(to, BootId::NONE, ReplyBody::NotServing, Bytes::new());
        }
        self.leave_page(id, exec.boot, exec.page);
        self.finished_one(exec.volume);
        self.finish_opens();
    }

    /// Records of a layer's pages in memory are out of date after a mark on the whole layer.
    pub(super) fn forget_records(&mut self, boot: BootId, copy: crate::ids::CopyId) {
        if let Some(device) = self.devices.get_mut(&boot) {
            device.records.retain(|page, _| page.copy != copy);
        }
    }
}

fn keep_read(data: &mut ReadData, at: usize, read: Bytes) {
    match data {
        ReadData::None => *data = ReadData::Whole(read),
        ReadData::Parts(whole) => whole[at..at + read.len()].copy_from_slice(&read),
        ReadData::Whole(_) => unreachable!("one run is read once"),
    }
}
