//! The puller: fills a `Syncing` copy, settles pages, repairs bad blocks (H6, H11c, H14, M8; seed 002 Fig. 6).
//!
//! ```text
//! Waiting ─► Connecting ─► Opening ─► (settle: Listing) ─► Running ─► all applied ─► Flush ─► marks durable ─► over
//!    ▲            │            │              │               │
//!    └────────────┴────────────┴──────────────┴───────────────┘ broken or refused: again after a pause
//! ```
//! One pull at a time per copy, called for by the stored map alone and dropped at every promise; a page that was under
//! way then is asked for again. `unsynced` is cleared durably only after the filled data is durable.

use super::contract::{Output, PeerId, Rot};
use super::fill::{ApplyPage, Mode};
use super::medium::{MediumAnswer, MediumOp, Record};
use super::mend::{is_bad_still, wanted_mend, wanted_repair};
use super::page_ops::{Exec, Work};
use super::report::settle_in;
use super::{Due, Owner, StorageServer};
use crate::control::{FillLimit, SettleName};
use crate::ids::{CopyId, Generation, Incarnation, LayerId, OpenNumber, ServerId, VolumeId};
use crate::layer::{BLOCK_BYTES, PageKey};
use crate::map::{Group, Member, MemberState, VolumeMap};
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use crate::wire::{
    Class, HandleId, Opener, ReplyBody, ReplyFrame, RequestBody, RequestFrame, RequestHeader, RequestId, Start,
};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Pages asked for at once: keeps a disk and a connection busy, and bounds what a fill takes from others.
const WINDOW_PAGES: usize = 4;
/// Pages applied before they are made durable together.
const FLUSH_PAGES: usize = 64;
/// Pause after a source could not be reached or refused.
const RETRY_MS: u64 = 1_000;

/// One copy's background work.
#[derive(Debug)]
pub(super) struct Pull {
    pub(super) volume: VolumeId,
    pub(super) kind: Kind,
    pub(super) layer: LayerId,
    pub(super) group: u32,
    generation: Generation,
    source: ServerId,
    peer: PeerId,
    stage: Stage,
    handle: HandleId,
    requests: u64,
    asked: BTreeMap<RequestId, u64>,
    applying: BTreeSet<u64>,
    /// Pages that are named one by one: a settle's, a repair's, and those of a fill below its cursor.
    todo: VecDeque<u64>,
    /// Where the cursor of a fill stood when it began; its next page by number; how many there are.
    start: u64,
    scan: u64,
    pages: u64,
    /// The source has nothing before this page.
    source_next: u64,
    looking: bool,
    /// Applied, not yet durable.
    applied: Vec<u64>,
    /// Of those that were applied: a block is stale at the source, too.
    stale: BTreeSet<u64>,
    /// Being made durable: named pages, and the cursor that holds then.
    flushing: Option<(Vec<u64>, u64)>,
    /// Pages of a settle that are not yet durable.
    left: u64,
    /// The pace of a fill: nothing more is asked for before this, microseconds.
    paced_until_us: u64,
    /// A timer is set for that.
    waits: bool,
}

/// What a pull is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A `Syncing` copy.
    Fill,
    /// Suspect pages; on a `Syncing` copy they are marked unsynced instead.
    Settle { name: SettleName, syncing: bool },
    /// Bad blocks of an `Active` copy.
    Repair,
    /// Those of the authoritative copy of a settle.
    Mend,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Connecting,
    Opening,
    Listing,
    Running,
}

impl Pull {
    /// Pages not yet settled and durable in that settle.
    pub(super) fn settle_left(&self, name: &SettleName) -> u64 {
        match self.kind {
            Kind::Settle { name: own, .. } if own == *name && self.stage == Stage::Running => self.left,
            _ => u64::MAX,
        }
    }

    /// The first page that is not applied: everything below is.
    fn low(&self) -> u64 {
        let open = self.asked.values().chain(&self.applying).filter(|page| **page >= self.start).min();
        let low = self.scan.min(open.copied().unwrap_or(u64::MAX));
        if low >= self.pages { u64::MAX } else { low }
    }

    fn is_idle(&self) -> bool {
        self.asked.is_empty() && self.applying.is_empty() && self.flushing.is_none() && !self.looking
    }

