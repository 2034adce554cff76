//! `inspect`: what lies on the devices of stopped servers; compares copies; rebuilds a volume's bytes.
//!
//! Invariant: devices are opened for reading only, and a running server's are refused. A block is taken from the first
//! `Active` copy, in map order, that has it with a good checksum; what no copy has is an error, never zeroes.

use crate::args::Inspect;
use crate::store::{self, DeviceError, Inspected, InspectedPage};
use lamina_protocol::codec::{DecodeError, decode};
use lamina_protocol::ids::{CopyId, LayerId, ServerId, VolumeId};
use lamina_protocol::layer::{BLOCK_BYTES, BlockState, PageKey};
use lamina_protocol::map::{InvalidMap, Member, MemberState, VolumeMap};
use lamina_protocol::storage_server::medium::CopyRecord;
use lamina_protocol::storage_server::read_blob;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Why nothing could be told, or the bytes not be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// A device cannot be read.
    #[error("{}: {why}", path.display())]
    Device {
        /// Which.
        path: PathBuf,
        /// Why.
        why: DeviceError,
    },
    /// The map's file cannot be read, or the output not be written.
    #[error("{}: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// The map's file holds no map.
    #[error("the map does not decode: {0}")]
    Map(#[from] DecodeError),
    /// The map is not one that the protocol allows.
    #[error("the map is not valid: {0}")]
    Invalid(#[from] InvalidMap),
    /// The terminal is gone.
    #[error("cannot write the report: {0}")]
    Report(#[from] io::Error),
    /// `--output` without a volume to write.
    #[error("say which volume with --volume: the devices hold {count} with a map")]
    WhichVolume {
        /// How many there are.
        count: usize,
    },
    /// Blocks that no copy on these devices has.
    #[error("{blocks} blocks have no good content on these devices, the first at byte {first}")]
    Lost {
        /// How many.
        blocks: u64,
        /// Address of the first.
        first: u64,
    },
}

/// Everything that was found.
struct Finds {
    devices: Vec<Inspected>,
    /// Each copy, with the number of its device and its server.
    copies: BTreeMap<CopyId, (usize, ServerId, CopyRecord)>,
    maps: BTreeMap<VolumeId, VolumeMap>,
}

/// What a block reads as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content<'a> {
    Zeroes,
    Data(&'a [u8]),
    /// Stale, bad or in an unsynced page: nothing that may be served.
    Unknown,
}

/// Runs the command. False = `Active` copies of a group differ, or any copies without a mark that says so (PROTOCOL.md I6).
pub fn inspect(args: &Inspect, out: &mut impl Write) -> Result<bool, InspectError> {
    let mut finds = open_all(&args.devices, out)?;
    if let Some(path) = &args.map {
        let bytes = std::fs::read(path).map_err(|why| InspectError::File { path: path.clone(), why })?;
        let map: VolumeMap = decode(&bytes)?;
        finds.maps.insert(map.volume, map);
    }
    finds.maps.retain(|id, _| args.volume.is_none_or(|wanted| wanted == *id));
    let maps: Vec<VolumeMap> = finds.maps.values().cloned().collect();
    let mut equal = true;
    for map in &maps {
        map.validate()?;
        equal &= finds.compare(map, out)?;
    }
    if let Some(path) = &args.output {
        let [map] = &maps[..] else { return Err(InspectError::WhichVolume { count: maps.len() }) };
        let file = File::create_new(path).map_err(|why| InspectError::File { path: path.clone(), why })?;
        finds.rebuild(map, &file, path)?;
        writeln!(out, "wrote {} bytes to {}", map.size, path.display())?;
    }
    Ok(equal)
}

fn open_all(paths: &[PathBuf], out: &mut impl Write) -> Result<Finds, InspectError> {
    let mut finds = Finds { devices: Vec::new(), copies: BTreeMap::new(), maps: BTreeMap::new() };
    for path in paths {
        let device = store::inspect(path).map_err(|why| InspectError::Device { path: path.clone(), why })?;
        let (cluster, server, id) = device.identity();
        let (capacity, free) = device.space();
        writeln!(out, "device {id} at {}: server {server}, cluster {cluster}", path.display())?;
        writeln!(out, "  {capacity} bytes for pages, {free} free")?;
        for copy in device.copies() {
            let pages: usize = copy.layers.iter().map(|layer| device.pages(copy.copy, layer.layer).len()).sum();
            let pending: usize = copy.layers.iter().map(|layer| device.pending(copy.copy, layer.layer)).sum();
            let unsynced = copy.layers.iter().any(|layer| layer.cursor != u64::MAX);
            let note = if unsynced { ", not yet filled" } else { "" };
            writeln!(
                out,
                "  copy {} of volume {}: group {}, {pages} pages, {pending} pending{note}",
                copy.copy, copy.volume, copy.group
            )?;
            finds.copies.insert(copy.copy, (finds.devices.len(), server, copy));
        }
        for (volume, blob) in device.volumes() {
            finds.take_blob(volume, &blob, out)?;
        }
        finds.devices.push(device);
    }
    Ok(finds)
}

impl Finds {
    /// The newest map counts.
    fn take_blob(&mut self, volume: VolumeId, blob: &[u8], out: &mut impl Write) -> Result<(), InspectError> {
        let Ok(blob) = read_blob(blob) else {
            writeln!(out, "  volume {volume}: what is kept of it cannot be read")?;
            return Ok(());
        };
        let stored = blob.map.as_ref().map(|map| map.generation).unwrap_or_default();
        writeln!(out, "  volume {volume}: generation {stored} stored, {} promised", blob.promised)?;
        if let Some(map) = blob.map.filter(|map| self.maps.get(&volume).is_none_or(|m| m.generation < map.generation)) {
            self.maps.insert(volume, map);
        }
        Ok(())
    }

    /// Compares the copies of each group with its first `Active` one that is here, page by page; without one, with the first
    /// that is here.
    fn compare(&mut self, map: &VolumeMap, out: &mut impl Write) -> Result<bool, InspectError> {
        writeln!(out, "volume {}: generation {}, {} bytes", map.volume, map.generation, map.size)?;
        let mut equal = true;
        for (placement, number, group) in map.groups() {
            let here = |copy: CopyId| self.copies.contains_key(&copy);
            let of_state = |active: bool| {
                let fits = |m: &&Member| here(m.copy) && (m.state == MemberState::Active) == active;
                group.members.iter().find(fits).map(|m| m.copy)
            };
            let measure = of_state(true).or(of_state(false));
            for member in &group.members {
                write!(out, "  group {number}: copy {} {:?} on {}", member.copy, member.state, member.server)?;
                match measure.filter(|_| self.copies.contains_key(&member.copy)) {
                    None => writeln!(out, ": not on these devices")?,
                    Some(first) if first == member.copy => writeln!(out, ": the others are compared with it")?,
                    Some(first) => {
                        let Differing { blocks, unmarked } = self.differing(map, placement, first, member.copy)?;
                        let marks =
                            if blocks == 0 { String::new() } else { format!(", {unmarked} of them without a mark") };
                        writeln!(out, ": {blocks} blocks differ{marks}")?;
                        equal &= blocks == 0 || (member.state != MemberState::Active && unmarked == 0);
                    }
                }
            }
        }
        Ok(equal)
    }

    fn differing(&mut self, map: &VolumeMap, placement: u32, a: CopyId, b: CopyId) -> Result<Differing, InspectError> {
        let mut differing = Differing::default();
        for layer in map.layers.iter().filter(|layer| layer.placement == placement) {
            let pages: BTreeSet<u64> =
                [a, b].iter().flat_map(|c| self.devices[self.copies[c].0].pages(*c, layer.id)).collect();
            for page in pages {
                let (left, right) = (self.page(a, layer.id, page)?, self.page(b, layer.id, page)?);
                let same = |block: &u32| match (content(&left, *block), content(&right, *block)) {
                    (Content::Unknown, _) | (_, Content::Unknown) => false,
                    (x, y) => x == y,
                };
                let blocks = (0..layer.page_bytes / BLOCK_BYTES).filter(|block| !same(block)).count() as u64;
                let says = |of: CopyId, found: &Option<InspectedPage>, other: CopyId| {
                    let bit = map.place_of(other).map_or(0, |(_, _, member)| 1 << member.ordinal);
                    let marked = |found: &InspectedPage| {
                        let record = &found.record;
                        record.pending || record.unsynced || record.missed & bit != 0 || !found.bad.is_empty()
                    };
                    self.is_unfilled(of, layer.id, page) || found.as_ref().is_some_and(marked)
                };
                differing.blocks += blocks;
                differing.unmarked += if says(a, &left, b) || says(b, &right, a) { 0 } else { blocks };
            }
        }
        Ok(differing)
    }

    /// Whether the fill of a layer has not come to a page yet.
    fn is_unfilled(&self, copy: CopyId, layer: LayerId, page: u64) -> bool {
        self.copies[&copy].2.layers.iter().any(|of| of.layer == layer && page >= of.cursor)
    }

    fn page(&mut self, copy: CopyId, layer: LayerId, page: u64) -> Result<Option<InspectedPage>, InspectError> {
        let device = self.copies[&copy].0;
        let read = self.devices[device].page(PageKey { copy, layer, page });
        read.map_err(|why| InspectError::Device { path: PathBuf::from(copy.to_string()), why })
    }

    /// Writes every block of the top layer; what reads as zeroes stays a hole of the file.
    fn rebuild(&mut self, map: &VolumeMap, file: &File, path: &Path) -> Result<(), InspectError> {
        let broken = |why| InspectError::File { path: path.to_path_buf(), why };
        file.set_len(map.size).map_err(broken)?;
        let geometry = map.geometry(map.top());
        let mut lost = Lost::default();
        for group in 0..geometry.groups {
            for page in 0..geometry.pages(group) {
                let pages = self.active_pages(map, group, page)?;
                for block in 0..geometry.page_blocks() {
                    let address = geometry.address_of(group, page, block * BLOCK_BYTES);
                    if address >= map.size {
                        continue;
                    }
                    match pages.iter().map(|p| content(p, block)).find(|c| *c != Content::Unknown) {
                        Some(Content::Data(data)) => file.write_all_at(data, address).map_err(broken)?,
                        Some(_) => {}
                        None => lost.add(address),
                    }
                }
            }
        }
        lost.into_result()
    }

    /// A page of the top layer on each `Active` copy that is here, in map order.
    fn active_pages(
        &mut self,
        map: &VolumeMap,
        group: u32,
        page: u64,
    ) -> Result<Vec<Option<InspectedPage>>, InspectError> {
        let group = &map.placements[map.top().placement as usize].groups[group as usize];
        let here = |m: &&Member| self.copies.contains_key(&m.copy);
        let sources: Vec<CopyId> = group.in_state(MemberState::Active).filter(here).map(|m| m.copy).collect();
        sources.into_iter().map(|copy| self.page(copy, map.top().id, page)).collect()
    }
}

/// How two copies differ.
#[derive(Clone, Copy, Default)]
struct Differing {
    blocks: u64,
    /// Of those, in pages that neither copy has pending, missed by the other, or unsynced: against I6.
    unmarked: u64,
}

/// Blocks that no copy has.
#[derive(Default)]
struct Lost {
    blocks: u64,
    first: Option<u64>,
}

impl Lost {
    fn add(&mut self, address: u64) {
        self.blocks += 1;
        self.first = Some(self.first.map_or(address, |first| first.min(address)));
    }

    fn into_result(self) -> Result<(), InspectError> {
        self.first.map_or(Ok(()), |first| Err(InspectError::Lost { blocks: self.blocks, first }))
    }
}

fn content(page: &Option<InspectedPage>, block: u32) -> Content<'_> {
    let Some(page) = page else { return Content::Zeroes };
    if page.record.unsynced || page.bad.contains(&block) {
        return Content::Unknown;
    }
    match page.record.blocks.of(block) {
        BlockState::Absent | BlockState::Hole => Content::Zeroes,
        BlockState::Stale => Content::Unknown,
        BlockState::Present => {
            let at = block as usize * BLOCK_BYTES as usize;
            Content::Data(&page.data[at..at + BLOCK_BYTES as usize])
        }
    }
}
