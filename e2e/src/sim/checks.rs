//! Oracles of the invariants: I1, I2, I3, I7, I8 and the raising of losses as each message or commit passes, I4 and I6 at
//! looks over the whole world. They read the fake disks, never a machine's memory.

use super::net::ConnIndex;
use super::plan::{Ask, Moment};
use super::stamp;
use super::world::{VOLUME, World};
use lamina_protocol::control::{ControlReply, CopyReport, Promised, SETTLE_ANEW};
use lamina_protocol::driver::Op;
use lamina_protocol::ids::{BootId, CopyId, Generation, Incarnation, SessionId};
use lamina_protocol::layer::BlockState;
use lamina_protocol::limits::SILENT_MEMBER_MS;
use lamina_protocol::management::Status;
use lamina_protocol::map::{Group, Layer, Member, MemberState, Settle, Standing, VolumeMap};
use lamina_protocol::wire::{Opener, Place, ReplyBody, ReplyFrame, RequestBody, RequestFrame, RequestId};
use std::collections::BTreeMap;

/// What the checks remember.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Places of reads under way at servers.
    reads: BTreeMap<(ConnIndex, RequestId), Place>,
    /// Whose drivers' connections are.
    sessions: BTreeMap<ConnIndex, SessionId>,
    /// The generation under which each process of a server was last seen to serve, its map durable (M2).
    served: BTreeMap<(usize, u32), Generation>,
    /// Places of writes under way there.
    writes: BTreeMap<(ConnIndex, RequestId), Place>,
    /// Copies on disks that were replaced, with what their server had promised then.
    pub(super) taken: Vec<(CopyId, Generation)>,
}

impl World {
    // ---- at each server ----

    /// A request comes in.
    pub(super) fn note_request(&mut self, n: usize, conn: ConnIndex, frame: &RequestFrame) {
        let key = (conn, frame.header.request);
        match &frame.body {
            RequestBody::Read { place } => {
                self.checks.reads.insert(key, *place);
            }
            RequestBody::Write { place } | RequestBody::Discard { place } => {
                self.checks.writes.insert(key, *place);
            }
            RequestBody::Flush => {}
            RequestBody::Fill { .. } | RequestBody::Settle { .. } => {}
            RequestBody::Open { opener: Opener::Session { session }, .. } => {
                self.checks.sessions.insert(conn, *session);
                return;
            }
            _ => return,
        }
        self.servers[n].requests.insert(key, frame.header.generation);
    }

    /// I1, I8 and H2: what is served is served under the highest promise, by an `Active` copy under its own boot id.
    pub(super) fn check_reply(&mut self, n: usize, conn: ConnIndex, frame: &ReplyFrame) {
        let key = (conn, frame.header.request);
        self.check_opened(n, frame);
        let Some(generation) = self.servers[n].requests.remove(&key) else { return };
        let place = self.checks.reads.remove(&key);
        let written = self.checks.writes.remove(&key);
        count_reply(&mut self.counters, &frame.body);
        if matches!(frame.body, ReplyBody::Page { .. }) {
            self.work.pages += 1;
            self.moment(Moment::PageServed);
        }
        let served = frame.body.is_success() || matches!(frame.body, ReplyBody::BadBlock { .. });
        if !served {
            return;
        }
        if frame.header.token.0 > 0 {
            self.moment(Moment::WriteDone);
        }
        let promised = self.servers[n].promised;
        if generation < promised {
            let what = format!("server {n} served a request of generation {generation} after it promised {promised}");
            return self.fail("I1", what);
        }
        self.check_standing(n, conn, generation);
        self.check_stored(n, generation);
        if let Some(place) = written {
            self.check_marked(n, generation, place);
        }
        let Some(place) = place else { return };
        let Some(map) = self.store.maps.get(&generation) else {
            return self
                .fail("I8", format!("server {n} served a read of generation {generation}, which nobody committed"));
        };
        let layer = map.layers.iter().find(|l| l.id == place.layer).expect("the driver reads layers of its map");
        let member = map.member_on(layer.placement, place.group, self.servers[n].id);
        let open = |boot| self.servers[n].disks.iter().any(|d| d.boot() == Some(boot));
        let serves = member.is_some_and(|m| m.state == MemberState::Active && open(m.boot));
        if !serves {
            let what = format!("server {n} served a read of generation {generation} as {member:?}");
            self.fail("I8", what);
        }
    }

