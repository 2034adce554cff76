//! The search of small budgets (PROTOCOL.md §9): from a directed start state every choice within a budget is tried, one
//! history for each: at each event of a window, each trouble of a menu, or that this event comes later.
//!
//! A run is a function of its plan and its choices, so a choice point is "the n-th event of the window", and going back to
//! one is playing the run again. With a budget of two, every second choice is tried behind every first one.

use super::event::Event;
use super::plan::{DiskFault, Fault, Start};
use super::world::World;
use super::{Counters, Failure, Outcome, Tell, event::Host, play};
use std::time::Instant;

/// One thing that is done at a choice point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// At the so manieth event of the window.
    pub at: u64,
    /// Index in [`menu`].
    pub what: usize,
}

/// What may be done at a choice point.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// Something goes wrong just before the event.
    Fault(Fault),
    /// The event comes so many microseconds later.
    Later(u64),
}

/// Choices of a run, and how many choice points it had.
pub(super) struct Exploration {
    from_us: u64,
    until_us: u64,
    choices: Vec<(u64, Trouble)>,
    pub(super) points: u64,
}

/// What a search found.
#[derive(Default)]
pub struct Search {
    /// Histories played.
    pub runs: u64,
    /// Choice points of the history without trouble.
    pub points: u64,
    /// What was reached.
    pub counters: Counters,
    /// The choices that failed, and how; the search ends with the first.
    pub failed: Option<(Vec<Choice>, Failure)>,
    /// The time ran out before everything was tried.
    pub cut_short: bool,
}

/// All that may go wrong at a choice point; the first few are those of the short form.
pub fn menu() -> Vec<Trouble> {
    let stop = |servers: &[usize], power| Fault::StopServers { servers: servers.to_vec(), power, down_ms: 60 };
    let cut = |server| Fault::Cut { from: vec![Host::Driver(0)], to: vec![Host::Server(server)], both: true, ms: 400 };
    let fails = |how| Fault::FailDisk { server: 0, disk: 0, how };
    vec![
        Trouble::Fault(stop(&[0], true)),
        Trouble::Fault(stop(&[1], true)),
        Trouble::Fault(Fault::KillDriver { client: 0, down_ms: 20 }),
        Trouble::Fault(Fault::KillOperator { operator: 0, down_ms: 20 }),
        Trouble::Later(30_000),
        Trouble::Fault(stop(&[0, 1], true)),
        Trouble::Fault(stop(&[0], false)),
        Trouble::Fault(stop(&[1], false)),
        Trouble::Fault(Fault::TakeOver { client: 0 }),
        Trouble::Fault(Fault::PowerOffClient { client: 0, down_ms: 100 }),
        Trouble::Fault(Fault::Break { pick: 0 }),
        Trouble::Later(700_000),
        Trouble::Fault(cut(0)),
        Trouble::Fault(cut(1)),
        Trouble::Fault(fails(DiskFault::Write)),
        Trouble::Fault(fails(DiskFault::Commit)),
        Trouble::Fault(fails(DiskFault::Flush)),
    ]
}

/// How many of [`menu`] the short form tries.
pub const SHORT_MENU: usize = 5;

impl World {
    /// Before an event of the window: the choice for it, if there is one. `None` = the event comes later.
    pub(super) fn chosen(&mut self, event: Event) -> Option<Event> {
        let now = self.now;
        let Some(exploration) = self.exploration.as_mut() else { return Some(event) };
        if now < exploration.from_us || now > exploration.until_us || !is_choice_point(&event) {
            return Some(event);
        }
        let point = exploration.points;
        exploration.points += 1;
        let chosen: Vec<Trouble> =
            exploration.choices.iter().filter(|(at, _)| *at == point).map(|(_, t)| t.clone()).collect();
        let mut later = 0;
        for trouble in chosen {
            match trouble {
                Trouble::Fault(fault) => {
                    self.note(|| format!("CHOICE at point {point}: {fault}"));
                    self.fault(&fault);
                }
                Trouble::Later(us) => {
                    self.note(|| format!("CHOICE at point {point}: {us} us later: {}", super::servers::brief(&event)));
                    later += us;
                }
            }
        }
        if later > 0 {
            self.queue.push(now + later, event);
            return None;
        }
        Some(event)
    }
}

/// What comes over the network, from a disk or from the API server; timers of machines are theirs.
fn is_choice_point(event: &Event) -> bool {
    matches!(
        event,
        Event::Stream { .. }
            | Event::Disk { .. }
            | Event::StoreArrive { .. }
            | Event::StoreAnswer { .. }
            | Event::Watch { .. }
            | Event::ClientWatch { .. }
            | Event::OpenDisk { .. }
    )
}

/// Plays one history of a start state.
pub fn run_from(start: &Start, choices: &[Choice], tell: Tell) -> (Outcome, u64) {
    let menu = menu();
    let choices = choices.iter().map(|c| (c.at, menu[c.what].clone())).collect();
    let (from_us, until_us) = (start.from_us, start.until_us);
    let mut world = World::new(start.plan.clone(), tell);
    world.exploration = Some(Exploration { from_us, until_us, choices, points: 0 });
    play(world)
}

/// Tries every choice within a budget of so many troubles, of the first `width` of the menu, until `end`.
pub fn search(start: &Start, budget: usize, width: usize, end: Instant) -> Search {
    let mut search = Search::default();
    search.points = search.play(start, &mut Vec::new());
    let points = search.points;
    search.descend(start, &mut Vec::new(), points, budget, width, end);
    search
}

impl Search {
    fn play(&mut self, start: &Start, choices: &mut [Choice]) -> u64 {
        let (outcome, points) = run_from(start, choices, Tell::Nothing);
        self.runs += 1;
        self.counters.join(&outcome.counters);
        if let Some(failure) = outcome.failure {
            self.failed.get_or_insert((choices.to_vec(), failure));
        }
        points
    }

    fn descend(
        &mut self,
        start: &Start,
        done: &mut Vec<Choice>,
        points: u64,
        budget: usize,
        width: usize,
        end: Instant,
    ) {
        let first = done.last().map_or(0, |last| last.at + 1);
        for at in first..points {
            for what in 0..if budget > 0 { width } else { 0 } {
                self.cut_short |= Instant::now() > end;
                if self.failed.is_some() || self.cut_short {
                    return;
                }
                done.push(Choice { at, what });
                let then = self.play(start, done);
                self.descend(start, done, then, budget - 1, width, end);
                done.pop();
            }
        }
    }
}

/// `12:3,40:0` and back.
pub fn choices_in_words(choices: &[Choice]) -> String {
    choices.iter().map(|c| format!("{}:{}", c.at, c.what)).collect::<Vec<_>>().join(",")
}

/// The choices that [`choices_in_words`] wrote; `None` if it did not.
pub fn choices_of(words: &str) -> Option<Vec<Choice>> {
    let one = |word: &str| {
        let (at, what) = word.split_once(':')?;
        let choice = Choice { at: at.parse().ok()?, what: what.parse().ok()? };
        (choice.what < menu().len()).then_some(choice)
    };
    words.split(',').filter(|word| !word.is_empty()).map(one).collect()
}
