//! Which servers answer (PROTOCOL.md §3, Operators): the heartbeat rule and the suspicion of the operator against itself.
//!
//! ```text
//! Unknown ──answer──> Alive <──answer── Failed | Suspected
//!    └──3 s──┐          │
//!            v          v 3 s silent, or refused while a driver reports it
//!          Failed or, if two servers and more than 30 % fall silent within 10 s, Suspected ──driver's report, or
//!                                                                    no answering server reaches it──> Failed
//! ```

use super::placement::Candidate;
use super::{ServerHealth, ServerObject};
use crate::control::{Alive, CopyProgress, DeviceReport};
use crate::ids::{BootId, CopyId, DeviceId, ServerId};
use crate::limits::SPACE_RESERVE_DIVISOR;
use crate::map::Member;
use crate::time::Millis;
use std::collections::{BTreeMap, BTreeSet};

/// Silences within this time of each other count together, milliseconds.
pub(super) const TOGETHER_MS: u64 = 10_000;
/// A server has opened its devices within this time, milliseconds.
pub(super) const OPENED_MS: u64 = 5_000;
/// Bytes in use are told again when they moved by one part in so many of the capacity.
const USED_STEPS: u64 = 100;
/// Or when they moved at all and this long has passed, milliseconds.
const USED_MS: u64 = 60_000;
/// A driver's report counts for so long, milliseconds.
const REPORT_MS: u64 = 10_000;

/// What is known of one server.
#[derive(Debug)]
pub(super) struct ServerState {
    pub(super) object: Option<ServerObject>,
    pub(super) health: ServerHealth,
    /// Its last sign of life.
    pub(super) alive: Alive,
    /// When the heartbeat that it answered was sent.
    pub(super) alive_sent: Millis,
    /// Openings known from that, and from fence replies since.
    boots: BTreeSet<BootId>,
    /// When these openings were first known: it may have restarted just before.
    pub(super) boots_at: Millis,
    fence_heard: Millis,
    /// Since when it answers without a break; `None` = it does not.
    pub(super) alive_since: Option<Millis>,
    heard: Option<Millis>,
    since: Millis,
    next_beat: Millis,
    silent_since: Option<Millis>,
    refused: bool,
    reported: Option<Millis>,
    foreign: bool,
    /// No server that answers can reach it.
    unreached: bool,
    /// Bytes in use as told last, and when.
    used_told: (u64, Millis),
}

/// What heartbeats say of a member. Hints: they decide what is tried, never what is committed (H2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hint {
    /// Under the boot id that the map lists.
    Same,
    /// Under another one, not known which.
    Restarted,
    /// Its device is closed.
    Closed,
}

