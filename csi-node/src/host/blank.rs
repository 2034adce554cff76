//! Whether a device was never written, as far as reading can tell.
//!
//! The rule of the issue is that every group says that no block was ever written. The wire has no such question yet, so
//! this reads the places where a filesystem, a partition table, LVM, RAID or a database would have left something. A
//! device that was written only elsewhere would pass.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: u64 = 4096;
const EDGE: u64 = 1 << 20;
/// Group size of an ext4 with 4 KiB blocks: copies of its superblock begin some of them.
const EXT4_GROUP: u64 = 128 << 20;
/// Bound of the reads on a huge device: 64 TiB have half a million groups.
const MOST_BLOCKS: u64 = 4096;

/// Reads those places.
pub(super) fn looks_blank(device: &Path, size: u64) -> io::Result<bool> {
    let file = File::open(device)?;
    for (start, length) in places(size) {
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, start)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn places(size: u64) -> Vec<(u64, u64)> {
    let edge = EDGE.min(size);
    let groups = (1..=MOST_BLOCKS).map(|n| n * EXT4_GROUP);
    let quarters = (1..4).map(|n| size / 4 / BLOCK * n * BLOCK);
    let inner = groups.chain(quarters).filter(|start| start.checked_add(BLOCK).is_some_and(|end| end <= size));
    [(0, edge), (size - edge, edge)].into_iter().chain(inner.map(|start| (start, BLOCK))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_superblock_copy_far_inside_makes_a_device_not_blank() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device");
        let size = 1 << 30;
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        assert!(looks_blank(&path, size).unwrap());
        for written in [0, 4095, EXT4_GROUP + 56, size / 4, size - 1] {
            file.write_all_at(&[1], written).unwrap();
            assert!(!looks_blank(&path, size).unwrap(), "{written}");
            file.write_all_at(&[0], written).unwrap();
        }
        assert!(looks_blank(&path, size).unwrap());
    }

    #[test]
    fn the_smallest_volume_is_read_whole() {
        assert_eq!(places(4096), [(0, 4096), (0, 4096), (0, 4096), (0, 4096), (0, 4096)]);
        assert!(places(64 << 40).len() < 5000);
    }
}
