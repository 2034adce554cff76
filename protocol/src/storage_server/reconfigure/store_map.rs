//! Storing a committed map: one durable step (PROTOCOL.md M2; H3b, H11, I8, M1).
//!
//! Invariant: nothing is served under the map before the step is durable as a whole; how it lies in commits is
//! [`MapStep`]'s matter.

use super::super::map_step::MapStep;
use super::super::medium::{MediumOp, Record};
use super::super::missed::group_of;
use super::super::pending::{end_of_settle, unmark_all};
use super::super::volume::{Copy, Volume};
use super::super::{Due, Owner, StorageServer};
use crate::ids::{BootId, ServerId, VolumeId};
use crate::layer::PageKey;
use crate::map::{MemberState, Settle, VolumeMap};
use crate::mutants::{Mutant, on};
use std::collections::BTreeMap;

impl StorageServer {
    /// M2: one durable step, in this order; the number of commits.
    pub(super) fn store_map(&mut self, volume: VolumeId, map: VolumeMap) -> usize {
        let server = self.config.server;
        let known = self.known(volume);
        let mut steps: BTreeMap<BootId, MapStep> = known.boots().into_iter().map(|b| (b, MapStep::default())).collect();
        let mut forced = Vec::new();
        for copy in known.forced_by(&map, server) {
            let Some((boot, trust)) = known.copies.get_mut(&copy).and_then(Copy::trust) else { continue };
            steps.entry(boot).or_default().trust(trust);
            forced.push((boot, copy));
        }
        let old = known.map.clone();
        let mut missed = Vec::new();
        for copy in known.copies.values_mut() {
            let Some(boot) = copy.boot else { continue };
            let records = copy.miss_pending(&map, old.as_ref());
            missed.extend(records.iter().filter_map(|r| match r {
                Record::Missed { page, mask } => Some((boot, *page, *mask)),
                _ => None,
            }));
            steps.entry(boot).or_default().before.extend(records);
        }
        for (boot, mut cleared) in end_settles(known, &map, server) {
            steps.entry(boot).or_default().after.append(&mut cleared);
        }
        for (boot, mut cleared) in restore_unconfirmed(known, &map) {
            steps.entry(boot).or_default().after.append(&mut cleared);
        }
        known.learn_sessions(&map);
        known.copies.values_mut().for_each(|copy| copy.restore_all(&map));
        known.storing_after = Some(known.stored());
        known.map = Some(map);
        let blob = known.blob();
        if let Some(change) = known.changes.front_mut() {
            change.missed = missed;
        }
        for (boot, copy) in forced {
            self.forget_records(boot, copy);
        }
        let map = (!on(Mutant::MapVolatile)).then_some(Record::PutVolume { volume, blob });
        let mut commits = 0;
        for (boot, step) in steps {
            for records in step.commits(map.clone()) {
                self.medium(boot, Owner::Change(volume), MediumOp::Commit(records));
                commits += 1;
            }
        }
        commits
    }

    pub(super) fn map_stored(&mut self, volume: VolumeId, missed: Vec<(BootId, PageKey, u16)>) {
        for (boot, page, mask) in missed {
            self.missed_durable(volume, page, mask);
            self.run_prepared(boot, page);
        }
        self.clear_soon(volume);
        self.repair_anew(volume);
        self.give_back_of_ended(volume);
        self.push_map(volume);
        self.due(self.now, Due::Pulls(volume));
    }
}

/// M1: what the end of a settle clears here, per opening.
fn end_settles(known: &mut Volume, map: &VolumeMap, server: ServerId) -> Vec<(BootId, Vec<Record>)> {
    let mut cleared = Vec::new();
    for (_, _, group) in map.groups().filter(|(_, _, group)| group.settle == Settle::Over) {
        let all = on(Mutant::AllClearPending);
        let member = group.members.iter().find(|m| m.server == server && (all || m.state != MemberState::Failed));
        let Some(member) = member else { continue };
        let copy = known.copies.get_mut(&member.copy).filter(|copy| all || copy.boot == Some(member.boot));
        cleared.extend(copy.and_then(|copy| Some((copy.boot?, end_of_settle(copy, map)))));
    }
    cleared
}

/// What H11 forbids, if that very mistake is to be made: pages of groups without a `Failed` member are pending no more,
/// confirmed or not.
fn restore_unconfirmed(known: &mut Volume, map: &VolumeMap) -> Vec<(BootId, Vec<Record>)> {
    let whole = |copy: &Copy| {
        let group = group_of(map, copy.record.copy);
        on(Mutant::RestoredUnconfirmed)
            && group.is_some_and(|group| group.members.iter().all(|m| m.state == MemberState::Active))
    };
    let restored = known.copies.values_mut().filter(|copy| whole(copy));
    restored.filter_map(|copy| Some((copy.boot?, unmark_all(copy)))).collect()
}