impl ServerState {
    fn new(now: Millis) -> Self {
        Self {
            object: None,
            health: ServerHealth::Unknown,
            alive: Alive::default(),
            alive_sent: Millis(0),
            boots: BTreeSet::new(),
            boots_at: now,
            fence_heard: Millis(0),
            alive_since: None,
            heard: None,
            since: now,
            next_beat: now,
            silent_since: None,
            refused: false,
            reported: None,
            foreign: false,
            unreached: false,
            used_told: (0, now),
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.health == ServerHealth::Alive
    }

    /// Whether it has answered for long enough to have opened all devices that it has: then what is not there is lost.
    pub(super) fn has_opened(&self, now: Millis) -> bool {
        let since = self.alive_since.map(|at| at.max(self.boots_at));
        since.is_some_and(|at| now.since(at) >= OPENED_MS) && !self.boots.is_empty()
    }

    /// Whether new copies may be placed here.
    pub(super) fn takes_copies(&self) -> bool {
        let wanted = self.object.as_ref().is_some_and(|o| o.schedulable && !o.drain);
        wanted && self.is_alive() && !self.alive.leaving && self.capacity_bytes() > 0
    }

    /// How far the work of a copy is, if its last sign of life says so.
    pub(super) fn progress(&self, copy: CopyId) -> Option<&CopyProgress> {
        self.alive.copies.iter().find(|progress| progress.copy == copy)
    }

    /// Bytes of all open devices.
    pub(super) fn capacity_bytes(&self) -> u64 {
        self.open_devices().map(|d| d.capacity_bytes).sum()
    }

    fn open_devices(&self) -> impl Iterator<Item = &DeviceReport> {
        self.alive.devices.iter().filter(|d| !d.boot.is_none())
    }

    /// Bytes in use, to be told: as told before until they moved by a step, or for a while.
    pub(super) fn used_to_tell(&self, now: Millis) -> u64 {
        let used: u64 = self.open_devices().map(|d| d.capacity_bytes.saturating_sub(d.free_bytes)).sum();
        let (told, at) = self.used_told;
        let far = used.abs_diff(told) >= (self.capacity_bytes() / USED_STEPS).max(1);
        if far || now.since(at) >= USED_MS { used } else { told }
    }

    /// Whether [`Self::used_to_tell`] says something new.
    pub(super) fn has_used_news(&self, now: Millis) -> bool {
        self.used_to_tell(now) != self.used_told.0
    }

    /// It was told.
    pub(super) fn used_is_told(&mut self, now: Millis, used: u64) {
        if used != self.used_told.0 {
            self.used_told = (used, now);
        }
    }

    /// Whether a device, or every open one if it is not known which, has no room for a new page (R8): what is left is
    /// kept for restarted writes.
    pub(super) fn is_full(&self, device: Option<DeviceId>) -> bool {
        let mut known = self.open_devices().filter(|d| device.is_none_or(|id| d.device == id)).peekable();
        known.peek().is_some() && known.all(is_full)
    }

    /// What heartbeats say of a member here.
    pub(super) fn hint(&self, member: &Member) -> Hint {
        let closed = self.progress(member.copy).is_some_and(|progress| progress.boot.is_none());
        if self.boots.contains(&member.boot) {
            if closed { Hint::Closed } else { Hint::Same }
        } else if closed || self.boots.is_empty() {
            Hint::Closed
        } else {
            Hint::Restarted
        }
    }

    /// A fence reply showed these openings.
    pub(super) fn learn_boots(&mut self, now: Millis, boots: impl Iterator<Item = BootId>) {
        self.fence_heard = now;
        let known = self.boots.len();
        self.boots.extend(boots);
        if self.boots.len() > known {
            self.boots_at = now;
        }
    }

    fn is_silent(&self, now: Millis, after_ms: u64) -> bool {
        now.since(self.heard.unwrap_or(self.since)) >= after_ms || self.confirmed(now)
    }

    /// The leader's own call failed while a driver reports the server.
    fn confirmed(&self, now: Millis) -> bool {
        self.refused && self.reported(now)
    }

    fn reported(&self, now: Millis) -> bool {
        self.reported.is_some_and(|at| now.since(at) < REPORT_MS)
    }
}

/// No page can be had of it but from the reserve.
fn is_full(device: &DeviceReport) -> bool {
    device.free_bytes.saturating_mul(SPACE_RESERVE_DIVISOR) <= device.capacity_bytes
}

/// How many of these devices are open and full.
pub(super) fn full_devices(devices: &[DeviceReport]) -> usize {
    devices.iter().filter(|d| !d.boot.is_none() && is_full(d)).count()
}

/// All servers.
#[derive(Debug, Default)]
pub(super) struct Servers {
    pub(super) by_id: BTreeMap<ServerId, ServerState>,
}

impl Servers {
    pub(super) fn of(&self, id: ServerId) -> Option<&ServerState> {
        self.by_id.get(&id)
    }

    pub(super) fn health(&self, id: ServerId) -> ServerHealth {
        self.by_id.get(&id).map_or(ServerHealth::Unknown, |server| server.health)
    }

    pub(super) fn is_alive(&self, id: ServerId) -> bool {
        self.health(id) == ServerHealth::Alive
    }

