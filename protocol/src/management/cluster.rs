//! What the leader keeps beside volumes: the Lease's number, views of servers, orphans, stale sessions.

use super::condition::{Event, EventReason, Veto, VetoReason};
use super::heartbeat::ServerState;
use super::object::Policy;
use super::placement::{self, Candidate, Need, Refusal};
use super::volume::Volume;
use super::{Leader, Orphan, Output, ServerView};
use crate::control::CopyInventory;
use crate::ids::{CopyId, DeviceId, ServerId, SessionId, VolumeId};
use crate::map::{Group, Member, MemberState};
use crate::storage_server::StaleSeen;
use crate::time::Millis;

/// A session still stale after this is told, milliseconds.
const STALE_MS: u64 = 5_000;
/// And again after this, milliseconds.
const STALE_AGAIN_MS: u64 = 60_000;
/// Stale sessions remembered; the oldest is forgotten first.
const MAX_STALE: usize = 1024;

/// The Lease's number (R6).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lease {
    /// As this leader found or wrote it last.
    pub(super) own: u64,
    /// The highest that a server ever heard.
    pub(super) heard: u64,
    /// A higher one than the own was heard: the API server was restored from an old copy.
    pub(super) restored: bool,
    raised: u64,
}

/// What lies on a server.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    pub(super) copies: Vec<CopyInventory>,
    told: Vec<Orphan>,
}

impl Inventory {
    /// The device on which a copy lies, if that is known.
    pub(super) fn device_of(&self, copy: CopyId) -> Option<DeviceId> {
        self.copies.iter().find(|lying| lying.copy == copy).map(|lying| lying.device)
    }
}

/// A session seen stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StaleKey {
    volume: VolumeId,
    session: SessionId,
}

/// Since when, and when it was told.
#[derive(Clone, Copy, Debug)]
pub(super) struct StaleSince {
    since: Millis,
    last: Millis,
    told: Option<Millis>,
}

impl Leader {
    /// R6: compares the number heard with the own one, and raises that when every volume is beyond doubt.
    pub(super) fn check_lease(&mut self, out: &mut Vec<Output>) {
        let heard = self.lease.heard;
        if !self.lease.restored && heard > self.lease.own {
            self.lease.restored = true;
            self.volumes.values_mut().for_each(Volume::doubt_anew);
        }
        let clear = self.volumes.values().all(Volume::is_clear);
        if self.lease.restored && clear && self.lease.own > heard {
            self.lease.restored = false;
        } else if self.lease.restored && clear && self.lease.raised < heard {
            self.lease.raised = heard;
            out.push(Output::RaiseLeaseNumber { above: heard });
        }
    }

    /// Tells what changed in the view of servers, and orphans.
    pub(super) fn view_servers(&mut self, now: Millis, out: &mut Vec<Output>) {
        let ids: Vec<_> = self.servers.by_id.keys().copied().collect();
        for id in ids {
            let Some(view) = self.servers.of(id).map(|state| self.view(now, id, state)) else { continue };
            if let Some(state) = self.servers.by_id.get_mut(&id) {
                state.used_is_told(now, view.used_bytes);
            }
            if self.views.get(&id) != Some(&view) {
                self.views.insert(id, view.clone());
                out.push(Output::Server(view));
            }
            let orphans = self.orphans(id);
            let inventory = self.inventories.entry(id).or_default();
            if inventory.told != orphans {
                inventory.told.clone_from(&orphans);
                out.push(Output::Orphans { server: id, orphans });
            }
        }
    }

