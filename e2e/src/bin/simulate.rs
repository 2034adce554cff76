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
  simulate --seed 17 --trace        every message and disk operation")]
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
    /// Plays on after a failing seed and lists all of them.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    sim::quiet_panics();
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
