//! What a copy has stale and others may have: repairs (R12), and what the authoritative copy of a settle takes from the
//! next `Active` member (H12, R1; PROTOCOL.md §5.8).
//!
//! While a settle runs its members see whatever the authoritative copy serves, stale blocks too, and leave their own
//! alone there. Meanwhile that copy asks the other `Active` members for such blocks, in map order, and marks their pages
//! as suspect from before the start, so that every member has them on its list. As soon as it took anything, this very
//! settle never ends: others may have been served otherwise before. The operator begins it anew, and now all take it from
//! one source again (M8). Invariant: the content of present blocks on that copy changes only in a settle that never ends.

use super::StorageServer;
use super::fill::ServePage;
use super::missed::group_of;
use super::volume::{Copy, Volume};
use crate::control::{SETTLE_ANEW, SettleName};
use crate::ids::{CopyId, LayerId, ServerId, VolumeId};
use crate::layer::{BlockState, BlockStates, PageKey};
use crate::map::{Group, Member, MemberState};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What an authoritative copy found stale in what it served for a settle. In memory only, as that copy's boot id.
#[derive(Debug)]
pub(super) struct Mend {
    name: SettleName,
    pages: BTreeMap<(LayerId, u64), BadBlocks>,
    /// Something was taken from another member.
    changed: bool,
}

/// Those of one page.
#[derive(Debug, Default)]
struct BadBlocks {
    blocks: BTreeSet<u32>,
    /// Who has none of them either.
    tried: BTreeSet<ServerId>,
}

impl Mend {
    fn new(name: SettleName) -> Self {
        Self { name, pages: BTreeMap::new(), changed: false }
    }

    /// The pages that somebody may still have, each with whom to ask next.
    fn open<'a>(&'a self, group: &'a Group, own: CopyId) -> impl Iterator<Item = ((LayerId, u64), ServerId)> + 'a {
        self.pages.iter().filter_map(move |(page, bad)| {
            let mut others = group.in_state(MemberState::Active).filter(|m| m.copy != own);
            others.find(|m| !bad.tried.contains(&m.server)).map(|m| (*page, m.server))
        })
    }
}

/// Whether some block of a page has found no good content yet.
pub(super) fn is_bad_still(copy: &Copy, page: (LayerId, u64)) -> bool {
    copy.mend.as_ref().is_some_and(|mend| mend.pages.contains_key(&page))
}

/// What the authoritative copy of that settle reports as still to settle: pages to mend, or that it must begin anew.
pub(super) fn left_to_mend(known: &Volume, copy: &Copy, name: &SettleName) -> u64 {
    let Some(mend) = copy.mend.as_ref().filter(|mend| mend.name == *name) else { return 0 };
    let group = known.map.as_ref().and_then(|map| group_of(map, copy.record.copy));
    match group.map_or(0, |group| mend.open(group, copy.record.copy).count() as u64) {
        0 if mend.changed => SETTLE_ANEW,
        open => open,
    }
}

/// Whom to ask next, and for which pages of a layer.
pub(super) fn wanted_mend(
    group: &Group,
    own: &Member,
    copy: &Copy,
    layer: LayerId,
    name: SettleName,
) -> Option<(ServerId, VecDeque<u64>)> {
    let mend = copy.mend.as_ref().filter(|mend| mend.name == name)?;
    let open = || mend.open(group, own.copy).filter(|((l, _), _)| *l == layer);
    let (_, source) = open().next()?;
    Some((source, open().filter(|(_, next)| *next == source).map(|((_, page), _)| page).collect()))
}

/// Whom to ask next for bad blocks of an `Active` copy, and for which pages of a layer (R12): while a settle runs the
/// authoritative copy alone (M8), else each `Active` member once under a map, those last that are to be avoided.
pub(super) fn wanted_repair(
    group: &Group,
    own: &Member,
    copy: &Copy,
    layer: LayerId,
    settle: Option<SettleName>,
) -> Option<(ServerId, VecDeque<u64>)> {
    let mut sources: Vec<&Member> = group.in_state(MemberState::Active).filter(|m| m.copy != own.copy).collect();
    sources.retain(|m| settle.is_none_or(|name| name.authoritative == m.copy));
    sources.sort_by_key(|m| m.avoid);
    let next = |tried: &BTreeSet<ServerId>| sources.iter().map(|m| m.server).find(|server| !tried.contains(server));
    let bad = copy.repairs.iter().filter(|((l, _), _)| *l == layer);
    let open: Vec<_> = bad.filter_map(|((_, page), tried)| Some((*page, next(tried)?))).collect();
    let source = open.first()?.1;
    Some((source, open.iter().filter(|(_, next)| *next == source).map(|(page, _)| *page).collect()))
}

impl StorageServer {
    /// A client has met a bad block that was known before: others may have it.
    pub(super) fn bad_was_read(&mut self, volume: VolumeId, page: PageKey) {
        let Some(copy) = self.known(volume).copies.get_mut(&page.copy) else { return };
        if let Entry::Vacant(unknown) = copy.repairs.entry((page.layer, page.page)) {
            unknown.insert(BTreeSet::new());
            self.due(self.now, super::Due::Pulls(volume));
        }
    }

    /// Under another map other members may serve, or another opening of one.
    pub(super) fn repair_anew(&mut self, volume: VolumeId) {
        let copies = self.known(volume).copies.values_mut();
        copies.flat_map(|copy| copy.repairs.values_mut()).for_each(BTreeSet::clear);
    }

    /// A page goes out for a settle: what is stale in it is to be mended.
    pub(super) fn note_served(&mut self, volume: VolumeId, page: PageKey, serve: &ServePage) {
        let stale = serve.stale_blocks();
        let name = self.volumes[&volume].map.as_ref().and_then(|map| super::report::settle_in(map, page.copy));
        let name = name.filter(|name| name.authoritative == page.copy && !stale.is_empty() && serve.settles);
        let (Some(name), Some(copy)) = (name, self.known(volume).copies.get_mut(&page.copy)) else { return };
        if copy.mend.as_ref().is_none_or(|mend| mend.name != name) {
            copy.mend = Some(Mend::new(name));
        }
        let Some(mend) = &mut copy.mend else { return };
        let bad = mend.pages.entry((page.layer, page.page)).or_default();
        if !stale.is_subset(&bad.blocks) {
            // Others were asked for less.
            bad.tried.clear();
            bad.blocks.extend(stale);
        }
        self.due(self.now, super::Due::Pulls(volume));
    }

    /// A page that was asked of another member is about to be applied to blocks in these states; some are taken from it.
    pub(super) fn mending(
        &mut self,
        volume: VolumeId,
        page: PageKey,
        source: ServerId,
        own: &BlockStates,
        taken: &BTreeSet<u32>,
    ) {
        let Some(mend) = self.known(volume).copies.get_mut(&page.copy).and_then(|copy| copy.mend.as_mut()) else {
            return;
        };
        mend.changed |= !taken.is_empty();
        let Some(bad) = mend.pages.get_mut(&(page.layer, page.page)) else { return };
        bad.blocks.retain(|block| own.of(*block) == BlockState::Stale && !taken.contains(block));
        bad.tried.insert(source);
        if bad.blocks.is_empty() {
            mend.pages.remove(&(page.layer, page.page));
        }
    }
}
