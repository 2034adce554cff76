//! Directed plans: chains of trouble that a rule of PROTOCOL.md was made for and that random trouble hardly ever forms
//! (§9). Each leaves to chance when exactly its parts come, so that the neighbourhood is searched too.

use super::{Action, Ask, Fault, Moment, Setup, Step};
use crate::sim::dice::Dice;
use crate::sim::event::Host;
use lamina_protocol::management::Step as LeaderStep;

mod away;
mod copies;
pub(super) mod crash_points;
mod leaders;
pub(super) mod people;
pub(super) mod starts;

const SECOND: u64 = 1_000_000;
/// When the trouble begins: the volume is made, attached and written by then.
const BEGIN: u64 = 6 * SECOND;

/// One chain of trouble.
type Chain = fn(&mut Scene, &mut Dice);

/// All of them, each once, then again those that find their fault less often. They take turns, so that any few hundred
/// seeds play each a like number of times.
const CHAINS: [Chain; 61] = [
    Scene::late_word,
    Scene::listed_while_written,
    Scene::lease_outlived,
    Scene::undone,
    Scene::half_settled,
    Scene::late_commands,
    Scene::paid_and_lost,
    Scene::pending_and_away,
    |scene, dice| scene.crash_after(dice, Moment::Filled),
    Scene::given_back,
    Scene::restored_unnoticed,
    Scene::read_given_back,
    Scene::shared_loss,
    Scene::discarded_while_away,
    Scene::listed_and_given_up,
    Scene::handled,
    Scene::written_while_settled,
    Scene::two_leaders,
    Scene::written_while_filled,
    Scene::lease,
    Scene::given_up,
    Scene::two_away,
    Scene::filled_with_pending,
    Scene::two_successors,
    Scene::flushed_past,
    Scene::half_written,
    |scene, dice| scene.crash_after(dice, Moment::SettleOver),
    Scene::late_commit,
    Scene::settled_and_away,
    Scene::late_page,
    Scene::successors,
    Scene::sleeper,
    Scene::broken_often,
    Scene::broken_together,
    Scene::adopted,
    Scene::full,
    Scene::rotten,
    Scene::late_word,
    Scene::undone,
    Scene::half_settled,
    Scene::late_commands,
    Scene::given_back,
    Scene::late_word,
    Scene::handled,
    Scene::two_leaders,
    Scene::written_while_filled,
    Scene::lease,
    Scene::given_up,
    Scene::filled_with_pending,
    Scene::two_successors,
    Scene::late_word,
    Scene::undone,
    Scene::listed_while_written,
    Scene::paid_and_lost,
    Scene::listed_and_given_up,
    Scene::broken_together,
    Scene::written_while_settled,
    Scene::lease_outlived,
    Scene::read_given_back,
    Scene::shared_loss,
    Scene::half_settled,
];

/// A cluster and what is done with it, in any order: the chain whose turn it is.
pub(super) fn plan(turn: u64, dice: &mut Dice) -> (Setup, Vec<Step>) {
    let mut scene = Scene { setup: setup(dice), steps: Vec::new() };
    CHAINS[(turn % CHAINS.len() as u64) as usize](&mut scene, dice);
    (scene.setup, scene.steps)
}

/// Two copies on two servers, and nothing else goes wrong.
fn setup(dice: &mut Dice) -> Setup {
    let groups = [1, 1, 2][dice.index(3)];
    Setup {
        servers: 2,
        disks: 1,
        clients: 2,
        operators: 1,
        copies: 2,
        groups,
        blocks: u64::from(groups) * 32,
        most_blocks: u64::from(groups) * 32,
        page_bytes: super::make::PAGE_BYTES,
        capacity_bytes: 64 << 20,
        multi_session: false,
        rebuild_after_ms: 600_000,
        network_us: [80, 300][dice.index(2)],
        jitter_us: 500,
        drift_ppm: if dice.chance(1, 3) { 45_000 } else { 0 },
        stubborn_ms: 0,
        kept_bytes: 16 << 20,
        flaky: 0,
        force_after_ms: 0,
        heal_at_us: 32 * SECOND,
    }
}

/// Trouble so long after a moment, when that comes next.
fn timed(moment: Moment, later_us: u64, fault: Fault) -> Fault {
    Fault::When { moment, times: 1, later_us, fault: Box::new(fault) }
}

fn both(one: Fault, other: Fault) -> Fault {
    Fault::Both { one: Box::new(one), other: Box::new(other) }
}

struct Scene {
    setup: Setup,
    steps: Vec<Step>,
}

