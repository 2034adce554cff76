//! From a seed to a plan.

use super::{Action, Ask, DiskFault, Fault, Moment, Plan, Setup, Step, directed};
use crate::sim::dice::Dice;
use crate::sim::event::Host;
use lamina_protocol::management::Step as LeaderStep;

pub(super) const PAGE_BYTES: u32 = 64 << 10;

impl Plan {
    /// The run of this seed: of 16 six are directed plans, four have crash points, two are of people, four random.
    pub fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed, 0);
        let directed = [0, 1, 4, 7, 8, 12];
        let (setup, mut steps) = match seed % 16 {
            2 | 6 | 10 | 14 => directed::crash_points::plan(&mut dice),
            5 | 11 => directed::people::plan(&mut dice),
            rest => match directed.iter().position(|place| *place == rest) {
                Some(place) => directed::plan(seed / 16 * directed.len() as u64 + place as u64, &mut dice),
                None => at_random(&mut dice),
            },
        };
        steps.sort_by_key(|step| step.at_us);
        Self { seed, setup, steps }
    }
}

fn at_random(dice: &mut Dice) -> (Setup, Vec<Step>) {
    let setup = setup(dice);
    let mut steps = vec![Step { at_us: 1_000_000, action: Action::Attach { client: 0, clean: true } }];
    asks(&setup, dice, &mut steps);
    faults(&setup, dice, &mut steps);
    (setup, steps)
}

fn setup(dice: &mut Dice) -> Setup {
    let copies = [1, 2, 2, 2, 2, 3, 3][dice.index(7)];
    let servers = usize::from(copies) + dice.index(2);
    let groups = [1, 1, 2, 3][dice.index(4)];
    let pages = u64::from(groups) * dice.within(1, 3);
    let roomy = !dice.chance(1, 8);
    let used = pages * u64::from(PAGE_BYTES);
    let blocks =
        |dice: &mut Dice| pages * u64::from(PAGE_BYTES / 4096) - if dice.chance(1, 3) { dice.within(1, 8) } else { 0 };
    let mut setup = Setup {
        servers,
        disks: 1 + dice.index(2),
        clients: 2 + dice.index(2),
        operators: if dice.chance(1, 5) { 1 } else { 2 },
        copies,
        groups,
        blocks: blocks(dice),
        most_blocks: 0,
        page_bytes: PAGE_BYTES,
        capacity_bytes: if roomy { 64 << 20 } else { used.max(u64::from(PAGE_BYTES) * 2) },
        multi_session: dice.chance(1, 8),
        rebuild_after_ms: [8_000, 20_000, 600_000][dice.index(3)],
        network_us: [80, 300, 1_500][dice.index(3)],
        jitter_us: [500, 5_000, 60_000][dice.index(3)],
        drift_ppm: if dice.chance(1, 3) { 45_000 } else { 0 },
        stubborn_ms: [0, 0, 3_000, 12_000][dice.index(4)],
        kept_bytes: if dice.chance(1, 4) { 256 << 10 } else { 16 << 20 },
        flaky: [0, 0, 0, 60, 400][dice.index(5)],
        force_after_ms: if dice.chance(1, 10) { dice.within(1_000, 8_000) } else { 0 },
        heal_at_us: dice.within(20, 60) * 1_000_000,
    };
    setup.most_blocks = setup.blocks;
    setup
}

/// Few hot blocks, so that everything meets; bursts and pauses, so that idle times come too.
fn asks(setup: &Setup, dice: &mut Dice, steps: &mut Vec<Step>) {
    let end = setup.heal_at_us;
    let hot: Vec<u64> = (0..6).map(|_| dice.below(setup.blocks)).collect();
    let pace_us = [500, 5_000, 50_000][dice.index(3)];
    let flushes = [2, 10, 30][dice.index(3)];
    let mut at_us = 2_000_000;
    if dice.chance(1, 2) {
        let at_us = dice.within(1_600_000, 2_000_000);
        steps.push(Step { at_us, action: Action::Ask { client: 0, ask: Ask::Blank } });
    }
    let budget = dice.within(60, 1_200);
    for _ in 0..budget {
        at_us += if dice.chance(1, 60) { dice.within(100_000, 4_000_000) } else { dice.below(2 * pace_us) };
        if at_us >= end {
            break;
        }
        let block = if dice.chance(3, 4) { hot[dice.index(hot.len())] } else { dice.below(setup.blocks) };
        let count = if dice.chance(1, 4) { dice.within(1, 24) } else { dice.within(1, 2) }.min(setup.blocks - block);
        let ask = match dice.below(100) {
            n if n < flushes => Ask::Flush,
            n if n < 60 => Ask::Write(block, count),
            n if n < 66 => Ask::Discard(block, count),
            99 => Ask::Blank,
            _ => Ask::Read(block, count),
        };
        let client = dice.index(setup.clients);
        steps.push(Step { at_us, action: Action::Ask { client, ask } });
    }
}

fn faults(setup: &Setup, dice: &mut Dice, steps: &mut Vec<Step>) {
    let count = dice.within(0, 14);
    // A run speaks mostly of two or three kinds of trouble; all at once hide each other.
    let kinds: Vec<u64> = (0..dice.within(1, 5)).map(|_| dice.below(21)).collect();
    let mut blanked = false;
    // All within few seconds, or over the whole run.
    let from = dice.within(1_500_000, setup.heal_at_us - 6_000_000);
    let burst = dice.chance(1, 3).then_some((from, from + dice.within(200_000, 6_000_000)));
    let (from, to) = burst.unwrap_or((1_500_000, setup.heal_at_us));
    for _ in 0..count {
        let at_us = dice.within(from, to);
        let kind = kinds[dice.index(kinds.len())];
        let mut action = fault(setup, dice, kind, &mut blanked);
        if dice.chance(1, 2) {
            action = timed(setup, dice, &kinds, &mut blanked, action);
        }
        steps.push(Step { at_us, action });
        if dice.chance(1, 4) {
            let kind = kinds[dice.index(kinds.len())];
            let action = fault(setup, dice, kind, &mut blanked);
            steps.push(Step { at_us: at_us + dice.within(1, 800_000), action });
        }
    }
}

