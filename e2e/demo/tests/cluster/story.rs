//! The demo itself, as `make demo` tells it, on the cluster of the cases.

use std::process::Command;

use crate::stage::Stage;

/// Runs the demo's program and returns what it said; it ends with status 0 only if no acknowledged commit is lost.
fn demo(stage: &Stage, ground: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    // Where the demo looks for a cluster of its own.
    std::os::unix::fs::symlink(stage.cluster.dir(), folder.path().join("cluster")).unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_lamina-demo"));
    program.args(["run", ground]).env("LAMINA_DEMO_DIR", folder.path()).env("KUBECONFIG", stage.cluster.kubeconfig());
    let output = program.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text.lines().filter(|line| line.contains("longest gap")).for_each(|line| println!("{line}"));
    text
}

pub(crate) fn on_an_own_cluster(stage: &Stage) {
    let text = demo(stage, "--keep");
    assert_eq!(text.matches("SIGKILL to ").count(), 2, "{text}");
    assert!(text.contains("committed without it") && text.contains("pg_amcheck is clean"), "{text}");
}

pub(crate) fn on_an_existing_cluster(stage: &Stage) {
    let text = demo(stage, "--existing");
    assert_eq!(text.matches("is deleted by force").count(), 2, "{text}");
    assert!(text.contains("committed without it") && text.contains("pg_amcheck is clean"), "{text}");
}
