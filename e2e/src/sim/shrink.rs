//! Makes a failing run short: takes out steps as long as the same oracle still finds something.

use super::plan::Plan;
use super::{Failure, Tell, run};

/// The shortest plan found within so many tries that fails as this one does, and how.
pub fn shrink(plan: &Plan, failure: &Failure, tries: usize) -> (Plan, Failure) {
    let mut best = (plan.clone(), failure.clone());
    let mut left = tries;
    let mut chunk = plan.steps.len().div_ceil(2).max(1);
    loop {
        let mut shorter = false;
        let mut at = 0;
        while at < best.0.steps.len() && left > 0 {
            left -= 1;
            match without(&best.0, at, chunk, &failure.oracle) {
                Some(found) => {
                    best = found;
                    shorter = true;
                }
                None => at += chunk,
            }
        }
        if left == 0 || (chunk == 1 && !shorter) {
            return best;
        }
        chunk = chunk.div_ceil(2).max(1);
    }
}

fn without(plan: &Plan, at: usize, count: usize, oracle: &str) -> Option<(Plan, Failure)> {
    let mut steps = plan.steps.clone();
    steps.drain(at..(at + count).min(steps.len()));
    let shorter = Plan { steps, ..plan.clone() };
    let found = run(&shorter, Tell::Nothing).failure.filter(|f| f.oracle == oracle)?;
    Some((shorter, found))
}
