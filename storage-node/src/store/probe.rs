//! What lies on a device before Lamina touches it.
//!
//! Invariant: a device that holds anything at all is never written unless a person said `format: true`. A known
//! signature is named; bytes that are not zero at the beginning or the end, though unknown, are refused too.
//! Offsets are those of util-linux' libblkid and of each format's own definition.

use crate::store::DeviceError;
use crate::store::aligned::AlignedBuf;
use crate::store::disk::{Access, Disk, FileDisk};
use crate::store::geometry::SUPER_AT;
use crate::store::superblock::{SUPER_MAGIC, Superblock};
use lamina_protocol::ids::{ClusterId, DeviceId, ServerId};
use std::path::Path;

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing: the first and the last MiB are zeroes.
    Blank,
    /// A device of Lamina.
    Ours {
        /// Its cluster.
        cluster: ClusterId,
        /// Its server.
        server: ServerId,
        /// Its id.
        device: DeviceId,
    },
    /// A device of a Lamina that writes another format.
    OtherVersion {
        /// The format's version.
        version: u32,
        /// Its incompatible features.
        incompat: u64,
    },
    /// Something else.
    Foreign(Foreign),
}

/// Something that is not Lamina's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Its name in plain words.
    pub what: &'static str,
    /// The byte where it was seen.
    pub at: u64,
}

impl std::fmt::Display for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at byte {}", self.what, self.at)
    }
}

const HEAD_BYTES: u64 = 1 << 20;