    fn mode(&self) -> Mode {
        match self.kind {
            Kind::Fill => Mode::Fill,
            Kind::Settle { .. } => Mode::Settle,
            Kind::Repair => Mode::Repair,
            Kind::Mend => Mode::Mend,
        }
    }
}

impl StorageServer {
    /// Begins what the stored map calls for, unless a higher generation is promised.
    pub(super) fn start_pulls(&mut self, volume: VolumeId) {
        let Some(known) = self.volumes.get(&volume) else { return };
        let Some(map) = known.map.as_ref().filter(|map| map.generation == known.promised) else { return };
        let mut wanted = Vec::new();
        for (_, group_number, group) in map.groups() {
            let Some(member) = group.members.iter().find(|m| m.server == self.config.server) else { continue };
            let open = known.copies.get(&member.copy).and_then(|c| c.boot);
            if open == Some(member.boot) && !self.pulls.contains_key(&member.copy) {
                wanted
                    .extend(self.wanted_pull(volume, map, group, group_number, member).map(|pull| (member.copy, pull)));
            }
        }
        for (copy, pull) in wanted {
            self.connect(copy, pull);
        }
    }

    fn wanted_pull(&self, volume: VolumeId, map: &VolumeMap, group: &Group, number: u32, own: &Member) -> Option<Pull> {
        let copy = &self.volumes[&volume].copies[&own.copy];
        let name = settle_in(map, own.copy);
        let settled = |n: &SettleName| copy.settled == Some(*n) || on(Mutant::SettleNotNamed) && copy.settled.is_some();
        let own_word = own.state == MemberState::Active && on(Mutant::WrongAuthority);
        let settles = name.filter(|n| n.authoritative != own.copy && !settled(n) && !own_word);
        let layer_id = *copy.layers.keys().next()?;
        let layer = &copy.layers[&layer_id];
        let pages = self.pages_of(volume, own.copy, layer_id);
        let mend = name.filter(|n| n.authoritative == own.copy && own.state == MemberState::Active);
        let mend = mend.and_then(|name| wanted_mend(group, own, copy, layer_id, name));
        let source = source_of(group, own, name);
        let (kind, source, todo) = match (own.state, settles) {
            (MemberState::Failed, _) => return None,
            (state, Some(name)) => {
                (Kind::Settle { name, syncing: state == MemberState::Syncing }, source?, VecDeque::new())
            }
            (MemberState::Syncing, None) if layer.unsynced_pages(pages) > 0 => {
                (Kind::Fill, source?, layer.unsynced.range(..layer.cursor.min(pages)).copied().collect())
            }
            (MemberState::Syncing, None) => return None,
            (MemberState::Active, None) => match mend {
                Some((source, pages)) => (Kind::Mend, source, pages),
                None => {
                    let (source, pages) = wanted_repair(group, own, copy, layer_id, name)?;
                    (Kind::Repair, source, pages)
                }
            },
        };
        Some(Pull {
            volume,
            kind,
            layer: layer_id,
            group: number,
            generation: map.generation,
            source,
            peer: PeerId(0),
            stage: Stage::Connecting,
            handle: HandleId(0),
            requests: 0,
            asked: BTreeMap::new(),
            applying: BTreeSet::new(),
            todo,
            start: layer.cursor,
            scan: if kind == Kind::Fill { layer.cursor } else { u64::MAX },
            pages,
            source_next: 0,
            looking: false,
            applied: Vec::new(),
            stale: BTreeSet::new(),
            flushing: None,
            left: u64::MAX,
            paced_until_us: 0,
            waits: false,
        })
    }

    fn connect(&mut self, copy: CopyId, mut pull: Pull) {
        let map = self.volumes[&pull.volume].map.as_ref().expect("it called for the pull");
        let addresses = map.server(pull.source).map(|s| s.addresses.clone()).unwrap_or_default();
        let server = pull.source;
        pull.peer = PeerId(self.mint());
        self.out.push(Output::PeerConnect { peer: pull.peer, server, addresses });
        self.pulls.insert(copy, pull);
    }

    /// H6: what is under way is dropped; pages already applied stay unsynced until they are asked for again.
    pub(super) fn drop_pull(&mut self, copy: CopyId) {
        if let Some(pull) = self.pulls.remove(&copy) {
            self.out.push(Output::PeerClose { peer: pull.peer });
        }
    }

