//! The simulator's CI run: fixed seeds, fresh seeds, seeds that once failed; what was broken and what was reached is
//! printed, and a state that the run is known to reach but did not is a failure, for then it proves nothing.

#![allow(clippy::unwrap_used)]

use lamina_e2e::sim::{Counters, Plan, Tell, explore, last_panic, last_words_of, plan, quiet_panics, run, words};
use std::fmt;
use std::time::{Duration, Instant};

/// Seeds that found something once, with what it was; they are played for ever. A change of how plans are made from
/// seeds empties this list: what was found then has named tests beside the state machines.
const ONCE_FAILED: &[(u64, &str)] = &[
    (301_345, "a late order made a copy again whose deletion was ordered before (R14)"),
    (448_176_479_291, "a deposed leader's word hid from a person what the new leader asked (the simulator's person)"),
];

/// Fixed seeds of the run.
const FIXED: std::ops::Range<u64> = 1..251;
/// Fresh seeds; another number in `SIMULATED_SEEDS`, for the optimised build.
const FRESH: u64 = 100;
/// So many fresh seeds reach everything that must be reached.
const ENOUGH: u64 = 1_000;

/// What CI's run must reach: so often that no run lacks one by chance. The rarest came about 20 times in 2,000 seeds when
/// last counted; a rarer one gets a directed plan before it gets a line here.
const MUST_REACH: &[&str] = &[
    "fault: power cut of servers",
    "fault: kill of servers",
    "fault: kill of a driver",
    "fault: take-over of a living driver",
    "fault: power cut of a client",
    "fault: kill of an operator",
    "fault: lease taken away",
    "fault: standstill of a server",
    "fault: standstill of a driver",
    "fault: standstill of an operator",
    "fault: partition",
    "fault: one-way cut",
    "fault: broken connections",
    "fault: failed write of a disk",
    "fault: failed commit of a disk",
    "fault: failed flush of a disk",
    "fault: rotted block",
    "fault: blank disk",
    "fault: slow disk",
    "fault: server asked to stop",
    "fault: trouble timed by a moment",
    "fault: a connection breaks under a frame",
    "leader killed at: Intended",
    "leader killed at: CopiesPut",
    "leader killed at: FirstPromise",
    "leader killed at: Fenced",
    "leader killed at: Committed",
    "leader killed at: FirstServed",
    "leader killed at: Served",
    "reached: a new leader",
    "reached: two leaders at once",
    "reached: a guarded write was refused",
    "reached: a deposed leader's write went through",
    "reached: all servers down at once",
    "reached: all members of a group restarted",
    "reached: an Active member failed",
    "reached: a Syncing member failed",
    "reached: a member rejoined",
    "reached: a member rejoins by difference",
    "reached: a page is listed that was unsynced already",
    "reached: a member was replaced",
    "reached: a member was filled and is Active",
    "reached: a settle began",
    "reached: a settle is over",
    "reached: a loss was raised",
    "reached: a driver said handled",
    "reached: a superseded driver exits",
    "reached: a successor took a device over",
    "reached: take-over with requests in flight",
    "reached: a successor adopts",
    "reached: a session was replaced",
    "reached: a ping for the read lease",
    "reached: a reservation",
    "reached: no space",
    "reached: an I/O error",
    "reached: a stale request was seen",
    "reached: a server asked for a map",
    "reached: unflushed blocks lost",
    "reached: a connection broke of silence",
    "reached: a late write through an old connection",
    "reached: a deposed leader's command",
    "reached: a fence meets requests under way",
    "reached: a server is lost during a settle",
    "reached: the last Active is lost during a fill",
    "reached: take-over with writes in flight",
    "crash of a server just when a driver sends a write to a member",
    "crash of a server just when a member answers a write",
    "crash of a server just when a member answers a fence",
    "crash of a server just when a member hands a page to a peer",
    "crash of a server just when a flush is acknowledged",
    "crash of a server just when a driver says handled",
    "crash of a server just when a settle is over",
    "crash of a leader just when a leader passes Fenced",
    "crash of a leader just when a leader passes Committed",
    "crash of a driver just when a member answers a write",
    "fault: kill of the leader at a step",
    "reached: a disk failed",
    "reached: a driver reported trouble",
    "reached: a leader was killed",
    "crash of a driver just when a driver sends a write to a member",
    "crash of a driver just when a leader passes CopiesPut",
    "crash of a driver just when a leader passes Intended",
    "crash of a driver just when a member answers a fence",
    "crash of a leader just when a driver sends a write to a member",
    "crash of a leader just when a leader passes CopiesPut",
    "crash of a leader just when a leader passes FirstPromise",
    "crash of a leader just when a leader passes FirstServed",
    "crash of a leader just when a leader passes Intended",
    "crash of a leader just when a leader passes Served",
    "crash of a leader just when a member answers a fence",
    "crash of a server just when a filled member is Active",
    "crash of a server just when a leader passes Committed",
    "crash of a server just when a leader passes CopiesPut",
    "crash of a server just when a leader passes Fenced",
    "crash of a server just when a leader passes FirstPromise",
    "crash of a server just when a leader passes FirstServed",
    "crash of a server just when a leader passes Intended",
    "crash of a server just when a leader passes LeaseWaited",
    "crash of a server just when a leader passes Served",
    "crash of a server just when a member rejoins",
    "fault: a command comes again",
    "fault: a word of a watch comes again",
    "fault: a write to the API server is done twice",
    "fault: an older API server, versions too",
    "fault: drain of a server",
    "reached: a drained server is empty",
    "reached: a driver writes again what was acknowledged",
    "reached: a fence meets a write at the disk",
    "reached: a leader finds that the lease went back",
    "reached: a map was adopted",
    "reached: a person adopts a map",
    "reached: a server is back with a blank disk",
    "reached: a volume was deleted",
    "reached: an API server restored from before a commit",
    "reached: a copy was forced",
    "reached: a disk that was replaced is back",
    "reached: a person forces a copy",
    "reached: a session was replaced in one step",
    "reached: a volume is found blank",
    "reached: a volume is found written",
    "reached: deletion is wished for",
    "reached: growth is wished for",
    "reply: Superseded",
    "reply: Behind",
    "reply: Stale",
    "reply: Ended",
    "reply: NotServing",
    "reply: BadBlock",
    "reply: a page for a peer",
    "runs to the end",
];

