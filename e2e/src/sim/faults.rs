//! What goes wrong, applied; and how all is healed in the end.

use super::disk::{Cut, Disk, Failing};
use super::event::{Event, Host};
use super::plan::{DiskFault, Fault, Moment};
use super::world::World;
use lamina_protocol::ids::DeviceId;
use lamina_protocol::map::{Member, MemberState, VolumeMap};
use lamina_protocol::storage_server;

/// Trouble that waits for a moment.
pub(super) struct Timed {
    moment: Moment,
    /// Comes with the so manieth from now.
    left: u32,
    later_us: u64,
    fault: Box<Fault>,
}

impl World {
    pub(super) fn fault(&mut self, fault: &Fault) {
        if let Fault::Both { one, other } = fault {
            self.fault(one);
            return self.fault(other);
        }
        let n = self.injected.len();
        self.injected.push(fault.clone());
        let acted = self.inject(n, fault);
        if acted {
            self.counters.count(&format!("fault: {}", fault.kind()));
        } else {
            self.note(|| "(nothing there for this fault)".into());
        }
    }

    fn inject(&mut self, n: usize, fault: &Fault) -> bool {
        match fault {
            Fault::StopServers { servers, power, down_ms } => self.stop_servers(servers, *power, *down_ms),
            Fault::KillDriver { client, down_ms } => return self.kill_driver(*client, down_ms * 1_000),
            Fault::TakeOver { client } => return self.take_over(*client),
            Fault::PowerOffClient { client, down_ms } => self.power_off_client(*client, down_ms * 1_000),
            Fault::KillOperator { operator, down_ms } => self.stop_operator(*operator, down_ms * 1_000),
            Fault::KillLeaderAt { step, down_ms } => self.armed.push((*step, *down_ms)),
            Fault::When { moment, times, later_us, fault } => {
                let (moment, left, later_us) = (*moment, *times, *later_us);
                self.timed.push(Timed { moment, left, later_us, fault: fault.clone() });
            }
            Fault::Both { .. } => unreachable!("taken apart by the caller"),
            Fault::LoseLease => self.store.holder = None,
            Fault::RestoreApi { back_ms, versions } => return self.restore_api(back_ms * 1_000, *versions),
            Fault::Drain { server, ms } => {
                self.drain(*server, true);
                self.queue.push(self.now + ms * 1_000, Event::Heal(n));
            }
            Fault::Freeze { host, ms } => {
                self.freeze(*host, n);
                self.queue.push(self.now + ms * 1_000, Event::Thaw { host: *host, number: n });
            }
            Fault::Cut { from, to, both, ms } => {
                self.cut(from, to, *both, true);
                self.queue.push(self.now + ms * 1_000, Event::Heal(n));
            }
            Fault::Break { pick } => self.break_connections(*pick),
            Fault::FailDisk { server, disk, how } => {
                self.servers[*server].disks[*disk].failing = Some(match how {
                    DiskFault::Write => Failing::Write,
                    DiskFault::Commit => Failing::Commit,
                    DiskFault::Flush => Failing::Flush,
                });
            }
            Fault::Rot { server, disk, pick } => {
                self.register.rotted();
                return self.servers[*server].disks[*disk].rot(*pick);
            }
            Fault::BlankDisk { server, disk, down_ms } => return self.blank_disk(*server, *disk, down_ms * 1_000),
            Fault::OldDisk { server, down_ms } => return self.old_disk(*server, down_ms * 1_000),
            Fault::SlowDisk { server, extra_us, ms } => {
                self.servers[*server].extra_us = *extra_us;
                self.queue.push(self.now + ms * 1_000, Event::Heal(n));
            }
            Fault::SlowApi { extra_us, ms } => {
                self.store.extra_us = *extra_us;
                self.queue.push(self.now + ms * 1_000, Event::Heal(n));
            }
            Fault::Leave { server, down_ms } => {
                self.servers[*server].leaving = true;
                self.server_input(*server, storage_server::Input::Leave);
                self.queue.push(self.now + down_ms * 1_000 / 2 + 2_000_000, Event::Heal(n));
            }
        }
        true
    }

