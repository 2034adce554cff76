//! Start states of the search of small budgets (PROTOCOL.md §9): each is a short run up to a window of time in which
//! something is half done.

use super::{SECOND, Scene};
use crate::sim::dice::Dice;
use crate::sim::plan::{Action, Ask, Fault, Plan};

const MS: u64 = 1_000;
/// When the state is brought about.
const BROUGHT: u64 = 2_300 * MS;

/// A state from which everything within a budget is tried.
#[derive(Clone, Debug)]
pub struct Start {
    /// What is half done.
    pub name: &'static str,
    /// How it comes about.
    pub plan: Plan,
    /// When the window begins, microseconds.
    pub from_us: u64,
    /// When it ends.
    pub until_us: u64,
}

/// All of them.
pub fn starts() -> Vec<Start> {
    vec![
        start("returns", (BROUGHT + 400 * MS, 900), |scene| {
            scene.stop(&[1], true, 400);
            scene.some_asks(BROUGHT + 150 * MS, 6);
            scene.some_asks(BROUGHT + 500 * MS, 4);
        }),
        start("restarted", (BROUGHT + 100 * MS, 500), |scene| {
            scene.stop(&[0, 1], true, 100);
            scene.some_asks(BROUGHT - 2 * MS, 6);
            scene.some_asks(BROUGHT + 300 * MS, 3);
        }),
        start("dead-session", (BROUGHT, 600), |scene| {
            scene.some_asks(BROUGHT - MS, 8);
            scene.fault(BROUGHT, Fault::PowerOffClient { client: 0, down_ms: 100 });
        }),
        start("take-over", (BROUGHT, 250), |scene| {
            scene.some_asks(BROUGHT - MS, 8);
            scene.fault(BROUGHT, Fault::KillDriver { client: 0, down_ms: 10 });
        }),
        start("moves", (BROUGHT, 500), |scene| {
            scene.some_asks(BROUGHT - MS, 8);
            scene.act(BROUGHT, Action::Attach { client: 1, clean: false });
            scene.some_asks(BROUGHT + 450 * MS, 3);
        }),
        start("deleted", (BROUGHT, 500), |scene| {
            scene.some_asks(BROUGHT - MS, 4);
            scene.act(BROUGHT, Action::Delete);
        }),
        start("drained", (BROUGHT, 700), |scene| {
            scene.setup.servers = 3;
            scene.some_asks(BROUGHT - MS, 4);
            scene.fault(BROUGHT, Fault::Drain { server: 1, ms: 2_000 });
            scene.some_asks(BROUGHT + 100 * MS, 4);
        }),
    ]
}

fn start(name: &'static str, (from_us, window_ms): (u64, u64), bring: impl FnOnce(&mut Scene)) -> Start {
    let mut scene = Scene { setup: super::setup(&mut Dice::new(1, 0)), steps: Vec::new() };
    (scene.setup.groups, scene.setup.blocks, scene.setup.most_blocks) = (1, 32, 32);
    (scene.setup.network_us, scene.setup.jitter_us, scene.setup.drift_ppm) = (80, 0, 0);
    let until_us = from_us + window_ms * MS;
    scene.setup.heal_at_us = until_us + SECOND;
    scene.attach(SECOND, 0);
    scene.some_asks(2 * SECOND, 6);
    bring(&mut scene);
    scene.steps.sort_by_key(|step| step.at_us);
    Start { name, plan: Plan { seed: 1, setup: scene.setup, steps: scene.steps }, from_us, until_us }
}

impl Scene {
    /// Writes of both pages, every 100 microseconds, a flush among them, then a read.
    fn some_asks(&mut self, at_us: u64, count: u64) {
        for n in 0..count {
            let ask = match n {
                3 => Ask::Flush,
                n if n + 1 == count => Ask::Read(0, 2),
                n => Ask::Write(n % 2 * 16 + n % 3, 2),
            };
            self.act(at_us + n * 100, Action::Ask { client: 0, ask });
        }
    }

    fn stop(&mut self, servers: &[usize], power: bool, down_ms: u64) {
        self.fault(BROUGHT, Fault::StopServers { servers: servers.to_vec(), power, down_ms });
    }
}
