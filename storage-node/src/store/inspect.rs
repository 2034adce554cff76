//! Reading a stopped server's device without changing it: for `storage-node inspect`, which rebuilds a volume's bytes.
//!
//! Invariant: nothing is written, not even a replayed journal; the device is locked against a server that would serve it.

use crate::store::DeviceError;
use crate::store::catalog::Unseen;
use crate::store::codec::crc32c;
use crate::store::disk::{Access, Disk, FileDisk};
use crate::store::geometry::{BLOCK, cell_block_of};
use crate::store::recovery::{Loaded, load};
use crate::store::table::{ALL_STALE, Entry, PENDING, UNSYNCED, states_of};
use bytes::Bytes;
use lamina_protocol::ids::{ClusterId, CopyId, DeviceId, LayerId, ServerId, VolumeId};
use lamina_protocol::layer::{BlockState, BlockStates, PageKey};
use lamina_protocol::storage_server::medium::{CopyRecord, PageRecord};
use std::path::Path;

/// A device opened for reading only.
pub struct Inspected {
    disk: FileDisk,
    loaded: Loaded,
}

/// One page with its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InspectedPage {
    /// Its record.
    pub record: PageRecord,
    /// Its blocks; zeroes where there is neither data nor stale data.
    pub data: Vec<u8>,
    /// Present blocks whose checksum does not match, although the page was not pending.
    pub bad: Vec<u32>,
}

/// Opens a device for reading. Fails with [`DeviceError::Busy`] while a server holds it.
pub fn inspect(path: &Path) -> Result<Inspected, DeviceError> {
    let disk = FileDisk::open(path, Access::Inspect)?;
    let loaded = load(&disk, false)?;
    Ok(Inspected { disk, loaded })
}

impl Inspected {
    /// Whose device it is.
    pub fn identity(&self) -> (ClusterId, ServerId, DeviceId) {
        let superblock = &self.loaded.superblock;
        (superblock.cluster, superblock.server, superblock.device)
    }

    /// Every copy on it.
    pub fn copies(&self) -> Vec<CopyRecord> {
        self.loaded.catalog.copies()
    }

    /// What the page logic keeps of each volume.
    pub fn volumes(&self) -> Vec<(VolumeId, Bytes)> {
        self.loaded.catalog.volumes()
    }

    /// Bytes for pages in all, and in free slabs.
    pub fn space(&self) -> (u64, u64) {
        (self.loaded.geo.capacity_bytes(), self.loaded.space.free_bytes())
    }

    /// Numbers of the pages of a layer that have an entry.
    pub fn pages(&self, copy: CopyId, layer: LayerId) -> Vec<u64> {
        let stack = self.loaded.catalog.stack_of(copy, layer);
        stack.map_or(Vec::new(), |stack| self.loaded.table.pages(stack).map(|(page, _)| page).collect())
    }

    /// How many pages of a layer are pending.
    pub fn pending(&self, copy: CopyId, layer: LayerId) -> usize {
        let Some(stack) = self.loaded.catalog.stack_of(copy, layer) else { return 0 };
        let pages = self.loaded.table.pages(stack);
        pages.filter(|(_, number)| self.loaded.table.at(*number).has(PENDING)).count()
    }

    /// One page, `None` if it has no entry.
    pub fn page(&mut self, page: PageKey) -> Result<Option<InspectedPage>, DeviceError> {
        let Some(stack) = self.loaded.catalog.stack_of(page.copy, page.layer) else { return Ok(None) };
        let Some(number) = self.loaded.table.find(stack, page.page) else { return Ok(None) };
        let entry = *self.loaded.table.at(number);
        let kept = self.loaded.catalog.stack(stack).expect("looked up by its key");
        let blocks = kept.blocks();
        let unseen = kept.unseen(entry.seen).or(entry.has(ALL_STALE).then_some(Unseen::Stale));
        let mut data = vec![0; kept.page_bytes as usize];
        let mut bad = Vec::new();
        let mut states = match entry.home() {
            None => states_of(self.loaded.table.runs(number), blocks),
            Some(home) => self.read_slot((&entry, home, unseen), blocks, &mut data, &mut bad)?,
        };
        match unseen {
            Some(Unseen::Stale) => states.make_stale(),
            Some(Unseen::Trusted) if entry.slot().is_none() => states.trust_stale(false),
            Some(Unseen::Trusted) | None => {}
        }
        let record = PageRecord {
            allocated: entry.slot().is_some(),
            blocks: states,
            unsynced: entry.has(UNSYNCED),
            pending: entry.has(PENDING),
            missed: entry.missed,
        };
        Ok(Some(InspectedPage { record, data, bad }))
    }

    fn read_slot(
        &mut self,
        (entry, home, unseen): (&Entry, u64, Option<Unseen>),
        blocks: u32,
        data: &mut [u8],
        bad: &mut Vec<u32>,
    ) -> Result<BlockStates, DeviceError> {
        let Self { disk, loaded } = self;
        let mut states = BlockStates::absent(blocks);
        for block in 0..blocks {
            let at = home + u64::from(block);
            let cells = cell_block_of(at);
            if !loaded.cells.holds(cells) {
                loaded.cells.loaded(cells, disk.read_new(loaded.geo.cell_block_at(cells), BLOCK as usize).ok());
            }
            let (mut state, crc) = loaded.cells.of(at);
            let trusted = loaded.cells.trusted(at);
            if unseen == Some(Unseen::Trusted) {
                state = trusted;
            }
            states.set(block, state);
            // Else the slot may hold what its earlier owner left.
            if trusted != BlockState::Present {
                continue;
            }
            let place = loaded.overlay.get(&at).copied().unwrap_or(loaded.geo.home_at(at));
            let into = &mut data[block as usize * BLOCK as usize..(block as usize + 1) * BLOCK as usize];
            let Ok(read) = disk.read_new(place, BLOCK as usize) else {
                bad.push(block);
                continue;
            };
            into.copy_from_slice(&read);
            let may_be_anew = loaded.anchor.ever_in_place && entry.has(PENDING);
            if state == BlockState::Present && crc32c(into) != crc && !may_be_anew {
                bad.push(block);
            }
        }
        Ok(states)
    }
}
