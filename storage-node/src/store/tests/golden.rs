//! Golden disk records: each kind once, as bytes of each released format.
//!
//! Invariant: what a release wrote on a device this code reads; what this code writes under the same format version is
//! the same bytes. A change is a new format version, with a file of its own beside the old one.

use crate::store::aligned::AlignedBuf;
use crate::store::catalog::Catalog;
use crate::store::cells::Cells;
use crate::store::codec::crc32c;
use crate::store::geometry::{BLOCK, Geometry};
use crate::store::journal::{FoundHead, Head, build};
use crate::store::record::{CatalogChange, Redo};
use crate::store::superblock::{Anchor, JournalPoint, Superblock};
use crate::store::table::{ENTRY_BYTES, Entry, PENDING, UNSYNCED};
use bytes::Bytes;
use lamina_protocol::ids::{BootId, ClusterId, CopyId, DeviceId, LayerId, ServerId, VolumeId};
use lamina_protocol::layer::BlockState;
use lamina_protocol::storage_server::medium::{CopyRecord, LayerRecord};
use std::path::PathBuf;

#[path = "../../../../protocol/tests/golden/table.rs"]
mod table;

fn superblock() -> Superblock {
    let geo = Geometry::for_new(1 << 30, None).unwrap();
    Superblock { compat: 4, ..Superblock::new(ClusterId(0x11), ServerId(0x22), DeviceId(0x33), &geo, 1 << 30) }
}

fn point() -> JournalPoint {
    JournalPoint { position: 0x5000, sequence: 0x66, chain: 0x77 }
}

fn anchor() -> Anchor {
    Anchor {
        slabs: 0x44,
        number: 0x55,
        device: DeviceId(0x33),
        tail: point(),
        entries_high: 0x88,
        catalog_len: 0x99,
        catalog_crc: 0xaa,
        catalog_half: 1,
        ever_in_place: true,
        boot: BootId(0xbb),
    }
}

fn copy_record() -> CopyRecord {
    let layer = LayerRecord { layer: LayerId(0xc1), page_bytes: 1 << 20, cursor: 0xc2 };
    CopyRecord { copy: CopyId(0xc3), volume: VolumeId(0xc4), placement: 5, group: 6, layers: vec![layer] }
}

fn catalog() -> Catalog {
    let mut catalog = Catalog::default();
    catalog.put_copy(&copy_record());
    catalog.put_volume(VolumeId(0xc4), Bytes::from_static(b"kept of a volume"));
    catalog.lease_number = 0xd1;
    catalog
}

fn with_slot() -> Entry {
    let mut entry = Entry::new(1, 0xe1, 2).with_slot(Some(0xe2));
    entry.missed = 0x0102;
    entry.set(PENDING, true);
    entry
}

fn without_slot() -> (Entry, Vec<u16>) {
    let mut entry = Entry::new(1, 0xe3, 2);
    entry.set(UNSYNCED, true);
    (entry, vec![BlockState::Hole as u16, 8 << 2 | BlockState::Stale as u16])
}

fn cells() -> Vec<u8> {
    let mut cells = Cells::new(1);
    cells.fresh(2, 1);
    cells.set(2 * 512 + 1, BlockState::Present, 0x0f0e_0d0c, 1);
    cells.set(2 * 512 + 65, BlockState::Stale, 0x0b0a_0908, 1);
    cells.take_block(2, 1).unwrap().to_vec()
}

fn data() -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    block[..5].copy_from_slice(b"bytes");
    block
}

fn redo() -> Vec<Redo> {
    let (entry, runs) = without_slot();
    vec![
        Redo::Header { number: 0xe4, entry, runs },
        Redo::Slab(3),
        Redo::Shape { home: 0xf1, blocks: 2, state: BlockState::Hole },
        Redo::Present { home: 0xf3, crcs: vec![0xf4, 0xf5] },
        Redo::Data { home: 0xf6, crcs: vec![crc32c(&data())] },
        Redo::Catalog(CatalogChange::PutCopy(copy_record())),
        Redo::Catalog(CatalogChange::DropCopy(CopyId(0xc5))),
        Redo::Catalog(CatalogChange::PutVolume(VolumeId(0xc4), Bytes::from_static(b"blob"))),
        Redo::Catalog(CatalogChange::DropVolume(VolumeId(0xc6))),
        Redo::Catalog(CatalogChange::Lease(0xd1)),
        Redo::Catalog(CatalogChange::Cursor { stack: 1, cursor: 0xc7 }),
        Redo::Catalog(CatalogChange::Mark { stack: 1, mark: 0xc8 }),
    ]
}

fn transaction() -> Vec<u8> {
    let mut records = Vec::new();
    redo().iter().for_each(|redo| redo.encode(&mut records));
    let head = Head { point: point(), boot: BootId(0xbb), durable: 0x65 };
    build(head, &records, 1, std::iter::once(&data()[..])).buf.to_vec()
}

#[test]
fn golden_disk_records_are_the_bytes_of_format_1_and_read_back() {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/store/tests/golden/disk-v1.txt");
    let (slotless, runs) = without_slot();
    let records = [
        ("superblock", superblock().encode()),
        ("anchor", anchor().encode()),
        ("catalog", catalog().encode()),
        ("header with a slot", with_slot().encode(0xe5, &[]).to_vec()),
        ("header without a slot", slotless.encode(0xe6, &runs).to_vec()),
        ("cells", cells()),
        ("transaction", transaction()),
    ];
    table::check(&file, &records.map(|(name, bytes)| (name.to_owned(), bytes)));

    let kept = table::from_text(&std::fs::read_to_string(&file).unwrap());
    assert_eq!(Superblock::decode(&kept["superblock"]), Ok(superblock()));
    assert_eq!(Anchor::decode(&kept["anchor"]), Ok(anchor()));
    assert_eq!(Catalog::decode(&kept["catalog"]), Ok(catalog()));
    assert_eq!(kept["header with a slot"].len(), ENTRY_BYTES);
    assert_eq!(Entry::decode(0xe5, &kept["header with a slot"]), Ok((with_slot(), vec![])));
    assert_eq!(Entry::decode(0xe6, &kept["header without a slot"]), Ok((slotless, runs)));
    let mut read = Cells::new(1);
    read.loaded(2, Some(AlignedBuf::copy_of(&kept["cells"], BLOCK as usize)));
    assert_eq!((read.of(2 * 512 + 1), read.rotten()), ((BlockState::Present, 0x0f0e_0d0c), 0));
    let head = FoundHead::decode(&kept["transaction"], 1 << 20).unwrap();
    assert_eq!((head.sequence, head.position, head.before, head.durable), (0x66, 0x5000, 0x77, 0x65));
    let (records, data_at) = head.records(&kept["transaction"]).unwrap();
    assert_eq!(records, redo());
    assert_eq!(kept["transaction"][data_at..], data());
}