impl Scene {
    fn act(&mut self, at_us: u64, action: Action) {
        self.steps.push(Step { at_us, action });
    }

    fn fault(&mut self, at_us: u64, fault: Fault) {
        self.act(at_us, Action::Fault(fault));
    }

    fn attach(&mut self, at_us: u64, client: usize) {
        self.act(at_us, Action::Attach { client, clean: true });
    }

    /// Every `pace` microseconds or so: of 10 asks so many are writes and so many are flushes, the others reads.
    fn asks(&mut self, dice: &mut Dice, client: usize, (from, to): (u64, u64), pace: u64, mix: (u64, u64)) {
        let (hot, stripe) = (4, self.setup.blocks / u64::from(self.setup.groups) / 2);
        let mut at_us = from;
        while at_us < to {
            let block = dice.below(hot) * stripe % self.setup.blocks;
            let count = dice.within(1, 2);
            let ask = match dice.below(10) {
                n if n < mix.0 => Ask::Write(block, count),
                n if n < mix.0 + mix.1 => Ask::Flush,
                _ => Ask::Read(block, count),
            };
            self.act(at_us, Action::Ask { client, ask });
            at_us += 1 + dice.below(2 * pace);
        }
    }

    /// R5 and M7: a member is cut off from all but client 0, and when it is about to be left out, so is client 0.
    /// Client 1, there already or new, writes; client 0 reads.
    fn lease(&mut self, dice: &mut Dice) {
        self.setup.multi_session = true;
        let apart = dice.index(2);
        let (member, other) = (Host::Server(apart), Host::Server(1 - apart));
        let rest = vec![other, Host::Operator(0), Host::Api, Host::Driver(1)];
        self.attach(SECOND, 0);
        let joins = if dice.chance(1, 3) { 2 * SECOND } else { BEGIN + dice.within(SECOND, 5 * SECOND) };
        self.attach(joins, 1);
        self.fault(BEGIN, Fault::Cut { from: vec![member], to: rest.clone(), both: true, ms: 24_000 });
        let step = [LeaderStep::Fenced, LeaderStep::FirstPromise, LeaderStep::Committed][dice.index(3)];
        let cut = Fault::Cut { from: vec![Host::Driver(0)], to: rest, both: true, ms: 16_000 };
        let when = Fault::When { moment: Moment::Leader(step), times: 1, later_us: 0, fault: Box::new(cut) };
        self.fault(BEGIN + dice.within(0, 2 * SECOND), when);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 50_000, (5, 1));
        self.asks(dice, 0, (5 * SECOND, 25 * SECOND), 25_000, (0, 0));
        self.asks(dice, 1, (BEGIN + 2 * SECOND, 25 * SECOND), 25_000, (8, 1));
    }

    /// R5: client 0 is left with the member that is left out, which it reads as long as its lease lasts; client 1 writes as
    /// soon as it may.
    fn lease_outlived(&mut self, dice: &mut Dice) {
        (self.setup.multi_session, self.setup.groups, self.setup.blocks) = (true, 1, 32);
        let rest = vec![Host::Server(1), Host::Operator(0), Host::Api, Host::Driver(1)];
        self.attach(SECOND, 0);
        let early = dice.chance(1, 3);
        self.attach(if early { 2 * SECOND } else { BEGIN + dice.within(2_500_000, 4 * SECOND) }, 1);
        self.asks(dice, 0, (2 * SECOND, 4 * SECOND), 50_000, (6, 1));
        self.fault(BEGIN, Fault::Cut { from: vec![Host::Server(0)], to: rest.clone(), both: true, ms: 24_000 });
        let cut = Fault::Cut { from: vec![Host::Driver(0)], to: rest, both: true, ms: 16_000 };
        self.fault(BEGIN + dice.within(2_200_000, 3_200_000), cut);
        self.asks(dice, 0, (4 * SECOND, BEGIN + 14 * SECOND), 10_000, (0, 0));
        self.asks(dice, 1, (BEGIN + 3 * SECOND, BEGIN + 14 * SECOND), 10_000, (9, 0));
    }

    /// M7: a reply of the member that stays is on its way for longer than the operator waits for the lease.
    fn late_word(&mut self, dice: &mut Dice) {
        self.setup.multi_session = true;
        let apart = usize::from(dice.chance(1, 8));
        let (member, other) = (Host::Server(apart), Host::Server(1 - apart));
        let deaf = vec![Host::Operator(0), Host::Api, Host::Driver(1)];
        self.attach(SECOND, 0);
        self.attach(if dice.chance(1, 2) { 2 * SECOND } else { BEGIN + 3 * SECOND }, 1);
        self.asks(dice, 0, (2 * SECOND, 3 * SECOND), 50_000, (5, 1));
        let mut to = deaf.clone();
        to.push(other);
        self.fault(BEGIN, Fault::Cut { from: vec![member], to, both: true, ms: 24_000 });
        self.fault(BEGIN, Fault::Cut { from: vec![Host::Driver(0)], to: deaf, both: true, ms: 20_000 });
        let from = BEGIN + dice.within(1_500_000, 2_100_000);
        let ms = (BEGIN + dice.within(9_000_000, 9_900_000) - from) / 1_000;
        self.fault(from, Fault::Cut { from: vec![other], to: vec![Host::Driver(0)], both: false, ms });
        self.asks(dice, 0, (from + 1_000, from + 100_000), 50_000, (0, 0));
        self.asks(dice, 1, (BEGIN + 3 * SECOND, BEGIN + 20 * SECOND), 20_000, (9, 0));
        self.asks(dice, 0, (from + ms * 1_000 - 900_000, from + ms * 1_000 + SECOND), 50_000, (0, 0));
    }

    /// §3.3: commands of a leader come late, when another one has done changes of its own.
    fn late_commands(&mut self, dice: &mut Dice) {
        self.setup.operators = 2;
        self.setup.stubborn_ms = 12_000;
        let servers = vec![Host::Server(0), Host::Server(1)];
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 25 * SECOND), 20_000, (6, 1));
        let one = dice.index(2);
        for n in 0..3 {
            let at_us = BEGIN + n * 7 * SECOND;
            let leader = Host::Operator(dice.index(2));
            let ms = dice.within(1_500, 5_000);
            let cut = Fault::Cut { from: vec![leader], to: servers.clone(), both: false, ms };
            let step = [LeaderStep::Intended, LeaderStep::FirstPromise, LeaderStep::Committed, LeaderStep::Committed];
            let moment = Moment::Leader(step[dice.index(4)]);
            let fault = Box::new(Fault::Both { one: Box::new(cut), other: Box::new(Fault::LoseLease) });
            self.fault(at_us, Fault::When { moment, times: 1, later_us: 0, fault });
            let stop = |server, down_ms| Fault::StopServers { servers: vec![server], power: false, down_ms };
            self.fault(at_us + 1_000, stop(one, dice.within(100, 600)));
            self.fault(at_us + dice.within(SECOND, 3 * SECOND), stop(1 - one, dice.within(100, 600)));
        }
    }

    /// H18: a leader stalls when it has put a replacement; another one withdraws that, and cannot go on at once.
    fn late_commit(&mut self, dice: &mut Dice) {
        self.setup.operators = 2;
        self.setup.servers = 3;
        self.setup.stubborn_ms = 12_000;
        self.setup.rebuild_after_ms = 8_000;
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 30 * SECOND), 40_000, (6, 1));
        let away = dice.index(3);
        let down_ms = dice.within(12_500, 14_500);
        self.fault(BEGIN, Fault::StopServers { servers: vec![away], power: false, down_ms });
        let leader = dice.index(2);
        let steps = [LeaderStep::Intended, LeaderStep::CopiesPut, LeaderStep::CopiesPut, LeaderStep::FirstPromise];
        let moment = Moment::Leader(steps[dice.index(4)]);
        let timed = |later_us, fault| timed(moment, later_us, fault);
        let armed = BEGIN + dice.within(5 * SECOND, 8 * SECOND);
        let freeze = Fault::Freeze { host: Host::Operator(leader), ms: dice.within(800, 5_000) };
        self.fault(armed, timed(dice.within(0, 2_000), freeze));
        self.fault(armed, timed(1, Fault::LoseLease));
        let deaf = Host::Server((away + 1 + dice.index(2)) % 3);
        let ms = dice.within(1_000, 5_000);
        let cut = Fault::Cut { from: vec![Host::Operator(1 - leader)], to: vec![deaf], both: false, ms };
        self.fault(armed, timed(dice.within(0, 900_000), cut));
    }

    /// H20: successors that each find but one of the members.
    fn two_successors(&mut self, dice: &mut Dice) {
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 25 * SECOND), 8_000, (6, 1));
        for n in 0..4 {
            let mut at_us = BEGIN + n * 4 * SECOND;
            for server in [0, 1] {
                let ms = dice.within(150, 1_500);
                let (from, to) = (vec![Host::Driver(0)], vec![Host::Server((server + dice.index(2)) % 2)]);
                self.fault(at_us, Fault::Cut { from, to, both: true, ms });
                self.fault(at_us + dice.within(1, 20_000), Fault::TakeOver { client: 0 });
                at_us += ms * 1_000 + dice.within(0, 200_000);
            }
        }
    }

    /// H11b, H11c, R1: all lose power just when a fill or a settle has become part of a map.
    fn crash_after(&mut self, dice: &mut Dice, moment: Moment) {
        let all = vec![0, 1];
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 10_000, (7, 1));
        self.asks(dice, 0, (5 * SECOND, 25 * SECOND), 100_000, (2, 0));
        for n in 0..3 {
            let at_us = BEGIN + n * 7 * SECOND;
            let servers = if moment == Moment::Filled { vec![dice.index(2)] } else { all.clone() };
            if moment == Moment::SettleOver && dice.chance(1, 2) {
                self.asks(dice, 0, (at_us - 20_000, at_us), 1_000, (10, 0));
                self.fault(at_us, Fault::PowerOffClient { client: 0, down_ms: 500 });
            } else {
                self.fault(at_us, Fault::StopServers { servers, power: true, down_ms: dice.within(100, 900) });
            }
            let after = if dice.chance(1, 3) { vec![dice.index(2)] } else { all.clone() };
            let stop = Fault::StopServers { servers: after, power: true, down_ms: dice.within(100, 900) };
            let later_us = [0, dice.within(0, 3_000), dice.within(0, 60_000)][dice.index(3)];
            self.fault(at_us - 1, Fault::When { moment, times: 1, later_us, fault: Box::new(stop) });
        }
    }

    /// §4.5: a read is asked before a write of the same block, which gets to one member only, and is asked again; then
    /// that write is undone, for nobody is left to do it again.
    fn undone(&mut self, dice: &mut Dice) {
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 5 * SECOND), 20_000, (6, 2));
        for n in 0..4 {
            let at_us = BEGIN + n * 6 * SECOND;
            let apart = dice.index(2);
            let (from, to) = (vec![Host::Driver(0)], vec![Host::Server(apart)]);
            let again = dice.chance(1, 2);
            let cut_ms = if again { dice.within(30, 400) } else { dice.within(1_000, 3_000) };
            self.fault(at_us, Fault::Cut { from, to, both: true, ms: cut_ms });
            self.asks(dice, 0, (at_us - 3_000, at_us + 15_000), 700, (4, 0));
            let slow = Fault::SlowDisk { server: apart, extra_us: dice.within(20_000, 200_000), ms: 2_500 };
            self.fault(at_us, slow);
            let off = Fault::PowerOffClient { client: 0, down_ms: dice.within(1, 300) };
            let stop = Fault::StopServers { servers: vec![1 - apart], power: true, down_ms: dice.within(100, 900) };
            let end = if again || dice.chance(1, 2) {
                Fault::Both { one: Box::new(off), other: Box::new(stop) }
            } else {
                off
            };
            if again {
                self.fault(at_us + 20_000, Fault::KillDriver { client: 0, down_ms: cut_ms + dice.within(1, 50) });
                let later_us = [dice.within(500, 8_000), dice.within(500, 80_000)][dice.index(2)];
                let moment = Moment::TookOver;
                self.fault(at_us, Fault::When { moment, times: 1, later_us, fault: Box::new(end) });
            } else {
                self.fault(at_us + 18_000, Fault::Break { pick: 0 });
                self.fault(at_us + dice.within(60_000, 900_000), end);
            }
            self.asks(dice, 0, (at_us + 3 * SECOND, at_us + 5 * SECOND), 50_000, (0, 0));
        }
    }

    /// §4.5: successors with many overlapping requests given back, and members that are not equally fast.
    fn successors(&mut self, dice: &mut Dice) {
        self.setup.jitter_us = 60_000;
        self.attach(SECOND, 0);
        self.asks(dice, 0, (2 * SECOND, 14 * SECOND), 3_000, (5, 0));
        let slow = Fault::SlowDisk { server: dice.index(2), extra_us: dice.within(1_000, 100_000), ms: 20_000 };
        self.fault(BEGIN - 3 * SECOND, slow);
        for n in 0..20 {
            let at_us = BEGIN - 3 * SECOND + n * 500_000 + dice.within(0, 400_000);
            self.fault(at_us, Fault::KillDriver { client: 0, down_ms: dice.within(1, 60) });
        }
    }
}
