//! What a server knows of a volume: promise, map, sessions, copies; and what of it is durable.
//!
//! Promise, map, incarnations and `handled` are kept on every device with a copy of the volume; the highest counts
//! (PROTOCOL.md, Identity). I2: neither promise nor stored generation ever goes down here.

use super::Line;
use super::contract::ConnId;
use super::medium::{CopyRecord, LayerRecord, Record};
use super::mend::Mend;
use super::missed::Missed;
use super::pending::Pending;
use super::reconfigure::Change;
use crate::codec::{DecodeError, Wire, decode, encode, wire_struct};
use crate::control::{FillLimit, SettleName};
use crate::ids::{BootId, CopyId, DeviceId, Generation, Incarnation, LayerId, OpenNumber, Seq, ServerId, SessionId};
use crate::layer::PageKey;
use crate::map::{Member, MemberState, VolumeMap};
use crate::mutants::{Mutant, on};
use std::collections::{BTreeMap, BTreeSet};

/// What a device keeps of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VolumeBlob {
    /// Highest generation promised.
    pub promised: Generation,
    /// The committed map stored last.
    pub map: Option<VolumeMap>,
    /// Highest incarnation and `handled` of each session.
    pub sessions: Vec<(SessionId, (Incarnation, Generation))>,
}
wire_struct!(VolumeBlob { promised, map, sessions });

/// Reads what a device keeps of a volume (for inspection and recovery).
pub fn read_blob(bytes: &[u8]) -> Result<VolumeBlob, DecodeError> {
    decode(bytes)
}

/// A volume of which this server has, or had, a copy.
#[derive(Debug, Default)]
pub(super) struct Volume {
    pub(super) promised: Generation,
    pub(super) map: Option<VolumeMap>,
    /// The generation stored before, while the map is on its way to the devices: nothing is served under it yet (M2).
    pub(super) storing_after: Option<Generation>,
    pub(super) sessions: BTreeMap<SessionId, KnownSession>,
    pub(super) copies: BTreeMap<CopyId, Copy>,
    /// Requests, marks and fills admitted and not finished: what a fence waits for (H19).
    pub(super) executing: u64,
    pub(super) changes: Line<Change>,
    /// A timer is set to clear pages that `confirmed` covers.
    pub(super) clearing: bool,
    /// A request was ahead of this server: what was asked for.
    pub(super) behind: Option<Generation>,
    /// Connections whose `Open` was ahead of this server: they get the next map that is stored, as open sessions do.
    pub(super) ahead: BTreeSet<ConnId>,
    /// What fills may take, as the leader said last.
    pub(super) fill_limit: FillLimit,
}

/// What is known of a session.
#[derive(Debug, Default)]
pub(super) struct KnownSession {
    pub(super) incarnation: Incarnation,
    /// Highest incarnation that every open device with a copy keeps: an `Open` of a higher one waits for them.
    pub(super) durable: Incarnation,
    pub(super) handled: Generation,
    /// Highest `Open` of each incarnation that this process has seen (R7).
    pub(super) opens: BTreeMap<Incarnation, OpenNumber>,
    /// Pending writes of incarnations up to here were adopted by a higher one: they are durable on all copies.
    pub(super) adopted: Incarnation,
    /// Highest `confirmed` of each incarnation.
    pub(super) confirmed: BTreeMap<Incarnation, Seq>,
}

/// A copy on this server.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) record: CopyRecord,
    pub(super) device: DeviceId,
    /// The opening of its device; `None` while that is closed.
    pub(super) boot: Option<BootId>,
    pub(super) layers: BTreeMap<LayerId, CopyLayer>,
    /// The settle that this copy has done, durably; known in memory only (M3).
    pub(super) settled: Option<SettleName>,
    pub(super) filled_bytes: u64,
    /// Pages with a bad block to repair from another `Active` member, each with those that could not under this map.
    pub(super) repairs: BTreeMap<(LayerId, u64), BTreeSet<ServerId>>,
    /// As the authoritative copy of a settle: what it served stale in it.
    pub(super) mend: Option<Mend>,
    /// How far its suspect pages are marked under a fence.
    pub(super) marking: Marking,
}

