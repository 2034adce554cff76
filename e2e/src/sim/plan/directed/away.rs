//! Directed plans about a member that is away for a while: what it misses then, how it is found out when it comes back,
//! and what becomes of writes that got to one member only. Server 0 has the first copy, as in [`super::copies`].

use super::copies::PAGE_BLOCKS;
use super::{BEGIN, SECOND, Scene, timed};
use crate::sim::dice::Dice;
use crate::sim::event::Host;
use crate::sim::plan::{Action, Ask, Fault, Moment};
use lamina_protocol::management::Step as LeaderStep;

impl Scene {
    fn ask(&mut self, at_us: u64, ask: Ask) {
        self.act(at_us, Action::Ask { client: 0, ask });
    }

    /// H3b: a write gets to server 0 alone, nobody is left to restart it, and the other member is out of the map before the
    /// session is, so that the settle is soon over.
    pub(super) fn pending_and_away(&mut self, dice: &mut Dice) {
        self.pages(4);
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 4 * SECOND), 30_000, (6, 2));
        for n in 0..2 {
            let at_us = BEGIN + n * 14 * SECOND;
            self.one_copy_written(dice, at_us);
            let down_ms = dice.within(7_000, 8_500);
            self.fault(at_us + 41_000, Fault::StopServers { servers: vec![1], power: dice.chance(1, 2), down_ms });
        }
        self.setup.heal_at_us = BEGIN + 28 * SECOND;
    }

    /// §5.9: pages that were the same on both are written for the first time just when a member returns, and the fence of
    /// its source is late.
    pub(super) fn listed_while_written(&mut self, dice: &mut Dice) {
        self.pages(64);
        self.setup.network_us = 300;
        self.attach(SECOND, 0);
        for n in 0..3 {
            let at_us = BEGIN + n * 9 * SECOND;
            let down_ms = dice.within(3_700, 4_400);
            self.fault(at_us, Fault::StopServers { servers: vec![1], power: false, down_ms });
            let (from, to) = (vec![Host::Operator(0)], vec![Host::Server(0)]);
            let cut = Fault::Cut { from, to, both: false, ms: dice.within(200, 600) };
            let intended = Moment::Leader(LeaderStep::Intended);
            self.fault(at_us + 3_500_000, timed(intended, dice.within(300, 1_500), cut));
            let mut ask_at = at_us + 3_600_000;
            while ask_at < at_us + 7 * SECOND {
                let block = dice.below(self.setup.blocks);
                self.ask(ask_at, Ask::Write(block, 1));
                ask_at += dice.within(1, 120_000);
            }
        }
        self.setup.heal_at_us = BEGIN + 28 * SECOND;
    }

    /// H8: a member is filled while another one is away that missed writes, then the source of that fill is lost.
    pub(super) fn two_away(&mut self, dice: &mut Dice) {
        self.copies(3);
        self.pages(6);
        self.attach(SECOND, 0);
        self.asks_over_all(dice, (2 * SECOND, 4 * SECOND), 20_000, (8, 1));
        for n in 0..2 {
            let at_us = BEGIN + n * 14 * SECOND;
            let stop = |server, down_ms| Fault::StopServers { servers: vec![server], power: true, down_ms };
            self.fault(at_us, stop(1, dice.within(9_000, 10_000)));
            self.asks_over_all(dice, (at_us + 3_500_000, at_us + 4 * SECOND), 20_000, (8, 2));
            self.fault(at_us + 5 * SECOND, stop(2, dice.within(20, 200)));
            self.fault(at_us + 5 * SECOND, timed(Moment::Filled, dice.within(0, SECOND), stop(0, 4_000)));
        }
        self.setup.heal_at_us = BEGIN + 28 * SECOND;
    }

    /// §5.9: a member that returns is marked, and the change is given up, for a third one does not answer; writes follow,
    /// then the next change.
    pub(super) fn listed_and_given_up(&mut self, dice: &mut Dice) {
        self.copies(3);
        self.pages(48);
        self.attach(SECOND, 0);
        for n in 0..3 {
            let at_us = BEGIN + n * 9 * SECOND;
            let down_ms = dice.within(3_700, 4_400);
            self.fault(at_us, Fault::StopServers { servers: vec![1], power: false, down_ms });
            let (from, to) = (vec![Host::Operator(0)], vec![Host::Server(2)]);
            let cut = Fault::Cut { from, to, both: true, ms: dice.within(1_100, 2_300) };
            self.fault(at_us + 3_500_000, timed(Moment::Leader(LeaderStep::Intended), 0, cut));
            let mut ask_at = at_us + 3_600_000;
            while ask_at < at_us + 8 * SECOND {
                let block = dice.below(self.setup.blocks);
                self.ask(ask_at, Ask::Write(block, 1));
                ask_at += dice.within(1, 160_000);
            }
        }
        self.setup.heal_at_us = BEGIN + 28 * SECOND;
    }

    /// R9: whole pages are discarded while a member is away that has them.
    pub(super) fn discarded_while_away(&mut self, dice: &mut Dice) {
        self.pages(6);
        self.attach(SECOND, 0);
        for n in 0..3 {
            let at_us = BEGIN + n * 9 * SECOND;
            for page in 0..6 {
                self.ask(at_us - 3 * SECOND + page * 20_000, Ask::Write(page * PAGE_BLOCKS, PAGE_BLOCKS));
            }
            self.ask(at_us - 2 * SECOND, Ask::Flush);
            let down_ms = dice.within(4_500, 5_500);
            self.fault(at_us, Fault::StopServers { servers: vec![1], power: dice.chance(1, 2), down_ms });
            for _ in 0..2 {
                let (page, pages) = (dice.below(5), dice.within(1, 2));
                let ask_at = at_us + 3_500_000 + dice.within(0, 300_000);
                self.ask(ask_at, Ask::Discard(page * PAGE_BLOCKS, pages * PAGE_BLOCKS));
            }
            self.ask(at_us + 3_900_000, Ask::Flush);
            self.asks_over_all(dice, (at_us + 4 * SECOND, at_us + 6 * SECOND), 200_000, (0, 0));
        }
        self.setup.heal_at_us = BEGIN + 28 * SECOND;
    }

    /// R8: a write of several pages that the credit pays for gets to server 0 alone; what is asked before it is sent again
    /// takes the room that is left.
    pub(super) fn paid_and_lost(&mut self, dice: &mut Dice) {
        self.pages(24);
        self.setup.capacity_bytes = 20 * u64::from(super::super::make::PAGE_BYTES);
        self.attach(SECOND, 0);
        // Every answer brings some credit.
        for n in 0..dice.within(4, 6) {
            self.ask(3 * SECOND + n * 50_000, Ask::Flush);
        }
        // What is kept in reserve, and what the new handle is promised, has room for no more.
        let pages = 3;
        // Longer than a server takes to see that the connection is gone.
        let (from, to) = (vec![Host::Driver(0)], vec![Host::Server(1)]);
        self.fault(BEGIN, Fault::Cut { from, to, both: true, ms: dice.within(2_100, 2_600) });
        self.ask(BEGIN + 1_000, Ask::Write(0, pages * PAGE_BLOCKS));
        self.fault(BEGIN + 30_000, Fault::Break { pick: 0 });
        for page in pages..24 {
            let block = page * PAGE_BLOCKS + dice.below(PAGE_BLOCKS);
            self.ask(BEGIN + 300_000 + page * 2_000, Ask::Write(block, 1));
        }
        for n in 0..30 {
            self.ask(BEGIN + 3 * SECOND + n * 300_000, Ask::Read(dice.below(pages * PAGE_BLOCKS), 1));
        }
        self.setup.heal_at_us = BEGIN + 14 * SECOND;
    }
}
