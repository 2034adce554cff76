//! Lamina on a real Kubernetes, as guarantees. One cluster for all cases, which run one after the other and share
//! nothing but it.
//!
//! Needs root, the programs of `e2e/cluster/build-tools.sh` and Lamina's own (built beside this test, or in
//! `LAMINA_PROGRAMS`); a case that lacks something says so by name and counts as skipped. `LAMINA_TEST_CLUSTER` names
//! the state directory of a cluster that is to be used and kept. The end is a guarantee too: the cluster is taken down
//! while the last case's volumes may still be attached, and nothing of it is left on the machine.
//!
//!   cargo test -p lamina-demo --test cluster -- moves grows      only cases with these words in their names
#![allow(clippy::unwrap_used)]

#[path = "cluster/chart.rs"]
mod chart;
#[path = "cluster/checker.rs"]
mod checker;
#[path = "cluster/faults.rs"]
mod faults;
#[path = "cluster/load.rs"]
mod load;
#[path = "cluster/manifests.rs"]
mod manifests;
#[path = "cluster/old_node.rs"]
mod old_node;
#[path = "cluster/outages.rs"]
mod outages;
#[path = "cluster/sanity.rs"]
mod sanity;
#[path = "cluster/stage.rs"]
mod stage;
#[path = "cluster/steady.rs"]
mod steady;
#[path = "cluster/story.rs"]
mod story;
#[path = "cluster/uninstall.rs"]
mod uninstall;
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
    Case("the_first_copy_lies_where_the_class_allows_it", Needs::Programs, volumes::allowed_topologies),
    Case("a_pod_uses_ext4", Needs::Programs, volumes::ext4),
    Case("a_pod_uses_xfs_and_grows_it_online", Needs::Programs, volumes::xfs_grows),
    Case("a_pod_uses_a_raw_block_device", Needs::Programs, volumes::block),
    Case("data_moves_with_the_pod_to_another_node", Needs::Programs, volumes::moves),
    Case("a_volume_written_by_hand_becomes_a_persistent_volume", Needs::Programs, volumes::by_hand),
    Case("a_volume_in_use_is_not_deleted_and_then_frees_its_copies", Needs::Programs, volumes::deletion),
    Case("helm_uninstall_keeps_data_and_the_next_installation_serves_it", Needs::Programs, uninstall::keeps_data),
    Case("ext4_grows_at_the_next_stage", Needs::Programs, volumes::ext4_grows_at_the_next_stage),
    Case(
        "steady_io_sends_nothing_to_the_operator_or_the_api_server",
        Needs::Programs,
        steady::io_is_between_driver_and_servers_alone,
    ),
    Case("csi_sanity_passes_whole", Needs::Programs, sanity::passes_whole),
    Case(
        "a_node_plugin_killed_or_replaced_with_another_image_costs_fio_no_error",
        Needs::Programs,
        outages::plugin_killed_and_replaced,
    ),
    Case("no_acknowledged_commit_is_lost_by_killed_servers_and_a_move", Needs::Programs, story::on_an_own_cluster),
    Case("nor_on_an_existing_cluster_named_by_its_kubeconfig", Needs::Programs, story::on_an_existing_cluster),
    Case("a_killed_leader_is_followed_by_one_that_heals", Needs::Programs, outages::leader_killed),
    Case(
        "a_volume_deleted_with_a_server_away_says_so_until_it_is_back",
        Needs::Programs,
        outages::deletion_with_a_server_away,
    ),
    Case("a_rebooted_node_gets_its_pod_back_without_anybodys_hand", Needs::Programs, outages::node_rebooted),
    Case(
        "a_lost_device_holder_costs_no_data_and_the_pod_comes_back_to_its_node",
        Needs::Programs,
        outages::holder_lost,
    ),
    Case(
        "a_stopped_node_whose_pod_went_elsewhere_writes_not_one_byte_and_reads_nothing",
        Needs::Programs,
        old_node::stopped,
    ),
    Case(
        "a_node_cut_off_with_a_storage_server_reads_nothing_after_its_lease_and_only_then_another_is_admitted",
        Needs::Programs,
        old_node::cut_off,
    ),
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
    println!("running {} tests", cases.len() + 1);
    let mut failed = cases.iter().filter(|case| !passes(case, &mut stage)).count();
    let left = stage.end();
    println!("test nothing_of_the_cluster_is_left ... {}", if left.is_ok() { "ok" } else { "FAILED" });
    if let Err(left) = left {
        println!("{left}");
        failed += 1;
    }
    result(cases.len() + 1 - failed, failed, CASES.len() - cases.len())
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
