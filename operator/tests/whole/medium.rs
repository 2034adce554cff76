//! A device in memory, shared by the openings of one server: what is written stays over a restart, all of it at once.

use std::collections::BTreeMap;

use bytes::Bytes;
use lamina_protocol::ids::{BootId, ClusterId, CopyId, DeviceId, ServerId, VolumeId};
use lamina_protocol::layer::{BlockState, BlockStates, PageKey};
use lamina_protocol::storage_server::medium::{CopyRecord, MediumAnswer, MediumOp, Opened, PageRecord, Record};

/// Blocks of the pages that tests use (policy: 64 KiB pages).
const BLOCKS: u32 = 16;
/// Bytes of the device.
pub(crate) const CAPACITY: u64 = 1 << 30;

#[derive(Debug, Default)]
pub(crate) struct Medium {
    pages: BTreeMap<PageKey, (PageRecord, Vec<u8>)>,
    pub(crate) copies: BTreeMap<CopyId, CopyRecord>,
    volumes: BTreeMap<VolumeId, Bytes>,
    lease_number: u64,
}

impl Medium {
    fn entry(&mut self, page: PageKey) -> &mut (PageRecord, Vec<u8>) {
        self.pages.entry(page).or_insert_with(|| {
            let blocks = BlockStates::absent(BLOCKS);
            let record = PageRecord { allocated: false, blocks, unsynced: false, pending: false, missed: 0 };
            (record, vec![0; BLOCKS as usize * 4096])
        })
    }

    pub(crate) fn apply(&mut self, op: MediumOp) -> MediumAnswer {
        match op {
            MediumOp::Load(page) => return MediumAnswer::Page(self.pages.get(&page).map(|(record, _)| record.clone())),
            MediumOp::Read { page, blocks } => {
                let data = self.entry(page).1[blocks.start as usize * 4096..blocks.end as usize * 4096].to_vec();
                return MediumAnswer::Data { data: data.into(), bad: Vec::new() };
            }
            MediumOp::Write { page, first, data } => {
                let (record, bytes) = self.entry(page);
                record.allocated = true;
                record.blocks.set_range(first..first + data.len() as u32 / 4096, BlockState::Present);
                bytes[first as usize * 4096..][..data.len()].copy_from_slice(&data);
            }
            MediumOp::Shape { page, changes } => {
                changes.into_iter().for_each(|(run, state)| self.entry(page).0.blocks.set_range(run, state));
            }
            MediumOp::NextPage { copy, layer, from } => {
                let from = PageKey { copy, layer, page: from };
                let next = self.pages.range(from..).next().filter(|(k, _)| k.copy == copy && k.layer == layer);
                return MediumAnswer::NextPage(next.map(|(k, _)| k.page));
            }
            MediumOp::Commit(records) => records.into_iter().for_each(|record| self.commit(record)),
            MediumOp::Allocate(pages) => pages.into_iter().for_each(|page| self.entry(page).0.allocated = true),
            MediumOp::Release(pages) => {
                for page in pages {
                    let record = &mut self.entry(page).0;
                    record.allocated = !record.blocks.all(BlockState::Absent);
                }
            }
            MediumOp::Flush => {}
        }
        MediumAnswer::Done
    }

    fn commit(&mut self, record: Record) {
        match record {
            Record::Pending { page, set } => self.entry(page).0.pending = set,
            Record::MarkUnsynced(page) => {
                let record = &mut self.entry(page).0;
                record.unsynced = true;
                record.blocks.make_stale();
            }
            Record::ClearUnsynced(page) => self.entry(page).0.unsynced = false,
            Record::MarkLayerUnsynced { copy, layer } => {
                for (key, (record, _)) in &mut self.pages {
                    if key.copy == copy && key.layer == layer {
                        record.blocks.make_stale();
                    }
                }
                self.cursor(copy, 0);
            }
            Record::TrustLayer { copy, layer } => {
                for (key, (record, _)) in &mut self.pages {
                    if key.copy == copy && key.layer == layer {
                        record.blocks.trust_stale(record.allocated);
                    }
                }
                self.cursor(copy, u64::MAX);
            }
            Record::Cursor { copy, cursor, .. } => self.cursor(copy, cursor),
            Record::Stale { page, blocks } => {
                blocks.iter().for_each(|b| self.entry(page).0.blocks.set(*b, BlockState::Stale));
            }
            Record::PutCopy(copy) => drop(self.copies.insert(copy.copy, copy)),
            Record::DropCopy(copy) => {
                self.copies.remove(&copy);
                self.pages.retain(|key, _| key.copy != copy);
            }
            Record::PutVolume { volume, blob } => drop(self.volumes.insert(volume, blob)),
            Record::DropVolume(volume) => drop(self.volumes.remove(&volume)),
            Record::LeaseNumber(number) => self.lease_number = number,
            Record::Missed { page, mask } => self.entry(page).0.missed = mask,
            Record::DropPage(_) => {}
        }
    }

    fn cursor(&mut self, copy: CopyId, cursor: u64) {
        if let Some(copy) = self.copies.get_mut(&copy) {
            copy.layers[0].cursor = cursor;
        }
    }

    pub(crate) fn opened(&self, cluster: ClusterId, server: ServerId, boot: BootId) -> Opened {
        let flagged =
            |f: fn(&PageRecord) -> bool| self.pages.iter().filter(|(_, (r, _))| f(r)).map(|(k, _)| *k).collect();
        Opened {
            cluster,
            server,
            device: DeviceId(server.0),
            boot,
            copies: self.copies.values().cloned().collect(),
            volumes: self.volumes.iter().map(|(v, b)| (*v, b.clone())).collect(),
            pending: flagged(|r| r.pending),
            missed: self.pages.iter().filter(|(_, (r, _))| r.missed != 0).map(|(k, (r, _))| (*k, r.missed)).collect(),
            unsynced: flagged(|r| r.unsynced),
            lease_number: self.lease_number,
            capacity_bytes: CAPACITY,
            free_bytes: CAPACITY,
        }
    }
}
