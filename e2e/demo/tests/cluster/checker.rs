//! The demo's judge, judged: on a real PostgreSQL, it passes what was acknowledged and fails what never happened.

use std::process::Command;
use std::time::Duration;

use lamina_cluster::host::{HostError, wait_until};
use lamina_demo::commits::{Clients, database};
use lamina_demo::log::{Acknowledged, Writer, read};
use lamina_demo::run;

use crate::stage::Stage;

/// PostgreSQL as in the demo, but on the node's disk: the judge has nothing to do with Lamina.
fn manifest() -> String {
    let text = run::POSTGRES.replace("persistentVolumeClaim: {claimName: postgres}", "emptyDir: {}");
    assert!(text.contains("emptyDir"), "the demo's manifest names the claim as before");
    text
}

pub(crate) fn forged_commit_fails(stage: &Stage) {
    stage.postgres_image();
    stage.cluster.apply(&manifest()).unwrap();
    let pod = stage.await_pod("postgres-0", "");
    let host = pod.status.pod_ip.as_str();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("commits.log");
    let clients = Clients::start(host, &log, 3).unwrap();
    wait_until::<HostError>("commits", Duration::from_secs(60), || Ok(clients.acknowledged() >= 100)).unwrap();
    let told = clients.stop().unwrap();
    let all = read(&log).unwrap();
    assert_eq!(all.len() as u64, told, "every acknowledged commit is logged once");
    assert!(passes(&log, host), "what was acknowledged is there");

    let forged = folder.path().join("forged.log");
    std::fs::copy(&log, &forged).unwrap();
    Writer::open(&forged).unwrap().append(Acknowledged { client: 1, n: 1_000_000, at_ms: 1 }).unwrap();
    assert!(!passes(&forged, host), "a commit that never happened fails the check");

    let mut database = database(host).connect(postgres::NoTls).unwrap();
    let victim = all[all.len() / 2];
    let keys: [&(dyn postgres::types::ToSql + Sync); 2] = [&(victim.client as i32), &(victim.n as i64)];
    database.execute("update commits set payload = 'torn' where client = $1 and n = $2", &keys).unwrap();
    assert!(!passes(&log, host), "a row with other contents fails the check");
    database.execute("delete from commits where client = $1 and n = $2", &keys).unwrap();
    assert!(!passes(&log, host), "a lost commit fails the check");
}

/// The program's own word, by its exit status.
fn passes(log: &std::path::Path, host: &str) -> bool {
    let mut program = Command::new(env!("CARGO_BIN_EXE_lamina-demo"));
    let output = program.args(["check", "--host", host, "--log"]).arg(log).output().unwrap();
    print!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.code() {
        Some(0) => true,
        Some(1) => false,
        other => panic!("the check ended with {other:?}"),
    }
}
