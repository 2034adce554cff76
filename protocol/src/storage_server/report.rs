//! What a server says of itself: heartbeats, the answer to a fence, the inventory.

use super::Owner;
use super::StorageServer;
use super::medium::{MediumOp, Record};
use super::mend::left_to_mend;
use super::volume::{Copy, Volume};
use crate::control::{
    Alive, ControlReply, CopyInventory, CopyProgress, CopyReport, DeviceReport, Promised, SettleName, VolumeReport,
};
use crate::ids::{BootId, CopyId, DeviceId, Generation, VolumeId};
use crate::map::{Member, MemberState, Settle, VolumeMap};
use crate::mutants::{Mutant, on};
use crate::wire::HandleId;
use std::collections::BTreeMap;

impl StorageServer {
    pub(super) fn heartbeat(&mut self, lease_number: u64) -> ControlReply {
        if lease_number > self.lease_number {
            self.lease_number = lease_number;
            // Durable at times: with every heartbeat that raises it, on whatever device is open (R6).
            let boots: Vec<BootId> = self.devices.keys().copied().collect();
            for boot in boots.into_iter().filter(|_| lease_number.is_multiple_of(16)) {
                self.medium(boot, Owner::Nobody, MediumOp::Commit(vec![Record::LeaseNumber(lease_number)]));
            }
        }
        let devices = self.devices.iter().map(|(boot, d)| DeviceReport {
            device: d.device,
            boot: *boot,
            capacity_bytes: d.capacity_bytes,
            free_bytes: self.free_to_tell(*boot),
        });
        ControlReply::Alive(Alive {
            server: self.config.server,
            cluster: self.config.cluster,
            lease_number: self.lease_number,
            leaving: self.leaving,
            devices: devices.collect(),
            copies: self.progress(),
            behind: self.behind(),
        })
    }

    fn progress(&self) -> Vec<CopyProgress> {
        let mut progress = Vec::new();
        for (volume, known) in &self.volumes {
            for copy in known.copies.values() {
                let (unsynced, pages) = self.unsynced_of(*volume, copy);
                let to_settle = settle_of(known, copy).map_or(0, |name| self.to_settle(known, copy, &name));
                if copy.boot.is_none() || unsynced > 0 || to_settle > 0 {
                    progress.push(CopyProgress {
                        volume: *volume,
                        copy: copy.record.copy,
                        boot: copy.boot.unwrap_or_default(),
                        stored: known.stored(),
                        unsynced,
                        pages,
                        to_settle,
                        filled_bytes: copy.filled_bytes,
                    });
                }
            }
        }
        progress
    }

    fn behind(&self) -> Vec<(VolumeId, crate::ids::Generation)> {
        let ahead = |(id, v): (&VolumeId, &Volume)| {
            let at_least = v.behind.unwrap_or_default().max(v.promised);
            (at_least > v.stored()).then_some((*id, at_least))
        };
        self.volumes.iter().filter_map(ahead).collect()
    }

    /// Pages that a fill must still bring, and pages in all. A layer that no map names yet counts by its mark alone.
    fn unsynced_of(&self, volume: VolumeId, copy: &Copy) -> (u64, u64) {
        let mut unsynced = 0;
        let mut pages = 0;
        for (layer_id, layer) in &copy.layers {
            let own = self.pages_of(volume, copy.record.copy, *layer_id);
            pages += own;
            unsynced += match own {
                0 => u64::from(layer.cursor != u64::MAX) + layer.unsynced.len() as u64,
                own => layer.unsynced_pages(own),
            };
        }
        (unsynced, pages)
    }

    /// The answer to a fence, from the state after everything older has ended (H2, H19).
    pub(super) fn promised_report(&self, volume: VolumeId) -> ControlReply {
        let known = &self.volumes[&volume];
        let copies = known.copies.values().filter_map(|copy| Some(self.copy_report(volume, known, copy, copy.boot?)));
        ControlReply::Promised(Promised {
            server: self.config.server,
            generation: known.promised,
            stored: known.stored(),
            sessions: known.sessions.iter().map(|(id, s)| (*id, (s.incarnation, s.handled))).collect(),
            copies: copies.collect(),
        })
    }

    fn copy_report(&self, volume: VolumeId, known: &Volume, copy: &Copy, boot: BootId) -> CopyReport {
        let mut pending: BTreeMap<_, u64> = BTreeMap::new();
        let mut before_start = 0;
        for page in copy.layers.values().flat_map(|l| l.pending.values()) {
            before_start += u64::from(page.before_start);
            for (writer, _) in &page.writers {
                *pending.entry(*writer).or_default() += 1;
            }
        }
        let name = settle_of(known, copy);
        CopyReport {
            copy: copy.record.copy,
            boot,
            unsynced: self.unsynced_of(volume, copy).0,
            pending: pending.into_iter().map(|((session, incarnation), n)| (session, (incarnation, n))).collect(),
            pending_before_start: before_start,
            settled_for: name,
            to_settle: name.map_or(0, |name| self.to_settle(known, copy, &name)),
            listed: copy.marking.next_of(known.promised) == u64::MAX,
        }
    }

