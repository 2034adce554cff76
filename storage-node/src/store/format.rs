//! Making a device Lamina's.
//!
//! Invariant: the superblocks are written last, after all they describe is durable, so a format that was cut short
//! leaves a device that is still not ours.

use crate::store::DeviceError;
use crate::store::aligned::AlignedBuf;
use crate::store::catalog::Catalog;
use crate::store::codec::crc32c;
use crate::store::device::Identity;
use crate::store::disk::{Access, Disk, FileDisk};
use crate::store::geometry::{ANCHOR_AT, BLOCK, Geometry, MIN_DEVICE_BYTES, SUPER_AT};
use crate::store::probe::{Found, probe_disk};
use crate::store::superblock::{Anchor, JournalPoint, Superblock};
use lamina_protocol::ids::{BootId, DeviceId};
use std::path::Path;

/// How to format.
#[derive(Clone, Copy, Debug)]
pub struct FormatOptions {
    /// Whose device it becomes.
    pub identity: Identity,
    /// Its new id, minted by the caller.
    pub device: DeviceId,
    /// `spec.devices[].format`: a person's word that what is on it may go.
    pub overwrite: bool,
    /// Make or extend a file to this size before; at least [`MIN_DEVICE_BYTES`]. `None` for block devices.
    pub create_bytes: Option<u64>,
    /// Bytes of the journal; `None` = 1/64 of the device within 8 MiB and 256 MiB.
    pub journal_bytes: Option<u64>,
}

/// Formats the device at this path. Refuses what is not blank unless `overwrite` is set.
pub fn format(path: &Path, options: &FormatOptions) -> Result<(), DeviceError> {
    if let Some(bytes) = options.create_bytes {
        if bytes < MIN_DEVICE_BYTES {
            return Err(DeviceError::TooSmall { bytes });
        }
        let made = !path.exists();
        if made {
            FileDisk::allocate(path, bytes)?;
        }
    }
    format_disk(&FileDisk::open(path, Access::Exclusive)?, options)
}

/// Extends a file in use to this size; tell the open [`Device`](crate::store::Device) by its `grow` afterwards.
pub fn grow_file(path: &Path, bytes: u64) -> Result<(), DeviceError> {
    FileDisk::allocate(path, bytes)
}

pub(crate) fn format_disk(disk: &impl Disk, options: &FormatOptions) -> Result<(), DeviceError> {
    if !options.overwrite {
        match probe_disk(disk)? {
            Found::Blank => {}
            Found::Ours { cluster, server, .. } => return Err(DeviceError::InUse { cluster, server }),
            Found::OtherVersion { version, incompat } => return Err(DeviceError::OtherVersion { version, incompat }),
            Found::Foreign(foreign) => return Err(DeviceError::Foreign(foreign)),
        }
    }
    let bytes = disk.bytes().map_err(|e| DeviceError::io("measure the device", e))?;
    let geo = Geometry::for_new(bytes, options.journal_bytes)?;
    let io = |e| DeviceError::io("format the device", e);
    if options.overwrite {
        wipe(disk, bytes).map_err(io)?;
    }
    lay_out(disk, &geo, options, bytes).map_err(io)
}

/// Makes what was there unrecognisable, first of all, so that a crash from here on leaves nothing half valid.
fn wipe(disk: &impl Disk, bytes: u64) -> std::io::Result<()> {
    let zeroes = AlignedBuf::zeroed(1 << 20);
    disk.write(0, &zeroes)?;
    disk.write((bytes - (1 << 20)) & !0xfff, &zeroes)?;
    disk.sync()
}

fn lay_out(disk: &impl Disk, geo: &Geometry, options: &FormatOptions, bytes: u64) -> std::io::Result<()> {
    let zeroes = AlignedBuf::zeroed(1 << 20);
    // Both halves of the catalog and the ring lie behind one another.
    for at in (geo.catalog_at(0)..geo.zones_at()).step_by(1 << 20) {
        disk.write(at, &zeroes)?;
    }
    let catalog = Catalog::default().encode();
    disk.write(geo.catalog_at(0), &AlignedBuf::copy_of(&catalog, BLOCK as usize))?;
    let anchor = Anchor {
        slabs: geo.slabs,
        number: 0,
        device: options.device,
        tail: JournalPoint { position: 0, sequence: 1, chain: 0 },
        entries_high: 0,
        catalog_len: catalog.len() as u32,
        catalog_crc: crc32c(&catalog),
        catalog_half: 0,
        ever_in_place: false,
        boot: BootId::NONE,
    };
    disk.write(ANCHOR_AT[1], &zeroes[..BLOCK as usize])?;
    disk.write(ANCHOR_AT[0], &AlignedBuf::copy_of(&anchor.encode(), BLOCK as usize))?;
    disk.sync()?;
    let Identity { cluster, server } = options.identity;
    let block = Superblock::new(cluster, server, options.device, geo, bytes).encode();
    for at in SUPER_AT {
        disk.write(at, &AlignedBuf::copy_of(&block, BLOCK as usize))?;
        disk.sync()?;
    }
    Ok(())
}