/// Plays one seed; on a failure the shortest history found, in words.
fn play(seed: u64, counters: &mut Counters) -> Result<(), Found> {
    let plan = Plan::of(seed);
    let outcome = run(&plan, Tell::Nothing);
    counters.join(&outcome.counters);
    outcome.failure.map_or(Ok(()), |failure| Err(Found(words(&plan, &failure, 200))))
}

/// What a test ends with in place of a panic: a log of which only the end is shown must end with the words, not with a
/// backtrace.
struct Found(String);

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{}", self.0.trim_end())
    }
}

/// A panic of a machine under test is part of the outcome, one of the simulator itself a failure with its text.
fn in_words(body: impl FnOnce() -> Result<(), Found> + Send + 'static) -> Result<(), Found> {
    quiet_panics();
    let ended = std::thread::spawn(body).join();
    ended.unwrap_or_else(|_| Err(Found(format!("failing seed: the simulator itself panicked: {}", last_panic()))))
}

/// All seeds of the run; how many were fresh.
fn play_all(counters: &mut Counters) -> Result<u64, Found> {
    let began = Instant::now();
    for seed in ONCE_FAILED.iter().map(|(seed, _)| *seed).chain(FIXED) {
        play(seed, counters)?;
    }
    let fresh = u64::from(std::process::id()) << 24 | u64::from(began.elapsed().subsec_nanos()) & 0xff_ffff;
    let count = std::env::var("SIMULATED_SEEDS").map_or(FRESH, |text| text.parse().unwrap());
    for seed in fresh..fresh + count {
        play(seed, counters)?;
    }
    let operations = counters.of("operations") as f64 / began.elapsed().as_secs_f64();
    println!("{counters}");
    println!(
        "{} seeds that once failed, {} fixed, {} fresh from {fresh}: {operations:.0} operations a second",
        ONCE_FAILED.len(),
        FIXED.end - FIXED.start,
        count
    );
    Ok(count)
}

#[test]
fn no_interleaving_breaks_an_invariant() -> Result<(), Found> {
    in_words(|| {
        let mut counters = Counters::default();
        let count = play_all(&mut counters)?;
        let missing: Vec<_> = MUST_REACH.iter().filter(|name| counters.of(name) == 0).collect();
        // Few seeds, as in the unoptimised build, do not reach all of it every time; CI's run must.
        if count < ENOUGH || missing.is_empty() {
            Ok(())
        } else {
            Err(Found(format!("failing seed: none reached {missing:?}")))
        }
    })
}

/// The search of small budgets (PROTOCOL.md §9): one trouble at each event of each start state. `simulate --exhaustive`
/// has all kinds of trouble and larger budgets.
#[test]
fn no_single_trouble_at_any_event_of_a_start_state_breaks_an_invariant() -> Result<(), Found> {
    in_words(|| {
        // The unoptimised build tries one kind of trouble in one state.
        let all = std::env::var("SIMULATED_SEEDS").is_ok();
        let (width, end) = (if all { explore::SHORT_MENU } else { 1 }, Instant::now() + Duration::from_secs(120));
        let (mut runs, mut points, mut whole) = (0, 0, true);
        for start in plan::starts().iter().filter(|s| all || s.name == "take-over") {
            let search = explore::search(start, 1, width, end);
            (runs, points) = (runs + search.runs, points + search.points);
            if let Some((choices, failure)) = search.failed {
                return Err(Found(last_words_of(start, &choices, &failure)));
            }
            if search.points < 5 {
                return Err(Found(format!("failing seed: start {} has {} choice points", start.name, search.points)));
            }
            // On a machine that is busy with other things the time may be over before all is tried: said, no failure.
            whole &= !search.cut_short;
        }
        println!(
            "exhaustive: {runs} histories, one trouble of {width} kinds at each of {points} choice points, all: {whole}"
        );
        Ok(())
    })
}

#[test]
fn a_seed_is_one_run_for_ever() -> Result<(), Found> {
    let plan = Plan::of(7);
    let (one, other) = (run(&plan, Tell::Everything), run(&plan, Tell::Everything));
    match one.history.len() > 100 && one.history == other.history {
        true => Ok(()),
        false => Err(Found("failing seed: 7 told two histories, or nothing".into())),
    }
}