    /// Takes a server in, by its object or because a map names it.
    pub(super) fn meet(&mut self, now: Millis, id: ServerId) -> &mut ServerState {
        self.by_id.entry(id).or_insert_with(|| ServerState::new(now))
    }

    /// Every server with an object, with its room less what is promised.
    pub(super) fn candidates(&self, promised: impl Iterator<Item = (ServerId, u64)>) -> Vec<Candidate> {
        let mut provisioned: BTreeMap<ServerId, u64> = BTreeMap::new();
        promised.for_each(|(id, bytes)| *provisioned.entry(id).or_default() += bytes);
        let known = self.by_id.iter().filter_map(|(id, s)| s.object.as_ref().map(|object| (id, s, object)));
        known
            .map(|(id, server, object)| Candidate {
                id: *id,
                zone: object.zone.clone(),
                node: object.node.clone(),
                capacity_bytes: server.capacity_bytes(),
                largest_bytes: server.open_devices().map(|d| d.capacity_bytes).max().unwrap_or(0),
                provisioned_bytes: provisioned.get(id).copied().unwrap_or(0),
            })
            .collect()
    }

    /// The servers whose next heartbeat is due.
    pub(super) fn due(&mut self, now: Millis, every_ms: u64) -> Vec<ServerId> {
        let due = self.by_id.iter_mut().filter(|(_, server)| server.next_beat <= now);
        due.map(|(id, server)| {
            server.next_beat = now.after(every_ms);
            *id
        })
        .collect()
    }

    /// When the next heartbeat is due.
    pub(super) fn next_beat(&self) -> Millis {
        self.by_id.values().map(|server| server.next_beat).min().unwrap_or(Millis::NEVER)
    }

    /// Asks a server no later than this.
    pub(super) fn hurry(&mut self, id: ServerId, at: Millis) {
        if let Some(server) = self.by_id.get_mut(&id) {
            server.next_beat = server.next_beat.min(at);
        }
    }

    /// A sign of life, or of another server in its place.
    pub(super) fn heard(&mut self, now: Millis, sent: Millis, id: ServerId, alive: Alive, foreign: bool) {
        let server = self.meet(now, id);
        server.foreign = foreign;
        if foreign {
            return;
        }
        server.heard = Some(now);
        server.refused = false;
        server.unreached = false;
        let boots = alive.devices.iter().map(|d| d.boot).filter(|boot| !boot.is_none());
        let before = server.boots.clone();
        if sent >= server.fence_heard {
            server.boots = boots.collect();
        } else {
            server.boots.extend(boots);
        }
        if server.boots != before {
            server.boots_at = now;
        }
        server.alive = alive;
        server.alive_sent = sent;
    }

    /// A call to it failed.
    pub(super) fn refused(&mut self, id: ServerId) {
        if let Some(server) = self.by_id.get_mut(&id) {
            server.refused = true;
        }
    }

    /// No server that answers can reach it; it is judged at the next heartbeat, which is sent at once.
    pub(super) fn unreached(&mut self, now: Millis, id: ServerId) {
        if let Some(server) = self.by_id.get_mut(&id) {
            server.unreached = true;
            server.next_beat = now;
        }
    }

    /// A driver reports it: it is asked at once.
    pub(super) fn reported(&mut self, now: Millis, id: ServerId) {
        let server = self.meet(now, id);
        server.reported = Some(now);
        server.next_beat = now;
    }

