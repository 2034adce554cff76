//! A Lease that goes back, against a real API server.
#![allow(clippy::unwrap_used)]

use k8s_openapi::api::core::v1::Namespace;
use serde_json::json;

use super::*;

async fn next_number(changes: &mut mpsc::Receiver<Change>) -> u64 {
    match changes.recv().await.unwrap() {
        Change::LeaseNumber(number) => number,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn r6_a_term_ends_when_the_lease_has_gone_back_and_not_when_others_only_touched_it() {
    let test = "r6_a_term_ends_when_the_lease_has_gone_back_and_not_when_others_only_touched_it";
    let Some(server) = lamina_test_apiserver::start_or_skip(test).await else { return };
    let client = server.client().await.unwrap();
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": "lamina"}})).unwrap();
    Api::all(client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
    let replica =
        Replica { name: "a".to_owned(), namespace: "lamina".to_owned(), address: "127.0.0.1:4710".to_owned() };
    let held = Candidate::new(client.clone(), replica).acquire(|_| ()).await;
    let leases: Api<Lease> = Api::namespaced(client, "lamina");
    let old = leases.get(LEASE).await.unwrap();
    let (say, mut changes) = mpsc::channel(16);
    let (_raise, raised) = watch::channel(0);
    let term = tokio::spawn(held.keep(say, raised));
    let before = next_number(&mut changes).await;

    let mut touched = leases.get(LEASE).await.unwrap();
    touched.metadata.labels.get_or_insert_default().insert("touched".to_owned(), "yes".to_owned());
    leases.replace(LEASE, &PostParams::default(), &touched).await.unwrap();
    while next_number(&mut changes).await <= before + 1 {}
    assert!(!term.is_finished(), "it goes on and counts on");

    // What is put back is an older state of this very term, so its holder is the same.
    let version = leases.get(LEASE).await.unwrap().metadata.resource_version;
    let metadata = ObjectMeta { resource_version: version, ..old.metadata };
    leases.replace(LEASE, &PostParams::default(), &Lease { metadata, ..old }).await.unwrap();
    tokio::time::timeout(3 * GIVE_UP, term).await.expect("the term ends").unwrap();
}
