//! `mutants`: plays the simulator against deliberate protocol mistakes, one at a time. Each must be found by an oracle:
//! a panic of the mutated place is none. The unmutated build must pass the same seeds.

use clap::Parser;
use lamina_e2e::sim::{self, Failure, Plan, Tell};
use lamina_protocol::mutants::{Mutant, activate};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Those that die within few seeds: the list for CI.
const SHORT: &[Mutant] = &[
    Mutant::ServedAfterFence,
    Mutant::OlderServed,
    Mutant::AheadServed,
    Mutant::BootNotCompared,
    Mutant::RestartUnseen,
    Mutant::SyncingRead,
    Mutant::OldHandlesLive,
    Mutant::IncarnationNotCompared,
    Mutant::IncarnationVolatile,
    Mutant::ResumeIsFresh,
    Mutant::SupersededTellsKernel,
    Mutant::FenceWithoutDrain,
    Mutant::PromiseVolatile,
    Mutant::UnfencedLeftOut,
    Mutant::LossNotRaised,
    Mutant::FlushCoversLater,
    Mutant::FlushWithoutDisk,
    Mutant::AckOnOneCopy,
    Mutant::SyncingNotWritten,
    Mutant::RejoinKeepsBlocks,
    Mutant::UnsyncedActive,
    Mutant::LeaseIgnored,
    Mutant::LeaseNotWaited,
    Mutant::UnpromisedUnmarked,
    Mutant::CommitBeforeLease,
    Mutant::DeposedObeyed,
];

/// Those that change nothing that can be seen, with the proof: another rule covers them in every history. Nothing stands here
/// without one; one that is found all the same is taken off the list.
const KNOWN: &[(Mutant, &str)] = &[
    (
        Mutant::OpenWithoutSilence,
        "equivalent: requests on a page are carried out in the order in which they came, whatever their handles, so what a \
         lower handle still has under way comes before all that the new one brings; what is on no page (a flush, slots) \
         says or takes nothing for an older attempt; the rule itself: \
         an_open_waits_for_what_the_lower_handle_has_under_way",
    ),
    (
        Mutant::GiveUpRepeatsSettled,
        "equivalent: a member with the boot id of that map answered the fence before it as settled and durable, and has \
         executed nothing since but under a map with these very sessions, so it clears what the first map made it clear, \
         or would have; the rule itself: \
         r13_a_given_up_change_repeats_no_settled_and_takes_nothing_of_a_reply",
    ),
];

/// Breaks Lamina's protocol on purpose, one rule at a time, and shows that the simulator's oracles see it.
#[derive(Parser)]
#[command(after_help = "Examples:
  mutants                           every mistake, each within 500 seeds (about 20 minutes; --threads 2: 10)
  mutants --short                   those that die within few seeds
  mutants --only Lease --tell       mistakes with this in their names; how the first one was found, in words
Ends with status 1 if one was not found, but for those that it names with the reason why they do no harm.")]
struct Arguments {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds in which a mistake must be found.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// Plays only every so manieth of them; with --seed 4, 4 are directed plans.
    #[arg(long, default_value_t = 1)]
    step: usize,
    /// Only mistakes whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Only those that die within few seeds.
    #[arg(long)]
    short: bool,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Tells the shortest history in which the first one was found.
    #[arg(long)]
    tell: bool,
}

/// How one mistake fared.
struct Fate {
    mutant: Option<Mutant>,
    found: Option<(u64, Failure)>,
    panics: u64,
    seconds: f64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    sim::quiet_panics();
    let listed = |m: &&Mutant| format!("{m:?}").contains(&arguments.only) && (!arguments.short || SHORT.contains(m));
    let mutants = Mutant::ALL.iter().filter(listed).map(|m| Some(*m));
    let all: Vec<Option<Mutant>> = mutants.chain([None]).collect();
    let (next, fates) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads.max(1) {
            scope.spawn(|| {
                while let Some(mutant) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let fate = play(*mutant, &arguments);
                    println!("{}", words(&fate, &arguments));
                    fates.lock().expect("no thread panics with it").push(fate);
                }
            });
        }
    });
    let fates = fates.into_inner().expect("no thread panics with it");
    verdict(&fates)
}

/// Success: found is every mistake but the known survivors, and none of these; without a mistake nothing is found.
fn verdict(fates: &[Fate]) -> ExitCode {
    let why = |fate: &Fate| KNOWN.iter().find(|(known, _)| Some(*known) == fate.mutant).map(|(_, why)| *why);
    let of_a_mistake = || fates.iter().filter_map(|f| f.mutant.map(|m| (m, f)));
    let (mut known, mut survivors, mut wronged) = (0, 0, 0);
    for (mutant, fate) in of_a_mistake() {
        match (why(fate), &fate.found) {
            (Some(why), None) => {
                println!("known survivor: {mutant:?}: {why}");
                known += 1;
            }
            (Some(_), Some(_)) => {
                println!("found although listed as a known survivor: {mutant:?}");
                wronged += 1;
            }
            (None, None) => {
                println!("survivor: {mutant:?}: {}", mutant.words());
                survivors += 1;
            }
            (None, Some(_)) => {}
        }
    }
    for (seed, failure) in fates.iter().filter(|f| f.mutant.is_none()).filter_map(|f| f.found.as_ref()) {
        print!("{}", sim::words(&Plan::of(*seed), failure, 200));
    }
    let sound = fates.iter().all(|f| f.mutant.is_some() || (f.found.is_none() && f.panics == 0));
    println!(
        "{} mistakes, {survivors} not found, {known} known survivors; the protocol itself is {}",
        of_a_mistake().count(),
        if sound { "sound" } else { "NOT sound" }
    );
    if survivors == 0 && wronged == 0 && sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn play(mutant: Option<Mutant>, arguments: &Arguments) -> Fate {
    let began = Instant::now();
    activate(mutant);
    let mut fate = Fate { mutant, found: None, panics: 0, seconds: 0.0 };
    for seed in (arguments.seed..arguments.seed + arguments.seeds).step_by(arguments.step) {
        let plan = Plan::of(seed);
        match sim::run(&plan, Tell::Nothing).failure {
            Some(failure) if failure.oracle == "panic" && mutant.is_some() => fate.panics += 1,
            Some(failure) => {
                if arguments.tell {
                    let short = sim::shrink(&plan, &failure, 300).0;
                    println!("{:#?}\n{}", short.setup, sim::run(&short, Tell::History).history.join("\n"));
                }
                fate.found = Some((seed, failure));
                break;
            }
            None => {}
        }
    }
    fate.seconds = began.elapsed().as_secs_f64();
    fate
}

fn words(fate: &Fate, arguments: &Arguments) -> String {
    let name = fate.mutant.map_or("(none)".into(), |m| format!("{m:?}"));
    let rule = fate.mutant.map_or("", Mutant::rule);
    let panics = if fate.panics > 0 { format!(", {} runs ended in a panic", fate.panics) } else { String::new() };
    let end = match &fate.found {
        Some((seed, failure)) => {
            let text: String = failure.text.chars().take(150).collect();
            format!("found after {} seeds by {}: {text}", seed - arguments.seed + 1, failure.oracle)
        }
        None => {
            format!("NOT found in {} seeds: {}", arguments.seeds, fate.mutant.map_or("as it should be", Mutant::words))
        }
    };
    format!("{name:<24} {rule:<6} {:>5.1} s  {end}{panics}", fate.seconds)
}
