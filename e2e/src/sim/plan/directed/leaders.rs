//! Directed plans about leaders and sessions: two that act at once, changes that are given up, an owner that sleeps.

use super::{BEGIN, SECOND, Scene, both, timed};
use crate::sim::dice::Dice;
use crate::sim::event::Host;
use crate::sim::plan::{Action, Ask, Fault, Moment};
use lamina_protocol::management::Step as LeaderStep;

impl Scene {
    /// H18, R14: two leaders put copies for plans of their own, and what they write comes late.
    pub(super) fn two_leaders(&mut self, dice: &mut Dice) {
        self.setup.operators = 2;
        self.setup.servers = 3;
        self.setup.stubborn_ms = 12_000;
        self.setup.rebuild_after_ms = 8_000;
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 30 * SECOND), 60_000, (6, 1));
        self.fault(1, Fault::SlowApi { extra_us: dice.within(100_000, 900_000), ms: 4_000 });
        for n in 1..6 {
            self.fault(n * 400_000, Fault::LoseLease);
        }
        let servers = vec![dice.index(3)];
        self.fault(BEGIN, Fault::StopServers { servers, power: false, down_ms: dice.within(13_000, 20_000) });
        self.fault(BEGIN + dice.within(7, 10) * SECOND, Fault::LoseLease);
        let slow = Fault::SlowApi { extra_us: dice.within(100_000, 900_000), ms: 6_000 };
        self.fault(BEGIN + dice.within(10_000, 11_500) * 1_000, slow);
    }

    /// R13: one member restarts while a planned change waits in vain for the other.
    pub(super) fn given_up(&mut self, dice: &mut Dice) {
        self.setup.multi_session = true;
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, BEGIN + 28 * SECOND), 60_000, (6, 1));
        for n in 0..4 {
            let at_us = BEGIN + n * 7 * SECOND;
            let restarts = dice.index(2);
            let (from, to) = (vec![Host::Operator(0)], vec![Host::Server(1 - restarts)]);
            let cut = Fault::Cut { from, to, both: true, ms: dice.within(1_300, 2_900) };
            let down_ms = dice.within(1, 60);
            let stop = Fault::StopServers { servers: vec![restarts], power: dice.chance(1, 2), down_ms };
            let moment = Moment::Leader(LeaderStep::Intended);
            self.fault(at_us, timed(moment, dice.within(0, 2_000), both(cut, stop)));
            let attach = Action::Attach { client: 1, clean: true };
            self.act(at_us + 1_000, if n % 2 == 0 { attach } else { Action::Detach { client: 1 } });
        }
        self.setup.heal_at_us = BEGIN + 30 * SECOND;
    }

    /// §2.5: an owner sleeps with requests that it has not sent, is replaced, and wakes up.
    pub(super) fn sleeper(&mut self, dice: &mut Dice) {
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 30_000, (6, 2));
        for n in 0..2 {
            let at_us = BEGIN + n * 14 * SECOND;
            let (old, new) = (n as usize % 2, 1 - n as usize % 2);
            self.fault(at_us, Fault::Freeze { host: Host::Driver(old), ms: dice.within(2_000, 8_000) });
            for n in 0..8 {
                let ask = Ask::Write(dice.below(4) * self.setup.blocks / 4, 1);
                self.act(at_us + 1_000 + n * 500, Action::Ask { client: old, ask });
            }
            self.act(at_us + 100_000, Action::Attach { client: new, clean: false });
            self.asks(dice, new, (at_us + SECOND, at_us + 12 * SECOND), 30_000, (5, 1));
        }
        self.setup.heal_at_us = BEGIN + 28 * SECOND;
    }

    /// H1, R7: connections break again and again at a member with a slow disk, and what is restarted overlaps.
    pub(super) fn broken_often(&mut self, dice: &mut Dice) {
        self.setup.flaky = dice.within(20, 60);
        self.attach(SECOND, 0);
        for n in 0..5 {
            let at_us = BEGIN + n * 4 * SECOND;
            let server = dice.index(2);
            let slow = Fault::SlowDisk { server, extra_us: dice.within(10_000, 120_000), ms: 1_500 };
            self.fault(at_us, slow);
            self.asks(dice, 0, (at_us, at_us + SECOND), 3_000, (5, 1));
            self.asks(dice, 0, (at_us + SECOND, at_us + 3 * SECOND), 40_000, (0, 0));
        }
    }

    /// M6: all connections break at once, again and again, with writes of few blocks on their way that come late.
    pub(super) fn broken_together(&mut self, dice: &mut Dice) {
        self.setup.jitter_us = 60_000;
        self.setup.network_us = 1_500;
        self.attach(SECOND, 0);
        for n in 0..20 {
            let at_us = BEGIN + n * SECOND;
            let (block, other) = (dice.below(4), dice.below(4));
            for k in 0..240 {
                let block = if k % 4 == 3 { other } else { block };
                self.act(at_us + k * 2_500, Action::Ask { client: 0, ask: Ask::Write(block, 1) });
            }
            for k in 0..3 {
                self.fault(at_us + k * 180_000 + dice.within(5_000, 100_000), Fault::Break { pick: 0 });
            }
        }
        self.setup.heal_at_us = BEGIN + 22 * SECOND;
    }

    /// R6: the object is as it was just before a commit, and all leaders are gone: the number in the lease is as high as any
    /// that servers have heard, and only what they store says that there was more.
    pub(super) fn restored_unnoticed(&mut self, dice: &mut Dice) {
        self.setup.operators = 2;
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, BEGIN + 24 * SECOND), 40_000, (6, 2));
        for n in 0..3 {
            let at_us = BEGIN + n * 8 * SECOND;
            let later_us = dice.within(0, 60_000);
            let back_ms = later_us / 1_000 + dice.within(15, 250);
            let restore = Fault::RestoreApi { back_ms, versions: true };
            let mut kill = |operator| Fault::KillOperator { operator, down_ms: dice.within(20, 300) };
            let gone = both(kill(0), both(kill(1), Fault::LoseLease));
            self.fault(at_us, timed(Moment::Leader(LeaderStep::Committed), later_us, both(restore, gone)));
            let (servers, down_ms) = (vec![dice.index(2)], dice.within(1_500, 3_000));
            self.fault(at_us + 1, Fault::StopServers { servers, power: false, down_ms });
        }
    }
}
