//! `simulate`: plays seeds of the deterministic simulator; a failing one is made short and told in words.

use clap::Parser;
use lamina_e2e::sim::{self, Counters, Plan, Tell};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Plays Lamina's storage servers, drivers and operators in one thread and virtual time, breaks what can break, and
/// checks the invariants of PROTOCOL.md.
#[derive(Parser)]
#[command(after_help = "Examples:
  simulate --seeds 2000             2000 seeds from a random start, until one fails
  simulate --seconds 600            fresh seeds for ten minutes
  simulate --seed 17                one seed; its history in words if it fails
  simulate --seed 17 --shrink       the shortest history with the same fault
  simulate --seed 17 --trace        every message and disk operation
  simulate --exhaustive             one trouble at each event of each start state
  simulate --exhaustive --budget 2 --start moves --seconds 600
  simulate --start moves --choices 12:3,40:0 --trace")]
struct Arguments {
    /// The first seed, or the only one when neither --seeds nor --seconds is given. Without it: a random start.
    #[arg(long)]
    seed: Option<u64>,
    /// How many seeds to play.
    #[arg(long)]
    seeds: Option<u64>,
    /// Plays fresh seeds for so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Takes steps out of a failing run as long as the same oracle finds something.
    #[arg(long)]
    shrink: bool,
    /// Runs that shrinking may take.
    #[arg(long, default_value_t = 600)]
    tries: usize,
    /// Prints every message and disk operation of the (shrunk) run.
    #[arg(long)]
    trace: bool,
    /// Tries every choice within a budget from each of the directed start states, in place of seeds.
    #[arg(long)]
    exhaustive: bool,
    /// Troubles in one history of an exhaustive search.
    #[arg(long, default_value_t = 1)]
    budget: usize,
    /// How many kinds of trouble an exhaustive search tries.
    #[arg(long, default_value_t = usize::MAX)]
    width: usize,
    /// Only the start states whose name contains this.
    #[arg(long, default_value = "")]
    start: String,
    /// Plays one history of a start state: the choices as a failing search prints them.
    #[arg(long)]
    choices: Option<String>,
    /// Plays on after a failing seed and lists all of them.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    sim::quiet_panics();
    if let Some(choices) = &arguments.choices {
        return replay(&arguments, choices);
    }
    if arguments.exhaustive {
        return exhaustive(&arguments);
    }
    let first = arguments.seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | u64::from(clock_nanos()) >> 12);
    let one = arguments.seed.is_some() && arguments.seeds.is_none() && arguments.seconds.is_none();
    let seeds = if one { 1 } else { arguments.seeds.unwrap_or(u64::MAX) };
    let limit = arguments.seconds.map(Duration::from_secs);
    let seeds = if limit.is_none() && arguments.seeds.is_none() && !one { 100 } else { seeds };
    let began = Instant::now();
    let (mut counters, mut played, mut failed) = (Counters::default(), 0, Vec::new());
    for seed in first..first.saturating_add(seeds) {
        if limit.is_some_and(|limit| began.elapsed() > limit) || (!failed.is_empty() && !arguments.keep_going) {
            break;
        }
        let outcome = sim::run(&Plan::of(seed), Tell::Nothing);
        counters.join(&outcome.counters);
        played += 1;
        failed.extend(outcome.failure.map(|failure| (seed, failure)));
    }
    let took = began.elapsed().as_secs_f64();
    println!("{counters}");
    let operations = counters.of("operations") as f64;
    println!(
        "{played} seeds from {first}, {} failed, in {took:.1} s: {:.0} operations and {:.0} events a second",
        failed.len(),
        operations / took,
        counters.of("events") as f64 / took
    );
    if arguments.trace && failed.is_empty() && played == 1 {
        for line in sim::run(&Plan::of(first), Tell::Everything).history {
            println!("{line}");
        }
    }
    if let [(seed, failure)] = failed.as_slice() {
        tell(&arguments, *seed, failure);
    }
    // Last: of a long log only the end may be kept.
    for (seed, failure) in &failed {
        print!("{}", sim::last_words(*seed, failure));
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One history of a start state.
fn replay(arguments: &Arguments, words: &str) -> ExitCode {
    let starts = sim::plan::starts();
    let start = starts.iter().find(|s| s.name == arguments.start);
    let (Some(start), Some(choices)) = (start, sim::explore::choices_of(words)) else {
        eprintln!("no such start state or choices; there are {:?}", starts.iter().map(|s| s.name).collect::<Vec<_>>());
        return ExitCode::FAILURE;
    };
    let tell = if arguments.trace { Tell::Everything } else { Tell::History };
    let (outcome, points) = sim::explore::run_from(start, &choices, tell);
    outcome.history.iter().for_each(|line| println!("{line}"));
    println!("{points} choice points");
    match outcome.failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            print!("{}", sim::last_words_of(start, &choices, &failure));
            ExitCode::FAILURE
        }
    }
}

/// Every choice within the budget, from each start state.
fn exhaustive(arguments: &Arguments) -> ExitCode {
    let width = arguments.width.min(sim::explore::menu().len());
    let (mut runs, mut failed, began) = (0, String::new(), Instant::now());
    let end = began + Duration::from_secs(arguments.seconds.unwrap_or(1 << 30));
    for start in sim::plan::starts().iter().filter(|s| s.name.contains(&arguments.start)) {
        let from = Instant::now();
        let search = sim::explore::search(start, arguments.budget, width, end);
        runs += search.runs;
        println!(
            "{:<14} {:>8} histories from {:>4} choice points, {:.1} s{}{}",
            start.name,
            search.runs,
            search.points,
            from.elapsed().as_secs_f64(),
            if search.cut_short { ", not all: the time is over" } else { "" },
            if search.failed.is_some() { ", FAILED" } else { "" }
        );
        if let Some((choices, failure)) = search.failed {
            failed += &sim::last_words_of(start, &choices, &failure);
        }
    }
    let took = began.elapsed().as_secs_f64();
    println!("{runs} histories with at most {} troubles of {width} kinds in {took:.1} s", arguments.budget);
    print!("{failed}");
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The history of a failing seed, shortened if asked for.
fn tell(arguments: &Arguments, seed: u64, failure: &sim::Failure) {
    let plan = Plan::of(seed);
    let steps = plan.steps.len();
    let plan = if arguments.shrink { sim::shrink(&plan, failure, arguments.tries).0 } else { plan };
    let tell = if arguments.trace { Tell::Everything } else { Tell::History };
    println!("{:#?}", plan.setup);
    println!("{} of {steps} steps:", plan.steps.len());
    for line in sim::run(&plan, tell).history {
        println!("{line}");
    }
}

/// Something that differs from run to run.
fn clock_nanos() -> u32 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.subsec_nanos())
}