    /// M5 and the comparator: what is served for a session is served under a map that admits it.
    fn check_standing(&mut self, n: usize, conn: ConnIndex, generation: Generation) {
        let Some(session) = self.checks.sessions.get(&conn).copied() else { return };
        let Some(map) = self.store.maps.get(&generation) else { return };
        let standing = map.session(session).map(|s| s.standing);
        if standing != Some(Standing::Admitted) {
            let what = format!("server {n} served session {:x} under generation {generation}: {standing:?}", session.0);
            self.fail("standing (M5)", what);
        }
    }

    /// I2, M2: a map is durable where it is served, for what is stored never goes down, restarts included.
    fn check_stored(&mut self, n: usize, generation: Generation) {
        let (host, id) = ((n, self.servers[n].epoch), self.servers[n].id);
        if self.checks.served.get(&host) == Some(&generation) {
            return;
        }
        self.checks.served.insert(host, generation);
        let Some(map) = self.store.maps.get(&generation) else { return };
        let serves = |m: &&Member| m.server == id && m.state != MemberState::Failed;
        let boots: Vec<BootId> = map.members().filter(serves).map(|m| m.boot).collect();
        let stored = |boot: &BootId| {
            let disk = self.servers[n].disks.iter().find(|d| d.boot() == Some(*boot))?;
            Some(disk.blob(VOLUME).and_then(|blob| blob.map).map_or(Generation(0), |map| map.generation))
        };
        if let Some(kept) = boots.iter().filter_map(stored).find(|kept| *kept < generation) {
            self.fail(
                "I2",
                format!("server {n} serves under generation {generation}, of which durable is {kept} (M2)"),
            );
        }
    }

    /// I3: whoever acknowledges a write has its page pending on disk.
    fn check_marked(&mut self, n: usize, generation: Generation, place: Place) {
        let Some(map) = self.store.maps.get(&generation) else { return };
        let Some(layer) = map.layers.iter().find(|l| l.id == place.layer) else { return };
        let Some(member) = map.member_on(layer.placement, place.group, self.servers[n].id) else { return };
        let disk = self.servers[n].disks.iter().find(|d| d.boot() == Some(member.boot));
        if disk.is_some_and(|d| !d.is_pending(member.copy, place.layer, place.page)) {
            let (copy, page) = (member.copy, place.page);
            self.fail(
                "I3",
                format!("server {n} acknowledged a write of page {page} of {copy}, which is not pending there"),
            );
        }
    }

    /// I2: no promise ever goes down.
    pub(super) fn check_control_reply(&mut self, n: usize, reply: &ControlReply) {
        let before = self.servers[n].promised;
        let ControlReply::Promised(promise) = reply else { return };
        let (promised, stored) = (promise.generation, promise.stored);
        let copies = promise.copies.iter().map(|report| report.copy);
        self.counters.count("promises");
        self.moment(Moment::Promised);
        let mended = |c: &CopyReport| {
            c.to_settle == SETTLE_ANEW
                && c.settled_for.is_some_and(|name| name.authoritative == c.copy && name.boot == c.boot)
        };
        if promise.copies.iter().any(mended) {
            self.counters.count("reached: the source of a settle took a bad block from another");
        }
        self.check_durable(n, promise);
        if promised < before {
            self.fail("I2", format!("server {n} promised {before} and now says {promised}"));
        }
        if stored > promised || self.store.maps.keys().next_back().is_some_and(|highest| stored > *highest) {
            self.fail("I2", format!("server {n} says that it stores generation {stored}, promised {promised}"));
        }
        for copy in copies {
            let before = self.servers[n].stored.insert(copy, stored).unwrap_or_default();
            if stored < before {
                self.fail("I2", format!("server {n} stored generation {before} for copy {copy} and now says {stored}"));
            }
        }
        self.servers[n].promised = promised.max(before);
    }

