//! Crash points: in each round something is brought about, and one of the three roles crashes just when it comes. Chance
//! alone reaches some of these points a few times in thousands of runs; CI must reach each in every one of its own.

use super::{BEGIN, SECOND, Scene};
use crate::sim::dice::Dice;
use crate::sim::event::Host;
use crate::sim::plan::{Action, Fault, Moment, Setup, Step};
use lamina_protocol::management::Step as LeaderStep;

/// Rounds of a run, and how long one takes.
const ROUNDS: u64 = 5;
const ROUND_US: u64 = 5 * SECOND;

/// Who crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Server,
    Driver,
    Leader,
}

const ROLES: [Role; 3] = [Role::Server, Role::Driver, Role::Leader];

/// What a round is for: half of all rounds are for one of these.
const RARE: [(Moment, Role); 14] = [
    (Moment::Handled, Role::Server),
    (Moment::Handled, Role::Server),
    (Moment::FlushDone, Role::Server),
    (Moment::Promised, Role::Server),
    (Moment::PageServed, Role::Server),
    (Moment::Rejoined, Role::Server),
    (Moment::Leader(LeaderStep::Intended), Role::Leader),
    (Moment::Leader(LeaderStep::CopiesPut), Role::Leader),
    (Moment::Leader(LeaderStep::FirstPromise), Role::Leader),
    (Moment::Leader(LeaderStep::Fenced), Role::Leader),
    (Moment::Leader(LeaderStep::Committed), Role::Leader),
    (Moment::Leader(LeaderStep::Committed), Role::Leader),
    (Moment::Leader(LeaderStep::FirstServed), Role::Leader),
    (Moment::Leader(LeaderStep::Served), Role::Leader),
];

/// Steps that a change of a map passes.
const STEPS: [LeaderStep; 9] = [
    LeaderStep::Prepared,
    LeaderStep::Intended,
    LeaderStep::CopiesPut,
    LeaderStep::FirstPromise,
    LeaderStep::Fenced,
    LeaderStep::LeaseWaited,
    LeaderStep::Committed,
    LeaderStep::FirstServed,
    LeaderStep::Served,
];

/// A cluster and what is done with it, in any order.
pub(in crate::sim::plan) fn plan(dice: &mut Dice) -> (Setup, Vec<Step>) {
    let mut scene = Scene { setup: super::setup(dice), steps: Vec::new() };
    scene.setup.servers = 2 + dice.index(2);
    scene.setup.copies = 2 + (dice.chance(1, 4) && scene.setup.servers == 3) as u8;
    scene.setup.heal_at_us = BEGIN + ROUNDS * ROUND_US + 4 * SECOND;
    scene.attach(SECOND, 0);
    let end = scene.setup.heal_at_us - SECOND;
    scene.asks(dice, 0, (2 * SECOND, end), 40_000, (6, 2));
    for n in 0..ROUNDS {
        let at_us = BEGIN + n * ROUND_US + dice.within(0, 400_000);
        let (moment, role) = match dice.chance(1, 2) {
            true => RARE[dice.index(RARE.len())],
            false => (any_moment(dice), ROLES[dice.index(ROLES.len())]),
        };
        match dice.below(8) {
            0 => scene.forced_away(dice, at_us),
            _ => scene.round(dice, at_us, moment, role),
        }
    }
    if dice.chance(1, 4) {
        let at_us = BEGIN + dice.below(ROUNDS) * ROUND_US + dice.within(0, 400_000);
        let server = dice.index(scene.setup.servers);
        scene.fault(at_us, Fault::BlankDisk { server, disk: 0, down_ms: dice.within(50, 900) });
    }
    (scene.setup, scene.steps)
}

fn any_moment(dice: &mut Dice) -> Moment {
    match dice.below(2) {
        0 => Moment::OTHERS[dice.index(Moment::OTHERS.len())],
        _ => Moment::Leader(STEPS[dice.index(STEPS.len())]),
    }
}

impl Scene {
    /// Brings the moment about; the role crashes when it comes.
    fn round(&mut self, dice: &mut Dice, at_us: u64, moment: Moment, role: Role) {
        let times = if moment.is_frequent() { dice.within(1, 20) as u32 } else { 1 };
        let later_us = [0, dice.within(0, 1_500)][dice.index(2)];
        let fault = self.crash(dice, role);
        let crash = match (moment, fault) {
            (Moment::Leader(step), Fault::KillOperator { down_ms, .. }) => Fault::KillLeaderAt { step, down_ms },
            (_, fault) => Fault::When { moment, times, later_us, fault: Box::new(fault) },
        };
        self.fault(at_us, crash);
        let servers: Vec<usize> = (0..self.setup.servers).collect();
        let power = dice.chance(1, 2);
        let down_ms = dice.within(50, 700);
        let one = vec![dice.index(self.setup.servers)];
        let cause = match moment {
            Moment::WriteSent | Moment::WriteDone | Moment::FlushDone => return,
            Moment::Promised | Moment::PageServed | Moment::Rejoined | Moment::Filled | Moment::Leader(_) => {
                Fault::StopServers { servers: one, power, down_ms }
            }
            Moment::Handled | Moment::SettleBegan | Moment::SettleOver => {
                Fault::StopServers { servers, power, down_ms }
            }
            Moment::TookOver | Moment::Adopted => Fault::KillDriver { client: 0, down_ms: dice.within(1, 100) },
            Moment::SessionOut => Fault::PowerOffClient { client: 0, down_ms },
        };
        self.fault(at_us + 1, cause);
    }

    /// The volume is taken from a client by force while it has requests on their way and hears nothing, or stands still.
    fn forced_away(&mut self, dice: &mut Dice, at_us: u64) {
        let back = at_us + dice.within(2 * SECOND, 3 * SECOND);
        let servers = vec![Host::Server(0), Host::Server(1)];
        let stall = match dice.below(3) {
            0 => Fault::Cut { from: servers, to: vec![Host::Driver(0)], both: false, ms: 1_500 },
            _ => Fault::Freeze { host: Host::Driver(0), ms: 1_500 },
        };
        self.fault(at_us - 1, stall);
        self.act(at_us, Action::Attach { client: 1, clean: false });
        self.act(back, Action::Attach { client: 0, clean: false });
        self.asks(dice, 0, (at_us, at_us + 150_000), 4_000, (5, 1));
        self.asks(dice, 0, (back, back + 20_000), 500, (5, 1));
    }

    fn crash(&self, dice: &mut Dice, role: Role) -> Fault {
        let down_ms = dice.within(20, 900);
        match role {
            Role::Server => {
                let one = vec![dice.index(self.setup.servers)];
                let servers = if dice.chance(1, 2) { one } else { (0..self.setup.servers).collect() };
                Fault::StopServers { servers, power: dice.chance(1, 2), down_ms }
            }
            Role::Driver => Fault::KillDriver { client: 0, down_ms: down_ms.min(300) },
            Role::Leader => Fault::KillOperator { operator: 0, down_ms },
        }
    }
}
