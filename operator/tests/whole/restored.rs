//! Objects that are older than what the servers hold: a restored copy (R6), and a leader that works from one.

use std::fs;
use std::path::Path;

use lamina_operator::admin::v1::{self, admin_server::Admin};
use lamina_operator::runtime::Ended;
use serde_json::Value;
use tempfile::TempDir;
use tonic::Request;

use super::directory::{CLUSTER, Operator, condition, state_is};
use super::servers::Servers;

/// Copies the objects of a directory; locks and what serves it stay.
fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy(&entry.path(), &target);
        } else if !entry.file_name().to_string_lossy().starts_with('.') {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn generation(volume: &Value) -> u64 {
    volume["status"]["generation"].as_u64().unwrap()
}

fn copies(servers: &Servers) -> usize {
    servers.all.iter().map(super::servers::Server::copies).sum()
}

fn diverged(volume: &Value) -> bool {
    let conditions = volume["status"]["conditions"].as_array();
    conditions.is_some_and(|c| !c.is_empty()) && condition(volume, "Diverged")["status"] == "True"
}

/// A volume at a low generation, kept aside, that then goes on to a higher one.
async fn gone_on(folder: &TempDir, old: &TempDir, servers: &Servers) -> (Operator, u64) {
    let operator = Operator::start(folder, None).await;
    operator.add(servers).await;
    operator.volume("v").await.unwrap();
    operator.until("healthy", state_is("Healthy")).await;
    copy(folder.path(), old.path());
    operator.attach("n").await.unwrap();
    operator.detach("n").await.unwrap();
    operator.attach("n").await.unwrap();
    let newest = operator.until("attached", |v| v["status"]["proposed"].is_null()).await;
    (operator, generation(&newest))
}

#[tokio::test(flavor = "multi_thread")]
async fn r6_objects_put_back_to_an_older_copy_change_nothing_until_a_person_adopts_the_servers_map() {
    let (folder, old) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let servers = Servers::start(CLUSTER, 3).await;
    let (operator, newest) = gone_on(&folder, &old, &servers).await;
    let lay = copies(&servers);
    assert_eq!(operator.stop().await, Ended::Stopped);
    // Leaders come and go, so that the servers have heard of a higher number than the one that is put back.
    for _ in 0..2 {
        let operator = Operator::start(&folder, None).await;
        operator.until("there", |v| v["status"]["generation"].is_u64()).await;
        assert_eq!(operator.stop().await, Ended::Stopped);
    }

    copy(old.path(), folder.path());
    let operator = Operator::start(&folder, None).await;
    let told = operator.until("diverged", |v| condition(v, "Diverged")["reason"] == "NewerMapFound").await;
    assert_eq!(told["status"]["state"], "Diverged");
    let before = generation(&told);
    assert!(before < newest, "it is the old copy");
    let text = condition(&told, "Diverged")["message"].as_str().unwrap();
    assert!(text.contains(&newest.to_string()), "it names the map that was found: {text}");
    let attaching = operator.attach("m");
    let waited = tokio::time::timeout(std::time::Duration::from_secs(5), attaching).await;
    assert!(waited.is_err(), "nothing of it is changed meanwhile: {waited:?}");
    let now = operator.until("there", |_| true).await;
    assert_eq!((generation(&now), copies(&servers)), (before, lay));

    // The wish of that other node is not wanted any more; what the servers hold is.
    let adopt = v1::AdoptRequest { volume: "v".to_owned(), generation: newest };
    operator.admin.adopt(Request::new(adopt)).await.unwrap();
    let again = operator.until("healthy", |v| state_is("Healthy")(v) && !diverged(v)).await;
    assert!(generation(&again) >= newest);
    let up_to_date = |v: &Value| v["status"]["attachments"].to_string().contains("Attached") && generation(v) > newest;
    operator.until("attached to whom the objects name", up_to_date).await;
    assert_eq!(copies(&servers), lay, "no copy was made or lost by it");
    assert_eq!(operator.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_with_an_old_map_cannot_harm_anything() {
    let (folder, old) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let servers = Servers::start(CLUSTER, 3).await;
    let (operator, newest) = gone_on(&folder, &old, &servers).await;
    let lay = copies(&servers);
    // Beside the leader works another one, from objects as they were, at the same servers.
    let deposed = Operator::start(&old, None).await;
    let orders = async {
        let _ = tokio::join!(deposed.attach("m"), deposed.delete());
    };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(8), orders).await;
    let stale = deposed.until("there", |_| true).await;
    assert!(
        diverged(&stale) || stale["status"]["map"].is_null(),
        "it sees that servers know more, or has given up a map that nobody obeys: {stale:#}"
    );
    assert_eq!(copies(&servers), lay, "not one copy went by its orders");
    assert_eq!(deposed.stop().await, Ended::Stopped);

    let healthy = operator.until("healthy", state_is("Healthy")).await;
    assert!(!diverged(&healthy));
    assert!(generation(&healthy) >= newest);
    operator.detach("n").await.unwrap();
    operator.attach("k").await.unwrap();
    assert_eq!(operator.stop().await, Ended::Stopped);
}