    /// I2: what is answered is durable on every device that answers.
    fn check_durable(&mut self, n: usize, promise: &Promised) {
        for report in &promise.copies {
            let disk = self.servers[n].disks.iter().find(|d| d.boot() == Some(report.boot));
            let kept = disk.and_then(|d| d.blob(VOLUME)).map_or((Generation(0), Generation(0)), |blob| {
                (blob.promised, blob.map.map_or(Generation(0), |map| map.generation))
            });
            if disk.is_some() && (kept.0 < promise.generation || kept.1 < promise.stored) {
                let (promised, stored) = (promise.generation, promise.stored);
                let what = format!("server {n} says promised {promised}, stored {stored}; durable are {kept:?}");
                return self.fail("I2", what);
            }
        }
    }

    /// H20: an incarnation is durable before its `Open` is answered.
    fn check_opened(&mut self, n: usize, frame: &ReplyFrame) {
        let ReplyBody::Opened { incarnation, map: Some(map), .. } = &frame.body else { return };
        for disk in &self.servers[n].disks {
            let Some(blob) = disk.boot().and_then(|_| disk.blob(VOLUME)) else { continue };
            // What a committed map says, every later one says, too.
            let own = blob.sessions.iter().map(|(_, (i, _))| *i);
            let kept = own.chain(map.sessions.iter().map(|s| s.incarnation)).max().unwrap_or_default();
            let here = map.members().any(|m| disk.has_copy(m.copy));
            if here && *incarnation > Incarnation(0) && kept < *incarnation {
                let what = format!("server {n} opened incarnation {incarnation}, durable is {kept}");
                return self.fail("H20", what);
            }
        }
    }

    // ---- at each client ----

    /// I1: an acknowledged write was applied by every `Active` and `Syncing` member of the map under which it is.
    pub(super) fn check_applied(&mut self, generation: Generation, ask: Ask, op: &Op) {
        let (Ask::Write(..), Op::Write { address, data }) = (ask, op) else { return };
        let Some(map) = self.store.maps.get(&generation) else {
            return self.fail("I1", format!("a driver acts under generation {generation}, which nobody committed"));
        };
        let layer = map.top();
        let mut at = 0;
        let mut missing = None;
        for extent in map.geometry(layer).split(*address, data.len() as u64) {
            let group = &map.placements[layer.placement as usize].groups[extent.group as usize];
            for block in 0..u64::from(extent.length / 4096) {
                let stamp = stamp::first_word(&data[at..]);
                at += 4096;
                let lacks = group.writers().find(|m| {
                    let disk = self.servers.iter().flat_map(|s| &s.disks).find(|d| d.has_copy(m.copy));
                    disk.is_some_and(|d| !d.written.contains(&(m.copy, stamp)))
                });
                missing = missing.or(lacks.map(|m| (extent.address / 4096 + block, *m)));
            }
        }
        if let Some((block, member)) = missing {
            self.fail(
                "I1",
                format!(
                    "a write of block {block} was acknowledged under generation {generation}, {member:?} never had it"
                ),
            );
        }
    }

    // ---- at each commit ----

    pub(super) fn committed(&mut self, before: &Status) {
        let status = self.store.object.status.clone();
        if status.generation < before.generation {
            return self.fail("I2", format!("the object fell from {} to {}", before.generation, status.generation));
        }
        let Some(map) = status.map.clone().filter(|_| status.generation > before.generation) else { return };
        if self.is_adopted(&map) {
            return;
        }
        if self.is_robbed(&map) {
            return;
        }
        self.check_lineage(before.generation);
        self.check_nodes(before.map.as_ref(), &map);
        self.forced_now(&map);
        self.work.commits += 1;
        self.note(|| format!("COMMIT {}", words(&map, status.proposed.is_some())));
        self.counters.count("commits");
        if map.generation != status.generation || map.validate().is_err() {
            return self.fail(
                "map",
                format!("generation {} was committed with a map that is none: {map:?}", status.generation),
            );
        }
        let mut raised = false;
        if let Some(old) = &before.map {
            for (placement, number, group) in map.groups() {
                let was = &old.placements[placement as usize].groups[number as usize];
                raised |= group.loss > was.loss;
                self.check_group(&map, number, was, group);
            }
        }
        let listed: Vec<SessionId> = map.sessions.iter().map(|s| s.id).collect();
        if raised {
            self.counters.count("reached: a loss was raised");
        }
        let gone = |id: SessionId| !listed.contains(&id);
        if before.map.as_ref().is_some_and(|old| old.sessions.iter().any(|s| gone(s.id))) {
            self.moment(Moment::SessionOut);
        }
        self.register.committed(&listed, raised, map.settling());
        self.store.maps.insert(map.generation, map);
    }

