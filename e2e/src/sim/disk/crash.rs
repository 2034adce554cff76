//! What a crash leaves of a fake disk: promise 4 of the medium contract, used to the full.

use super::{Disk, Opening, Waiting, records};
use crate::sim::dice::Dice;
use lamina_protocol::ids::{BootId, ClusterId, ServerId};
use lamina_protocol::layer::{BlockState, PageKey};
use lamina_protocol::storage_server::medium::{MediumOp, Opened};
use std::collections::{BTreeMap, BTreeSet};

/// How an opening ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::sim) enum Cut {
    /// The process died: what was answered stays, flushed or not.
    Process,
    /// The power failed, or the device did: of what was not flushed each block keeps what chance says.
    Power,
}

impl Disk {
    /// Opens the device; a new boot id each time (R3).
    pub(in crate::sim) fn open(&mut self, boot: BootId, server: ServerId, cluster: ClusterId) -> Opened {
        assert!(self.opening.is_none(), "a device is opened by one process");
        self.opening = Some(Opening {
            boot,
            waiting: Vec::new(),
            page_ready: BTreeMap::new(),
            commit_ready: 0,
            all_ready: 0,
            latest: 0,
        });
        self.failing = None;
        let flagged = |pick: fn(&super::DiskPage) -> bool| -> Vec<PageKey> {
            self.pages.iter().filter(|(_, p)| pick(p)).map(|(k, _)| *k).collect()
        };
        Opened {
            cluster,
            server,
            device: self.device,
            boot,
            copies: self.copies.values().cloned().collect(),
            volumes: self.volumes.iter().map(|(v, b)| (*v, b.clone())).collect(),
            pending: flagged(|p| p.pending),
            missed: self.pages.iter().filter(|(_, p)| p.missed != 0).map(|(k, p)| (*k, p.missed)).collect(),
            unsynced: flagged(|p| p.unsynced),
            lease_number: self.lease_number,
            capacity_bytes: self.capacity_bytes,
            free_bytes: self.free_bytes(),
        }
    }

    /// The opening is over. Returns how many unflushed versions were lost.
    pub(in crate::sim) fn close(&mut self, cut: Cut, dice: &mut Dice) -> usize {
        let Some(opening) = self.opening.take() else { return 0 };
        self.half_done(opening.waiting, dice);
        let lost = if cut == Cut::Power { self.lose_unflushed(dice) } else { 0 };
        for page in self.pages.values_mut() {
            let holds = |s: BlockState| matches!(s, BlockState::Present | BlockState::Stale);
            page.slot =
                page.cells.iter().any(|c| holds(c.durable.state) || c.later.iter().any(|(_, v)| holds(v.state)));
        }
        self.pages.retain(|_, page| page.has_entry());
        lost
    }

    /// Of what was under way: a prefix of the commits, any of the writes that did not wait behind a lost commit.
    fn half_done(&mut self, waiting: Vec<Waiting>, dice: &mut Dice) {
        let commits = waiting.iter().filter(|w| matches!(w.what, MediumOp::Commit(_))).count() as u64;
        let mut kept = dice.within(0, commits);
        let mut lost: BTreeSet<PageKey> = BTreeSet::new();
        let mut all_lost = false;
        for Waiting { what, covers, .. } in waiting {
            match &what {
                MediumOp::Commit(gone) if kept == 0 => {
                    lost.extend(gone.iter().filter_map(records::page_of));
                    all_lost |= super::touched(&what).1;
                }
                MediumOp::Commit(_) => {
                    kept -= 1;
                    self.apply(what, covers);
                }
                MediumOp::Write { page, .. } | MediumOp::Shape { page, .. }
                    if !all_lost
                        && !lost.contains(page)
                        && dice.chance(1, 2)
                        && self.copies.contains_key(&page.copy) =>
                {
                    self.apply(what, covers);
                }
                _ => {}
            }
        }
    }

    fn lose_unflushed(&mut self, dice: &mut Dice) -> usize {
        // A whole cache lost, or whole kept, happens more often than chance alone would have it.
        let mode = dice.below(4);
        let mut lost = 0;
        for cell in self.pages.values_mut().flat_map(|p| &mut p.cells).filter(|c| !c.later.is_empty()) {
            let versions = cell.later.len();
            let pick = match mode {
                0 => versions,
                1 => versions - 1,
                _ => dice.index(versions + 1),
            };
            lost += usize::from(pick != versions - 1);
            cell.settle_on(pick);
        }
        lost
    }
}