    /// Something has come that trouble may wait for.
    pub(super) fn moment(&mut self, moment: Moment) {
        match self.last_moments.iter_mut().find(|(last, _)| *last == moment) {
            Some((_, at)) => *at = self.now,
            None => self.last_moments.push((moment, self.now)),
        }
        if self.timed.is_empty() {
            return;
        }
        for timed in std::mem::take(&mut self.timed) {
            if timed.moment != moment {
                self.timed.push(timed);
            } else if timed.left > 1 {
                self.timed.push(Timed { left: timed.left - 1, ..timed });
            } else {
                self.queue.push(self.now + 1 + timed.later_us, Event::Timed(timed.fault));
            }
        }
    }

    /// Counts a crash by all that happened within the 2 ms before.
    pub(super) fn count_crash(&mut self, role: &str) {
        for (moment, _) in self.last_moments.iter().filter(|(_, at)| self.now - at < 2_000) {
            self.counters.count(&format!("crash of {role} just when {moment}"));
        }
    }

    /// Counts what a map makes of the loss of a server.
    fn count_loss_of(&mut self, n: usize) {
        let (Some(map), id) = (self.store.map(), self.servers[n].id) else { return };
        let settles = map.settling();
        let last = map.groups().any(|(_, _, g)| {
            let mut active = g.in_state(MemberState::Active);
            let fills = g.in_state(MemberState::Syncing).next().is_some();
            fills && active.next().is_some_and(|m| m.server == id) && active.next().is_none()
        });
        if settles {
            self.counters.count("reached: a server is lost during a settle");
        }
        if last {
            self.counters.count("reached: the last Active is lost during a fill");
        }
    }

    pub(super) fn timed_fault(&mut self, fault: &Fault) {
        if !self.healed {
            self.note(|| format!("FAULT {fault}"));
            self.fault(fault);
        }
    }

    /// The end of a fault, or the second half of it.
    pub(super) fn heal(&mut self, n: usize) {
        if self.healed {
            return;
        }
        match self.injected[n].clone() {
            Fault::Cut { from, to, both, .. } => {
                self.cut(&from, &to, both, false);
                self.flow_again();
                self.tell_watchers();
            }
            Fault::SlowDisk { server, .. } => self.servers[server].extra_us = 0,
            Fault::SlowApi { .. } => self.store.extra_us = 0,
            Fault::Drain { server, .. } => self.undrain(server),
            Fault::Leave { server, down_ms } => self.stop_server(server, Cut::Process, down_ms * 1_000),
            _ => {}
        }
    }

    fn stop_servers(&mut self, servers: &[usize], power: bool, down_ms: u64) {
        let cut = if power { Cut::Power } else { Cut::Process };
        if servers.len() == self.servers.len() {
            self.counters.count("reached: all servers down at once");
        }
        for &server in servers {
            let later = if servers.len() > 1 { self.dice.within(0, 500_000) } else { 0 };
            self.count_loss_of(server);
            self.stop_server(server, cut, down_ms * 1_000 + later);
        }
    }

    fn cut(&mut self, from: &[Host], to: &[Host], both: bool, cut: bool) {
        for &a in from {
            for &b in to {
                if cut {
                    self.net.cut(a, b)
                } else {
                    self.net.mend(a, b)
                }
                if both {
                    if cut { self.net.cut(b, a) } else { self.net.mend(b, a) }
                }
            }
        }
    }

    /// Some connections break; each end sees it in its own time.
    fn break_connections(&mut self, pick: u64) {
        for (n, conn) in self.net.live().into_iter().enumerate() {
            if (pick >> (n % 60)) & 3 == 0 {
                let end = (pick >> 61) as usize & 1;
                let [soon, late] = [self.dice.within(1, 20_000), self.dice.within(1, 2_000_000)];
                self.queue.push(self.now + soon, Event::Gone { conn, end });
                self.queue.push(self.now + late, Event::Gone { conn, end: 1 - end });
            }
        }
    }

