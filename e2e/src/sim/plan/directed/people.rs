//! What people do, and what is done to the API server, while something goes wrong: growth, drains, deletion, an old copy
//! of the objects put back (R6).

use super::{BEGIN, SECOND, Scene};
use crate::sim::dice::Dice;
use crate::sim::event::Host;
use crate::sim::plan::{Action, Ask, Fault, Moment, Setup, Step};
use lamina_protocol::management::Step as LeaderStep;

/// A cluster and what is done with it, in any order.
pub(in crate::sim::plan) fn plan(dice: &mut Dice) -> (Setup, Vec<Step>) {
    let mut scene = Scene { setup: super::setup(dice), steps: Vec::new() };
    scene.setup.servers = 3;
    scene.setup.operators = 2;
    scene.attach(SECOND, 0);
    let end = scene.setup.heal_at_us - SECOND;
    scene.asks(dice, 0, (2 * SECOND, end), 40_000, (6, 2));
    match dice.below(13) {
        0..=2 => scene.restored(dice),
        3..=4 => scene.deleted(dice),
        5..=7 => scene.drained(dice),
        8..=9 => scene.forced(dice),
        10..=11 => scene.old_disk(dice),
        _ => scene.grown(dice),
    }
    (scene.setup, scene.steps)
}

impl Scene {
    /// R6: maps are committed, then the objects are as before; the leader lives on, or another one finds them so.
    fn restored(&mut self, dice: &mut Dice) {
        for n in 0..3 {
            let at_us = BEGIN + n * 8 * SECOND;
            let server = dice.index(self.setup.servers);
            self.minor(dice, at_us, server);
            let later = at_us + dice.within(500_000, 4 * SECOND);
            let restore = Fault::RestoreApi { back_ms: dice.within(300, 6_000), versions: dice.chance(1, 2) };
            let with = match dice.below(5) {
                0 => Fault::LoseLease,
                1 => Fault::KillOperator { operator: dice.index(2), down_ms: dice.within(50, 4_000) },
                2 => Fault::Freeze { host: Host::Operator(dice.index(2)), ms: dice.within(50, 5_000) },
                3 => Fault::StopServers { servers: vec![server], power: false, down_ms: dice.within(50, 3_000) },
                _ => Fault::Break { pick: dice.next() },
            };
            if dice.chance(1, 3) {
                let moment = Moment::Leader(LeaderStep::ALL[dice.index(9)]);
                let both = Fault::Both { one: Box::new(restore), other: Box::new(with) };
                self.fault(
                    at_us,
                    Fault::When { moment, times: 1, later_us: dice.within(0, 3_000), fault: Box::new(both) },
                );
            } else {
                self.fault(later, restore);
                self.fault(later + dice.within(0, SECOND), with);
            }
        }
    }

    /// R14: the volume goes while servers, leaders or drivers do.
    fn deleted(&mut self, dice: &mut Dice) {
        let at_us = BEGIN + dice.within(0, 14 * SECOND);
        for _ in 0..dice.within(0, 3) {
            let server = dice.index(self.setup.servers);
            let near = at_us + dice.within(0, 3 * SECOND) - SECOND;
            self.minor(dice, near, server);
            let step = [LeaderStep::CopiesDeleted, LeaderStep::Fenced, LeaderStep::Committed][dice.index(3)];
            self.fault(near, Fault::KillLeaderAt { step, down_ms: dice.within(50, 3_000) });
        }
        self.act(at_us, Action::Delete);
    }

    /// Copies move away from a server, and back to it; another one fails meanwhile.
    fn drained(&mut self, dice: &mut Dice) {
        for n in 0..3 {
            let at_us = BEGIN + n * 8 * SECOND;
            let server = dice.index(self.setup.servers);
            self.fault(at_us, Fault::Drain { server, ms: dice.within(3_000, 7_000) });
            if dice.chance(1, 3) {
                let other = dice.index(self.setup.servers);
                let near = at_us + dice.within(0, SECOND);
                self.minor(dice, near, other);
            } else {
                self.restarted_under(dice, at_us, server);
            }
        }
    }

    /// R16: another server restarts under one of the changes that move what lies on this one.
    fn restarted_under(&mut self, dice: &mut Dice, at_us: u64, server: usize) {
        let other = (server + 1 + dice.index(self.setup.servers - 1)) % self.setup.servers;
        let stop = Fault::StopServers { servers: vec![other], power: dice.chance(1, 2), down_ms: dice.within(1, 60) };
        let moment = Moment::Leader([LeaderStep::Intended, LeaderStep::CopiesPut][dice.index(2)]);
        let stop = super::timed(moment, dice.within(0, 500), stop);
        // Mostly the one that takes the old copy away, which comes when the new one is filled.
        self.fault(at_us, if dice.chance(3, 4) { super::timed(Moment::Filled, 0, stop) } else { stop });
    }