    fn pull_of(&self, peer: PeerId) -> Option<CopyId> {
        self.pulls.iter().find(|(_, pull)| pull.peer == peer).map(|(copy, _)| *copy)
    }

    pub(super) fn peer_connected(&mut self, peer: PeerId) {
        if self.tried(peer, true) {
            return;
        }
        let Some(copy) = self.pull_of(peer) else { return self.out.push(Output::PeerClose { peer }) };
        let server = self.config.server;
        let pull = self.pulls.get_mut(&copy).expect("just found");
        pull.stage = Stage::Opening;
        let volume = pull.volume;
        let open = RequestBody::Open {
            volume,
            opener: Opener::Peer { server },
            incarnation: Incarnation(0),
            number: OpenNumber(0),
            start: Start::Fresh,
            grant: Bytes::new(),
        };
        self.ask(copy, open, None);
    }

    pub(super) fn peer_broken(&mut self, peer: PeerId) {
        if self.tried(peer, false) {
            return;
        }
        if let Some(copy) = self.pull_of(peer) {
            self.pause(copy);
        }
    }

    /// Gives a pull up for now; the map still calls for it, so it begins again after a pause.
    pub(super) fn pause(&mut self, copy: CopyId) {
        if let Some(pull) = self.pulls.remove(&copy) {
            self.out.push(Output::PeerClose { peer: pull.peer });
            self.due(self.now.after(RETRY_MS), Due::Pulls(pull.volume));
        }
    }

    fn ask(&mut self, copy: CopyId, body: RequestBody, page: Option<u64>) {
        let pull = self.pulls.get_mut(&copy).expect("asked by it");
        pull.requests += 1;
        let request = RequestId(pull.requests);
        if let Some(page) = page {
            pull.asked.insert(request, page);
        }
        let header = RequestHeader {
            request,
            handle: pull.handle,
            class: Class::Fill,
            generation: pull.generation,
            ..RequestHeader::default()
        };
        let frame = RequestFrame { header, body, payload: Bytes::new() };
        self.out.push(Output::PeerSend { peer: pull.peer, frame });
    }

    pub(super) fn peer_frame(&mut self, peer: PeerId, frame: ReplyFrame) {
        let Some(copy) = self.pull_of(peer) else { return };
        let pull = self.pulls.get_mut(&copy).expect("just found");
        let page = pull.asked.remove(&frame.header.request);
        match (pull.stage, frame.body) {
            (Stage::Opening, ReplyBody::Opened { handle, .. }) => {
                pull.handle = handle;
                if matches!(pull.kind, Kind::Settle { .. }) {
                    pull.stage = Stage::Listing;
                    let body = RequestBody::Suspects { layer: pull.layer, group: pull.group };
                    self.ask(copy, body, None);
                } else {
                    pull.stage = Stage::Running;
                    self.go_on(copy);
                }
            }
            (Stage::Listing, ReplyBody::Pages { pages }) => self.listed(copy, pages),
            (Stage::Running, body @ ReplyBody::Page { .. }) if page.is_some() => {
                self.page_came(copy, page.expect("looked at"), body, frame.payload);
            }
            // A pushed map comes by the operator's order too; nothing to do here.
            (_, ReplyBody::Map { .. }) => {}
            _ => self.pause(copy),
        }
    }

    fn page_came(&mut self, copy: CopyId, page: u64, body: ReplyBody, payload: Bytes) {
        let pull = self.pulls.get_mut(&copy).expect("looked at by the caller");
        if let ReplyBody::Page { next, .. } = body
            && pull.kind == Kind::Fill
            && page + 1 >= pull.source_next
            && next > page + 1
        {
            pull.source_next = next;
        }
        let (volume, layer, generation, mode) = (pull.volume, pull.layer, pull.generation, pull.mode());
        let source = pull.source;
        let Some(mut apply) = ApplyPage::new(mode, generation, body, payload) else { return self.pause(copy) };
        apply.source = source;
        let known = self.known(volume);
        let Some(held) = known.copies.get_mut(&copy) else { return };
        let (Some(boot), page_bytes) = (held.boot, held.layers[&layer].page_bytes) else { return };
        if apply.blocks.len() != page_bytes / BLOCK_BYTES {
            return self.pause(copy);
        }
        let came = apply.payload.len() as u64;
        held.filled_bytes += came;
        self.pulls.get_mut(&copy).expect("looked at by the caller").applying.insert(page);
        if mode == Mode::Fill {
            self.pace(copy, came);
        }
        let key = PageKey { copy, layer, page };
        let blocks = 0..page_bytes / BLOCK_BYTES;
        self.begin(Exec::new(volume, boot, key, blocks, Work::Apply(apply)));
    }