    /// R6: a generation belongs to one map for ever, and none below the highest is committed anew.
    fn is_adopted(&mut self, map: &VolumeMap) -> bool {
        let Some((highest, known)) = self.store.maps.range(map.generation..).next_back() else { return false };
        let generation = map.generation;
        match self.store.maps.get(&generation) {
            Some(same) if same == map => {
                self.counters.count("reached: a map was adopted");
                self.note(|| format!("ADOPTED generation {generation}"));
            }
            Some(other) => {
                let what = format!("generation {generation} was committed with two maps: {other:?}, {map:?}");
                self.fail("R6", what);
            }
            None => {
                let what = format!("generation {generation} was committed after {highest}: {known:?}");
                self.fail("R6", what);
            }
        }
        true
    }

    fn check_group(&mut self, map: &VolumeMap, number: u32, was: &Group, group: &Group) {
        let kept = group
            .in_state(MemberState::Active)
            .any(|m| was.in_state(MemberState::Active).any(|old| old.copy == m.copy && old.boot == m.boot));
        let raised = group.loss > was.loss;
        let had = was.first_active().is_some();
        let has = group.first_active().is_some();
        if had && has && kept == raised {
            let what = format!(
                "group {number} of generation {}: {} (H5): {was:?} -> {group:?}",
                map.generation,
                if raised {
                    "a loss is raised although a member kept its boot id"
                } else {
                    "no loss is raised although none kept its boot id"
                },
            );
            self.fail("loss", what);
        }
        if raised {
            self.check_silent(was);
        }
        if raised && was.in_state(MemberState::Active).count() > 1 {
            self.counters.count("reached: all members of a group restarted");
        }
        if matches!(group.settle, Settle::Running { .. }) && !matches!(was.settle, Settle::Running { .. }) {
            self.counters.count("reached: a settle began");
            self.moment(Moment::SettleBegan);
        }
        if group.settle == Settle::Over {
            self.counters.count("reached: a settle is over");
            self.moment(Moment::SettleOver);
        }
        let gone = |m: &Member| m.state == MemberState::Active && group.member(m.copy).is_none();
        let left = group.in_state(MemberState::Active).count();
        let forced = self.is_forced(map, group);
        if was.members.iter().any(gone) && left < usize::from(self.plan.setup.copies) && !forced {
            let what = format!("an Active copy was taken away although {left} stay: {was:?} -> {group:?}");
            self.fail("R16", what);
        }
        for member in &group.members {
            // What a person forces is `Active` whatever it was.
            let before = if forced { Some(member) } else { was.member(member.copy) };
            self.check_member(map, member, before, raised);
        }
    }

    /// H13: while a member that kept its boot id is only silent, the others wait for it.
    fn check_silent(&mut self, was: &Group) {
        for m in was.in_state(MemberState::Active) {
            let Some(server) = self.servers.iter().find(|s| s.id == m.server && s.machine.is_some()) else { continue };
            let open = server.disks.iter().any(|d| d.boot() == Some(m.boot) && d.has_copy(m.copy));
            let silent_us = self.now - server.heard_at;
            if open && silent_us < SILENT_MEMBER_MS * 900 {
                let what =
                    format!("a loss is raised although {m:?} kept its boot id and was heard {silent_us} us ago (H13)");
                return self.fail("loss", what);
            }
        }
    }