    /// I8: what is left of a group fell behind, and a person goes on with it; what it lacks comes back later.
    fn forced(&mut self, dice: &mut Dice) {
        self.setup.force_after_ms = dice.within(1_000, 5_000);
        let left = dice.index(self.setup.servers);
        let stop = |servers, power, down_ms| Fault::StopServers { servers, power, down_ms };
        self.fault(BEGIN, stop(vec![left], dice.chance(1, 2), dice.within(2_500, 5_000)));
        let others: Vec<usize> = (0..self.setup.servers).filter(|n| *n != left).collect();
        let gone = BEGIN + dice.within(2_000, 6_000) * 1_000;
        self.fault(gone, stop(others, dice.chance(1, 2), dice.within(9_000, 20_000)));
        if dice.chance(1, 2) {
            let step = LeaderStep::ALL[dice.index(LeaderStep::ALL.len())];
            self.fault(gone + SECOND, Fault::KillLeaderAt { step, down_ms: dice.within(50, 2_000) });
        }
        if dice.chance(1, 2) {
            let at_us = gone + dice.within(3_000, 9_000) * 1_000;
            self.minor(dice, at_us, left);
        }
    }

    /// R14, H2: a disk is replaced, and what was on it comes back: before, while or after others took its place.
    fn old_disk(&mut self, dice: &mut Dice) {
        self.setup.disks = 1 + dice.index(2);
        for n in 0..2 {
            let at_us = BEGIN + n * 12 * SECOND;
            let server = dice.index(self.setup.servers);
            // Also under the change that another server's return makes.
            let under = dice.chance(1, 2).then(|| {
                use LeaderStep::{Committed, Fenced, FirstPromise, Intended};
                Moment::Leader([Intended, FirstPromise, Fenced, Committed][dice.index(4)])
            });
            for disk in 0..self.setup.disks {
                let blank = Fault::BlankDisk { server, disk, down_ms: dice.within(50, 900) };
                self.fault(at_us, under.map_or(blank.clone(), |moment| super::timed(moment, dice.below(2_000), blank)));
            }
            if under.is_some() {
                let servers = vec![(server + 1) % self.setup.servers];
                let down_ms = dice.within(50, 2_500);
                self.fault(at_us + 1, Fault::StopServers { servers, power: dice.chance(1, 2), down_ms });
            }
            let back = at_us + SECOND + dice.within(0, 10 * SECOND);
            self.fault(back, Fault::OldDisk { server, down_ms: dice.within(50, 900) });
            if dice.chance(1, 2) {
                let other = dice.index(self.setup.servers);
                let near = back + dice.within(0, 2 * SECOND) - SECOND;
                self.minor(dice, near, other);
            }
        }
    }

    /// Larger, more than once; what is new is written as soon as it is there.
    fn grown(&mut self, dice: &mut Dice) {
        let chunk = 16 * u64::from(self.setup.groups);
        let first = self.setup.blocks;
        self.setup.most_blocks = first + 4 * chunk;
        for n in 1..=4 {
            let at_us = BEGIN + n * 4 * SECOND;
            let blocks = first + n * chunk - dice.below(chunk / 2);
            self.act(at_us, Action::Grow { blocks });
            if dice.chance(1, 2) {
                let server = dice.index(self.setup.servers);
                let near = at_us + dice.within(0, 100_000) - 50_000;
                self.minor(dice, near, server);
            }
            for k in 0..200 {
                let block = first + dice.below(blocks - first);
                let ask = if dice.chance(1, 2) { Ask::Write(block, 1) } else { Ask::Read(block, 1) };
                self.act(at_us + k * 15_000, Action::Ask { client: 0, ask });
            }
        }
    }

    /// Something that one volume with two copies lives with.
    fn minor(&mut self, dice: &mut Dice, at_us: u64, server: usize) {
        let down_ms = dice.within(50, 2_500);
        let fault = match dice.below(6) {
            0..=2 => Fault::StopServers { servers: vec![server], power: dice.chance(1, 2), down_ms },
            3 => Fault::KillDriver { client: 0, down_ms: down_ms.min(500) },
            4 => Fault::Freeze { host: Host::Server(server), ms: down_ms },
            _ => Fault::PowerOffClient { client: 0, down_ms: down_ms.min(900) },
        };
        self.fault(at_us, fault);
    }
}