    /// A page from a peer is in its place, volatile.
    pub(super) fn page_applied(&mut self, page: PageKey, apply: &ApplyPage) {
        let Some(pull) = self.pulls.get_mut(&page.copy).filter(|p| p.generation == apply.generation) else { return };
        if pull.applying.remove(&page.page) && !apply.dropped {
            pull.applied.push(page.page);
            if apply.leaves_stale {
                pull.stale.insert(page.page);
            }
            self.go_on(page.copy);
        }
    }

    /// There was no room for a page from a peer: it is asked for again after a pause.
    pub(super) fn page_refused(&mut self, page: PageKey, apply: &ApplyPage) {
        if self.pulls.get(&page.copy).is_some_and(|pull| pull.generation == apply.generation) {
            self.pause(page.copy);
        }
    }

    /// Asks for more, makes durable what has come, or ends.
    pub(super) fn go_on(&mut self, copy: CopyId) {
        while let Some(page) = self.next_wanted(copy) {
            let pull = &self.pulls[&copy];
            let (layer, group) = (pull.layer, pull.group);
            let body = match pull.kind {
                Kind::Settle { .. } => RequestBody::Settle { layer, group, page },
                Kind::Fill | Kind::Repair | Kind::Mend => RequestBody::Fill { layer, group, page },
            };
            self.ask(copy, body, Some(page));
        }
        let Some(pull) = self.pulls.get_mut(&copy) else { return };
        let all_asked = pull.todo.is_empty() && pull.scan >= pull.pages;
        let all_applied = all_asked && pull.is_idle();
        if pull.flushing.is_none() && (all_applied || pull.applied.len() >= FLUSH_PAGES) {
            let (volume, cursor, kind, peer) = (pull.volume, pull.low(), pull.kind, pull.peer);
            pull.flushing = Some((std::mem::take(&mut pull.applied), cursor));
            let Some(boot) = self.known(volume).copies.get(&copy).and_then(|c| c.boot) else { return };
            self.known(volume).executing += 1;
            if on(if kind == Kind::Fill { Mutant::FlagBeforeData } else { Mutant::SettleUnflushed }) {
                return self.pull_flushed(copy, peer);
            }
            self.medium(boot, Owner::PullFlush(copy, peer), MediumOp::Flush);
        }
    }

    fn fill_limit(&self, pull: &Pull) -> FillLimit {
        self.volumes.get(&pull.volume).map(|v| v.fill_limit).unwrap_or_default()
    }

    /// So many bytes came: the next page waits for as long as they may take.
    fn pace(&mut self, copy: CopyId, bytes: u64) {
        let now_us = self.now.0 * 1000;
        let Some(pull) = self.pulls.get(&copy) else { return };
        let cost = (bytes * 1_000_000).checked_div(self.fill_limit(pull).bytes_per_second).unwrap_or(0);
        if let Some(pull) = self.pulls.get_mut(&copy) {
            pull.paced_until_us = pull.paced_until_us.max(now_us) + cost;
        }
    }

    /// Whether the pace of a fill lets it ask for more now; sets a timer if not.
    fn may_ask(&mut self, copy: CopyId) -> bool {
        let now_us = self.now.0 * 1000;
        let Some(pull) = self.pulls.get_mut(&copy) else { return false };
        if pull.paced_until_us <= now_us {
            return true;
        }
        let at = Millis(pull.paced_until_us.div_ceil(1000));
        if !std::mem::replace(&mut pull.waits, true) {
            self.due(at, Due::Fill(copy));
        }
        false
    }

    /// A fill waited for its pace.
    pub(super) fn fill_due(&mut self, copy: CopyId) {
        if let Some(pull) = self.pulls.get_mut(&copy) {
            pull.waits = false;
            self.go_on(copy);
        }
    }

