//! Lamina on a real Kubernetes, as guarantees. One cluster for all cases, which run one after the other and share
//! nothing but it.
//!
//! Needs root, the programs of `e2e/cluster/build-tools.sh` and Lamina's own (built beside this test, or in
//! `LAMINA_PROGRAMS`); a case that lacks something says so by name and counts as skipped. `LAMINA_TEST_CLUSTER` names
//! the state directory of a cluster that is to be used and kept.
//!
//!   cargo test -p lamina-demo --test cluster -- moves grows      only cases with these words in their names
#![allow(clippy::unwrap_used)]

#[path = "cluster/chart.rs"]
mod chart;
#[path = "cluster/checker.rs"]
mod checker;
#[path = "cluster/stage.rs"]
mod stage;
#[path = "cluster/volumes.rs"]
mod volumes;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use stage::{Needs, Stage};

/// A guarantee and what its check needs.
struct Case(&'static str, Needs, fn(&Stage));

const CASES: &[Case] = &[
    Case("a_log_with_a_commit_that_never_happened_fails_the_check", Needs::Cluster, checker::forged_commit_fails),
    Case("every_object_of_the_chart_is_accepted", Needs::Cluster, chart::is_accepted),
    Case("no_program_may_do_more_than_it_needs", Needs::Cluster, chart::rights_are_narrow),
    Case("network_policies_admit_only_laminas_pods", Needs::Cluster, chart::policies_admit_only_own_pods),
    Case("a_claim_waits_for_its_first_consumer", Needs::Programs, volumes::claim_waits),
    Case("a_pod_uses_ext4", Needs::Programs, volumes::ext4),
    Case("a_pod_uses_xfs_and_grows_it_online", Needs::Programs, volumes::xfs_grows),
    Case("a_pod_uses_a_raw_block_device", Needs::Programs, volumes::block),
    Case("data_moves_with_the_pod_to_another_node", Needs::Programs, volumes::moves),
    Case("a_volume_written_by_hand_becomes_a_persistent_volume", Needs::Programs, volumes::by_hand),
    Case("a_killed_node_plugin_costs_no_io_error", Needs::Programs, volumes::plugin_killed),
    Case("a_volume_in_use_is_not_deleted_and_then_frees_its_copies", Needs::Programs, volumes::deletion),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let chosen = |case: &&Case| words.is_empty() || words.iter().any(|word| case.0.contains(word.as_str()));
    let cases: Vec<&Case> = CASES.iter().filter(chosen).collect();
    if std::env::args().any(|word| word == "--list") {
        cases.iter().for_each(|case| println!("{}: test", case.0));
        return ExitCode::SUCCESS;
    }
    let mut stage = match Stage::new() {
        Ok(stage) => stage,
        Err(reason) => return skip_all(&cases, &reason),
    };
    println!("running {} tests", cases.len());
    let failed = cases.iter().filter(|case| !passes(case, &mut stage)).count();
    drop(stage);
    result(cases.len() - failed, failed, CASES.len() - cases.len())
}

/// Whether a case passes or is skipped by name.
fn passes(Case(name, needs, check): &Case, stage: &mut Stage) -> bool {
    let start = Instant::now();
    if let Some(reason) = stage.lacks(*needs) {
        println!("skipped: {name} ({reason})\ntest {name} ... ok");
        return true;
    }
    let passed = catch_unwind(AssertUnwindSafe(|| {
        stage.prepare(*needs);
        check(stage);
    }))
    .is_ok();
    let word = if passed { "ok" } else { "FAILED" };
    println!("test {name} ... {word} ({:.1} s)", start.elapsed().as_secs_f64());
    if !passed {
        stage.show();
    }
    stage.clear();
    passed
}

fn skip_all(cases: &[&Case], reason: &str) -> ExitCode {
    cases.iter().for_each(|case| println!("skipped: {} ({reason})", case.0));
    result(cases.len(), 0, CASES.len() - cases.len())
}

fn result(passed: usize, failed: usize, out: usize) -> ExitCode {
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {out} filtered out");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
