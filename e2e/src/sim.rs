//! The deterministic simulator: one process, one thread, virtual time, one seed; the production state machines of
//! storage servers, drivers and operators with a simulated network, disks and API server (PROTOCOL.md §9).
//!
//! A seed makes a [`Plan`]; [`run`] plays it and says what the oracles found. The oracles stand apart from the fakes:
//! `register` knows only what applications were told, `checks` the invariants I1, I2, I4, I7, I8 and what must hold
//! when all is healed. Nothing here decides for a machine under test.
//!
//! | file | what |
//! |---|---|
//! | `plan` | what a seed stands for |
//! | `world` | time, events, history |
//! | `net`, `links` | connections |
//! | `disk` | the medium contract and its crashes |
//! | `servers`, `clients`, `operators`, `api` | runtimes of the machines |
//! | `faults`, `people` | what goes wrong, and what people do |
//! | `explore` | every choice within a small budget |
//! | `register`, `checks`, `finish` | oracles |
//! | `shrink`, `words` | the shortest history that fails, and what is printed of it |

mod api;
mod checks;
mod clients;
pub mod counters;
mod dice;
mod disk;
mod event;
pub mod explore;
mod faults;
mod finish;
mod links;
mod net;
mod nodes;
mod operators;
mod people;
pub mod plan;
mod queue;
mod register;
mod servers;
mod shrink;
mod stamp;
mod words;
mod world;

pub use counters::Counters;
pub use event::Host;
pub use plan::Plan;
pub use shrink::shrink;
pub use words::{last_words, last_words_of, words};

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use world::World;

/// How much of a run is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tell {
    /// Nothing.
    Nothing,
    /// Steps, faults, commits, answers.
    History,
    /// Every message and disk operation too.
    Everything,
}

/// What an oracle found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which oracle: the name of an invariant, or `panic`.
    pub oracle: String,
    /// When, microseconds of virtual time.
    pub at_us: u64,
    /// What.
    pub text: String,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// The first thing that was wrong.
    pub failure: Option<Failure>,
    /// What was reached.
    pub counters: Counters,
    /// In words, as much as was asked for.
    pub history: Vec<String>,
}

/// Where the last panic was, told by the hook of [`quiet_panics`].
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Panics of machines under test are findings: from now on they are kept for the outcome in place of being printed.
pub fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        if let Ok(mut last) = PANIC.lock() {
            *last = info.to_string().replace('\n', " ");
        }
    }));
}

/// What the last panic said, and where it was.
pub fn last_panic() -> String {
    PANIC.lock().map(|last| last.clone()).unwrap_or_default()
}

/// Plays a plan.
pub fn run(plan: &Plan, tell: Tell) -> Outcome {
    play(World::new(plan.clone(), tell)).0
}

/// Plays a world; how it ended, and how many choice points it had.
fn play(mut world: World) -> (Outcome, u64) {
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    if ended.is_err() {
        world.fail("panic", last_panic());
    }
    let points = world.exploration.as_ref().map_or(0, |e| e.points);
    (world.outcome(), points)
}