    /// The next page to ask for within the window. A fill skips what neither side has.
    fn next_wanted(&mut self, copy: CopyId) -> Option<u64> {
        let pull = self.pulls.get(&copy)?;
        // A settle holds sessions and a repair is one page: neither is slowed down.
        let window = match (pull.kind, self.fill_limit(pull).pages) {
            (Kind::Fill, 1..) => self.fill_limit(pull).pages as usize,
            _ => WINDOW_PAGES,
        };
        let under_way = pull.asked.len() + pull.applying.len();
        if pull.stage != Stage::Running || under_way >= window || !self.may_ask(copy) {
            return None;
        }
        let pull = self.pulls.get_mut(&copy)?;
        if let Some(page) = pull.todo.pop_front() {
            return Some(page);
        }
        if pull.scan >= pull.pages || pull.looking {
            return None;
        }
        if pull.scan < pull.source_next {
            pull.looking = true;
            let (volume, peer) = (pull.volume, pull.peer);
            let what = MediumOp::NextPage { copy, layer: pull.layer, from: pull.scan };
            let boot = self.known(volume).copies.get(&copy)?.boot?;
            self.medium(boot, Owner::PullNext(copy, peer), what);
            return None;
        }
        pull.scan += 1;
        Some(pull.scan - 1)
    }

    pub(super) fn pull_next(&mut self, copy: CopyId, peer: PeerId, answer: MediumAnswer) {
        let Some(pull) = self.pulls.get_mut(&copy).filter(|p| p.peer == peer && p.looking) else { return };
        let MediumAnswer::NextPage(own) = answer else { panic!("answered with a page number") };
        pull.looking = false;
        let own = own.unwrap_or(u64::MAX);
        if own < pull.source_next {
            // Something lies here that the source does not have: it is to become as the source's.
            pull.scan = own;
            pull.source_next = own;
        } else {
            pull.scan = pull.source_next.min(pull.pages);
        }
        self.go_on(copy);
    }

    /// The pull that asked, if it is still under way and no promise came in between (H6).
    fn same_pull(&mut self, volume: VolumeId, copy: CopyId, peer: PeerId) -> Option<&mut Pull> {
        let promised = self.volumes[&volume].promised;
        let counts = |p: &&mut Pull| p.generation == promised || on(Mutant::LateFillApplied);
        self.pulls.get_mut(&copy).filter(|p| p.peer == peer).filter(counts)
    }

    /// What this very pull had applied when it asked for the flush is durable.
    pub(super) fn pull_flushed(&mut self, copy: CopyId, peer: PeerId) {
        let Some(volume) = self.volume_of(copy) else { return };
        let Some(pull) = self.same_pull(volume, copy, peer) else { return self.finished_one(volume) };
        let Some((pages, cursor)) = &pull.flushing else { return self.finished_one(volume) };
        let (layer, kind, cursor) = (pull.layer, pull.kind, *cursor);
        let key = |page: &u64| PageKey { copy, layer, page: *page };
        let records: Vec<Record> = match kind {
            Kind::Fill => {
                let named = pages.iter().map(|page| Record::ClearUnsynced(key(page)));
                named.chain([Record::Cursor { copy, layer, cursor }]).collect()
            }
            Kind::Settle { .. } | Kind::Repair | Kind::Mend => Vec::new(),
        };
        let Some(boot) = self.known(volume).copies.get(&copy).and_then(|c| c.boot) else {
            return self.finished_one(volume);
        };
        if records.is_empty() {
            return self.pull_marked(copy, peer);
        }
        // Still counted as executing: a fence waits until the marks are durable too.
        self.medium(boot, Owner::PullMarks(copy, peer), MediumOp::Commit(records));
    }

    pub(super) fn pull_marked(&mut self, copy: CopyId, peer: PeerId) {
        let Some(volume) = self.volume_of(copy) else { return };
        let flushed = self.same_pull(volume, copy, peer).and_then(|pull| {
            let (pages, cursor) = pull.flushing.take()?;
            pull.left = pull.left.saturating_sub(pages.len() as u64);
            Some((pages, cursor, pull.kind, pull.layer))
        });
        if let Some((pages, cursor, kind, layer)) = flushed {
            self.pages_durable(volume, copy, layer, &pages, cursor, kind);
        }
        self.finished_one(volume);
    }