    fn check_member(&mut self, map: &VolumeMap, member: &Member, was: Option<&Member>, raised: bool) {
        let before = was.map(|m| m.state);
        match (before, member.state) {
            (Some(MemberState::Syncing), MemberState::Active) => {
                self.counters.count("reached: a member was filled and is Active");
                self.moment(Moment::Filled);
                self.check_synced(map, member);
            }
            (Some(MemberState::Failed) | None, MemberState::Active) => {
                self.fail("I7", format!("{member:?} is Active in generation {} without a fill", map.generation));
            }
            (Some(MemberState::Failed), MemberState::Syncing) => {
                self.counters.count("reached: a member rejoined");
                self.moment(Moment::Rejoined);
            }
            (None, MemberState::Syncing) => self.counters.count("reached: a member was replaced"),
            (Some(MemberState::Active), MemberState::Failed) => self.counters.count("reached: an Active member failed"),
            (Some(MemberState::Syncing), MemberState::Failed) => {
                self.counters.count("reached: a Syncing member failed")
            }
            (Some(MemberState::Active), MemberState::Active)
                if was.is_some_and(|w| w.boot != member.boot) && !raised =>
            {
                self.fail("loss", format!("{member:?} restarted and stays Active without a loss"));
            }
            _ => {}
        }
    }

    /// I7: nothing is unsynced on the disk of a member that becomes `Active`.
    fn check_synced(&mut self, map: &VolumeMap, member: &Member) {
        let Some((_, group, _)) = map.place_of(member.copy) else { return };
        let pages = map.geometry(map.top()).pages(group);
        let disk = self.servers.iter().flat_map(|s| &s.disks).find(|d| d.has_copy(member.copy));
        // A disk that was replaced since it answered the fence says nothing.
        if disk.is_some_and(|d| d.is_unsynced(member.copy, pages)) {
            self.fail("I7", format!("{member:?} becomes Active in generation {} with pages unsynced", map.generation));
        }
    }

    // ---- at looks ----

    /// I6 over the disks of all members, I4 over those that serve.
    pub(super) fn look(&mut self) {
        let Some(map) = self.store.map().cloned() else { return };
        // An old copy of the object says nothing of what is (R6).
        if self.store.maps.keys().next_back().is_some_and(|highest| *highest > map.generation) {
            return;
        }
        if let Some((oracle, what)) = self.look_at(&map, false) {
            self.fail(oracle, what);
        }
    }

    /// The first fault in the copies; `strictly` = all is quiet, so that nothing may differ or be pending.
    pub(super) fn look_at(&self, map: &VolumeMap, strictly: bool) -> Option<(&'static str, String)> {
        let layer = map.top();
        let geometry = map.geometry(layer);
        let handled = map.sessions.iter().all(|s| s.handled >= map.loss());
        let exact = strictly || (handled && !map.settling() && self.register.all_handled());
        for (_, number, group) in map.groups() {
            let open: Vec<&Member> =
                group.in_state(MemberState::Active).filter(|m| self.is_open(m.copy, m.boot)).collect();
            for page in 0..geometry.pages(number) {
                for block in 0..geometry.page_blocks() {
                    let address = geometry.address_of(number, page, block * 4096);
                    if address >= map.size {
                        continue;
                    }
                    let place = (layer, page, block);
                    if let Some(what) = self.differ(&open, place, strictly).or_else(|| self.hide(group, place)) {
                        return Some(("I6", what));
                    }
                    let certain = self.register.certain((address / 4096) as usize).filter(|_| exact);
                    if let Some(what) = certain.and_then(|content| self.lacks(&open, place, content)) {
                        return Some(("I4", format!("block {}: {what}", address / 4096)));
                    }
                }
            }
        }
        None
    }

    fn is_open(&self, copy: CopyId, boot: BootId) -> bool {
        self.servers
            .iter()
            .any(|s| s.machine.is_some() && s.disks.iter().any(|d| d.boot() == Some(boot) && d.has_copy(copy)))
    }

