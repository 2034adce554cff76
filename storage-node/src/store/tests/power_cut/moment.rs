//! One moment of the trace: what must be on the disk, what may be, and what the oracle allows.
//!
//! Invariant: a sync covers what was done when it was begun, and the write that it is linked to, no more.

use super::*;

/// What may be on the disk, and what must be, at one moment of the trace.
pub(super) struct Moment {
    pub(super) durable: Image,
    /// Writes that no sync has covered, in the order in which they were begun.
    pub(super) open: BTreeMap<usize, bool>,
    /// Writes that were done when each sync under way began.
    covered: BTreeMap<u64, Vec<usize>>,
    pages: Vec<PageOracle>,
    numbers: BTreeSet<u64>,
    answered: BTreeSet<u64>,
    /// What each flush under way covers.
    flushes: BTreeMap<u64, BTreeSet<u64>>,
}

impl Moment {
    pub(super) fn new(trace: &Trace) -> Self {
        Self {
            durable: trace.start.clone(),
            open: BTreeMap::new(),
            covered: BTreeMap::new(),
            pages: pages().iter().map(|(_, blocks)| PageOracle::new(*blocks)).collect(),
            numbers: BTreeSet::from([0]),
            answered: BTreeSet::from([0]),
            flushes: BTreeMap::new(),
        }
    }

    pub(super) fn pass(&mut self, trace: &Trace, event: &Event) {
        match event {
            Event::WriteBegun(nth) => drop(self.open.insert(*nth, false)),
            Event::WriteDone(nth) => drop(self.open.insert(*nth, true)),
            Event::SyncBegun(id) => drop(self.covered.insert(*id, self.done_writes())),
            Event::LinkedSyncBegun(id, write) => {
                let mut covered = self.done_writes();
                covered.push(*write);
                self.covered.insert(*id, covered);
            }
            Event::SyncDone(id) => {
                for nth in self.covered.remove(id).unwrap() {
                    if self.open.remove(&nth).is_some() {
                        let (at, data) = &trace.writes[nth];
                        self.durable.write(*at, data);
                    }
                }
            }
            Event::HandedIn(op) => self.handed_in(*op, &trace.asked[op]),
            Event::Answered(op) => self.answered(*op, &trace.asked[op]),
        }
    }

    fn done_writes(&self) -> Vec<usize> {
        self.open.iter().filter(|(_, done)| **done).map(|(nth, _)| *nth).collect()
    }

    fn handed_in(&mut self, op: u64, asked: &Asked) {
        match asked {
            Asked::Pages(effects) => effects.iter().for_each(|(page, e)| self.pages[*page].handed_in(op, e)),
            Asked::Flush => drop(self.flushes.insert(op, self.answered.clone())),
            Asked::Number(number) => drop(self.numbers.insert(*number)),
            Asked::Read { .. } => {}
        }
    }

    fn answered(&mut self, op: u64, asked: &Asked) {
        match asked {
            Asked::Pages(effects) => {
                effects.iter().for_each(|(page, e)| self.pages[*page].answered(op, e));
                if effects.iter().all(|(_, effect)| !effect.is_commit()) {
                    self.answered.insert(op);
                }
            }
            Asked::Flush => {
                let covered = self.flushes.remove(&op).unwrap();
                self.pages.iter_mut().for_each(|page| page.flushed(&|op| covered.contains(&op)));
                self.answered.retain(|op| *op == 0 || !covered.contains(op));
            }
            Asked::Number(number) => self.numbers.retain(|kept| kept >= number),
            Asked::Read { .. } => {}
        }
    }

    pub(super) fn image(&self, trace: &Trace, fate: Fate, unit: usize, dice: &mut Dice) -> Image {
        let mut image = self.durable.clone();
        let open = self.open.keys().map(|nth| (trace.writes[*nth].0, &trace.writes[*nth].1));
        cut(&mut image, open, fate, unit, dice);
        image
    }

    /// Everything a recovered device shows is allowed, also once a person forces it.
    pub(super) fn check(&self, core: &mut Core, opened: &Opened, disk: &mut Image, what: &str) {
        check_space(core, opened);
        assert!(self.numbers.contains(&opened.lease_number), "{what}: lease number {}", opened.lease_number);
        let blob = opened.volumes.first().map_or(0, |(_, blob)| u64::from_le_bytes(blob[..8].try_into().unwrap()));
        assert_eq!(blob, opened.lease_number, "{what}: a commit is all or none");
        assert_eq!(opened.copies.len(), 2, "{what}");
        for ((key, blocks), page) in pages().into_iter().zip(&self.pages) {
            let MediumAnswer::Page(record) = ask(core, disk, MediumOp::Load(key)) else { panic!() };
            let pending = record.as_ref().is_some_and(|r| r.pending);
            let unsynced = record.as_ref().is_some_and(|r| r.unsynced);
            assert!(page.pending.allows(pending), "{what}: {key:?} pending {pending}, {:?}", page.pending);
            assert!(page.unsynced.allows(unsynced), "{what}: {key:?} unsynced {unsynced}, {:?}", page.unsynced);
            assert_eq!(opened.pending.contains(&key), pending, "{what}");
            check_blocks(core, disk, (key, blocks), page, record.as_ref(), what);
        }
        check_forced(core, disk, &self.pages, what);
    }
}
