//! The one durable step that stores a map (PROTOCOL.md M2), put together per device.
//!
//! Invariant: wherever a crash cuts it, too much is marked and never too little.

use super::medium::{MAX_COMMIT_RECORDS, Record};

/// What storing a map makes durable on one device.
#[derive(Debug, Default)]
pub(super) struct MapStep {
    /// May be durable although the map is not.
    pub(super) before: Vec<Record>,
    /// Stands and falls with the map.
    with: Vec<Record>,
    /// Only when the map is durable.
    pub(super) after: Vec<Record>,
}

impl MapStep {
    /// I8: layers that are trusted with the map, flags of pages that go when it is there.
    pub(super) fn trust(&mut self, records: Vec<Record>) {
        let (layers, flags) = records.into_iter().partition(|r| matches!(r, Record::TrustLayer { .. }));
        let (mut layers, mut flags): (Vec<Record>, Vec<Record>) = (layers, flags);
        self.with.append(&mut layers);
        self.after.append(&mut flags);
    }

    /// One commit, or several if it is too long.
    pub(super) fn commits(mut self, map: Option<Record>) -> Vec<Vec<Record>> {
        self.with.extend(map);
        if self.before.len() + self.with.len() + self.after.len() <= MAX_COMMIT_RECORDS {
            self.before.append(&mut self.with);
            self.before.append(&mut self.after);
            return vec![self.before];
        }
        let pieces =
            |records: Vec<Record>| records.chunks(MAX_COMMIT_RECORDS).map(<[Record]>::to_vec).collect::<Vec<_>>();
        [pieces(self.before), vec![self.with], pieces(self.after)].concat()
    }
}