/// How far the suspect pages of a copy that returns are marked, durably; known in memory only.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Marking {
    /// Under this promise.
    pub(super) generation: Generation,
    /// From which page on not yet; `u64::MAX` = all are.
    pub(super) next: u64,
}

impl Marking {
    /// From which page on nothing is marked yet under that promise.
    pub(super) fn next_of(&self, generation: Generation) -> u64 {
        if self.generation == generation || on(Mutant::StaleListTaken) { self.next } else { 0 }
    }
}

/// One layer of a copy.
#[derive(Debug, Default)]
pub(super) struct CopyLayer {
    pub(super) page_bytes: u32,
    /// Pages from here on are unsynced by the layer's mark; `u64::MAX` = none.
    pub(super) cursor: u64,
    /// Pages that are unsynced by a flag of their own.
    pub(super) unsynced: BTreeSet<u64>,
    pub(super) pending: BTreeMap<u64, Pending>,
    /// Pages that other members lack writes of.
    pub(super) missed: BTreeMap<u64, Missed>,
    /// Pages whose mask was cleared in memory and not yet on disk.
    pub(super) unwritten: BTreeSet<u64>,
}

impl CopyLayer {
    pub(super) fn new(record: &LayerRecord) -> Self {
        Self { page_bytes: record.page_bytes, cursor: record.cursor, ..Self::default() }
    }

    /// How many pages a fill must still bring, of a share of so many pages.
    pub(super) fn unsynced_pages(&self, pages: u64) -> u64 {
        pages.saturating_sub(self.cursor) + self.unsynced.range(..self.cursor.min(pages)).count() as u64
    }
}

impl Copy {
    pub(super) fn key(&self, layer: LayerId, page: u64) -> PageKey {
        PageKey { copy: self.record.copy, layer, page }
    }

    /// I8: a person forced this copy; what is stale or unsynced counts as it is. Gives the opening and the records.
    pub(super) fn trust(&mut self) -> Option<(BootId, Vec<Record>)> {
        let (boot, copy) = (self.boot?, self.record.copy);
        let mut records = Vec::new();
        for (layer_id, layer) in &mut self.layers {
            layer.cursor = u64::MAX;
            records.push(Record::TrustLayer { copy, layer: *layer_id });
            for page in std::mem::take(&mut layer.unsynced) {
                records.push(Record::ClearUnsynced(PageKey { copy, layer: *layer_id, page }));
            }
        }
        Some((boot, records))
    }

    /// The device is closed: what memory knew of its writers is worth nothing now.
    pub(super) fn close(&mut self) {
        self.boot = None;
        self.settled = None;
        for layer in self.layers.values_mut() {
            layer.pending.clear();
            layer.missed.clear();
            layer.unwritten.clear();
            layer.unsynced.clear();
        }
        self.repairs.clear();
        self.mend = None;
        self.marking = Marking::default();
    }
}

impl Volume {
    /// Takes over what a device kept: the highest of each counts.
    pub(super) fn merge_blob(&mut self, blob: &[u8]) {
        // A blob that cannot be read is of a newer version or broken: then nothing of the volume is served from here,
        // for there is no map; it is not forgotten either.
        let Ok(blob) = read_blob(blob) else { return };
        self.promised = self.promised.max(blob.promised);
        let own = self.stored();
        if let Some(map) = blob.map.filter(|map| map.generation > own && map.validate().is_ok()) {
            self.map = Some(map);
        }
        self.promised = self.promised.max(self.stored());
        for (session, (incarnation, handled)) in blob.sessions {
            let known = self.sessions.entry(session).or_default();
            known.incarnation = known.incarnation.max(incarnation);
            known.handled = known.handled.max(handled);
        }
    }