    fn view(&self, now: Millis, id: ServerId, state: &ServerState) -> ServerView {
        let rooms = self.rooms.values().flatten().filter(|(server, _)| *server == id).map(|(_, bytes)| bytes);
        let counts = self.volumes.values().map(|v| v.copies_on(state, id));
        let wanted = state.alive.leaving || state.object.as_ref().is_some_and(|o| o.drain);
        let vetoes = if wanted { self.volumes.values().flat_map(|v| v.vetoes(id)).collect() } else { Vec::new() };
        ServerView {
            id,
            health: state.health,
            leaving: state.alive.leaving,
            capacity_bytes: state.capacity_bytes(),
            used_bytes: state.used_to_tell(now),
            provisioned_bytes: rooms.sum(),
            copies: counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1)),
            vetoes,
        }
    }

    /// Why a policy could not place a volume of one page per group now; `None` = it could.
    pub fn unsatisfiable(&self, policy: &Policy) -> Option<Refusal> {
        let size = u64::from(policy.page_bytes) * u64::from(policy.groups);
        let placed = placement::check(size, Some(policy)).and_then(|policy| {
            let need = Need { policy, size, near_node: "", near_zone: "" };
            let provisioned = self.rooms.values().flatten().copied();
            let open = |c: &Candidate| self.servers.of(c.id).is_some_and(ServerState::takes_copies);
            let candidates = self.servers.candidates(provisioned).into_iter().filter(open);
            placement::place(need, &candidates.collect::<Vec<_>>())
        });
        placed.err()
    }

    fn orphans(&self, id: ServerId) -> Vec<Orphan> {
        let Some(inventory) = self.inventories.get(&id) else { return Vec::new() };
        let orphan = |lying: &CopyInventory| {
            let volume = self.volumes.get(&lying.volume);
            let orphaned = volume.is_none_or(|v| !v.names(lying));
            orphaned.then_some(Orphan {
                volume: lying.volume,
                copy: lying.copy,
                stored: lying.stored,
                volume_known: volume.is_some(),
            })
        };
        inventory.copies.iter().filter_map(orphan).collect()
    }

    /// A request was stale: counted by the program at once, told only when it lasts or the session is out.
    pub(super) fn take_stale(&mut self, now: Millis, server: ServerId, seen: StaleSeen, out: &mut Vec<Output>) {
        let Some(volume) = self.volumes.get(&seen.volume) else { return };
        let key = StaleKey { volume: seen.volume, session: seen.session };
        let out_of_map = volume.map().is_some_and(|map| map.session(seen.session).is_none());
        let fresh = StaleSince { since: now, last: now, told: None };
        let known = self.stale.entry(key).or_insert(fresh);
        if now.since(known.last) >= STALE_MS {
            *known = StaleSince { told: known.told, ..fresh };
        }
        known.last = now;
        let lasts = out_of_map || now.since(known.since) >= STALE_MS;
        if lasts && !seen.session.is_none() && known.told.is_none_or(|at| now.since(at) >= STALE_AGAIN_MS) {
            known.told = Some(now);
            let text = format!(
                "client {} (session {}) of volume {} had generation {}, needs {}",
                volume.node_of(seen.session),
                seen.session,
                volume.object.name,
                seen.had,
                seen.need
            );
            let reason = EventReason::StaleSession;
            out.push(Output::Event(Event { volume: Some(seen.volume), server: Some(server), reason, text }));
        }
        if self.stale.len() > MAX_STALE {
            let oldest = self.stale.iter().min_by_key(|(_, s)| s.last).map(|(key, _)| *key);
            oldest.map(|key| self.stale.remove(&key));
        }
    }
}

impl Volume {
    /// The node of a session, as far as the map or a wish names it.
    fn node_of(&self, session: SessionId) -> &str {
        let listed = self.map().and_then(|map| map.session(session)).map(|s| s.node.as_str());
        let wished = || self.object.wishes.sessions.iter().find(|wish| wish.id == session).map(|w| w.node.as_str());
        listed.or_else(wished).unwrap_or("unknown")
    }

    /// Why this volume's copies cannot be taken from a server (002 \[0030\]).
    fn vetoes(&self, server: ServerId) -> Vec<Veto> {
        let Some(map) = self.map() else { return Vec::new() };
        let veto = |group: &Group, m: &Member| {
            let others = group.in_state(MemberState::Active).filter(|o| o.copy != m.copy).count();
            let moving = group.in_state(MemberState::Syncing).any(|o| o.copy != m.copy);
            let reason = match m.state {
                MemberState::Failed | MemberState::Syncing => return None,
                MemberState::Active if others == 0 && !moving => VetoReason::LastActiveCopy,
                MemberState::Active if moving => VetoReason::BeingMoved,
                MemberState::Active => VetoReason::NoRoomElsewhere,
            };
            Some(Veto { volume: self.id(), copy: m.copy, reason })
        };
        let of = |group: &Group| {
            group.members.iter().filter(|m| m.server == server).filter_map(|m| veto(group, m)).collect::<Vec<_>>()
        };
        map.groups().flat_map(|(_, _, group)| of(group)).collect()
    }

    /// Whether the object speaks of a copy that lies somewhere, or is older than the map stored beside it.
    fn names(&self, lying: &CopyInventory) -> bool {
        let status = self.status();
        let mapped = status.map.as_ref().is_some_and(|map| map.place_of(lying.copy).is_some());
        let retired = status.retired.iter().any(|r| r.copy == lying.copy && !r.kept);
        let proposed = status.proposed.iter().flat_map(|p| &p.copies).any(|new| new.copy == lying.copy);
        mapped || retired || proposed || lying.stored > status.generation
    }
}
