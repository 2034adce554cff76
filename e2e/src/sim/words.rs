//! A failing seed in words, for a log of which only the end is shown: the shortest history found, bounded, and behind it
//! in few lines the seed, the oracle, what it saw and how to see it again.

use super::explore::{Choice, choices_in_words};
use super::plan::{Plan, Start};
use super::{Failure, Tell, run, shrink};
use std::fmt::Write;

/// Lines of the history that are told from its beginning.
const FIRST: usize = 8;
/// Lines that are told from its end.
const LAST: usize = 34;
/// Characters of a line.
const WIDTH: usize = 300;
/// What the last lines begin with; `e2e/test.sh` looks for it.
const SIGN: &str = "failing seed";

/// What is to be printed of a seed that failed; `tries` = runs that the search for a shorter history may take.
pub fn words(plan: &Plan, failure: &Failure, tries: usize) -> String {
    let (short, found) = shrink(plan, failure, tries);
    let history = run(&short, Tell::History).history;
    let mut text = format!("{:?}\n{} of {} steps:\n", short.setup, short.steps.len(), plan.steps.len());
    text.push_str(&bounded(&history));
    if found.text != failure.text {
        put_line(&mut text, &format!("{SIGN}: shortened it fails by: {}", found.text));
    }
    text.push_str(&last_words(plan.seed, failure));
    text
}

/// The lines that must not be lost.
pub fn last_words(seed: u64, failure: &Failure) -> String {
    let mut text = String::new();
    let at = failure.at_us as f64 / 1e6;
    put_line(&mut text, &format!("{SIGN}: {seed} at {at:.6} s ({}): {}", failure.oracle, failure.text));
    put_line(
        &mut text,
        &format!("{SIGN}: again: cargo run --profile sim -p lamina-e2e --bin simulate -- --seed {seed} --shrink"),
    );
    text
}

/// The lines that must not be lost of a history of a search.
pub fn last_words_of(start: &Start, choices: &[Choice], failure: &Failure) -> String {
    let mut text = String::new();
    let (at, choices) = (failure.at_us as f64 / 1e6, choices_in_words(choices));
    let Failure { oracle, text: what, .. } = failure;
    put_line(
        &mut text,
        &format!("{SIGN}: start {} with choices {choices} at {at:.6} s ({oracle}): {what}", start.name),
    );
    let again = format!("simulate -- --start {} --choices {choices}", start.name);
    put_line(&mut text, &format!("{SIGN}: again: cargo run --profile sim -p lamina-e2e --bin {again}"));
    text
}

fn bounded(history: &[String]) -> String {
    let mut text = String::new();
    let gap = FIRST..history.len().saturating_sub(LAST);
    for (n, line) in history.iter().enumerate() {
        if n == gap.start && !gap.is_empty() {
            put_line(&mut text, &format!("({} lines left out; simulate --seed tells all)", gap.len()));
        }
        if !gap.contains(&n) {
            put_line(&mut text, line);
        }
    }
    text
}

fn put_line(text: &mut String, line: &str) {
    let line: String = line.chars().take(WIDTH).map(|c| if c == '\n' { ' ' } else { c }).collect();
    writeln!(text, "{line}").expect("a String takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_name_seed_oracle_text_and_the_way_to_repeat_it() {
        let failure = Failure { oracle: "I4".into(), at_us: 1_500_000, text: "a\nb".into() };
        let words = last_words(17, &failure);
        let lines: Vec<&str> = words.lines().collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0], "failing seed: 17 at 1.500000 s (I4): a b");
        assert!(lines[1].ends_with("--seed 17 --shrink"));
    }

    #[test]
    fn a_long_history_keeps_its_beginning_and_its_end_in_lines_of_bounded_length() {
        let history: Vec<String> = (0..1_000).map(|n| format!("line {n} {}", "x".repeat(500))).collect();
        let text = bounded(&history);
        assert_eq!(text.lines().count(), FIRST + LAST + 1);
        assert!(text.lines().all(|line| line.len() <= WIDTH));
        assert!(text.starts_with("line 0 ") && text.contains("\nline 999 "));
        assert_eq!(bounded(&history[..3]).lines().count(), 3);
    }
}