    /// Only where every group with a copy there has another `Active` copy that serves: the last one is not taken away. A
    /// commit under way may make it so all the same ([`World::is_robbed`]).
    fn blank_disk(&mut self, server: usize, disk: usize, down_us: u64) -> bool {
        let Some(map) = self.store.map() else { return false };
        let here = |copy| self.servers[server].disks[disk].has_copy(copy);
        let open =
            |boot| self.servers.iter().any(|s| s.machine.is_some() && s.disks.iter().any(|d| d.boot() == Some(boot)));
        let spared = map
            .groups()
            .filter(|(_, _, g)| g.members.iter().any(|m| here(m.copy)))
            .all(|(_, _, group)| group.in_state(MemberState::Active).any(|m| !here(m.copy) && open(m.boot)));
        let used = self.servers[server].disks[disk].copies().next().is_some();
        if !spared || !used || self.servers[server].machine.is_none() {
            return false;
        }
        self.stop_server(server, Cut::Power, down_us);
        let mut blank = Disk::blank(DeviceId(self.mint()), self.plan.setup.capacity_bytes);
        blank.returns_blank = true;
        let old = std::mem::replace(&mut self.servers[server].disks[disk], blank);
        let promised = self.servers[server].promised;
        self.checks.taken.extend(old.copies().map(|copy| (copy.copy, promised)));
        self.servers[server].set_aside.push(old);
        self.servers[server].promised = Default::default();
        self.servers[server].stored = Default::default();
        true
    }

    /// The disk of the only copy that this map keeps `Active` went after its server had answered the fence: nobody could
    /// know, nothing can be demanded any more, and the run is over.
    pub(super) fn is_robbed(&mut self, map: &VolumeMap) -> bool {
        let gone = |m: &Member| {
            self.checks.taken.iter().any(|(copy, promised)| *copy == m.copy && *promised >= map.generation)
        };
        let robbed = map.groups().any(|(_, _, group)| group.in_state(MemberState::Active).all(gone));
        if robbed {
            self.note(|| "the disk of the last Active copy went between its promise and this commit".into());
            self.counters.count("runs that end: the last disk went under a commit");
            self.stopped = true;
        }
        robbed
    }

    /// What was replaced is there again, as it was: what lies on it may be in no map any more.
    fn old_disk(&mut self, server: usize, down_us: u64) -> bool {
        let Some(mut old) = self.servers[server].set_aside.pop() else { return false };
        self.stop_server(server, Cut::Power, down_us);
        self.checks.taken.retain(|(copy, _)| !old.has_copy(*copy));
        old.was_away = true;
        self.servers[server].disks.push(old);
        self.counters.count("reached: a disk that was replaced is back");
        true
    }

    /// No more faults: everything that is down starts, everything that is cut is joined.
    pub(super) fn heal_all(&mut self) {
        self.note(|| "all is healed".into());
        self.healed = true;
        self.armed.clear();
        self.timed.clear();
        self.store.extra_us = 0;
        for fault in std::mem::take(&mut self.injected) {
            if let Fault::Cut { from, to, both, .. } = fault {
                self.uncut(&from, &to, both);
            }
        }
        self.flow_again();
        for host in self.frozen.keys().copied().collect::<Vec<_>>() {
            self.thaw(host, None);
        }
        for server in 0..self.servers.len() {
            self.undrain(server);
            self.servers[server].extra_us = 0;
            if self.servers[server].leaving {
                self.stop_server(server, Cut::Process, 200_000);
            }
            let epoch = self.servers[server].epoch;
            self.queue.push(self.now + 100_000, Event::Boot { host: Host::Server(server), epoch });
            for disk in &mut self.servers[server].disks {
                disk.failing = None;
            }
        }
        for operator in 0..self.operators.len() {
            let epoch = self.operators[operator].epoch;
            self.queue.push(self.now + 100_000, Event::Boot { host: Host::Operator(operator), epoch });
        }
        for client in 0..self.clients.len() {
            let epoch = self.clients[client].epoch;
            self.queue.push(self.now + 200_000, Event::Boot { host: Host::Driver(client), epoch });
        }
        self.tell_watchers();
        self.begin_the_end();
    }

    fn uncut(&mut self, from: &[Host], to: &[Host], both: bool) {
        for &a in from {
            for &b in to {
                while self.net.is_cut(a, b) {
                    self.net.mend(a, b);
                }
                while both && self.net.is_cut(b, a) {
                    self.net.mend(b, a);
                }
            }
        }
    }
}
