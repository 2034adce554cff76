//! Directed plans about copies: settles, fills and losses that are interrupted where a rule of §5 says what must be
//! durable by then. Copies lie on the servers in their order: server 0 has the first one, which is read, is the source
//! of fills, and is authoritative.

use super::{BEGIN, SECOND, Scene, both, timed};
use crate::sim::dice::Dice;
use crate::sim::event::Host;
use crate::sim::plan::{Action, Ask, Fault, Moment};

pub(super) const PAGE_BLOCKS: u64 = super::super::make::PAGE_BYTES as u64 / 4096;

impl Scene {
    /// So many pages in one group, so that many are clean while few are written.
    pub(super) fn pages(&mut self, pages: u64) {
        self.setup.groups = 1;
        self.setup.blocks = pages * PAGE_BLOCKS;
    }

    pub(super) fn copies(&mut self, copies: u8) {
        (self.setup.copies, self.setup.servers) = (copies, usize::from(copies));
        self.setup.groups = 1;
        self.setup.blocks = 2 * PAGE_BLOCKS;
    }

    /// Like `asks` of client 0, over the whole volume and a page and a half at most.
    pub(super) fn asks_over_all(&mut self, dice: &mut Dice, (from, to): (u64, u64), pace: u64, mix: (u64, u64)) {
        let mut at_us = from;
        while at_us < to {
            let block = dice.below(self.setup.blocks);
            let most = if dice.chance(1, 6) { PAGE_BLOCKS * 3 / 2 } else { 2 };
            let count = dice.within(1, most).min(self.setup.blocks - block);
            let ask = match dice.below(10) {
                n if n < mix.0 => Ask::Write(block, count),
                n if n < mix.0 + mix.1 => Ask::Flush,
                _ => Ask::Read(block, count),
            };
            self.act(at_us, Action::Ask { client: 0, ask });
            at_us += 1 + dice.below(2 * pace);
        }
    }

    /// Writes get to server 0 alone; then the client is gone.
    pub(super) fn one_copy_written(&mut self, dice: &mut Dice, at_us: u64) {
        let to = (1..self.setup.servers).map(Host::Server).collect();
        self.fault(at_us, Fault::Cut { from: vec![Host::Driver(0)], to, both: true, ms: 6_000 });
        self.asks(dice, 0, (at_us + 1_000, at_us + 30_000), 2_000, (9, 0));
        self.fault(at_us + 40_000, Fault::PowerOffClient { client: 0, down_ms: dice.within(100, 500) });
    }

