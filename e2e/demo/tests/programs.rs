//! The operator and storage servers as programs, over a directory: leaders that die at each step of a change, and one that
//! works from an old map.
//!
//! Invariant: what is started here ends with its guard, also when a test fails. Needs the programs beside this test (or in
//! `LAMINA_PROGRAMS`); without them a test says so by name and counts as skipped.
#![allow(clippy::unwrap_used)]

#[path = "programs/cluster.rs"]
mod cluster;

use cluster::{Cluster, Operator, programs};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// What the operator's program answers to a fail point that is none: all there are.
fn steps() -> Vec<String> {
    let output = programs().command("lamina-operator").args(["serve", "--die-at", "nowhere"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let (_, names) = said.split_once("steps: ").unwrap_or_else(|| panic!("it names its steps: {said}"));
    names.lines().next().unwrap().split(", ").map(str::to_owned).collect()
}

/// Makes a leader come to a step, as people would; what they are told when it dies does not matter.
fn drive(cluster: &Cluster, operator: &mut Operator, step: &str) {
    let _ = operator.create_volume();
    match step {
        "Prepared" => {
            let _ = operator.ask(&["volume", "attach", "v", "--node", "n"]);
            let _ = operator.ask(&["volume", "detach", "v", "--node", "n"]);
        }
        // A server that stands still is found out by its heartbeats, too: then the change is another one.
        "GivenUp" => {
            for _ in 0..5 {
                if operator.is_gone() {
                    return;
                }
                cluster.servers[1].signal("STOP");
                let _ = operator.ask(&["volume", "attach", "v", "--node", "n"]);
                cluster.servers[1].signal("CONT");
                let _ = operator.ask(&["volume", "detach", "v", "--node", "n"]);
                let whole = |v: Option<&Value>| v.is_some_and(is_finished);
                operator.until_gone_or("the volume to be whole again", whole);
            }
        }
        "CopiesDeleted" => drop(operator.ask(&["volume", "delete", "v"])),
        _ => {}
    }
}

fn is_finished(volume: &Value) -> bool {
    let status = &volume["status"];
    let nothing_retired = status["retired"].as_array().is_none_or(Vec::is_empty);
    status["state"] == "Healthy" && status["proposed"].is_null() && nothing_retired
}

#[test]
fn a_leader_killed_at_any_step_of_a_change_is_finished_by_the_next_one() {
    let Some(_) = cluster::programs_or_skip("a_leader_killed_at_any_step_of_a_change_is_finished_by_the_next_one")
    else {
        return;
    };
    let steps = steps();
    assert!(steps.len() >= 11, "{steps:?}");
    for step in steps {
        let mut cluster = Cluster::start(2);
        let objects = cluster.objects("objects");
        Operator::start(&objects, None).know(&cluster).stop();
        let mut doomed = Operator::start(&objects, Some(&step));
        drive(&cluster, &mut doomed, &step);
        assert_eq!(doomed.ended(), Some(86), "the leader comes to {step}, and is gone at once");

        let next = Operator::start(&objects, None);
        if step == "CopiesDeleted" {
            next.until("the volume to be gone", |volume| volume.is_none());
            assert_eq!(cluster.copies(), 0, "no copy is forgotten");
        } else {
            next.until(&format!("what was begun to be finished after {step}"), |v| v.is_some_and(is_finished));
            assert_eq!(cluster.copies(), 4, "{step}: two of each half, and no more");
            let node = if matches!(step.as_str(), "Prepared" | "GivenUp") { "n" } else { "m" };
            let session = next.ask(&["volume", "attach", "v", "--node", node]).unwrap();
            assert!(session["session"].is_string(), "{step}: changes go on");
        }
        next.stop();
        cluster.end();
    }
}

fn generation(volume: &Value) -> u64 {
    volume["status"]["generation"].as_u64().unwrap()
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else if !entry.file_name().to_string_lossy().starts_with('.') {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_leader_with_an_old_map_cannot_harm_anything() {
    let Some(_) = cluster::programs_or_skip("a_leader_with_an_old_map_cannot_harm_anything") else { return };
    let mut cluster = Cluster::start(3);
    let (now, old) = (cluster.objects("objects"), cluster.objects("old"));
    let leader = Operator::start(&now, None).know(&cluster);
    leader.create_volume().unwrap();
    leader.until("the volume to be whole", |v| v.is_some_and(is_finished));
    copy_folder(&now, &old);
    for node in ["n", "m", "n"] {
        leader.ask(&["volume", "attach", "v", "--node", node]).unwrap();
        leader.ask(&["volume", "detach", "v", "--node", node]).unwrap();
    }
    leader.ask(&["volume", "attach", "v", "--node", "n"]).unwrap();
    let newest = leader.until("the session", |v| v.is_some_and(is_finished)).unwrap();
    let before = (generation(&newest), cluster.copies());

    // It gives every order that it can, to the same servers.
    let deposed = Operator::start(&old, None);
    let (attach, delete) = (["volume", "attach", "v", "--node", "k"], ["volume", "delete", "v"]);
    let orders = [deposed.begin(&attach), deposed.begin(&delete)];
    let knows = |volume: Option<&Value>| {
        let conditions = volume.and_then(|v| v["status"]["conditions"].as_array().cloned()).unwrap_or_default();
        conditions.iter().any(|c| c["type"] == "Diverged" && c["status"] == "True")
    };
    deposed.until("the word that servers know more", knows);
    // sleep: for what must not happen there is no event.
    std::thread::sleep(Duration::from_secs(5));
    for mut order in orders {
        assert_eq!(order.has_done(), None, "none of its orders is carried out");
    }
    assert_eq!(cluster.copies(), before.1, "not one copy went");
    let stays = |v: Option<&Value>| v.is_some_and(|v| is_finished(v) && generation(v) >= before.0);
    let after = leader.until("all to be as it was", stays).unwrap();
    assert_eq!(after["status"]["map"]["sessions"][0]["node"], "n", "its session stays");
    deposed.stop();
    leader.ask(&["volume", "detach", "v", "--node", "n"]).unwrap();
    leader.stop();
    cluster.end();
}