    fn pages_durable(
        &mut self,
        volume: VolumeId,
        copy: CopyId,
        layer: LayerId,
        pages: &[u64],
        cursor: u64,
        kind: Kind,
    ) {
        let Some(pull) = self.pulls.get(&copy) else { return };
        let (source, stale) = (pull.source, pull.stale.clone());
        let Some(held) = self.known(volume).copies.get_mut(&copy) else { return };
        let mut repaired = Vec::new();
        for page in pages {
            let key = (layer, *page);
            if stale.contains(page) || kind == Kind::Mend && is_bad_still(held, key) {
                held.repairs.entry(key).and_modify(|tried| tried.extend([source]));
            } else if held.repairs.remove(&key).is_some() {
                repaired.push(*page);
            }
        }
        if let (Kind::Fill, Some(own)) = (kind, held.layers.get_mut(&layer)) {
            own.cursor = cursor;
            for page in pages {
                own.unsynced.remove(page);
            }
        }
        let keys = repaired.into_iter().map(|page| PageKey { copy, layer, page });
        self.out.extend(keys.map(|page| Output::Rot(Rot { volume, page, bad: 0 })));
        let Some(pull) = self.pulls.get(&copy) else { return };
        let over = pull.is_idle() && pull.applied.is_empty() && pull.todo.is_empty() && pull.scan >= pull.pages;
        if !over {
            return self.go_on(copy);
        }
        if let (Kind::Settle { name, .. }, Some(held)) = (kind, self.known(volume).copies.get_mut(&copy)) {
            held.settled = Some(name);
        }
        self.drop_pull(copy);
        self.due(self.now, Due::Pulls(volume));
    }

    /// The device failed while a pull was being made durable.
    pub(super) fn pull_lost(&mut self, copy: CopyId) {
        self.drop_pull(copy);
        if let Some(volume) = self.volume_of(copy) {
            self.finished_one(volume);
        }
    }

    pub(super) fn volume_of(&self, copy: CopyId) -> Option<VolumeId> {
        self.volumes.iter().find(|(_, v)| v.copies.contains_key(&copy)).map(|(id, _)| *id)
    }

    /// Takes over the list of pages that a settle is about.
    pub(super) fn begin_settling(&mut self, copy: CopyId, pages: BTreeSet<u64>) {
        let Some(pull) = self.pulls.get_mut(&copy) else { return };
        pull.stage = Stage::Running;
        pull.left = pages.len() as u64;
        let Kind::Settle { syncing, .. } = pull.kind else { return };
        if syncing {
            pull.applying = pages;
            self.mark_suspects(copy);
        } else {
            pull.todo = pages.into_iter().collect();
        }
        self.go_on(copy);
    }

    /// Pages of a `Syncing` copy that its settle marks unsynced.
    pub(super) fn pages_to_mark(&self, copy: CopyId) -> Option<(VolumeId, LayerId, Vec<u64>)> {
        let pull = self.pulls.get(&copy)?;
        Some((pull.volume, pull.layer, pull.applying.iter().copied().collect()))
    }

    /// One of them is marked, durably.
    pub(super) fn page_marked(&mut self, copy: CopyId, page: u64) {
        if let Some(pull) = self.pulls.get_mut(&copy)
            && pull.applying.remove(&page)
        {
            pull.applied.push(page);
            self.go_on(copy);
        }
    }
}

/// Whom to pull from: the authoritative copy while a settle runs (M8), else the first `Active` member, one that is not
/// avoided if there is.
fn source_of(group: &Group, own: &Member, settle: Option<SettleName>) -> Option<ServerId> {
    if let Some(name) = settle.filter(|_| !on(Mutant::SourceOfSettleFree)) {
        return group.member(name.authoritative).filter(|m| m.copy != own.copy).map(|m| m.server);
    }
    let others = || group.in_state(MemberState::Active).filter(|m| m.copy != own.copy);
    if on(Mutant::SourceOfSettleFree) {
        return others().last().map(|m| m.server);
    }
    others().find(|m| !m.avoid).or_else(|| others().next()).map(|m| m.server)
}