    /// What every device with a copy keeps.
    pub(super) fn blob(&self) -> bytes::Bytes {
        let listed = |id: &SessionId| self.map.as_ref().is_none_or(|map| map.session(*id).is_some());
        let sessions = self.sessions.iter().filter(|(id, _)| listed(id));
        let blob = VolumeBlob {
            promised: self.promised,
            map: self.map.clone(),
            sessions: sessions.map(|(id, s)| (*id, (s.incarnation, s.handled))).collect(),
        };
        encode(&blob).into()
    }

    /// Takes over what a map says of its sessions, and forgets those that it does not list.
    pub(super) fn learn_sessions(&mut self, map: &VolumeMap) {
        for session in &map.sessions {
            let heard = self.sessions.entry(session.id).or_default();
            heard.incarnation = heard.incarnation.max(session.incarnation);
            heard.handled = heard.handled.max(session.handled);
            let highest = heard.incarnation;
            heard.opens.retain(|incarnation, _| *incarnation >= highest);
        }
        self.sessions.retain(|id, _| map.session(*id).is_some());
    }

    /// Generation of the stored map; 0 = none.
    pub(super) fn stored(&self) -> Generation {
        self.map.as_ref().map_or(Generation(0), |map| map.generation)
    }

    /// The generation under which nothing is served yet because it is not durable, if this is it: the one before (M2).
    pub(super) fn not_yet(&self, generation: Generation) -> Option<Generation> {
        self.storing_after.filter(|before| generation > *before)
    }

    /// The copies here that a map forces (I8): it lists one as `Active` under its own boot id, in a group whose loss it
    /// raised since the stored map, although pages of it are unsynced. By I7 nothing but a force makes such a map.
    pub(super) fn forced_by(&self, map: &VolumeMap, server: ServerId) -> Vec<CopyId> {
        let stored = self.stored();
        let raised = map.groups().filter(|(_, _, group)| group.loss > stored);
        let members = raised.flat_map(|(p, g, group)| group.members.iter().map(move |m| (p, g, m)));
        let active = members.filter(|(_, _, m)| m.server == server && m.state == MemberState::Active);
        let behind = |(p, g, m): (u32, u32, &Member)| {
            let copy = self.copies.get(&m.copy).filter(|copy| copy.boot == Some(m.boot))?;
            let pages = |id: &LayerId| {
                let layer = map.layers.iter().find(|l| l.id == *id && l.placement == p);
                layer.map_or(0, |layer| map.geometry(layer).pages(g))
            };
            copy.layers.iter().any(|(id, layer)| layer.unsynced_pages(pages(id)) > 0).then_some(m.copy)
        };
        active.filter_map(behind).collect()
    }

    pub(super) fn add_copy(&mut self, record: CopyRecord, boot: BootId, device: DeviceId) {
        let layers = record.layers.iter().map(|l| (l.layer, CopyLayer::new(l))).collect();
        let (boot, repairs) = (Some(boot), BTreeMap::new());
        let copy = Copy {
            record,
            device,
            boot,
            layers,
            settled: None,
            filled_bytes: 0,
            repairs,
            mend: None,
            marking: Marking::default(),
        };
        self.copies.insert(copy.record.copy, copy);
        // What this device keeps may be older.
        self.sessions.values_mut().for_each(|known| known.durable = Incarnation(0));
    }

    pub(super) fn layer_mut(&mut self, page: &PageKey) -> Option<&mut CopyLayer> {
        self.copies.get_mut(&page.copy)?.layers.get_mut(&page.layer)
    }

    /// The openings on which this volume has copies, each once.
    pub(super) fn boots(&self) -> Vec<BootId> {
        let boots: BTreeSet<_> = self.copies.values().filter_map(|copy| copy.boot).collect();
        boots.into_iter().collect()
    }

    /// The copy that the map names for a group on this server.
    pub(super) fn copy_in_group(&self, placement: u32, group: u32, server: crate::ids::ServerId) -> Option<&Copy> {
        let member = self.map.as_ref()?.member_on(placement, group, server)?;
        self.copies.get(&member.copy)
    }
}

const _: fn(&VolumeBlob, &mut Vec<u8>) = <VolumeBlob as Wire>::put;