    /// Two copies, of members in whatever state, that differ although neither has the other's bit clear or the page
    /// unsynced.
    fn hide(&self, group: &Group, place: (&Layer, u64, u32)) -> Option<String> {
        let (layer, page, block) = place;
        let pairs =
            group.members.iter().enumerate().flat_map(|(n, one)| group.members[n + 1..].iter().map(move |o| (one, o)));
        for (one, other) in pairs {
            let (mine, theirs) = (self.on_disk(one, place), self.on_disk(other, place));
            if mine.1 == theirs.1 || [mine.0, theirs.0].contains(&BlockState::Stale) {
                continue;
            }
            let says = |own: &Member, of: &Member| {
                let disk = self.servers.iter().flat_map(|s| &s.disks).find(|d| d.has_copy(own.copy));
                disk.is_none_or(|d| {
                    d.is_pending(own.copy, layer.id, page)
                        || d.missed_by(own.copy, layer.id, page) & (1 << of.ordinal) != 0
                        || d.is_page_unsynced(own.copy, layer.id, page)
                })
            };
            if !says(one, other) && !says(other, one) {
                return Some(format!(
                    "block {block} of page {page} differs and neither copy says so: {one:?} has {mine:?}, {other:?} has {theirs:?}"
                ));
            }
        }
        None
    }

    fn on_disk(&self, member: &Member, (layer, page, block): (&Layer, u64, u32)) -> (BlockState, u64, bool) {
        let disk = self.servers.iter().flat_map(|s| &s.disks).find(|d| d.has_copy(member.copy));
        let Some(disk) = disk else { return (BlockState::Stale, 0, true) };
        let (state, stamp) = disk.block(member.copy, layer.id, page, block);
        (state, stamp, disk.is_pending(member.copy, layer.id, page))
    }

    /// Two copies that differ where neither says so.
    fn differ(&self, members: &[&Member], place: (&Layer, u64, u32), strictly: bool) -> Option<String> {
        let (first, rest) = members.split_first()?;
        let one = self.on_disk(first, place);
        for member in rest {
            let other = self.on_disk(member, place);
            let bad = one.0 == BlockState::Stale || other.0 == BlockState::Stale;
            if one.1 != other.1 && !bad && (strictly || (!one.2 && !other.2)) {
                let (_, page, block) = place;
                return Some(format!(
                    "block {block} of page {page} differs: {first:?} has {one:?}, {member:?} has {other:?}"
                ));
            }
        }
        None
    }

    fn lacks(&self, members: &[&Member], place: (&Layer, u64, u32), content: u64) -> Option<String> {
        members.iter().find_map(|member| {
            let (state, stamp, pending) = self.on_disk(member, place);
            let wrong = stamp != content && state != BlockState::Stale;
            wrong.then(|| {
                format!("{member:?} has {state:?} {:#x} (pending: {pending}), acknowledged is {content:#x}", stamp)
            })
        })
    }
}

fn count_reply(counters: &mut super::Counters, body: &ReplyBody) {
    let name = match body {
        ReplyBody::Superseded { .. } => "reply: Superseded",
        ReplyBody::Behind { .. } => "reply: Behind",
        ReplyBody::Ended => "reply: Ended",
        ReplyBody::Stale { .. } => "reply: Stale",
        ReplyBody::NotServing => "reply: NotServing",
        ReplyBody::NoCopy => "reply: NoCopy",
        ReplyBody::BadBlock { .. } => "reply: BadBlock",
        ReplyBody::Page { .. } => "reply: a page for a peer",
        _ => return,
    };
    counters.count(name);
}

/// A map in one line.
fn words(map: &VolumeMap, proposed: bool) -> String {
    let mut line = format!("generation {}", map.generation);
    for (_, number, group) in map.groups() {
        let members: Vec<String> = group
            .members
            .iter()
            .map(|m| {
                let flags = if m.unpromised { " unpromised" } else { "" };
                format!("{:?}@{:x}/boot {:x}{flags}", m.state, m.server.0, m.boot.0)
            })
            .collect();
        line += &format!("; group {number} [{}]", members.join(", "));
        if group.loss.0 > 0 {
            line += &format!(" loss {}", group.loss);
        }
        if group.settle != Settle::None {
            line += &format!(" settle {}", if group.settle == Settle::Over { "over" } else { "running" });
        }
    }
    for session in &map.sessions {
        line += &format!(
            "; session {:x} {:?} incarnation {} handled {}",
            session.id.0, session.standing, session.incarnation, session.handled
        );
    }
    if proposed { line + " (proposal kept)" } else { line }
}