    /// R1, M8, M1, H12: a settle that only one of two members has done when the authoritative copy is lost, or that has
    /// not begun then.
    pub(super) fn half_settled(&mut self, dice: &mut Dice) {
        self.copies(3);
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 30_000, (6, 2));
        for n in 0..3 {
            let at_us = BEGIN + n * 12 * SECOND;
            self.one_copy_written(dice, at_us);
            if dice.chance(3, 4) {
                let (from, to) = (vec![Host::Server(0)], vec![Host::Server(1 + dice.index(2))]);
                self.fault(at_us, Fault::Cut { from, to, both: true, ms: dice.within(2_000, 8_000) });
            }
            if dice.chance(3, 4) {
                let stop = Fault::StopServers { servers: vec![0], power: dice.chance(1, 2), down_ms: 800 };
                let (moment, most_us) = [(Moment::PageServed, 12_000), (Moment::SettleBegan, 1_000)][dice.index(2)];
                self.fault(at_us, timed(moment, dice.within(0, most_us), stop));
            }
            self.asks(dice, 0, (at_us + 8 * SECOND, at_us + 11 * SECOND), 50_000, (5, 1));
        }
        self.setup.heal_at_us = BEGIN + 36 * SECOND;
    }

    /// R1, M3, H11b: what a settle brought, or was made from, when all lose power as soon as it is over.
    pub(super) fn half_written(&mut self, dice: &mut Dice) {
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 30_000, (6, 2));
        for n in 0..4 {
            let at_us = BEGIN + n * 8 * SECOND;
            self.one_copy_written(dice, at_us);
            if n % 2 == 1 {
                let stop = Fault::StopServers { servers: vec![0, 1], power: true, down_ms: dice.within(100, 900) };
                let later_us = [dice.within(0, 3_000), dice.within(0, 60_000)][dice.index(2)];
                self.fault(at_us, timed(Moment::SettleOver, later_us, stop));
            }
        }
        self.setup.heal_at_us = BEGIN + 32 * SECOND;
    }

    /// H9: a member is filled from the only one that has a write, and that one and the client are lost.
    pub(super) fn filled_with_pending(&mut self, dice: &mut Dice) {
        self.copies(3);
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 30_000, (6, 2));
        for n in 0..2 {
            let at_us = BEGIN + n * 16 * SECOND;
            let to = vec![Host::Server(1), Host::Server(2)];
            self.fault(at_us, Fault::Cut { from: vec![Host::Driver(0)], to, both: true, ms: 10_000 });
            self.asks(dice, 0, (at_us + 1_000, at_us + 15_000), 1_000, (9, 0));
            let again = Fault::StopServers { servers: vec![2], power: dice.chance(1, 2), down_ms: 50 };
            self.fault(at_us + 20_000, again);
            let off = Fault::PowerOffClient { client: 0, down_ms: 500 };
            let stop = Fault::StopServers { servers: vec![0], power: true, down_ms: dice.within(500, 6_000) };
            self.fault(at_us, timed(Moment::Filled, dice.within(0, 20_000), both(off, stop)));
        }
        self.setup.heal_at_us = BEGIN + 32 * SECOND;
    }

    /// M4: a member that took part in a settle is left out, misses writes, and comes back without a restart.
    pub(super) fn settled_and_away(&mut self, dice: &mut Dice) {
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 30_000, (6, 2));
        self.one_copy_written(dice, BEGIN);
        let rest = vec![Host::Server(0), Host::Operator(0), Host::Api, Host::Driver(0), Host::Driver(1)];
        let (from, at_us) = (vec![Host::Server(1)], BEGIN + 7 * SECOND);
        self.fault(at_us, Fault::Cut { from, to: rest, both: true, ms: dice.within(5_000, 12_000) });
        self.asks(dice, 0, (at_us, at_us + 20 * SECOND), 40_000, (6, 1));
        self.setup.heal_at_us = BEGIN + 30 * SECOND;
    }

    /// H5, R2: all lose power while a driver lives that keeps what was not flushed; and again, with the driver, as soon as
    /// that is called handled and something was read.
    pub(super) fn handled(&mut self, dice: &mut Dice) {
        self.pages(4);
        self.attach(SECOND, 0);
        for n in 0..2 {
            let at_us = BEGIN + n * 15 * SECOND;
            self.asks_over_all(dice, (at_us - 400_000, at_us), 8_000, (10, 0));
            let stop = |down_ms| Fault::StopServers { servers: vec![0, 1], power: true, down_ms };
            self.fault(at_us, stop(dice.within(100, 600)));
            self.fault(at_us, Fault::SlowDisk { server: 0, extra_us: 60_000, ms: 14_000 });
            if dice.chance(7, 8) {
                let off = Fault::PowerOffClient { client: 0, down_ms: dice.within(100, 500) };
                let fault = both(off, stop(dice.within(100, 600)));
                self.fault(at_us, timed(Moment::Handled, dice.within(20_000, 200_000), fault));
            }
            // Some are asked when the loss is known and not handled yet.
            self.asks_over_all(dice, (at_us + 100_000, at_us + 14 * SECOND), 120_000, (0, 0));
        }
        self.setup.heal_at_us = BEGIN + 30 * SECOND;
    }

    /// M5: all lose power while a driver lives, and the settle after that takes its time; the driver has writes of those
    /// very pages.
    pub(super) fn written_while_settled(&mut self, dice: &mut Dice) {
        self.pages(20);
        self.attach(SECOND, 0);
        for n in 0..2 {
            let at_us = BEGIN + n * 15 * SECOND;
            self.asks_over_all(dice, (at_us - 400_000, at_us), 5_000, (10, 0));
            let down_ms = dice.within(100, 600);
            self.fault(at_us, Fault::StopServers { servers: vec![0, 1], power: true, down_ms });
            self.fault(at_us, Fault::SlowDisk { server: 0, extra_us: dice.within(80_000, 250_000), ms: 9_000 });
            self.asks_over_all(dice, (at_us + 100_000, at_us + 9 * SECOND), 15_000, (9, 0));
        }
        self.setup.heal_at_us = BEGIN + 30 * SECOND;
    }

    /// §5.1: all lose power as soon as a successor adopts what the process before it had acknowledged.
    pub(super) fn adopted(&mut self, dice: &mut Dice) {
        self.pages(4);
        self.attach(SECOND, 0);
        for n in 0..4 {
            let at_us = BEGIN + n * 6 * SECOND;
            self.asks_over_all(dice, (at_us - 300_000, at_us), 6_000, (10, 0));
            self.fault(at_us, Fault::KillDriver { client: 0, down_ms: dice.within(1, 50) });
            let stop = Fault::StopServers { servers: vec![0, 1], power: true, down_ms: dice.within(50, 500) };
            self.fault(at_us, timed(Moment::Adopted, dice.within(0, 3_000), stop));
            self.asks_over_all(dice, (at_us + 100_000, at_us + 5 * SECOND), 100_000, (0, 0));
        }
    }

    /// §4.5: a successor gets a read and, after it, a write of a part of what is read, which server 0 has already.
    pub(super) fn given_back(&mut self, dice: &mut Dice) {
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 30_000, (6, 2));
        for n in 0..4 {
            let at_us = BEGIN + n * 6 * SECOND;
            let block = 2 * dice.below(8);
            let mut ask = |later_us, ask| self.act(at_us + later_us, Action::Ask { client: 0, ask });
            ask(1_000, Ask::Write(block, 1));
            ask(2_000, Ask::Read(block, 2));
            ask(3_000, Ask::Write(block + 1, 1));
            ask(3 * SECOND, Ask::Read(block, 2));
            let cut_ms = dice.within(30, 100);
            let (from, to) = (vec![Host::Driver(0)], vec![Host::Server(1)]);
            self.fault(at_us, Fault::Cut { from, to, both: true, ms: cut_ms });
            self.fault(at_us, Fault::SlowDisk { server: 1, extra_us: dice.within(20_000, 100_000), ms: 2_500 });
            self.fault(at_us + 20_000, Fault::KillDriver { client: 0, down_ms: cut_ms });
            let off = Fault::PowerOffClient { client: 0, down_ms: dice.within(1, 300) };
            let stop = Fault::StopServers { servers: vec![0, 1], power: true, down_ms: dice.within(50, 500) };
            self.fault(at_us, timed(Moment::TookOver, dice.within(700, 6_000), both(off, stop)));
        }
    }

    /// §4.5: a read waits for its lease, a write of the same block is on server 0 alone; a successor is given both back, and
    /// then that write is undone, for nobody is left to do it again.
    pub(super) fn read_given_back(&mut self, dice: &mut Dice) {
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 3 * SECOND), 30_000, (6, 2));
        for n in 0..2 {
            // Later than a lease lasts.
            let at_us = BEGIN + 3 * SECOND + n * 15 * SECOND;
            let block = dice.below(16);
            let mut ask = |later_us, ask| self.act(at_us + later_us, Action::Ask { client: 0, ask });
            ask(1_000, Ask::Read(block, 1));
            ask(3_000, Ask::Write(block, 1));
            for n in 0..8 {
                ask(3 * SECOND + n * 500_000, Ask::Read(block, 1));
            }
            let cut_ms = dice.within(60, 120);
            let (from, to) = (vec![Host::Driver(0)], vec![Host::Server(1)]);
            self.fault(at_us, Fault::Cut { from, to, both: true, ms: cut_ms });
            let extra_us = dice.within(100_000, 300_000);
            self.fault(at_us, Fault::SlowDisk { server: 1, extra_us, ms: 2_500 });
            self.fault(at_us + 20_000, Fault::KillDriver { client: 0, down_ms: cut_ms });
            let off = Fault::PowerOffClient { client: 0, down_ms: dice.within(1, 300) };
            let stop = Fault::StopServers { servers: vec![0, 1], power: true, down_ms: dice.within(50, 500) };
            self.fault(at_us, timed(Moment::TookOver, dice.within(2_000, 20_000), both(off, stop)));
        }
        self.setup.heal_at_us = BEGIN + 30 * SECOND;
    }

    /// H5: all lose power while drivers of a shared volume live that have writes not flushed, and flush then.
    pub(super) fn shared_loss(&mut self, dice: &mut Dice) {
        self.pages(4);
        self.setup.multi_session = true;
        self.attach(SECOND, 0);
        if dice.chance(1, 2) {
            self.attach(SECOND, 1);
        }
        for n in 0..2 {
            let at_us = BEGIN + n * 14 * SECOND;
            self.asks_over_all(dice, (at_us - 400_000, at_us), 8_000, (10, 0));
            let stop = Fault::StopServers { servers: vec![0, 1], power: true, down_ms: dice.within(100, 600) };
            self.fault(at_us, stop);
            self.asks_over_all(dice, (at_us + 100_000, at_us + 3 * SECOND), 200_000, (0, 10));
            self.asks_over_all(dice, (at_us + 3 * SECOND, at_us + 9 * SECOND), 80_000, (0, 0));
        }
        self.setup.heal_at_us = BEGIN + 28 * SECOND;
    }

    /// R8: devices that are nearly full, connections that break, and servers that come back.
    pub(super) fn full(&mut self, dice: &mut Dice) {
        self.pages(6);
        // Room for all of it, but the last page is kept in reserve.
        self.setup.capacity_bytes = 6 * u64::from(super::super::make::PAGE_BYTES);
        self.setup.flaky = dice.within(15, 60);
        self.attach(SECOND, 0);
        for n in 0..5 {
            let at_us = BEGIN + n * 4 * SECOND;
            self.asks_over_all(dice, (at_us, at_us + SECOND), 8_000, (7, 0));
            let server = dice.index(2);
            match dice.below(3) {
                0 => self.fault(at_us, Fault::StopServers { servers: vec![server], power: false, down_ms: 100 }),
                1 => self.fault(at_us, Fault::KillDriver { client: 0, down_ms: dice.within(1, 100) }),
                _ => self.fault(at_us, Fault::SlowDisk { server, extra_us: 50_000, ms: 1_500 }),
            }
        }
    }

    /// §5.1: flushes overtake writes at a member with a slow disk; then all lose power, and nobody writes again.
    pub(super) fn flushed_past(&mut self, dice: &mut Dice) {
        self.pages(12);
        self.attach(SECOND, 0);
        for n in 0..4 {
            let at_us = BEGIN + n * 8 * SECOND;
            let ask = |ask| Action::Ask { client: 0, ask };
            self.fault(at_us, Fault::SlowDisk { server: 1, extra_us: 600_000, ms: 1_500 });
            let first = dice.below(4);
            for page in first..first + 8 {
                let block = page * PAGE_BLOCKS + dice.below(PAGE_BLOCKS);
                self.act(at_us + 1_000 + page * 200, ask(Ask::Write(block, 1)));
            }
            for n in 0..10 {
                self.act(at_us + 4_000 + n * 700, ask(Ask::Flush));
            }
            for n in 0..30 {
                self.act(at_us + 12_000 + n * 8_000, ask(Ask::Read((first + 9) % 12 * PAGE_BLOCKS, 1)));
            }
            let off = Fault::PowerOffClient { client: 0, down_ms: dice.within(100, 500) };
            let stop = Fault::StopServers { servers: vec![0, 1], power: true, down_ms: dice.within(100, 500) };
            self.fault(at_us + dice.within(100_000, 350_000), both(off, stop));
        }
        self.setup.heal_at_us = BEGIN + 32 * SECOND;
    }

    /// §4.3, H6, H11c: writes meet the fill of a member, and pages of it are late.
    pub(super) fn written_while_filled(&mut self, dice: &mut Dice) {
        self.pages(8);
        self.setup.jitter_us = 60_000;
        self.setup.multi_session = dice.chance(1, 2);
        self.attach(SECOND, 0);
        let blocks = self.setup.blocks;
        for page in 0..8 {
            let ask = Ask::Write(page * PAGE_BLOCKS, PAGE_BLOCKS);
            self.act(3 * SECOND + page * 1_000, Action::Ask { client: 0, ask });
        }
        for n in 0..4 {
            let at_us = BEGIN + n * 6 * SECOND;
            let stop = Fault::StopServers { servers: vec![1], power: dice.chance(1, 2), down_ms: dice.within(10, 200) };
            self.fault(at_us, stop);
            if dice.chance(1, 2) {
                // What its source reads for it is old when it comes.
                self.fault(at_us, Fault::SlowDisk { server: 0, extra_us: dice.within(30_000, 150_000), ms: 3_000 });
            }
            if self.setup.multi_session {
                // A change of the map comes between.
                self.fault(at_us, Fault::SlowDisk { server: 1, extra_us: dice.within(20_000, 150_000), ms: 4_000 });
                let action = [Action::Attach { client: 1, clean: true }, Action::Detach { client: 1 }];
                self.act(at_us + dice.within(800_000, 2_500_000), action[n as usize % 2].clone());
            }
            let mut ask_at = at_us;
            while ask_at < at_us + 3 * SECOND {
                let ask = if dice.chance(1, 40) { Ask::Flush } else { Ask::Write(dice.below(blocks), 1) };
                self.act(ask_at, Action::Ask { client: 0, ask });
                ask_at += dice.within(1, 12_000);
            }
            if dice.chance(1, 2) {
                let stop = Fault::StopServers { servers: vec![1], power: true, down_ms: dice.within(10, 200) };
                self.fault(at_us, timed(Moment::PageServed, dice.within(0, 8_000), stop));
            }
        }
    }

    /// H6: a page of a fill is on its way until the member was left out, missed writes, and rejoined.
    pub(super) fn late_page(&mut self, dice: &mut Dice) {
        self.pages(4);
        self.attach(SECOND, 0);
        self.asks_over_all(dice, (2 * SECOND, 4 * SECOND), 15_000, (9, 1));
        for n in 0..2 {
            let at_us = BEGIN + n * 13 * SECOND;
            let stop = Fault::StopServers { servers: vec![1], power: true, down_ms: dice.within(10, 200) };
            self.fault(at_us, stop);
            let (source, own) = (vec![Host::Server(0)], vec![Host::Server(1)]);
            let away = dice.within(3_500, 5_000);
            let page = Fault::Cut { from: source, to: own.clone(), both: false, ms: away + dice.within(800, 2_500) };
            let left_out = vec![Host::Operator(0), Host::Driver(0)];
            let cut = Fault::Cut { from: own, to: left_out, both: true, ms: away };
            self.fault(at_us, timed(Moment::PageServed, 0, both(page, cut)));
            self.asks_over_all(dice, (at_us + 2 * SECOND, at_us + 7 * SECOND), 40_000, (8, 1));
        }
    }

    /// R12: blocks rot on the copy that is read.
    pub(super) fn rotten(&mut self, dice: &mut Dice) {
        self.copies(if dice.chance(1, 2) { 3 } else { 2 });
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 20_000, (8, 2));
        self.asks(dice, 0, (5 * SECOND, 25 * SECOND), 40_000, (1, 1));
        for n in 0..8 {
            self.fault(BEGIN + n * 2 * SECOND, Fault::Rot { server: 0, disk: 0, pick: dice.next() });
        }
    }
}