/// (byte from the start, magic, name)
const AT_START: &[(usize, &[u8], &str)] = &[
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 filesystem"),
    (0, b"XFSB", "an XFS filesystem"),
    (0x10040, b"_BHRfS_M", "a btrfs filesystem"),
    (0x400, b"\x10\x20\xf5\xf2", "an F2FS filesystem"),
    (3, b"NTFS    ", "an NTFS filesystem"),
    (3, b"EXFAT   ", "an exFAT filesystem"),
    (54, b"FAT", "a FAT filesystem"),
    (82, b"FAT32", "a FAT32 filesystem"),
    (4086, b"SWAPSPACE2", "Linux swap"),
    (4086, b"SWAP-SPACE", "Linux swap"),
    (4086, b"S1SUSPEND", "a suspended system"),
    (65526, b"SWAPSPACE2", "Linux swap"),
    (0, b"LUKS\xba\xbe", "a LUKS container"),
    (0x4000, b"SKUL\xba\xbe", "a LUKS container"),
    (0, b"LABELONE", "an LVM2 physical volume"),
    (512, b"LABELONE", "an LVM2 physical volume"),
    (1024, b"LABELONE", "an LVM2 physical volume"),
    (1536, b"LABELONE", "an LVM2 physical volume"),
    (0, b"\xfc\x4e\x2b\xa9", "a Linux RAID member"),
    (4096, b"\xfc\x4e\x2b\xa9", "a Linux RAID member"),
    (0, b"bluestore block device", "a Ceph BlueStore device"),
    (0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "a bcache device"),
    (0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9", "a bcachefs filesystem"),
    (0x10034, b"ReIsEr", "a ReiserFS filesystem"),
    (0x8001, b"CD001", "an ISO 9660 image"),
    (0x8001, b"NSR0", "a UDF filesystem"),
    (0x8000, b"JFS1", "a JFS filesystem"),
    (0x400, b"H+", "an HFS+ filesystem"),
    (0x400, b"HX", "an HFSX filesystem"),
    (32, b"NXSB", "an APFS container"),
    (0, b"hsqs", "a squashfs image"),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS image"),
    (0x10000, b"\x01\x16\x19\x70", "a GFS2 filesystem"),
    (0x2000, b"OCFSV2", "an OCFS2 filesystem"),
    (0, b"QFI\xfb", "a QEMU qcow image"),
    (510, b"\x55\xaa", "an MBR partition table or boot sector"),
];

/// (bytes before the end, magic, name)
const AT_END: &[(usize, &[u8], &str)] = &[
    (512, b"EFI PART", "a GPT partition table (backup)"),
    (4096, b"EFI PART", "a GPT partition table (backup)"),
    (4096 - 60, b"\x83\x74\x02\x6b", "a DRBD device"),
    (4096 - 60, b"\x83\x74\x02\x67", "a DRBD device"),
    (4096 - 60, b"\x83\x74\x02\x5a", "a DRBD device"),
    (512, b"$\x16\x9d\x1a", "an Intel RAID member"),
    (1024, b"Intel Raid ISM Cfg Sig", "an Intel RAID member"),
    (512, b"DDF\x11", "a DDF RAID member"),
    (512, b"\xde\x11\xde\x11", "a DDF RAID member"),
];

/// Linux RAID 0.90 lies at the last multiple of 64 KiB that leaves 64 KiB; 1.0 at the last of 4 KiB that leaves 8 KiB.
fn raid_at_end(device_bytes: u64) -> [u64; 2] {
    [(device_bytes & !0xffff).saturating_sub(0x10000), (device_bytes & !0xfff).saturating_sub(0x2000)]
}

/// The labels of ZFS are 256 KiB long, two at either end; each ends with a ring of uberblocks from 128 KiB on.
fn zfs_in(bytes: &[u8]) -> Option<usize> {
    const UBERBLOCK: u64 = 0x00ba_b10c;
    let hit = |at: &usize| {
        let word = bytes.get(*at..*at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        word.is_some_and(|w| w == UBERBLOCK || w.swap_bytes() == UBERBLOCK)
    };
    (0..bytes.len()).step_by(1024).find(hit)
}

fn foreign_in(head: &[u8], tail: &[u8], tail_at: u64, bytes: u64) -> Option<Foreign> {
    let starts = |buf: &[u8], at: usize, magic: &[u8]| buf.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((at, _, what)) = AT_START.iter().find(|(at, magic, _)| starts(head, *at, magic)) {
        return Some(Foreign { what, at: *at as u64 });
    }
    for (back, magic, what) in AT_END {
        let at = tail.len() - back;
        if starts(tail, at, magic) {
            return Some(Foreign { what, at: tail_at + at as u64 });
        }
    }
    for at in raid_at_end(bytes) {
        let within = at.saturating_sub(tail_at) as usize;
        if at >= tail_at && starts(tail, within, b"\xfc\x4e\x2b\xa9") {
            return Some(Foreign { what: "a Linux RAID member", at });
        }
    }
    if let Some(at) = zfs_in(head).map(|at| at as u64).or(zfs_in(tail).map(|at| tail_at + at as u64)) {
        return Some(Foreign { what: "a ZFS device", at });
    }
    let first = |buf: &[u8]| buf.iter().position(|b| *b != 0).map(|at| at as u64);
    let at = first(head).or(first(tail).map(|at| tail_at + at))?;
    Some(Foreign { what: "unknown content", at })
}

/// Reads both superblocks; the first that is whole.
pub(crate) fn superblock(disk: &impl Disk) -> Result<Option<Superblock>, DeviceError> {
    for at in SUPER_AT {
        let block = disk.read_new(at, 4096).map_err(|e| DeviceError::io("read the superblock", e))?;
        if let Ok(found) = Superblock::decode(&block) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// What is on this disk.
pub(crate) fn probe_disk(disk: &impl Disk) -> Result<Found, DeviceError> {
    let bytes = disk.bytes().map_err(|e| DeviceError::io("measure the device", e))?;
    if bytes < crate::store::geometry::MIN_DEVICE_BYTES {
        return Err(DeviceError::TooSmall { bytes });
    }
    if let Some(found) = superblock(disk)? {
        return Ok(match found.is_known() {
            true => Found::Ours { cluster: found.cluster, server: found.server, device: found.device },
            false => Found::OtherVersion { version: found.version, incompat: found.incompat },
        });
    }
    let read = |at: u64, len: u64| -> Result<AlignedBuf, DeviceError> {
        disk.read_new(at, len as usize).map_err(|e| DeviceError::io("read the device", e))
    };
    let head = read(0, HEAD_BYTES)?;
    let tail_at = (bytes - HEAD_BYTES) & !0xfff;
    let whole = (bytes - tail_at) & !0xfff;
    // A device need not be a multiple of 4 KiB long; its last sectors are looked at as far as whole blocks go.
    let tail = read(tail_at, whole)?;
    if SUPER_AT.iter().any(|at| head[*at as usize..].starts_with(SUPER_MAGIC)) {
        return Ok(Found::Foreign(Foreign { what: "a Lamina device with broken superblocks", at: 0 }));
    }
    Ok(foreign_in(&head, &tail, tail_at, bytes).map_or(Found::Blank, Found::Foreign))
}

/// What is on the device at this path. Holds it alone for a moment.
pub fn probe(path: &Path) -> Result<Found, DeviceError> {
    probe_disk(&FileDisk::open(path, Access::Exclusive)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MIB: usize = 1 << 20;

    fn seen(head: &[u8], tail: &[u8]) -> Option<&'static str> {
        foreign_in(head, tail, 99 << 20, 100 << 20).map(|f| f.what)
    }

    #[test]
    fn every_known_signature_is_named() {
        let blank = vec![0; MIB];
        assert_eq!(seen(&blank, &blank), None);
        for (at, magic, what) in AT_START {
            let mut head = blank.clone();
            let room = head.len() - at;
            assert!(magic.len() <= room, "{what} lies within the first MiB");
            head[*at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(seen(&head, &blank), Some(*what));
        }
        for (back, magic, what) in AT_END {
            let mut tail = blank.clone();
            let at = MIB - back;
            tail[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(seen(&blank, &tail), Some(*what));
        }
    }

    #[test]
    fn raid_zfs_and_unknown_bytes_are_refused_too() {
        let blank = vec![0; MIB];
        for at in raid_at_end(100 << 20) {
            let mut tail = blank.clone();
            let within = at as usize - (99 << 20);
            tail[within..within + 4].copy_from_slice(b"\xfc\x4e\x2b\xa9");
            assert_eq!(seen(&blank, &tail), Some("a Linux RAID member"));
        }
        let mut zfs = blank.clone();
        zfs[131_072..131_080].copy_from_slice(&0x00ba_b10cu64.to_be_bytes());
        assert_eq!(seen(&zfs, &blank), Some("a ZFS device"));
        let mut odd = blank.clone();
        odd[777_777] = 1;
        assert_eq!((seen(&odd, &blank), seen(&blank, &odd)), (Some("unknown content"), Some("unknown content")));
    }
}