    /// Suspect pages that this copy has still to settle; `u64::MAX` before it knows which they are. The authoritative
    /// copy itself has only what it must take from others: its own report is the flush before the fence's answer (H12).
    fn to_settle(&self, known: &Volume, copy: &Copy, name: &SettleName) -> u64 {
        let is_source = name.authoritative == copy.record.copy && Some(name.boot) == copy.boot;
        let settled = copy.settled == Some(*name) || on(Mutant::SettleNotNamed) && copy.settled.is_some();
        if settled || on(Mutant::WrongAuthority) {
            return 0;
        }
        if is_source {
            return left_to_mend(known, copy, name);
        }
        self.pulls.get(&copy.record.copy).map_or(u64::MAX, |pull| pull.settle_left(name))
    }

    pub(super) fn volume_report(&self, volume: VolumeId) -> ControlReply {
        let report = |v: &Volume| VolumeReport { promised: v.promised, map: v.map.clone() };
        ControlReply::Volume { volume: self.volumes.get(&volume).map(report) }
    }

    pub(super) fn inventory(&self) -> ControlReply {
        let of = |(volume, known): (&VolumeId, &Volume)| {
            let (volume, stored) = (*volume, known.stored());
            let of_copy = move |c: &Copy| CopyInventory { volume, copy: c.record.copy, device: c.device, stored };
            known.copies.values().map(of_copy).collect::<Vec<_>>()
        };
        ControlReply::Inventory { copies: self.volumes.iter().flat_map(of).collect() }
    }
}

/// A copy on a server, for readiness, metrics and a planned leave. No decision of the protocol rests on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyStanding {
    /// Whose.
    pub volume: VolumeId,
    /// Which.
    pub copy: CopyId,
    /// On which device.
    pub device: DeviceId,
    /// The opening of its device; none while that is closed.
    pub boot: Option<BootId>,
    /// Generation of the stored map; 0 = none.
    pub stored: Generation,
    /// What the stored map says of it; `None` if the map does not name it.
    pub member: Option<Member>,
    /// Another member of its group is `Active` by the stored map.
    pub others_active: bool,
    /// Pages that a fill must still bring, and pages in all.
    pub unsynced: (u64, u64),
    /// Bytes filled since it became `Syncing`.
    pub filled_bytes: u64,
}

impl CopyStanding {
    /// Whether it needs nothing any more: `Active` under this very opening, or no longer named by the map.
    pub fn is_settled_in(&self) -> bool {
        self.member.is_none_or(|m| m.state == MemberState::Active && Some(m.boot) == self.boot)
    }

    /// Whether the map counts on it although others could go on without it.
    pub fn could_be_left_out(&self) -> bool {
        let counted_on = |m: &Member| m.state != MemberState::Failed && Some(m.boot) == self.boot;
        self.others_active && self.member.as_ref().is_some_and(counted_on)
    }
}

impl StorageServer {
    /// Every copy on this server.
    pub fn copies(&self) -> Vec<CopyStanding> {
        let of = |(volume, known): (&VolumeId, &Volume)| {
            known.copies.values().map(|copy| self.standing(*volume, known, copy)).collect::<Vec<_>>()
        };
        self.volumes.iter().flat_map(of).collect()
    }

    fn standing(&self, volume: VolumeId, known: &Volume, copy: &Copy) -> CopyStanding {
        let place = known.map.as_ref().and_then(|map| Some((map, map.place_of(copy.record.copy)?)));
        let others_active = place.is_some_and(|(map, (p, g, own))| {
            map.placements[p as usize].groups[g as usize].in_state(MemberState::Active).any(|m| m.copy != own.copy)
        });
        CopyStanding {
            volume,
            copy: copy.record.copy,
            device: copy.device,
            boot: copy.boot,
            stored: known.stored(),
            member: place.map(|(_, (_, _, member))| *member),
            others_active,
            unsynced: self.unsynced_of(volume, copy),
            filled_bytes: copy.filled_bytes,
        }
    }

    /// The volume of a handle, for metrics.
    pub fn volume_behind(&self, handle: HandleId) -> Option<VolumeId> {
        self.handles.get(&handle).map(|h| h.volume)
    }
}

/// The settle under way in a copy's group, by the stored map.
fn settle_of(known: &Volume, copy: &Copy) -> Option<SettleName> {
    known.map.as_ref().and_then(|map| settle_in(map, copy.record.copy))
}

/// The settle under way in the group of a copy.
pub(super) fn settle_in(map: &VolumeMap, copy: crate::ids::CopyId) -> Option<SettleName> {
    let (placement, group, _) = map.place_of(copy)?;
    match map.placements[placement as usize].groups[group as usize].settle {
        Settle::Running { authoritative, boot, begun } => Some(SettleName { authoritative, boot, begun }),
        Settle::None | Settle::Over => None,
    }
}