/// Trouble that waits for a moment, and often more trouble after it.
fn timed(setup: &Setup, dice: &mut Dice, kinds: &[u64], blanked: &mut bool, action: Action) -> Action {
    let Action::Fault(mut fault) = action else { return action };
    if dice.chance(1, 2)
        && let Action::Fault(more) = any_fault(setup, dice, kinds, blanked)
    {
        let other = Box::new(when(dice, more));
        fault = Fault::Both { one: Box::new(fault), other };
    }
    Action::Fault(when(dice, fault))
}

fn when(dice: &mut Dice, fault: Fault) -> Fault {
    let moment = match dice.below(3) {
        0 => Moment::Leader(LeaderStep::ALL[dice.index(LeaderStep::ALL.len())]),
        _ => Moment::OTHERS[dice.index(Moment::OTHERS.len())],
    };
    let most = if moment.is_frequent() { [1, 30, 300][dice.index(3)] } else { [1, 1, 3][dice.index(3)] };
    let later_us = [0, dice.within(0, 3_000), dice.within(0, 200_000)][dice.index(3)];
    Fault::When { moment, times: dice.within(1, most) as u32, later_us, fault: Box::new(fault) }
}

fn any_fault(setup: &Setup, dice: &mut Dice, kinds: &[u64], blanked: &mut bool) -> Action {
    let kind = if dice.chance(1, 3) { dice.below(5) } else { kinds[dice.index(kinds.len())] };
    fault(setup, dice, kind, blanked)
}

fn down(dice: &mut Dice) -> u64 {
    [dice.within(1, 300), dice.within(300, 4_000), dice.within(3_000, 25_000)][dice.index(3)]
}

fn fault(setup: &Setup, dice: &mut Dice, kind: u64, blanked: &mut bool) -> Action {
    let server = dice.index(setup.servers);
    let disk = dice.index(setup.disks);
    let client = dice.index(setup.clients);
    let down_ms = down(dice);
    Action::Fault(match kind {
        0..=1 => Fault::StopServers { servers: vec![server], power: kind == 1, down_ms },
        2 => Fault::StopServers {
            servers: (0..setup.servers).collect(),
            power: dice.chance(3, 4),
            down_ms: down_ms.min(6_000),
        },
        3..=4 => Fault::KillDriver { client, down_ms: down_ms.min(5_000) },
        5 => Fault::TakeOver { client },
        6 => Fault::PowerOffClient { client, down_ms },
        7 => Fault::KillOperator { operator: dice.index(setup.operators), down_ms },
        8..=9 => Fault::KillLeaderAt { step: LeaderStep::ALL[dice.index(LeaderStep::ALL.len())], down_ms },
        10 => Fault::LoseLease,
        11 => Fault::Freeze { host: any_host(setup, dice), ms: down_ms },
        12..=13 => cut(setup, dice, down_ms),
        14 => Fault::Break { pick: dice.next() },
        15 => {
            let how = [DiskFault::Write, DiskFault::Commit, DiskFault::Flush][dice.index(3)];
            Fault::FailDisk { server, disk, how }
        }
        16 => Fault::Rot { server, disk, pick: dice.next() },
        17 if setup.copies > 1 && !std::mem::replace(blanked, true) => {
            let later_us = dice.within(1, 9_000) * 1_000;
            let old = Fault::OldDisk { server, down_ms: down_ms.min(5_000) };
            let back = Fault::When { moment: Moment::Promised, times: 1, later_us, fault: Box::new(old) };
            let blank = Fault::BlankDisk { server, disk, down_ms };
            if dice.chance(1, 2) { Fault::Both { one: Box::new(blank), other: Box::new(back) } } else { blank }
        }
        18 => Fault::SlowDisk { server, extra_us: dice.within(1_000, 400_000), ms: down_ms },
        19 => Fault::Leave { server, down_ms },
        20 if dice.chance(1, 2) => return Action::Detach { client },
        _ => return Action::Attach { client, clean: dice.chance(1, 2) },
    })
}

fn any_host(setup: &Setup, dice: &mut Dice) -> Host {
    match dice.below(3) {
        0 => Host::Server(dice.index(setup.servers)),
        1 => Host::Driver(dice.index(setup.clients)),
        _ => Host::Operator(dice.index(setup.operators)),
    }
}

/// One pair, or one side against the rest.
fn cut(setup: &Setup, dice: &mut Dice, ms: u64) -> Fault {
    let mut all: Vec<Host> = (0..setup.servers).map(Host::Server).collect();
    all.extend((0..setup.clients).map(Host::Driver));
    all.extend((0..setup.operators).map(Host::Operator));
    all.push(Host::Api);
    let both = dice.chance(1, 2);
    if dice.chance(1, 2) {
        let from = all.remove(dice.index(all.len()));
        let to = all[dice.index(all.len())];
        return Fault::Cut { from: vec![from], to: vec![to], both, ms };
    }
    let (from, to) = all.into_iter().partition(|_| dice.chance(1, 2));
    Fault::Cut { from, to, both, ms }
}