    /// Judges all anew; returns who changed, with what it was.
    pub(super) fn judge(&mut self, now: Millis, beat_ms: u64, failed_ms: u64) -> Vec<(ServerId, ServerHealth)> {
        // One that missed all but its last heartbeat counts as silent already: those that fall silent together do not
        // do so in the same millisecond.
        let nearly = failed_ms.saturating_sub(beat_ms).max(1);
        for server in self.by_id.values_mut() {
            if !server.is_silent(now, nearly) {
                server.silent_since = None;
            } else if server.silent_since.is_none() {
                server.silent_since = Some(now);
            }
        }
        let together = self.by_id.values().filter(|s| s.silent_since.is_some_and(|at| now.since(at) < TOGETHER_MS));
        let self_suspect = too_many(together.count(), self.by_id.len());
        let mut changed = Vec::new();
        for (id, server) in &mut self.by_id {
            let was = server.health;
            server.health = match () {
                () if server.foreign => ServerHealth::Foreign,
                () if !server.is_silent(now, failed_ms) => match server.heard {
                    Some(_) => ServerHealth::Alive,
                    None => ServerHealth::Unknown,
                },
                () if server.reported(now) || server.unreached => ServerHealth::Failed,
                () if was == ServerHealth::Failed => was,
                () if was == ServerHealth::Suspected || self_suspect => ServerHealth::Suspected,
                () => ServerHealth::Failed,
            };
            server.alive_since = server.is_alive().then(|| server.alive_since.unwrap_or(now));
            if server.health != was {
                changed.push((*id, was));
            }
        }
        changed
    }
}

/// At least two, and more than 30 % of all.
pub(super) fn too_many(silent: usize, all: usize) -> bool {
    silent >= 2 && silent * 10 > all * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ServerId = ServerId(1);

    fn servers(count: u128) -> Servers {
        let mut servers = Servers::default();
        (1..=count).for_each(|id| hear(&mut servers, 0, id));
        servers.judge(Millis(0), 1000, 3000);
        servers
    }

    fn hear(servers: &mut Servers, at: u64, id: u128) {
        servers.heard(Millis(at), Millis(at), ServerId(id), Alive::default(), false);
    }

    #[test]
    fn a_server_silent_for_three_seconds_has_failed_and_is_back_when_it_answers() {
        let mut servers = servers(4);
        (2..=4).for_each(|id| hear(&mut servers, 2999, id));
        servers.judge(Millis(2999), 1000, 3000);
        assert!(servers.is_alive(A));
        servers.judge(Millis(3000), 1000, 3000);
        assert_eq!(servers.health(A), ServerHealth::Failed);
        hear(&mut servers, 4000, 1);
        servers.judge(Millis(4000), 1000, 3000);
        assert!(servers.is_alive(A));
    }

    #[test]
    fn a_drivers_report_fails_a_server_at_once_only_if_the_leader_sees_the_same() {
        let mut servers = servers(3);
        servers.reported(Millis(100), A);
        servers.judge(Millis(100), 1000, 3000);
        assert!(servers.is_alive(A), "a report alone");
        servers.refused(A);
        servers.judge(Millis(110), 1000, 3000);
        assert_eq!(servers.health(A), ServerHealth::Failed);
    }

    #[test]
    fn when_many_fall_silent_the_leader_suspects_itself_and_fails_only_those_that_a_driver_reports() {
        let mut servers = servers(5);
        (3..=5).for_each(|id| hear(&mut servers, 2500, id));
        servers.judge(Millis(3000), 1000, 3000);
        assert_eq!(servers.health(A), ServerHealth::Suspected);
        assert_eq!(servers.health(ServerId(2)), ServerHealth::Suspected);
        servers.reported(Millis(3100), A);
        servers.judge(Millis(3100), 1000, 3000);
        assert_eq!(servers.health(A), ServerHealth::Failed);
        assert_eq!(servers.health(ServerId(2)), ServerHealth::Suspected);
        (3..=5).for_each(|id| hear(&mut servers, 30_000, id));
        servers.judge(Millis(30_000), 1000, 3000);
        assert_eq!(servers.health(ServerId(2)), ServerHealth::Suspected, "time alone never makes it failed");
    }

    #[test]
    fn a_new_leader_fails_nobody_before_it_could_hear_of_them() {
        let mut servers = Servers::default();
        servers.meet(Millis(0), A);
        servers.judge(Millis(2999), 1000, 3000);
        assert_eq!(servers.health(A), ServerHealth::Unknown);
        servers.judge(Millis(3000), 1000, 3000);
        assert_eq!(servers.health(A), ServerHealth::Failed);
    }
}
